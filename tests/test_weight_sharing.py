"Sharing weights on any module: names, zeros, ties, dtypes, gradients, and the way back to plain tensors."
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from nncomp.core import named_weights
from nncomp.kmeans import kmeans_1d
from nncomp.weight_sharing import SharedWeight, finalize_sharing, share_weights


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
])
def test_bad_bits(bits, message):
    with pytest.raises(ValueError) as error:
        share_weights(small_net(), bits)
    assert message in str(error.value)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    net = small_net().to(dtype)
    zeros = net[4].weight == 0
    share_weights(net, 3, trainable=True)
    weight = net[4].weight
    weight.float().square().sum().backward()
    assert net[4].parametrizations["weight"].original.grad.dtype == dtype
    finalize_sharing(net)
    assert net[4].weight.dtype == dtype and torch.equal(net[4].weight == 0, zeros) and len(net[4].weight.detach().unique()) <= 8


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
