"""Which faults a simulation has, under what load."""

from dataclasses import dataclass

from emberfs.proto.ids import SECOND

PATIENT_NS = 60 * SECOND  # the default of the product: nothing may fail within it


@dataclass(frozen=True)
class Mood:
    """Which faults a run has."""

    name: str
    faults: tuple[str, ...]
    overlap: bool = False  # several at a time, anywhere; else the cluster recovers in between
    messages: bool = False  # loss, duplicates, delays all the time
    hot: bool = False  # most operations go to one chunk, in quick succession
    heirs: bool = False  # most deaths of storage processes are reported, as their hosts do it
    gentle: bool = False  # within the replication factor: no client may see an error
    patience_ns: int = PATIENT_NS  # of the clients, if gentle
    metas: int = 1  # metadata servers; several stand on one store
    files: bool = False  # names and files on a metadata server, instead of bare chunks


_PROCESS = ("kill storage", "freeze storage", "die between disk operations")
_NETWORK = ("partition", "one-way partition", "isolate storage", "reset", "slow machine")
_HOLD = "hold messages"
_CONTROL = ("kill mgmtd", "freeze mgmtd", "pause kv", "wall clock step", "isolate mgmtd")

MOODS = {
    mood.name: mood
    for mood in (
        Mood("calm", ()),
        Mood("gentle", (*_PROCESS, *_CONTROL, "reset"), gentle=True),
        Mood("messages", (), messages=True),
        Mood("processes", (*_PROCESS, *_CONTROL, "kill client"), overlap=True),
        Mood("network", (*_NETWORK, "isolate mgmtd", "pause kv"), overlap=True, messages=True),
        Mood("power", ("power cut of one", "kill storage", "blank disk"), messages=True),
        Mood("disk", ("rot", "disk full", "disk errors", "slow disk", "kill storage")),
        Mood(
            "everything",
            (*_PROCESS, *_NETWORK, *_CONTROL, _HOLD, "slow disk", "disk full", "kill client"),
            overlap=True,
            messages=True,
        ),
        Mood("outage", ("kill all storage", "power cut of one", "kill storage"), messages=True),
        Mood(
            "aimed",
            (
                "die at an answer",
                "strike at recovery",
                "client and server",
                "kill storage",
                "reset",
            ),
            overlap=True,
            messages=True,
        ),
        # One power cut of everything, amid the load; what was flushed must be there afterwards.
        Mood("blackout", ("blackout", "blackout", "die between disk operations")),
        Mood("contention", ("freeze storage", "slow disk", "reset"), messages=True, hot=True),
        Mood(
            "hot recovery",
            ("kill storage", "long death", "slow machine", "slow disk"),
            overlap=True,
            messages=True,
            hot=True,
        ),
        # Messages of one kind wait, while everything else goes on.
        Mood(
            "late messages",
            (_HOLD, _HOLD, "hold messages of mgmtd", "kill storage", "long death", "isolate mgmtd"),
            overlap=True,
            messages=True,
            hot=True,
        ),
        # Whoever returns has lost something: all, what was not flushed, or its time. One after
        # the other: two that lose what was not flushed may lose it for good.
        Mood(
            "losses",
            ("blank disk", "power cut of one", "long death", _HOLD, "kill storage"),
            hot=True,
        ),
        # The management services and their store.
        Mood(
            "managers",
            (*_CONTROL, *_CONTROL, "power cut of kv", "hold messages of mgmtd", "long death"),
            overlap=True,
            messages=True,
        ),
        # A storage node and a client, out of sight of all others, believe in the chains of before.
        Mood("two worlds", ("cut off with a client",), hot=True),
        # Only mgmtd can know of it, and only if it is told; no write may wait until it is over.
        Mood("cut links", ("cut between two",), gentle=True, patience_ns=9 * SECOND),
        Mood(
            "cut links and more",
            ("cut between two", "cut off and deaf", "kill storage", "freeze storage", "reset"),
            overlap=True,
            messages=True,
            hot=True,
        ),
        Mood(
            "reported deaths",
            (*_PROCESS, "quick restart", "kill all storage", "kill mgmtd", "isolate storage"),
            overlap=True,
            messages=True,
            heirs=True,
            hot=True,
        ),
    )
}
