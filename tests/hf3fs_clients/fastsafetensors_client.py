"""fastsafetensor-3fs-reader and fastsafetensors as released, reading from a mount: DIRECTORY.

The reader is a compiled program that was linked against the library of 3FS; it finds ours by name.
"""

import ctypes
import json
import os
import sys
from pathlib import Path

import torch
from fastsafetensor_3fs_reader import ThreeFSFileReader, create_reader, extract_mount_point
from fastsafetensor_3fs_reader import get_backend as backend
from fastsafetensors import SingleGroup
from fastsafetensors.threefs_loader import ThreeFSLoader
from safetensors.torch import save_file


def read_in_pieces(reader: ThreeFSFileReader, path: Path, piece_bytes: int) -> None:
    """Compare the data behind the header with what a plain read returns."""
    found = reader.read_headers_batch([str(path)])
    text, header_bytes, file_bytes = found[str(path)]
    assert file_bytes == path.stat().st_size
    assert "w0" in json.loads(text)
    content = path.read_bytes()[header_bytes:]
    target = ctypes.create_string_buffer(len(content) + 4096)
    for asked in (len(content), len(content) + 4096):  # the second ends short, at the end
        got = reader.read_chunked(
            str(path), ctypes.addressof(target), header_bytes, asked, piece_bytes
        )
        assert got == len(content), (got, len(content))
        assert target.raw[:got] == content
    reader.close()


def main() -> None:
    place = Path(sys.argv[1])
    torch.manual_seed(1)
    tensors = {f"w{i}": torch.randn(257 + i, 1031) for i in range(8)}
    path = place / "model.safetensors"
    save_file(tensors, path)
    mount_point = extract_mount_point(str(path))
    assert backend() == "cpp", "the compiled reader did not find the library"
    for pieces in (64 << 20, 1 << 20, 4096 + 7):
        read_in_pieces(
            create_reader("cpp", mount_point=mount_point, buffer_size=pieces), path, pieces
        )
    before = set(os.listdir("/dev/shm"))
    loader = ThreeFSLoader(SingleGroup(), device="cpu", mount_point=mount_point)
    loader.add_filenames({0: [str(path)]})
    buffer = loader.copy_files_to_device()
    for name, tensor in tensors.items():
        assert torch.equal(buffer.get_tensor(name), tensor), name
    buffer.close()
    loader.close()
    assert not [name for name in set(os.listdir("/dev/shm")) - before if "iov" in name]


main()
