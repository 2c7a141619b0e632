"""Applications that send garbage to the daemon: each is told or cut off, nobody else notices."""

import errno
import os
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from emberfs.client.native import layout, messages
from emberfs.client.native._ring import load, store_then_load
from emberfs.client.native.connection import Connection
from emberfs.client.native.messages import Kind, Request
from emberfs.client.native.ring import Ring
from integration.harness import LocalCluster, wait_until

DATA = random.Random(4).randbytes(300_000)


@contextmanager
def witness(shared: LocalCluster) -> Iterator[Connection]:
    """An application that must notice nothing, before and after."""
    place = shared.mount / "witness"
    if not place.exists():
        place.write_bytes(DATA)
    with Connection(shared.mount) as daemon, place.open("rb") as opened, Ring(daemon, 8) as ring:
        file, memory = daemon.file(opened), bytearray(len(DATA))
        assert ring.read_many([(file, 0, memory)], 20) == [len(DATA)]
        yield daemon
        memory[:] = bytes(len(DATA))
        assert ring.read_many([(file, 0, memory)], 20) == [len(DATA)]
        assert memory == DATA


def refusal(daemon: Connection, request: Request) -> int:
    with pytest.raises(OSError) as refused:
        daemon.ask(request)
    return refused.value.errno or 0


def test_messages_of_noise(shared: LocalCluster) -> None:
    dice = random.Random(1)
    with witness(shared):
        for turn in range(60):
            with Connection(shared.mount) as daemon:
                for _ in range(20):
                    noise = dice.randbytes(dice.choice((1, 7, 24, 24, 24, 200, 1024)))
                    if len(noise) == 24 and turn % 2:
                        kind = dice.randrange(9).to_bytes(4, "little")
                        noise = kind + bytes(4) + noise[8:]
                    socket.send_fds(daemon.socket, [noise], [0] * dice.randrange(4))
                    answer = messages.decode_answer(daemon.socket.recv(2000))
                    assert answer.error or noise[:4] in (b"\1\0\0\0", b"\2\0\0\0")


def test_descriptors_of_the_mount_itself(shared: LocalCluster) -> None:
    """The daemon must not even receive them: to close one it would have to ask itself."""
    with witness(shared) as daemon:
        for _ in range(20):
            fds = [os.open(shared.mount / "witness", os.O_RDONLY) for _ in range(3)]
            request = messages.encode_request(Request(Kind.REGION, 8192))
            socket.send_fds(daemon.socket, [request], fds)
            for fd in fds:
                os.close(fd)
            answer = messages.decode_answer(daemon.socket.recv(2000))
            assert not answer.error
        held = os.listdir(f"/proc/{shared.pid('fuse')}/fd")
        links = [os.readlink(f"/proc/{shared.pid('fuse')}/fd/{fd}") for fd in held]
        assert not [link for link in links if link.startswith(str(shared.mount))]


@pytest.mark.parametrize("size", [0, 1 << 40, 1 << 63])
def test_memory_of_no_size(shared: LocalCluster, size: int) -> None:
    with witness(shared) as daemon:
        assert refusal(daemon, Request(Kind.REGION, size)) == errno.EINVAL


def test_shared_memory_cannot_be_cut(shared: LocalCluster) -> None:
    """The daemon would die of SIGBUS."""
    with witness(shared) as daemon:
        region = daemon.region(8192)
        with pytest.raises(PermissionError):
            os.ftruncate(region.fd, 0)
        region.close()


@pytest.mark.parametrize("entries", [0, 3, 1 << 16])
def test_rings_of_the_wrong_size(shared: LocalCluster, entries: int) -> None:
    with witness(shared) as daemon:
        assert refusal(daemon, Request(Kind.RING, entries)) == errno.EINVAL


def test_files_that_are_not_open(shared: LocalCluster) -> None:
    with witness(shared) as daemon:
        for number in (-1, 1 << 20, 1 << 63, 0):
            assert refusal(daemon, Request(Kind.FILE, number % (1 << 64))) == errno.EBADF
        path_only = os.open(shared.mount / "witness", os.O_PATH)
        assert refusal(daemon, Request(Kind.FILE, path_only)) == errno.EBADF
        os.close(path_only)


def test_entries_of_noise(shared: LocalCluster) -> None:
    """Every entry gets an answer, whatever it says."""
    dice = random.Random(2)
    entries = 64
    with witness(shared) as daemon, Ring(daemon, entries) as ring:
        view = ring._view
        for turn in range(1, 51):
            at = layout.HEADER_BYTES
            view[at : at + 64 * entries] = dice.randbytes(64 * entries)
            if turn % 2:  # plausible, but for one or two fields
                for i in range(entries):
                    noise = [dice.choice((0, 1, 2, 3, 4096, 1 << 31)) for _ in range(7)]
                    layout.SUBMISSION.pack_into(view, at + 64 * i, i, *noise)
            tail = turn * entries % layout.WRAP
            store_then_load(view, layout.SQ_TAIL, tail, layout.SLEEPS)
            ring._bell.send(b"\1")
            wait_until(lambda tail=tail: load(view, layout.CQ_TAIL) == tail, 20)
            store_then_load(view, layout.CQ_HEAD, tail, layout.CQ_TAIL)
            ring._submitted = ring._seen = tail


@pytest.mark.parametrize("place", [layout.SQ_TAIL, layout.CQ_HEAD])
def test_indices_that_make_no_sense(shared: LocalCluster, place: int) -> None:
    with witness(shared):
        daemon = Connection(shared.mount)
        ring = Ring(daemon, 8)
        store_then_load(ring._view, place, 1_000_000, layout.SLEEPS)
        ring._bell.send(b"\1")
        ring._bell.settimeout(20)
        assert ring._bell.recv(10) == b""  # cut off
        with pytest.raises(OSError, match="daemon is gone"):
            daemon.region(4096)
        ring.close()
        daemon.close()
