"Training: equal seeds give equal bits, resumed and shared runs equal whole ones, every bad setting is refused before anything moves."
import itertools
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from nncomp.core import MissingExtraError, seed_everything
from nncomp.data import Data, Split
from nncomp.deep_compression import Recipe, deep_compress
from nncomp.training import Callback, Metrics, Run, _share, evaluate, fit, lr_factor, penalty

ROOT = Path(__file__).resolve().parent.parent
QUIET = {"progress": False, "device": "cpu"}


def toy_data(n=96, size=4, seed=0):
    "Three classes of images, told apart by their mean."
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n + 64) % 3
    x = torch.randn(n + 64, 1, size, size, generator=g) + y.view(-1, 1, 1, 1) - 1
    return Data("toy", Split(x[:n], y[:n]), Split(x[n:n + 32], y[n:n + 32]), Split(x[n + 32:], y[n + 32:]), 3)


def toy_net(seed=0, dropout=0.3):
    seed_everything(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(16, 3))


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def no_seconds(history):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history]


class Stop(Callback):
    "Interrupt the run after a number of steps."
    def __init__(self, at): self.at = at
    def after_step(self, run):
        if run.step == self.at:
            raise KeyboardInterrupt


# ---------------------------------------------------------------- learning rate and penalty

@given(st.sampled_from(["one-cycle", "step", "cosine", "constant"]), st.integers(1, 500))
@settings(deadline=None)
def test_factors_lie_in_the_unit_interval(schedule, total):
    factors = [lr_factor(schedule, s, total) for s in range(total)]
    assert all(0 < f <= 1 + 1e-12 for f in factors)
    if schedule == "one-cycle":
        top = factors.index(max(factors))
        assert factors[:top] == sorted(factors[:top]) and factors[top:] == sorted(factors[top:], reverse=True)
        assert max(factors) > 0.8  # the peak can fall between two steps of a run of four
    else:
        assert factors == sorted(factors, reverse=True) and factors[0] == 1


@pytest.mark.parametrize("total", [4, 5, 10, 33, 1000])
def test_one_cycle_is_torchs(total):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    oracle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=total, cycle_momentum=False)
    for step in range(total):
        assert lr_factor("one-cycle", step, total) == pytest.approx(oracle.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        if step < total - 1:
            oracle.step()


@pytest.mark.parametrize("bad", [("cosin", 0, 5), ("cosine", 5, 5), ("cosine", -1, 5), ("cosine", 0, 0), ("cosine", 0.5, 5)])
def test_bad_factor_arguments(bad):
    with pytest.raises(ValueError):
        lr_factor(*bad)


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=20), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None)
def test_gradient_of_the_penalty(values, l1, l2):
    w = torch.tensor(values, requires_grad=True)
    value = penalty([w], l1=l1, l2=l2)
    if l1 or l2:
        value.backward()
        torch.testing.assert_close(w.grad, l1 * w.detach().sign() + 2 * l2 * w.detach())


# ---------------------------------------------------------------- evaluate

@given(st.integers(1, 50), st.integers(2, 6), st.integers(1, 60), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_evaluate_counts_as_by_hand(n, classes, batch_size, seed):
    g = torch.Generator().manual_seed(seed)
    logits, y = torch.randn(n, 1, 1, classes, generator=g), torch.randint(classes, (n,), generator=g)
    found = evaluate(nn.Flatten(), Split(logits, y), batch_size=batch_size)
    errors = sum(int(row.argmax() != label) for row, label in zip(logits.flatten(1), y))
    assert (found.n, found.errors, found.accuracy) == (n, errors, (n - errors) / n)
    assert found.error_percent == 100 * errors / n
    assert found.loss == pytest.approx(F.cross_entropy(logits.flatten(1), y).item(), rel=1e-5)


def test_evaluate_leaves_no_trace():
    net, data = toy_net(), toy_data()
    net[1].eval()
    before, modes = {k: v.clone() for k, v in net.state_dict().items()}, [m.training for m in net.modules()]
    state = torch.get_rng_state()
    a = evaluate(net, data.test)
    assert a == evaluate(net, data.batches("test", 1000)) == evaluate(net, data.test, device="cpu")
    assert evaluate(net, data.batches("test", 7)).errors == a.errors
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert modes == [m.training for m in net.modules()] and torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in net.parameters())


def test_evaluate_puts_modes_back_after_an_error():
    class Broken(nn.Module):
        def forward(self, x): raise RuntimeError("broken")
    net = nn.Sequential(Broken(), nn.Dropout())
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(net, toy_data().test)
    assert net[1].training


def test_metrics():
    assert Metrics(10_000, 0.1, 0.9859, 141).error_percent == 1.41
    with pytest.raises(ValueError, match="no examples"):
        evaluate(nn.Flatten(), [])


# ---------------------------------------------------------------- fit

@pytest.mark.parametrize("options", [
    {}, {"optimizer": "sgd", "momentum": 0.0}, {"optimizer": "adamw", "weight_decay": 0.1}, {"schedule": "step"},
    {"schedule": "cosine", "l1": 1e-4}, {"mixed_precision": "bf16"}, {"channels_last": True},
    {"augment": lambda xb, g: xb + 0.1 * torch.randn(xb.shape, generator=g)},
], ids=[*map(str, range(7)), "augment"])
def test_equal_seeds_equal_bits(options):
    data, kind = toy_data(), QUIET | dict(epochs=2, batch_size=20, lr=0.01) | options
    nets = [toy_net() for _ in range(3)]
    state = torch.get_rng_state()
    histories = [fit(net, data, seed=seed, **kind) for net, seed in zip(nets, (3, 3, 4))]
    assert torch.equal(state, torch.get_rng_state())
    assert same(nets[0], nets[1]) and not same(nets[0], nets[2])
    assert no_seconds(histories[0]) == no_seconds(histories[1])
    assert all(p.is_contiguous() and p.dtype == torch.float32 for p in nets[0].parameters())


def test_it_learns():
    data, net = toy_data(), toy_net(dropout=0.0)
    history = fit(net, data, epochs=15, batch_size=16, lr=0.02, **QUIET)
    assert [r["epoch"] for r in history] == list(range(1, 16)) and history[-1]["accuracy"] > 0.9
    test = evaluate(net, data.valid)
    assert (history[-1]["valid_loss"], history[-1]["valid_accuracy"]) == (test.loss, test.accuracy)
    assert set(history[0]) == {"epoch", "loss", "accuracy", "valid_loss", "valid_accuracy", "lr", "seconds"}


def test_loss_in_the_history_is_the_mean_over_images():
    "With a learning rate of zero the epoch's loss is the training split's, last small batch and penalty or not."
    data, net = toy_data(n=50), toy_net(dropout=0.0).eval()
    net[1] = nn.Identity()
    expected = evaluate(net, data.train)
    record = fit(net, data, epochs=1, batch_size=16, lr=0.0, l2=0.1, optimizer="sgd", **QUIET)[0]
    assert record["loss"] == pytest.approx(expected.loss, rel=1e-6) and record["accuracy"] == expected.accuracy


def test_a_loss_of_ones_own():
    def smooth(model, xb, yb):
        logits = model(xb)
        return F.cross_entropy(logits, yb, label_smoothing=0.2), logits
    data, a, b = toy_data(), toy_net(), toy_net()
    assert fit(a, data, epochs=1, loss=smooth, **QUIET)[0]["loss"] != fit(b, data, epochs=1, **QUIET)[0]["loss"]
    assert not same(a, b)


def test_frozen_and_tied_parameters():
    data = toy_data()
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 3))
    net[3].weight = net[1].weight
    net[4].requires_grad_(False)
    before = net[4].weight.clone()
    fit(net, data, epochs=1, l1=1e-3, **QUIET)
    assert torch.equal(net[4].weight, before) and net[3].weight is net[1].weight


def test_groups_that_a_callback_adds_follow_the_schedule():
    class Own(Callback):
        def before_fit(self, run):
            self.t = nn.Parameter(torch.zeros(1, device=run.device))
            run.optimizer.add_param_group({"params": [self.t], "lr": 0.5})
            self.seen = []
        def extra_loss(self, run): return (self.t - 1).square().sum()
        def after_step(self, run): self.seen.append([g["lr"] for g in run.optimizer.param_groups])
        def state_dict(self): return {"t": self.t.detach()}
        def load_state_dict(self, state): self.t.data.copy_(state["t"])
    own = Own()
    fit(toy_net(), toy_data(), epochs=2, lr=0.1, batch_size=32, schedule="cosine", optimizer="sgd", momentum=0.0, callbacks=[own], **QUIET)
    assert own.t.item() > 0.9
    assert own.seen == [[pytest.approx(0.1 * lr_factor("cosine", s, 6)), pytest.approx(0.5 * lr_factor("cosine", s, 6))] for s in range(6)]


def test_run_tells_callbacks_where_it_is():
    seen, data = [], toy_data(n=50)

    class Look(Callback):
        def before_fit(self, run):
            assert isinstance(run, Run) and run.epoch == run.step == 0 and run.steps_per_epoch == 4 and run.total_steps == 8
        def after_step(self, run): seen.append((run.epoch, run.step, run.index.tolist()))
        def after_epoch(self, run): assert len(run.history) == run.epoch
    fit(toy_net(), data, epochs=2, batch_size=16, callbacks=[Look()], **QUIET)
    assert [s[:2] for s in seen] == [(e, 4 * e + i) for e in range(2) for i in range(1, 5)]
    for e in range(2):
        assert sorted(itertools.chain(*(s[2] for s in seen if s[0] == e))) == list(range(50))
    assert seen[0][2] != seen[4][2]


def test_without_validation_images_and_without_epochs():
    data = toy_data()
    empty = replace(data, valid=Split(data.valid.x[:0], data.valid.y[:0]))
    assert math.isnan(fit(toy_net(), empty, epochs=1, **QUIET)[0]["valid_accuracy"])
    net = toy_net()
    assert fit(net, data, epochs=0, **QUIET) == [] and same(net, toy_net())
    with pytest.raises(ValueError, match="empty"):
        fit(net, replace(data, train=empty.valid), **QUIET)


@pytest.mark.parametrize("bad", [
    {"epochs": -1}, {"epochs": 1.5}, {"lr": -0.1}, {"lr": math.nan}, {"batch_size": 0}, {"optimizer": "rmsprop"}, {"schedule": "onecycle"},
    {"l1": -1}, {"l2": math.inf}, {"seed": -1}, {"mixed_precision": "fp8"}, {"weight_decay": -1}, {"momentum": -0.5},
], ids=str)
def test_bad_settings_change_nothing(bad):
    net = toy_net()
    with pytest.raises(ValueError, match=next(iter(bad))):
        fit(net, toy_data(), **QUIET | bad)
    assert same(net, toy_net())


def test_nan_names_epoch_and_step(tmp_path):
    data = toy_data()

    class Poison(Callback):
        def after_step(self, run):
            if run.step == 8:
                with torch.no_grad():
                    run.model[5].bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan in epoch 2, step 3 of 6"):
        fit(toy_net(), data, epochs=3, batch_size=16, callbacks=[Poison()], checkpoint=tmp_path / "run.pt", **QUIET)
    assert torch.load(tmp_path / "run.pt", weights_only=True)["epoch"] == 1


def test_half_precision_on_the_cpu():
    net = toy_net()
    history = fit(net, toy_data(), epochs=2, batch_size=32, mixed_precision="fp16", **QUIET)
    assert math.isfinite(history[-1]["loss"]) and not same(net, toy_net())


def test_bar_and_its_absence(capfd):
    for progress in (False, True):
        fit(toy_net(), toy_data(), epochs=2, progress=progress, device="cpu")
        out, err = capfd.readouterr()
        assert out == "" and ("epoch 2/2" in err and "accuracy" not in err[:20]) == (progress and not os.environ.get("TQDM_DISABLE"))


def test_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = fit(toy_net(), toy_data(), epochs=3, log_dir=tmp_path / "logs", **QUIET)
    events = accumulator.EventAccumulator(str(tmp_path / "logs")).Reload()
    for key in ("loss", "accuracy", "valid_loss", "valid_accuracy", "lr"):
        assert [(e.step, pytest.approx(e.value, rel=1e-5)) for e in events.Scalars(key)] == [(r["epoch"], r[key]) for r in history]


# ---------------------------------------------------------------- interruption and resumption

@pytest.mark.parametrize("options", [
    {}, {"optimizer": "sgd", "l2": 1e-3}, {"optimizer": "adamw", "schedule": "step"}, {"channels_last": True}, {"mixed_precision": "bf16"},
    {"mixed_precision": "fp16"},
], ids=str)
@pytest.mark.parametrize("at", [7, 12, 16])
def test_resume_is_the_same_run(tmp_path, options, at):
    data, kind = toy_data(), QUIET | dict(epochs=3, batch_size=16, lr=0.01) | options      # 6 steps an epoch
    whole, parts = toy_net(), toy_net()
    history = fit(whole, data, callbacks=[Stop(-1)], **kind)
    with pytest.raises(KeyboardInterrupt, match=f"stopped in epoch {(at - 1) // 6 + 1}.*holds {(at - 1) // 6} of 3 epochs"):
        fit(parts, data, callbacks=[Stop(at)], checkpoint=tmp_path / "run.pt", **kind)
    again = toy_net(seed=9)
    history_again = fit(again, data, callbacks=[Stop(-1)], checkpoint=tmp_path / "run.pt", **kind)
    assert same(whole, again) and no_seconds(history) == no_seconds(history_again)
    assert os.listdir(tmp_path) == ["run.pt"]
    third = toy_net(seed=5)
    assert no_seconds(fit(third, data, callbacks=[Stop(-1)], checkpoint=tmp_path / "run.pt", **kind)) == no_seconds(history)
    assert same(whole, third)


def test_interrupted_before_anything_was_kept(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="nothing was kept; name a file"):
        fit(toy_net(), toy_data(), callbacks=[Stop(1)], **QUIET)
    with pytest.raises(KeyboardInterrupt, match="epoch 1: nothing was kept$"):
        fit(toy_net(), toy_data(), callbacks=[Stop(1)], checkpoint=tmp_path / "run.pt", **QUIET)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    write, calls = torch.save, []

    def slow_save(value, path):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        write(value, path)
    monkeypatch.setattr(torch, "save", slow_save)
    with pytest.raises(KeyboardInterrupt, match="holds 1 of 3 epochs"):
        fit(toy_net(), toy_data(), epochs=3, checkpoint=tmp_path / "run.pt", **QUIET)
    assert os.listdir(tmp_path) == ["run.pt"] and torch.load(tmp_path / "run.pt", weights_only=True)["epoch"] == 1


def test_ctrl_c(tmp_path):
    "A real signal to a real process; the next call goes on from the file."
    script = f"""
        import test_training as t
        t.fit(t.toy_net(), t.toy_data(), epochs=100_000, checkpoint={str(tmp_path / "run.pt")!r}, progress=False, device="cpu")"""
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT / "tests", stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while not (tmp_path / "run.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and "the same call goes on from there" in error
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    assert torch.load(tmp_path / "run.pt", weights_only=True)["epoch"] >= 1


@pytest.fixture
def finished(tmp_path):
    "A checkpoint, and the options that belong to it."
    options = QUIET | dict(epochs=2, batch_size=32, checkpoint=tmp_path / "run.pt")
    fit(toy_net(), toy_data(), **options)
    return options


@pytest.mark.parametrize(("change", "told"), [
    ({"lr": 0.5}, "lr is 0.001 there and 0.5 here"), ({"epochs": 3}, "epochs is 2 there and 3 here"), ({"seed": 1}, "seed is 0 there"),
    ({"optimizer": "sgd"}, "optimizer is adam there and sgd here"), ({"batch_size": 16}, "batch_size"), ({"l1": 0.1}, "l1"),
    ({"mixed_precision": "bf16"}, "mixed_precision is None there"),
    ({"callbacks": [Stop(-1)]}, r"callbacks is \[\] there and \['Stop'\] here"),
    ({"augment": lambda xb, g: xb}, "augment"), ({"loss": lambda m, x, y: None}, "loss"),
])
def test_another_run_is_refused(finished, change, told):
    net, before = toy_net(), Path(finished["checkpoint"]).read_bytes()
    with pytest.raises(ValueError, match=f"belongs to another run: {told}"):
        fit(net, toy_data(), **finished | change)
    assert same(net, toy_net()) and Path(finished["checkpoint"]).read_bytes() == before


def test_another_shape_or_data_is_refused(finished):
    with pytest.raises(ValueError, match="another run: data is toy, 96 images .* 40 images"):
        fit(toy_net(), toy_data(n=40), **finished)
    net = toy_net()
    net[5] = nn.Linear(16, 4)
    with pytest.raises(ValueError, match=r"another run: tensor 5.weight is \(3, 16\) torch.float32 there and \(4, 16\)"):
        fit(net, toy_data(), **finished)
    with pytest.raises(ValueError, match="tensor 6.weight is absent there"):
        fit(nn.Sequential(*toy_net(), nn.Linear(3, 3)), toy_data(), **finished)
    with pytest.raises(ValueError, match="module 5 is .*bias=True.* there and .*bias=False.* here"):
        net = toy_net()
        net[5] = nn.Linear(16, 3, bias=False)
        fit(net, toy_data(), **finished)


def test_cut_checkpoints_are_refused(finished):
    path = Path(finished["checkpoint"])
    whole = path.read_bytes()
    for cut in {*range(0, len(whole), 487), len(whole) - 1}:
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="is not a checkpoint of fit"):
            fit(toy_net(), toy_data(), **finished)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x02.", b"PK\x03\x04" + bytes(100), bytes(1000)], ids=repr)
def test_garbage_is_refused(tmp_path, content):
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="run.pt is not a checkpoint of fit"):
        fit(toy_net(), toy_data(), checkpoint=path, **QUIET)
    assert path.read_bytes() == content


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "evil"),)
    torch.save({"format": Evil()}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match="not a checkpoint"):
        fit(toy_net(), toy_data(), checkpoint=tmp_path / "run.pt", **QUIET)
    assert not (tmp_path / "evil").exists()
    for other in (tmp_path / "no" / "run.pt", tmp_path):
        with pytest.raises((ValueError, OSError)):
            fit(toy_net(), toy_data(), checkpoint=other, **QUIET)


# ---------------------------------------------------------------- many processes

@given(st.integers(1, 40), st.integers(1, 5))
@settings(deadline=None)
def test_shares_cover_a_batch_once(n, processes):
    class World:
        num_processes = processes
    index, total, shares = torch.arange(n), [], 0.0
    for World.process_index in range(processes):
        mine, xb, yb, share = _share(World, index, index * 10, index * 100)
        assert len(xb) and (len(mine) == len(xb) or share == 0) and torch.equal(xb * 10, yb)
        total += mine.tolist()
        shares += share
    assert sorted(total) == list(range(n)) and shares == pytest.approx(1)


class Shared(Callback):
    "Note which images are seen, and add a penalty."
    def __init__(self): self.seen = []
    def after_step(self, run): self.seen += [(run.epoch, i) for i in run.index.tolist()]
    def extra_loss(self, run): return 1e-3 * run.model[5].weight.square().sum()


def shared_run(kind, seed, **options):
    "33 images in batches of 16: the last batch holds a single one."
    look, net = Shared(), toy_net(seed, dropout=0.0)
    if kind == "plain":
        net[1] = nn.Identity()
    options = dict(epochs=2, batch_size=16, lr=0.01, l1=1e-4, optimizer="sgd", callbacks=[look], device="cpu") | options
    history = fit(net, toy_data(n=33), **options)
    return {"state": net.state_dict(), "seen": look.seen, "history": no_seconds(history)}


def test_one_process_needs_no_accelerate(monkeypatch, tmp_path):
    "What `pip install nncomp` alone brings is enough to train and to compress."
    monkeypatch.setitem(sys.modules, "accelerate", None)
    net = toy_net(0)
    assert len(fit(net, toy_data(), epochs=1, device="cpu", progress=False)) == 1
    recipe = Recipe(sparsity=0.5, prune_epochs=1, share_epochs=1)
    assert deep_compress(net, toy_data(), recipe, path=tmp_path / "net.nncomp", device="cpu", progress=False).file_bytes > 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MissingExtraError, match="accelerate is needed"):
        fit(net, toy_data(), epochs=1, device="cpu", progress=False)


def test_a_run_of_another_model_is_continued_with_a_warning(tmp_path):
    def equal(a, b): return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))

    options = dict(epochs=2, device="cpu", progress=False, checkpoint=tmp_path / "run.pt")
    first, other = toy_net(0), toy_net(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for net in (first, first, toy_net(0)):                           # the same object, trained by now; one that begins alike
            fit(net, toy_data(), **options)
    with pytest.warns(UserWarning, match="began from other weights"):
        fit(other, toy_data(), **options)
    assert equal(first, other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(other, toy_data(), **options)                                # told once
        fit(toy_net(0), toy_data(), **options)                           # and the file is still that of the first
        (tmp_path / "run.pt").unlink()
        fit(third := toy_net(1), toy_data(), **options)
    assert not equal(first, third)
    first.load_state_dict(toy_net(2).state_dict())
    with pytest.warns(UserWarning, match="began from other weights"):   # the same object with other weights
        fit(first, toy_data(), **options)
    assert equal(first, third)


def test_settings_of_a_loss_belong_to_the_run(tmp_path):
    class Scaled:
        def __init__(self, factor): self.factor = factor
        def identity(self): return str(self.factor)
        def __call__(self, model, xb, yb):
            logits = model(xb)
            return self.factor * nn.functional.cross_entropy(logits, yb), logits

    options = dict(epochs=1, device="cpu", progress=False, checkpoint=tmp_path / "run.pt")
    fit(toy_net(0), toy_data(), loss=Scaled(1.), **options)
    fit(toy_net(0), toy_data(), loss=Scaled(1.), **options)
    with pytest.raises(ValueError, match=r"Scaled 1\.0 there and .*Scaled 2\.0 here"):
        fit(toy_net(0), toy_data(), loss=Scaled(2.), **options)


SCRIPT = """
    import sys
    import torch
    from accelerate import PartialState
    from test_training import shared_run
    rank = PartialState(cpu=True).process_index
    for kind in ("plain", "norm"):
        torch.save(shared_run(kind, seed=rank, checkpoint=f"{kind}-run.pt"), f"{kind}-{rank}.pt")
    PartialState().destroy_process_group()
"""


def test_two_processes_share_the_work(tmp_path):
    "Ranks begin with different weights and end with equal ones; each image is used once an epoch; one process gets the same to rounding."
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "script.py"]
    done = subprocess.run(launch, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "step/s" not in done.stderr, done.stderr[-3000:]
    for kind in ("plain", "norm"):
        a, b = (torch.load(tmp_path / f"{kind}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert all(torch.equal(a["state"][k], b["state"][k]) for k in a["state"])
        assert a["history"] == b["history"]
        assert sorted(a["seen"] + b["seen"]) == [(e, i) for e in range(2) for i in range(33)]
        assert torch.load(tmp_path / f"{kind}-run.pt", weights_only=True)["epoch"] == 2
    a, one = torch.load(tmp_path / "plain-0.pt", weights_only=True), shared_run("plain", seed=0, progress=False)   # BatchNorm would differ
    for key, value in one["state"].items():
        torch.testing.assert_close(a["state"][key], value, rtol=1e-4, atol=1e-6)
    for theirs, ours in zip(a["history"], one["history"], strict=True):
        assert theirs == {k: pytest.approx(ours[k], rel=1e-4) for k in theirs}


def test_checkpoint_of_other_settings_or_images_is_refused(tmp_path):
    "A callback's settings, the arguments bound to an augmentation and the images themselves are part of a run's identity."
    import functools

    from nncomp.data import load_data
    from nncomp.schedules import Pruner

    def shift(xb, generator, by=0):
        return xb.roll(by, -1)

    digits = load_data("digits", size=8)
    other = load_data("digits", size=8, seed=1)
    make = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))  # noqa: E731
    options = dict(epochs=1, checkpoint=tmp_path / "run.pt", progress=False)
    fit(make(), digits, callbacks=[Pruner(0.5)], augment=functools.partial(shift, by=1), **options)
    for data, sparsity, by in ((digits, 0.9, 1), (digits, 0.5, 2), (other, 0.5, 1)):
        with pytest.raises(ValueError, match="there and .* here"):
            fit(make(), data, callbacks=[Pruner(sparsity)], augment=functools.partial(shift, by=by), **options)


def test_modes_and_formats_come_back():
    from nncomp.data import load_data

    digits = load_data("digits", size=8)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
    net[1].eval()
    before = net[1].running_mean.clone()
    fit(net, digits, epochs=1, channels_last=True, progress=False, device="cpu")
    assert net.training and not net[1].training
    assert torch.equal(net[1].running_mean, before), "a frozen normalisation was trained"
    assert net[0].weight.is_contiguous()
    net.eval()
    fit(net, digits, epochs=1, progress=False, device="cpu")
    assert not net.training


def test_output_of_the_wrong_kind_is_one_error():
    from nncomp.data import load_data

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 10)

        def forward(self, x):
            return self.fc(x.flatten(1)), None

    with pytest.raises(ValueError, match="a tuple"):
        fit(Pair(), load_data("digits", size=8), epochs=1, progress=False, device="cpu")


def test_examples_without_a_class_are_not_counted():
    net, data = toy_net(dropout=0.0), toy_data()
    y = data.test.y.clone()
    y[::2] = -100
    whole, some = evaluate(net, Split(data.test.x, y)), evaluate(net, Split(data.test.x[1::2], data.test.y[1::2]))
    assert (whole.n, whole.errors, whole.accuracy) == (some.n, some.errors, some.accuracy)
    assert whole.loss == pytest.approx(some.loss, rel=1e-6)
    with pytest.raises(ValueError, match="no examples"):
        evaluate(net, Split(data.test.x, torch.full_like(y, -100)))
    y = data.train.y.clone()
    y[::2] = -100
    history = fit(net, replace(data, train=Split(data.train.x, y)), epochs=30, lr=0.03, batch_size=16, **QUIET)
    assert history[-1]["accuracy"] > 0.7                                 # of all examples, at most one half could be right


def test_validation_takes_no_more_at_once_than_a_step_can_hold():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.most = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), 0

        def forward(self, x):
            if not self.training:
                self.most = max(self.most, len(x))
            return self.inner(x)

    net = Counting()
    fit(net, toy_data(n=40), epochs=1, batch_size=2, **QUIET)
    assert net.most == 8
    net = Counting()
    fit(net, toy_data(n=40), epochs=1, batch_size=20, **QUIET)
    assert net.most == 32                                                # all of them


def test_a_run_on_data_that_change_themselves_is_another_run(tmp_path):
    class Changing(Data):
        augment = None

        def batches(self, split="train", batch_size=128, *, augment=None, **options):
            return super().batches(split, batch_size, augment=augment or self.augment, **options)

    plain = toy_data()
    made = []
    for change in (lambda x, g: x + 1, lambda x, g: x * 0):
        data = Changing("toy", plain.train, plain.valid, plain.test, 3)
        object.__setattr__(data, "augment", change)
        made.append(data)
    fit(toy_net(), made[0], epochs=2, checkpoint=tmp_path / "a.pt", **QUIET)
    with pytest.raises(ValueError, match="augment"):
        fit(toy_net(), made[1], epochs=2, checkpoint=tmp_path / "a.pt", **QUIET)
