"""The model notices when a rule of meta is broken: each of these by itself must fail its test.

Those that take some seconds are part of the long form, see test_meta_model.py.
"""

import stat
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from msgspec.structs import replace

from emberfs.meta import attributes, files, namespace, permission, rename, replies, resolve, tree
from emberfs.meta import xattr as xattrs
from emberfs.proto.ids import InodeId
from unit.test_meta_model import IS_LONG, Agreement

Patch = Callable[[pytest.MonkeyPatch], None]

_NO_CHECK: Callable[..., None] = lambda *_, **__: None  # noqa: E731


def _sticky_is_ignored(patch: pytest.MonkeyPatch) -> None:
    def removable(directory: Any, victim: Any, caller: Any) -> None:
        permission.require(directory, caller, permission.WRITE | permission.EXECUTE)
        permission.require_mutable(victim)

    patch.setattr(namespace, "require_removable", removable)
    patch.setattr(rename, "require_removable", removable)


def _supplementary_groups_are_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(permission, "in_group", lambda caller, gid: gid == caller.gid)


def _owner_gets_what_others_get(patch: pytest.MonkeyPatch) -> None:
    def allows(inode: Any, caller: Any, want: int) -> bool:
        mode = inode.mode | inode.mode << 6
        return caller.uid == 0 or permission_allows(replace(inode, mode=mode), caller, want)

    permission_allows = permission.allows
    patch.setattr(permission, "allows", allows)


def _set_group_directory_is_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(namespace, "created_owner", lambda parent, caller, mode: (caller.gid, mode))


def _set_id_stays_on_chown(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attributes, "without_set_id", lambda mode: mode)


def _set_group_goes_without_group_execution(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attributes, "without_set_id", lambda mode: mode & ~(stat.S_ISUID | stat.S_ISGID))


def _owners_give_files_away(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attributes, "in_group", lambda caller, gid: True)


def _directories_move_below_themselves(patch: pytest.MonkeyPatch) -> None:
    async def check(self: Any) -> None:
        return

    patch.setattr(rename._Move, "check_loops", check)


def _directories_replace_full_ones(patch: pytest.MonkeyPatch) -> None:
    async def empty(txn: Any, directory: InodeId) -> bool:
        return True

    patch.setattr(rename, "is_empty", empty)


def _subdirectories_are_not_counted(patch: pytest.MonkeyPatch) -> None:
    def touch(txn: Any, directory: Any, now_ns: int, links: int = 0) -> None:
        tree.touch_directory(txn, directory, now_ns)

    patch.setattr(rename, "touch_directory", touch)


def _a_lost_name_leaves_ctime(patch: pytest.MonkeyPatch) -> None:
    async def drop(txn: Any, inode: Any, now_ns: int) -> None:
        await tree.drop_link(txn, inode, inode.ctime_ns)

    patch.setattr(namespace, "drop_link", drop)


def _an_open_file_goes_with_its_name(patch: pytest.MonkeyPatch) -> None:
    async def none(txn: Any, inode: InodeId) -> bool:
        return False

    patch.setattr(tree, "has_sessions", none)


def _replies_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    async def run(
        self: Any, method: Any, request: Any, work: Callable[[Any], Awaitable[Any]], **_: bool
    ) -> Any:
        return await self._engine.run(work)

    patch.setattr(replies.Replies, "run", run)


def _the_immutable_are_removed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(permission, "require_mutable", _NO_CHECK)


def _attributes_of_the_immutable_change(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(xattrs, "require_mutable", _NO_CHECK)


def _search_right_is_not_needed(patch: pytest.MonkeyPatch) -> None:
    async def load(txn: Any, inode: InodeId, caller: Any, want: int) -> Any:
        return await tree.load_directory(txn, inode, caller, 0)

    patch.setattr(resolve, "load_directory", load)


def _times_are_for_everybody(patch: pytest.MonkeyPatch) -> None:
    with_times = attributes._with_times

    class Asked:
        def __init__(self, request: Any) -> None:
            self.atime_ns, self.mtime_ns = request.atime_ns, request.mtime_ns
            self.caller = replace(request.caller, uid=0)

    patch.setattr(
        attributes,
        "_with_times",
        lambda before, inode, request, now_ns: with_times(before, inode, Asked(request), now_ns),
    )


def _create_looks_at_no_right(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(files, "require", _NO_CHECK)


QUICK: tuple[Patch, ...] = (
    _sticky_is_ignored,
    _set_group_directory_is_ignored,
    _directories_move_below_themselves,
    _search_right_is_not_needed,
    _replies_are_forgotten,
)
LONG: tuple[Patch, ...] = (
    _directories_replace_full_ones,
    _subdirectories_are_not_counted,
    _times_are_for_everybody,
    _supplementary_groups_are_ignored,
    _owner_gets_what_others_get,
    _set_id_stays_on_chown,
    _set_group_goes_without_group_execution,
    _owners_give_files_away,
    _a_lost_name_leaves_ctime,
    _an_open_file_goes_with_its_name,
    _the_immutable_are_removed,
    _attributes_of_the_immutable_change,
    _create_looks_at_no_right,
)
MUTATIONS = QUICK + (LONG if IS_LONG else ())


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__.strip("_"))
def test_model_notices(mutation: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation(monkeypatch)
    quick = settings(
        max_examples=1000,
        stateful_step_count=40,
        deadline=None,
        phases=(Phase.generate,),
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    with pytest.raises((AssertionError, KeyError)):
        run_state_machine_as_test(Agreement, settings=quick)
