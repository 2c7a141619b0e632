"""Random samples of a file for torch's DataLoader, one batch of reads per batch of samples.

    samples = Records("emberfs://host:9400/set/train.bin", sample_bytes=4096)
    loader = DataLoader(samples, batch_size=256, shuffle=True, num_workers=4,
                        collate_fn=samples.collate)

torch is imported when the first sample is read.
"""

import errno
import os
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeAlias

from emberfs.client.chunkread import part_of
from emberfs.client.ecosystem.locate import locate, split_url
from emberfs.client.ecosystem.reads import tainted
from emberfs.client.ecosystem.session import Session, session
from emberfs.client.ecosystem.streams import open_sized
from emberfs.client.file import File, read_many
from emberfs.client.oserrors import FileSystemError
from emberfs.fabric.region import Buffer

Tensor: TypeAlias = Any  # torch.Tensor, of uint8 and one dimension
Sample: TypeAlias = Any  # what `transform` makes of one


class Records:
    """A map-style dataset of byte ranges of one file: (offset, length) each, or all of one size.

    Every process that reads, a DataLoader worker started by fork or by spawn, has its own
    connection. What is read stays where it arrived: the samples of a batch are parts of one piece
    of memory, which is used again when the last of them is gone.
    """

    def __init__(
        self,
        url: str,
        *,
        sample_bytes: int = 0,
        index: Sequence[tuple[int, int]] | None = None,
        transform: Callable[[Tensor], Sample] | None = None,
        **storage_options: Any,  # noqa: ANN401 - as locate takes them
    ) -> None:
        """Give `sample_bytes` or an `index` of (offset, length) in bytes.

        `transform` is called with each sample; it must be picklable for spawned workers.
        `storage_options` name the cluster as for fsspec (mgmtd, cluster, directory). A last part
        of the file that is shorter than `sample_bytes` is left out. ValueError for wrong sizes.
        """
        if (sample_bytes > 0) == (index is not None):
            raise ValueError("give either sample_bytes > 0 or an index of (offset, length)")
        host, self._path = split_url(url)
        if host:
            storage_options.setdefault("mgmtd", host)
        self._place = locate(**storage_options)
        self._index = index
        self._sample_bytes = sample_bytes
        self._transform = transform
        self._opened: tuple[Session, File] | None = None
        self._count = len(index) if index is not None else self._size() // sample_bytes

    def __len__(self) -> int:
        """How many samples."""
        return self._count

    def __getitem__(self, place: int) -> Sample:
        """One sample."""
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[Sample]:
        """The samples of a batch, read at once. IndexError, and OSError of the first that failed.

        Short reads (the file has shrunk, an index leads beyond its end) are OSError (EIO).
        """
        whole, spans = self._read(places)
        parts = [whole[start:stop] for start, stop in spans]
        return parts if self._transform is None else [self._transform(part) for part in parts]

    def collate(self, samples: list[Sample]) -> Sample:
        """A batch as one tensor [samples, sample_bytes], without a copy if there was no transform.

        With a transform, or samples of several sizes, what torch's default_collate makes of them.
        """
        import torch
        from torch.utils.data import default_collate

        first = samples[0]
        plain = self._transform is None and self._sample_bytes and isinstance(first, torch.Tensor)
        if not plain or not _adjacent(samples, self._sample_bytes):
            return default_collate(samples)
        shape = (len(samples), self._sample_bytes)
        return first.as_strided(shape, (self._sample_bytes, 1))

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file, for spawned workers."""
        return {**vars(self), "_opened": None}

    def close(self) -> None:
        """Close the file; a later use opens it again."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened[0].release(opened[1])

    def __enter__(self) -> Self:
        """Nothing to do."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def __del__(self) -> None:
        """Close it."""
        if vars(self).get("_opened") is not None:
            self.close()

    def _file(self) -> tuple[Session, File]:
        if self._opened is None or self._opened[0].pid != os.getpid():
            here = session(self._place)
            file, _ = here.run(open_sized(here, self._path, "rb"))
            self._opened = here, file
        return self._opened

    def _size(self) -> int:
        here, file = self._file()
        return here.run(file.stat()).st_size

    def _span(self, place: int) -> tuple[int, int]:
        if not -self._count <= place < self._count:
            raise IndexError(f"sample {place} of {self._count}")
        place %= self._count
        if self._index is None:
            return place * self._sample_bytes, self._sample_bytes
        offset, length = self._index[place]
        return int(offset), int(length)

    def _read(self, places: Sequence[int]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Fill one piece of memory with all samples; where each lies in it."""
        import torch

        wanted = [self._span(int(place)) for place in places]
        spans, position = [], 0
        for _, length in wanted:
            spans.append((position, position + length))
            position += length
        here, file = self._file()
        memory = here.run(_fill(here, file, wanted, position))
        if not position:
            return torch.empty(0, dtype=torch.uint8), spans
        return torch.frombuffer(memory, dtype=torch.uint8), spans


async def _fill(
    here: Session, file: File, wanted: Sequence[tuple[int, int]], size_bytes: int
) -> memoryview:
    """Read (offset, length) each, one behind the other."""
    if not size_bytes:
        return memoryview(b"")
    buffer, view = here.lender.lend(size_bytes)
    problem = await _fill_memory(file, wanted, buffer)
    if problem is not None and tainted(buffer):
        view = memoryview(bytearray(size_bytes))
        problem = await _fill_memory(file, wanted, view)
    if problem is not None:
        raise problem
    return view


async def _fill_memory(
    file: File, wanted: Sequence[tuple[int, int]], buffer: Buffer
) -> OSError | None:
    reads, position = [], 0
    for offset, length in wanted:
        reads.append((file, offset, part_of(buffer, position, length)))
        position += length
    for (offset, length), count in zip(wanted, await read_many(reads), strict=True):
        if isinstance(count, FileSystemError):
            return count
        if count != length:
            text = f"the file ends {length - count} bytes before the sample at {offset} does"
            return OSError(errno.EIO, text, file.name)
    return None


def _adjacent(samples: Sequence[Tensor], sample_bytes: int) -> bool:
    """Tell whether samples lie one behind the other in one storage."""
    storage = samples[0].untyped_storage().data_ptr()
    start = samples[0].data_ptr()
    return all(
        one.data_ptr() == start + place * sample_bytes
        and one.untyped_storage().data_ptr() == storage
        for place, one in enumerate(samples)
    )
