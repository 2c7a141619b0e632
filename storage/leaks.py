"""Freeing blocks that are marked and that nothing names, while the target is at work.

A block leaks when a bitmap in the store marks it and no committed, pending, kept or redo row names
it. None is ever handed out again, so no row can come to name it: what leaks in one snapshot leaks
until somebody frees it, and only one does at a time. What is freed is held like any block whose
last row has gone, until that is stable and no reader looks there.
"""

import threading

from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.storage_calls import Leak
from emberfs.storage.allocator import block_bytes
from emberfs.storage.blockcheck import BlockCheck
from emberfs.storage.table import ChunkTable


class Leaks:
    """Of one store."""

    def __init__(self, table: ChunkTable) -> None:
        self._table = table
        self._one = threading.Lock()

    def check(self) -> BlockCheck:
        """Compare bitmaps with records as they are at one moment. Raises DISK."""
        with self._table.lock:
            self._table.allocator.check()
            snapshot = self._table.store.snapshot()
        found = BlockCheck(snapshot)
        found.run()
        return found

    def free(self, leak: Leak) -> None:
        """Free what was found to leak. STALE if that has changed; NO_SPACE, DISK."""
        with self._one:
            found = self.check().leaked
            blocks = [block for block in found if block_bytes(block) == leak.block_bytes]
            if len(blocks) != leak.count:
                text = f"{len(blocks)} blocks of this size have no owner now; look again"
                raise EmberfsError(Code.STALE, text)
            self._table.free_leaked(blocks)
