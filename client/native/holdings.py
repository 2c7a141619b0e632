"""What one application shares with the daemon: memory, and files that it has open.

A file must be open in the application, on this very mount: what the kernel has let it open the file
for, reading, writing or both, is what its entries may do. The daemon looks at the application's
descriptor in /proc (proc_pid_fdinfo(5)) and never holds one: see messages.py.
"""

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from emberfs.client.native._ring import identify
from emberfs.client.native.layout import region_facts
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
    file: OpenFile | None = None  # one of the mount's, of the same file, with these rights


class Holdings:
    """Regions and files of one application, by the numbers that it uses for them."""

    def __init__(self, files: OpenFiles, device: int, process: int) -> None:
        """`device` is the mount's st_dev; `process` the application's pid, 0 if none is known."""
        self._open = files
        self._device = device
        self._process = process
        self._regions: dict[int, Region] = {}
        self.region_facts: dict[int, bytes] = {}  # see batch.Owner
        self._files: dict[int, HeldFile] = {}
        self._region_bytes = 0
        self._last = 0

    def _number(self) -> int:
        self._last += 1
        return self._last

    # ------------------------------------------------------------ memory

    def add_region(self, size_bytes: int) -> tuple[int, Region]:
        """Allocate memory for both; its number. INVALID if it is too much."""
        if len(self._regions) >= REGIONS_MAX:
            raise EmberfsError(Code.INVALID, f"at most {REGIONS_MAX} regions")
        if not 0 < size_bytes <= REGION_BYTES_MAX - self._region_bytes:
            raise EmberfsError(Code.INVALID, f"1 to {REGION_BYTES_MAX} bytes in all regions")
        try:
            region = Region(size_bytes)
        except OSError as problem:
            raise EmberfsError(Code.NO_SPACE, f"no memory for a region: {problem}") from None
        number = self._number()
        self._regions[number] = region
        self.region_facts[number] = region_facts(region.id, region.size_bytes)
        self._region_bytes += region.size_bytes
        return number, region

    def remove_region(self, number: int) -> None:
        """Let go of memory; what is under way with it goes on."""
        region = self._regions.pop(number, None)
        if region is None:
            raise EmberfsError(Code.INVALID, f"region {number} is not known")
        del self.region_facts[number]
        self._region_bytes -= region.size_bytes
        region.close()

    def region(self, number: int) -> Region | None:
        """Look one up."""
        return self._regions.get(number)

    # ------------------------------------------------------------ files

    def add_file(self, descriptor: int) -> int:
        """Take a file that the application has open; its number. BAD_HANDLE if that is none."""
        if len(self._files) >= FILES_MAX:
            raise EmberfsError(Code.INVALID, f"at most {FILES_MAX} files")
        held = self._examined(descriptor)
        self.opened(held)
        number = self._number()
        self._files[number] = held
        return number

    def _examined(self, descriptor: int) -> HeldFile:
        """What a descriptor of the application is.

        It may be another file from one look to the next: what its rights are and which inode on
        which mount it is are one look, of which file system that mount is is another.
        """
        if not self._process:
            raise EmberfsError(
                Code.UNSUPPORTED, "the daemon cannot see this process: it needs its pid namespace"
            )
        place = f"/proc/{self._process}"
        try:
            lines = Path(f"{place}/fdinfo/{descriptor}").read_text().splitlines()
            facts = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            flags, inode = int(facts["flags"], 8), int(facts["ino"])
            device, other, mode, mount = identify(f"{place}/fd/{descriptor}")
        except (OSError, KeyError, ValueError) as problem:
            raise EmberfsError(Code.BAD_HANDLE, f"not an open file: {problem}") from None
        if device != self._device:
            raise EmberfsError(Code.BAD_HANDLE, "the file is not on this mount")
        if (inode, int(facts["mnt_id"])) != (other, mount):
            raise EmberfsError(Code.BAD_HANDLE, "the descriptor was closed meanwhile")
        if not stat.S_ISREG(mode) or flags & _O_PATH:
            raise EmberfsError(Code.BAD_HANDLE, "not a regular file opened to read or write")
        access = flags & os.O_ACCMODE
        return HeldFile(InodeId(inode), access != os.O_WRONLY, access != os.O_RDONLY)

    def remove_file(self, number: int) -> None:
        """Let go of a file."""
        if self._files.pop(number, None) is None:
            raise EmberfsError(Code.INVALID, f"file {number} is not known")

    def file(self, number: int) -> HeldFile | None:
        """Look one up."""
        return self._files.get(number)

    def opened(self, held: HeldFile) -> OpenFile:
        """An open description with the rights of the descriptor.

        The mount has one while that is open; not always the same, because several are alike.
        """
        file = held.file
        if file is None or file.closed:
            file = held.file = self._open.find(held.inode, read=held.read, write=held.write)
        if file is None:
            raise EmberfsError(Code.BAD_HANDLE, "the file is not open in this mount")
        return file

    def readable(self, number: int) -> OpenFile | None:
        """An open description that entries of this number may read."""
        held = self._files.get(number)
        if held is None or not held.read:
            return None
        try:
            return self.opened(held)
        except EmberfsError:
            return None

    def close(self) -> None:
        """Let go of everything: the application is gone."""
        self._files.clear()
        for number in list(self._regions):
            self.remove_region(number)


def errno_of(problem: EmberfsError) -> int:
    """What a completion or an answer says about a problem."""
    return problem.errno or errno.EIO
