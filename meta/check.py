"""What must hold among metadata records, as rules: records in, findings out.

A finding carries its evidence, so one that is found twice, equal in all fields, describes something
that did not change in between. `Mend` is the repair that may follow (meta/mend.py performs it).

| rule | invariant (schema.py) |
|---|---|
| entry_finding | an entry lies in a directory, names an existing inode, has its type |
| misplaced_finding | a directory has one name, in the directory that its ".." says |
| link_finding | link counts are the number of names; who has none is held by a session |
| Ancestry | from every directory ".." leads to the root |
| session_finding, belonging_finding | sessions, attributes and trims have an inode; clients live |
| content_finding | a content belongs to an inline file and is not longer than it |
| owner_finding, unowned_finding | a data id and the inode that names it know each other |
| queue_finding | what waits for collection does not exist any more |
| reply_findings | a remembered reply and its age: both or neither |
| census_finding | the counter of inodes is their number |
"""

import stat
import struct
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from emberfs.kv import keys
from emberfs.meta import schema
from emberfs.proto.errors import EmberfsError
from emberfs.proto.files import Inode
from emberfs.proto.ids import ROOT_INODE, TRASH_INODE, InodeId
from emberfs.proto.meta_calls import Mend, MendKind

_ID_BYTES = 8
TOPS = (ROOT_INODE, TRASH_INODE)  # directories without a name


class Finding(NamedTuple):
    """Something that is wrong, its evidence, and what would mend it."""

    text: str
    cure: str  # "" if only a person can decide
    mend: Mend | None


def corrupt(key: bytes, problem: object) -> Finding:
    """A record that cannot be understood: nothing can be concluded from it."""
    return Finding(f"record {key.hex()}: {problem}", "", None)


# ---------------------------------------------------------------- inodes and names


def read_inode(key: bytes, value: bytes) -> Inode | Finding:
    """Return the inode of a record, or why it is none."""
    try:
        inode = schema.INODE.decode(value)
    except EmberfsError as problem:
        return corrupt(key, problem)
    if keys.inode_key(inode.id) != key:
        return corrupt(key, f"holds inode {inode.id}, which belongs elsewhere")
    if inode.is_file() and (inode.layout is None or not inode.layout.chains):
        return corrupt(key, f"file {inode.id} has no layout")
    return inode


def read_entry(key: bytes, value: bytes) -> tuple[InodeId, schema.Entry] | Finding:
    """Return the directory and what a name leads to, or why it is no entry."""
    if len(key) <= 1 + _ID_BYTES:
        return corrupt(key, "an entry without a name")
    try:
        return parent_of(key), schema.ENTRY.decode(value)
    except EmberfsError as problem:
        return corrupt(key, problem)


def parent_of(key: bytes) -> InodeId:
    """Return the inode id behind the prefix: directory of an entry, owner of a record."""
    number: int = struct.unpack(">Q", key[1 : 1 + _ID_BYTES])[0]
    return InodeId(number)


def entry_finding(
    key: bytes, value: bytes, parent: Inode | None, inode: Inode | None
) -> Finding | None:
    """Judge one name by the inodes of its directory and of what it leads to."""
    name, directory = keys.entry_name(key), parent_of(key)
    entry = schema.ENTRY.decode(value)
    drop = Mend(MendKind.DROP_ENTRY, parent=directory, name=name, expected=value)
    where = f"{name!r} in directory {directory}"
    if parent is None or not parent.is_directory():
        why = "does not exist" if parent is None else "is no directory"
        return Finding(f"{where}: inode {directory} {why}", "drop the name", drop)
    if inode is None:
        text = f"{where} leads to inode {entry.inode}, which does not exist"
        return Finding(text, "drop the name", drop)
    if stat.S_IFMT(inode.mode) != entry.mode:
        text = f"{where} has type {entry.mode:o}, inode {inode.id} has {stat.S_IFMT(inode.mode):o}"
        mend = Mend(MendKind.FIX_ENTRY, parent=directory, name=name, expected=value)
        return Finding(text, "write the inode's type into the entry", mend)
    return None


def is_misplaced(key: bytes, inode: Inode | None) -> bool:
    """Tell a name of a directory whose ".." leads to another directory."""
    return inode is not None and inode.is_directory() and inode.parent != parent_of(key)


def misplaced_finding(
    key: bytes, value: bytes, inode: Inode, stored: bytes, *, named_by_parent: bool
) -> Finding:
    """Judge a misplaced name; `named_by_parent`: the directory has its name in its ".." too."""
    name, directory = keys.entry_name(key), parent_of(key)
    text = f'directory {inode.id} is {name!r} in directory {directory}, its ".." is {inode.parent}'
    if named_by_parent:
        drop = Mend(MendKind.DROP_ENTRY, parent=directory, name=name, expected=value)
        return Finding(f"{text}, where it has a name too", "drop this second name", drop)
    move = Mend(MendKind.SET_PARENT, inode=inode.id, parent=directory, name=name, expected=stored)
    return Finding(text, f'let its ".." be {directory}', move)


class LinkCount:
    """Counts the names of some inodes, in few bytes each, while all entries pass by."""

    def __init__(self) -> None:
        self._names: dict[int, int] = {}
        self._subdirectories: dict[int, int] = {}
        self._suspects: set[int] = set()

    @property
    def inodes(self) -> int:
        """How many inodes are counted for."""
        return len(self._names)

    def expect(self, inode: Inode) -> None:
        """Begin to count for this inode. What is left at the end is the difference.

        A directory of a removed tree has no names, and is taken to pieces: nothing is counted.
        """
        if inode.is_directory() and not inode.parent:
            return
        if inode.is_directory():
            self._names[inode.id] = int(inode.id not in TOPS)
            self._subdirectories[inode.id] = inode.nlink - 2
        else:
            self._names[inode.id] = inode.nlink
            if inode.nlink == 0:
                self._suspects.add(inode.id)

    def see(self, parent: int, entry: schema.Entry) -> None:
        """One name passes by."""
        if entry.inode in self._names:
            self._names[entry.inode] -= 1
        if stat.S_ISDIR(entry.mode) and parent in self._subdirectories:
            self._subdirectories[parent] -= 1

    def suspects(self) -> list[InodeId]:
        """Inodes whose counts differ, or that have no name; in order."""
        found = self._suspects | {i for i, left in self._names.items() if left}
        found |= {i for i, left in self._subdirectories.items() if left}
        return [InodeId(number) for number in sorted(found)]

    def seen(self, inode: Inode) -> tuple[int, int]:
        """Return how many names and subdirectories were seen, if the inode did not change."""
        if inode.is_directory():
            names = int(inode.id not in TOPS) - self._names[inode.id]
            return names, inode.nlink - 2 - self._subdirectories[inode.id]
        return inode.nlink - self._names[inode.id], 0


def link_finding(
    inode: Inode, stored: bytes, names: int, subdirectories: int, *, is_open: bool
) -> Finding | None:
    """Judge the link count of an inode by what was counted."""
    directory, what = inode.is_directory(), f"inode {inode.id}"
    if names == 0 and inode.id not in TOPS:
        if not directory and inode.nlink == 0:
            destroy = Mend(MendKind.DESTROY, inode=inode.id, expected=stored)
            text = f"{what} has neither a name nor a session, and nobody collects it"
            return None if is_open else Finding(text, "delete it with its chunks", destroy)
        attach = Mend(MendKind.ATTACH, inode=inode.id, expected=stored)
        text = f"{what} has no name and claims {inode.nlink} links"
        return Finding(text, f"attach it as /lost+found/#{inode.id}", attach)
    right = subdirectories + 2 if directory else names
    if directory and names > int(inode.id not in TOPS):
        return Finding(f"directory {what} has {names} names", "", None)
    if inode.nlink == right:
        return None
    mend = Mend(MendKind.SET_LINKS, inode=inode.id, number=right, expected=stored)
    text = f"{what} has link count {inode.nlink}, counted {right}"
    return Finding(text, f"set the link count to {right}", mend)


class Ancestry:
    """Follows ".." from directories to the top; remembers what is known to arrive there."""

    def __init__(self, known_max: int) -> None:
        self._known: set[int] = set(TOPS)
        self._known_max = known_max
        self._up: dict[int, int] = {}  # of the directories in question

    def ask(self, inode: Inode) -> None:
        """Put a directory in question."""
        if inode.id not in self._known:
            self._up[inode.id] = inode.parent

    def unknown(self) -> list[InodeId]:
        """Parents that must be looked up (answer with `learn`), in order."""
        missing = {p for p in self._up.values() if p not in self._known and p not in self._up}
        return [InodeId(number) for number in sorted(missing)]

    def learn(self, number: InodeId, inode: Inode | None) -> None:
        """A parent was looked up. One that is no directory is judged by other rules."""
        if inode is None or not inode.is_directory():
            self._known.add(number)
        else:
            self._up[number] = inode.parent

    def cycles(self) -> list[InodeId]:
        """Return the lowest directory of every cycle, and forget the questions."""
        found: set[int] = set()
        for start in self._up:
            path: dict[int, None] = {}
            at = start
            while at not in self._known and at not in path:
                path[at] = None
                at = self._up[at]
            if at in path:
                members = list(path)[list(path).index(at) :]
                found.add(min(members))
            self._known.update(path)
        self._up.clear()
        if len(self._known) > self._known_max:
            self._known = set(TOPS)
        return [InodeId(number) for number in sorted(found)]


def cycle_finding(inode: Inode, stored: bytes, name: bytes) -> Finding:
    """A directory that is its own ancestor; `name` is its name in its parent."""
    text = f"directory {inode.id} ({name!r} in directory {inode.parent}) lies below itself"
    mend = Mend(MendKind.ATTACH, inode=inode.id, parent=inode.parent, name=name, expected=stored)
    return Finding(text, f"take it out, attach it as /lost+found/#{inode.id}", mend)


# ---------------------------------------------------------------- what belongs to an inode


def session_finding(
    key: bytes, value: bytes, *, inode_exists: bool, overdue: frozenset[int]
) -> Finding | None:
    """Judge a session by its inode and by the clients that are gone for long."""
    number, session = keys.unpack_session_key(key)
    if not inode_exists:
        return belonging_finding(key, value, "session")
    client = schema.SESSION.decode(value).client
    if client not in overdue:
        return None
    mend = Mend(MendKind.END_SESSION, inode=InodeId(number), number=session, expected=value)
    text = f"session {session} on inode {number}: its client {client:016x} is gone"
    return Finding(text, "end the session", mend)


def belonging_finding(key: bytes, value: bytes, what: str) -> Finding:
    """A session, attribute or trim whose inode does not exist."""
    owner = parent_of(key)
    mend = Mend(MendKind.DROP_RECORD, inode=owner, name=key, expected=value)
    return Finding(f"{what} of inode {owner}, which does not exist", f"drop the {what}", mend)


def content_finding(key: bytes, value: bytes, inode: Inode | None) -> Finding | None:
    """Judge the content of a small file."""
    if inode is None:
        return belonging_finding(key, value, "content")
    if not inode.inline:
        mend = Mend(MendKind.DROP_RECORD, inode=inode.id, name=key, expected=value)
        return Finding(f"inode {inode.id} has a content beside it and chunks", "drop it", mend)
    if len(value) > inode.length:
        text = f"content of inode {inode.id}: {len(value)} bytes, it has {inode.length}"
        return Finding(text, "", None)
    return None


def owner_finding(key: bytes, value: bytes, inode: Inode | None) -> Finding | None:
    """Judge the owner record of a data id by the inode that it leads to."""
    data = parent_of(key)
    if inode is not None and inode.layout is not None and inode.layout.data == data:
        return None
    owner = InodeId(keys.unpack_owner(value))
    mend = Mend(MendKind.DROP_RECORD, inode=owner, name=key, expected=value)
    text = f"data id {data} leads to inode {owner}, which does not have it"
    return Finding(text, "drop the record", mend)


def unowned_finding(inode: Inode, stored: bytes, owner: bytes | None) -> Finding | None:
    """Judge an inode with a data id by the record of that id."""
    if owner == keys.pack_owner(inode.id):
        return None
    assert inode.layout is not None
    text = f"inode {inode.id} has data id {inode.layout.data}, which does not lead to it"
    mend = Mend(MendKind.OWN_DATA, inode=inode.id, expected=stored)
    return Finding(text, "let it lead there", None if owner is not None else mend)


def queue_finding(key: bytes, value: bytes) -> Finding:
    """A file that waits for the collection of its chunks, and exists."""
    owner = InodeId(keys.unpack_inode_suffix(key))
    mend = Mend(MendKind.DROP_RECORD, inode=owner, name=key, expected=value)
    text = f"inode {owner} exists, and its chunks wait to be deleted"
    return Finding(text, "take it from the deletion queue", mend)


def age_finding(key: bytes, value: bytes) -> Finding:
    """The age of a reply that is not remembered."""
    _, _, client, sequence = keys.unpack_reply_age_key(key)
    mend = Mend(MendKind.DROP_RECORD, name=key, expected=value)
    text = f"age of a reply that does not exist, request {client:016x}/{sequence}"
    return Finding(text, "drop the age", mend)


def reply_findings(replies: Iterable[bytes], values: Mapping[bytes, bytes | None]) -> list[Finding]:
    """Judge replies for which no age was found: nothing would ever forget them."""
    found = []
    for key in replies:
        value = values.get(key)
        if value is not None:
            mend = Mend(MendKind.DROP_RECORD, name=key, expected=value)
            found.append(Finding(f"reply {key[1:].hex()} has no age", "drop the reply", mend))
    return found


def census_finding(inodes: int, counter: int) -> Finding | None:
    """Compare the counter that df shows with the truth of the same moment."""
    if inodes == counter:
        return None
    text = f"the counter of inodes says {counter}, there are {inodes}"
    return Finding(text, "correct the counter", Mend(MendKind.SET_COUNTER))
