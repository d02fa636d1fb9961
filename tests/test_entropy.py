"Entropy, bit packing and variable-length integers: round trips, bounds and hostile bytes."
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nncomp.core import BitstreamError
from nncomp.entropy import counts, entropy_bits, pack_bits, read_varint, unpack_bits, write_varint


@settings(deadline=None)
@given(st.lists(st.integers(0, 300)), st.integers(301, 400))
def test_counts_sum_and_agree_with_numpy(xs, k):
    x = np.array(xs, np.int64)
    c = counts(x, k)
    assert c.dtype == np.int64 and c.shape == (k,) and c.sum() == len(xs)
    assert (c == [(x == i).sum() for i in range(k)]).all()
    assert (counts(x) == c[: len(counts(x))]).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64, np.uint64])
def test_counts_of_every_integer_type(dtype):
    assert counts(np.array([3, 0, 3], dtype)).tolist() == [1, 0, 0, 2]


def test_counts_takes_tensors_views_and_pieces():
    x = torch.arange(12, dtype=torch.int16).view(3, 4)
    assert counts(x.T[:2]).sum() == 6
    big = np.random.default_rng(0).integers(0, 7, (1 << 20) + 5).astype(np.uint8)
    assert (counts(big) == np.bincount(big)).all()


@pytest.mark.parametrize("bad", [[-1], [0.5], ["a"], [1 << 24], np.array([True])])
def test_counts_refuses(bad):
    with pytest.raises(ValueError):
        counts(bad)


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**9), min_size=1))
def test_entropy_lies_between_zero_and_log_k(c):
    h = entropy_bits(c)
    used = sum(v > 0 for v in c)
    assert 0 <= h <= (np.log2(used) + 1e-9 if used else 0)
    assert h == pytest.approx(entropy_bits(np.array(c) * 3), abs=1e-9)
    assert h == pytest.approx(entropy_bits(c[::-1]), abs=1e-9)


def test_entropy_extremes():
    assert entropy_bits([0, 0]) == entropy_bits([5]) == entropy_bits([]) == 0
    assert str(entropy_bits([5])) == "0.0"
    assert entropy_bits(np.full(65536, 7)) == pytest.approx(16)
    for bad in ([-1, 2], [np.nan, 1], [np.inf, 1]):
        with pytest.raises(ValueError):
            entropy_bits(bad)


@settings(deadline=None)
@given(st.data(), st.integers(1, 32))
def test_pack_round_trip(data, width):
    x = data.draw(st.lists(st.integers(0, 2**width - 1), max_size=40))
    packed = pack_bits(np.array(x, np.uint64), width)
    assert len(packed) == -(-len(x) * width // 8)
    back = unpack_bits(packed, width, len(x))
    assert back.dtype == np.uint32 and back.tolist() == x
    assert int.from_bytes(packed, "little") == sum(v << i * width for i, v in enumerate(x))


@settings(deadline=None)
@given(st.binary(max_size=40), st.integers(1, 32), st.integers(0, 200))
def test_unpack_any_bytes(data, width, n):
    try:
        x = unpack_bits(data, width, n)
    except BitstreamError:
        return
    assert pack_bits(x, width) == data and len(x) == n


def test_unpack_does_not_allocate_what_is_only_declared():
    start = time.perf_counter()
    with pytest.raises(BitstreamError):
        unpack_bits(b"\0" * 10, 3, 2**60)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("values, width", [([-1], 3), ([8], 3), ([0.5], 3), ([1], 0), ([1], 33), ([2**32], 32)])
def test_pack_refuses(values, width):
    with pytest.raises(ValueError):
        pack_bits(values, width)


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.binary(max_size=5), st.binary(max_size=5))
def test_varint_round_trip(value, before, after):
    code = write_varint(value)
    assert len(code) == max(1, -(-value.bit_length() // 7))
    assert read_varint(before + code + after, len(before)) == (value, len(before) + len(code))
    for n in range(len(code)):
        with pytest.raises(BitstreamError):
            read_varint(code[:n])


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=12) | st.binary(max_size=3).map(lambda b: b"\xff" * 9 + b))
def test_varint_any_bytes_is_canonical(data):
    try:
        value, end = read_varint(data)
    except BitstreamError:
        return
    assert value < 2**64 and data[:end] == write_varint(value)


@pytest.mark.parametrize("offset", [-1, 3, 2**70])
def test_varint_offset_outside(offset):
    with pytest.raises(BitstreamError):
        read_varint(b"\1\2\3", offset)
