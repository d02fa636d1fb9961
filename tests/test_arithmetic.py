"""The context coder: round trips, size against the entropy, damage, and bytes that must never change."""
import hashlib

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nncomp.arithmetic import (
    _grid,
    _read_by_table,
    _reader,
    _sides,
    _write,
    _write_by_table,
    decode,
    decode_indices,
    encode,
    encode_indices,
)
from nncomp.core import BitstreamError
from nncomp.entropy import counts, entropy_bits


def synthetic(n=1 << 17, density=0.1, k=32, seed=0):
    "Structureless symbols: zeros, and values around the middle."
    rng = np.random.default_rng(seed)
    values = np.clip(np.rint(rng.normal(size=n) * k / 6 + k // 2), 0, k - 1)
    return np.where(rng.random(n) < density, values, k // 2).astype(np.uint8), k // 2


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_round_trip_whatever_the_shape_and_the_zero(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 20), max_size=4)))
    k = data.draw(st.sampled_from([1, 2, 3, 16, 17, 256]))
    symbols = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, k - 1)))
    zero = data.draw(st.integers(-1, k - 1))
    written = encode_indices(symbols.ravel(), k, shape=shape, zero=zero)
    assert (decode_indices(written, symbols.size, k, shape=shape, zero=zero) == symbols.ravel()).all()


@settings(max_examples=25, deadline=None)
@given(hnp.arrays(st.sampled_from([np.uint8, np.uint16]), hnp.array_shapes(max_dims=4, max_side=12)))
def test_self_contained_round_trip(symbols):
    back = decode(encode(symbols))
    assert back.dtype == symbols.dtype and back.shape == symbols.shape and (back == symbols).all()


@pytest.mark.parametrize("k", [257, 5000, 65536])
def test_large_alphabets(k):
    symbols = np.random.default_rng(1).integers(0, k, 3000).astype(np.uint16)
    symbols[:2] = 0, k - 1
    for zero in (-1, 0, k // 2, k - 1):
        written = encode_indices(symbols, k, shape=(30, 100), zero=zero)
        assert (decode_indices(written, 3000, k, shape=(30, 100), zero=zero) == symbols).all()


def test_shapes_that_are_cut_in_rows():
    rng = np.random.default_rng(2)
    for shape in ((10_000,), (1, 70_000), (5000, 2), (3, 4095)):
        symbols = (rng.random(shape) < 0.1).astype(np.uint8)
        rows, images, height, width = _grid(shape, 1)
        assert rows * images * height * width >= symbols.size
        assert (decode(encode(symbols)) == symbols).all()


@pytest.mark.parametrize("density", [1.0, 0.1, 0.02])
def test_never_half_a_percent_above_the_entropy(density):
    symbols, zero = synthetic(1 << 19, density)
    bound = entropy_bits(counts(symbols)) * symbols.size / 8
    written = encode_indices(symbols, 32, shape=(512, 1024), zero=zero)
    assert len(written) <= 1.005 * bound
    assert (decode_indices(written, symbols.size, 32, shape=(512, 1024), zero=zero) == symbols).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_table_serves_any_symbols(data):
    k = data.draw(st.sampled_from([1, 2, 3, 17, 256, 257, 4096, 65536]))
    dtype = np.uint8 if k <= 256 else np.uint16
    symbols = data.draw(hnp.arrays(dtype, st.integers(1, 300), elements=st.integers(0, k - 1)))
    symbols = np.repeat(symbols, data.draw(hnp.arrays(np.int64, symbols.size, elements=st.sampled_from([1, 1, 1, 2, 3000]))))
    back = np.zeros_like(symbols)
    assert _read_by_table(back, *_reader(_write_by_table(symbols, k)), k) == symbols.size
    assert (back == symbols).all()


@pytest.mark.parametrize(("k", "spread"), [(256, 32), (16, 2), (300, 40)])
def test_large_noise_gets_a_table_and_structure_does_not(k, spread):
    rng = np.random.default_rng(7)
    symbols = np.clip(np.rint(spread * rng.standard_normal((256, 1024)) + k // 2), 0, k - 1).astype(np.uint16 if k > 256 else np.uint8)
    bound = entropy_bits(counts(symbols)) * symbols.size / 8
    written = encode_indices(symbols.ravel(), k, shape=symbols.shape, zero=k // 2)
    assert written[0] == 2 and bound <= len(written) <= 1.005 * bound
    assert (decode_indices(written, symbols.size, k, shape=symbols.shape, zero=k // 2) == symbols.ravel()).all()
    rows = np.where(rng.random((256, 1)) < 0.5, symbols, k // 2).astype(symbols.dtype)  # half of the rows are empty
    assert encode_indices(rows.ravel(), k, shape=rows.shape, zero=k // 2)[0] != 2


def test_a_table_that_lies():
    symbols = np.arange(20, dtype=np.uint8) % 16
    message = _write_by_table(symbols, 16)
    with pytest.raises(BitstreamError, match="table is empty"):
        decode_indices(b"\2" + b"\xff" * 30, 20, 16, shape=(20,))
    with pytest.raises(BitstreamError, match="left over"):
        decode_indices(b"\2" + message + bytes(9), 20, 16, shape=(20,))
    seen = set()
    for i in range(8 * len(message)):
        hurt = bytearray(message)
        hurt[i // 8] ^= 1 << i % 8
        try:
            assert decode_indices(b"\2" + bytes(hurt), 20, 16, shape=(20,)).max() < 16
            seen.add("other")
        except BitstreamError:
            seen.add("error")
    for i in range(len(message)):
        try:
            decode_indices(b"\2" + message[:i], 20, 16, shape=(20,))
        except BitstreamError:
            seen.add("cut")
    assert seen == {"other", "error", "cut"}


def test_structure_is_found():
    rng = np.random.default_rng(3)
    picture = np.zeros((64, 28, 28), bool)
    for image in picture:
        y, x = rng.integers(0, 22, 2)
        image[y:y + 6, x:x + 6] = rng.random((6, 6)) < 0.7
    symbols = picture.reshape(64, 784).astype(np.uint8)
    bound = entropy_bits(counts(symbols)) * symbols.size / 8
    written = encode_indices(symbols.ravel(), 2, shape=(64, 784), zero=0)
    assert written[0] == 28 and len(written) < 0.75 * bound
    assert len(_write(symbols.ravel(), 2, _grid((64, 784), 28), 0, False)) < len(_write(symbols.ravel(), 2, _grid((64, 784), 1), 0, False))


def test_the_bytes_never_change():
    "Golden: a file that was written once must read the same for ever, on every machine."
    symbols, zero = synthetic(20_000, 0.2, 16, seed=4)
    digests = [hashlib.sha256(_write(symbols, 16, _grid(shape, max(way, 1)), zero, way == 0)).hexdigest()[:16]
               for shape, way in (((20_000,), 0), ((100, 200), 1), ((50, 400), 20), ((20, 40, 5, 5), 1))]
    assert digests == ["b0245921ad16022d", "370d7e191b1e4063", "e6b3436ca64d906e", "777492c2367be6f2"]
    assert hashlib.sha256(_write_by_table(symbols, 16)).hexdigest()[:16] == "096035e98a036f39"
    assert encode(np.array([[3, 0, 0], [0, 1, 0]], np.uint8)).hex() == "010401020203003e5e"


def test_damage_is_an_error_or_other_symbols_and_never_more():
    symbols, zero = synthetic(4000, 0.2, 16)
    written = encode_indices(symbols, 16, shape=(40, 100), zero=zero)
    rng = np.random.default_rng(5)
    for _ in range(300):
        damaged = bytearray(written)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        damaged = bytes(damaged[:rng.integers(len(damaged) + 1)])
        try:
            back = decode_indices(damaged, 4000, 16, shape=(40, 100), zero=zero)
        except BitstreamError:
            continue
        assert back.size == 4000 and back.max() < 16


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes(data):
    try:
        back = decode(data, max_symbols=10_000)
    except BitstreamError:
        return
    assert back.size <= 10_000


def _eight(k=2, shape=(8,), more=0, **options):
    return lambda: encode_indices(np.full(8, more, np.uint8), k, shape=shape, **options)


@pytest.mark.parametrize(("call", "told"), [
    (_eight(k=0), "k must be an integer in 1…65536"), (_eight(k=2.0), "k must be"), (_eight(zero=2), "zero must be an integer in -1…1"),
    (_eight(shape=(2, 3)), "does not hold"),
    (_eight(shape=(-2, -4)), "does not hold"), (_eight(more=5), "below k"), (lambda: encode(np.zeros(3)), "uint8 or uint16"),
])
def test_parameters_that_do_not_fit(call, told):
    with pytest.raises(ValueError, match=told):
        call()


def test_read_only_input_is_left_alone():
    symbols = np.frombuffer(bytes(range(100)), np.uint8)
    assert (decode(encode(symbols)) == symbols).all()
    assert _sides((4, 100)) == [5, 10]
