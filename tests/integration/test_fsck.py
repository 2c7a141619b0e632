"""`emberfs fsck` on a real cluster: damage of every kind is planted, found, mended, and gone."""

import asyncio
import os
import stat
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from emberfs.client.cluster import Cluster
from emberfs.deploy import processes
from emberfs.kv import keys
from emberfs.kv.rocks import RocksStore
from emberfs.meta import schema
from emberfs.proto.cluster import ChainTarget
from emberfs.proto.files import Inode, Layout
from emberfs.proto.ids import SECOND, ChainId, InodeId, MiB, pack_chunk_id
from emberfs.proto.meta_calls import Caller
from emberfs.proto.storage_calls import UPDATE, UpdateKind, UpdateRequest, WriteTag
from emberfs.runtime.checksum import crc32c
from emberfs.runtime.real import RealEnv
from emberfs.storage.allocator import CLASS_BYTES, GROUP_BLOCKS
from emberfs.storage.records import group_row, parse_group_row, prefix_range
from integration.harness import LocalCluster, local_cluster, wait_until

ROOT = Caller(uid=0, gid=0)
ORPHAN = InodeId(1 << 40)
MARK = b"fsck-will-find-this-"


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """A mounted cluster with a small tree."""
    with local_cluster() as made:
        made.up()
        (made.mount / "d" / "e").mkdir(parents=True)
        for number in range(6):
            (made.mount / "d" / f"f{number}").write_bytes(content(number))
        (made.mount / "d" / "e" / "second").hardlink_to(made.mount / "d" / "f0")
        os.sync()
        yield made


def content(number: int) -> bytes:
    return (MARK + b"%d" % number) * (number * 40_000 + 1)


def intact(cluster: LocalCluster) -> None:
    for number in range(6):
        assert (cluster.mount / "d" / f"f{number}").read_bytes() == content(number)
    assert (cluster.mount / "d" / "e" / "second").read_bytes() == content(0)


def within(cluster: LocalCluster, work: Callable[[Cluster], Awaitable[None]]) -> None:
    """Do something as a native client."""

    async def main() -> None:
        plan = cluster.plan
        opened = await Cluster.open(RealEnv(), (plan.mgmtd_address,), plan.cluster, register=False)
        try:
            async with asyncio.timeout(20):
                await work(opened)
        finally:
            await opened.close()

    asyncio.run(main())


def finds_then_mends(cluster: LocalCluster, *expected: str) -> str:
    """Without --repair all is found and nothing changed; with it all is mended; then clean."""
    found = cluster.emberfs("fsck", check=False)
    assert found.returncode == 1, found.stdout + found.stderr
    for text in expected:
        assert text in found.stdout
    again = cluster.emberfs("fsck", "--no-verify", check=False)
    assert again.returncode == 1, "the first run changed something"
    mended = cluster.emberfs("fsck", "--repair", "--grace", 0.5)
    for text in expected:
        assert f"repair: {text}" in mended.stdout or f"{text}" in mended.stdout
    assert "clean:" in cluster.fsck()
    return mended.stdout


def file_inode(cluster: LocalCluster, path: str) -> Inode:
    found: list[Inode] = []

    async def work(opened: Cluster) -> None:
        found.append(await opened.metadata.resolve(ROOT, path.encode()))

    within(cluster, work)
    return found[0]


def test_a_sound_cluster_is_clean(cluster: LocalCluster) -> None:
    for arguments in ((), ("/d",), (cluster.mount / "d" / "f3",), ("--repair",)):
        done = cluster.emberfs("fsck", *arguments)
        assert "clean:" in done.stdout
        assert "repair" not in done.stdout
    done = cluster.emberfs("fsck", "/nothing", check=False)
    assert done.returncode == 2
    assert "could not check" in done.stderr
    done = cluster.emberfs("fsck", "--help")
    assert "Exit status: 0 clean" in done.stdout


def test_a_busy_cluster_is_clean_too(cluster: LocalCluster) -> None:
    """Files come, change and go while fsck looks: none of that is a finding."""
    place = cluster.mount / "busy"
    place.mkdir()
    ended = threading.Event()

    def work(name: str) -> None:
        number = 0
        while not ended.is_set():
            number += 1
            path = place / f"{name}{number % 3}"
            path.write_bytes(os.urandom(1000 * (number % 2000 + 1)))
            path.rename(place / f"{name}moved")
            os.truncate(place / f"{name}moved", 500)
            (place / f"{name}moved").unlink()

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2):
            assert "clean:" in cluster.fsck()
    finally:
        ended.set()
        for thread in threads:
            thread.join(20)


def test_o3_orphan_chunks_are_found_and_removed(cluster: LocalCluster) -> None:
    """Chunks without a file are listed with count and bytes, and go only with --repair."""

    async def plant(opened: Cluster) -> None:
        layout = Layout(MiB, (ChainId(2),))
        await opened.chunkio.write(ORPHAN, layout, 0, memoryview(b"x" * (2 * MiB + 7)))

    within(cluster, plant)
    finds_then_mends(
        cluster, f"chain 2: 3 chunks, {2 * MiB + 7} bytes of inode {ORPHAN}, which does not exist"
    )
    intact(cluster)


def test_o7_a_replica_that_went_its_own_way_is_replaced(cluster: LocalCluster) -> None:
    """A replica that differs is found, by path too, and all copies are equal afterwards."""
    inode = file_inode(cluster, "/d/f5")
    assert inode.layout is not None
    chain_id = inode.layout.chains[0]
    data = content(5)[:MiB]

    async def plant(opened: Cluster) -> None:
        """The tail gets a version that nobody else has."""
        chain = opened.routing.snapshot.chains[chain_id]
        tail = chain.tail()
        assert tail is not None
        await replace_on(opened, tail, chain.version, inode.id, data)

    within(cluster, plant)
    by_path = cluster.emberfs("fsck", "/d/f5", check=False)
    assert by_path.returncode == 1
    assert f"inode {inode.id} chunk 0 differs" in by_path.stdout
    assert "clean:" in cluster.emberfs("fsck", "/d/f4").stdout
    finds_then_mends(cluster, f"inode {inode.id} chunk 0 differs")
    intact(cluster)


async def replace_on(
    opened: Cluster, member: ChainTarget, chain_version: int, inode: InodeId, data: bytes
) -> None:
    payload = memoryview(data)
    request = UpdateRequest(
        target=member.target,
        chain_version=chain_version,  # type: ignore[arg-type]
        chunk=pack_chunk_id(inode, 0),
        kind=UpdateKind.REPLACE,
        offset=0,
        length=len(data),
        tag=WriteTag(1, 1, 1),
        chunk_bytes=MiB,
        checksum=crc32c(payload),
        version=1000,
    )
    node = opened.routing.snapshot.nodes[member.node]
    peer = await opened.peers.get(node.endpoints)
    body = UPDATE.encode_request(request)
    await peer.call(UPDATE.number, body, sources=(payload,), timeout_ns=5 * SECOND)


def test_o7_flipped_bytes_are_found_and_repaired(cluster: LocalCluster) -> None:
    """Any damaged block is found, reported although it could be healed, and repaired."""
    inode = file_inode(cluster, "/d/f4")
    path, place = where(cluster.directory / "data" / "storage2", MARK + b"4" + MARK + b"4")
    fd = os.open(path, os.O_RDWR)
    try:
        os.pwrite(fd, b"FLIP", place)
    finally:
        os.close(fd)
    finds_then_mends(cluster, f"inode {inode.id} chunk", "damaged")
    intact(cluster)


def where(directory: Path, pattern: bytes) -> tuple[Path, int]:
    """Find bytes in the block files of a storage service."""
    for path in sorted(directory.rglob("*")):
        if path.is_file() and "meta" not in path.parts[-2:]:
            place = path.read_bytes().find(pattern)
            if place >= 0:
                return path, place
    raise AssertionError(f"{pattern!r} is nowhere below {directory}")


def test_o3_o11_damaged_metadata_is_found_and_mended(cluster: LocalCluster) -> None:
    """Wrong counts, dangling and lost names are found and mended; no content is lost."""
    top = file_inode(cluster, "/d")
    first, third = file_inode(cluster, "/d/f0"), file_inode(cluster, "/d/f3")
    cluster.emberfs("umount")
    processes.stop(cluster.plan.process("meta"), timeout_s=20)
    store = RocksStore(str(cluster.directory / "data" / "meta" / "kv"))
    try:
        dangling = schema.ENTRY.encode(schema.Entry(InodeId(1 << 50), stat.S_IFREG))
        store.write(
            [
                (keys.inode_key(first.id), schema.INODE.encode(replace(first, nlink=7))),
                (keys.entry_key(top.id, b"f3"), None),
                (keys.entry_key(top.id, b"dangling"), dangling),
                (keys.INODE_COUNT_KEY, (1000).to_bytes(8, "little")),
                (keys.xattr_key(1 << 50, b"user.x"), b"1"),
            ]
        )
        store.sync()
    finally:
        store.close()
    cluster.start("meta")
    cluster.up()
    finds_then_mends(
        cluster,
        f"inode {first.id} has link count 7, counted 2",
        f"inode {third.id} has no name",
        "b'dangling' in directory",
        "the counter of inodes says 1000",
        "attribute of inode",
    )
    lost = cluster.mount / "lost+found" / f"#{third.id}"
    assert lost.read_bytes() == content(3)
    lost.rename(cluster.mount / "d" / "f3")
    assert (cluster.mount / "d" / "f0").stat().st_nlink == 2
    assert os.statvfs(cluster.mount).f_files
    intact(cluster)


def test_s1_leaked_blocks_of_a_store_are_freed(cluster: LocalCluster) -> None:
    """Blocks that are marked and have no owner are found, freed, and usable again."""
    cluster.emberfs("umount")
    name = "storage3"
    processes.stop(cluster.plan.process(name), timeout_s=20)
    store = RocksStore(str(next((cluster.directory / "data" / name).rglob("meta"))))
    try:
        key, value = store.scan(*prefix_range(b"G"), limit=1)[0]
        found = parse_group_row(key, value)
        free = [i for i in range(GROUP_BLOCKS[found.size_class]) if not found.bits >> i & 1][:2]
        bits = found.bits | sum(1 << i for i in free)
        store.write([group_row(found._replace(bits=bits))])
        store.sync()
    finally:
        store.close()
    cluster.start(name)
    cluster.up()
    cluster.wait_serving()
    size = CLASS_BYTES[found.size_class] >> 10
    finds_then_mends(cluster, f"{len(free)} blocks of {size} KiB are marked and have no owner")
    (cluster.mount / "after").write_bytes(content(5) * 3)
    assert "clean:" in cluster.fsck()
    intact(cluster)


def test_a_cluster_that_does_not_answer_cannot_be_checked(cluster: LocalCluster) -> None:
    """Last: exit status 2 is neither clean nor broken."""
    processes.stop(cluster.plan.process("meta"), timeout_s=20)
    processes.stop(cluster.plan.process("mgmtd"), timeout_s=20)
    wait_until(lambda: processes.running_pid(cluster.plan.process("mgmtd")) is None, 10)
    done = cluster.emberfs("fsck", check=False)
    assert done.returncode == 2
    assert "could not check" in done.stderr
