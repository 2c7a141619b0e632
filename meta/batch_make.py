"""The transaction of a batch of new files: read what all of them need, decide, write.

Between reading and writing every item is decided by itself. What is refused has left nothing in the
transaction; what is not has its name, inode, content and charge in it, or none of them.
"""

import stat
from typing import NamedTuple

from msgspec.structs import replace

from emberfs.kv import keys
from emberfs.kv.transaction import Transaction
from emberfs.meta import inline, quota, schema
from emberfs.meta.attributes import after_write, is_privileged
from emberfs.meta.context import Context
from emberfs.meta.namespace import check_new_name, new_inode
from emberfs.meta.permission import EXECUTE, WRITE, require
from emberfs.meta.tree import (
    count_inode,
    load_directory,
    read_inode,
    store_entry,
    store_inode,
    touch_directory,
)
from emberfs.proto.batch_calls import ORDINARY, BatchCreateRequest, Outcome, outcome_of
from emberfs.proto.errors import Code, EmberfsError, Reaction
from emberfs.proto.files import Inode
from emberfs.proto.ids import InodeId

_DONE, _ORDINARY = Outcome(), Outcome(ORDINARY)


class Place(NamedTuple):
    """Where a file is to be, and the id that it gets if it is new."""

    parent: InodeId
    name: bytes
    taken: InodeId


class _Plan(NamedTuple):
    """An item that nothing speaks against so far."""

    number: int  # of the item
    place: Place
    parent: Inode
    content: bytes
    old: Inode | None  # the file that is replaced


async def make(
    txn: Transaction,
    context: Context,
    request: BatchCreateRequest,
    places: list[Place | Outcome],
) -> list[Outcome]:
    """Return the outcome of every item; `places` has what is known of it before."""
    batch = _Batch(txn, context, request)
    outcomes = [place if isinstance(place, Outcome) else _DONE for place in places]
    plans = await batch.plan(places, outcomes)
    new = [plan for plan in plans if plan.old is None]
    for parent in {plan.parent.id: plan.parent for plan in new}.values():
        await batch.add([plan for plan in new if plan.parent.id == parent.id], parent, outcomes)
    for plan in plans:
        if plan.old is not None:
            outcomes[plan.number] = await batch.overwrite(plan, plan.old)
    return outcomes


class _Batch:
    """One run of the transaction."""

    def __init__(self, txn: Transaction, context: Context, request: BatchCreateRequest) -> None:
        self._txn = txn
        self._context = context
        self._request = request
        self._now_ns = context.env.wall_ns()

    # ------------------------------------------------------------ read and decide

    async def plan(self, places: list[Place | Outcome], outcomes: list[Outcome]) -> list[_Plan]:
        """Return what can be done; the outcome of the rest is noted."""
        known = [(n, place) for n, place in enumerate(places) if isinstance(place, Place)]
        parents = await self._parents({place.parent for _, place in known})
        entries = await self._txn.get_many([_entry_key(place) for _, place in known])
        taken = await self._txn.get_many([keys.inode_key(place.taken) for _, place in known])
        assert not any(taken), "an inode id was given twice"
        ids = [None if value is None else schema.ENTRY.decode(value).inode for value in entries]
        present = [inode for inode in dict.fromkeys(ids) if inode is not None]
        records = await self._txn.get_many([keys.inode_key(inode) for inode in present])
        inodes = {i: read_inode(i, value) for i, value in zip(present, records, strict=True)}
        plans: list[_Plan] = []
        seen: set[tuple[InodeId, bytes] | InodeId] = set()
        for (number, place), found in zip(known, ids, strict=True):
            old = None if found is None else inodes[found]
            decided = await self._decide(number, place, parents[place.parent], old, seen)
            if isinstance(decided, _Plan):
                plans.append(decided)
            else:
                outcomes[number] = decided
        return plans

    async def _parents(self, wanted: set[InodeId]) -> dict[InodeId, Inode | Outcome]:
        found: dict[InodeId, Inode | Outcome] = {}
        for number in sorted(wanted):
            try:
                caller = self._request.caller
                found[number] = await load_directory(self._txn, number, caller, EXECUTE)
            except EmberfsError as problem:
                found[number] = refusal(problem)
        return found

    async def _decide(
        self,
        number: int,
        place: Place,
        parent: Inode | Outcome,
        old: Inode | None,
        seen: set[tuple[InodeId, bytes] | InodeId],
    ) -> _Plan | Outcome:
        """`seen`: new names, and files that exist (by any name), that earlier items are about."""
        if isinstance(parent, Outcome):
            return parent
        content = self._request.items[number].content
        what = (parent.id, place.name) if old is None else old.id
        try:
            check_new_name(place.name)
            if self._request.exclusive and (old is not None or what in seen):
                raise EmberfsError(Code.EXISTS, f"{place.name!r} exists in directory {parent.id}")
            if old is None:
                require(parent, self._request.caller, WRITE)
            elif not old.is_symlink():
                self._check_replaceable(old)
        except EmberfsError as problem:
            return refusal(problem)
        if what in seen or not await self._fits(old, content):
            return _ORDINARY
        seen.add(what)
        return _Plan(number, place, parent, content, old)

    def _check_replaceable(self, old: Inode) -> None:
        if old.is_directory():
            raise EmberfsError(Code.IS_DIRECTORY, f"inode {old.id} is a directory")
        if not old.is_file():
            raise EmberfsError(Code.UNSUPPORTED, f"inode {old.id} is not a regular file")
        require(old, self._request.caller, WRITE)

    async def _fits(self, old: Inode | None, content: bytes) -> bool:
        """Tell whether the content can lie beside the inode, and nobody must be told of it.

        The client's own open files have writes of their own that are not settled: they are cut in
        order with those, see client/openfile.py.
        """
        limit = self._context.policy.inline_bytes_max
        if not limit or len(content) > limit:
            return False
        if old is None:
            return True
        if not old.inline:
            return False
        rows = await self._txn.get_range(*keys.session_span(old.id))
        own = self._request.request.client
        return all(schema.SESSION.decode(value).client != own for _, value in rows)

    # ------------------------------------------------------------ write

    async def add(self, plans: list[_Plan], parent: Inode, outcomes: list[Outcome]) -> None:
        """Add new files to a directory; those that a quota refuses are left out."""
        made = [(plan, self._built(plan)) for plan in plans]
        amounts = [quota.amount_of(inode) for _, inode in made]
        refused = await quota.charge_each(self._txn, parent.quota, amounts)
        for (plan, inode), problem in zip(made, refused, strict=True):
            if problem is not None:
                outcomes[plan.number] = refusal(problem)
                continue
            count_inode(self._txn, inode)
            store_entry(self._txn, parent.id, plan.place.name, inode)
            inline.store_content(self._txn, inode, plan.content)
        if not all(refused):
            touch_directory(self._txn, parent, self._now_ns)

    def _built(self, plan: _Plan) -> Inode:
        request = self._request
        mode = stat.S_IFREG | stat.S_IMODE(request.mode)
        made = new_inode(
            self._context,
            plan.place.taken,
            plan.parent,
            request.caller,
            mode,
            umask=request.umask,
        )
        return replace(made, length=len(plan.content))

    async def overwrite(self, plan: _Plan, old: Inode) -> Outcome:
        """As a cut to nothing and one write."""
        try:
            await quota.charge_growth(self._txn, old, len(plan.content))
        except EmberfsError as problem:
            return refusal(problem)
        written = after_write(
            inline.replaced(self._txn, self._context.versions, old, plan.content),
            privileged=is_privileged(self._request.caller),
            now_ns=self._now_ns,
            mtime_ns=None,
        )
        store_inode(self._txn, replace(written, sparse=False))
        return _DONE


def _entry_key(place: Place) -> bytes:
    return keys.entry_key(place.parent, place.name)


def refusal(problem: EmberfsError) -> Outcome:
    """The outcome of one item; raised again if the whole call is to be tried again."""
    if problem.reaction != Reaction.GIVE_UP:
        raise problem
    return outcome_of(problem)
