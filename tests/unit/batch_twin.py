"""What client/native/_batch.c and _entries.c do, in Python: the oracle of their tests."""

import struct

from emberfs.client.native import layout
from emberfs.client.native.layout import COMPLETION, SUBMISSION
from emberfs.fabric.frame import pack_descriptors
from emberfs.proto.ids import ChainVersion, InodeId, TargetId, pack_chunk_id
from emberfs.proto.storage_calls import ReadOp, pack_read_ops, unpack_read_results

REGION = struct.Struct("<IQ")
FILE = struct.Struct("<QQQQ")
LEAN, OPERATIONS_MAX = 8, 256
SMALL_BYTES, CROWD = 16 << 10, 32


def survey_twin(entries, regions):
    states, spans = [], {}
    for entry in SUBMISSION.iter_unpack(entries):
        _, operation, file, offset, region, length, start, flags = entry
        size = REGION.unpack(regions[region])[1] if region in regions else -1
        sound = operation == layout.READ and not flags and start + length <= size
        sound = sound and 0 < length <= layout.ENTRY_BYTES_MAX and offset < 1 << 63
        states.append(int(sound))
        if sound:
            low, high = spans.get(file, (offset, 0))
            spans[file] = (min(low, offset), max(high, offset + length))
    return bytes(states), [(file, *span) for file, span in spans.items()]


def replicas_of(table, index):
    """(target, version, node) of the replicas that serve a chunk."""
    chains, width = struct.unpack_from("<II", table)
    at = 8 + index % chains * (4 + 12 * width)
    (count,) = struct.unpack_from("<I", table, at)
    return [struct.unpack_from("<III", table, at + 4 + 12 * i) for i in range(count)]


def choose(replicas, spread, costs):
    first = spread % len(replicas)
    best = replicas[first]
    if costs[best[2]] > LEAN:
        for step in range(1, len(replicas)):
            other = replicas[(first + step) % len(replicas)]
            if costs[other[2]] + LEAN < costs[best[2]]:
                best = other
    return best


def plan_twin(entries, states, regions, files, costs, bytes_max, turn):
    planned, left = [], []
    numbers = memoryview(costs).cast("I")
    for place, (entry, state) in enumerate(
        zip(SUBMISSION.iter_unpack(entries), states, strict=True)
    ):
        _, _, file, offset, region, length, start, _ = entry
        if not state or file not in files:
            left.append(place)
            continue
        inode, chunks, chunk_bytes, end = FILE.unpack(files[file][0])
        index, within = divmod(offset, chunk_bytes)
        replicas = replicas_of(files[file][1], index) if index < 1 << 32 else []
        if offset + length > end or within + length > chunk_bytes or not replicas:
            left.append(place)
            continue
        spread = (inode * 2654435761 + index) & 0x7FFF_FFFF
        sink = (REGION.unpack(regions[region])[0], start, length)
        chunk = pack_chunk_id(InodeId(chunks), index)
        who = choose(replicas, spread, numbers)
        planned.append([place, who, (chunk, within, length), sink, region, replicas])
    gather_small(planned, numbers, turn)
    planned = [
        (
            place,
            node,
            ReadOp(TargetId(target), ChainVersion(version), *what),
            sink,
            region,
        )
        for place, (target, version, node), what, sink, region, _ in planned
    ]
    return calls_of(planned, bytes_max), struct.pack(f"<{len(left)}I", *left)


def gather_small(planned, costs, turn):
    """Small reads that would be few for each node go to the fewest that serve them."""
    small = [one for one in planned if one[2][2] <= SMALL_BYTES]
    nodes = {one[1][2] for one in small}
    if len(nodes) < 2 or len(small) >= CROWD * len(nodes):
        return
    count = len(costs)
    order = [(turn + i) % count for i in range(count)]
    order = [node for node in order if costs[node] <= min(costs) + LEAN]
    while small:
        served = {node: [o for o in small if any(r[2] == node for r in o[5])] for node in order}
        best = max(order, key=lambda node: len(served[node]), default=None)
        if best is None or not served[best]:
            return
        for one in served[best]:
            one[1] = next(replica for replica in one[5] if replica[2] == best)
        small = [one for one in small if one not in served[best]]


def calls_of(planned, bytes_max):
    """Group by node, the nodes in the order of their first entries."""
    calls = []
    while planned:
        node, some, size, full = planned[0][1], [], 0, False
        for one in planned:
            fits = not some or size + one[3][2] <= bytes_max
            full = full or (one[1] == node and not fits) or len(some) == OPERATIONS_MAX
            if one[1] == node and not full:
                some.append(one)
                size += one[3][2]
        planned = [one for one in planned if one not in some]
        calls.append(
            (
                node,
                pack_read_ops([one[2] for one in some]),
                pack_descriptors([field for one in some for field in one[3]]),
                struct.pack(f"<{len(some)}I", *[one[0] for one in some]),
                size,
                list(dict.fromkeys(one[4] for one in some)),
            )
        )
    return calls


def settle_twin(entries, places, results, filled):
    done, shorts, failed = [], [], []
    sent = memoryview(filled).cast("I").tolist()
    found = unpack_read_results(results)
    for i, place in enumerate(memoryview(places).cast("I").tolist()):
        user_data, _, _, _, _, length, _, _ = SUBMISSION.unpack_from(entries, 64 * place)
        code, got, _ = found[i]
        if code or got > length or (sent and got > sent[i]):
            failed.append(place)
        elif got < length:
            shorts += [place, got]
        else:
            done.append(COMPLETION.pack(user_data, length))
    pack = struct.pack
    return b"".join(done), pack(f"<{len(shorts)}I", *shorts), pack(f"<{len(failed)}I", *failed)


def pack_twin(wanted, parts, numbers, operation, user_data):
    packed, refused = [], []
    for place, ((file, offset, _), (region, start, length)) in enumerate(
        zip(wanted, parts, strict=True)
    ):
        if 0 <= offset < 1 << 63 and 0 < length <= layout.ENTRY_BYTES_MAX:
            entry = (operation, file.number, offset, numbers[region.id], length, start, 0)
            packed.append(SUBMISSION.pack(user_data | place, *entry))
        else:
            refused.append(place)
    return b"".join(packed), refused


def settle_completions_twin(completions, batches):
    counts, failed, last = [], [], None
    for user_data, result in COMPLETION.iter_unpack(completions):
        number, place = user_data >> 32, user_data & 0xFFFF_FFFF
        if number != last:
            counts.append([number, 0])
            last = number
        if result < 0:
            failed.append((number, place, result))
        else:
            batches[number].results[place] = result
            counts[-1][1] += 1
    return [tuple(one) for one in counts], failed
