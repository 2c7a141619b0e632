"""What one application has given to the daemon: memory and open files. All of it is hostile.

Memory must be a memfd that cannot shrink, or an access would kill the daemon (SIGBUS). A file must
be a descriptor of this very mount: it proves that the kernel has let the application open it, for
reading, writing or both. The daemon keeps the descriptor, so that the file stays open in it as
long; and it asks nothing of it that the kernel would pass on to the daemon itself.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

from emberfs.client.native._ring import identify
from emberfs.client.openfile import OpenFile, OpenFiles
from emberfs.fabric.region import Region
from emberfs.proto.errors import Code, EmberfsError
from emberfs.proto.ids import GiB, InodeId

REGIONS_MAX = 256
REGION_BYTES_MAX = 256 * GiB  # of all of one application
FILES_MAX = 65536
_O_PATH = 0o10000000


@dataclass(slots=True)
class HeldFile:
    """A file that an application has opened on the mount."""

    inode: InodeId
    read: bool
    write: bool
    fd: int
    file: OpenFile | None = None  # one of the mount's, of the same file, with these rights


class Holdings:
    """Regions and files of one application, by the numbers that it uses for them."""

    def __init__(self, files: OpenFiles, device: int, close: Callable[[int], None]) -> None:
        """`device` is the mount's st_dev; `close` closes a descriptor that the daemon must not
        wait for.
        """
        self._open = files
        self._device = device
        self._close = close
        self._regions: dict[int, Region] = {}
        self._files: dict[int, HeldFile] = {}
        self._region_bytes = 0
        self._last = 0

    def _number(self) -> int:
        self._last += 1
        return self._last

    # ------------------------------------------------------------ memory

    def add_region(self, fd: int, size_bytes: int) -> int:
        """Map an application's memory; its number. Takes the descriptor, also when it raises."""
        try:
            if len(self._regions) >= REGIONS_MAX:
                raise EmberfsError(Code.INVALID, f"at most {REGIONS_MAX} regions")
            if self._region_bytes + size_bytes > REGION_BYTES_MAX:
                raise EmberfsError(Code.INVALID, f"at most {REGION_BYTES_MAX} bytes of regions")
            region = Region.adopt(fd)
        except BaseException:
            self._close(fd)
            raise
        if region.size_bytes != size_bytes:
            region.close()
            text = f"the memory has {region.size_bytes} bytes, not {size_bytes}"
            raise EmberfsError(Code.INVALID, text)
        number = self._number()
        self._regions[number] = region
        self._region_bytes += region.size_bytes
        return number

    def remove_region(self, number: int) -> None:
        """Let go of memory; what is under way with it goes on."""
        region = self._regions.pop(number, None)
        if region is None:
            raise EmberfsError(Code.INVALID, f"region {number} is not known")
        self._region_bytes -= region.size_bytes
        region.close()

    def region(self, number: int) -> Region | None:
        """Look one up."""
        return self._regions.get(number)

    # ------------------------------------------------------------ files

    def add_file(self, fd: int) -> int:
        """Take a descriptor of a file on the mount; its number. BAD_HANDLE if it is none."""
        try:
            if len(self._files) >= FILES_MAX:
                raise EmberfsError(Code.INVALID, f"at most {FILES_MAX} files")
            held = self._examined(fd)
            self.opened(held)
        except BaseException:
            self._close(fd)
            raise
        number = self._number()
        self._files[number] = held
        return number

    def _examined(self, fd: int) -> HeldFile:
        try:
            device, inode, mode = identify(fd)
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        except OSError as problem:
            raise EmberfsError(Code.BAD_HANDLE, f"not a file: {problem}") from None
        if device != self._device:
            raise EmberfsError(Code.BAD_HANDLE, "the file is not on this mount")
        if not stat.S_ISREG(mode) or flags & _O_PATH:
            raise EmberfsError(Code.BAD_HANDLE, "not a regular file opened to read or write")
        access = flags & os.O_ACCMODE
        return HeldFile(InodeId(inode), access != os.O_WRONLY, access != os.O_RDONLY, fd)

    def remove_file(self, number: int) -> None:
        """Let go of a file."""
        held = self._files.pop(number, None)
        if held is None:
            raise EmberfsError(Code.INVALID, f"file {number} is not known")
        self._close(held.fd)

    def file(self, number: int) -> HeldFile | None:
        """Look one up."""
        return self._files.get(number)

    def opened(self, held: HeldFile) -> OpenFile:
        """An open description with the rights of the descriptor.

        The mount has one, because the descriptor is open; not always the same, because several are
        alike.
        """
        file = held.file
        if file is None or file.closed:
            file = held.file = self._open.find(held.inode, read=held.read, write=held.write)
        if file is None:
            raise EmberfsError(Code.BAD_HANDLE, "the file is not open in this mount")
        return file

    def close(self) -> None:
        """Let go of everything: the application is gone."""
        for number in list(self._files):
            self.remove_file(number)
        for number in list(self._regions):
            self.remove_region(number)


def errno_of(problem: EmberfsError) -> int:
    """What a completion or an answer says about a problem."""
    return problem.errno or errno.EIO
