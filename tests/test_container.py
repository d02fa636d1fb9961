"The file: bit-exact round trips, golden bytes, an independent reader, and damage of every kind."

import hashlib
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import warnings
import weakref
import zlib
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from nncomp import container
from nncomp.container import (
    BUNDLE,
    OWN_ENTRY,
    bit_patterns,
    from_bit_patterns,
    inspect,
    load,
    load_tensor,
    load_tensors,
    pack_tensor,
    save,
    save_tensors,
    unpack_tensor,
)
from nncomp.core import BitstreamError, MissingExtraError
from nncomp.huffman import encode

DTYPES = {tag: dtype for tag, dtype in container._TORCH.items() if dtype is not None}
CODERS = ("best", "huffman", "raw")


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(bit_patterns(a), bit_patterns(b))


def make(dtype, shape, values, density, seed):
    "A tensor of random bit patterns (`values` distinct ones at most), a fraction of them not zero."
    rng, width = np.random.default_rng(seed), dtype.itemsize
    n = int(np.prod(shape, dtype=int))
    pool = rng.integers(0, 2 if dtype == torch.bool else 256, (values, width)).astype(np.uint8).view(f"u{width}").reshape(-1)
    patterns = np.where(rng.random(n) < density, pool[rng.integers(0, values, n)], 0).astype(f"u{width}")
    return from_bit_patterns(patterns, dtype, shape)


tensors = st.builds(
    make,
    st.sampled_from(list(DTYPES.values())),
    st.lists(st.integers(0, 9), max_size=4).map(tuple),
    st.sampled_from([1, 2, 5, 300]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.integers(0, 2**32),
)


@settings(deadline=None, max_examples=150)
@given(tensors, st.sampled_from(CODERS))
def test_tensor_round_trip(tensor, coder):
    data = pack_tensor("a.b", tensor, coder)
    assert same(unpack_tensor("a.b", data), tensor)
    assert len(data) <= tensor.nbytes + 3 + 2 * tensor.ndim + 4 + 1
    assert len(pack_tensor("a.b", tensor)) <= len(data) + 8                # "best" stops looking where it is within 64 bits of the entropy


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(st.text(max_size=12), tensors, max_size=5), st.sampled_from(CODERS))
def test_file_round_trip(tmp_path_factory, state, coder):
    path = tmp_path_factory.mktemp("f") / "x.nncomp"
    save(state, path, coder=coder)
    back = load(path)
    assert list(back) == list(state) and all(same(back[n], t) for n, t in state.items())
    assert inspect(path).total == os.path.getsize(path)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("coder", CODERS)
def test_large_tensors_of_every_dtype(dtype, coder):
    for values, density in ((7, 0.1), (300, 1.0), (100_000, 1.0), (100_000, 0.3)):
        tensor = make(dtype, (300, 301), values, density, 3)
        assert same(unpack_tensor("t", pack_tensor("t", tensor, coder)), tensor)


def test_large_sparse_raw(tmp_path):
    tensor = make(torch.float32, (700, 800), 9, 0.05, 1)
    save({"w": tensor}, tmp_path / "w.nncomp", coder="raw")
    assert same(load(tmp_path / "w.nncomp")["w"], tensor)
    assert tensor.nbytes < os.path.getsize(tmp_path / "w.nncomp") < tensor.nbytes + 250


def test_special_bits(tmp_path):
    bits = torch.tensor([0x7FC00001, 0x7F800001, -0x3FFFFF, -0x80000000, 0, 1, -1], dtype=torch.int32).repeat(50)
    state = {
        "nan": bits.view(torch.float32),
        "negative zeros": -torch.zeros(300),
        "some negative zeros": torch.tensor([0.0, -0.0, 0.0, 1.0]).repeat(99),
        "0-d": torch.tensor(3),
        "empty": torch.zeros(3, 0, 2),
        "transposed": torch.arange(12.0).reshape(3, 4).T,
        "strided": torch.arange(100)[::7],
        "expanded": torch.tensor([1.5]).expand(5, 6),
        "conjugate": torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
        "needs gradient": torch.ones(4, requires_grad=True),
        "parameter": nn.Parameter(torch.randn(3)),
    }
    save(state, tmp_path / "x.nncomp")
    back = load(tmp_path / "x.nncomp")
    assert list(back) == list(state)
    for name, tensor in state.items():
        assert same(back[name], tensor), name
        assert type(back[name]) is torch.Tensor and not back[name].requires_grad and back[name].is_contiguous()
        back[name].zero_()  # writable, and nothing else moves
    assert state["negative zeros"].signbit().all()


def test_negative_zeros_are_kept_and_reported(tmp_path):
    weight, keep = torch.randn(50, 50), torch.rand(50, 50) < 0.2
    with pytest.warns(UserWarning, match="'w' holds many negative zeros"):
        save({"w": weight * keep}, tmp_path / "x.nncomp")
    assert same(load(tmp_path / "x.nncomp")["w"], weight * keep)
    for quiet in (weight.masked_fill(~keep, 0), torch.full((99,), -128, dtype=torch.int8), torch.zeros(99).view(torch.int32)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            save({"w": quiet}, tmp_path / "x.nncomp")


def test_sizes(tmp_path):
    empty = tmp_path / "empty.nncomp"
    save({}, empty)
    assert os.path.getsize(empty) <= 160 and load(empty) == {}
    ten = {f"{i}": torch.randn(10) for i in range(10)}
    save(ten, tmp_path / "ten.nncomp")
    assert os.path.getsize(tmp_path / "ten.nncomp") <= os.path.getsize(empty) + 10 * (40 + 1 + 16)
    weight = (torch.randn(300, 784) * 4).round().masked_fill(torch.rand(300, 784) > 0.08, 0) / 4 + 0.0
    dense = torch.randn(400, 400)
    assert len(pack_tensor("w", weight)) < len(pack_tensor("w", weight, "huffman")) + 1 < weight.nbytes / 35
    assert len(pack_tensor("d", dense)) < 0.85 * dense.nbytes < len(pack_tensor("d", dense, "huffman"))
    assert len(pack_tensor("d", dense.bfloat16())) < 0.68 * dense.nbytes / 2


def test_layout_of_the_file(tmp_path):
    path = tmp_path / "x.nncomp"
    state = {"b1": torch.randn(5), "big": torch.randn(200, 200), "b2": torch.randn(5), "big2": torch.randn(200, 200)}
    save(state, path, metadata={"note": "hé"})
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"big", "big2", BUNDLE}
        assert file.metadata() == {"format": "nncomp", "version": "1", "note": "hé"}
        packed = file.get_tensor("big2")
        assert packed.dtype == torch.uint8
        assert same(unpack_tensor("big2", packed.numpy().tobytes()), state["big2"])
    assert list(load(path)) == list(state)
    for name in state:
        assert same(load_tensor(path, name), state[name])
    assert inspect(path).metadata == {"note": "hé"}


def test_one_tensor_is_read_without_the_others(tmp_path):
    path = tmp_path / "x.nncomp"
    state = {"a": torch.randn(200, 200), "b": torch.randn(200, 200)}
    save(state, path)
    data = bytearray(path.read_bytes())
    data[struct.unpack("<Q", data[:8])[0] + 8 + 100] ^= 1  # inside "a"
    path.write_bytes(data)
    assert same(load_tensor(path, "b"), state["b"])
    with pytest.raises(BitstreamError, match="tensor 'a'"):
        load_tensor(path, "a")
    with pytest.raises(BitstreamError, match="tensor 'a'"):
        load(path)
    with pytest.raises(ValueError, match="has no tensor 'c'; it has a, b"):
        load_tensor(path, "c")


def test_reserved_names(tmp_path):
    state = {
        BUNDLE: torch.randn(200, 200),
        "__metadata__": torch.randn(200, 200),
        "": torch.randn(200, 200),
        "../../etc/passwd": torch.ones(2),
        "a\x00b": torch.ones(2),
    }
    save(state, tmp_path / "x.nncomp")
    back = load(tmp_path / "x.nncomp")
    assert list(back) == list(state) and all(same(back[n], t) for n, t in state.items())
    assert [p.name for p in tmp_path.iterdir()] == ["x.nncomp"]


def test_tied_tensors(tmp_path):
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 100, bias=False), nn.Linear(64, 100, bias=False))
    model[1].weight = model[0].weight
    save(model, tmp_path / "x.nncomp", coder="raw")
    assert os.path.getsize(tmp_path / "x.nncomp") < 2 * 100 * 64 * 4 + 400
    back = load(tmp_path / "x.nncomp")
    assert back["0.weight"] is back["1.weight"] and back["0.weight"] is not back["2.weight"]
    assert load_tensor(tmp_path / "x.nncomp", "1.weight").shape == (100, 64)
    rows = inspect(tmp_path / "x.nncomp").rows
    assert rows[1]["coding"] == "= 0.weight" and rows[1]["total"] < 40
    base = torch.randn(50, 60)
    views = {"x": base, "t": base.T, "part": base[:10], "same": base.view(50, 60), "e1": base[:0], "e2": base[:0]}
    save(views, tmp_path / "v.nncomp")
    back = load(tmp_path / "v.nncomp")
    assert all(same(back[n], t) for n, t in views.items())
    assert back["same"] is back["x"] and back["t"] is not back["x"] and back["e1"] is not back["e2"]


def test_streaming(tmp_path):
    path = tmp_path / "x.nncomp"
    save_tensors(((f"layer{i}", torch.full((100, 100), float(i))) for i in range(5)), path)
    assert [t[0, 0].item() for t in load(path).values()] == [0, 1, 2, 3, 4]
    save_tensors([("a", torch.ones(2)), ("b", "a"), ("c", "b")], path)
    back = load(path)
    assert back["a"] is back["b"] is back["c"]
    assert same(load_tensor(path, "c"), torch.ones(2))
    for bad in (
        [("a", "b"), ("b", torch.ones(2))],
        [("a", torch.ones(2)), ("a", torch.ones(2))],
        [(3, torch.ones(2))],
        [("\ud800", torch.ones(2))],
    ):
        with pytest.raises(ValueError):
            save_tensors(bad, path)
    assert list(load(path)) == ["a", "b", "c"]


def test_saving_is_all_or_nothing(tmp_path):
    path = tmp_path / "x.nncomp"
    save({"a": torch.ones(3)}, path)
    before = path.read_bytes()

    def broken():
        yield "a", torch.zeros(100)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        save_tensors(broken(), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="does not exist"):
        save({"a": torch.ones(3)}, tmp_path / "no" / "x.nncomp")
    with pytest.raises(IsADirectoryError):
        save({"a": torch.ones(3)}, tmp_path)


@pytest.mark.parametrize(
    "state, message",
    [
        ({"w": 3}, "'w': only tensors"),
        ({"w": torch.eye(3).to_sparse()}, "'w'.*to_dense"),
        ({"w": torch.zeros(3, device="meta")}, "'w'.*meta"),
        ({"w": torch.zeros(3, dtype=torch.complex128)}, "'w'.*complex128"),
        ([torch.ones(3)], "module or a dict"),
    ],
)
def test_what_cannot_be_saved(tmp_path, state, message):
    with pytest.raises(ValueError, match=message):
        save(state, tmp_path / "x.nncomp")
    assert not list(tmp_path.iterdir())


def test_metadata_and_coder_are_checked(tmp_path):
    for metadata in ({"format": "x"}, {"version": "2"}, {"a": 1}, {1: "a"}):
        with pytest.raises(ValueError, match="metadata"):
            save({}, tmp_path / "x.nncomp", metadata=metadata)
    with pytest.raises(ValueError, match="coder"):
        save({"a": torch.ones(2)}, tmp_path / "x.nncomp", coder="zip")


def test_load_into(tmp_path):
    def net(hidden=5, bias=True):
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(hidden, 2, bias=bias))

    a, path = net(), tmp_path / "x.nncomp"
    save(a, path)
    b = net()
    assert load(path, into=b) is b
    assert all(same(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert b[0].weight.requires_grad
    for other, words in (
        (net(6), ["different: 3.weight", r"\(2, 6\)"]),
        (net(bias=False), ["not in the model: 3.bias"]),
        (net().half(), ["float16"]),
        (nn.Linear(2, 2), ["missing in the file: weight, bias", "and 1 more"]),
    ):
        before = {n: t.clone() for n, t in other.state_dict().items()}
        for word in words:
            with pytest.raises(ValueError, match=word):
                load(path, into=other)
        assert all(same(t, before[n]) for n, t in other.state_dict().items())


@pytest.mark.parametrize("narrow, wide, fits", [
    (torch.float16, torch.float32, True),
    (torch.bfloat16, torch.float32, True),
    (torch.bfloat16, torch.float64, True),
    (torch.float32, torch.float64, True),
    (torch.float16, torch.bfloat16, False),
    (torch.bfloat16, torch.float16, False),
    (torch.float64, torch.float32, False),
    (torch.int8, torch.float32, False),
])  # fmt: skip
def test_load_into_wider_floats_only(tmp_path, narrow, wide, fits):
    saved, target = nn.Module(), nn.Linear(3, 2, bias=False).to(wide)
    saved.weight = nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3).to(narrow), requires_grad=False)
    save(saved, tmp_path / "x.nncomp")
    if fits:
        assert load(tmp_path / "x.nncomp", into=target).weight.dtype == wide
        assert same(target.weight.detach().to(narrow), saved.weight)
    else:
        with pytest.raises(ValueError, match=f"{narrow} in the file"):
            load(tmp_path / "x.nncomp", into=target)


class Compiled(nn.Module):
    "Holds a module as torch.compile does (whose import takes seconds)."

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module


def test_wrappers(tmp_path):
    net = nn.Sequential(nn.Linear(3, 2))
    wrapped = nn.DataParallel(net)
    save(wrapped, tmp_path / "a.nncomp")
    assert list(load(tmp_path / "a.nncomp")) == ["0.weight", "0.bias"]
    save(wrapped.state_dict(), tmp_path / "b.nncomp")
    assert list(load(tmp_path / "b.nncomp")) == ["module.0.weight", "module.0.bias"]
    for name in "ab":
        for target in (
            nn.Sequential(nn.Linear(3, 2)),
            nn.DataParallel(nn.Sequential(nn.Linear(3, 2))),
            Compiled(nn.Sequential(nn.Linear(3, 2))),
        ):
            load(tmp_path / f"{name}.nncomp", into=target)
            assert all(same(x, y) for x, y in zip(net.parameters(), target.parameters()))
    save(Compiled(net), tmp_path / "c.nncomp")
    assert list(load(tmp_path / "c.nncomp")) == ["0.weight", "0.bias"]


def test_map_location(tmp_path):
    save({"a": torch.ones(3)}, tmp_path / "x.nncomp")
    assert load(tmp_path / "x.nncomp", map_location="meta")["a"].is_meta
    assert load(tmp_path / "x.nncomp", map_location=torch.device("cpu"))["a"].device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda(tmp_path):
    x = torch.randn(100, 100, device="cuda").half()
    save({"x": x}, tmp_path / "x.nncomp")
    assert same(load(tmp_path / "x.nncomp", map_location="cuda")["x"], x)
    assert load(tmp_path / "x.nncomp", map_location="cuda")["x"].device.type == "cuda"


# Golden bytes: version 1 stays readable for ever. Do not change these; a new format is a new version.
GOLDEN_STATE = {
    "conv.weight": torch.tensor([0.0, 0.5, 0.0, 0.0, -0.5, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0] * 4).reshape(4, 3, 2, 2),
    "conv.bias": torch.tensor([1.0, -2.0, 0.25, -0.0]),
    "steps": torch.tensor(1000),
    "tied": None,
    "ramp": torch.arange(40, dtype=torch.bfloat16),
    "mask": torch.tensor([[True, False, True], [False, False, True]]),
}
GOLDEN = (
    "7f000000000000007b225f5f6d657461646174615f5f223a7b22666f726d6174223a226e6e636f6d70222c2276657273696f6e223a2231222c226e65"
    "74223a22676f6c64656e227d2c222a736d616c6c2a223a7b226474797065223a225538222c227368617065223a5b3232305d2c22646174615f6f6666"
    "73657473223a5b302c3232305d7d7d0c636f6e762e7765696768741f0e0604040302020701922009922009020000003f000000bf089204cba7fd870a"
    "636f6e762e62696173180e0001040000803f000000c00000803e0000008077237ffd0673746570730f100000e80300000000000037dd40b805746965"
    "640fff08636f6e762e6269617315d3f93f0572616d70450b0301284904281dd09704efdf6d1b0080aaaaaa6a5515a00100000080004080c000204060"
    "80a0c0e000102030405060708090a0b0c0d0e0f0000810182028303827a8a46f056d61736b0d000502020302012501eb91b35ad40ec81a"
)


def test_golden_bytes(tmp_path):
    path = tmp_path / "x.nncomp"
    state = GOLDEN_STATE | {"tied": GOLDEN_STATE["conv.bias"]}
    path.write_bytes(bytes.fromhex(GOLDEN))
    back = load(path)
    assert list(back) == list(state) and all(same(back[n], t) for n, t in state.items())
    assert back["tied"] is back["conv.bias"]


def golden_states():
    "What the bytes below hold: every coding and kind of stream, and a tensor that is cut."
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 40, 2000) * (rng.random(2000) < 0.2)
    kernels = torch.from_numpy(np.rint(rng.integers(-9, 10, (20, 4, 3, 3)) * rng.random((20, 4, 3, 3)) ** 4))
    mixed = {"kernels": kernels.float() + 0.0, "matrix": torch.from_numpy(whole.reshape(40, 50))}
    mixed["ramp"] = torch.arange(400, dtype=torch.bfloat16)
    cut = torch.zeros(4_200_000, dtype=torch.uint8)
    cut[::5] = torch.arange(840_000) % 5
    return {"best": mixed, "huffman": mixed | {"cut": cut}}


GOLDEN_SHA256 = {"best": (1453, "f08af41508d94a74"), "huffman": (275201, "3270f9c8b2658f02")}


@pytest.mark.parametrize("coder", ["best", "huffman"])
def test_golden_files(tmp_path, coder):
    "The bytes of today's writer, which must be the same on every machine."
    path, state = tmp_path / "x.nncomp", golden_states()[coder]
    save(state, path, coder=coder)
    assert all(same(tensor, state[name]) for name, tensor in load(path).items())
    assert (os.path.getsize(path), hashlib.sha256(path.read_bytes()).hexdigest()[:16]) == GOLDEN_SHA256[coder]


@pytest.fixture(scope="module")
def reader():
    "The NumPy-only reader that the chapter prints, taken from the chapter."
    book = nbformat.read(Path(__file__).parents[1] / "nbs" / "34_container.ipynb", 4)
    cells = [c.source for c in book.cells if c.cell_type == "code"]
    start = next(i for i, source in enumerate(cells) if source.startswith("WIDTHS"))
    names = {}
    exec("\n".join(cells[start - 1 : start + 2]), names)
    both = "\n".join(cells[start - 1 : start + 1]), cells[start + 1]
    reader, arithmetic = ([line for line in text.splitlines() if line.strip()] for text in both)
    assert len(reader) <= 80 and len(arithmetic) <= 75 and max(map(len, reader + arithmetic)) <= 140
    assert "torch" not in "".join(reader + arithmetic) and "nncomp" not in "".join(reader + arithmetic)
    return names


@settings(deadline=None, max_examples=60)
@given(tensor=tensors, seed=st.integers(0, 2**32), kind=st.sampled_from(["best", "huffman"]))
def test_codebooks_are_read_in_any_order(reader, tensor, seed, kind):
    "Files of before codebooks were sorted by value have them sorted by pattern; a reader only asks where the pattern 0 is."
    patterns = bit_patterns(tensor)
    if not patterns.size:
        return
    book, indices = container._codebook(patterns)
    order = np.random.default_rng(seed).permutation(book.size)
    book, indices = book[order], np.argsort(order)[indices].astype(indices.dtype)
    stream = container._pack_stream(indices, book.size, kind, tuple(tensor.shape), container._zero(book))
    head = bytes([container._TAGS.index(container._TAG_OF[tensor.dtype]), container.CODEBOOK, tensor.ndim, *tensor.shape])
    packed = b"".join(container._sealed("x", head, container.write_varint(book.size), book.tobytes(), stream))
    assert same(unpack_tensor("x", packed), tensor)
    assert np.array_equal(reader["tensor"](packed, "x").reshape(-1), patterns)


@pytest.mark.filterwarnings("ignore:.*negative zeros")
def test_codebooks_are_in_the_order_of_values():
    numbers = {torch.float32: [-2.5, -1.0, 0.0, 3.0], torch.bfloat16: [-2.0, -1.0, 0.5, 3.0], torch.float8_e5m2: [-4.0, -1.0, 0.0, 2.0]}
    numbers |= {torch.int8: [-128, -1, 0, 127], torch.int64: [-(2**40), -1, 5, 2**50], torch.uint8: [0, 5, 200, 255], torch.bool: [0, 1]}
    for dtype, values in numbers.items():
        tensor = torch.tensor(values).to(dtype)
        mixed = torch.tensor(values[::-1] * 9).to(dtype)
        book, index = container._codebook(bit_patterns(mixed), container._KINDS[container._TAG_OF[dtype]])
        assert same(from_bit_patterns(book, dtype, tensor.shape), tensor) and list(index[: len(values)]) == list(range(len(values)))[::-1]
    signed = torch.tensor([0.0, -0.0, float("nan"), -float("nan"), float("inf"), -float("inf"), 1.0]).repeat(40)
    book, _ = container._codebook(bit_patterns(signed), "f")
    assert [str(x) for x in book.view(np.float32)] == ["nan", "-inf", "-0.0", "0.0", "1.0", "inf", "nan"] and container._zero(book) == 3
    for coder in CODERS:
        assert same(unpack_tensor("x", pack_tensor("x", signed, coder)), signed)


def test_shipped_files_are_read():
    files = sorted((Path(__file__).parents[1] / "models").glob("*.nncomp"))
    assert files
    for path in files:
        state = load(path)
        assert inspect(path).total == os.path.getsize(path) and len(state) == len(inspect(path).rows) - 1


@settings(deadline=None, max_examples=60)
@given(tensor=tensors, coder=st.sampled_from(CODERS))
def test_independent_reader(reader, tensor, coder):
    found = reader["tensor"](pack_tensor("x", tensor, coder), "x")
    assert found.shape == tuple(tensor.shape) and np.array_equal(found.reshape(-1), bit_patterns(tensor))


def test_independent_reader_of_files(reader, tmp_path):
    rng = torch.Generator().manual_seed(0)
    blocks = torch.zeros(40, 40)
    blocks[::7] = torch.rand(6, 40, generator=rng).round()
    state = {
        "large": torch.randn(300, 300, generator=rng).masked_fill(torch.rand(300, 300, generator=rng) > 0.3, 0),
        "planes": torch.randn(300, 300, generator=rng).half(),
        "rare": (torch.rand(300, 300, generator=rng) < 0.001).float(),
        "mostly": torch.rand(30, 300, generator=rng) < 0.95,
        "rows": torch.eye(28),
        "blocks": blocks,
    }
    state["tied"] = state["planes"]
    save(state, tmp_path / "x.nncomp")
    state["cut"] = torch.zeros(4_200_000, dtype=torch.int8)
    state["cut"][::100_000] = 3
    save(state, tmp_path / "x.nncomp", coder="huffman")
    found = reader["read"](tmp_path / "x.nncomp")
    assert list(found) == list(state) and all(np.array_equal(found[n].reshape(-1), bit_patterns(t)) for n, t in state.items())


def test_independent_reader_of_shipped_files(reader):
    paths = [path for path in (Path(__file__).parents[1] / "models").glob("*.nncomp")
             if all(row["arithmetic"] < 4000 for row in inspect(path).rows)]  # plain Python takes a minute for a megabyte
    assert paths
    for path in paths:
        found, state = reader["read"](path), load(path)
        assert list(found) == list(state) and all(np.array_equal(found[n].reshape(-1), bit_patterns(t)) for n, t in state.items())


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    w = ((torch.randn(6, 7) * 2).round() / 2).masked_fill(torch.rand(6, 7) > 0.4, 0)
    b = torch.tensor([0.5, -0.0])
    return {"w": w, "b": b, "tied": b}


def outcome(path, data, state):
    if data is not None:
        path.write_bytes(data)
    try:
        back = load(path)
    except BitstreamError as error:
        assert str(path) in str(error)
        return "error"
    assert list(back) == list(state) and all(same(back[n], t) for n, t in state.items())
    return "original"


def test_truncation_at_every_byte(small, tmp_path):
    path = tmp_path / "x.nncomp"
    save(small, path)
    whole = path.read_bytes()
    assert all(outcome(path, whole[:i], small) == "error" for i in range(len(whole)))
    assert outcome(path, whole + b"\0", small) == "error"
    assert outcome(path, whole, small) == "original"


def test_every_single_bit_flip(small, tmp_path, monkeypatch):
    monkeypatch.setattr(container, "OWN_ENTRY", 30)  # so that one tensor has an entry of its own
    path = tmp_path / "x.nncomp"
    save(small, path, metadata={"note": "x"})
    with safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == {"w", BUNDLE}
    whole = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:  # in place: writing a file for each flip took most of the time
        for i in range(8 * len(whole)):
            os.pwrite(file.fileno(), bytes([whole[i // 8] ^ 1 << i % 8]), i // 8)
            assert outcome(path, None, small) == "error", i
            os.pwrite(file.fileno(), whole[i // 8 : i // 8 + 1], i // 8)


def test_flips_behind_the_checksum(small):
    "A file made by someone who computes checksums: damage must end in an error or some tensor, fast, and never in a crash."
    for coder in ("best", "huffman"):
        for tensor in (small["w"], torch.randn(30).half(), torch.arange(50) % 7, torch.rand(40, 40) < 0.01):
            inner = pack_tensor("w", tensor, coder)[:-4]
            for i in range(8 * len(inner)):
                broken = bytearray(inner)
                broken[i // 8] ^= 1 << i % 8
                sealed = bytes(broken) + zlib.crc32(broken, zlib.crc32(b"w")).to_bytes(4, "little")
                try:
                    unpack_tensor("w", sealed, max_bytes=1 << 20)
                except BitstreamError as error:
                    assert str(error).startswith("tensor 'w': ")


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 20), st.integers(0, 9), st.lists(st.integers(0, 20), max_size=3), st.binary(max_size=60))
def test_random_bytes_behind_the_checksum(code, coding, shape, body):
    inner = bytes([code, coding, len(shape), *shape]) + body
    try:
        unpack_tensor("x", inner + zlib.crc32(inner, zlib.crc32(b"x")).to_bytes(4, "little"))
    except BitstreamError:
        pass


def raw_file(path, header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def sealed(records, extra=(), metadata=None):
    "Header and body of a file with these records and entries, with a right checksum."
    entries, offset, body = {}, 0, b""
    for name, data in extra:
        entries[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [offset, offset + len(data)]}
        offset, body = offset + len(data), body + data
    size = len(records) + 4
    entries[BUNDLE] = {"dtype": "U8", "shape": [size], "data_offsets": [offset, offset + size]}
    text = json.dumps({"__metadata__": {"format": "nncomp", "version": "1"} | (metadata or {}), **entries}).encode()
    head = struct.pack("<Q", len(text)) + text
    return head + body + records + zlib.crc32(records, zlib.crc32(head)).to_bytes(4, "little")


def record(name, packed):
    return container._label(name, len(packed)) + packed


def test_files_that_are_not_ours(tmp_path):
    path = tmp_path / "x.nncomp"
    save_file({"w": torch.ones(3)}, path)
    for function in (load, inspect):
        with pytest.raises(BitstreamError, match="not an .nncomp file.*use safetensors"):
            function(path)
    for content in (b"", b"x", b"PK\3\4" + bytes(100), b"\xff" * 300, os.urandom(5000)):
        path.write_bytes(content)
        with pytest.raises(BitstreamError, match="not an .nncomp file"):
            load(path)
    path.write_bytes(sealed(b"", metadata={"version": "9"}))
    with pytest.raises(BitstreamError, match="version 9; this nncomp reads version 1; upgrade"):
        load(path)
    with pytest.raises(BitstreamError, match="missing"):
        load(raw_file(path, {"__metadata__": {"format": "nncomp", "version": "1"}}, b""))
    with pytest.raises(FileNotFoundError, match="there is no file .*none"):
        load(tmp_path / "none")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load(tmp_path)
    path.write_bytes(sealed(b""))
    assert load(path) == {}


def test_lying_files(tmp_path):
    path, one = tmp_path / "x.nncomp", pack_tensor("a", torch.ones(2))
    alias = container._sealed
    files = {
        "appears twice": sealed(record("a", one) * 2),
        "appears twice ": sealed(b"\0" + record("a", one), [("a", one)]),
        "more entries are announced": sealed(b"\0"),
        "more entries than are announced": sealed(b"", [("a", one)]),
        "declared where": sealed(b"\x7fabc"),
        "not UTF-8": sealed(b"\x02\xff\x00"),
        "cut off": sealed(b"\x02a"),
        "tensor 'b': the checksum": sealed(record("b", one)),
        "not before it": sealed(record("b", b"".join(alias("b", b"\xff\x08", b"a")))),
        "'b' appears|not before it": sealed(record("b", b"".join(alias("b", b"\xff\x08", b"b")))),
    }
    for message, data in files.items():
        path.write_bytes(data)
        with pytest.raises(BitstreamError, match=message.strip()):
            load(path)
    with pytest.raises(BitstreamError, match="'b'"):
        load_tensor(path, "b")
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    text = '{"__metadata__":{"format":"nncomp","version":"1"},"*small*":%s,"a":%s,"a":%s}' % ((json.dumps(entry),) * 3)
    with pytest.raises(BitstreamError, match="twice"):
        load(raw_file(path, text.encode(), b""))
    wrong = {"__metadata__": {"format": "nncomp", "version": "1"}, BUNDLE: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    with pytest.raises(BitstreamError, match="row of bytes"):
        load(raw_file(path, wrong, bytes(4)))


def test_bombs(tmp_path):
    path = tmp_path / "x.nncomp"
    for shape in ((10**12,), (2**20, 2**20, 2**19), (2**40, 2**40, 0)):
        body = bytes([14, 1, len(shape)]) + b"".join(map(container.write_varint, shape)) + bytes(4)
        packed = b"".join(container._sealed("a", body))
        path.write_bytes(sealed(record("a", packed)))
        with pytest.raises(BitstreamError, match="tensor 'a'"):
            load(path)
    one = record("a", b"".join(container._sealed("a", bytes([14, 1, 1]), container.write_varint(3 * 10**6), bytes(4))))
    many = b"".join(
        record(c, b"".join(container._sealed(c, bytes([14, 1, 1]), container.write_varint(3 * 10**6), bytes(4)))) for c in "abc"
    )
    path.write_bytes(sealed(one))
    assert load(path)["a"].numel() == 3 * 10**6
    path.write_bytes(sealed(many))  # each one allowed, all together not
    with pytest.raises(BitstreamError, match="raise max_expansion"):
        load(path)
    assert len(load(path, max_expansion=10**6)) == 3
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="max_expansion"):
            load(path, max_expansion=bad)


def test_ledger(tmp_path):
    path = tmp_path / "x.nncomp"
    torch.manual_seed(0)
    state = {
        "conv.weight": torch.randn(8, 4, 3, 3).masked_fill(torch.rand(8, 4, 3, 3) > 0.2, 0),
        "a.very.long.name.that.does.not.fit.into.a.column.weight": torch.randn(400, 500).masked_fill(torch.rand(400, 500) > 0.1, 0),
        "dense": torch.randn(100, 100),
        "step": torch.tensor(3),
    }
    state["tied"] = state["dense"]
    save(state, path)
    ledger = inspect(path)
    assert ledger.total == sum(ledger.parts.values()) == os.path.getsize(path)
    for row in ledger.rows:
        assert row["total"] == sum(row[part] for part in container._PARTS) and min(row[part] for part in container._PARTS) >= 0
    assert [row["tensor"] for row in ledger.rows] == [*state, "(header)"]
    assert json.loads(json.dumps(ledger.to_dict())) == ledger.to_dict()
    assert ledger.to_dict()["parts"] == ledger.parts and ledger.to_dict()["total"] == ledger.total
    text = str(ledger)
    assert max(map(len, text.splitlines())) <= 100 and f"{ledger.total:,}" in text.splitlines()[-1]
    assert ledger.table()["total"].sum() == ledger.total
    conv = ledger.rows[0]
    assert conv["positions"] and conv["values"] and conv["shape"] == [8, 4, 3, 3] and conv["dtype"] == "float32"


def test_ledger_without_pandas(tmp_path, monkeypatch):
    save({"a": torch.ones(2)}, tmp_path / "x.nncomp")
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(MissingExtraError, match="nncomp"):
        inspect(tmp_path / "x.nncomp").table()
    assert "total" in str(inspect(tmp_path / "x.nncomp"))


def test_codebooks_at_the_limit():
    values = torch.arange(65_537, dtype=torch.int32)
    for k in (65_535, 65_536, 65_537):
        tensor = values[:k].repeat(4)
        assert same(unpack_tensor("x", pack_tensor("x", tensor)), tensor)
    assert container._codebook(values.numpy().view(np.uint32)) is None
    for k in (255, 256, 257):
        tensor = values[:k].repeat(400)
        data = pack_tensor("x", tensor, "huffman")
        assert data[1] & 3 == container.CODEBOOK and same(unpack_tensor("x", data), tensor)


def test_small_tensors_stay_below_the_limit_of_the_bundle(tmp_path):
    state = {"below": torch.randn(60, 64), "above": torch.randn(70, 64)}
    save(state, tmp_path / "x.nncomp", coder="raw")
    assert 60 * 64 * 4 < OWN_ENTRY < 70 * 64 * 4
    with safe_open(tmp_path / "x.nncomp", framework="numpy") as file:
        assert set(file.keys()) == {"above", BUNDLE}


def bundle(rng, count):
    "Many tiny tensors of several kinds."
    for i in range(count):
        x = torch.from_numpy(rng.standard_normal(int(rng.integers(1, 60))).astype(np.float32))
        yield f"layer{i}.bias", (x, (x * 2).round() + 0.0, x.bfloat16(), torch.tensor(i), x.masked_fill(x < 0.8, 0))[i % 5]


def test_what_small_tensors_and_files_cost(tmp_path):
    path = tmp_path / "x.nncomp"
    state = dict(bundle(np.random.default_rng(0), 300)) | {"4-d": torch.randn(3, 4, 3, 3), "tied": torch.randn(3)}
    state["tied again"] = state["tied"]
    state["own entry"], state["another"] = torch.randn(100, 100), torch.randn(300, 300)
    save(state, path)
    *rows, header = inspect(path).rows
    for row in rows[:-2]:
        assert row["other"] <= 16 + len(row["tensor"]) + (len("= tied") if row["coding"] == "= tied" else 0), row
    assert header["total"] <= 160
    save(dict.fromkeys("ab", torch.randn(3)), path, coder="raw")
    assert os.path.getsize(path) <= 160 + 3 * 4 + 2 * 17


def test_tiny_tensors_are_not_laboured_over(tmp_path, monkeypatch):
    "What made 20,000 of them take most of a minute: Huffman tables and adaptive codes that could not pay."
    huffman, adaptive = [], []
    arithmetic = container.encode_indices
    monkeypatch.setattr(container, "encode", lambda symbols: huffman.append(symbols) or encode(symbols))
    monkeypatch.setattr(container, "encode_indices", lambda symbols, k, **how: adaptive.append(k) or arithmetic(symbols, k, **how))
    state = dict(bundle(np.random.default_rng(1), 400))
    save(state, tmp_path / "x.nncomp")
    assert sum(symbols.min() < symbols.max() for symbols in huffman) < 40 and len(adaptive) < 500
    assert all(same(tensor, state[name]) for name, tensor in load(tmp_path / "x.nncomp").items())


def some_tensors():
    g = torch.Generator().manual_seed(0)
    state = dict(bundle(np.random.default_rng(2), 30))
    for i in range(6):
        w = torch.randn(600, 500, generator=g)
        state[f"large{i}"] = w if i % 2 else (w * 3).round().masked_fill(w.abs() < 1, 0) + 0.0
    return state


@pytest.mark.parametrize("backend", ["threading", "loky", "sequential"])
def test_jobs_do_not_change_a_byte(tmp_path, backend):
    joblib = pytest.importorskip("joblib")
    state = some_tensors() | {"raw": torch.randint(0, 256, (50_000,), dtype=torch.uint8)}
    state["tied"] = state["large1"]
    save(state, tmp_path / "one.nncomp", n_jobs=1)
    save(state, tmp_path / "two.nncomp", n_jobs=2)
    with joblib.parallel_config(backend=backend, n_jobs=2):
        save(state, tmp_path / "set.nncomp")
        back = load(tmp_path / "set.nncomp")
    assert (tmp_path / "one.nncomp").read_bytes() == (tmp_path / "two.nncomp").read_bytes() == (tmp_path / "set.nncomp").read_bytes()
    for tensors in (back, load(tmp_path / "one.nncomp", n_jobs=-1)):
        assert list(tensors) == list(state) and all(same(tensors[n], t) for n, t in state.items())
        assert tensors["tied"] is tensors["large1"]


def test_jobs_report_errors_and_leave_nothing(tmp_path):
    pytest.importorskip("joblib")
    with pytest.raises(ValueError, match="'b'.*to_dense"):
        save({"a": torch.ones(3), "b": torch.eye(3).to_sparse()}, tmp_path / "x.nncomp", n_jobs=2)
    assert not list(tmp_path.iterdir())
    save(some_tensors(), tmp_path / "x.nncomp")
    data = bytearray((tmp_path / "x.nncomp").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "x.nncomp").write_bytes(data)
    with pytest.raises(BitstreamError, match="x.nncomp: tensor 'large"):
        load(tmp_path / "x.nncomp", n_jobs=2)


def test_without_joblib(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "joblib", raising=False)
    monkeypatch.setitem(sys.modules, "joblib", None)
    save({"a": torch.ones(2)}, tmp_path / "x.nncomp", n_jobs=1)
    assert load(tmp_path / "x.nncomp", n_jobs=1)["a"].sum() == 2
    with pytest.raises(MissingExtraError, match="joblib"):
        load(tmp_path / "x.nncomp", n_jobs=2)


def test_few_tensors_are_in_memory_at_once(tmp_path):
    pytest.importorskip("joblib")
    drawn, most = 0, 0

    def tensors():
        nonlocal drawn, most
        for i in range(24):
            drawn += 1
            tensor = torch.randn(600, 600)
            weakref.finalize(tensor, gone)
            most = max(most, drawn)
            yield f"{i}", tensor
            del tensor

    def gone():
        nonlocal drawn
        drawn -= 1

    for n_jobs, limit in ((1, 1), (2, 5)):
        drawn = most = 0
        save_tensors(tensors(), tmp_path / "x.nncomp", n_jobs=n_jobs, coder="raw")
        assert most <= limit, n_jobs


def test_parts_of_a_packed_tensor_travel():
    packed = container._take_apart("w", pack_tensor("w", torch.eye(30)))
    assert same(container._unpack(pickle.loads(pickle.dumps(packed))), torch.eye(30))


def test_some_tensors_in_another_order(tmp_path):
    state = some_tensors()
    state["tied"] = state["large0"]
    save(state, tmp_path / "x.nncomp")
    names = ["tied", "large5", "layer3.bias", "large5"]
    found = list(load_tensors(tmp_path / "x.nncomp", names))
    assert [name for name, _ in found] == names and found[0][1] == "large0" and same(found[1][1], state["large5"])
    assert [name for name, _ in load_tensors(tmp_path / "x.nncomp")] == list(state)
    with pytest.raises(ValueError, match="has no tensor 'x'"):
        list(load_tensors(tmp_path / "x.nncomp", ["x"]))


def test_prepare(tmp_path):
    save_tensors([("a", torch.ones(3)), ("b", "a")], tmp_path / "x.nncomp", prepare=lambda name, tensor: tensor * 2)
    assert load(tmp_path / "x.nncomp")["b"].tolist() == [2, 2, 2]


def bytes_read():
    return int(next(line for line in open("/proc/self/io") if line.startswith("rchar")).split()[1])


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="needs Linux")
def test_one_tensor_costs_its_own_bytes(tmp_path):
    path = tmp_path / "x.nncomp"
    save({f"w{i}": torch.randn(300, 300) for i in range(12)} | {"b": torch.randn(5)}, path)
    load_tensor(path, "w6")  # compiled code is read from its cache
    before = bytes_read()
    load_tensor(path, "w7")
    assert bytes_read() - before < os.path.getsize(path) / 12 + 20_000
    before = bytes_read()
    load_tensor(path, "b")
    assert bytes_read() - before < 20_000


@pytest.mark.parametrize(
    "shape, dtype, coder",
    [
        ((2100, 2000), torch.float32, "best"),
        ((3, 1_500_000), torch.float64, "huffman"),
        ((2, 4_200_000), torch.uint8, "huffman"),
        ((2100, 2000), torch.half, "raw"),
    ],
)
def test_tensors_that_are_cut(shape, dtype, coder):
    rng = np.random.default_rng(0)
    for density in (0.003, 1.0):
        tensor = torch.from_numpy(rng.integers(1, 9, shape) * (rng.random(shape) < density)).to(dtype)
        data = pack_tensor("w", tensor, coder)
        whole = coder == "raw" or (coder == "huffman" and density < 0.1)  # few values and gaps, as many as in a block
        assert (data[1] != container.CUT) == whole
        assert same(unpack_tensor("w", data), tensor)
    assert pack_tensor("z", torch.zeros(shape, dtype=dtype), coder)[1] == (container.CONSTANT if coder != "raw" else container.RAW)
    if coder == "huffman":
        noise = torch.from_numpy(rng.integers(0, 256, (int(np.prod(shape)) * dtype.itemsize,), dtype=np.uint8)).view(dtype).reshape(shape)
        assert same(unpack_tensor("w", pack_tensor("w", noise, coder)), noise)


MEMORY = """
import ctypes, gc, json, os, sys, torch
from nncomp.container import load, save
def status(key): return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
def peak(run):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    result = run()
    return status("VmHWM") - before
def make(kind, rows):
    w = torch.randn(rows, 1000).mul_(4)
    if kind in ("dense", "bf16"): return w.bfloat16() if kind == "bf16" else w
    return w.round_().masked_fill_(w.abs() < (6.6 if kind == "sparse" else 0), 0).add_(0.0)
for kind, coder in (("dense", "best"), ("bf16", "best"), ("shared", "huffman"), ("sparse", "huffman"), ("sparse", "best")):
    for rows in (9000 if kind == "bf16" else 300, 9000):       # the first loads compiled loops
        w = make(kind, rows)
        out, path = w.nbytes, sys.argv[1]
        saving = peak(lambda: save({"w": w}, path, coder=coder))
        del w
        loading = peak(lambda: load(path))
    print(json.dumps([kind, coder, out, os.path.getsize(path), saving, loading]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")
def test_memory(tmp_path):
    "Reading takes the output, the file and 16 MB; writing about as much beside the tensor."
    run = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path / "x.nncomp")], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    for kind, coder, out, file, saving, loading in map(json.loads, run.stdout.splitlines()):
        assert out == (18_000_000 if kind == "bf16" else 36_000_000)
        assert loading <= out + file + 16_000_000, (kind, coder, file, loading)
        assert saving <= out + 32_000_000, (kind, coder, file, saving)


def test_the_trust_that_a_file_needs_is_named_once_for_tied_tensors(tmp_path):
    "However it is written; the number in the warning is enough."
    zeros = torch.zeros(3000, 3000)
    for write in (save, lambda state, path: save_tensors(iter(state.items()), path)):
        with pytest.warns(UserWarning, match="max_expansion=") as caught:
            write({"a": zeros, "b": zeros}, tmp_path / "zeros.nncomp")
        assert len(caught) == 1
        needed = int(re.search(r"max_expansion=(\d+)", str(caught[0].message))[1])
        with pytest.raises(BitstreamError, match="max_expansion"):
            load(tmp_path / "zeros.nncomp")
        assert not any(t.any() for t in load(tmp_path / "zeros.nncomp", max_expansion=needed).values())


def test_one_entry_with_a_stride(tmp_path):
    state = {"a": torch.arange(7.).view(1, 7)[:, 3], "b": torch.arange(10)[::5][:1]}
    save(state, tmp_path / "a.nncomp")
    back = load(tmp_path / "a.nncomp")
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_a_file_that_may_not_be_read_is_not_called_missing(tmp_path, monkeypatch):
    path = tmp_path / "a.nncomp"
    save({"a": torch.zeros(3)}, path)
    real = open

    def refusing(file, *args, **kwargs):
        if str(file) == str(path):
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refusing)
    with pytest.raises(PermissionError):
        load(path)
