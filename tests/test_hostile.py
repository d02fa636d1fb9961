"Bytes written on purpose: what the fuzzer found, and lies of every kind with right checksums (flips and cuts: test_container.py)."

import contextlib
import json
import os
import struct
import tracemalloc
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import targets
from fuzz.targets import MIB, put_together, seal, write_varint

from nncomp import container, huffman
from nncomp.container import BUNDLE, inspect, load, load_tensor, pack_tensor, unpack_tensor
from nncomp.core import BitstreamError
from nncomp.huffman import decode, encode
from nncomp.positions import decode_positions, encode_positions, from_relative_index

CORPUS = Path(__file__).parent / "fuzz" / "corpus"
F32, U8, BOOL, U64 = (container._TAGS.index(tag) for tag in ("F32", "U8", "BOOL", "U64"))


@pytest.mark.parametrize("target", targets.TARGETS)
def test_corpus(target):
    "Every input that the fuzzer kept, with its limit on memory; half a minute of processor time would be a hang."
    inputs = [(path.name, path.read_bytes()) for path in sorted((CORPUS / target).glob("*"))]
    sound = list(targets.seeds(target))
    for data in sound:
        assert not targets.run(target, data, seconds=None).startswith("error")  # and the loops are compiled before anything is measured
    for name, data in [*inputs, *enumerate(sound)]:
        try:
            targets.run(target, data, seconds=30)
        except Exception as error:
            raise AssertionError(f"{target}/{name}") from error


def test_corpus_is_small():
    assert sum(path.stat().st_size for path in CORPUS.rglob("*")) <= 200_000


def refused(packed, most=MIB, words=""):
    "A packed tensor without its checksum is refused, and nothing large is allocated on the way."
    packed = seal(packed, b"w")
    tracemalloc.start()
    try:
        with pytest.raises(BitstreamError, match=f"tensor 'w': .*{words}"):
            unpack_tensor("w", packed, max_bytes=most)
        return tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()


def head(code, coding, *shape):
    return bytes([code, coding, len(shape)]) + b"".join(map(write_varint, shape))


def stream(data, kind=1):
    return write_varint(4 * len(data) + kind) + data


def sized(data):
    return write_varint(len(data)) + data


# ---- one tensor ------------------------------------------------------------------------------------------------------


def test_truncation_behind_the_checksum():
    for tensor in targets.small_tensors():
        for coder in ("best", "huffman", "raw"):
            inner = pack_tensor("w", tensor, coder)[:-4]
            for i in range(len(inner)):
                assert refused(inner[:i])
            assert refused(inner + b"\0")


HUGE = (2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


@pytest.mark.parametrize("n", HUGE)
def test_huge_numbers_everywhere(n):
    big, symbols = write_varint(n), encode(np.arange(9, dtype=np.uint8) % 4)
    assert refused(head(F32, 0, n) + bytes(4))
    assert refused(head(F32, 1, n) + bytes(4))
    assert refused(head(F32, 1, n, n) + bytes(4))
    assert refused(head(F32, 4, 9) + big + b"\0\1")  # size of the positions
    assert refused(head(F32, 2, 9) + big + bytes(16) + stream(symbols))  # values in the codebook
    assert refused(head(F32, 2, 9) + b"\4" + bytes(16) + big + symbols)  # size and kind of a stream
    assert refused(head(U8, 3, 9) + big + symbols)
    for kind in (huffman.CONSTANT, huffman.ONE, huffman.FOUR):
        assert refused(head(U8, 3, 9) + stream(bytes([kind << 1]) + big + b"\x09" + symbols))
        assert refused(head(U8, 3, 9) + stream(bytes([kind << 1, 9]) + big + symbols))
        assert refused(head(F32, 5, 9) + sized(b"\0\4" + bytes([kind << 1, 3]) + big) + bytes(4))
    assert refused(head(F32, 5, 9) + sized(b"\3" + big + bytes(9)) + bytes(4))  # columns of a row
    assert refused(head(F32, 5, 9) + sized(b"\4\1" + big + symbols) + bytes(4))  # size of the quotients


def test_lying_shapes():
    for tensor in (torch.arange(24) % 5, torch.eye(24), torch.randn(24), torch.full((24,), 3)):
        for coder in ("best", "huffman", "raw"):
            packed = pack_tensor("w", tensor, coder)
            rank, width = tensor.ndim, len(write_varint(24))
            tail = packed[3 + rank * width : -4]
            for shape in ((23,), (25,), (0,), (), (24, 2), (5, 5), (24, 0)):
                if packed[1] == container.CONSTANT:
                    continue  # a constant fills any shape
                if packed[1] & container.SPARSE and int(np.prod(shape)) >= tensor.numel():
                    continue  # gaps leave the zeros after the last entry open
                assert refused(head(packed[0], packed[1], *shape) + tail), (tensor, coder, shape)
    assert unpack_tensor("w", seal(head(U8, 1, *[1] * 64) + b"\7", b"w")).ndim == 64
    assert refused(head(U8, 1, *[1] * 65) + b"\7", words="shape is impossible")


def test_unknown_codes():
    known = {*range(8), container.ALIAS, container.CUT}
    for code in range(len(container._TAGS), 256):
        for coding in (0, 7, 9, container.CUT, 255):
            assert refused(head(code, coding, 3) + bytes(3), words="unknown type")
        assert refused(head(code, container.ALIAS, 3), words="another name")  # 255 is written, and none of them is read
    for coding in {*range(256)} - known:
        for code, tag in enumerate(container._TAGS):
            words = "unknown coding" if container._TORCH[tag] else "this PyTorch has no type"  # an older one has not all
            assert refused(head(code, coding, 3) + bytes(3), words=words)
    for coding in {*range(256)} - {*range(8)}:  # a block is neither an alias nor cut again
        assert refused(head(U8, container.CUT, 3) + bytes([coding, 3]) + bytes(3), words="unknown coding")
    assert refused(head(U8, 2, 3) + b"\1\5" + stream(encode(np.zeros(3, np.uint8)), 3), words="kind 3")
    assert refused(head(U8, container.CUT, 3) + b"\2\4" + b"\1\5" + stream(b"\0", 3), words="kind 3")


# ---- arithmetic streams and blocks -----------------------------------------------------------------------------------


def kinds(packed, name="w"):
    "The kinds of the streams in a packed tensor."
    return {kind for block in container._take_apart(name, packed).blocks for kind, _ in block.streams}


def arithmetic_tensors():
    "A tensor for each way of coding an arithmetic stream: rows, kernels, images in the rows, no zero, flat planes."
    rng = np.random.default_rng(0)

    def few(shape, density=0.3, values=5):
        return torch.from_numpy(rng.integers(-values, values, shape) * (rng.random(shape) < density)).float() / 4 + 0.0

    images = torch.zeros(12, 7, 7)
    images[:, 2:5, 2:4] = few((12, 3, 2), 0.9)
    yield from (few((9, 20)), few((6, 2, 3, 3)), images.reshape(12, 49), few((40, 16), 1.0) + 9, few((50,)))
    yield few((90,), 1.0, 900).bfloat16()


def either(inner, shape):
    "What a damaged packed tensor gives: an error, or a tensor of its shape."
    try:
        assert unpack_tensor("w", seal(bytes(inner), b"w"), max_bytes=MIB).shape == shape
    except BitstreamError as error:
        assert str(error).startswith("tensor 'w': ")
        return "error"
    return "tensor"


def test_damaged_arithmetic_streams():
    "With a right checksum a damaged message may well decode; it ends in time, in bounds, and in values of the codebook."
    seen = Counter()
    for tensor in arithmetic_tensors():
        packed = pack_tensor("w", tensor)
        assert kinds(packed) >= {2} and packed[1] & 3 in (container.CODEBOOK, container.PLANES)
        inner, known = packed[:-4], set(tensor.flatten().tolist())
        data = bytes(container._take_apart("w", packed).blocks[0].streams[0][1])
        start = inner.index(data)
        for i in range(8 * start, 8 * (start + len(data))):
            hurt = bytearray(inner)
            hurt[i // 8] ^= 1 << i % 8
            seen[either(hurt, tensor.shape)] += 1
            with contextlib.suppress(BitstreamError):
                back = unpack_tensor("w", seal(bytes(hurt), b"w"))
                assert packed[1] & 3 == container.PLANES or set(back.flatten().tolist()) <= known
        for i in range(len(inner)):
            assert refused(inner[:i])
        if packed[1] == container.CODEBOOK:  # shortened with a right size, and with bytes appended
            front = inner[: start - len(write_varint(4 * len(data) + 2))]
            for cut in range(len(data)):
                seen[either(front + stream(data[:cut], 2), tensor.shape)] += 1
            assert refused(front + stream(data + bytes(9), 2), words="left over")
            for kind in (0, 1):
                either(front + stream(data, kind), tensor.shape)
    assert seen["error"] and seen["tensor"]


def test_lies_about_arithmetic_streams():
    assert refused(head(U8, 2, 9) + b"\2\0\1" + stream(b"", 2))
    for way in (3, 49, 127):  # images that the rows do not hold
        assert refused(head(U8, 2, 4, 20) + b"\2\0\1" + stream(write_varint(way) + bytes(8), 2), words="images")
    assert refused(head(U8, 2, 9) + b"\3\0\1\2" + stream(b"\0" + b"\xff" * 12, 2))
    assert refused(head(U8, 2, 4, 20) + b"\2\0\1" + stream(b"\2" + b"\xff" * 8, 2), words="table")
    for n in HUGE:
        assert refused(head(U8, 2, n) + b"\2\0\1" + stream(b"\0", 2))
        assert refused(head(U8, 2, 9) + b"\2\0\1" + stream(write_varint(n) + bytes(9), 2))
        assert refused(head(F32, 5, 9) + sized(b"\5" + write_varint(n) + bytes(9)) + bytes(4))
    mask = np.arange(400) % 7 == 0
    assert refused(head(F32, 5, 24) + sized(encode_positions(mask.reshape(20, 20), "context")) + bytes(4))


def test_blocks_that_lie(monkeypatch):
    "A cut tensor whose blocks are too few, too many, too long, too short, or of another coding."
    monkeypatch.setattr(container, "_CUT_BYTES", 256)
    raw = [b"\0" + sized(bytes(range(64))), b"\0" + sized(bytes(36))]
    assert unpack_tensor("w", seal(head(U8, 16, 100) + b"".join(raw), b"w"))[63] == 63
    constant = b"\1" + sized(b"\7")
    assert set(unpack_tensor("w", seal(head(U8, 16, 100) + raw[0] + constant, b"w"))[64:].tolist()) == {7}
    for blocks in (raw[:1], [], [*raw, raw[1]], [*raw, b"\0\0"], raw[::-1], [raw[0], raw[0]], [raw[0], b"\0" + sized(bytes(35))]):
        assert refused(head(U8, 16, 100) + b"".join(blocks))
    for n in HUGE:
        assert refused(head(U8, 16, 100) + b"\0" + write_varint(n) + bytes(100))
        assert refused(head(U8, 16, n) + raw[0])
    for shape in ((100, 0), (0,), (0, 2**40), ()):
        either(head(U8, 16, *shape) + raw[0], shape)
    tensor = torch.arange(105).reshape(7, 15) % 7
    inner = pack_tensor("w", tensor)[:-4]
    assert inner[1] == container.CUT and kinds(seal(inner, b"w")) >= {2}
    for i in range(8 * len(inner)):
        hurt = bytearray(inner)
        hurt[i // 8] ^= 1 << i % 8
        try:
            unpack_tensor("w", seal(bytes(hurt), b"w"), max_bytes=MIB)
        except BitstreamError as error:
            assert str(error).startswith("tensor 'w': ")
    for i in range(len(inner)):
        assert refused(inner[:i])


def test_every_flip_and_cut_of_files_with_arithmetic_streams_and_blocks(tmp_path, monkeypatch):
    "As anyone's disk might do it, without a new checksum: an error, or every bit of the original."
    monkeypatch.setattr(container, "_CUT_BYTES", 256)
    monkeypatch.setattr(container, "OWN_ENTRY", 90)
    path, tensors = tmp_path / "x.nncomp", list(arithmetic_tensors())
    state = {"rows": tensors[0], "kernels": tensors[1], "cut": torch.arange(105).reshape(7, 15) % 7}
    container.save(state, path)
    with container._opened(path) as archive:
        packed = {name: archive.packed(name) for name in archive.records}
    assert all(2 in kinds(data, name) for name, data in packed.items()) and packed["cut"][1] == container.CUT
    assert None in archive.records.values()  # one of them has an entry of its own
    whole = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        for i in range(8 * len(whole)):
            os.pwrite(file.fileno(), bytes([whole[i // 8] ^ 1 << i % 8]), i // 8)
            with pytest.raises(BitstreamError):
                load(path)
            os.pwrite(file.fileno(), whole[i // 8 : i // 8 + 1], i // 8)
        assert all(torch.equal(tensor, state[name]) for name, tensor in load(path).items())
        for i in reversed(range(len(whole))):
            os.ftruncate(file.fileno(), i)
            with pytest.raises(BitstreamError):
                load(path)


def test_truth_values_are_zero_or_one():
    for body in (head(BOOL, 0, 3) + b"\0\1\2", head(BOOL, 1, 3) + b"\xff", head(BOOL, 2, 2) + b"\2\1\7" + stream(b"\2", 0)):
        assert refused(body, words="truth value")
    sparse = pack_tensor("w", torch.tensor([2, 0, 0, 0, 0, 0, 3, 0], dtype=torch.uint8))[1:-4]
    assert refused(bytes([BOOL]) + sparse, words="truth value")
    assert unpack_tensor("w", seal(head(BOOL, 0, 3) + b"\0\1\1", b"w")).tolist() == [False, True, True]


def test_lying_indices():
    "An index that the codebook does not have, in each kind of stream, and in narrow and wide symbols."
    for dtype in (np.uint8, np.uint16):
        for index in (3, 255):
            assert refused(head(U64, 2, 4) + b"\3" + bytes(24) + stream(encode(np.array([0, 1, 2, index], dtype))), words="below 3")
    assert refused(head(F32, 2, 4) + b"\3" + bytes(12) + stream(b"\xff", 0), words="below 3")
    assert refused(head(F32, 2, 4) + b"\0" + stream(encode(np.zeros(4, np.uint8))), words="codebook")
    assert refused(head(F32, 2, 4) + write_varint(65537) + bytes(4 * 65537) + stream(encode(np.zeros(4, np.uint8))), words="codebook")
    assert refused(head(U8, 3, 4) + stream(encode(np.array([0, 1, 2, 256], np.uint16))), words="below 256")


def test_lying_counts():
    mask = np.arange(24) % 3 == 0
    for n in (7, 9):  # eight ones, and another number of values
        assert refused(head(F32, 4, 24) + sized(encode_positions(mask)) + bytes(4 * n))
        indices = stream(encode(np.arange(n, dtype=np.uint8) % 2))
        assert refused(head(F32, 6, 24) + sized(encode_positions(mask)) + b"\2" + bytes(8) + indices)
    for positions in (encode_positions(mask, method) for method in ("gaps", "split", "bitmap", "csr")):
        for n in (0, 1, 5, 21):
            assert refused(head(F32, 4, n) + sized(positions) + bytes(32))


# ---- code tables -----------------------------------------------------------------------------------------------------


def table(*steps):
    "A table of code lengths out of (bits, width) pairs, lowest bit first."
    text = "".join(format(value, f"0{width}b")[::-1] for value, width in steps)
    return int(text[::-1] or "0", 2).to_bytes(-(-len(text) // 8), "little")


def test_lying_code_lengths():
    up, down = (5, 3), (1, 3)  # a length one more, one less; a zero bit: the same as before; the first is compared with 4
    tables = {
        "one code too many": [(0, 1)] * 15 + [down, (0, 1)],
        "a length below 1": [down] * 4,
        "a length above 20": [up] * 17,
        "a jump below 1": [(7, 4), (1, 1), (0, 1)] * 9,
        "a jump above 20": [(15, 4), (0, 4), (1, 1), (0, 4)] * 9,
        "never full": [(0, 1)] * 3,
        "only gaps": [(3, 3), (0, 17), (1, 1), (0, 17)] * 20,
        "a gap past the alphabet": [(0, 1), (3, 3), (0, 17), (1, 1), (0, 17), *[(0, 1)] * 30],
        "padding": [(0, 1)] * 16 + [(1, 1)],
    }
    for name, steps in tables.items():
        for first in (huffman.ONE << 1, huffman.ONE << 1 | 1, huffman.FOUR << 1, huffman.FOUR << 1 | 1):
            for tail in (b"", bytes(40), b"\xff" * 40):
                if name == "never full" and tail == bytes(40):
                    continue  # the zeros that follow fill it
                with pytest.raises(BitstreamError):
                    decode(bytes([first, 4]) + table(*steps) + tail)
                    pytest.fail(name)
    sound = bytes([huffman.ONE << 1, 2]) + table(*[(0, 1)] * 16) + b"\x10"
    assert decode(sound).tolist() == [0, 8]  # sixteen codes of four bits


def test_sizes_of_four_streams_lie():
    data = bytearray(next(targets.four_streams()))
    whole = decode(bytes(data))
    for i in range(2, len(data)):
        for value in (0, 1, 127, 128, 255):
            hurt = bytes(data[:i]) + bytes([value]) + bytes(data[i + 1 :])
            try:
                x = decode(hurt, max_symbols=1000)
            except BitstreamError:
                continue
            assert hurt == data or not np.array_equal(x, whole)


def test_positions_that_lie():
    for data in (b"\4\1\x64\0", b"\4\5\x02\0", b"\4\x20\x03\0\0\0"):
        with pytest.raises(BitstreamError):
            decode_positions(data, 7)
    real = np.array([True])
    for gap in (-1, -2, -5, 5, 2**62, 2**63 - 1):
        with pytest.raises(ValueError):
            from_relative_index(np.array([gap]), real, 5)
    with pytest.raises(ValueError):
        from_relative_index(np.array([np.nan]), real, 5)
    assert from_relative_index(np.array([4]), real, 5).tolist() == [False] * 4 + [True]


# ---- decompression bombs ---------------------------------------------------------------------------------------------


def bombs(n):
    "A few bytes for `n` entries of one byte, by every way there is."
    narrow, wide = (bytes([huffman.CONSTANT << 1 | w, 1]) + write_varint(n) for w in (0, 1))
    zeros = bytes([huffman.CONSTANT << 1, 0]) + write_varint(n)
    ones = bytes([huffman.CONSTANT << 1, 255]) + write_varint(-(-n // 8))
    yield head(U8, 1, n) + b"\7"
    yield head(U8, 2, n) + b"\2\0\1" + stream(narrow)
    yield head(U8, 3, n) + stream(wide)
    rows = b"\3" + write_varint(n) + bytes(5)
    for positions in (b"\0\x08" + zeros, b"\0\x10" + zeros, b"\1", b"\2" + ones, rows, b"\4\0" + sized(zeros)):
        yield head(U8, 5, n) + sized(positions) + b"\7"
        yield head(U8, 6, n) + sized(positions) + b"\1\7" + stream(zeros)
        yield head(U8, 7, n) + sized(positions) + stream(narrow)
    yield head(U8, 2, n) + b"\2\0\1" + stream(b"\0", 2)
    yield head(U8, 5, n) + sized(b"\5\0") + b"\7"


@pytest.mark.parametrize("bomb", range(23))
def test_bombs_are_refused_by_their_header_alone(bomb):
    assert refused(list(bombs(10**9))[bomb], most=10**9 - 1, words="max_expansion")


@pytest.mark.parametrize("bomb", range(23))
def test_memory_is_a_small_multiple_of_what_is_declared(bomb):
    n = 4 * MIB
    packed = seal(list(bombs(n))[bomb], b"w")
    tracemalloc.start()
    try:
        tensor = unpack_tensor("w", packed)
        assert tensor.nbytes == n
    except BitstreamError:  # not every one of them is sound
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 6 * n + 8 * MIB


def test_many_bombs_in_one_file(tmp_path):
    "Each of them is allowed, all together not; the limit holds for them all, also by way of aliases and of empty tensors."
    path, one = tmp_path / "x.nncomp", head(U8, 1, 12 * MIB) + b"\7"
    path.write_bytes(put_together(META, [], [(b"a", one), (b"b", one)]))
    with pytest.raises(BitstreamError, match="tensor 'b': .*raise max_expansion"):
        load(path)
    assert load_tensor(path, "b").nbytes == 12 * MIB
    path.write_bytes(put_together(META, [], [(b"a", one)] + [(b"%d" % i, b"\xff\x08a") for i in range(50)]))
    back = load(path)
    assert len(back) == 51 and all(t is back["a"] for t in back.values())
    path.write_bytes(put_together(META, [], [(b"%d" % i, head(U8, 0, 2**40, 0, 2**19)) for i in range(50)]))
    assert all(t.numel() == 0 for t in load(path).values())


# ---- the file around the tensors -------------------------------------------------------------------------------------

META = {"format": "nncomp", "version": "1"}


def write(path, header, bundle=b"", own=b"", length=None):
    "A file with this header and bundle, and entries of their own before it; the checksum is right."
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = struct.pack("<Q", len(text) if length is None else length) + text
    path.write_bytes(start + own + bundle + zlib.crc32(bundle, zlib.crc32(start)).to_bytes(4, "little"))
    return path


def entry(a, b, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [b - a] if shape is None else shape, "data_offsets": [a, b]}


def fails(path, readers=(load, inspect, lambda path: load_tensor(path, "a"))):
    "No reader takes the file; each of them says which it is, in few words and without raw text of the file."
    for function in readers:
        with pytest.raises(BitstreamError) as error:
            function(path)
        assert str(path) in str(error.value)
        assert all(c.isprintable() for c in str(error.value)) and len(str(error.value)) < 2000
    return True


def test_headers_that_lie(tmp_path):
    path, packed = tmp_path / "x.nncomp", pack_tensor("a", torch.arange(5))
    n, bundle = len(packed), write_varint(0)
    good = {"__metadata__": META, "a": entry(0, n), BUNDLE: entry(n, n + 5)}
    assert load(write(path, good, bundle, packed))["a"].tolist() == [0, 1, 2, 3, 4]
    lies = {
        "overlap": entry(n - 1, n + 5, [6]),
        "hole": entry(n + 1, n + 5, [4]),
        "before the start": {**entry(0, 5), "data_offsets": [-1, 4]},
        "backwards": {**entry(0, 5), "data_offsets": [n + 5, n]},
        "past the end": entry(n, n + 6),
        "short of the end": entry(n, n + 4),
        "far past the end": entry(n, 2**63),
        "above 64 bits": entry(n, 2**64 + n + 5, [5]),
        "another shape": entry(n, n + 5, [6]),
        "a matrix": entry(n, n + 5, [5, 1]),
        "no dimension": entry(n, n + 5, []),
        "a negative shape": entry(n, n + 5, [-5]),
        "a broken shape": entry(n, n + 5, [2.5]),
        "a product above 64 bits": entry(n, n + 5, [2**33, 2**33]),
        "another type": entry(n, n + 5, [5], "I8"),
        "an unknown type": entry(n, n + 5, [5], "U9"),
        "no type": {"shape": [5], "data_offsets": [n, n + 5]},
        "not an entry": [1, 2],
    }
    for name, lie in lies.items():
        assert fails(write(path, good | {BUNDLE: lie}, bundle, packed)), name
    swapped = {"__metadata__": META, "a": entry(n, n + 5), BUNDLE: entry(0, n)}
    assert fails(write(path, swapped, bundle, packed))
    assert fails(write(path, {**good, "b": entry(0, n)}, bundle, packed))  # two names for the same bytes
    for length in (0, 1, 2**31, 2**63, 2**64 - 1):
        assert fails(write(path, good, bundle, packed, length))
    deep = b'{"__metadata__":{"format":"nncomp","version":"1"},"*small*":{"dtype":"U8","shape":[4],"data_offsets":[0,4],"x":%s}}'
    for value in (b"[" * 10**5 + b"]" * 10**5, b'"\\ud800"', b"1e999", b"9" * 5000, b"NaN", b"\xff", b'{"a":1,"a":2}', b"\xef\xbb\xbf1"):
        assert fails(write(path, deep % value)), value[:20]


def test_versions(tmp_path):
    path = tmp_path / "x.nncomp"
    sound = {BUNDLE: entry(0, 4)}
    assert load(write(path, {"__metadata__": META, **sound})) == {}
    for version in ("0", "2", "01", " 1", "1 ", "1.0", "", "١", "-1", "1\n", "\x1b[2J", "1" * 5000, "none", 1, None, [1]):
        assert fails(write(path, {"__metadata__": META | {"version": version}, **sound})), version
    for metadata in ({}, {"format": "nncomp"}, {"version": "1"}, {**META, "format": "NNCOMP"}, "nncomp", None, [], {**META, "a": 1}):
        assert fails(write(path, {"__metadata__": metadata, **sound})), metadata
    assert fails(write(path, sound))
    twice = b'{"__metadata__":{"format":"nncomp","version":"1","version":"1"},"*small*":%s}' % json.dumps(entry(0, 4)).encode()
    assert fails(write(path, twice))


NAMES = ["../../up", "/etc/passwd", "C:\\x", "a/b\\c", "..", ".", "", "\0", "a\0b", "\x1b[2J", "\u202evil", "\ufeff", "x" * 3000]
NAMES += [BUNDLE, "__metadata__", "\u00e9", "e\u0301"]  # reserved ones, and two that look alike


def test_names_are_only_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.nncomp"
    path.write_bytes(put_together(META, [], [(name.encode(), pack_tensor(name, torch.ones(2))[:-4]) for name in NAMES]))
    assert list(load(path)) == NAMES and load_tensor(path, "/etc/passwd").tolist() == [1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["x.nncomp"]
    ledger = inspect(path)
    assert [row["tensor"] for row in ledger.rows][:-1] == NAMES
    assert all(c.isprintable() or c == "\n" for c in str(ledger)) and max(map(len, str(ledger).splitlines())) <= 100
    path.write_bytes(put_together(META, [], [(name.encode(), b"") for name in NAMES[:3]]))
    assert fails(path, [load, inspect])


def test_duplicated_names(tmp_path):
    path, packed = tmp_path / "x.nncomp", pack_tensor("a", torch.ones(2))
    inner = packed[:-4]
    path.write_bytes(put_together(META, [], [(b"a", inner), (b"b", b"\xff\x08a"), (b"a", inner)]))
    assert fails(path)
    path.write_bytes(put_together(META, [("a", inner)], [None, (b"a", inner)]))
    assert fails(path)
    path.write_bytes(put_together(META, [("a", inner)], [(b"a", b"\xff\x08a"), None]))
    assert fails(path)
    text = json.dumps({"__metadata__": META, BUNDLE: entry(0, 4)}).encode()[:-1]
    long = b'"\\u001b%s":' % (b"y" * 10**5)
    assert fails(write(path, text + b"," + long + b"1," + long + b"1}"))


def test_aliases_lead_back_to_a_tensor(tmp_path):
    path, inner = tmp_path / "x.nncomp", pack_tensor("t", torch.ones(2))[:-4]
    for records in (
        [(b"a", b"\xff\x08none")],  # nothing there
        [(b"a", b"\xff\x08a")],  # itself
        [(b"a", b"\xff\x08b"), (b"b", b"\xff\x08a")],  # in a circle
        [(b"a", b"\xff\x08\xff\xfe")],  # no text
        [(b"a", b"\xff\x08\x1b[2J")],
    ):
        path.write_bytes(put_together(META, [], records))
        assert fails(path, [load, lambda path: load_tensor(path, "a")])
        assert str(inspect(path)).replace("\n", "").isprintable()
    path.write_bytes(put_together(META, [], [(b"a", b"\xff\x08t"), (b"t", inner)]))  # forward
    assert fails(path, [load])
    with pytest.raises(BitstreamError, match="another name"):
        unpack_tensor("a", seal(b"\xff\x08" + b"\x1b" * 10**5, b"a"))


def test_records_that_lie(tmp_path):
    path, inner = tmp_path / "x.nncomp", pack_tensor("a", torch.ones(2))[:-4]
    packed = seal(inner, b"a")
    for bundle in (
        b"\2a" + write_varint(len(packed) + 1) + packed,  # longer than there is
        b"\2a" + write_varint(len(packed) - 1) + packed,  # shorter, so that the rest is read as a record
        b"\3a" + write_varint(len(packed)) + packed,  # a longer name
        b"\1" + write_varint(len(packed)) + packed,  # no name: another checksum
        write_varint(2**64 - 1) + b"a" + packed,
        b"\2a" + write_varint(2**64 - 1) + packed,
        b"\2a\x80" + packed,
        b"\2a" + bytes([len(packed) | 128, 0]) + packed,  # written longer than needed
        b"\2a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f" + packed,
        b"\2a" + write_varint(len(packed)) + packed + b"\0",
        b"\2a",
        b"\x80",
    ):
        assert fails(write(path, {"__metadata__": META, BUNDLE: entry(0, len(bundle) + 4)}, bundle), [load, inspect]), bundle[:12]
