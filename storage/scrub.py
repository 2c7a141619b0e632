"""The scrubber: reads everything again before anybody needs it.

Every chunk of a target is verified from the disk, at a bounded rate; its version, length and digest
are compared with those of the successor, so that every link of a chain is looked at once. What
seems to differ is looked at again while the chunk stands still: nothing that merely changes counts.
Damage is mended from a serving replica; what nobody can mend now is tried again every minute.
"""

import logging
from collections.abc import Callable

import msgspec

from emberfs.proto.errors import EmberfsError
from emberfs.proto.ids import SECOND, ChunkId
from emberfs.proto.storage_calls import ChunkRow, ListRequest
from emberfs.runtime.env import Env
from emberfs.storage.filling import Throttle
from emberfs.storage.forward import Sender
from emberfs.storage.links import Links
from emberfs.storage.metrics import SCRUB_FINDINGS, SCRUB_FINISHED, SCRUBBED_BYTES
from emberfs.storage.repair import Repairer
from emberfs.storage.replica import TargetReplica
from emberfs.storage.resync import END, common_end
from emberfs.storage.scrubplan import Note, Verdict, differing, judge, wait_s

log = logging.getLogger("emberfs.storage.scrub")

PAGE_CHUNKS = 64
LOOK_NS = 1 * SECOND  # how often an idle scrubber looks whether a pass is due
AGAIN_NS = 60 * SECOND  # between attempts to mend what is known to be damaged
NOTE_NS = 30 * SECOND  # how much work a restart repeats


class ScrubSettings(msgspec.Struct, frozen=True):
    """How hard the scrubber works."""

    bytes_per_s: int = 0  # 0: no scrubbing
    interval_s: int = 7 * 24 * 3600  # from the end of a pass to the beginning of the next


class Scrubber:
    """Scrubs one target, for ever."""

    def __init__(
        self,
        env: Env,
        path: str,
        replica: TargetReplica,
        sender: Sender,
        links: Links,
        repairer: Repairer,
        settings: ScrubSettings,
        *,
        lease_ok: Callable[[], bool],
    ) -> None:
        self._env = env
        self._note_path = f"{path}/scrub"
        self._replica = replica
        self._sender = sender
        self._links = links
        self._repairer = repairer
        self._settings = settings
        self._lease_ok = lease_ok
        self._throttle = Throttle(env, settings.bytes_per_s)
        self._noted_ns = 0
        self._mended_ns = 0
        self._done_bytes = 0
        self.findings = 0  # since the process started
        self.note = Note()

    @property
    def percent(self) -> int:
        """How much of the pass in work is done, roughly: 0 to 100."""
        if not self.note.position:
            return 0
        total = max(1, self._replica.store.used_bytes)
        return min(99, 100 * self._done_bytes // total)

    async def run(self) -> None:
        """Pass after pass, while the target serves."""
        if self._settings.bytes_per_s <= 0:
            return
        self.note = await self._env.run_blocking(self._load)
        SCRUB_FINISHED.labels(self._replica.target).set(self.note.finished_s)
        while True:
            await self._env.sleep_ns(LOOK_NS)
            if not self._may():
                continue
            try:
                self._mend_again()
                if wait_s(self.note, self._settings.interval_s, self._now_s()) == 0:
                    await self._pass()
            except (EmberfsError, OSError) as problem:
                log.info("target %d: scrubbing pauses: %s", self._replica.target, problem)

    def _may(self) -> bool:
        return self._replica.state.serves and self._lease_ok()

    def _now_s(self) -> int:
        return self._env.wall_ns() // SECOND

    async def _pass(self) -> None:
        """From where the last one stopped to the end; returns early when the target may not."""
        start = bytes.fromhex(self.note.position)
        if not start:
            self._done_bytes = 0
        while self._may():
            start = await self._page(start)
            if start == END:
                self.note = Note("", self._now_s())
                await self._env.run_blocking(self._store)
                SCRUB_FINISHED.labels(self._replica.target).set(self.note.finished_s)
                log.info("target %d is scrubbed", self._replica.target)
                return
            self.note = msgspec.structs.replace(self.note, position=start.hex())
            if self._env.now_ns() - self._noted_ns >= NOTE_NS:
                self._noted_ns = self._env.now_ns()
                await self._env.run_blocking(self._store)
            self._mend_again()

    async def _page(self, start: bytes) -> bytes:
        """Verify and compare the next chunks; return where to go on."""
        replica = self._replica
        own, own_next = await self._own(start, b"", PAGE_CHUNKS)
        for row in own:
            await self._throttle.pay(row.length)
            if not self._may():
                return start or b"\0"
            await self._verify(ChunkId(row.chunk), row.length)
        view = replica.view
        if not view.serving or view.tail_here:
            return own_next
        theirs = await self._links.list(
            ListRequest(view.successor, start, own_next, PAGE_CHUNKS, serving_only=True)
        )
        own, next_now = await self._own(start, own_next, 2 * PAGE_CHUNKS)
        stop = common_end(next_now, theirs.next) or own_next
        for chunk in differing(own, theirs.rows, stop):
            try:
                await self._settle(chunk)
            except EmberfsError as problem:
                log.warning(
                    "target %d: chunk %s stays different: %s", replica.target, chunk.hex(), problem
                )
        return stop

    async def _own(self, start: bytes, stop: bytes, limit: int) -> tuple[list[ChunkRow], bytes]:
        store = self._replica.store
        return await self._env.run_blocking(lambda: store.list(start, stop, limit))

    # -------------------------------------------------------- one chunk

    async def _verify(self, chunk: ChunkId, length: int) -> None:
        store = self._replica.store
        known = chunk in store.damaged
        sound = await self._env.run_blocking(lambda: store.verify(chunk, from_disk=True))
        SCRUBBED_BYTES.inc(length)
        self._done_bytes += length
        if not sound:
            if not known:
                self._found("damaged", chunk)
            await self._mend(chunk)

    def _found(self, kind: str, chunk: ChunkId) -> None:
        self.findings += 1
        SCRUB_FINDINGS.labels(kind).inc()
        log.warning("target %d: scrub: chunk %s: %s", self._replica.target, chunk.hex(), kind)

    async def _mend(self, chunk: ChunkId) -> None:
        replica = self._replica
        try:
            async with replica.hold(chunk):
                await self._repairer.repair(replica, chunk)
        except EmberfsError as problem:
            log.warning(
                "target %d: chunk %s stays damaged: %s", replica.target, chunk.hex(), problem
            )

    def _mend_again(self) -> None:
        """What is known to be damaged: perhaps a replica has come back that can mend it."""
        now_ns = self._env.now_ns()
        if now_ns - self._mended_ns < AGAIN_NS:
            return
        self._mended_ns = now_ns
        for chunk in sorted(self._replica.store.damaged):
            self._repairer.damaged(self._replica, chunk)

    async def _settle(self, chunk: ChunkId) -> None:
        """Look at a chunk on both sides while it stands still, and make them equal."""
        replica = self._replica
        async with replica.hold(chunk):
            view = replica.view
            if not self._may() or view.tail_here:
                return
            stop = chunk + b"\0"
            answer = await self._links.list(
                ListRequest(view.successor, chunk, stop, 1, serving_only=True, with_writers=True)
            )
            own, _ = await self._own(chunk, stop, 1)
            here = own[0] if own else None
            there = answer.rows[0] if answer.rows else None
            verdict = judge(here, there)
            if replica.view != view or verdict in (Verdict.SAME, Verdict.BUSY):
                return
            if verdict == Verdict.MEND:
                if here is not None and here.damaged:
                    await self._repairer.repair(replica, chunk)
                return  # what is damaged there is mended there
            missing = here is None or there is None
            self._found("missing" if missing else "differing", chunk)
            if verdict == Verdict.FETCH:
                assert there is not None
                await self._repairer.fetch(replica, chunk, there, view.successor)
            else:
                await self._sender.send_committed(
                    replica.store,
                    chunk,
                    replica.store.state(chunk),
                    view.successor,
                    view.chain_version,
                )

    # -------------------------------------------------------- the note

    def _load(self) -> Note:
        disk = self._env.disk
        if not disk.exists(self._note_path):
            return Note()
        try:
            note = msgspec.json.decode(disk.read_small(self._note_path), type=Note)
            bytes.fromhex(note.position)
        except (msgspec.DecodeError, ValueError, OSError) as problem:
            log.warning("%s is not readable (%s): scrubbing begins anew", self._note_path, problem)
            return Note()
        return note

    def _store(self) -> None:
        self._env.disk.replace_small(self._note_path, msgspec.json.encode(self.note) + b"\n")
