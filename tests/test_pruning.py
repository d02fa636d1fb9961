"Pruning: exact counts on any tensor, masks that hold under every optimizer, nothing left behind."
import copy
import io
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune
from toys import Stop, toy_data, toy_net

from nncomp.container import load, save
from nncomp.core import named_weights, seed_everything
from nncomp.pruning import (
    MaskCallback,
    apply_masks_,
    csr_bytes,
    drop_lowest,
    drop_lowest_global,
    finalize_pruning,
    first_order_scores,
    fisher_scores,
    from_csr,
    global_magnitude_masks,
    hold_masks,
    magnitude_mask,
    n_m_mask,
    random_mask,
    std_threshold_mask,
    std_threshold_masks,
    threshold_mask,
    threshold_masks,
    to_csr,
    wanda_scores,
)
from nncomp.training import Callback, evaluate, fit

ROOT = Path(__file__).resolve().parent.parent
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


@given(st.integers(0, 9999), st.integers(1, 180))
@settings(max_examples=40, deadline=None)
def test_agrees_with_torch_prune(seed, count):
    seed_everything(seed)
    conv = nn.Conv2d(4, 5, (2, 5))  # 200 weights, no ties
    w = conv.weight.detach().clone()
    prune.l1_unstructured(conv, "weight", amount=count)
    assert torch.equal(magnitude_mask(w, count / 200), conv.weight_mask.bool())
    pair = nn.ModuleDict({"a": nn.Linear(9, 9), "b": nn.Linear(9, 5)})
    weights = {name: w.detach().clone() for name, w in named_weights(pair).items()}
    parts = [(pair["a"], "weight"), (pair["b"], "weight")]
    prune.global_unstructured(parts, prune.L1Unstructured, amount=count / 200)
    if not all(layer.weight_mask.any() for layer in pair.values()):
        with pytest.raises(ValueError, match="no signal passes any more"):
            global_magnitude_masks(weights, count / 200)
        return
    masks = global_magnitude_masks(weights, count / 200)
    assert torch.equal(masks["a.weight"], pair["a"].weight_mask.bool())
    assert torch.equal(masks["b.weight"], pair["b"].weight_mask.bool())


@given(st.lists(shapes, min_size=1, max_size=4), st.integers(0, 9999), fractions, fractions.filter(lambda f: not 0 < f < 1e-6))
@example([[1, 1]], 0, 1.0, 0.0)
@settings(max_examples=100, deadline=None)
def test_global_count_and_floor(sizes, seed, sparsity, floor):
    weights = {str(i): tensor(s, seed + i, DTYPES[i % 4]) for i, s in enumerate(sizes)}
    total = sum(w.numel() for w in weights.values())
    need = sum(math.ceil(floor * w.numel() - 1e-9) for w in weights.values())
    drop = round(sparsity * total)
    flat = torch.cat([w.flatten().double() for w in weights.values()])
    kept = magnitude_mask(flat, sparsity).split([w.numel() for w in weights.values()]) if total else []  # without a floor
    dead = not floor and any(w.ndim >= 2 and w.numel() and not mask.any() for w, mask in zip(weights.values(), kept))
    if not total or dead or (drop > total - need and floor):
        with pytest.raises(ValueError, match="no signal passes" if dead else None):
            global_magnitude_masks(weights, sparsity, floor=floor)
        return
    masks = global_magnitude_masks(weights, sparsity, floor=floor)
    assert sum(int((~m).sum()) for m in masks.values()) == drop
    for name, w in weights.items():
        assert masks[name].shape == w.shape
        assert int(masks[name].sum()) >= math.ceil(floor * w.numel() - 1e-9)
        stay, gone = w[masks[name]].abs(), w[~masks[name]].abs()
        assert not stay.numel() or not gone.numel() or stay.min() >= gone.max()  # by magnitude within each tensor
    if not floor:
        assert torch.equal(torch.cat([m.flatten() for m in masks.values()]), torch.cat(kept))


def test_global_never_raises_what_was_dropped():
    scores = {"a": torch.tensor([-math.inf, -math.inf, 3.0]), "b": torch.tensor([1.0, 2.0, 4.0])}
    masks = drop_lowest_global(scores, 4, floor=1 / 3)
    assert masks["a"].tolist() == [False, False, True] and masks["b"].tolist() == [False, False, True]


def test_a_dead_layer_is_named():
    weights = {"small": torch.full((1, 5), 0.1), "large": torch.ones(1, 5), "bias": torch.full((2,), 0.1)}
    with pytest.raises(ValueError, match="dropping 7 of 12 entries over all tensors removes all 5 entries of small"):
        global_magnitude_masks(weights, 7 / 12)
    masks = global_magnitude_masks(weights, 7 / 12, floor=0.01)
    assert masks["small"].sum() == 1 and masks["bias"].sum() == 1
    with pytest.raises(ValueError, match="removes all 5 entries of small"):
        global_magnitude_masks(weights, 1.0)


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
    assert n_m_mask(w, 4, 4).all()


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


@given(
    st.sampled_from(["sgd", "adam", "adamw"]), st.floats(0, 0.97), st.sampled_from([0.0, 1e-4, 0.1]), st.sampled_from([0.0, 1e-3]),
    st.sampled_from(["constant", "one-cycle"]), st.integers(0, 99), st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_masks_hold_whatever_the_optimizer(optimizer, sparsity, decay, l1, schedule, seed, biases):
    "Through training, a copy, another precision and a state dict; with biases or without."
    net = toy_net(seed)
    masks = {name: magnitude_mask(w, sparsity) for name, w in named_weights(net, biases=biases).items()}
    options = dict(optimizer=optimizer, weight_decay=decay, l1=l1, schedule=schedule, lr=0.05, seed=seed)
    train(net, [MaskCallback(masks)], epochs=2, **options)
    twin = copy.deepcopy(net).to(torch.float64)
    train(twin, [MaskCallback(masks)], epochs=1, **options)
    loaded = toy_net(seed + 1)
    loaded.load_state_dict(net.state_dict())
    for model in (net, twin, loaded):
        for name, mask in masks.items():
            gone = model.get_parameter(name)[~mask]
            assert (gone == 0).all() and not torch.signbit(gone).any()


TWO = """
    import torch
    from accelerate import PartialState
    from nncomp.core import named_weights
    from nncomp.pruning import MaskCallback, magnitude_mask
    from nncomp.schedules import Pruner, iterative_prune
    from nncomp.training import fit
    from toys import Stop, toy_data, toy_net
    rank, found = PartialState(cpu=True).process_index, {}
    options = dict(epochs=2, lr=0.02, batch_size=16, device="cpu", progress=False)

    def note(key, net, masks):
        found[key] = dict(state=net.state_dict(), masks={name: m.cpu() for name, m in masks.items()})

    for kind in ({"optimizer": "sgd"}, {"optimizer": "adam"}, {"optimizer": "adamw", "weight_decay": 0.1}):
        net = toy_net(rank)                                     # other weights in each process, so other masks
        hold = MaskCallback({name: magnitude_mask(w, 0.9) for name, w in named_weights(net).items()})
        fit(net, toy_data(n=33), callbacks=[hold], **kind, **options)
        note(f"{kind}", net, hold.masks)
    for scope in ("layer", "global"):
        net, pruner = toy_net(rank), Pruner(0.8, every=2, scope=scope)
        fit(net, toy_data(n=33), callbacks=[pruner], **options)
        note(f"pruner {scope}", net, pruner.masks)
    net = toy_net(rank)
    try: fit(net, toy_data(), callbacks=[Pruner(0.8, every=2), Stop(1)], checkpoint="run.pt", **options)
    except KeyboardInterrupt: pass
    PartialState().wait_for_everyone()
    net, pruner = toy_net(rank + 5), Pruner(0.8, every=2)
    fit(net, toy_data(), callbacks=[pruner, Stop(-1)], checkpoint="run.pt", **options)
    note("resumed", net, pruner.masks)
    net = toy_net(rank)
    masks, rounds = iterative_prune(net, toy_data(n=33), [0.5, 0.9], **options)
    note("rounds", net, masks)
    found["last"] = rounds[-1]["sparsity"], rounds[-1]["accuracy"]
    torch.save(found, f"{rank}.pt")
    PartialState().destroy_process_group()
"""


def test_masks_hold_in_two_processes(tmp_path):
    "Both processes end with the same masks (those of the first), the same weights, and zeros where the masks say so."
    (tmp_path / "script.py").write_text(textwrap.dedent(TWO))
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "script.py"]
    done = subprocess.run(launch, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(a) == 8 and a.pop("last") == b.pop("last")
    for key, one in a.items():
        assert all(torch.equal(one["state"][name], b[key]["state"][name]) for name in one["state"]), key
        for name, mask in one["masks"].items():
            assert torch.equal(mask, b[key]["masks"][name]), (key, name)
            assert (one["state"][name][~mask] == 0).all() and (one["state"][name][mask] != 0).all(), (key, name)
    first = {name: magnitude_mask(w, 0.9) for name, w in named_weights(toy_net(0)).items()}
    assert all(torch.equal(a["{'optimizer': 'adam'}"]["masks"][name], mask) for name, mask in first.items())


# --- masks of a whole model ---


def test_thresholds_by_name():
    net = toy_net()
    qualities = {"0.weight": 0.2, "0.bias": 0.1, "4.weight": 0.05, "1.weight": 0.3}    # a bias and a normalisation too, when named
    for make, one in ((std_threshold_masks, std_threshold_mask), (threshold_masks, threshold_mask)):
        masks = make(net, qualities)
        assert list(masks) == list(qualities)
        assert all(torch.equal(masks[name], one(net.get_parameter(name), q)) for name, q in qualities.items())
        assert set(make(net, 0.01)) == set(named_weights(net))
        with pytest.raises(ValueError, match="not a parameter of the model: fc1.weight, fc2.weight"):
            make(net, {"fc1.weight": 1.0, "0.weight": 1.0, "fc2.weight": 1.0})
        with pytest.raises(ValueError, match="nothing to prune"):
            make(nn.BatchNorm2d(3), 1.0)
        with pytest.raises(ValueError, match="nothing to prune"):
            make(net, {})
        with pytest.raises(ValueError, match=r"9.* removes all 512 entries of 4.weight"):
            make(net, {"4.weight": 9.0})
        assert not make(net, {"4.bias": 9.0})["4.bias"].any()
    for quality in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="quality must be finite and above 0, got .* for 4.weight"):
            std_threshold_masks(net, {"0.weight": 1.0, "4.weight": quality})


def test_a_dead_tensor_is_refused():
    net = toy_net()
    before = copy.deepcopy(net.state_dict())
    masks = {"0.weight": torch.ones(4, 1, 3, 3, dtype=torch.bool), "4.weight": torch.zeros(8, 64, dtype=torch.bool)}
    for call in (lambda: apply_masks_(net, masks), lambda: train(net, [MaskCallback(masks)]), lambda: finalize_pruning(net, masks)):
        with pytest.raises(ValueError, match="the mask removes all 512 entries of 4.weight"):
            call()
    assert all(torch.equal(v, before[name]) for name, v in net.state_dict().items())
    apply_masks_(net, {"4.bias": torch.zeros(8, dtype=torch.bool)})                       # a bias may go altogether
    assert (net[4].bias == 0).all()


@pytest.mark.parametrize("kind", ["conv1d", "conv3d", "embedding", "grouped"])
def test_first_order_against_finite_differences(kind):
    seed_everything(0)
    x, y = torch.randn(5, 2, 4, 4), torch.randint(0, 3, (5,))
    body = {"conv1d": [nn.Flatten(2), nn.Conv1d(2, 3, 3)], "conv3d": [nn.Unflatten(1, (1, 2)), nn.Conv3d(1, 3, 2)],
            "embedding": [nn.Flatten(), nn.Linear(32, 3)], "grouped": [nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4)]}[kind]
    net = nn.Sequential(*body, nn.Flatten(), nn.LazyLinear(3))
    net(x)
    net = net.double().eval()
    x = x.double()
    scores = first_order_scores(net.train(), [(x, y), (x[:3], y[:3])])
    assert net.training and all(p.grad is None for p in net.parameters()) and scores.keys() == named_weights(net).keys()
    net.eval()
    for name, w in named_weights(net).items():
        flat, i = w.data.view(-1), w.numel() // 2
        loss = lambda n: nn.functional.cross_entropy(net(x[:n]), y[:n]).item()  # noqa: E731
        whole, value = [loss(5), loss(3)], float(flat[i])
        flat[i] = value * (1 - 1e-5)
        change = [abs(a - b) * 1e5 for a, b in zip(whole, [loss(5), loss(3)])]
        flat[i] = value
        assert float(scores[name].view(-1)[i]) == pytest.approx(sum(change) / 2, rel=1e-3, abs=1e-9)


def test_scores_take_a_split_as_well():
    net, data = toy_net(), toy_data()
    for score in first_order_scores, wanda_scores:
        whole, batched = score(net, data.train), score(net, data.batches("train", 250, shuffle=False))
        assert all(torch.equal(whole[name], batched[name]) for name in batched) and any(s.any() for s in whole.values())
        with pytest.raises(ValueError, match="no batches"):
            score(net, data.train.take(slice(0)))


def test_first_order_leaves_frozen_and_unused_alone():
    net = toy_net()
    net[0].weight.requires_grad_(False)
    net.unused = nn.Linear(3, 3)
    net.forward = lambda x: nn.Sequential(*list(net.children())[:7])(x)
    data = toy_data()
    scores = first_order_scores(net, data.batches("train", 32))
    assert set(scores) == {"4.weight", "6.weight", "unused.weight"} and not scores["unused.weight"].any() and scores["4.weight"].any()
    masks = drop_lowest_global(scores, 200, floor=0.01)
    assert sum(int((~m).sum()) for m in masks.values()) == 200
    bad = copy.deepcopy(toy_net())
    bad[4].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the score of .* holds"):
        first_order_scores(bad, data.batches())


@pytest.mark.parametrize("kind", ["conv1d", "conv3d", "grouped", "tokens", "transposed"])
def test_wanda_is_what_the_layer_s_output_moves(kind):
    "By brute force, layer by layer and weight by weight, in the middle of a network."
    seed_everything(0)
    body = {"conv1d": [nn.Flatten(2), nn.Conv1d(2, 3, 3, stride=2)], "conv3d": [nn.Unflatten(1, (1, 2)), nn.Conv3d(1, 3, 2)],
            "grouped": [nn.Conv2d(2, 4, 3, groups=2, padding="same", bias=False), nn.BatchNorm2d(4)],
            "tokens": [nn.Flatten(2), nn.Linear(16, 5)], "transposed": [nn.ConvTranspose2d(2, 3, 2, padding=1, output_padding=0)]}[kind]
    net = nn.Sequential(*body, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(7, 2, 4, 4, dtype=torch.float64)
    net.double()(x)
    hooks = {m: dict(m._forward_pre_hooks) for m in net.modules()}
    scores = wanda_scores(net.train(), [(x[:4], None), (x[4:], None)])
    assert all(m.training for m in net.modules()) and all(p.grad is None for p in net.parameters())
    assert hooks == {m: dict(m._forward_pre_hooks) for m in net.modules()}
    net.eval()
    assert scores.keys() == named_weights(net).keys()
    for name, w in named_weights(net).items():
        layer, shown = net.get_submodule(name.rpartition(".")[0]), []
        with layer.register_forward_hook(lambda _, args, out, shown=shown: shown.append((args[0].detach(), out.detach()))):
            net(x)
        ((inputs, whole),) = shown
        for i in range(0, w.numel(), 5):
            value = float(w.data.view(-1)[i])
            w.data.view(-1)[i] = 0
            moved = (layer(inputs).detach() - whole).square().sum() / 7
            w.data.view(-1)[i] = value
            assert float(scores[name].view(-1)[i]) == pytest.approx(float(moved.sqrt()), rel=1e-6, abs=1e-12)


def test_wanda_with_layers_it_cannot_see():
    "Weights that are no layer's, or whose layer does not run, are named; a failing pass leaves no hook behind."
    net, data = toy_net(), toy_data()
    net[0].weight.requires_grad_(False)
    net.unused = nn.Linear(3, 3)
    net.forward = lambda x: nn.Sequential(*list(net.children())[:7])(x)
    with pytest.warns(UserWarning, match="no scores for unused.weight"):
        scores = wanda_scores(net, data.batches("train", 32))
    assert set(scores) == {"0.weight", "4.weight", "6.weight"}
    with pytest.raises(RuntimeError):
        wanda_scores(net, [(torch.zeros(2, 7), None)])
    assert not any(m._forward_pre_hooks for m in net.modules())
    bad = copy.deepcopy(toy_net())
    bad[4].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the score of .* holds"):
        wanda_scores(bad, data.batches())
    with pytest.raises(ValueError, match="no batches"):
        wanda_scores(toy_net(), [])


class Rectified(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


def test_wanda_of_layers_that_do_more_than_multiply():
    net = nn.Sequential(Standardised(1, 3, 3), nn.Flatten(), Rectified(108, 5), nn.Linear(5, 4))
    with pytest.warns(UserWarning, match="no scores for 0.weight, 2.weight: .* plain linear"):
        assert set(wanda_scores(net, [(torch.randn(4, 1, 8, 8), None)])) == {"3.weight"}
    tied = nn.Sequential(nn.Embedding(7, 5), nn.Flatten(), nn.Linear(10, 5), nn.Linear(5, 7, bias=False))
    tied[3].weight = tied[0].weight
    with pytest.warns(UserWarning, match="no scores for 0.weight"):
        assert set(wanda_scores(tied, [(torch.randint(0, 7, (4, 2)), None)])) == {"2.weight"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_wanda_in_other_types_and_under_autocast(dtype):
    data = toy_data()
    exact = wanda_scores(toy_net(), data.batches())
    for name, s in wanda_scores(toy_net().to(dtype), data.batches()).items():
        assert s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(s.float(), exact[name], rtol=0.05, atol=0.01 * float(exact[name].max()))
    with torch.autocast("cpu", torch.bfloat16):
        for name, s in wanda_scores(toy_net(), data.batches()).items():
            torch.testing.assert_close(s, exact[name], rtol=0.05, atol=0.01 * float(exact[name].max()))


@given(shapes, st.sampled_from(DTYPES), st.integers(0, 999))
@settings(deadline=None)
def test_fisher_is_the_quadratic_mean_of_weight_times_gradient(shape, dtype, seed):
    "By brute force over batches; never below the absolute mean, and equal to it where there is one batch."
    g = torch.Generator().manual_seed(seed)
    w, gradients = torch.randn(shape, generator=g).to(dtype), torch.randn(5, *shape, generator=g).double()
    if not w.numel():
        with pytest.raises(ValueError, match="nothing to prune"):
            fisher_scores({"w": w}, {"w": gradients.square().mean(0)})
        return
    before = w.clone()
    scores = fisher_scores({"w": w}, {"w": gradients.square().mean(0)})["w"]
    assert scores.shape == w.shape and scores.dtype in (torch.float32, torch.float64) and not scores.requires_grad
    assert torch.equal(w, before)
    for i in range(w.numel()):
        products = [float(w.view(-1)[i]) * float(one.reshape(-1)[i]) for one in gradients]
        assert float(scores.view(-1)[i]) == pytest.approx(math.sqrt(sum(x * x for x in products) / 5), rel=1e-5, abs=1e-12)
        assert float(scores.view(-1)[i]) >= sum(map(abs, products)) / 5 * (1 - 1e-5)
    single = fisher_scores({"w": w}, {"w": gradients[0].square()})["w"]
    torch.testing.assert_close(single.double(), (w.double() * gradients[0]).abs(), rtol=1e-5, atol=1e-12)


def test_fisher_ranks_a_tensor_by_magnitude_where_gradients_are_alike():
    w = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    scores = fisher_scores({"w": w.requires_grad_()}, {"w": torch.full((6, 7), 1e-30)})
    assert torch.equal(drop_lowest(scores["w"], 20), magnitude_mask(w, 20 / 42))          # tiny squares: their roots still differ
    joint = drop_lowest_global(fisher_scores({"a": w, "b": w}, {"a": torch.ones(6, 7), "b": torch.full((6, 7), 4.0)}), 42)
    assert 0 < int(joint["a"].sum()) < int(joint["b"].sum())                              # the steeper layer keeps more


def test_bad_fisher():
    w = torch.ones(2, 3)
    for weights, squares, text in (({"w": w}, {}, "w has no squared gradients"),
                                   ({"w": w}, {"w": torch.ones(3, 2)}, r"w has shape \(2, 3\), .* \(3, 2\)"),
                                   ({"w": w}, {"w": -w}, "of w is below 0"), ({"w": w}, {"w": w / 0}, "squared gradient of w holds 6"),
                                   ({"w": w * math.nan}, {"w": w}, "w holds 6 NaN"), ({}, {}, "nothing to prune")):
        with pytest.raises(ValueError, match=text):
            fisher_scores(weights, squares)


# --- a plain module ---


def test_finalize_ends_torch_prune():
    seed_everything(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 3)).eval()
    plain = copy.deepcopy(net)
    prune.l1_unstructured(net[0], "weight", 0.5)
    prune.random_unstructured(net[0], "weight", 0.5)                                      # twice: a container of methods
    prune.l1_unstructured(net[0], "bias", 1)
    prune.ln_structured(net[4], "weight", 2, n=2, dim=0)
    prune.global_unstructured([(net[5], "weight")], prune.L1Unstructured, amount=7)
    x = torch.randn(6, 1, 4, 4)
    out = net(x)
    masks = {"0.weight": net[0].weight_mask.bool(), "4.weight": net[4].weight_mask.bool(), "5.weight": net[5].weight_mask.bool()}
    finalize_pruning(net)
    assert torch.equal(net(x), out) and set(net.state_dict()) == set(plain.state_dict())
    for module, fresh in zip(net.modules(), plain.modules()):
        assert set(vars(module)) - set(vars(fresh)) == set() and not module._forward_pre_hooks
    for name, mask in masks.items():
        w = net.get_parameter(name)
        assert (w[~mask] == 0).all() and not torch.signbit(w[~mask]).any()
    plain.load_state_dict(net.state_dict())
    copy.deepcopy(net), finalize_pruning(net)
    assert torch.equal(plain(x), net(x)) and evaluate(net, [(x, torch.zeros(6, dtype=torch.int64))]).n == 6


# --- sparse rows ---


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(0, 9999), st.sampled_from(DTYPES), fractions,
       st.sampled_from([torch.int32, torch.int64]))
@settings(max_examples=100, deadline=None)
def test_csr_there_and_back(shape, seed, dtype, sparsity, indices):
    w = tensor(shape, seed, dtype)
    w = w.masked_fill(~magnitude_mask(w, sparsity), 0.0)
    csr = to_csr(w, indices=indices)
    back = from_csr(csr, w.shape)
    assert back.dtype == dtype and torch.equal(back, w) and not torch.signbit(back[back == 0]).any()
    rows = 1 if w.ndim == 1 else w.shape[0]
    assert csr_bytes(csr) == int(w.count_nonzero()) * (dtype.itemsize + indices.itemsize) + (rows + 1) * indices.itemsize
    sparse = pytest.importorskip("scipy.sparse")
    flat = w.double().reshape(1, -1) if w.ndim == 1 else w.double().flatten(1)
    theirs = sparse.csr_matrix(flat.numpy())
    for a, b in ((theirs.indptr, csr.crow_indices()), (theirs.indices, csr.col_indices()), (theirs.data, csr.values().double())):
        assert np.array_equal(a, b.numpy())


def test_csr_keeps_bits_and_multiplies():
    w = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    w = w.masked_fill(~magnitude_mask(w, 0.8), 0.0)
    w[3, 4], w[5, 6] = float("nan"), float("inf")
    assert torch.equal(from_csr(to_csr(w), w.shape).view(torch.int32), w.view(torch.int32))
    clean = w.nan_to_num(0.0, posinf=0.0)
    x = torch.randn(30, 7)
    torch.testing.assert_close(to_csr(clean) @ x, clean @ x)
    assert to_csr(nn.Parameter(clean)).requires_grad is False
    for bad, text in ((lambda: to_csr(torch.tensor(1.0)), "no rows"), (lambda: to_csr(w, indices=torch.uint8), "indices must be")):
        with pytest.raises(ValueError, match=text):
            bad()


@pytest.mark.parametrize(("call", "told"), [
    (lambda: magnitude_mask(torch.ones(3), 1.5, name="fc1.weight"), "sparsity of fc1.weight must lie"),
    (lambda: magnitude_mask(torch.ones(3, dtype=torch.bool), 0.5, name="fc1.weight"), "fc1.weight must be floating, got torch.bool"),
    (lambda: std_threshold_mask(torch.ones(3, dtype=torch.int64), 1., name="fc1.weight"), "fc1.weight must be floating, got torch.int64"),
    (lambda: threshold_mask(torch.ones(3, dtype=torch.complex64), 1.), "weight must be floating"),
    (lambda: n_m_mask(torch.ones(4, 4), 2, 4, dim=7), "has no dimension 7"),
    (lambda: n_m_mask(torch.ones(4, 4), 0, 4), "n must"),
])
def test_what_cannot_be_ranked(call, told):
    with pytest.raises(ValueError, match=told):
        call()


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: torch.optim.Adam(p, 0.01),
    lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1)])
def test_hold_masks_in_a_loop_of_ones_own(make):
    seed_everything(0)
    net = copy.deepcopy(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
    optimizer, masks = make(net.parameters()), {}

    def step():
        optimizer.zero_grad()
        net(torch.randn(32, 8)).square().mean().backward()
        optimizer.step()

    step()
    masks = {name: magnitude_mask(w, 0.5, name=name) for name, w in named_weights(net).items()}
    hooks = hold_masks(net, optimizer, masks)
    for _ in range(5):
        step()
        for name, w in named_weights(net).items():
            assert torch.equal(w != 0, masks[name]) and not torch.signbit(w[~masks[name]]).any()
            assert not w.grad[~masks[name]].any()
    hooks.close()
    step()
    assert all((w != 0).any() for w in named_weights(net).values())
    with pytest.raises(ValueError, match="masks do not fit the model: zz is not"):
        hold_masks(net, optimizer, {"zz": torch.ones(2, 2, dtype=torch.bool)})


def test_a_resumed_run_with_other_masks_is_refused():
    one, other = (MaskCallback({"w": torch.tensor([[True, False], [keep, True]])}) for keep in (True, False))
    assert one.identity() != other.identity() == MaskCallback(other.masks).identity()


# --- masks in loops of one's own, and in files ---


@given(
    st.sampled_from([lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1)]),
    st.floats(0, 0.9), st.integers(0, 99), st.integers(0, 3),
)
@settings(max_examples=20, deadline=None)
def test_hold_masks_holds_and_is_attached_again_to_a_copy(make, sparsity, seed, steps):
    net, data = toy_net(seed), toy_data(seed)
    masks, optimizer = toy_masks(net, sparsity), make(net.parameters())

    def train_on(net, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(data.train.x), data.train.y).backward()
            optimizer.step()
            assert all((net.get_parameter(name)[~mask] == 0).all() for name, mask in masks.items())

    hooks = hold_masks(net, optimizer, masks)
    train_on(net, optimizer, steps)
    twin, its_optimizer = copy.deepcopy((net, optimizer))
    with pytest.raises(ValueError, match="the optimizer does not train 0.weight, 4.weight, 6.weight of this model"):
        hold_masks(twin, optimizer, masks)
    hold_masks(twin, its_optimizer, masks)
    train_on(net, optimizer, 2), train_on(twin, its_optimizer, 2)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters()))
    hooks.close()
    net.requires_grad_(False)
    hold_masks(net, make(twin.parameters()), masks)  # what is frozen needs no optimizer to hold it


@pytest.mark.parametrize("call, message", [
    (lambda net: MaskCallback({"w": [1, 0]}), "the mask of w must be a bool tensor, got a list"),
    (lambda net: apply_masks_(net, {"4.weight": None}), "the mask of 4.weight must be a bool tensor, got a NoneType"),
    (lambda net: magnitude_mask(torch.ones(4), True), r"sparsity of weight must lie in \[0, 1\], got True"),
    (lambda net: random_mask(torch.ones(4), np.True_, None, name="fc1.weight"), "sparsity of fc1.weight must lie in"),
    (lambda net: global_magnitude_masks({"w": torch.ones(4)}, False), "sparsity must lie in"),
    (lambda net: std_threshold_mask(torch.ones(4), "1", name="fc1.weight"), "above 0, got '1' for fc1.weight"),
    (lambda net: std_threshold_masks(net, None), "above 0, got None for 0.weight"),
    (lambda net: threshold_masks(net, {"4.weight": torch.ones(2)}), "threshold must be finite and at least 0"),
    (lambda net: n_m_mask(torch.ones(3), name="fc1.weight"), r"fc1.weight of shape \(3,\) has no dimension 1"),
    (lambda net: n_m_mask(torch.full((2, 4), math.nan), name="fc1.weight"), "fc1.weight holds 8 NaN"),
])
def test_wrong_arguments_are_one_named_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(toy_net())


def test_a_lone_mask_may_be_empty_and_a_model_refuses_it():
    net = toy_net()
    w = net[6].weight
    for mask in (magnitude_mask(w, 1.0), random_mask(w, 1.0, None), threshold_mask(w, 99.0), std_threshold_mask(w, 99.0)):
        assert not mask.any()
        for call in (lambda: apply_masks_(net, {"6.weight": mask}), lambda: train(net, [MaskCallback({"6.weight": mask})])):  # noqa: B023
            with pytest.raises(ValueError, match="the mask removes all 24 entries of 6.weight"):
                call()


def test_two_names_of_one_tensor_have_one_mask():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3))
    net[2].weight = net[1].weight
    before = net[1].weight.detach().clone()
    masks = {name: magnitude_mask(before, s) for name, s in (("1.weight", 0.5), ("2.weight", 0.25))}
    for call in (lambda: apply_masks_(net, masks), lambda: train(net, [MaskCallback(masks)]), lambda: finalize_pruning(net, masks)):
        with pytest.raises(ValueError, match="2.weight and 1.weight are one tensor"):
            call()
    assert torch.equal(net[1].weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_first_order_takes_images_of_another_type(dtype):
    net, data = toy_net().to(dtype), toy_data()
    scores = first_order_scores(net, [(data.train.x, data.train.y)])
    exact = first_order_scores(copy.deepcopy(net).float(), [(data.train.x, data.train.y)])
    for name, s in scores.items():
        assert s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(s.float(), exact[name], rtol=0.1, atol=0.1 * float(exact[name].max()))


def test_finalize_checks_before_it_unwraps():
    net = toy_net()
    for layer in (net[4], net[6]):
        prune.l1_unstructured(layer, "weight", amount=0.5)
    names = list(net.state_dict())
    with pytest.raises(ValueError, match=r"6.weight has shape \(3, 8\), its mask \(8, 3\)"):
        finalize_pruning(net, {"6.weight": torch.ones(8, 3, dtype=torch.bool)})
    assert list(net.state_dict()) == names
    nn.utils.parametrizations.weight_norm(net[0])
    with pytest.raises(ValueError, match="0 computes weight by a parametrization.*remove_parametrizations"):
        finalize_pruning(net)
    assert "4.weight_mask" in net.state_dict()
    nn.utils.parametrize.remove_parametrizations(net[0], "weight")
    finalize_pruning(net, {"6.weight": magnitude_mask(net[6].weight, 0.75)})
    assert set(net.state_dict()) == set(toy_net().state_dict())
    assert int((net[4].weight == 0).sum()) == 256 and int((net[6].weight == 0).sum()) == 18


ZOO = ["resnet18", "mobilenet_v2", "vgg11", "squeezenet1_1"]


@pytest.mark.parametrize("name", ZOO)
def test_files_of_the_zoo_shrink_as_sparsity_grows(name, tmp_path):
    "Global pruning, a plain module, a file that loads back; smaller at each sparsity, the first of them smaller than the dense one."
    models = pytest.importorskip("torchvision.models")
    seed_everything(0)
    if name == "vgg11":  # the convolutions, and one dense layer in place of 123 million weights
        with torch.device("meta"):
            net = models.vgg11(num_classes=10)
        net.classifier = nn.Linear(512, 10)
        net.avgpool = nn.AdaptiveAvgPool2d(1)
        net = net.to_empty(device="cpu")
        for module in net.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    else:
        net = getattr(models, name)(num_classes=10)
    net.eval()
    x, sizes = torch.randn(2, 3, 64, 64), []
    for sparsity in (0.0, 0.9, 0.98):
        masks = global_magnitude_masks(named_weights(net), sparsity, floor=0.001)
        finalize_pruning(net, masks)
        weights = torch.cat([w.flatten() for w in named_weights(net).values()])
        assert int((weights == 0).sum()) == round(sparsity * weights.numel())
        path = tmp_path / f"{sparsity}.nncomp"
        save(net, path)
        state = load(path)
        assert all(torch.equal(v, state[key]) for key, v in net.state_dict().items())
        sizes.append(path.stat().st_size)
        with torch.no_grad():
            out = net(x)
        assert out.shape == (2, 10) and torch.isfinite(out).all()
    assert sizes[0] > 3 * sizes[1] and sizes[1] > 2 * sizes[2]


@pytest.mark.parametrize("hook", ["forward", "pre", "detach"])
def test_wanda_scores_do_not_run_hooks_on_their_own_pass(hook):
    torch.manual_seed(0)
    net, x, calls = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 3)), torch.randn(8, 2, 6, 6), []
    plain = wanda_scores(net, [(x, None)])["0.weight"]
    if hook == "pre":
        net[0].register_forward_pre_hook(lambda _, args: calls.append(1) or (args[0] * 3,))
    elif hook == "forward":
        net[0].register_forward_hook(lambda m, args, out: calls.append(1) or out * 3)
    else:
        net[0].register_forward_hook(lambda m, args, out: calls.append(1) or out.detach())
    found = wanda_scores(net, [(x, None)])["0.weight"]
    assert torch.allclose(found, plain * (3 if hook == "pre" else 1), rtol=1e-5) and len(calls) == 1


def test_first_order_scores_take_classes_of_any_integer_type():
    net, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.randint(0, 3, (6,))
    whole = first_order_scores(net, [(x, y)])["weight"]
    assert all(torch.equal(first_order_scores(net, [(x, y.to(t))])["weight"], whole) for t in (torch.uint8, torch.int16, torch.int32))
    recurrent = nn.LSTM(4, 3).eval()
    assert first_order_scores(recurrent, [(x, y)], loss=lambda out, y: out[0].sum())["weight_ih_l0"].any()
    assert torch.backends.cudnn.enabled
