"""Another process with a KV cache, driven by lines of JSON on its standard input.

python kvcache_peer.py MGMTD CLUSTER NAMESPACE CAP_BYTES SEGMENT_BYTES SNAPSHOT_EVERY_BYTES

Blocks are made from their keys, so that every process can tell whether it got the right ones.
"""

import contextlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from emberfs.client.kvcache.blocking import BlockingKVCache
from emberfs.proto.ids import SECOND

BLOCK_BYTES = 64 * 576 * 2
PATIENT_NS = 30 * SECOND


def key_of(name: str) -> bytes:
    return name.encode()


def block_of(key: bytes, version: int = 0, length: int = BLOCK_BYTES) -> bytes:
    return random.Random(key + bytes([version])).randbytes(length)


def versions_read(cache: BlockingKVCache, keys: Sequence[bytes]) -> list[int]:
    """Version of each block that is found, -1 for a miss; fails on any other bytes."""
    buffers = [bytearray(b"\xa5" * BLOCK_BYTES) for _ in keys]
    lengths = cache.get_many(keys, buffers, deadline_ns=PATIENT_NS)
    found = []
    for key, buffer, length in zip(keys, buffers, lengths, strict=True):
        if not length:
            assert buffer == b"\xa5" * BLOCK_BYTES, "a miss has changed the buffer"
            found.append(-1)
            continue
        right = [v for v in range(4) if buffer[:length] == block_of(key, v, length)]
        assert right, f"wrong bytes for {key!r}"
        found.append(right[0])
    return found


def perform(cache: BlockingKVCache, order: dict[str, Any]) -> Any:
    keys = [key_of(name) for name in order.get("keys", ())]
    match order["do"]:
        case "put":
            blocks = [block_of(key, order.get("version", 0)) for key in keys]
            return cache.put_many(keys, blocks, deadline_ns=PATIENT_NS)
        case "get":
            return versions_read(cache, keys)
        case "remove":
            return cache.remove_many(keys, deadline_ns=PATIENT_NS)
        case "pour":  # until killed, telling of every batch that is stored
            number = 0
            while True:
                names = [f"{order['name']}{number + n}" for n in range(8)]
                keys = [key_of(name) for name in names]
                done = cache.put_many(keys, [block_of(key) for key in keys])
                number += 8
                print(json.dumps([n for n, ok in zip(names, done, strict=True) if ok]), flush=True)
        case "count":
            return len(cache)
    raise AssertionError(order)


def main() -> None:
    mgmtd, cluster, namespace, cap, segment, snapshot = sys.argv[1:]
    with BlockingKVCache(
        mgmtd,
        "/kv",
        cluster=cluster,
        namespace=namespace,
        byte_cap=int(cap),
        segment_bytes=int(segment),
        snapshot_every_bytes=int(snapshot),
    ) as cache:
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            print(json.dumps(perform(cache, json.loads(line))), flush=True)


class Peer:
    """The caller's end of such a process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def send(self, do: str, **order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **order}) + "\n")
        self.process.stdin.flush()

    def receive(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the other process ended with {self.process.wait(10)}"
        return json.loads(line)

    def ask(self, do: str, **order: Any) -> Any:
        self.send(do, **order)
        return self.receive()


@contextlib.contextmanager
def peer(mgmtd: str, cluster: str, namespace: str, *sizes: int) -> Iterator[Peer]:
    """Start one; it is ended with the block."""
    process = subprocess.Popen(
        [sys.executable, Path(__file__), mgmtd, cluster, namespace, *map(str, sizes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        found = Peer(process)
        assert found.receive() == "ready"
        yield found
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        if process.poll() is None:
            assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


if __name__ == "__main__":
    main()
