"""What the store of the simulated metadata server holds: the tree, replies, what is left to do."""

import stat
from typing import NamedTuple

from emberfs.kv import keys
from emberfs.kv.memory import MemoryStore
from emberfs.meta import schema
from sim.check_lives import Seen
from sim.check_tree import DIRECTORY, FILE, Node, Place
from sim.cluster import World
from sim.machine import Machine
from sim.names_record import reply_in_words
from sim.shared_store import STORE as ROWS

STORE = "/meta/kv"


class Leftover(NamedTuple):
    """A record that should have gone in the end."""

    kind: str
    inode: int
    client: int = 0  # of a session


def store_of(machine: Machine) -> MemoryStore:
    """The rows of a metadata server, as its disk has them now."""
    return machine.disk.stores.setdefault(STORE, MemoryStore())


def rows_of(world: World) -> MemoryStore:
    """The rows of all metadata servers, wherever they lie."""
    if world.shape.shared:
        return world.rows.disk.stores.setdefault(ROWS, MemoryStore())
    return store_of(world.meta[0])


def seen_of(store: MemoryStore) -> Seen:
    """Return the namespace of this instant, and which requests have taken effect."""
    tree: dict[Place, Node] = {}
    for key, value in _rows(store, keys.Prefix.ENTRY):
        entry = schema.ENTRY.decode(value)
        kind = DIRECTORY if stat.S_ISDIR(entry.mode) else FILE
        parent = int.from_bytes(key[1:9], "big")
        tree[parent, keys.entry_name(key).decode()] = (kind, entry.inode)
    removed = {keys.unpack_inode_suffix(key) for key, _ in _rows(store, keys.Prefix.REMOVED)}
    _take_away(tree, removed)
    answers = {}
    for key, value in _rows(store, keys.Prefix.REPLY):
        client, sequence = int.from_bytes(key[1:9], "big"), int.from_bytes(key[9:17], "big")
        reply = schema.REPLY.decode(value)
        if not reply.code:  # else it is remembered to have failed
            answers[client, sequence] = reply_in_words(reply)
    return Seen(tree, answers)


def _take_away(tree: dict[Place, Node], removed: set[int]) -> None:
    """What is in a removed tree has no names, though the records are still there."""
    while removed:
        below = [place for place in tree if place[0] in removed]
        removed = {node[1] for node in map(tree.pop, below) if node[0] == DIRECTORY}


def leftovers(store: MemoryStore) -> list[Leftover]:
    """Sessions, deletions, trims, removed directories that are recorded now."""
    found = []
    for key, value in _rows(store, keys.Prefix.SESSION):
        inode, _ = keys.unpack_session_key(key)
        found.append(Leftover("session", inode, schema.SESSION.decode(value).client))
    for prefix, kind in (
        (keys.Prefix.DELETED, "deletion"),
        (keys.Prefix.TRIM, "trim"),
        (keys.Prefix.REMOVED, "removed directory"),
        (keys.Prefix.WALK, "walk of a quota"),
    ):
        found += [Leftover(kind, keys.unpack_inode_suffix(k)) for k, _ in _rows(store, prefix)]
    return found


def _rows(store: MemoryStore, prefix: keys.Prefix) -> list[tuple[bytes, bytes]]:
    return store.scan(*keys.span_of(bytes(prefix.value)))
