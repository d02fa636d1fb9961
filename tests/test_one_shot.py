"Compression without training: least squares against brute force, odd layers and models, and the registered experiments in miniature."

import copy
import dataclasses
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toys import toy_data, toy_net

from nncomp import load, models
from nncomp.core import count_nonzero, named_weights, seed_everything
from nncomp.one_shot import (
    ONE_SHOT_LENET_5,
    ONE_SHOT_MINIVGG,
    OneShot,
    _in_parts,
    _opened,
    descend,
    fit_values,
    normal_equations,
    one_shot_compress,
    refit,
)
from nncomp.pruning import apply_masks_
from nncomp.results import find_experiment
from nncomp.schedules import grow_masks
from nncomp.training import evaluate, fit

QUIET = dict(device="cpu", progress=False)


def systems(seed, groups=2, rows=3, d=7, positions=20):
    "Random sums with the weights, the mask and the answers that they come from."
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, positions, d, generator=g, dtype=torch.float64)
    x[..., 1] = x[..., 0] + 0.1 * x[..., 1]
    w = torch.randn(groups, rows, d, generator=g, dtype=torch.float64)
    gram = x.mT @ x + 0.01 * torch.eye(d, dtype=torch.float64)
    return gram, w @ gram, w, torch.rand(w.shape, generator=g) < 0.6


def energy(w, gram, cross):
    return float(((w @ gram - 2 * cross) * w).sum())


@given(st.integers(0, 9999))
@settings(deadline=None, max_examples=60)
def test_refit_is_least_squares_on_what_stays(seed):
    gram, cross, w, mask = systems(seed)
    found = refit(w, mask, gram, cross, tolerance=1e-12)
    for g in range(len(w)):
        for r in range(w.shape[1]):
            kept = mask[g, r].nonzero().flatten()
            expected = torch.zeros(w.shape[-1], dtype=torch.float64)
            expected[kept] = torch.linalg.solve(gram[g][kept][:, kept], cross[g, r, kept])
            torch.testing.assert_close(found[g, r], expected, rtol=1e-6, atol=1e-8)


@given(st.integers(0, 9999), st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_descend_and_fit_values_never_make_it_worse(seed, k):
    gram, cross, w, mask = systems(seed)
    values = torch.randn(k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).sort().values
    last = None
    for sweeps in range(4):
        now = descend(w, mask, values, gram, cross, sweeps=sweeps)
        assert not now[~mask].any() and torch.isin(now[mask], values).all()
        assert last is None or energy(now, gram, cross) <= last + 1e-9
        last = energy(now, gram, cross)
    labels = torch.where(mask, torch.bucketize(now, (values[1:] + values[:-1]) / 2), -1)
    better = fit_values(now, labels, values, gram, cross)
    assert energy(torch.where(mask, better[labels], 0), gram, cross) <= last + 1e-6
    unused = ~torch.isin(torch.arange(k), labels)
    torch.testing.assert_close(better[unused], values[unused])


def test_descend_ends_where_no_single_weight_wants_to_move():
    gram, cross, w, mask = systems(3)
    values = torch.tensor([-1.0, 0.3, 1.2], dtype=torch.float64)
    end = descend(w, mask, values, gram, cross, sweeps=99)
    for at in mask.nonzero().tolist():
        for v in values:
            other = end.clone()
            other[tuple(at)] = v
            assert energy(other, gram, cross) >= energy(end, gram, cross) - 1e-9


@pytest.mark.parametrize("layer, shape", [
    (nn.Linear(5, 3), (5,)), (nn.Linear(5, 3, bias=False), (4, 5)), (nn.Conv1d(3, 4, 3, padding="same"), (3, 9)),
    (nn.Conv2d(4, 8, (3, 1), stride=(2, 1), groups=4), (4, 7, 6)), (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 5, 5)),
    (nn.Conv3d(2, 3, 2, dilation=2, bias=False), (2, 4, 4, 4)),
], ids="linear tokens conv1d depthwise reflect conv3d".split())
def test_a_layer_answers_best(layer, shape):
    "No small step of the weights that stay lowers the squared error of the layer's own outputs."
    seed_everything(0)
    layer, x = layer.double(), torch.randn(40, *shape, dtype=torch.float64)
    target = layer(x).detach()
    small = one_shot_compress(layer, x, sparsity=0.4, ridge=1e-9, floor=0.0, **QUIET)
    loss = (small(x) - target).square().sum()
    grads = torch.autograd.grad(loss, list(small.parameters()))
    for p, g in zip(small.parameters(), grads):
        assert g[p != 0].abs().max() < 1e-4 * max(1.0, float(target.square().sum()))
    assert count_nonzero([small.weight]) == layer.weight.numel() - round(0.4 * layer.weight.numel())
    plain = copy.deepcopy(layer)
    plain.weight.data.masked_fill_(small.weight == 0, 0)
    assert loss <= (plain(x) - target).square().sum()


class Odd(nn.Module):
    "Tied layers, a layer used twice, an embedding, a transposed convolution, a layer that is not called."
    def __init__(self):
        super().__init__()
        self.table, self.twice, self.a, self.b = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.up, self.idle, self.head = nn.ConvTranspose1d(6, 4, 2), nn.Linear(3, 3), nn.Linear(4, 2)

    def forward(self, ids):
        x = self.table(ids)
        x = self.twice(self.twice(x).relu())
        return self.head(self.up(self.b(self.a(x)).transpose(1, 2)).mean(-1))


def test_what_cannot_be_fitted_is_named_and_left():
    seed_everything(0)
    net, ids = Odd(), torch.randint(0, 11, (64, 5))
    state = copy.deepcopy(net.state_dict())
    with pytest.warns(UserWarning, match="left as they are: table.weight, a.weight, up.weight, idle.weight"):
        small = one_shot_compress(net.train(), ids, sparsity=0.5, bits=2, **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("error")                                                       # what is skipped needs no word
        one_shot_compress(net, ids, bits=2, skip=("table.*", "a.*", "up.*", "idle.*"), **QUIET)
    with pytest.raises(ValueError, match="a.weight cannot be fitted: .* plain linear"):
        one_shot_compress(net, ids, bits={"a.weight": 2, "head.weight": 3}, **QUIET)
    for name, t in net.state_dict().items():
        assert torch.equal(t, state[name])
    assert net.training and not small.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*net.modules(), *small.modules()])
    changed = {name for name, p in small.named_parameters() if not torch.equal(p, state[name])}
    assert changed == {"twice.weight", "twice.bias", "head.weight", "head.bias"}
    assert all(len(small.get_parameter(name).unique()) <= 4 for name in ("twice.weight", "head.weight"))
    assert count_nonzero([small.twice.weight, small.head.weight]) == 22


class Block(nn.Module):
    "A residual step and a rectifier, in place or not; a layer that is called by keyword."
    def __init__(self, in_place):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.relu, self.in_place = nn.ReLU(inplace=in_place), in_place

    def forward(self, x):
        h = self.relu(self.a(x))
        y = self.b(h)
        if self.in_place:
            h += y
        else:
            h = h + y
        return self.c(input=h)


def test_what_is_changed_in_place_later_was_seen_before():
    x, found = torch.randn(60, 6, generator=torch.Generator().manual_seed(0)), []
    for in_place in (False, True):
        seed_everything(0)
        found.append(one_shot_compress(Block(in_place), x, sparsity=0.5, bits=3, **QUIET).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values()))


class Routed(nn.Module):
    "Each row goes to one of two layers, by what the first layer says."
    def __init__(self):
        super().__init__()
        self.gate, self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        h = self.gate(x)
        out, left = h.new_zeros(len(h), 3), h[:, 0] > 0
        out[left], out[~left] = self.left(h[left]), self.right(h[~left])
        return out


class Centred(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight - self.weight.mean(), self.bias)


def test_layers_that_do_more_or_go_elsewhere():
    seed_everything(0)
    with pytest.raises(ValueError, match="left is used differently by the two networks.*skip"):
        one_shot_compress(Routed(), torch.randn(90, 6), sparsity=0.7, **QUIET)
    net = nn.Sequential(Centred(6, 5), nn.Linear(5, 4))
    with pytest.warns(UserWarning, match="left as they are: 0.weight"):
        small = one_shot_compress(net, torch.randn(50, 6), sparsity=0.5, **QUIET)
    assert torch.equal(small[0].weight, net[0].weight) and count_nonzero([small[1].weight]) == 10
    with pytest.raises(ValueError, match="is no plain linear"):
        normal_equations(net[0], [(torch.randn(4, 6), torch.randn(4, 5))])
    with pytest.raises(ValueError, match="has no weights"):
        one_shot_compress(nn.ReLU(), torch.randn(4, 6), sparsity=0.5, **QUIET)


def test_sums_do_not_depend_on_how_images_are_divided():
    seed_everything(0)
    layer, x = nn.Conv2d(3, 4, 3, padding=1), torch.randn(6, 3, 20, 20)
    whole = normal_equations(layer, [(x, layer(x))])
    assert [len(part) for part, _ in _in_parts(layer, x, layer(x), entries=2 * 400 * 27)] == [2, 2, 2]
    for seen in ([(t, layer(t)) for t in x.split(4)], [(t, layer(t)) for t in x], [(x.to(memory_format=torch.channels_last), layer(x))]):
        for a, b in zip(normal_equations(layer, seen), whole):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-4)


def test_many_values_need_no_fitting():
    net, data = toy_net(), toy_data()
    small = one_shot_compress(net, data.train.x[:32], bits=12, **QUIET)
    for a, b in zip(named_weights(net).values(), named_weights(small).values()):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.01)


def test_gradients_and_modes_are_as_before():
    "Nothing of evaluation mode or of no_grad is left behind, not even by an error in the middle."
    net, data = toy_net().train(), toy_data()
    one_shot_compress(net, data.train.x[:64], sparsity=0.5, **QUIET)
    assert torch.is_grad_enabled() and all(m.training for m in net.modules())
    with pytest.raises(RuntimeError):
        one_shot_compress(net, torch.zeros(4, 7), sparsity=0.5, **QUIET)
    assert torch.is_grad_enabled() and not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype):
    net, data = toy_net().to(dtype), toy_data()
    small = one_shot_compress(net, data.train.x[:64], sparsity=0.5, bits=3, **QUIET)
    assert all(p.dtype == dtype for p in small.parameters())
    assert all(len(w.unique()) <= 8 for w in named_weights(small).values())


def test_it_repairs_a_cut():
    data = toy_data()
    net = toy_net()
    fit(net, data, epochs=6, lr=1e-2, batch_size=32, **QUIET)
    only_cut = one_shot_compress(net, data.train.x[:1], sparsity=0.8, ridge=1e9, **QUIET)                  # the old weights hold
    cut = evaluate(only_cut, data.train).loss
    repaired = evaluate(one_shot_compress(net, data.train.x, sparsity=0.8, **QUIET), data.train).loss
    dense = evaluate(net, data.train).loss
    assert repaired - dense < (cut - dense) / 2


class Reader(nn.Module):
    "An encoder and a decoder with attention of its own and to the encoder."
    def __init__(self, batch_first=True):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        self.decoder = nn.TransformerDecoderLayer(8, 2, 16, batch_first=batch_first)
        self.odd = nn.MultiheadAttention(8, 2, kdim=4, vdim=4, batch_first=batch_first)

    def forward(self, x):
        y = self.encoder(x)
        return self.decoder(x, y) + self.odd(y, x[..., :4], x[..., :4])[0]


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention(batch_first):
    "All matrices of attention are fitted, of itself and to another sequence; the model keeps its modules, names and buffers."
    seed_everything(0)
    net = Reader(batch_first).eval()
    x, more = torch.randn(2, 200, 5, 8).cumsum(2) / 2
    with pytest.warns(UserWarning, match="left as they are: odd.q_proj_weight, odd.k_proj_weight, odd.v_proj_weight, odd.out"):
        small = one_shot_compress(net, x, sparsity=0.5, bits=3, **QUIET)
    assert [(n, type(m)) for n, m in small.named_modules()] == [(n, type(m)) for n, m in net.named_modules()]
    assert list(small.state_dict()) == list(net.state_dict())
    weights = {n: w for n, w in named_weights(small).items() if not n.startswith("odd.")}
    assert all(len(w.unique()) <= 8 for w in weights.values())
    assert sum(count_nonzero([w]) for w in weights.values()) == sum(w.numel() for w in weights.values()) // 2
    cut = copy.deepcopy(net)
    apply_masks_(cut, grow_masks(cut, dict.fromkeys(weights, 0.5), scope="global", floor=0.01))
    with torch.no_grad():
        lost = [float((other(more) - net(more)).square().mean()) for other in (cut, small)]
    assert lost[1] < lost[0] / 2


class Padded(nn.Module):
    "Sequences of several lengths: where nobody looks, the encoder packs them into nested tensors."
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    def forward(self, x):
        return self.encoder(x, src_key_padding_mask=torch.arange(6) >= 2 + x[:, 0, :1].mul(1000).abs().long() % 5)[:, 0]


def test_padded_sequences():
    "Attention is seen where torch has a fast path around it, and the path is open again behind."
    seed_everything(0)
    net, x = Padded().eval(), torch.randn(200, 6, 8)
    small = one_shot_compress(net, x, sparsity=0.3, **QUIET)
    inner, fitted = (model.encoder.layers[0].self_attn.in_proj_weight for model in (net, small))
    assert torch.backends.mha.get_fastpath_enabled() and not torch.equal(inner, fitted)
    with torch.no_grad():
        assert float((small(x) - net(x)).square().mean() / net(x).var()) < 0.1


@pytest.mark.parametrize("name", ["0", "attention", "2"])
def test_a_layer_answers_what_its_hooks_are_shown(name):
    "A hook of the user that triples an output is called once, on what the layer gives."
    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            x = self[1](self[0](x))
            return self[2](self.attention(x, x, x)[0])

    seed_everything(0)
    net, x = Net().eval(), torch.randn(300, 4, 8)
    net.get_submodule(name).register_forward_hook(lambda _, args, out: (out[0] * 3, out[1]) if isinstance(out, tuple) else out * 3)
    small = one_shot_compress(net, x, sparsity=0.1, **QUIET)
    with torch.no_grad():
        assert float((small(x) - net(x)).square().mean() / net(x).var()) < 0.1


class Mixed(nn.Module):
    "Half precision of its own making."
    def __init__(self):
        super().__init__()
        self.first, self.attention, self.last = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.first(x).tanh()
            return self.last(self.attention(x, x, x)[0]).float()


def test_autocast_inside_a_model():
    "What a layer is shown may be of a narrower type than its weights."
    seed_everything(0)
    net, x = Mixed().eval(), torch.randn(300, 4, 8)
    small = one_shot_compress(net, x, sparsity=0.1, **QUIET)
    with torch.no_grad():
        assert float((small(x) - net(x)).square().mean() / net(x).var()) < 0.1


def test_nothing_to_fit():
    "Layers that are used under two names cannot be fitted; where there are no others, nothing would be done."
    block = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="none of 0.weight can be fitted: one shot"):
        one_shot_compress(nn.Sequential(block, nn.Tanh(), block), torch.randn(50, 8), sparsity=0.5, **QUIET)


def test_attention_is_closed_after_an_error():
    "Whatever happens between, the modules are as before."
    net = nn.TransformerEncoderLayer(8, 2, 16).eval()
    names = list(net.state_dict())
    with pytest.raises(RuntimeError), _opened(net):
        assert "self_attn.inside" in dict(net.named_modules())
        raise RuntimeError
    assert type(net.self_attn) is nn.MultiheadAttention and list(net.state_dict()) == names and not hasattr(net.self_attn, "core")


@pytest.mark.parametrize("options, text", [
    (dict(sparsity=0.5, bits=17), "bits"), (dict(sparsity=1.5), "sparsity"), (dict(rounds=0), "rounds"),
    (dict(sparsity=0.5, ridge=float("nan")), "ridge"), (dict(sparsity=0.5, ridge="0.1"), "ridge"), (dict(), "nothing to do"),
    (dict(skip=("nothing.*",)), "skip names"), (dict(batch_size=0), "batch_size"), (dict(sparsity={"9.weight": 0.5}), "9.weight"),
])
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        one_shot_compress(toy_net(), toy_data().train.x, **options, **QUIET)


def test_bad_sums_and_images():
    with pytest.raises(ValueError, match="must be a tensor"):
        one_shot_compress(toy_net(), toy_data().train, **QUIET)
    with pytest.raises(ValueError, match="no images"):
        one_shot_compress(toy_net(), toy_data().train.x[:0], **QUIET)
    with pytest.raises(ValueError, match="no batch"):
        normal_equations(nn.Linear(3, 3), [])
    broken = toy_net()
    broken[0].weight.data[0] = float("inf")
    with pytest.raises(ValueError, match="0.weight"):
        one_shot_compress(broken, toy_data().train.x, sparsity=0.5, **QUIET)


TINY = {"one-shot-lenet-300-100": OneShot(sparsities=(0.9,), bits=(2,), both=((0.9, 4),), counts=(16,)),
        "one-shot-lenet-5": dataclasses.replace(ONE_SHOT_LENET_5, sparsities=(0.9,), bits=(2,), both=((0.9, 4),)),
        "one-shot-minivgg": dataclasses.replace(ONE_SHOT_MINIVGG, model="tiny-vgg", sparsities=(0.9,), bits=(2,), both=((0.9, 4),))}


@pytest.mark.parametrize("name", TINY)
def test_experiments(tmp_path, name, monkeypatch):
    "On the digits, for an epoch; a second call finds everything that the first one left and says the same."
    monkeypatch.setitem(models._REGISTRY, "tiny-vgg", (partial(models.vgg, plan=(4, "M", 8, "M", 8, "M", 8, "M", 8, "M")), (3, 32, 32)))
    config = dataclasses.replace(TINY[name], dataset="digits", epochs=1, images=32)
    run = find_experiment(name).run
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        once = run(config, 0, tmp_path)
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert run(config, 0, tmp_path) == once and {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == kept
    networks = once["networks"]
    pruned = ("cut", "once", "rounds", "retrained", "continued")
    expected = {"dense", "nearest-2", "shared-2", "plain-0.9-4", "both-0.9-4"} | {f"{arm}-0.9" for arm in pruned}
    assert expected <= networks.keys() and ("recalibrated-0.9" in networks) == (name == "one-shot-minivgg")
    files = {arm: load(tmp_path / f"{arm}-0.9.nncomp") for arm in pruned}
    zeros = {arm: {key: w == 0 for key, w in state.items() if w.ndim > 1} for arm, state in files.items()}
    for start, end in (("cut", "retrained"), ("rounds", "continued")):
        for key, zero in zeros[start].items():
            assert zeros[end][key][zero].all() and zero.any()                     # training on keeps what is gone
    assert all(0 <= n["error_percent"] <= 100 and n["bytes"] > 0 for n in networks.values())
    assert networks["both-0.9-4"]["bytes"] < networks["rounds-0.9"]["bytes"] < networks["dense"]["bytes"]


@pytest.mark.parametrize("kind, shape", [(nn.Conv1d, (60, 3, 9)), (nn.Conv2d, (60, 3, 6, 6)), (nn.Conv3d, (60, 3, 4, 4, 4))])
@pytest.mark.parametrize("before", [False, True])
def test_a_convolution_is_fitted_past_its_hooks(kind, shape, before):
    "Hooks of the user see what the layer is shown and gives, not the columns that the sums are made from."
    seed_everything(0)
    net, x, seen = nn.Sequential(kind(3, 5, 3, padding=1)), torch.randn(shape), set()
    if before:
        net[0].register_forward_pre_hook(lambda _, args: seen.add(args[0].shape[1]) or (args[0] * 3,))
    else:
        net[0].register_forward_hook(lambda m, args, out: seen.add(m.weight.shape[0]) or out * 3)
    small = one_shot_compress(net, x, sparsity=0.02, **QUIET)
    assert float((small[0].weight - net[0].weight).norm() / net[0].weight.norm()) < 0.2
    assert seen == {3 if before else 5}


class Noisy(nn.Module):
    "Draws at random in evaluation mode as well."
    def __init__(self, kind):
        super().__init__()
        self.first, self.last, self.kind = nn.Linear(12, 12), nn.Linear(12, 12), kind

    def forward(self, x):
        h = self.first(x)
        return self.last(nn.functional.dropout(h, 0.5) if self.kind == "dropout" else h + torch.randn_like(h))


@pytest.mark.parametrize("kind", ["dropout", "noise"])
def test_models_that_draw_at_random_are_fitted_to_the_same_draws(kind):
    seed_everything(1)
    net, x = Noisy(kind).eval(), torch.randn(400, 12)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    small = one_shot_compress(net, x, sparsity=0.01, **QUIET)
    assert torch.equal(torch.rand(3), expected)                          # the caller's random numbers go on
    assert 0.95 < float(small.last.weight.norm() / net.last.weight.norm()) < 1.05


def test_what_one_shot_refuses_as_deep_compress_does():
    x = torch.randn(20, 6)
    pruned = nn.Sequential(nn.Linear(6, 6))
    nn.utils.prune.l1_unstructured(pruned[0], "bias", 0.5)
    with pytest.raises(ValueError, match="0.bias is computed from 0.bias_orig; make it plain first"):
        one_shot_compress(pruned, x, sparsity=0.5, **QUIET)
    inner = nn.Sequential(torch.compile(nn.Linear(6, 6), backend="eager"), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="0 is compiled by itself"):
        one_shot_compress(inner, x, sparsity=0.5, **QUIET)
