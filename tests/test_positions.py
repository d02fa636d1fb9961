"Positions: round trips, exact formats, and bytes that nobody wrote."

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nncomp.core import BitstreamError
from nncomp.entropy import pack_bits, write_varint
from nncomp.huffman import encode
from nncomp.positions import (
    best_fixed_bits,
    best_gap_bits,
    csr_index,
    decode_positions,
    encode_positions,
    expected_bits,
    from_csr_index,
    from_relative_index,
    relative_index,
    relative_index_bytes,
)

METHODS = ("gaps", "split", "bitmap", "csr", "context", "fast", "best")


@st.composite
def masks(draw, max_n=400):
    n = draw(st.integers(0, max_n))
    density = draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 1.0]))
    return np.random.default_rng(draw(st.integers(0, 2**32))).random(n) < density


@settings(deadline=None, max_examples=100)
@given(masks(), st.sampled_from(METHODS))
def test_round_trip(mask, method):
    if method == "csr" and not mask.size:
        with pytest.raises(ValueError, match="at least one entry"):
            encode_positions(mask, method)
        return
    data = encode_positions(mask, method)
    assert np.array_equal(decode_positions(data, mask.size), mask)
    assert np.array_equal(decode_positions(memoryview(data), mask.size), mask)
    assert len(encode_positions(mask)) <= len(data)


@settings(deadline=None, max_examples=60)
@given(masks(), st.integers(1, 16))
def test_every_width(mask, bits):
    assert np.array_equal(decode_positions(encode_positions(mask, "gaps", gap_bits=bits), mask.size), mask)
    gaps, real = relative_index(mask, bits)
    assert np.array_equal(from_relative_index(gaps, real, mask.size), mask)
    assert real.sum() == mask.sum() and (not gaps.size or gaps.max() < 2**bits)
    assert gaps.size - mask.sum() == sum(g // 2**bits for g in np.diff(np.flatnonzero(mask), prepend=-1) - 1)
    assert relative_index_bytes(mask, bits) == len(pack_bits(gaps, bits))
    assert relative_index_bytes(mask, bits, value_bits=7) == -(-gaps.size * (bits + 7) // 8)


@settings(deadline=None, max_examples=60)
@given(masks(), st.sampled_from([0, 5, 32]))
def test_best_fixed_width(mask, value_bits):
    best = best_fixed_bits(mask, value_bits=value_bits)
    size = {bits: relative_index_bytes(mask, bits, value_bits=value_bits) for bits in range(1, 17)}
    assert size[best] == min(size.values()) and all(size[bits] > size[best] for bits in range(1, best))


def test_large_gaps_do_not_overflow():
    mask = np.zeros(5_000_000, bool)
    mask[-1] = True
    assert relative_index_bytes(mask, 1) == -(-(5_000_000 // 2) // 8)
    assert relative_index_bytes(mask, 16, value_bits=64) == 77 * 80 // 8


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@settings(deadline=None, max_examples=60)
@given(masks(), st.integers(1, 30))
def test_csr_index(mask, columns):
    mask = mask[: mask.size // columns * columns].reshape(-1, columns)
    starts, found = csr_index(mask)
    assert starts.shape == (len(mask) + 1,) and starts[-1] == found.size == mask.sum()
    assert np.array_equal(from_csr_index(starts, found, columns), mask)
    if mask.size:
        theirs = torch.from_numpy(mask).float().to_sparse_csr()
        assert np.array_equal(theirs.crow_indices().numpy(), starts) and np.array_equal(theirs.col_indices().numpy(), found)


@pytest.mark.parametrize(
    "starts, columns, width",
    [
        ([], [], 3),
        ([1], [], 3),
        ([0, 2], [1], 3),
        ([0, 2, 1], [1], 3),
        ([0, 1], [3], 3),
        ([0, 1], [-1], 3),
        ([0, 2], [1, 1], 3),
        ([0, 1], [0], 0),
    ],
)
def test_bad_csr_index(starts, columns, width):
    with pytest.raises(BitstreamError):
        from_csr_index(np.array(starts, int), np.array(columns, int), width)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (5, 8), (3, 257), (0, 5), (5, 0), (0, 0), (0,)])
def test_matrix_shapes(shape):
    mask = np.random.default_rng(1).random(shape) < 0.3
    for method in METHODS if mask.size else set(METHODS) - {"csr"}:
        assert np.array_equal(decode_positions(encode_positions(mask, method), mask.size), mask.reshape(-1))


def test_tensors_and_arrays_agree():
    mask = torch.rand(30, 40, generator=torch.Generator().manual_seed(0)) < 0.2
    assert encode_positions(mask) == encode_positions(mask.numpy())


def test_long_gaps():
    mask = np.zeros(3_000_000, bool)
    mask[[0, 5, 200_000, 2_999_999]] = True
    for method in METHODS:
        assert np.array_equal(decode_positions(encode_positions(mask, method), mask.size), mask)
    assert len(encode_positions(mask)) < 20


@pytest.mark.parametrize("density", [0.003, 0.02, 0.08, 0.3, 0.5, 0.8, 0.9])
def test_close_to_entropy(density):
    mask = np.random.default_rng(0).random(100_000) < density
    bound = mask.size * expected_bits(mask.mean(), "entropy") / 8
    assert bound - 200 < len(encode_positions(mask)) < 1.04 * bound + 20


@pytest.mark.parametrize("density", [0.003, 0.02, 0.08, 0.3, 0.5, 0.8, 0.97])
def test_context_is_close_to_entropy_without_structure(density):
    mask = np.random.default_rng(0).random((200, 784)) < density
    assert len(encode_positions(mask, "context")) < 1.005 * mask.size * expected_bits(mask.mean(), "entropy") / 8 + 32


def test_context_uses_structure():
    rng = np.random.default_rng(0)
    density = rng.random((100, 1)) ** 4 * rng.random(784) ** 4     # rows and columns differ
    mask = rng.random((100, 784)) < density
    other = min(len(encode_positions(mask, method)) for method in ("gaps", "split", "bitmap", "csr"))
    assert len(encode_positions(mask)) == len(encode_positions(mask, "context")) < 0.95 * other
    assert len(encode_positions(mask, "fast")) == other


# What the first version wrote, of the mask below; it must be read for ever.
GOLDEN = {
    "gaps": "00030424dc3f390130c3575501070b3c",
    "split": "04020a040ea791bf66001580f580aa6a01",
    "bitmap": "0100000030000024499204000000000001000040000000000080",
    "coded bitmap": "020419a7d764f00d67784318680d06686a3f4130e000",
    "csr": "03194024104008838061127bb2620a30",
}


@pytest.mark.parametrize("method", GOLDEN)
def test_old_streams(method):
    mask = np.zeros((8, 25), bool)
    mask[[1, 1, 4, 6, 7], [3, 4, 20, 0, 24]] = True
    mask[2, ::3] = True
    assert np.array_equal(decode_positions(bytes.fromhex(GOLDEN[method]), 200), mask.reshape(-1))


def test_best_width_is_nearly_the_best():
    for density in (0.002, 0.02, 0.2, 0.6):
        mask = np.random.default_rng(2).random(50_000) < density
        sizes = [len(encode_positions(mask, "gaps", gap_bits=b)) for b in range(1, 17)]
        assert sizes[best_gap_bits(mask) - 1] <= 1.02 * min(sizes) + 2


HOSTILE = {
    "empty": b"",
    "unknown method": b"\x06\x01",
    "context of nothing": b"\x05",
    "context without columns": b"\x05\x00" + encode_positions(np.zeros((10, 10), bool), "context")[2:],
    "context whose columns do not divide": b"\x05\x07" + encode_positions(np.zeros((10, 10), bool), "context")[2:],
    "context with columns past the end": b"\x05" + write_varint(2**62) + bytes(20),
    "context cut off": b"\x05\x0a",
    "no width": b"\x00",
    "width 0": b"\x00\x00" + encode(np.zeros(3, np.uint8)),
    "width 17": b"\x00\x11" + encode(np.zeros(3, np.uint8)),
    "symbol wider than declared": b"\x00\x02" + encode(np.array([1, 9], np.uint8)),
    "gaps past the end": b"\x00\x08" + encode(np.array([90, 90], np.uint8)),
    "a filler last": b"\x00\x02" + encode(np.array([1, 3], np.uint8)),
    "too many symbols": b"\x00\x01" + encode(np.ones(10**6, np.uint8)),
    "bitmap short": b"\x01" + bytes(12),
    "bitmap long": b"\x01" + bytes(14),
    "bitmap padding": b"\x01" + bytes(12) + b"\x10",
    "coded bitmap of the wrong size": b"\x02" + encode(np.arange(12, dtype=np.uint8)),
    "coded bitmap of wide symbols": b"\x02" + encode(np.arange(13, dtype=np.uint16)),
    "coded bitmap bomb": b"\x02" + encode(np.zeros(10**6, np.uint8)),
    "rows of nothing": b"\x03\x00",
    "rows that do not divide": b"\x03\x07" + bytes(20),
    "rows too long": b"\x03" + write_varint(2**40),
    "rows cut off": b"\x03\x0a",
    "more ones than a row has": b"\x03\x0a" + pack_bits(np.array([15] * 10), 4) + bytes(75),
    "columns out of order": b"\x03\x32" + pack_bits(np.array([2, 0]), 6) + pack_bits(np.array([3, 3]), 6),
    "a column out of range": b"\x03\x32" + pack_bits(np.array([1, 0]), 6) + pack_bits(np.array([60]), 6),
    "split width": b"\x04\x21\x01" + encode(np.zeros(0, np.uint8)),
    "split cut off": b"\x04\x03",
    "split low bits missing": b"\x04\x03\x05" + encode(np.ones(5, np.uint8)),
    "split far past the end": b"\x04\x20\x03" + encode(np.full(100, 255, np.uint8))[:3] + b"\xff" * 400,
    "split with a tail": b"\x04\x00\x01" + encode(np.zeros(0, np.uint8)) + b"\x00",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name):
    with pytest.raises(BitstreamError):
        decode_positions(HOSTILE[name], 100)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=40), st.integers(0, 5), st.integers(0, 300))
def test_random_bytes(data, method, n):
    try:
        mask = decode_positions(bytes([method]) + data, n)
    except BitstreamError:
        return
    assert mask.dtype == bool and mask.shape == (n,)


@pytest.mark.parametrize("method", METHODS[:5])
def test_damage(method):
    mask = np.random.default_rng(5).random((10, 20)) < 0.2
    data = encode_positions(mask, method)
    for i in range(len(data)):
        for broken in (data[:i], data[:i] + bytes([data[i] ^ 0x11]) + data[i + 1 :]):
            try:
                assert decode_positions(broken, 200).shape == (200,)
            except BitstreamError:
                pass


def test_rejects_what_is_not_a_mask():
    for bad in (np.zeros(3), np.zeros((2, 2, 2), bool), np.array(True)):
        with pytest.raises(ValueError, match="mask must"):
            encode_positions(bad)
    with pytest.raises(ValueError, match="method"):
        encode_positions(np.zeros(3, bool), "zip")
    with pytest.raises(ValueError, match="gap_bits"):
        encode_positions(np.zeros(3, bool), "gaps", gap_bits=17)
