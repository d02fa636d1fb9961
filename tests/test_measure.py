"Measuring: counts against brute force, sizes against files, multiplications against the kernels' own count, clocks that wait."
import gc
import gzip
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save_file
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from nncomp import measure
from nncomp.core import named_weights
from nncomp.measure import (
    Timing,
    bits_per_weight,
    compression_ratio,
    count_macs,
    dense_bytes,
    gzip_bytes,
    layer_table,
    sparsity,
    time_call,
    zstd_bytes,
)
from nncomp.models import create_model, model_input_shape, model_names

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@st.composite
def states(draw):
    "State dicts of a few tensors of any dtype, empty ones and scalars among them."
    state, g = {}, torch.Generator().manual_seed(draw(st.integers(0, 999)))
    for i in range(draw(st.integers(0, 4))):
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        state[f"t{i}"] = torch.randint(0, 3, shape, generator=g).to(draw(st.sampled_from(DTYPES)))
    return state


# ---------------------------------------------------------------- zeros and bytes

@given(states())
@settings(deadline=None)
def test_sparsity_is_the_count(state):
    entries = [float(v) for t in state.values() for v in t.flatten()]
    if not entries:
        with pytest.raises(ValueError, match="no weights"):
            sparsity(state)
    else:
        assert sparsity(state) == pytest.approx(entries.count(0.0) / len(entries))
        assert sparsity(state.values()) == sparsity(state) == sparsity(iter(state.values()))


def test_sparsity_of_models():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    nn.init.zeros_(net[0].bias), nn.init.zeros_(net[1].bias)
    assert sparsity(net) == 0.0 == sparsity(named_weights(net))
    assert sparsity(net[0].bias) == 1.0
    assert sparsity(torch.tensor([math.nan, math.inf, 0.0, -0.0])) == 0.5


@given(states())
@settings(deadline=None)
def test_dense_bytes_and_table(state):
    expected = sum(t.numel() * (4 if t.is_floating_point() else t.element_size()) for t in state.values())
    assert dense_bytes(state) == expected
    table = layer_table(state)
    assert list(table.columns) == ["name", "shape", "entries", "non-zero", "sparsity", "distinct", "bytes"]
    assert table["bytes"].sum() == expected and list(table["name"]) == list(state)
    for row, t in zip(table.to_dict("records"), state.values()):
        assert row["distinct"] == len(set(t.flatten().tolist())) and row["shape"] == tuple(t.shape)
        assert row["non-zero"] == sum(v != 0 for v in t.flatten().tolist())


@pytest.mark.parametrize("name", ["lenet-300-100", "lenet-5", "lenet-5-small"])
def test_dense_bytes_is_the_file_without_its_header(name, tmp_path):
    state = create_model(name).state_dict()
    save_file(state, tmp_path / "net.safetensors")
    raw = (tmp_path / "net.safetensors").read_bytes()
    assert dense_bytes(state) == len(raw) - 8 - int.from_bytes(raw[:8], "little")


def test_tied_tensors_count_once():
    net = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50, bias=False))
    net[1].weight = net[0].weight
    assert dense_bytes(net) == dense_bytes(net.state_dict()) == 4 * 400
    assert len(layer_table(net)) == 1
    copy = {k: v.clone() for k, v in net.state_dict().items()}
    assert dense_bytes(copy) == 2 * 4 * 400
    assert dense_bytes({"a": net[0].weight, "b": net[0].weight.T}) == 2 * 4 * 400            # the same memory, another tensor
    assert dense_bytes({"a": torch.empty(3, device="meta"), "b": torch.empty(3, device="meta")}) == 24


@given(st.integers(1, 10**9), st.integers(1, 10**9))
def test_ratios(dense, file):
    assert compression_ratio(dense, file) == dense / file
    assert bits_per_weight(file, dense) == 8 * file / dense
    assert bits_per_weight(file, dense) * compression_ratio(4 * dense, file) == pytest.approx(32)


@pytest.mark.parametrize("bad", [(0, 1), (1, 0), (-5, 1), (1.5, 2), (True, 1)])
def test_bad_ratios(bad):
    for ratio in (compression_ratio, bits_per_weight):
        with pytest.raises(ValueError, match="must be an integer of at least 1"):
            ratio(*bad)


# ---------------------------------------------------------------- ordinary compressors

def test_compressors_see_the_float32_state(monkeypatch):
    seen = []
    monkeypatch.setattr(gzip, "compress", lambda data, level, mtime: seen.append((data, level)) or b"123")
    net = create_model("lenet-5-small").half()
    assert gzip_bytes(net) == 3 and seen[0][1] == 9
    state = load(seen[0][0])
    assert list(sorted(state)) == sorted(net.state_dict())
    assert all(t.dtype == torch.float32 and torch.equal(t, net.state_dict()[k].float()) for k, t in state.items())


@given(states())
@settings(max_examples=30, deadline=None)
def test_compressors_take_any_state(state):
    for size in (gzip_bytes, zstd_bytes):
        assert 0 < size(state) == size(state) < dense_bytes(state) + 200 + 100 * len(state)


def test_compressors_take_views():
    base = torch.randn(20, 20)
    state = {"a": base[:15], "b": base[5:], "c": base.T, "d": base.expand(3, 20, 20), "e": nn.Parameter(base)}
    assert gzip_bytes(state) > 0 and zstd_bytes(state) > 0 and dense_bytes(state) == 4 * (300 + 300 + 400 + 1200 + 400)


# ---------------------------------------------------------------- multiplications

@pytest.mark.parametrize("name", [n for n in model_names() if n not in ("vgg16", "vgg19")])
def test_macs_of_every_net(name):
    net, shape = create_model(name), model_input_shape(name)
    modes = [m.training for m in net.modules()]
    macs = count_macs(net, shape)
    assert modes == [m.training for m in net.modules()] and not any(m._forward_hooks for m in net.modules())
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        net.eval()(torch.zeros(1, *shape))
    assert 2 * sum(macs.values()) == flops.get_total_flops()


@pytest.mark.parametrize("layer", [
    lambda: nn.Conv1d(4, 8, 3, stride=2, padding=1, dilation=2), lambda: nn.Conv1d(4, 8, 5, groups=4),
    lambda: nn.Conv2d(4, 6, (3, 1), groups=2), lambda: nn.Conv3d(4, 2, 3, padding=1),
    lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    lambda: nn.ConvTranspose3d(4, 2, 2),
])
def test_macs_of_convolutions(layer):
    layer = layer()
    shape = (4, *(9, 8, 7)[:layer.weight.ndim - 2])
    with FlopCounterMode(display=False) as flops:
        layer(torch.zeros(1, *shape))
    assert 2 * count_macs(layer, shape)[""] == flops.get_total_flops()


def test_macs_of_unusual_models():
    net = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm((3, 7)), nn.Linear(7, 2, bias=False))
    assert count_macs(net, (3, 5)) == {"0": 3 * 35, "2": 3 * 14}                     # a dense layer applied at three places

    class Twice(nn.Module):
        def forward(self, w): return 2 * w
    parametrize.register_parametrization(net[0], "weight", Twice())
    assert count_macs(net, (3, 5)) == {"0": 3 * 35, "2": 3 * 14}
    for strange in (nn.LSTM(5, 3), nn.Bilinear(5, 5, 2)):
        with pytest.raises(ValueError, match=f"no rule to count the multiplications of {type(strange).__name__}"):
            count_macs(nn.Sequential(nn.Identity(), nn.Sequential(strange)) if isinstance(strange, nn.LSTM) else Pair(strange), (4, 5))
    assert count_macs(nn.ReLU(), (3,)) == {}
    assert count_macs(nn.Linear(3, 2).double(), (3,)) == {"": 6}


class Pair(nn.Module):
    "Give a layer its input twice."
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
    def forward(self, x): return self.layer(x, x)


def test_hooks_go_away_after_an_error():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.raises(RuntimeError):
        count_macs(net, (4,))
    assert not any(m._forward_hooks for m in net.modules()) and net.training


# ---------------------------------------------------------------- time

@given(st.integers(0, 4), st.integers(2, 20))
@settings(max_examples=20, deadline=None)
def test_every_call_is_made(warmup, repeats):
    calls = []
    timing = time_call(lambda: calls.append(gc.isenabled()), warmup=warmup, repeats=repeats)
    assert calls == [True] * warmup + [False] * repeats and gc.isenabled()
    assert timing.repeats == repeats and timing.threads == torch.get_num_threads() and timing.device == "cpu"
    assert 0 <= timing.q1 <= timing.median <= timing.q3


def test_the_clock_waits_for_the_device(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cpu, "synchronize", lambda: events.append("wait"))
    clock = iter(range(0, 10**12, 10**9))
    monkeypatch.setattr(measure.time, "perf_counter_ns", lambda: events.append("clock") or next(clock))
    assert time_call(lambda: events.append("call"), warmup=1, repeats=2) == Timing(1.0, 1.0, 1.0, 2, torch.get_num_threads(), "cpu")
    assert events == ["call"] + 2 * ["wait", "clock", "call", "wait", "clock"]


def test_quartiles_by_hand(monkeypatch):
    ticks = iter([t for i, duration in enumerate([4, 1, 3, 2, 5]) for t in (100 * i * 10**9, (100 * i + duration) * 10**9)])
    monkeypatch.setattr(measure.time, "perf_counter_ns", lambda: next(ticks))
    timing = time_call(lambda: None, warmup=0, repeats=5)
    assert (timing.q1, timing.median, timing.q3) == (2.0, 3.0, 4.0)


def test_a_failing_call_leaves_the_collector_on():
    with pytest.raises(ZeroDivisionError):
        time_call(lambda: 1 / 0, warmup=0)
    assert gc.isenabled()


@pytest.mark.parametrize("bad", [{"repeats": 1}, {"repeats": 0}, {"warmup": -1}, {"warmup": 1.5}])
def test_bad_repeats(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        time_call(lambda: None, **bad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    a = torch.randn(2048, 2048, device="cuda")
    timing = time_call(lambda: a @ a, repeats=10)
    assert timing.device.startswith("cuda") and timing.median > 20e-6


def test_a_layer_scale_is_no_matrix_product():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.scale = nn.Conv2d(3, 4, 1), nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x):
            return self.conv(x) * self.scale

    assert count_macs(Scaled(), (3, 2, 2)) == {"conv": 4 * 3 * 4}
