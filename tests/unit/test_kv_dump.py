"""Backups: between all engines, whole or not at all."""

import asyncio
import io
import random
from pathlib import Path

import pytest

from emberfs.kv import dump as rows
from emberfs.kv.keys import LOADING_KEY
from emberfs.kv.transaction import Transaction, pack_counter
from emberfs.kv.transactions import Engine
from emberfs.proto.errors import Code, EmberfsError
from kv_faulty import faulty_engine
from unit.kv_engines import make_place, put, read_all


async def fill(engine: Engine, count: int) -> dict[bytes, bytes]:
    dice = random.Random(7)
    model = {b"I" + dice.randbytes(8): dice.randbytes(dice.randrange(300)) for _ in range(count)}
    names = list(model)
    for first in range(0, count, 1000):

        async def write(txn: Transaction, part: list[bytes] = names[first : first + 1000]) -> None:
            for key in part:
                txn.set(key, model[key])
            txn.add(b"Cinodes", len(part))
            txn.set(b"Cblock", pack_counter(3))
            txn.set(b"Mcluster", b"c")

        await engine.run(write)
    return model | {
        b"Cinodes": pack_counter(count), b"Cblock": pack_counter(3), b"Mcluster": b"c"
    }  # fmt: skip


def test_through_every_engine_and_back(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    kinds = ("rocks", "etcd", "postgres", "rocks", "memory")
    places = [make_place(kind, request, tmp_path) for kind in kinds]

    async def main() -> None:
        engine = await places[0].open()
        model = await fill(engine, 5000)
        files = []
        for place in places[1:]:
            file = io.BytesIO()
            file.fileno = lambda: file_number  # type: ignore[method-assign]
            assert await rows.dump(engine, file) == len(model)
            files.append(file.getvalue())
            await engine.close()
            engine = await place.open()
            file.seek(0)
            assert await rows.load(engine, file) == len(model)
            assert await read_all(engine) == model
        assert len(set(files)) == 1
        await engine.close()

    with (tmp_path / "sync").open("wb") as real:
        file_number = real.fileno()
        asyncio.run(main())


def test_a_dump_is_of_one_moment(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    places = [make_place(kind, request, tmp_path) for kind in ("rocks", "etcd", "postgres")]

    async def main() -> None:
        for place in places:
            engine = await place.open()
            model = await fill(engine, 2 * rows.PAGE_ROWS)
            seen: dict[bytes, bytes] = {}
            async for page in rows.pages(engine):
                seen.update(page)
                await put(engine, **{f"Z{len(seen)}": b"later", f"A{len(seen)}": b"later"})
            assert seen == model
            await engine.close()

    asyncio.run(main())


def dumped(tmp_path: Path, count: int = 3000) -> bytes:
    async def main() -> None:
        engine = faulty_engine(0.1)
        await fill(engine, count)
        with (tmp_path / "dump").open("wb") as file:
            await rows.dump(engine, file)
        await engine.close()

    asyncio.run(main())
    return (tmp_path / "dump").read_bytes()


@pytest.mark.parametrize("how", ["cut", "flipped", "longer", "no dump", "a block lost"])
def test_a_damaged_dump_is_refused_before_anything_is_written(how: str, tmp_path: Path) -> None:
    whole = dumped(tmp_path)
    match how:
        case "cut":
            broken = whole[:-3]
        case "flipped":
            broken = whole[:90_000] + bytes([whole[90_000] ^ 1]) + whole[90_001:]
        case "longer":
            broken = whole + b"x"
        case "no dump":
            broken = b"PK" + whole
        case _:
            start = len(rows.MAGIC)
            length = int.from_bytes(whole[start : start + 4], "big") + 8
            broken = whole[:start] + whole[start + length :]

    async def main() -> None:
        engine = faulty_engine(0)
        with pytest.raises(EmberfsError) as raised:
            await rows.load(engine, io.BytesIO(broken))
        assert raised.value.code == Code.CHECKSUM
        assert await read_all(engine, b"\0") == {}
        await rows.load(engine, io.BytesIO(whole))
        await engine.close()

    asyncio.run(main())


def test_a_store_that_is_not_empty_or_half_loaded_is_refused(tmp_path: Path) -> None:
    whole = io.BytesIO(dumped(tmp_path))

    async def refused(engine: Engine, words: str) -> None:
        with pytest.raises(EmberfsError, match=words) as raised:
            await rows.load(engine, whole)
        assert raised.value.code == Code.EXISTS
        whole.seek(0)
        await engine.close()

    async def main() -> None:
        engine = faulty_engine(0)
        await put(engine, a=b"1")
        await refused(engine, "not empty")
        engine = faulty_engine(0)

        async def begin(txn: Transaction) -> None:
            txn.set(LOADING_KEY, b"")

        await engine.run(begin)
        await refused(engine, "did not finish")

    asyncio.run(main())


def test_the_state_of_mgmtd_moves_along(tmp_path: Path) -> None:
    async def main() -> None:
        meta, mgmtd, together = (faulty_engine(0) for _ in range(3))
        await put(meta, Fs=b"1")
        await put(mgmtd, cluster=b"c")
        with (tmp_path / "f").open("w+b") as file:
            assert await rows.dump(meta, file, mgmtd=mgmtd) == 2
            file.seek(0)
            await rows.load(together, file)
            assert await read_all(together) == {b"Fs": b"1", b"Mcluster": b"c"}
            apart = (faulty_engine(0), faulty_engine(0))
            file.seek(0)
            await rows.load(apart[0], file, mgmtd=apart[1])
        assert await read_all(apart[0]) == {b"Fs": b"1"}
        assert await read_all(apart[1]) == {b"cluster": b"c"}

    asyncio.run(main())
