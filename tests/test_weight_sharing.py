"Sharing weights on any module: names, zeros, ties, dtypes, gradients, and the way back to plain tensors."
import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize, prune
from toys import Stop, toy_data, toy_net

from nncomp.core import named_weights
from nncomp.kmeans import kmeans_1d
from nncomp.training import evaluate, fit
from nncomp.weight_sharing import (
    Reassign,
    SharedWeight,
    choose_bits,
    entropy_constrained,
    finalize_sharing,
    fit_budget,
    rate_distortion_assign,
    share_weights,
    sharing_costs,
    symbol_bits,
    weight_importance,
)


def small_net(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 20), nn.ReLU(), nn.Linear(20, 4))
    with torch.no_grad():
        for w in named_weights(net).values():
            w[w.abs() < w.abs().flatten().median()] = 0
    return net


def train(net, steps=4, dtype=torch.float32):
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(16, 1, 6, 6, dtype=dtype)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("bits", [1, 2, 5, 16])
@pytest.mark.parametrize("trainable", [False, True])
def test_few_values_and_the_same_zeros(bits, trainable):
    net = small_net()
    dense = {n: w.detach().clone() for n, w in named_weights(net).items()}
    codebooks = share_weights(net, bits, trainable=trainable)
    if trainable:
        train(net)
        assert list(finalize_sharing(net)) == list(codebooks)
    assert list(codebooks) == ["0.weight", "4.weight", "6.weight"]
    for name, w in named_weights(net).items():
        assert len(w.detach().unique()) <= 2**bits
        assert torch.equal(w == 0, dense[name] == 0)
        if not trainable:
            codebook, assignments = kmeans_1d(dense[name], 2**bits, keep_zero=True)
            assert torch.equal(w, codebook[assignments])


def test_trainable_starts_where_snapping_ends():
    snapped, trained = small_net(), small_net()
    x = torch.randn(3, 1, 6, 6)
    first, second = share_weights(snapped, 3), share_weights(trained, 3, trainable=True)
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert torch.equal(snapped.eval()(x), trained.eval()(x))
    finalize_sharing(trained)
    assert all(torch.equal(a, b) for a, b in zip(snapped.state_dict().values(), trained.state_dict().values(), strict=True))
    assert list(snapped.state_dict()) == list(trained.state_dict())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.floats(0, 0.95), st.integers(0, 2**31))
def test_gradient_is_the_sum_over_members(bits, sparsity, seed):
    torch.manual_seed(seed)
    weight = torch.randn(7, 9, dtype=torch.double)
    weight[torch.rand_like(weight) < sparsity] = 0
    codebook, assignments = kmeans_1d(weight, 2**bits, keep_zero=True)
    shared = SharedWeight(codebook, assignments)
    entry = shared.start.clone().requires_grad_()
    gradient = torch.randn(7, 9, dtype=torch.double)
    got, = torch.autograd.grad(shared(entry), entry, gradient)
    formula = torch.stack([(gradient * (assignments == j)).sum() for j in range(len(codebook)) if codebook[j] != 0] or [torch.zeros(())])
    torch.testing.assert_close(got, formula[:len(got)].double(), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(shared, (entry,)) if len(entry) else True


def test_a_model_is_refused_whole():
    net = small_net()
    with torch.no_grad():
        net[6].weight[0, 0] = float("inf")
    before = copy.deepcopy(net.state_dict())
    for trainable in (False, True):
        with pytest.raises(ValueError, match="6.weight holds 1 NaN or infinite value of 80"):
            share_weights(net, 2, trainable=trainable)
        assert list(before) == list(net.state_dict()) and all(torch.equal(before[n], t) for n, t in net.state_dict().items())


@pytest.mark.parametrize("bits, message", [
    (0, "bits must be an integer in 1…16, got 0"), (17, "got 17"), (2.5, "got 2.5"), (True, "got True"),
    ({"4.weight": 0}, "bits of 4.weight"), ({"nothing": 2}, "nothing"), ({"1.num_batches_tracked": 2}, "num_batches_tracked"),
    ({}, "bits names no tensor; there are 0.weight, 0.bias"), ("2", "bits must be an integer in 1…16, got '2'"),
])
def test_bad_bits(bits, message):
    with pytest.raises(ValueError) as error:
        share_weights(small_net(), bits)
    assert message in str(error.value)


@pytest.mark.parametrize("options, message", [
    ({"importance": {"zz": torch.ones(3)}}, "importance names zz, which is none of"),
    ({"importance": {"zz": torch.ones(3)}, "lam": 0.1}, "importance names zz"),
    ({"importance": {"4.weight": torch.ones(3)}}, "importance of 4.weight must be a tensor of shape (20, 96), got (3,)"),
    ({"importance": {"4.weight": torch.ones(96, 20)}, "lam": 0.1}, "must be a tensor of shape (20, 96), got (96, 20)"),
    ({"importance": {"4.weight": [1.0]}}, "importance of 4.weight must be a tensor"),
    ({"importance": {"4.weight": -torch.ones(20, 96)}}, "importance of 4.weight must be at least 0"),
    ({"importance": {"4.weight": torch.zeros(20, 96)}}, "importance of 4.weight must be at least 0, and not all 0"),
    ({"importance": {"4.weight": torch.full((20, 96), float("nan"))}}, "importance of 4.weight holds 1920 NaN"),
    ({"lam": 0.1, "keep_zero": False}, "keep_zero=False and lam exclude each other"),
    ({"lam": -1}, "lam must be finite and at least 0, got -1"), ({"lam": "dear"}, "got 'dear'"),
    ({"init": "random"}, "init must be one of"), ({"init": "forgy", "generator": 3}, "generator must be a torch.Generator"),
])
@pytest.mark.parametrize("trainable", [False, True])
def test_bad_options_leave_the_model_alone(options, message, trainable):
    net = small_net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError) as error:
        share_weights(net, 2, trainable=trainable, **options)
    assert message in str(error.value)
    assert list(before) == list(net.state_dict()) and all(torch.equal(before[n], t) for n, t in net.state_dict().items())


class Holder(nn.Module):
    def __init__(self, tensor):
        super().__init__()
        self.w = nn.Parameter(tensor)


@pytest.mark.parametrize("tensor, message", [
    (torch.eye(4).to_sparse(), "w is stored sparse"),
    (torch.eye(4).to(torch.float8_e4m3fn), "w must be float16, bfloat16, float32 or float64, got torch.float8_e4m3fn"),
    (torch.empty(0, 3), "no weights to share: w hold no values"),
])
def test_tensors_that_cannot_be_shared_are_named(tensor, message):
    with pytest.raises(ValueError, match=message):
        share_weights(Holder(tensor), 2)


@pytest.mark.parametrize("symbols, k, message", [
    (torch.zeros(0, dtype=torch.int64), 3, "at least one symbol"), (torch.tensor([0, 3]), 3, "0…2, got 0…3"),
    (torch.tensor([-1, 2]), 3, "0…2, got -1…2"), (torch.tensor([0.0]), 3, "must be integers, got torch.float32"),
    (torch.tensor([0]), 0, "k must be an integer of at least 1, got 0"),
])
def test_symbols_outside_are_refused(symbols, k, message):
    with pytest.raises(ValueError) as error:
        symbol_bits(symbols, k)
    assert message in str(error.value)


@pytest.mark.parametrize("costs, message", [
    ({}, "got none for any"), ({"a": []}, "got none for a"), ({"a": [(1, 5, 0.0)], "b": iter([])}, "got none for b"),
    ({"a": [(1, 5)]}, "a candidate of a must be"), ({"a": [(1, -5, 0.0)]}, "a candidate of a must be"),
    ({"a": [(1, 5, float("nan"))]}, "a candidate of a must be"),
])
def test_budgets_need_sound_candidates(costs, message):
    with pytest.raises(ValueError) as error:
        fit_budget(costs, 5)
    assert message in str(error.value)


def test_sensitivity_and_importance_need_weights():
    net, data = nn.Sequential(nn.Flatten(), nn.ReLU()), toy_data()
    with pytest.raises(ValueError, match="no weights to share"):
        choose_bits(net, data, 100)
    with pytest.raises(ValueError, match="no weights"):
        weight_importance(net, data)
    with pytest.raises(ValueError, match="candidates must hold at least one"):
        sharing_costs(toy_net(), data, candidates=())
    with pytest.raises(ValueError, match="damping must be finite and at least 0, got -1"):
        weight_importance(toy_net(), data, damping=-1)


def test_sharing_twice_needs_plain_tensors():
    net = small_net()
    share_weights(net, 2, trainable=True)
    with pytest.raises(ValueError, match="finalize_sharing"):
        share_weights(net, 2)
    finalize_sharing(net)
    share_weights(net, 2)


def test_bits_and_biases_by_name():
    net = small_net()
    with_biases = share_weights(net, 2, biases=True)
    assert list(with_biases) == ["0.weight", "0.bias", "4.weight", "4.bias", "6.weight", "6.bias"]
    assert set(share_weights(small_net(), {"1.weight": 1, "4.bias": 3})) == {"1.weight", "4.bias"}
    net = small_net()
    order = list(net.state_dict())
    share_weights(net, {"4.bias": 3, "4.weight": 2}, trainable=True)
    finalize_sharing(net)
    assert list(net.state_dict()) == order


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 5), nn.Linear(5, 11)
            self.head.weight = self.embed.weight

        def forward(self, x): return self.head(self.embed(x))

    for trainable in (False, True):
        net = Tied()
        assert list(share_weights(net, 2, trainable=trainable)) == ["embed.weight"]
        if trainable:
            assert len(list(net.parameters())) == 2
            net = copy.deepcopy(net)
            optimizer = torch.optim.SGD(net.parameters(), 0.1)
            net(torch.arange(11)).square().mean().backward()
            optimizer.step()
            assert torch.equal(net.embed.weight, net.head.weight)
            assert list(finalize_sharing(net)) == ["embed.weight"]
        assert net.head.weight is net.embed.weight and len(net.head.weight.detach().unique()) <= 4


def test_copies_and_state_dicts_carry_the_sharing():
    net = small_net()
    share_weights(net, 3, trainable=True)
    twin = copy.deepcopy(net)
    train(net)
    other = small_net()
    share_weights(other, 3, trainable=True)
    other.load_state_dict(net.state_dict())
    x = torch.randn(5, 1, 6, 6)
    assert torch.equal(net.eval()(x), other.eval()(x)) and not torch.equal(net(x), twin.eval()(x))
    for model in (net, twin, other):
        finalize_sharing(model)
        assert not any(parametrize.is_parametrized(m) for m in model.modules())
        assert list(model.state_dict()) == list(small_net().state_dict())


@pytest.mark.parametrize("bits, other", [(3, 1), (1, 3), (9, 4), (4, 9)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_state_with_other_numbers_of_values_and_zeros_is_loaded(bits, other, tied):
    def shared(seed, bits, zeros):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 30))
        if tied:
            net[2].weight = net[0].weight
        with torch.no_grad():
            net[0].weight[:zeros] = 0
        share_weights(net, bits, trainable=True)
        return net

    there, here, x = shared(0, bits, 11), shared(1, other, 0), torch.randn(4, 30)
    twin = copy.deepcopy(here)
    codebook = here[0].parametrizations.weight.original
    for net in (here, twin):
        net(x).sum().backward()
        assert net.load_state_dict(there.state_dict()).missing_keys == []
        assert torch.equal(net(x), there(x))
    assert here[0].parametrizations.weight.original is codebook and codebook.grad is None        # an optimizer made before still holds it
    assert (here[0].parametrizations.weight.original is here[2].parametrizations.weight.original) == tied
    here(x).square().sum().backward()
    assert codebook.grad.shape == codebook.shape
    values = finalize_sharing(here)
    assert torch.equal(values["0.weight"], there[0].weight.detach().unique())


def test_a_codebook_that_does_not_fit_its_labels_is_refused():
    net, other = small_net(), small_net()
    share_weights(net, 3, trainable=True)
    share_weights(other, 2, trainable=True)
    state = net.state_dict()
    state["6.parametrizations.weight.original"] = state["6.parametrizations.weight.original"][:1]
    with pytest.raises(RuntimeError, match="a label is outside 0…"):
        other.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    net = small_net().to(dtype)
    zeros = net[4].weight == 0
    share_weights(net, 3, trainable=True)
    weight = net[4].weight
    weight.float().square().sum().backward()
    assert net[4].parametrizations["weight"].original.grad.dtype == torch.promote_types(dtype, torch.float32)
    finalize_sharing(net)
    assert net[4].weight.dtype == dtype and torch.equal(net[4].weight == 0, zeros) and len(net[4].weight.detach().unique()) <= 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("moving", [False, True])
def test_shared_values_of_half_precision_train(dtype, moving):
    "Steps of a thousandth would be lost to rounding in half precision."
    torch.manual_seed(0)
    layer = nn.Linear(64, 32, bias=False)
    with torch.no_grad():
        layer.weight[layer.weight.abs() < 0.02] = 0
    layer.to(dtype)
    before = share_weights(layer, 2, trainable=True, moving=moving)["weight"]
    optimizer = torch.optim.SGD(layer.parameters(), 1e-7)
    for _ in range(30):
        optimizer.zero_grad()
        weight = layer.weight
        assert weight.dtype == dtype and layer(torch.ones(1, 64, dtype=dtype)).dtype == dtype
        weight.float().sum().backward()
        optimizer.step()
    after = finalize_sharing(layer)["weight"]
    assert layer.weight.dtype == after.dtype == dtype and len(after) == len(before) == 4
    assert int((after != before).sum()) == 3 and (after == 0).any()


@pytest.mark.parametrize("moving", [False, True])
def test_a_shared_model_changes_its_type_as_a_whole(moving):
    net = small_net()
    share_weights(net, 2, trainable=True, moving=moving)
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        net.to(dtype)
        assert net(torch.randn(2, 1, 6, 6, dtype=dtype)).dtype == net[4].weight.dtype == dtype
    finalize_sharing(net)
    assert all(len(w.detach().unique()) <= 4 for w in named_weights(net).values())


def test_weights_that_move():
    net = small_net()
    net[4].weight.requires_grad_(False)
    zeros, order = {n: w == 0 for n, w in named_weights(net).items()}, list(net.state_dict())
    net = copy.deepcopy(net)
    start = share_weights(net, 2, trainable=True, moving=True)
    labels = {n: torch.bucketize(net.get_submodule(n[0]).weight.detach(), start[n]) for n in start}
    frozen = net[4].weight.detach().clone()
    with torch.no_grad():
        net[4].parametrizations["weight"][0].values.requires_grad_(False)
    train(net, steps=40)
    other = small_net(1)
    share_weights(other, 2, trainable=True, moving=True)
    other.load_state_dict(net.state_dict())
    x = torch.randn(3, 1, 6, 6)
    assert torch.equal(net.eval()(x), other.eval()(x))
    final = finalize_sharing(net)
    assert list(final) == list(start) and list(net.state_dict()) == order
    assert all(len(v) <= 4 for v in final.values()) and all((zeros[n] <= (w == 0)).all() for n, w in named_weights(net).items())
    assert not torch.equal(torch.bucketize(net[0].weight.detach(), final["0.weight"]), labels["0.weight"])
    assert torch.equal(net[4].weight, frozen) and not net[4].weight.requires_grad


def test_moving_weights_may_be_tied():
    net = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    net[1].weight = net[0].weight
    share_weights(net, 2, trainable=True, moving=True)
    assert len(list(net.parameters())) == 4                                       # two biases, the weights' own numbers, their values
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(torch.ones(2, 5)).square().sum().backward()
    optimizer.step()
    finalize_sharing(net)
    assert net[0].weight is net[1].weight and len(net[0].weight.detach().unique()) <= 4


@pytest.mark.parametrize("options", [{}, {"trainable": True, "keep_zero": False}, {"trainable": True, "lam": 0.1}])
def test_moving_excludes_other_options(options):
    with pytest.raises(ValueError, match="moving needs trainable=True and keep_zero=True, and no price lam"):
        share_weights(small_net(), 2, moving=True, **options)


@pytest.mark.parametrize("wrap, name", [
    (nn.utils.parametrizations.weight_norm, "parametrizations.weight.original0"),
    (nn.utils.parametrizations.spectral_norm, "parametrizations.weight.original"),
    (nn.utils.spectral_norm, "weight_orig"), (lambda layer: prune.random_unstructured(layer, "weight", 0.5), "weight_orig"),
])
def test_tensors_that_are_computed_from_others_are_named(wrap, name):
    net = nn.Sequential(wrap(nn.Linear(4, 4)), nn.Linear(4, 4))
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    for bits in (2, {n: 2 for n in before if n.startswith("0.") and "weight" in n}):
        with pytest.raises(ValueError, match=rf"^0.weight is computed from 0.{name}.*make it plain first .*finalize_(sharing|pruning)"):
            share_weights(net, bits)
    assert all(torch.equal(before[n], p) for n, p in net.named_parameters())
    for trainable in (False, True):
        assert list(share_weights(net, {"1.weight": 2}, trainable=trainable)) == ["1.weight"]
        net(torch.ones(2, 4)).sum().backward()
    finalize_sharing(net)
    assert len(net[1].weight.detach().unique()) <= 4 and [n for n, _ in net.named_parameters()] == list(before)


@pytest.mark.parametrize("call, message", [
    (lambda: SharedWeight(torch.tensor([1.0, float("nan")]), torch.tensor([0, 1])), "codebook holds 1 NaN"),
    (lambda: SharedWeight(torch.tensor([1, 2]), torch.tensor([0, 1])), "codebook must be floating with one axis, got torch.int64"),
    (lambda: SharedWeight(torch.tensor([1.0, 2.0]), torch.tensor([0, 2])), "assignments must lie in 0…1, got 0…2"),
    (lambda: SharedWeight(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])), "assignments must be integers"),
    (lambda: share_weights(nn.Linear(2, 2).state_dict(), 2), "model must be an nn.Module, got OrderedDict"),
    (lambda: symbol_bits(torch.tensor([0]).numpy(), 1), "assignments must be a tensor, got ndarray"),
    (lambda: entropy_constrained(torch.ones(3).numpy(), 2, 0.1), "values must be a tensor, got ndarray"),
    (lambda: rate_distortion_assign(torch.ones(3).numpy(), torch.ones(2), torch.ones(2), 0.1), "values must be a tensor, got ndarray"),
    (lambda: Reassign({"w": torch.tensor([float("nan")])}), "w holds 1 NaN"),
])
def test_what_is_no_model_codebook_or_tensor_is_refused(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


@pytest.mark.parametrize("change, message", [
    ({"values": torch.tensor([1.0, float("inf")])}, "values holds 1 NaN or infinite value of 2"),
    ({"values": torch.tensor([1, 2])}, "values must be floating, got torch.int64"),
    ({"codebook": torch.tensor([1.0, float("nan")])}, "codebook holds 1 NaN"),
    ({"rates": torch.tensor([1.0, -1.0])}, "rates must be at least 0, and one of them finite, got [1.0, -1.0]"),
    ({"rates": torch.tensor([1.0, float("nan")])}, "rates must be at least 0"),
    ({"rates": torch.full((2,), float("inf"))}, "rates must be at least 0, and one of them finite"),
    ({"importance": torch.tensor([1.0, float("nan")])}, "importance holds 1 NaN"),
    ({"importance": torch.tensor([1.0, -2.0])}, "importance must be at least 0, got -2.0"),
])
def test_assignment_refuses_what_has_no_cost(change, message):
    arguments = {"values": torch.tensor([0.5, 1.5]), "codebook": torch.tensor([1.0, 2.0]), "rates": torch.ones(2), "lam": 0.1} | change
    with pytest.raises(ValueError) as error:
        rate_distortion_assign(**arguments)
    assert message in str(error.value)


def test_frozen_parameters_stay_frozen():
    net = small_net()
    net[4].weight.requires_grad_(False)
    share_weights(net, 2, trainable=True)
    assert not net[4].parametrizations["weight"].original.requires_grad
    finalize_sharing(net)
    assert not net[4].weight.requires_grad and net[6].weight.requires_grad


def test_degenerate_tensors():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(0, 3, bias=False))
    with torch.no_grad():
        net[0].weight.zero_()
        net[1].weight.fill_(0.5)
    for trainable in (False, True):
        twin = copy.deepcopy(net)
        assert {n: c.tolist() for n, c in share_weights(twin, 2, trainable=trainable).items()} == {"0.weight": [0.0], "1.weight": [0.5]}
        twin[1](twin[0](torch.ones(2, 4))).sum().backward()
        finalize_sharing(twin)
        assert torch.equal(twin[0].weight, net[0].weight) and torch.equal(twin[1].weight, net[1].weight)


def test_any_layer():
    for layer in (nn.Conv1d(2, 3, 3), nn.Conv3d(1, 2, 2), nn.ConvTranspose2d(2, 2, 3), nn.Embedding(9, 4), nn.Bilinear(3, 3, 3),
                  nn.MultiheadAttention(4, 2), nn.LSTM(3, 4), nn.GRU(3, 4, num_layers=2)):
        codebooks = share_weights(layer, 1)
        assert codebooks and all(len(w.detach().unique()) == 2 for w in named_weights(layer).values())
    with pytest.raises(ValueError, match="trainable=False"):
        share_weights(nn.LSTM(3, 4), 2, trainable=True)
    conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    share_weights(conv, 2, trainable=True)
    conv(torch.randn(1, 2, 5, 5)).sum().backward()
    finalize_sharing(conv)
    attention = nn.MultiheadAttention(4, 2)
    order = list(attention.state_dict())
    share_weights(attention, 2, trainable=True)
    attention(*[torch.randn(3, 1, 4)] * 3)[0].sum().backward()
    finalize_sharing(attention)
    assert list(attention.state_dict()) == order


def test_labels_are_stored_in_a_byte():
    for bits, dtype in ((5, torch.uint8), (12, torch.int32)):
        net = nn.Linear(100, 80)
        with torch.no_grad():
            net.weight[:40] = 0
        share_weights(net, bits, trainable=True)
        shared = net.parametrizations["weight"][0]
        assert shared.labels.dtype == dtype and shared.places.dtype == torch.int32
        assert len(shared.labels) == len(shared.places) == 4000


def test_channels_last_is_followed():
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 4, 3))
    share_weights(net, 3, trainable=True)
    assert net[1].weight.is_contiguous()
    net.to(memory_format=torch.channels_last)
    assert all(layer.weight.stride() == layer.weight.to(memory_format=torch.channels_last).stride() for layer in net)
    assert not net[1].weight.is_contiguous() and net(torch.randn(2, 1, 9, 9)).is_contiguous(memory_format=torch.channels_last)
    net(torch.randn(2, 1, 9, 9)).square().sum().backward()
    finalize_sharing(net)
    assert net[1].weight.is_contiguous()


def test_compiled_and_plain_paths_agree():
    codebook, assignments = kmeans_1d(torch.randn(40, 30).masked_fill(torch.rand(40, 30) < 0.7, 0), 9, keep_zero=True)
    gradient = torch.randn(40, 30)
    for kept in (codebook, codebook.half()):
        shared = SharedWeight(kept, assignments)
        entry = shared.start.clone().requires_grad_()
        weight = shared(entry)
        got, = torch.autograd.grad(weight, entry, gradient.to(kept.dtype))
        assert torch.equal(weight, kept[assignments])
        expected = torch.stack([gradient.to(kept.dtype).double()[assignments == j].sum() for j in range(9) if kept[j] != 0])
        torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("labels, places, message", [
    ([0, 1], [0, 99], "a place is outside"), ([0, 9], [0, 1], "a label is outside"),
    ([0, 1], [0], "2 labels for 1 places"), ([0, -1], [0, 1], "a label is outside"),
])
def test_a_state_that_points_outside_is_refused(labels, places, message):
    net = nn.Linear(4, 3)
    with torch.no_grad():
        net.weight[0] = 0
    share_weights(net, 2, trainable=True)
    state = net.state_dict()
    state["parametrizations.weight.0.labels"], state["parametrizations.weight.0.places"] = torch.tensor(labels), torch.tensor(places)
    with pytest.raises(RuntimeError, match=message):
        net.load_state_dict(state)


def noisy_layer(seed=0, n=3000, sparsity=0.8, dtype=torch.float32):
    torch.manual_seed(seed)
    weight = torch.randn(n, dtype=dtype)
    return weight.masked_fill(weight.abs() < weight.abs().quantile(sparsity), 0)


def bill(weight, codebook, labels, lam, h):
    return float((h * (codebook[labels] - weight).double()**2).sum() + lam * symbol_bits(labels, len(codebook))[labels].sum())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 20), st.floats(0, 0.95), st.floats(1e-6, 1.), st.booleans(), st.booleans())
def test_entropy_constrained_is_never_dearer_than_kmeans(seed, k, sparsity, lam, drop, weighted):
    weight = noisy_layer(seed, 400, sparsity, torch.double)
    h = torch.rand(400, dtype=torch.double) + 0.01 if weighted else torch.ones(400, dtype=torch.double)
    codebook, labels = entropy_constrained(weight, k, lam, importance=h if weighted else None, drop=drop)
    plain = kmeans_1d(weight, k, keep_zero=True, weights=h if weighted else None)
    assert len(codebook) <= k and torch.equal(codebook, codebook.unique()) and torch.equal(labels.unique(), torch.arange(len(codebook)))
    assert ((weight == 0) <= (codebook[labels] == 0)).all()
    if not drop:
        assert torch.equal(weight == 0, codebook[labels] == 0)
    if not drop or (weight == 0).any():
        assert bill(weight, codebook, labels, lam, h) <= bill(weight, *plain, lam, h) * (1 + 1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1.), st.booleans())
def test_assignment_is_the_least_of_all(seed, lam, drop):
    weight, codebook = noisy_layer(seed, 50), torch.tensor([0., -1., 1.2, 2.])
    rates, h = torch.tensor([0.3, 4., 3., float("inf")]), torch.rand(50)
    found = rate_distortion_assign(weight.view(5, 10), codebook, rates, lam, importance=h.view(5, 10), drop=drop)
    assert found.shape == (5, 10)
    for w, weigh, got in zip(weight.tolist(), h.tolist(), found.flatten().tolist()):
        cost = [weigh * (w - c)**2 + (lam * r if r < float("inf") else r) for c, r in zip(codebook.tolist(), rates.tolist())]
        if w and not drop:
            cost[0] = float("inf")
        assert got == 0 if not w else cost[got] <= min(cost) + 1e-6


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(0, 2500))
def test_the_compiled_search_is_the_formula_to_the_bit(seed, k, n):
    torch.manual_seed(seed)
    weight, codebook, h = torch.randn(n), torch.randn(k).round(decimals=1), torch.rand(n)
    codebook[codebook == 0] = 1.0
    rates = torch.rand(k).masked_fill((torch.rand(k) < 0.2) & (torch.arange(k) > 0), float("inf"))
    cost = h.double()[:, None] * (weight.double()[:, None] - codebook.double()).square() + 0.1 * rates.double()
    assert torch.equal(rate_distortion_assign(weight, codebook, rates, 0.1, importance=h), cost.argmin(1))


@pytest.mark.parametrize("lam", [-1., float("nan"), float("inf")])
def test_bad_prices(lam):
    for call in (lambda: entropy_constrained(torch.ones(3), 2, lam), lambda: Reassign({}, lam)):
        with pytest.raises(ValueError, match="lam must be finite and at least 0"):
            call()


@pytest.mark.parametrize("values, message", [
    (torch.arange(5), "must be float"), (torch.zeros(0), "at least one value"),
    (torch.tensor([1., float("nan")]), "1 NaN or infinite value of 2"),
])
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        entropy_constrained(values, 4, 0.1)


def test_sharing_at_a_price():
    plain, priced, kept = small_net(), small_net(), small_net()
    share_weights(plain, 4)
    share_weights(priced, 4, lam=1e-3)
    share_weights(kept, 4, lam=1e-3, drop=False)
    for (name, a), b, c in zip(named_weights(plain).items(), named_weights(priced).values(), named_weights(kept).values()):
        entropy = [float(symbol_bits(w.unique(return_inverse=True)[1], 16)[w.unique(return_inverse=True)[1]].mean()) for w in (a, b, c)]
        assert entropy[1] < entropy[0] and entropy[2] <= entropy[0] + 1e-9, name
        assert ((a == 0) <= (b == 0)).all() and torch.equal(a == 0, c == 0)


def pruned_toy(seed=0):
    net = toy_net(seed)
    with torch.no_grad():
        for w in named_weights(net).values():
            w[w.abs() < w.abs().flatten().median()] = 0
    return net


@pytest.mark.parametrize("lam", [0., 1e-3])
def test_reassign_moves_weights_and_resumes_exactly(lam, tmp_path):
    def run(stop, checkpoint=None):
        net, data = pruned_toy(), toy_data()
        before = {n: w.detach().clone() for n, w in named_weights(net).items()}
        share_weights(net, 3, lam=lam, trainable=True)
        callbacks = [Reassign(before, lam, until=0.5), stop]
        history = fit(net, data, epochs=4, lr=0.05, batch_size=16, callbacks=callbacks, checkpoint=checkpoint, device="cpu", progress=False)
        finalize_sharing(net)
        return net, history, before

    net, history, before = run(Stop(-1))
    assert ["reassigned" in h for h in history] == [True, True, False, False] and history[0]["reassigned"] > 0
    for name, w in named_weights(net).items():
        assert len(w.detach().unique()) <= 8
        assert ((before[name] == 0) <= (w == 0)).all()
        if not lam:
            assert torch.equal(before[name] == 0, w == 0)
    with pytest.raises(KeyboardInterrupt):
        run(Stop(3), tmp_path / "epochs.pt")
    again, *_ = run(Stop(-1), tmp_path / "epochs.pt")
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))


def test_reassign_with_other_weights_or_importance_is_another_run():
    weights = {"a": torch.arange(6.0), "b": torch.ones(2, 2)}
    first = Reassign(weights, 0.1).identity()
    assert first == Reassign(dict(reversed(weights.items())), 0.1).identity()
    others = [Reassign(weights, 0.2), Reassign(weights, 0.1, importance={"a": torch.ones(6)}), Reassign({"a": weights["a"]}, 0.1),
              Reassign(weights | {"b": torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2**-20]])}, 0.1),
              Reassign(weights | {"b": torch.ones(4)}, 0.1),
              Reassign(weights, 0.1, importance={"a": torch.full((6,), 2.0)}), Reassign({"a": weights["b"], "b": weights["a"]}, 0.1)]
    assert len({first, *(other.identity() for other in others)}) == 8
    for importance, message in (({"c": torch.ones(6)}, "importance names c"), ({"a": torch.ones(5)}, "importance of a must be a tensor")):
        with pytest.raises(ValueError, match=message):
            Reassign(weights, 0.1, importance=importance)


def test_a_resumed_run_notices_other_importance(tmp_path):
    def run(scale, stop):
        net, data = pruned_toy(), toy_data()
        before = {n: w.detach().clone() for n, w in named_weights(net).items()}
        h = {n: torch.full_like(w, scale) for n, w in before.items()}
        share_weights(net, 3, trainable=True)
        callbacks = [Reassign(before, 1e-3, importance=h), stop]
        fit(net, data, epochs=3, lr=0.05, batch_size=16, callbacks=callbacks, checkpoint=tmp_path / "run.pt", device="cpu", progress=False)

    with pytest.raises(KeyboardInterrupt):
        run(1.0, Stop(2))
    with pytest.raises(ValueError, match="belongs to another run: callbacks"):
        run(2.0, Stop(-1))
    run(1.0, Stop(-1))


def test_reassign_needs_shared_tensors_of_the_same_shape():
    square = torch.zeros(2, 2)
    for weights, message in (({}, "none was named"), ({"9.weight": square}, "9.weight"), ({"4.weight": square}, "4.weight")):
        net = toy_net()
        share_weights(net, 2, trainable=True)
        with pytest.raises(ValueError, match=f"not a shared tensor of that shape: {message}; there are: 0.weight, 4.weight, 6.weight"):
            fit(net, toy_data(), epochs=1, callbacks=[Reassign(weights)], device="cpu", progress=False)


def test_importance_is_that_of_the_loss():
    "A small change of one weight raises the expected loss, labels drawn from the net's own predictions, by h·δ²."
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), toy_data(n=400)
    h = weight_importance(net, data, images=400, batch_size=1)["1.weight"].double()
    net, x = net.double(), data.train.x.double()
    soft = net(x).softmax(1).detach()

    def loss():
        return float(torch.nn.functional.cross_entropy(net(x), soft).detach())

    start, rise = loss(), torch.zeros(3, 16, dtype=torch.double)
    with torch.no_grad():
        for i in range(3):
            for j in range(16):
                net[1].weight[i, j] += 1e-2
                rise[i, j] = (loss() - start) / 1e-4
                net[1].weight[i, j] -= 1e-2
    assert abs(float(h.sum() / rise.sum()) - 1) < 0.1
    assert float(torch.corrcoef(torch.stack([h.flatten(), rise.flatten()]))[0, 1]) > 0.6


def test_importance_of_frozen_unused_and_half_precision_tensors():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.idle = toy_net(), nn.Linear(3, 3)

        def forward(self, x): return self.net(x)

    model, data = Idle(), toy_data()
    expected = weight_importance(model, data, images=40)
    assert not expected["idle.weight"].any() and expected["net.4.weight"].any()
    model.net[4].weight.requires_grad_(False)
    found = weight_importance(model, data, images=40)
    assert all(torch.equal(found[n], h) for n, h in expected.items()) and not model.net[4].weight.requires_grad
    half = copy.deepcopy(model).bfloat16()
    images = dataclasses.replace(data, train=dataclasses.replace(data.train, x=data.train.x.bfloat16()))
    assert {h.dtype for h in weight_importance(half, images, images=40).values()} == {torch.float32}
    with torch.no_grad():
        model.net[4].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="net.4.weight holds 1 NaN"):
        weight_importance(model, data)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(1, 60), st.floats(-1, 5)), min_size=1, max_size=4), min_size=1, max_size=4),
       st.integers(0, 200))
def test_budget_against_all_choices(shelves, budget):
    import itertools
    costs = {str(i): [(b, size, loss) for b, (size, loss) in enumerate(options, start=1)] for i, options in enumerate(shelves)}
    fitting = [c for c in itertools.product(*costs.values()) if sum(size for _, size, _ in c) <= budget]
    if not fitting:
        with pytest.raises(ValueError, match="bytes are too few"):
            fit_budget(costs, budget)
        return
    found = [next(o for o in costs[name] if o[0] == b) for name, b in fit_budget(costs, budget).items()]
    assert sum(size for _, size, _ in found) <= budget
    assert sum(loss for *_, loss in found) <= min(sum(loss for *_, loss in c) for c in fitting) + 1e-9


def test_a_large_budget_stays_near_the_best():
    g = torch.Generator().manual_seed(0)
    sizes = torch.randint(10**3, 10**6, (12,), generator=g).tolist()
    costs = {str(i): [(b, b * n, n * 4.0**-b) for b in range(1, 9)] for i, n in enumerate(sizes)}
    least = sum(options[0][1] for options in costs.values())
    found = fit_budget(costs, 4 * least)
    chosen = [costs[name][b - 1] for name, b in found.items()]
    assert sum(size for _, size, _ in chosen) <= 4 * least
    assert sum(loss for *_, loss in chosen) <= 1.001 * sum(options[3][2] for options in costs.values())


def test_choose_bits_puts_the_model_back_and_keeps_the_budget():
    net, data = pruned_toy(), toy_data()
    fit(net, data, epochs=2, lr=0.01, batch_size=16, device="cpu", progress=False)
    before = copy.deepcopy(net.state_dict())
    costs = sharing_costs(net, data, candidates=(1, 2, 4))
    assert list(costs) == list(named_weights(net)) and all([b for b, *_ in options] == [1, 2, 4] for options in costs.values())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    start = evaluate(net, data.valid).loss
    bits, size, rise = costs["4.weight"][1]
    twin = copy.deepcopy(net)
    share_weights(twin, {"4.weight": bits})
    assert evaluate(twin, data.valid).loss == pytest.approx(start + rise, abs=1e-12)
    chosen = choose_bits(net, data, sum(options[1][1] for options in costs.values()), candidates=(1, 2, 4))
    assert sum(next(s for b, s, _ in costs[n] if b == chosen[n]) for n in costs) <= sum(options[1][1] for options in costs.values())
    for arguments, message in (({"candidates": (0, 2)}, "bits must be an integer in 1…16, got 0"), ({"candidates": (2, 17)}, "got 17")):
        with pytest.raises(ValueError, match=message):
            choose_bits(net, data, 1000, **arguments)
    with pytest.raises(ValueError, match="1 bytes are too few"):
        choose_bits(net, data, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    cpu, gpu = pruned_toy(), pruned_toy().cuda()
    for net in (cpu, gpu):
        share_weights(net, 3, trainable=True)
        net(torch.ones(2, 1, 4, 4, device=next(net.parameters()).device)).sum().backward()
    for a, b in zip(cpu.parameters(), gpu.parameters()):
        torch.testing.assert_close(a.grad, b.grad.cpu(), rtol=1e-4, atol=1e-5)
