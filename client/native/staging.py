"""Memory of an application that lies in no region: it is copied through one, once."""

import errno
from collections.abc import Sequence

from emberfs.client.file import buffer_of
from emberfs.client.native.connection import Connection, Memory
from emberfs.fabric.region import Slice, view_of

_ALIGN_BYTES = 64


class Staging:
    """The detour of some pieces of memory of one batch."""

    def __init__(
        self, connection: Connection, places: Sequence[int], memories: Sequence[Memory], copy: bool
    ) -> None:
        """`places` of the pieces in the batch; with `copy` they are what is to be written."""
        self._connection = connection
        self._places = places
        self._views = [view_of(buffer_of(memory)) for memory in memories]
        sizes = [-(-len(view) // _ALIGN_BYTES) * _ALIGN_BYTES for view in self._views]
        if not copy and any(view.readonly for view in self._views):
            raise TypeError("memory to be read into is read-only")
        self._region = connection.borrow(max(sum(sizes), 1))
        self.slices: list[Slice] = []
        at = 0
        for view, size in zip(self._views, sizes, strict=True):
            self.slices.append(self._region.slice(at, len(view)))
            at += size
            if copy:
                self.slices[-1].view[:] = view
        self._copy_back = not copy

    def finish(self, results: Sequence[object]) -> None:
        """All is complete: copy what was read to where it belongs."""
        usable = True
        for place, view, part in zip(self._places, self._views, self.slices, strict=True):
            result = results[place]
            if isinstance(result, OSError):
                usable &= result.errno != errno.EREMOTEIO
            elif isinstance(result, int) and result and self._copy_back:
                view[:result] = part.view[:result]
        self._connection.give_back(self._region, usable=usable)
