"""What is fuzzed, and what must hold for any bytes: one function a target.

A target takes bytes that anyone may have written. It returns a short text that describes what came of them ("error: …" or a digest of
what was decoded), raises nothing but what is a defect, and needs no atheris: the fuzzer and the tests run the same functions.
"""

import contextlib
import hashlib
import json
import math
import struct
import sys
import tempfile
import time
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch

from nncomp import container, huffman, positions
from nncomp.core import BitstreamError

try:
    from nncomp import arithmetic
except ImportError:
    arithmetic = None

MIB = 1 << 20
SCRATCH = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
BUNDLE = "*small*"
MOST = 2000  # entries of what is coded again, symbols of an arithmetic stream


class Defect(AssertionError):
    "An invariant does not hold."


def require(condition, message):
    "Raise `Defect` where `assert` would, also under -O."
    if not condition:
        raise Defect(message)


def digest(array):
    "A short text for the type, shape and bytes of an array."
    array = np.ascontiguousarray(array)
    return f"{array.dtype}{list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


def fuzz_huffman(data, most=1 << 16):
    "Two bytes of a bound on the symbols (0: none given), and a Huffman stream."
    limit = int.from_bytes(data[:2], "little")
    try:
        x = huffman.decode(data[2:], max_symbols=min(limit or most, most))
    except BitstreamError as error:
        return f"error: {error}"
    require(x.dtype in (np.uint8, np.uint16) and x.ndim == 1 and x.size <= most, f"decoded to {x.dtype} {x.shape}")
    again = huffman.decode(huffman.encode(x), max_symbols=x.size)
    require(again.dtype == x.dtype and np.array_equal(again, x), "encoding what was decoded gives something else")
    return digest(x)


def fuzz_positions(data):
    "Two bytes of mask size, and a stream of positions."
    n = int.from_bytes(data[:2], "little")
    try:
        mask = positions.decode_positions(data[2:], n)
    except BitstreamError as error:
        return f"error: {error}"
    require(mask.dtype == bool and mask.shape == (n,) and mask.view(np.uint8).max(initial=0) <= 1, f"decoded to {mask.dtype} {mask.shape}")
    if n <= MOST:
        again = positions.decode_positions(positions.encode_positions(mask), n)
        require(np.array_equal(again, mask), "encoding what was decoded gives something else")
    return digest(mask)


def seal(data, name):
    "`data` with the checksum of a packed tensor."
    return data + zlib.crc32(data, zlib.crc32(name)).to_bytes(4, "little")


def check_tensor(name, tensor, most, again=True):
    "A decoded tensor is sound and, if wanted, survives another round."
    require(tensor.nbytes <= most, f"{tensor.nbytes} bytes were decoded where {most} are allowed")
    bits = container.bit_patterns(tensor)
    if tensor.dtype == torch.bool:
        require(bits.max(initial=0) <= 1, "a truth value is neither 0 nor 1")
    if again and tensor.numel() <= MOST:
        again = container.unpack_tensor(name, container.pack_tensor(name, tensor), max_bytes=most)
        require(again.dtype == tensor.dtype and again.shape == tensor.shape, "packing what was unpacked gives another type or shape")
        require(np.array_equal(container.bit_patterns(again), bits), "packing what was unpacked gives other bits")
    return f"{tensor.dtype}{list(tensor.shape)} {digest(bits)}"


def fuzz_tensor(data, most=MIB // 4):
    "A packed tensor without its checksum, which is computed here: otherwise no input would get past it."
    try:
        tensor = container.unpack_tensor("w", seal(data, b"w"), max_bytes=most)
    except BitstreamError as error:
        require(str(error).startswith("tensor 'w': "), f"the message does not name the tensor: {error}")
        return f"error: {error}"
    return check_tensor("w", tensor, most)


@contextlib.contextmanager
def small_blocks():
    "Tensors are cut into blocks of 64 entries instead of millions."
    kept = container._CUT_BYTES
    try:
        container._CUT_BYTES = 256
        yield
    finally:
        container._CUT_BYTES = kept


def fuzz_blocks(data):
    "A packed tensor as above, where a block is small."
    with small_blocks():
        return fuzz_tensor(data)


class on_disk:
    "The bytes as a file."

    def __init__(self, data):
        self.file = tempfile.NamedTemporaryFile(dir=SCRATCH, prefix="fuzz-", suffix=".nncomp")  # noqa: SIM115
        self.file.write(data)
        self.file.flush()

    def __enter__(self):
        return self.file.name

    def __exit__(self, *_):
        self.file.close()


def fuzz_load(data):
    "A whole file: load, load_tensor, and saving what was loaded."
    with on_disk(data) as path:
        try:
            state = container.load(path)
        except BitstreamError as error:
            require(path in str(error), f"the message does not name the file: {error}")
            return f"error: {str(error).replace(path, 'FILE')}"
        most = container.EXPANSION * len(data) + container._SLACK
        text = [f"{name!r} {check_tensor(name, tensor, most, again=False)}" for name, tensor in state.items()]
        require(sum({id(t): t.nbytes for t in state.values()}.values()) <= most, "the tensors together are larger than is allowed")
        for name, tensor in list(state.items())[:4]:
            alone = container.load_tensor(path, name)
            same = alone.dtype == tensor.dtype and np.array_equal(container.bit_patterns(alone), container.bit_patterns(tensor))
            require(same, f"load_tensor reads {name!r} differently")
        if sum(t.numel() for t in state.values()) <= MOST:
            container.save(state, path, coder="huffman")  # which is fast, as plain Python too
            again = container.load(path)
            require(list(again) == list(state), "saving what was loaded loses a name")
            same = all(np.array_equal(container.bit_patterns(again[n]), container.bit_patterns(t)) for n, t in state.items())
            require(same, "saving what was loaded gives other bits")
    return "; ".join(text)


def fuzz_inspect(data):
    "A whole file: the ledger accounts for every byte, or the file is refused; nothing of it reaches a terminal raw."
    with on_disk(data) as path:
        try:
            ledger = container.inspect(path)
        except BitstreamError as error:
            return f"error: {str(error).replace(path, 'FILE')}"
    require(ledger.total == len(data) == sum(ledger.parts.values()), "the ledger does not add up")
    require(all(type(n) is not int or n >= 0 for row in ledger.rows for n in row.values()), "a negative count of bytes")
    table = str(ledger)
    require(all(c.isprintable() or c == "\n" for c in table), "unprintable text of the file in the table")
    return json.dumps(ledger.to_dict(), sort_keys=True)[:300]


def fuzz_arithmetic(data):
    "An arithmetic stream with its header."
    most = MOST
    try:
        x = arithmetic.decode(data, max_symbols=most)
    except BitstreamError as error:
        return f"error: {error}"
    require(x.dtype in (np.uint8, np.uint16) and x.size <= most, f"decoded to {x.dtype} {x.shape}")
    again = arithmetic.decode(arithmetic.encode(x), max_symbols=most)
    require(again.dtype == x.dtype and np.array_equal(again, x), "encoding what was decoded gives something else")
    return digest(x)


def fuzz_indices(data):
    "Rank and sides of a tensor, k and zero, and a stream without a header."
    rank, (k, zero) = data[:1].ljust(1)[0] % 5, struct.unpack("<HH", data[1:5].ljust(4, b"\1"))
    k, shape = k or 65536, tuple(side % 33 for side in data[5 : 5 + rank])
    n, zero = math.prod(shape), zero % (k + 1) - 1
    if n > MOST:
        return "too many"
    try:
        x = arithmetic.decode_indices(data[5 + rank :], n, k, shape=shape, zero=zero)
    except BitstreamError as error:
        return f"error: {error}"
    require(x.shape == (n,) and x.max(initial=0) < k, f"decoded to {x.shape}, {x.max(initial=0)}")
    again = arithmetic.decode_indices(arithmetic.encode_indices(x, k, shape=shape, zero=zero), n, k, shape=shape, zero=zero)
    require(again.dtype == x.dtype and np.array_equal(again, x), "encoding what was decoded gives something else")
    return digest(x)


TARGETS = {
    "huffman": fuzz_huffman,
    "positions": fuzz_positions,
    "tensor": fuzz_tensor,
    "blocks": fuzz_blocks,
    "load": fuzz_load,
    "inspect": fuzz_inspect,
} | ({"arithmetic": fuzz_arithmetic, "indices": fuzz_indices} if arithmetic else {})
# Bytes that a target may take at its peak, beyond 64 for each byte of input: tables of the longest codes, what a small file may declare.
MEMORY = {"huffman": 24, "positions": 8, "tensor": 32, "blocks": 32, "load": 96, "inspect": 8, "arithmetic": 32, "indices": 32}  # MiB
SECONDS = 1.0  # of processor time for one input, where loops are compiled


def measured(target, data):
    "What a target returns, its processor time in seconds and its peak memory in bytes."
    tracing = tracemalloc.is_tracing()
    tracemalloc.reset_peak() if tracing else tracemalloc.start()
    before, start = tracemalloc.get_traced_memory()[0], time.process_time()
    try:
        found = TARGETS[target](data)
        return found, time.process_time() - start, tracemalloc.get_traced_memory()[1] - before
    finally:
        if not tracing:
            tracemalloc.stop()


def run(target, data, *, seconds=SECONDS):
    "Run a target on bytes; the text it returns. `seconds` of processor time and the memory are checked, unless it is None."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if seconds is None:
            return TARGETS[target](data)
        most = MEMORY[target] * MIB + 64 * len(data)
        found, took, peak = measured(target, data)
        if took > seconds or peak > most:  # perhaps numba had to compile a loop for a new type
            found, took, peak = measured(target, data)
    require(took < seconds, f"took {took:.2f} s")
    require(peak < most, f"took {peak / MIB:.1f} MiB for {len(data)} bytes")
    return found


# ---- files taken apart and put together ------------------------------------------------------------------------------


def read_varint(data, at):
    "LEB128, forgiving."
    value = shift = 0
    while at < len(data):
        value, shift, at = value | (data[at] & 127) << shift, shift + 7, at + 1
        if data[at - 1] < 128:
            break
    return value, at


def write_varint(value):
    "LEB128."
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])


def take_apart(data):
    "(metadata, own entries, records) of a file, for a mutator; raises anything on a file that is not one."
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    metadata = header.pop("__metadata__", {})
    spans = {name: entry["data_offsets"] for name, entry in header.items()}
    bundle = body[slice(*spans.pop(BUNDLE))][:-4]
    records, at = [], 0
    while at < len(bundle):
        length, at = read_varint(bundle, at)
        if length == 0:
            records.append(None)
            continue
        name, at = bundle[at : at + length - 1], at + length - 1
        size, at = read_varint(bundle, at)
        records.append((name, bundle[at : at + size - 4]))
        at += size
    return metadata, [(name, body[a : b - 4]) for name, (a, b) in spans.items()], records


def put_together(metadata, own, records):
    "A file with right sizes, offsets and checksums, whatever its parts are."
    entries, body, bundle = {"__metadata__": metadata}, b"", b""
    for name, data in own:
        packed = seal(data, name.encode("utf-8", "replace"))
        entries[name] = {"dtype": "U8", "shape": [len(packed)], "data_offsets": [len(body), len(body) + len(packed)]}
        body += packed
    for record in records:
        if record is None:
            bundle += b"\0"
        else:
            packed = seal(record[1], record[0])
            bundle += write_varint(len(record[0]) + 1) + record[0] + write_varint(len(packed)) + packed
    entries[BUNDLE] = {"dtype": "U8", "shape": [len(bundle) + 4], "data_offsets": [len(body), len(body) + len(bundle) + 4]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
    head = struct.pack("<Q", len(text)) + text
    return head + body + bundle + zlib.crc32(bundle, zlib.crc32(head)).to_bytes(4, "little")


def repair(data):
    "The same bytes with the length of the header and the last checksum put right, where there is a header at all."
    try:
        text = data[8:].decode("utf-8", "surrogateescape")
        end = len(text[: json.JSONDecoder().raw_decode(text)[1]].encode("utf-8", "surrogateescape"))
        head = struct.pack("<Q", end) + data[8 : 8 + end]
        a, b = json.loads(data[8 : 8 + end])[BUNDLE]["data_offsets"]
        bundle = data[len(head) + a : len(head) + b - 4]
        return head + data[len(head) : len(head) + a] + bundle + zlib.crc32(bundle, zlib.crc32(head)).to_bytes(4, "little")
    except Exception:  # what cannot be repaired is left as it is
        return data


def mutate_file(data, most, rng, mutate):
    "One part of a file changed by `mutate(bytes, most)`, and the rest put right around it."
    try:
        metadata, own, records = take_apart(data)
        kind = rng.randrange(8)
        if kind == 0:
            return mutate(data, most)[:most]
        if kind == 1:
            return repair(mutate(data, most))[:most]
        if kind == 2:
            metadata = json.loads(mutate(json.dumps(metadata).encode(), 200))
        elif kind == 3 and own:
            i = rng.randrange(len(own))
            own[i] = own[i][0], mutate(own[i][1], 2000)
        elif kind == 4:
            records.insert(rng.randrange(len(records) + 1), rng.choice([*records, None]))
        elif kind == 5 and records:
            records.pop(rng.randrange(len(records)))
        else:
            i = rng.choice([i for i, record in enumerate(records) if record])
            name, packed = records[i]
            records[i] = (mutate(name, 40), packed) if kind == 6 and rng.random() < 0.3 else (name, mutate(packed, 2000))
        return put_together(metadata, own, records)[:most]
    except Exception:  # not a file (any more)
        return repair(mutate(data, most))[:most]


# ---- seeds -----------------------------------------------------------------------------------------------------------


def seeds(target):
    "A few sound inputs, from which a run without a corpus starts."
    rng = np.random.default_rng(0)
    symbols = [
        np.zeros(0, np.uint8),
        np.full(9, 7, np.uint16),
        rng.geometric(0.4, 60).astype(np.uint8),
        rng.normal(900, 9, 60).astype(np.uint16),
        np.arange(40, dtype=np.uint8),
    ]
    masks = [rng.random(200) < density for density in (0.0, 0.02, 0.2, 0.8)]
    if target == "huffman":
        yield from (b"\0\0" + huffman.encode(x) for x in symbols)
        yield from (b"\0\0" + x for x in four_streams())
    if target == "positions":
        for mask in masks:
            for method in ("gaps", "split", "bitmap", "csr"):
                yield struct.pack("<H", 200) + positions.encode_positions(mask.reshape(10, 20), method)
    states = dict(enumerate(small_tensors()))
    if target == "tensor":
        for coder in ("best", "huffman", "raw"):
            yield from (container.pack_tensor("w", tensor, coder)[:-4] for tensor in states.values())
    grids = ((5, (12, 18), 0.2), (40, (6, 2, 3, 3), 1), (300, (30,), 0.5))
    planes = [(rng.integers(0, k, shape) * (rng.random(shape) < density), k) for k, shape, density in grids]
    if target == "arithmetic":
        yield from (arithmetic.encode(x.astype(np.uint8 if k < 257 else np.uint16)) for x, k in planes)
        for x, k in planes:  # by a table
            flat = x.ravel().astype(np.uint8 if k < 257 else np.uint16)
            yield b"".join(map(write_varint, (flat.itemsize, k, 1, x.ndim, *x.shape))) + b"\2" + arithmetic._write_by_table(flat, k)
    if target == "indices":
        for x, k in planes:
            for zero in (0, -1):
                flat = x.ravel().astype(np.uint8 if k < 257 else np.uint16)
                message = arithmetic.encode_indices(flat, k, shape=x.shape, zero=zero)
                yield struct.pack("<BHH", x.ndim, k, zero + 1) + bytes(x.shape) + message
                yield struct.pack("<BHH", x.ndim, k, zero + 1) + bytes(x.shape) + b"\2" + arithmetic._write_by_table(flat, k)
    if target == "blocks":
        with small_blocks():
            large = [torch.arange(300).reshape(20, 15) % 7, torch.eye(20), torch.randn(5, 70), torch.ones(100), *states.values()]
            yield from (container.pack_tensor("w", tensor)[:-4] for tensor in large)
    if target in ("load", "inspect"):
        yield from small_files(list(states.values()))


def four_streams():
    "Short streams of the kind that long inputs get, made by lowering the length from which they do; the last has codes of 15 bits."
    rng, kept = np.random.default_rng(1), {name: getattr(huffman, name) for name in ("LONG", "_default_limit") if hasattr(huffman, name)}
    weights = 1.62 ** np.arange(16)[::-1]
    try:
        huffman.LONG = 50
        yield huffman.encode(rng.geometric(0.4, 300).astype(np.uint8))
        yield huffman.encode(rng.normal(900, 20, 300).astype(np.uint16))
        huffman._default_limit = lambda k: 15
        yield huffman.encode(rng.permutation(np.repeat(np.arange(16), weights.round().astype(int))).astype(np.uint8))
    finally:
        for name, value in kept.items():
            setattr(huffman, name, value)


def small_tensors():
    "One tensor for each way of coding."
    rng = torch.Generator().manual_seed(0)
    sparse = (torch.randn(9, 12, generator=rng) * 2).round().masked_fill(torch.rand(9, 12, generator=rng) > 0.3, 0) / 2 + 0.0
    yield sparse
    yield torch.randn(4, 9, generator=rng)
    yield torch.randn(40, generator=rng).bfloat16()
    yield torch.full((3, 5), 2.5)
    yield torch.arange(50) % 7
    yield torch.rand(6, 6, generator=rng) < 0.1
    yield torch.zeros(3, 0)
    yield torch.tensor(3)


def small_files(tensors):
    "Files with bundles, entries of their own, aliases and metadata."
    limit = container.OWN_ENTRY
    state = {f"t{i}": tensor for i, tensor in enumerate(tensors)} | {"tied": tensors[0]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.nncomp"
        for chosen, own in (({}, limit), (state, limit), (state, 40), (dict(list(state.items())[:2]), 40)):
            try:
                container.OWN_ENTRY = own
                container.save(chosen, path, metadata={"net": "x"})
            finally:
                container.OWN_ENTRY = limit
            yield path.read_bytes()


if __name__ == "__main__":
    sys.exit("run fuzz.py")
