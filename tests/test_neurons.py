"Whole neurons: removed units leave plain smaller modules, and dead ones leave no trace."

import copy
import importlib.util
import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from toys import toy_data, toy_net

from nncomp.container import load, save
from nncomp.core import MissingExtraError, count_parameters, default_device, evaluating, named_weights, seed_everything
from nncomp.models import VGG_PLANS, create_model, model_input_shape, vgg
from nncomp.neurons import (
    Half,
    ScalePenalty,
    activation_scores,
    batch_norm_scores,
    dead_neurons,
    half_without_retraining,
    hidden_layers,
    keep_highest,
    mean_outputs,
    norm_scores,
    prune_graph,
    random_scores,
    remove_dead_neurons,
    remove_neurons,
    shrink,
    taylor_scores,
)
from nncomp.neurons import _sites as sites
from nncomp.results import check_results, experiment, read_record, reproduce
from nncomp.training import fit

PLAIN = [
    "lenet-300-100",
    "lenet-5",
    "lenet-5-small",
    "lenet-5-32",
    "lenet-5-same",
    "lenet-ullrich",
    "mlp-1200-300-100",
    "mlp-200",
    "vgg11",
    "minivgg",
]


# ---- random networks

ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.GELU, nn.Sigmoid, nn.Identity, lambda: nn.LeakyReLU(0.1), lambda: nn.Dropout(0.5))
POOLS = (
    lambda: nn.MaxPool2d(2),
    lambda: nn.AvgPool2d(2),
    lambda: nn.AvgPool2d(3, 2, padding=1),
    lambda: nn.AvgPool2d(3, 2, padding=1, count_include_pad=False),
    lambda: nn.MaxPool2d(3, 2, padding=1),
    lambda: nn.AvgPool2d(2, divisor_override=3),
    lambda: nn.AdaptiveAvgPool2d(6),
    lambda: nn.AdaptiveMaxPool2d(6),
    nn.Identity,
)


@st.composite
def networks(draw):
    "A random plain sequence in float64, with batch statistics of a life that never was, and an input for it."
    torch.manual_seed(draw(st.integers(0, 10**6)))
    layers, channels, x = [], 2, torch.randn(2, 2, 17, 17, dtype=torch.float64)
    for _ in range(draw(st.integers(1, 2))):
        n, padding, mode = (
            draw(st.integers(1, 5)),
            draw(st.sampled_from([0, 1, "same", "valid"])),
            draw(st.sampled_from(["zeros", "reflect", "circular"])),
        )
        layers.append(nn.Conv2d(channels, n, draw(st.sampled_from([1, 3])), padding=padding, padding_mode=mode, bias=draw(st.booleans())))
        if draw(st.booleans()):
            layers.append(nn.BatchNorm2d(n, affine=draw(st.booleans())))
        layers += [draw(st.sampled_from(ACTIVATIONS))(), draw(st.sampled_from(POOLS))()]
        channels = n
    layers.append(nn.Flatten())
    with evaluating(seq := nn.Sequential(*layers).double()):
        width = seq(x).shape[1]
    if draw(st.booleans()):
        layers.append(nn.BatchNorm1d(width))
    for n in draw(st.lists(st.integers(1, 6), max_size=2)):
        layers += [nn.Linear(width, n, bias=draw(st.booleans())), draw(st.sampled_from(ACTIVATIONS))()]
        width = n
    layers.append(nn.Linear(width, 3, bias=draw(st.booleans())))
    for m in layers:
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(m.running_mean), nn.init.uniform_(m.running_var, 0.5, 2)
            if m.affine:
                nn.init.normal_(m.weight), nn.init.normal_(m.bias)
    return nn.Sequential(*layers).double(), x


def outputs(model, x):
    "In evaluation mode."
    with evaluating(model):
        return model(x)


@settings(deadline=None, max_examples=100)
@given(networks(), st.floats(0.3, 0.97), st.integers(0, 10**6))
def test_dead_units_leave_without_a_trace(pair, sparsity, seed):
    (net, x), g = pair, torch.Generator().manual_seed(seed)
    for w in named_weights(net).values():
        w.data.masked_fill_(torch.rand(w.shape, generator=g) < sparsity, 0.0)
    before = copy.deepcopy(net.state_dict())
    clean = remove_dead_neurons(net)
    torch.testing.assert_close(outputs(clean, x), outputs(net, x), rtol=1e-9, atol=1e-9)
    for name, width in hidden_layers(clean).items():
        assert 1 <= width <= hidden_layers(net)[name]
    assert not any(dead.any() for dead in dead_neurons(clean).values())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@settings(deadline=None, max_examples=60)
@given(networks(), st.integers(0, 10**6))
def test_a_removed_unit_is_a_silenced_unit(pair, seed):
    "Oracle: the whole network with the columns of the removed units at zero."
    net, x = pair
    widths, g = hidden_layers(net), torch.Generator().manual_seed(seed)
    keep = {name: torch.rand(n, generator=g) < 0.5 for name, n in widths.items()}
    for mask in keep.values():
        mask[0] = True
    small, silenced = remove_neurons(net, keep), copy.deepcopy(net)
    for site in sites(silenced):
        site.columns()[:, ~keep[site.name]] = 0  # a view of the weight
    torch.testing.assert_close(outputs(small, x), outputs(silenced, x), rtol=1e-9, atol=1e-9)
    assert hidden_layers(small) == {name: int(m.sum()) for name, m in keep.items()}


@settings(deadline=None, max_examples=30)
@given(networks(), st.integers(0, 10**6))
def test_means_are_folded_as_if_the_units_put_them_out(pair, seed):
    net, _ = pair
    data, g = [(torch.randn(6, 2, 17, 17, dtype=torch.float64), torch.zeros(6, dtype=torch.long))], torch.Generator().manual_seed(seed)
    means, chance = mean_outputs(net, data), random_scores(net, g)
    last = sites(net)[-1]  # one layer: behind the others, padding would tell
    keep = {last.name: keep_highest(chance, 0.5)[last.name]}
    small, gone = remove_neurons(net, keep, constants=means), ~keep[last.name]

    def replace(module, args):
        x = args[0].clone().reshape(len(args[0]), last.units, last.positions)
        x[:, gone] = means[last.name].double()[gone]
        return (x.reshape(args[0].shape),)

    expected = outputs(small, data[0][0])
    if isinstance(last.following, nn.Linear):
        last.following.register_forward_pre_hook(replace)
        torch.testing.assert_close(expected, outputs(net, data[0][0]), rtol=1e-5, atol=1e-5)


# ---- the book's networks


@pytest.mark.parametrize("name", PLAIN)
def test_every_plain_network_of_the_book_shrinks(name):
    seed_everything(0)
    net = create_model(name)
    widths = hidden_layers(net)
    small = remove_neurons(net, dict.fromkeys(widths, 0.25))
    assert hidden_layers(small) == {k: n - round(0.75 * n) for k, n in widths.items()}
    assert (
        type(small) is type(net) and list(small.state_dict()) == list(net.state_dict()) and count_parameters(small) < count_parameters(net)
    )
    assert outputs(small, torch.randn(2, *model_input_shape(name))).shape == (2, 10)
    for module in small.modules():
        if isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features)
        elif isinstance(module, nn.Conv2d):
            assert tuple(module.weight.shape[:2]) == (module.out_channels, module.in_channels)
        elif isinstance(module, nn.BatchNorm2d):
            assert tuple(module.running_var.shape) == tuple(module.bias.shape) == (module.num_features,)


def test_half_a_vgg_is_the_vgg_of_half_the_plan():
    half = vgg(10, 3, plan=tuple(n if n == "M" else n // 2 for n in VGG_PLANS["vgg11"]))
    small = remove_neurons(vgg(10, 3), dict.fromkeys(hidden_layers(vgg(10, 3)), 0.5))
    assert {k: v.shape for k, v in small.state_dict().items()} == {k: v.shape for k, v in half.state_dict().items()}
    half.load_state_dict(small.state_dict())
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(outputs(half, x), outputs(small, x))


def test_what_a_copy_keeps():
    net = create_model("minivgg").to(memory_format=torch.channels_last).double().eval()
    net.conv2.weight.requires_grad_(False)
    net.bn1.train()
    before = copy.deepcopy(net.state_dict())
    small = remove_neurons(net, {"conv2": 0.5, "conv3": 5})
    assert small.conv2.weight.dtype == torch.float64 and not small.conv2.weight.requires_grad and small.conv3.weight.requires_grad
    assert small.conv3.weight.is_contiguous(memory_format=torch.channels_last)
    assert [m.training for m in small.modules()] == [m.training for m in net.modules()]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert {id(p) for p in small.parameters()}.isdisjoint(id(p) for p in net.parameters())


def test_a_smaller_network_trains_copies_and_is_a_smaller_file(tmp_path):
    net = toy_net()
    small = remove_neurons(net, {"0": 2, "4": 0.5})
    fit(small, toy_data(), epochs=1, progress=False, device="cpu")
    twin = copy.deepcopy(small)
    twin.load_state_dict(small.state_dict())
    assert save(small, tmp_path / "small.nncomp") is None or (tmp_path / "small.nncomp").exists()
    save(net, tmp_path / "net.nncomp")
    assert (tmp_path / "small.nncomp").stat().st_size < (tmp_path / "net.nncomp").stat().st_size
    back = load(tmp_path / "small.nncomp", into=remove_neurons(toy_net(1), {"0": 2, "4": 0.5}))
    x = toy_data().test.x
    assert torch.equal(outputs(back, x), outputs(small, x))


def test_nested_sequences_and_1d_and_3d_convolutions():
    net = nn.Sequential(
        nn.Sequential(nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6), nn.ReLU()),
        nn.Sequential(nn.Conv1d(6, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6, 3)),
    )
    assert hidden_layers(net) == {"0.0": 6, "1.0": 4}
    assert outputs(remove_neurons(net, {"0.0": 2, "1.0": 3}), torch.randn(2, 2, 8)).shape == (2, 3)
    net = nn.Sequential(nn.Conv3d(1, 6, 3), nn.BatchNorm3d(6), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(6 * 8, 3))
    assert outputs(remove_neurons(net, {"0": 2}), torch.randn(2, 1, 6, 6, 6)).shape == (2, 3)


# ---- exactness, case by case


def stuck(padding, mode="zeros", bias=True):
    "Two channels before a convolution, the second stuck at 1."
    seed_everything(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 3, padding=padding, padding_mode=mode, bias=bias)).double()
    with torch.no_grad():
        net[0].weight[1], net[0].bias[1] = 0.0, 1.0
    return net


@pytest.mark.parametrize(
    "padding, mode, dead",
    [
        (0, "zeros", True),
        ("valid", "zeros", True),
        (1, "zeros", False),
        ("same", "zeros", False),
        ((0, 1), "zeros", False),
        (1, "reflect", True),
        (1, "circular", True),
        ("same", "replicate", True),
    ],
)
def test_a_constant_before_padding(padding, mode, dead):
    net, x = stuck(padding, mode), torch.randn(2, 1, 11, 11, dtype=torch.float64)
    assert dead_neurons(net)["0"].tolist() == [False, dead]
    small = remove_neurons(net, {"0": torch.tensor([True, False])})
    error = (outputs(small, x) - outputs(net, x)).abs()
    assert error[..., 2:-2, 2:-2].max() < 1e-12 and (error.max() < 1e-12) == dead


def test_a_constant_that_the_activation_stops_is_dead_in_front_of_any_padding():
    net = stuck(1)
    with torch.no_grad():
        net[0].bias[1] = -1
    assert dead_neurons(net)["0"].tolist() == [False, True]


def test_a_bias_is_made_where_there_is_none_and_needed():
    x = torch.randn(2, 1, 7, 7, dtype=torch.float64)
    net = stuck(0, bias=False)
    small = remove_dead_neurons(net)
    torch.testing.assert_close(outputs(small, x), outputs(net, x))
    assert small[2].bias is not None and net[2].bias is None
    with torch.no_grad():
        net[0].bias[1] = -1
    assert remove_dead_neurons(net)[2].bias is None


def test_death_spreads_both_ways():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    eye = torch.eye(3)
    with torch.no_grad():
        net[0].weight.copy_(eye), net[2].weight.copy_(eye), net[4].weight.copy_(torch.ones(2, 3))
        net[4].weight[:, 0] = 0  # nobody hears the last layer's first unit, so the first layer's first is idle
        net[0].weight[1] = 0  # the first layer's second hears nobody, so the last layer's second is constant
    assert [d.tolist() for d in dead_neurons(net).values()] == [[False, True, False], [True, False, False]]
    assert hidden_layers(remove_dead_neurons(net)) == {"0": 1, "2": 1}


def test_batch_statistics_of_the_moment_are_no_constant():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        net[0].weight[0] = 0
    assert not dead_neurons(net)["0"].any()


# ---- scores


def test_first_order_scores_are_the_slope_of_silencing():
    "Oracle: a finite difference of the loss in the strength of a unit's outgoing weights, image by image."
    seed_everything(0)
    net = create_model("lenet-5-same").double().eval()
    x, y = torch.randn(3, 1, 28, 28, dtype=torch.float64), torch.tensor([1, 2, 3])
    scores = taylor_scores(net, [(x, y)])

    def loss(site, unit, factor):
        twin = copy.deepcopy(net)
        next(s for s in sites(twin) if s.name == site).columns()[:, unit] *= factor
        with torch.no_grad():
            return F.cross_entropy(twin(x), y, reduction="none")

    for site, unit in (("conv1", 3), ("conv2", 17), ("fc1", 100)):
        slope = (loss(site, unit, 1 + 1e-5) - loss(site, unit, 1 - 1e-5)) / 2e-5
        torch.testing.assert_close(scores[site][unit].double(), slope.abs().mean(), rtol=1e-4, atol=1e-9)


def test_scores_from_data_leave_the_network_alone():
    net, data = toy_net(), toy_data()
    for p in net.parameters():
        p.requires_grad_(False)
    net.train()
    before = copy.deepcopy(net.state_dict())
    x = data.train.x.clone()
    results = [score(net, data.train) for score in (activation_scores, taylor_scores, mean_outputs)]
    assert [list(r) for r in results] == [["0", "4"]] * 3 and results[2]["0"].shape == (4, 16)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net.training
    assert not any(m._forward_pre_hooks for m in net.modules()) and all(p.grad is None for p in net.parameters())
    assert torch.equal(x, data.train.x) and not data.train.x.requires_grad
    whole = activation_scores(net, [(data.train.x, data.train.y)])
    parts = activation_scores(net, list(zip(data.train.x.split(7), data.train.y.split(7))))
    assert all(torch.allclose(whole[k], parts[k], rtol=1e-5) for k in whole)  # batches do not matter


@pytest.mark.parametrize("score", [activation_scores, taylor_scores, mean_outputs])
def test_no_images_are_an_error(score):
    with pytest.raises(ValueError, match="no images"):
        score(toy_net(), iter(()))


def test_slimming_pulls_the_scales_down():
    def normed():
        seed_everything(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
        )

    nets = [normed(), normed()]
    for net, callbacks in zip(nets, ([], [ScalePenalty(0.1)])):
        fit(net, toy_data(), epochs=2, lr=1e-2, batch_size=16, progress=False, device="cpu", callbacks=callbacks)
    assert sum(s.sum() for s in batch_norm_scores(nets[1]).values()) < 0.98 * sum(s.sum() for s in batch_norm_scores(nets[0]).values())


def test_slimming_needs_scales():
    with pytest.raises(ValueError, match="4 has no batch normalisation"):
        batch_norm_scores(toy_net())
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="1 has no batch normalisation with a scale"):
        fit(net, toy_data(), epochs=1, progress=False, device="cpu", callbacks=[ScalePenalty(0.1)])
    for bad in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="strength"):
            ScalePenalty(bad)


# ---- the choice

layers = st.dictionaries(
    st.sampled_from("abcd"), st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20).map(torch.tensor), min_size=1
)


@settings(deadline=None)
@given(layers, st.floats(0, 1), st.sampled_from(["layer", "global"]), st.booleans(), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_choices_are_exact(scores, sparsity, scope, relative, floor):
    masks = keep_highest(scores, sparsity, scope=scope, relative=relative, floor=floor)
    least = {k: max(1, -int(-floor * len(s) // 1)) for k, s in scores.items()}
    for name, s in scores.items():
        assert masks[name].dtype == torch.bool and int(masks[name].sum()) >= least[name]
        if not masks[name].all():
            assert s[masks[name]].min() >= s[~masks[name]].max()
        if scope == "layer":
            assert int(masks[name].sum()) == max(len(s) - round(sparsity * len(s)), least[name])
    total = sum(map(len, scores.values()))
    if scope == "global":
        assert sum(int(m.sum()) for m in masks.values()) == max(total - round(sparsity * total), sum(least.values()))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: keep_highest({"a": torch.ones(3)}, 1.5), "sparsity must lie in"),
        (lambda: keep_highest({"a": torch.ones(3)}, 0.5, floor=-1), "floor must lie in"),
        (lambda: keep_highest({"a": torch.tensor([1.0, float("nan")])}, 0.5), "NaN"),
        (lambda: keep_highest({"a": torch.ones(3)}, 0.5, scope="x"), "scope"),
        (lambda: remove_neurons(toy_net(), {"0": 0}), "integer in 1…4"),
        (lambda: remove_neurons(toy_net(), {"0": 1.1}), r"\[0, 1\]"),
        (lambda: remove_neurons(toy_net(), {"0": torch.ones(3, dtype=torch.bool)}), "4 units"),
        (lambda: remove_neurons(toy_net(), {"0": torch.tensor([-1])}), "0…3"),
        (lambda: remove_neurons(toy_net(), {"0": torch.zeros(0, dtype=torch.long)}), "at least one"),
        (lambda: remove_neurons(toy_net(), {"6": 1}), "there are: 0, 4"),
        (lambda: remove_neurons(toy_net(), {"0": 1}, scores={"0": torch.ones(5)}), "4 units|n_drop"),
        (lambda: norm_scores(toy_net(), order=-1), "order"),
        (lambda: remove_neurons(toy_net(), {"0": torch.ones(4)}), "bool mask or integer"),
        (lambda: shrink(toy_net(), [0.5, 0.1], print), "must rise"),
        (lambda: remove_neurons(toy_net(), {"0": 1}, constants={"0": torch.ones(4, 5)}), "constants of 0"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- what cannot be followed


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.inner(x)


def masked():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    prune.random_unstructured(net[0], "weight", 0.5)
    return net


def parametrized():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    parametrize.register_parametrization(net[0], "weight", nn.Identity())
    return net


def tied():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.ReLU(), layer)


class Odd(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + 1


REFUSED = {
    "branch": (lambda: nn.Sequential(nn.Linear(4, 4), Branch(), nn.Linear(4, 2)), "1 is a Branch"),
    "branch first": (lambda: nn.Sequential(Branch(), nn.Linear(4, 4), nn.Linear(4, 2)), "0 is a Branch"),
    "no sequence": (Branch, "is a Branch, not a sequence"),
    "own forward": (lambda: Odd(nn.Linear(4, 4), nn.Linear(4, 2)), "not a sequence"),
    "groups": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)), "1 has 4 groups"),
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), "1 is a LayerNorm"),
    "softmax inside": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Softmax(1), nn.Linear(4, 2)), "1 is a Softmax"),
    "transposed": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Conv2d(4, 2, 1)), "1 is a ConvTranspose2d"),
    "tied": (tied, "tied"),
    "masked": (masked, "0 computes its weight"),
    "parametrized": (parametrized, "0 computes its weight"),
    "no flatten": (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Linear(4, 2)), "does not read the 4 units of 0 one by one"),
    "other flatten": (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(2), nn.Linear(4, 2)), "1 keeps more"),
    "interleaved": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.Linear(8, 2)), "does not read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    build, message = REFUSED[name]
    for call in (hidden_layers, norm_scores, dead_neurons, lambda net: remove_neurons(net, {})):
        with pytest.raises(ValueError, match=message):
            call(build())


def test_before_and_behind_the_hidden_part_anything_without_parameters_may_stand():
    net = nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.LogSoftmax(1))
    assert hidden_layers(net) == {"2": 4}


# ---- rounds, the experiment, other graphs


def test_rounds_end_where_one_cut_ends():
    seen = []
    many, widths = shrink(
        create_model("lenet-5-small"), [0.1, 0.35, 0.6, 0.85], lambda net, i: seen.append(count_parameters(net)), scope="global"
    )
    assert seen == sorted(seen, reverse=True) and sum(widths[-1].values()) == 226 - round(0.85 * 226)
    floored, widths = shrink(create_model("lenet-5-small"), [0.5, 0.9], lambda net, i: None, floor=0.5)
    assert widths[-1] == {"conv1": 3, "conv2": 8, "conv3": 60, "fc1": 42}


def test_the_experiment_runs_on_digits(tmp_path, monkeypatch):
    monkeypatch.setattr("nncomp.results._EXPERIMENTS", {})
    experiment("half-without-retraining", configs=[Half(dataset="digits", epochs=1, images=100, sparsities=(0.5, 0.9), repeats=50)])(
        half_without_retraining
    )
    (first,) = reproduce("half-without-retraining", [3], root=tmp_path, progress=False)
    assert {len(v) for v in first.metrics["error_percent"].values()} == {2} and len(first.metrics["error_percent"]) == 6
    costs = first.metrics["costs"]
    assert (
        costs["dense"]["macs"] == costs["half of the connections"]["macs"] == 266_200
        and costs["half of the neurons"]["parameters"] == 125_810
    )
    for cost in costs.values():
        for batch in ("ms_1", "ms_256"):
            assert 0 < cost[batch]["q1"] <= cost[batch]["median"] <= cost[batch]["q3"]
    assert first.metrics["timing"] == {"warmup": 5, "repeats": 50, "threads": torch.get_num_threads(), "device": default_device().type}
    path = next(tmp_path.glob("results/half-without-retraining/*/seed-3.json"))
    assert read_record(path) == first and check_results(tmp_path) == [] and path.stat().st_size < 5_000
    assert json.loads(path.read_text())["artefact"] is None


def test_without_torch_pruning_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingExtraError, match="torch_pruning"):
        prune_graph(toy_net(), toy_data().test.x, 0.5)


needs_torch_pruning = pytest.mark.skipif(
    importlib.util.find_spec("torch_pruning") is None, reason="torch-pruning is not installed; it comes with the extra `dev`"
)


@needs_torch_pruning
def test_torch_pruning_shrinks_a_resnet():
    from torchvision.models import resnet18

    seed_everything(0)
    net, x = resnet18(num_classes=10), torch.randn(2, 3, 64, 64)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="use Torch-Pruning"):
        remove_neurons(net, {})
    small = prune_graph(net, x, 0.5)
    assert small.fc.in_features == 256 and small.training and outputs(small, x).shape == (2, 10)
    assert count_parameters(small) < 0.3 * count_parameters(net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    jointly = prune_graph(net, x, 0.5, scope="global")
    assert outputs(jointly, x).shape == (2, 10)
    F.cross_entropy(small(x), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None for p in small.parameters())


def test_the_vgg_of_torchvision_goes_through_the_graph():
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        net = models.vgg11(num_classes=10)
    for call in (hidden_layers, lambda net: remove_neurons(net, {}), norm_scores):
        with pytest.raises(ValueError, match="the model is a VGG, not a sequence.*torchvision's networks.*prune_graph"):
            call(net)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = toy_net()

    def forward(self, x):
        return self.net(x), self.net(x)


@needs_torch_pruning
def test_graphs_with_other_outputs_are_one_error():
    x = toy_data().test.x
    with pytest.raises(ValueError, match="must return one tensor, got a tuple"):
        prune_graph(Twice(), x, 0.5)
    with pytest.raises(ValueError, match="outputs names nope, not a layer of the model; it has 0, 1, 2"):
        prune_graph(toy_net(), x, 0.5, outputs=["nope"])
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        net = models.vgg11(num_classes=10)
    net.classifier, net.avgpool = nn.Linear(512, 10), nn.AdaptiveAvgPool2d(1)
    net = net.to_empty(device="cpu")
    seed_everything(0)
    for p in net.parameters():
        nn.init.normal_(p, 0, 0.02)
    small = prune_graph(net, torch.randn(2, 3, 32, 32), 0.5)
    assert small.classifier.in_features == 256 and small.features[0].out_channels == 32


@needs_torch_pruning
@pytest.mark.parametrize("arguments, message", [((1.0,), "below 1"), ((50,), r"\[0, 1\]")])
def test_torch_pruning_with_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        prune_graph(toy_net(), toy_data().test.x, *arguments)
    with pytest.raises(ValueError, match="outputs"):
        prune_graph(toy_net(), toy_data().test.x, 0.5, outputs=["0"])


@needs_torch_pruning
def test_both_roads_lead_to_the_same_shapes_on_a_plain_sequence():
    net, x = toy_net(), toy_data().test.x
    theirs, ours = prune_graph(net, x, 0.5), remove_neurons(net, {"0": 0.5, "4": 0.5})
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}


@pytest.mark.parametrize("trained", ["all", "none", "last"])
def test_prune_graph_prunes_frozen_layers_too(trained):
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
    net = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    for name, p in net.named_parameters():
        p.requires_grad_(trained == "all" or trained == "last" and name.startswith("6"))
    with torch.no_grad():
        small = prune_graph(net, torch.randn(2, 3, 9, 9), 0.5)
    assert [tuple(p.shape) for name, p in small.named_parameters() if "weight" in name] == [(4, 3, 3, 3), (4, 4, 3, 3), (4, 4)]
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in net.parameters()]


def test_two_flattens_between_a_convolution_and_its_reader():
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
    net, x = nn.Sequential(features, nn.Sequential(nn.Flatten(), nn.Linear(64, 3))).eval(), torch.randn(5, 1, 6, 6)
    with torch.no_grad():
        net[0][0].weight[1] = 0
    smaller = remove_dead_neurons(net)
    assert smaller[0][0].out_channels == 3 and torch.allclose(smaller(x), net(x), atol=1e-5)


def test_constants_are_traced_past_hooks_and_dropout(recwarn):
    torch.manual_seed(0)
    net, calls = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout2d(0.5), nn.Flatten(), nn.Linear(64, 3)).eval(), []
    net[1].register_forward_hook(lambda m, args, out: calls.append(out.shape))
    with torch.no_grad():
        net[0].weight[1] = 0
    dead_neurons(net), remove_dead_neurons(net)
    assert calls == [] and not [w for w in recwarn if "dropout" in str(w.message)]


def test_taylor_scores_take_classes_of_any_integer_type():
    net, x, y = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(6, 4), torch.randint(0, 3, (6,))
    whole = taylor_scores(net, [(x, y)])["0"]
    assert all(torch.equal(taylor_scores(net, [(x, y.to(t))])["0"], whole) for t in (torch.uint8, torch.int16, torch.int32))


def test_a_pruned_bias_is_named():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    nn.utils.prune.l1_unstructured(net[0], "bias", 2)
    with pytest.raises(ValueError, match="0 computes its weight or bias from other tensors"):
        remove_neurons(net, {"0": 3})
