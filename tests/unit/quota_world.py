"""Quotas in meta_world: short calls, and the rules that must hold between counters and tree."""

from typing import Any

from emberfs.kv import keys
from emberfs.kv.transaction import unpack_counter
from emberfs.meta import quota_calls as quotas
from emberfs.meta import quota_census, schema, space
from emberfs.meta.quota import BYTES, FILES, Amount
from emberfs.proto import meta_calls as calls
from emberfs.proto import quota_calls
from emberfs.proto.ids import ROOT_INODE, TRASH_INODE, InodeId
from unit.meta_world import ROOT, World


async def set_quota(world: World, inode: int, who: Any = ROOT, **limits: int | None) -> None:
    request = quota_calls.SetQuotaRequest(who, world.rid(), InodeId(inode), **limits)
    await quotas.set_quota(world.context, request)


async def remove_quota(world: World, inode: int, who: Any = ROOT) -> None:
    request = quota_calls.RemoveQuotaRequest(who, world.rid(), InodeId(inode))
    await quotas.remove_quota(world.context, request)


async def show(world: World, inode: int) -> tuple[quota_calls.QuotaReport, ...]:
    request = quota_calls.ShowQuotaRequest(ROOT, InodeId(inode))
    return (await quotas.show_quota(world.context, request)).quotas


async def listed(world: World, who: Any = ROOT) -> tuple[quota_calls.QuotaReport, ...]:
    return (await quotas.list_quotas(world.context, quota_calls.ListQuotasRequest(who))).quotas


async def walked(world: World) -> None:
    """Let what is to be counted anew be counted."""
    await world.context.quota_walks.finish()


async def statfs(world: World, inode: int = 0) -> calls.StatfsAnswer:
    return await space.statfs(world.context, calls.StatfsRequest(InodeId(inode)))


def used(world: World, quota: int) -> Amount:
    """The counters as they are stored."""
    files, length = (world.store.get(keys.usage_key(quota, kind)) for kind in (FILES, BYTES))
    return Amount(unpack_counter(files), unpack_counter(length))


async def check_counters(world: World) -> None:
    """Counters are the sums over all inodes, at every moment."""
    answer = await quota_census.census(world.context, quota_calls.QuotaCensusRequest())
    assert answer.differences == (), answer


def check_tree(world: World) -> None:
    """Nothing is being counted: every inode counts for the nearest quota above one of its names."""
    assert not world.rows(keys.Prefix.WALK)
    inodes = {}
    for _, value in world.rows(keys.Prefix.INODE):
        inode = schema.INODE.decode(value)
        inodes[inode.id] = inode
    quotas = {keys.unpack_inode_suffix(key) for key, _ in world.rows(keys.Prefix.QUOTA)}
    owners: dict[int, set[int]] = {}
    for key, value in world.rows(keys.Prefix.ENTRY):
        owners.setdefault(schema.ENTRY.decode(value).inode, set()).add(
            int.from_bytes(key[1:9], "big")
        )
    for number, inode in inodes.items():
        if number in quotas:
            assert inode.quota == number
        elif owners.get(number) and owners[number] != {TRASH_INODE}:
            allowed = {inodes[parent].quota for parent in owners[number]}
            assert inode.quota in allowed, f"{number} counts for {inode.quota}, not of {allowed}"
        assert inode.quota == 0 or inode.quota in quotas
    for key, value in world.rows(keys.Prefix.QUOTA):
        directory = inodes[keys.unpack_inode_suffix(key)]
        above = inodes[directory.parent].quota if directory.id != ROOT_INODE else 0
        assert schema.QUOTA.decode(value).above == above
