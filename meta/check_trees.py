"""What must hold for quotas, removed trees and the trash, as rules; see check.py.

| rule | invariant (schema.py) |
|---|---|
| quota_name_finding | what has a name counts for the quota of the directory that the name is in |
| quota_finding | a directory that has a quota counts for it, and that for the one around it |
| usage_findings | counters are the sums over all inodes |
| removed_finding, unqueued_finding | a directory without a name waits in the queue, nothing else |
| trash_finding, lost_trash_finding | records and names of the trash belong together |
"""

from collections.abc import Iterable, Mapping

from emberfs.kv import keys
from emberfs.meta import schema
from emberfs.meta.check import Finding
from emberfs.meta.schema import QuotaState
from emberfs.proto.files import Inode
from emberfs.proto.ids import TRASH_INODE, InodeId
from emberfs.proto.meta_calls import Mend, MendKind
from emberfs.proto.quota_calls import QuotaDifference

Quotas = Mapping[InodeId, schema.Quota]


def quota_name_finding(
    key: bytes, parent: Inode, inode: Inode, stored: bytes, quotas: Quotas
) -> Finding | None:
    """Judge what an inode counts for by the directory that it has a name in.

    Other rules hold while something is counted anew, for a file with several names, which counts
    for the quota of one of them, and in the trash.
    """
    if parent.id == TRASH_INODE or (inode.nlink > 1 and not inode.is_directory()):
        return None
    own = inode.quota == inode.id
    if own:
        record = quotas.get(inode.id)
        wrong = record is None or record.above != parent.quota
    else:
        wrong = inode.quota != parent.quota
    if not wrong or _changing(quotas):
        return None
    text = (
        f"inode {inode.id} ({keys.entry_name(key)!r} in directory {parent.id}) counts for quota "
        f"{inode.quota}, its directory for {parent.quota}"
    )
    mend = Mend(
        MendKind.RECOUNT,
        inode=inode.id,
        parent=parent.id,
        name=keys.entry_name(key),
        expected=stored,
    )
    return Finding(text, "count it, and what is below it, for the quota it is in", mend)


def _changing(quotas: Quotas) -> bool:
    return any(record.state != QuotaState.ACTIVE for record in quotas.values())


def quota_finding(key: bytes, value: bytes, directory: Inode | None) -> Finding | None:
    """Judge a quota by the directory that has it."""
    number = InodeId(keys.unpack_inode_suffix(key))
    record = schema.QUOTA.decode(value)
    if record.state == QuotaState.REMOVING:
        return None
    if directory is not None and directory.is_directory() and directory.quota == number:
        return None
    mend = Mend(MendKind.DROP_QUOTA, inode=number, expected=value)
    return Finding(f"the quota of directory {number} limits nothing", "remove it", mend)


def usage_findings(differences: Iterable[QuotaDifference]) -> list[Finding]:
    """Counters that are not what was counted."""
    return [
        Finding(
            f"the quota of directory {d.directory} says {d.files_counter} files and "
            f"{d.bytes_counter} bytes, there are {d.files} and {d.bytes}",
            "correct the counters",
            Mend(MendKind.SET_USAGE, inode=d.directory),
        )
        for d in differences
    ]


def is_hidden(inode: Inode) -> bool:
    """Tell a directory that was removed as the top, or as a part, of a tree."""
    return inode.is_directory() and not inode.parent


def removed_finding(key: bytes, value: bytes, inode: Inode | None) -> Finding | None:
    """Judge a record of the queue."""
    if inode is None or is_hidden(inode):
        return None  # the queue itself ends what does not exist
    text = f"inode {inode.id} waits to be deleted with what is below it, and has a name"
    mend = Mend(MendKind.DROP_RECORD, inode=inode.id, name=key, expected=value)
    return Finding(text, "take it from the queue", mend)


def unqueued_finding(inode: Inode, stored: bytes) -> Finding:
    """A removed directory that nobody empties."""
    text = f"directory {inode.id} was removed, and nobody takes it to pieces"
    mend = Mend(MendKind.ATTACH, inode=inode.id, expected=stored)
    return Finding(text, f"attach it as /lost+found/#{inode.id}", mend)


def trash_finding(key: bytes, value: bytes, *, has_name: bool) -> Finding | None:
    """Judge a record of the trash."""
    if has_name:
        return None
    number = InodeId(keys.unpack_inode_suffix(key))
    mend = Mend(MendKind.DROP_RECORD, inode=number, name=key, expected=value)
    return Finding(f"inode {number} is not in the trash, its record is", "drop the record", mend)


def trash_key_of(name: bytes) -> bytes | None:
    """Return the key of the record of a name in the trash, None if it cannot have one."""
    parts = name.split(b"-")
    if len(parts) != 2 or not all(part.isdigit() and len(part) < 20 for part in parts):
        return None
    return keys.trash_key(int(parts[0]), int(parts[1]))


def lost_trash_finding(name: bytes, inode: Inode, stored: bytes) -> Finding:
    """Something in the trash that nothing is known of."""
    mend = Mend(MendKind.ATTACH, inode=inode.id, parent=TRASH_INODE, name=name, expected=stored)
    text = f"inode {inode.id} is in the trash without a record"
    return Finding(text, f"attach it as /lost+found/#{inode.id}", mend)
