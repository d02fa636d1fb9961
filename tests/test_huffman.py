"Huffman coding: round trips, optimal lengths, the bound [H, H + 1), and bytes that no encoder wrote."
import heapq
import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nncomp import huffman
from nncomp.core import BitstreamError
from nncomp.entropy import counts, entropy_bits, write_varint
from nncomp.huffman import LONG, canonical_codes, code_lengths, decode, encode

DTYPES = [np.uint8, np.uint16]


def check(x):
    data = encode(x)
    back = decode(data)
    assert back.dtype == x.dtype and np.array_equal(back, x)
    assert np.array_equal(decode(data, max_symbols=x.size), x)
    if x.size > 1:
        with pytest.raises(BitstreamError):
            decode(data, max_symbols=x.size - 1)
    return data


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(DTYPES))
def test_round_trip(data, dtype):
    top = data.draw(st.sampled_from([0, 1, 2, 5, 255, np.iinfo(dtype).max]))
    check(np.array(data.draw(st.lists(st.integers(0, top), max_size=60)), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 8, 9, 1000, LONG - 1, LONG, LONG + 1, LONG + 2, LONG + 3, 200_003])
def test_lengths_and_shapes_of_streams(dtype, n):
    rng = np.random.default_rng(n)
    check(np.zeros(n, dtype))
    check(np.full(n, np.iinfo(dtype).max, dtype))
    check(rng.geometric(0.4, n).clip(0, 255).astype(dtype))
    check(rng.normal(128, 40, n).clip(0, 255).astype(dtype))
    check(rng.integers(0, np.iinfo(dtype).max + 1, n).astype(dtype))
    x = np.zeros(n, dtype)
    x[n // 2:n // 2 + 1] = 1  # one symbol in nearly all places
    check(x)


@pytest.mark.parametrize("k", [65536, 40_000, 4097])
def test_large_alphabets(k):
    rng = np.random.default_rng(k)
    everything = rng.permutation(k).astype(np.uint16)
    check(everything)
    skewed = np.concatenate([everything, rng.geometric(0.01, 100_000).clip(0, k - 1).astype(np.uint16)])
    x = rng.permutation(skewed)
    data = check(x)
    h = entropy_bits(counts(x))
    assert h <= 8 * len(data) / x.size < h + 1 + 8 * k / x.size


def test_inputs_that_are_not_plain_arrays():
    x = np.random.default_rng(0).geometric(0.3, 999).clip(0, 255).astype(np.uint8)
    plain = encode(x)
    assert encode(torch.from_numpy(x)) == plain
    assert encode(np.repeat(x, 2)[::2]) == plain  # not contiguous
    frozen = x.copy()
    frozen.flags.writeable = False
    assert encode(frozen) == plain
    wide = x.astype(np.uint16)
    assert encode(wide.astype(">u2")) == encode(wide)
    for kind in (bytearray, memoryview, lambda b: np.frombuffer(b, np.uint8)):
        assert np.array_equal(decode(kind(plain)), x)
    for bad in (x.astype(np.int64), x.astype(np.int8), x.reshape(3, -1), [1, 2], np.array(3, np.uint8)):
        with pytest.raises(ValueError):
            encode(bad)


def test_decoded_array_is_writable_and_own():
    x = np.arange(50, dtype=np.uint8)
    y = decode(encode(x))
    y[0] = 9
    assert x[0] == 0


def test_small_streams_are_small():
    rng = np.random.default_rng(0)
    assert len(encode(np.zeros(0, np.uint8))) == 1
    assert len(encode(np.full(100, 3, np.uint8))) == 3
    assert len(encode(rng.integers(0, 5, 10).astype(np.uint8))) <= 9
    assert len(encode(rng.integers(0, 256, 10).astype(np.uint8))) <= 24
    assert len(encode(rng.integers(0, 65536, 10).astype(np.uint16))) <= 50


def test_golden_bytes():
    "Streams written by version 1 stay readable: these bytes never change."
    assert encode(np.array([0, 3, 0, 0, 1, 0, 4, 3, 0, 2], np.uint8)).hex() == GOLDEN["ten"]
    assert encode(np.arange(4, dtype=np.uint16)).hex() == GOLDEN["four"]


GOLDEN = {"ten": "040aa70f467c0a", "four": "050417d8"}


# ---- lengths -------------------------------------------------------------------------------------------------------

def tree_cost(c):
    "The cost of Huffman's tree: the sum of all joins."
    heap, total = [v for v in c if v], 0
    heapq.heapify(heap)
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        total += joined
        heapq.heappush(heap, joined)
    return total


def least_cost(c, limit):
    return min(sum(a * b for a, b in zip(c, ls)) for ls in itertools.product(range(1, limit + 1), repeat=len(c))
               if sum(1 << (limit - v) for v in ls) <= 1 << limit)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60) | st.sampled_from([1, 1000, 10**6]), min_size=2, max_size=5), st.integers(3, 5))
def test_lengths_are_optimal_by_brute_force(c, limit):
    lengths = code_lengths(c, limit)
    assert lengths.dtype == np.uint8 and lengths.max() <= limit
    assert int(lengths @ np.array(c)) == least_cost(c, limit)


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=300))
def test_lengths_without_a_binding_limit_cost_what_the_tree_costs(c):
    lengths, used = code_lengths(c, 20), np.count_nonzero(c)
    assert np.array_equal(lengths > 0, np.array(c) > 0)
    if used > 1:
        assert sum(2.0 ** -lengths[lengths > 0].astype(float)) == 1
        assert int(lengths @ np.array(c)) >= tree_cost(c)
        if lengths.max() < 20:
            assert int(lengths @ np.array(c)) == tree_cost(c)


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=300).filter(lambda c: sum(v > 0 for v in c) > 1))
def test_mean_length_lies_within_a_bit_of_entropy(c):
    c = np.array(c)
    mean, h = float(code_lengths(c) @ c) / c.sum(), entropy_bits(c)
    assert h - 1e-9 <= mean < h + 1


@pytest.mark.parametrize("limit", range(5, 21))
def test_every_limit_is_kept_and_costs_fall(limit):
    c = [1, 1]
    while len(c) < 32:
        c.append(c[-1] + c[-2])
    c = np.array(c)
    lengths = code_lengths(c, limit)
    assert lengths.max() <= limit and (2.0 ** -lengths.astype(float)).sum() == 1
    if limit < 20:
        assert c @ lengths >= c @ code_lengths(c, limit + 1)


def test_lengths_of_a_full_alphabet():
    flat = np.ones(65536, int)
    assert (code_lengths(flat) == 16).all()
    assert (code_lengths(flat, 16) == 16).all()
    with pytest.raises(ValueError):
        code_lengths(np.ones(65537, int), 16)
    assert code_lengths(np.full(300, 2**49)).max() == 9


@settings(deadline=None)
@given(st.lists(st.integers(0, 500), min_size=1, max_size=40))
def test_canonical_codes_are_ordered_and_prefix_free(c):
    lengths = code_lengths(c)
    codes = canonical_codes(lengths)
    words = [format(code, f"0{n}b") for code, n in zip(codes, lengths) if n]
    assert len(set(words)) == len(words)
    by_text = sorted(words)
    assert not any(b.startswith(a) for a, b in zip(by_text, by_text[1:]))
    assert [len(w) for w in by_text] == sorted(len(w) for w in words)


def test_lengths_refuse():
    for bad in ([-1, 2], [1.5, 2], [np.nan], [2**58, 2**58], np.array([2**63, 2**63], np.uint64)):
        with pytest.raises(ValueError):
            code_lengths(bad)
    for bad in ([1, 1, 1], [21], [-1], [1.5]):
        with pytest.raises(ValueError):
            canonical_codes(bad)


# ---- hostile bytes ---------------------------------------------------------------------------------------------------

def samples():
    rng = np.random.default_rng(1)
    yield rng.geometric(0.3, 300).clip(0, 255).astype(np.uint8)
    yield rng.normal(3000, 50, 300).astype(np.uint16)
    yield np.full(70, 9, np.uint16)
    yield np.arange(256, dtype=np.uint8)
    yield rng.geometric(0.3, LONG).clip(0, 255).astype(np.uint8)


def survive(data, most=None):
    "Decode bytes that may be anything: an array, or a BitstreamError."
    try:
        x = decode(data, max_symbols=most)
    except BitstreamError:
        return None
    assert x.dtype in DTYPES and (most is None or x.size <= most)
    return x


@pytest.mark.parametrize("x", [x for x in samples() if x.size < LONG], ids=lambda x: f"{x.dtype}-{x.size}")
def test_truncation_at_every_byte(x):
    data = encode(x)
    for n in range(len(data)):
        got = survive(data[:n])
        assert got is None or x.min() == x.max()  # a one-symbol stream cut inside its count may still be a number
    for tail in (b"\0", b"\1", b"\xff" * 9):
        assert survive(data + tail) is None


def test_truncation_of_four_streams():
    *_, x = samples()
    data = encode(x)
    assert data[0] >> 1 == huffman.FOUR
    for n in [*range(40), *range(40, len(data), 97), len(data) - 1]:
        assert survive(data[:n]) is None


@pytest.mark.parametrize("x", list(samples()), ids=lambda x: f"{x.dtype}-{x.size}")
def test_flipped_bits(x):
    data, rng = encode(x), np.random.default_rng(2)
    n_bits = 8 * len(data)
    flips = range(n_bits) if n_bits < 4000 else [*range(400), *rng.integers(0, n_bits, 200)]
    for bit in flips:
        hurt = bytearray(data)
        hurt[bit // 8] ^= 1 << bit % 8
        got = survive(bytes(hurt), most=1 << 20)
        assert got is None or got.size != x.size or got.dtype != x.dtype or not np.array_equal(got, x)


def test_many_flips_and_splices():
    rng, data = np.random.default_rng(3), [encode(x) for x in samples()]
    for _ in range(1500):
        hurt = bytearray(data[rng.integers(4)])
        for _ in range(rng.integers(1, 8)):
            hurt[rng.integers(len(hurt))] = rng.integers(256)
        survive(bytes(hurt), most=1 << 20)
        a, b = data[rng.integers(5)], data[rng.integers(5)]
        survive(a[: rng.integers(60)] + b[rng.integers(60):][:500], most=1 << 20)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 7))
def test_random_bytes(tail, head):
    survive(bytes([head]) + tail, most=1 << 20)
    survive(tail, most=1 << 20)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_valid_table_then_anything(data):
    "The header and table are sound, so that the loops over the words are reached, the fast ones too."
    c = np.random.default_rng(data.draw(st.integers(0, 99))).geometric(0.2, 50).clip(0, 40)
    table = huffman._table_bytes(code_lengths(counts(c)))
    n, sizes = data.draw(st.integers(1, 3000)), data.draw(st.lists(st.integers(0, 700), min_size=3, max_size=3))
    noise = np.random.default_rng(data.draw(st.integers(0, 99))).bytes(data.draw(st.integers(0, 2000)))
    four = b"".join(map(write_varint, sizes))
    for wide in (0, 1):
        survive(bytes([wide | huffman.ONE << 1]) + write_varint(n) + table + noise)
        survive(bytes([wide | huffman.FOUR << 1]) + write_varint(n) + table + four + noise)


@pytest.mark.parametrize("n", [2**20, 2**40, 2**63, 2**64 - 1])
@pytest.mark.parametrize("kind", [huffman.ONE, huffman.FOUR])
def test_declared_counts_allocate_nothing(n, kind):
    data = bytes([kind << 1]) + write_varint(n) + bytes(50)
    survive(data)  # compiled before the measurement
    tracemalloc.start()
    assert survive(data) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_one_symbol_streams_are_bounded():
    def stream(n):
        return bytes([huffman.CONSTANT << 1, 7]) + write_varint(n)

    assert decode(stream(5)).tolist() == [7] * 5
    for n in (0, huffman.MAX_CONSTANT + 1, 2**64 - 1):
        assert survive(stream(n)) is None
    assert survive(stream(100), most=99) is None
    assert survive(bytes([huffman.CONSTANT << 1]) + write_varint(256) + write_varint(5)) is None  # no uint8
    assert survive(stream(5) + b"\0") is None
    for bad in (-1, 1.5):
        with pytest.raises(ValueError):
            decode(stream(5), max_symbols=bad)


def test_tables_that_lie():
    for table in (b"\xff" * 40, b"\0" * 40, b"\x55" * 40, b"\xb6\x6d\xdb" * 20):
        for kind in (2, 3, 4, 5, 6, 7):
            survive(bytes([kind]) + write_varint(9) + table, most=100)
