"Pruning: exact counts on any tensor, masks that hold under every optimizer, nothing left behind."
import copy
import io
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune
from toys import Stop, toy_data, toy_net

from nncomp.core import named_weights, seed_everything
from nncomp.pruning import (
    MaskCallback,
    apply_masks_,
    drop_lowest,
    drop_lowest_global,
    global_magnitude_masks,
    magnitude_mask,
    n_m_mask,
    random_mask,
    std_threshold_mask,
    threshold_mask,
)
from nncomp.training import Callback, fit

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]
shapes = st.lists(st.integers(0, 6), min_size=0, max_size=5)
fractions = st.floats(0, 1, allow_nan=False)


def naive(scores, n_drop):
    mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().argsort(stable=True)[:n_drop]] = False
    return mask.view(scores.shape)


def tensor(shape, seed, dtype=torch.float32, levels=8):
    "Values with many ties, of both signs."
    g = torch.Generator().manual_seed(seed)
    return (torch.randint(-levels, levels + 1, tuple(shape), generator=g) / 4).to(dtype)


@given(shapes, st.integers(0, 9999), st.sampled_from(DTYPES), fractions)
@settings(max_examples=150, deadline=None)
def test_magnitude_is_the_stable_sort(shape, seed, dtype, sparsity):
    w = tensor(shape, seed, dtype)
    mask = magnitude_mask(w, sparsity)
    assert mask.dtype == torch.bool and mask.shape == w.shape
    assert torch.equal(mask, naive(w.abs().double(), round(sparsity * w.numel())))


@given(st.integers(0, 9999), st.lists(fractions, min_size=2, max_size=5))
@settings(max_examples=50, deadline=None)
def test_masks_are_nested_and_idempotent(seed, grid):
    w = tensor((7, 11), seed)
    last = torch.ones_like(w, dtype=torch.bool)
    for s in sorted(grid):
        mask = magnitude_mask(w, s)
        assert not (mask & ~last).any()
        last = mask
    pruned = w.masked_fill(~last, 0.0)
    again = magnitude_mask(pruned, max(grid))
    assert int(again.sum()) == int(last.sum())
    assert torch.equal(pruned.masked_fill(~again, 0.0), pruned)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_million_weights_agree_with_the_sort(dtype, device):
    w = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for s in (1e-6, 0.5, 0.987, 1 - 1e-6):
        mask = magnitude_mask(w, s)
        assert mask.device == w.device
        assert torch.equal(mask, naive(w.abs(), round(s * w.numel())))


def test_odd_tensors():
    w = torch.randn(8, 6)
    assert torch.equal(magnitude_mask(w.t(), 0.5), magnitude_mask(w.t().contiguous(), 0.5))  # not contiguous
    assert magnitude_mask(nn.Parameter(w), 0.5).requires_grad is False
    assert magnitude_mask(torch.tensor(3.0), 0.0).shape == ()
    for empty in (torch.empty(0), torch.empty(3, 0)):
        for mask in (magnitude_mask(empty, 0.5), threshold_mask(empty, 1.0), std_threshold_mask(empty, 1.0), random_mask(empty, 0.5, None)):
            assert mask.shape == empty.shape and mask.dtype == torch.bool
    assert drop_lowest(torch.tensor([-math.inf, math.inf, 0.0]), 2).tolist() == [False, True, False]
    assert drop_lowest(torch.tensor([0.0, -0.0, 1.0]), 1).tolist() == [False, True, True]
    w = torch.randn(20)
    for s in (0, 1):
        assert magnitude_mask(w, s).sum() == 20 * (1 - s)
    before = w.clone()
    magnitude_mask(w, 0.5), std_threshold_mask(w, 1.0), threshold_mask(w, 0.1)
    assert torch.equal(w, before)


@pytest.mark.filterwarnings("ignore:.*loses all")
@given(st.integers(0, 9999), st.integers(1, 199))
@settings(max_examples=40, deadline=None)
def test_agrees_with_torch_prune(seed, count):
    seed_everything(seed)
    conv = nn.Conv2d(4, 5, (2, 5))  # 200 weights, no ties
    w = conv.weight.detach().clone()
    prune.l1_unstructured(conv, "weight", amount=count)
    assert torch.equal(magnitude_mask(w, count / 200), conv.weight_mask.bool())
    pair = nn.ModuleDict({"a": nn.Linear(9, 9), "b": nn.Linear(9, 5)})
    masks = global_magnitude_masks(named_weights(pair), count / 200)
    parts = [(pair["a"], "weight"), (pair["b"], "weight")]
    prune.global_unstructured(parts, prune.L1Unstructured, amount=count / 200)
    assert torch.equal(masks["a.weight"], pair["a"].weight_mask.bool())
    assert torch.equal(masks["b.weight"], pair["b"].weight_mask.bool())


@given(st.lists(shapes, min_size=1, max_size=4), st.integers(0, 9999), fractions, fractions)
@settings(max_examples=100, deadline=None)
def test_global_count_and_floor(sizes, seed, sparsity, floor):
    weights = {str(i): tensor(s, seed + i, DTYPES[i % 4]) for i, s in enumerate(sizes)}
    total = sum(w.numel() for w in weights.values())
    need = sum(math.ceil(floor * w.numel() - 1e-9) for w in weights.values())
    drop = round(sparsity * total)
    if not total or (drop > total - need and floor):
        with pytest.raises(ValueError):
            global_magnitude_masks(weights, sparsity, floor=floor)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masks = global_magnitude_masks(weights, sparsity, floor=floor)
    assert sum(int((~m).sum()) for m in masks.values()) == drop
    for name, w in weights.items():
        assert masks[name].shape == w.shape
        assert int(masks[name].sum()) >= math.ceil(floor * w.numel() - 1e-9)
        kept, gone = w[masks[name]].abs(), w[~masks[name]].abs()
        assert not kept.numel() or not gone.numel() or kept.min() >= gone.max()  # by magnitude within each tensor
    if not floor:
        flat = torch.cat([w.flatten().double() for w in weights.values()])
        assert torch.equal(torch.cat([m.flatten() for m in masks.values()]), magnitude_mask(flat, sparsity))


def test_global_never_raises_what_was_dropped():
    scores = {"a": torch.tensor([-math.inf, -math.inf, 3.0]), "b": torch.tensor([1.0, 2.0, 4.0])}
    masks = drop_lowest_global(scores, 4, floor=1 / 3)
    assert masks["a"].tolist() == [False, False, True] and masks["b"].tolist() == [False, False, True]


def test_a_dead_layer_is_named():
    weights = {"small": torch.full((5,), 0.1), "large": torch.ones(5)}
    with pytest.warns(UserWarning, match="small loses all of its 5"):
        global_magnitude_masks(weights, 0.6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert global_magnitude_masks(weights, 0.6, floor=0.01)["small"].sum() == 1
        global_magnitude_masks(weights, 1.0)  # all of everything was asked for


@given(st.integers(0, 9999), st.sampled_from(DTYPES), st.floats(0.05, 4))
@settings(max_examples=60, deadline=None)
def test_thresholds_against_numpy(seed, dtype, quality):
    w = torch.randn(37, generator=torch.Generator().manual_seed(seed)).to(dtype)
    wide = w.double().numpy()
    mask = std_threshold_mask(w, quality)
    expected = np.abs(wide) >= quality * wide.std()
    near = np.abs(np.abs(wide) - quality * wide.std()) < 1e-5
    assert ((mask.numpy() == expected) | near).all()
    assert torch.equal(threshold_mask(w, 0.5), torch.from_numpy(np.abs(wide) >= 0.5))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_n_m(dim):
    w = tensor((8, 12, 4), 0)
    mask = n_m_mask(w, 1, 4, dim=dim)
    groups, values = mask.movedim(dim, -1).reshape(-1, 4), w.abs().movedim(dim, -1).reshape(-1, 4)
    assert mask.shape == w.shape and (groups.sum(1) == 1).all()
    assert torch.equal(values[groups], values.max(1).values)
    assert n_m_mask(w, 0, 4).sum() == 0 and n_m_mask(w, 4, 4).all()


def test_bad_input_is_named():
    w = torch.tensor([1.0, float("nan"), 2.0])
    for call in (lambda: magnitude_mask(w, 0.5, name="conv1.weight"), lambda: threshold_mask(w, 0.5, name="conv1.weight"),
                 lambda: std_threshold_mask(w, 0.5, name="conv1.weight"), lambda: global_magnitude_masks({"conv1.weight": w}, 0.5)):
        with pytest.raises(ValueError, match="conv1.weight holds 1 NaN"):
            call()
    for s in (-0.1, 1.1, 50, float("nan")):
        for call in (magnitude_mask, lambda x, s: random_mask(x, s, None), lambda x, s: global_magnitude_masks({"w": x}, s)):
            with pytest.raises(ValueError, match=r"\[0, 1\]"):
                call(torch.ones(4), s)
    with pytest.raises(ValueError, match="floating"):
        magnitude_mask(torch.ones(4, dtype=torch.int64), 0.5)
    with pytest.raises(ValueError, match="quality"):
        std_threshold_mask(torch.ones(4), float("inf"))


# --- masks on models ---


def toy_masks(net, sparsity=0.7):
    return {name: magnitude_mask(w, sparsity, name=name) for name, w in named_weights(net).items()}


def train(net, callbacks, **options):
    defaults = {"epochs": 3, "lr": 0.02, "batch_size": 16, "progress": False, "schedule": "constant", "device": "cpu"}
    return fit(net, toy_data(), callbacks=callbacks, **defaults | options)


class ByHand(Callback):
    "The reference: gradient and optimizer state multiplied by the mask around every step, the weights never."
    def __init__(self, masks): self.masks = masks
    def after_backward(self, run):
        for name, mask in self.masks.items():
            run.model.get_parameter(name).grad.mul_(mask)
    def after_step(self, run):
        for name, mask in self.masks.items():
            p = run.model.get_parameter(name)
            for value in run.optimizer.state[p].values():
                if isinstance(value, torch.Tensor) and value.shape == p.shape:
                    value.mul_(mask)


OPTIMIZERS = [{"optimizer": "sgd", "momentum": 0.9}, {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01},
              {"optimizer": "adam"}, {"optimizer": "adam", "weight_decay": 0.01}, {"optimizer": "adamw", "weight_decay": 0.1},
              {"optimizer": "adam", "l1": 1e-3, "l2": 1e-3}]


@pytest.mark.parametrize("options", OPTIMIZERS, ids=lambda o: "-".join(map(str, o.values())))
def test_masks_hold(options):
    net, twin = toy_net(), toy_net()
    masks = toy_masks(net)
    apply_masks_(twin, masks)
    seen = []

    class Look(Callback):
        def after_step(self, run):
            seen.append(all((w[~masks[name]] == 0).all() and not torch.signbit(w[~masks[name]]).any()
                            for name, w in named_weights(run.model).items()))

    train(net, [MaskCallback(masks), Look()], **options)
    train(twin, [ByHand(masks)], **options)
    assert len(seen) == 18 and all(seen)
    for (name, p), q in zip(net.named_parameters(), twin.parameters()):
        keep = masks.get(name, torch.ones_like(p, dtype=torch.bool))
        assert torch.equal(p[keep], q[keep]), name
    assert all(not torch.equal(p, q) for p, q in zip(named_weights(net).values(), named_weights(toy_net()).values()))


def test_nothing_is_left_on_the_model():
    net = toy_net()
    masks = toy_masks(net)
    train(net, [MaskCallback(masks)])
    plain = toy_net()
    assert list(net.state_dict()) == list(plain.state_dict())
    for module, fresh in zip(net.modules(), plain.modules()):
        assert set(vars(module)) == set(vars(fresh)) and not module._forward_pre_hooks and not module._forward_hooks
    twin = copy.deepcopy(net)  # deepcopy, and a state_dict round trip into a fresh net
    plain.load_state_dict(net.state_dict())
    for other in (twin, plain):
        for name, w in named_weights(other).items():
            assert (w[~masks[name]] == 0).all()
    train(twin, [MaskCallback(masks)], epochs=1)
    assert all((w[~masks[name]] == 0).all() for name, w in named_weights(twin).items())


def test_callback_survives_copy_and_save():
    net = toy_net()
    callback = MaskCallback(toy_masks(net))
    file = io.BytesIO()
    torch.save(callback.state_dict(), file)
    file.seek(0)
    restored = MaskCallback({})
    restored.load_state_dict(torch.load(file, weights_only=True))
    for other in (restored, copy.deepcopy(callback)):
        assert other.masks.keys() == callback.masks.keys()
        assert all(torch.equal(other.masks[n], callback.masks[n]) for n in callback.masks)
    masks = toy_masks(net)
    callback = MaskCallback(masks)
    masks["0.weight"].fill_(False)  # the callback has masks of its own
    assert callback.masks["0.weight"].any()


def test_resume_is_the_same_run(tmp_path):
    whole, parts = toy_net(), toy_net()
    masks = toy_masks(whole)
    options = {"optimizer": "sgd", "momentum": 0.9, "epochs": 4}
    train(whole, [MaskCallback(masks)], **options)
    checkpoint = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        train(parts, [MaskCallback(masks), Stop(1)], checkpoint=checkpoint, **options)
    parts = toy_net(1)
    train(parts, [MaskCallback(masks), Stop(-1)], checkpoint=checkpoint, **options)
    for (name, p), q in zip(whole.named_parameters(), parts.parameters()):
        assert torch.equal(p, q), name


def test_masks_that_do_not_fit():
    net = toy_net()
    before = copy.deepcopy(net.state_dict())
    yes = torch.ones(512, dtype=torch.bool)
    wrong = {"0.weight": yes[:24].view(4, 1, 3, 2), "4.weights": yes.view(8, 64), "6.weight": torch.zeros(3, 8)}
    for call in (lambda: apply_masks_(net, wrong), lambda: train(net, [MaskCallback(wrong)])):
        with pytest.raises(ValueError, match="masks do not fit") as error:
            call()
        text = str(error.value)
        assert all(part in text for part in ("0.weight has shape (4, 1, 3, 3)", "4.weights is not a parameter", "6.weight must be bool"))
        assert "\n" not in text
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_tied_frozen_and_half():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3))
    net[2].weight = net[1].weight
    net[3].weight.requires_grad_(False)
    masks = {"2.weight": magnitude_mask(net[2].weight, 0.5), "3.weight": magnitude_mask(net[3].weight, 0.5)}  # by its second name
    train(net, [MaskCallback(masks)])
    assert (net[1].weight[~masks["2.weight"]] == 0).all() and (net[3].weight[~masks["3.weight"]] == 0).all()
    half = nn.Linear(8, 8).bfloat16()
    apply_masks_(half, {"weight": magnitude_mask(half.weight, 0.25)})
    assert half.weight.dtype == torch.bfloat16 and (half.weight == 0).sum() == 16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_masks_follow_the_device():
    net = toy_net()
    callback = MaskCallback(toy_masks(net))
    train(net, [callback], device="cuda", momentum=0.9, optimizer="sgd")
    for name, w in named_weights(net).items():
        assert (w.cpu()[~callback.masks[name].cpu()] == 0).all()
