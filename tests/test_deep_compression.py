"The whole chain on models it has never seen, interrupted and resumed, and on real MNIST where it is there."
import copy
import dataclasses

import pytest
import torch
from torch import nn

from nncomp.container import load
from nncomp.core import named_weights
from nncomp.data import Data, Split, load_data
from nncomp.deep_compression import Classic, Recipe, absorb_batch_norm, deep_compress, predict_bytes, run_classic
from nncomp.training import Callback, evaluate, fit


class Odd(nn.Module):
    "Convolutions of three ranks, tied weights, a half-precision table, integer and empty buffers, no biases here and there."

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(8, 4, 3, bias=False)
        self.two = nn.Conv2d(1, 4, 3)
        self.three = nn.Conv3d(1, 2, 3)
        self.norm = nn.BatchNorm2d(4)
        self.embed = nn.Embedding(20, 6)
        self.out = nn.Linear(6, 20, bias=False)
        self.out.weight = self.embed.weight
        self.table16 = nn.Parameter(torch.randn(16, 16, dtype=torch.float16))
        self.table_b16 = nn.Parameter(torch.randn(16, 16, dtype=torch.bfloat16))
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("none", torch.empty(0, 4))


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", size=8)


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))


@pytest.mark.filterwarnings("ignore:no data was given")
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_any_module_without_data(tmp_path, scope):
    torch.manual_seed(0)
    model = Odd()
    before = copy.deepcopy(model.state_dict())
    report = deep_compress(model, recipe=Recipe(sparsity=0.8, bits=3, scope=scope), path=tmp_path / "odd.nncomp", device="cpu")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), "the argument changed"
    loaded = load(report.path, into=Odd())
    for (name, ours), theirs in zip(report.model.state_dict().items(), loaded.state_dict().values()):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    assert loaded.out.weight is loaded.embed.weight
    for name, w in named_weights(report.model).items():
        assert w.unique().numel() <= 8, name
        if scope == "layer":
            assert int((w == 0).sum()) >= round(0.8 * w.numel()), name
    assert report.ledger.total == report.file_bytes == report.path.stat().st_size


def test_without_data_it_warns(tmp_path):
    with pytest.warns(UserWarning, match="nothing is retrained"):
        deep_compress(small_net(), path=tmp_path / "a.nncomp", device="cpu")


def test_interrupted_chain_resumes_to_the_same_bytes(tmp_path, digits, monkeypatch):
    model = small_net()
    fit(model, digits, epochs=3, batch_size=32, progress=False)
    recipe = Recipe(sparsity=0.7, prune_epochs=4, share_epochs=2, bits=3, batch_size=32)
    whole = deep_compress(model, digits, recipe, path=tmp_path / "whole.nncomp", device="cpu", progress=False)

    import nncomp.deep_compression as deep

    class Stop(Callback):
        def after_epoch(self, run):
            if run.epoch == 2:
                raise KeyboardInterrupt

    pruner = deep.Pruner
    real = deep.fit
    monkeypatch.setattr(deep, "fit", lambda *a, callbacks=(), **k: real(*a, callbacks=[*callbacks, Stop()], **k))
    with pytest.raises(KeyboardInterrupt):
        deep_compress(model, digits, recipe, path=tmp_path / "cut.nncomp", folder=tmp_path / "work", device="cpu", progress=False)
    assert not (tmp_path / "cut.nncomp").exists()
    monkeypatch.undo()
    assert deep.Pruner is pruner
    for path in (tmp_path / "work").glob("*.pt"):  # written with the stopping callback: the run is another one without it
        path.unlink()
    deep_compress(model, digits, recipe, path=tmp_path / "cut.nncomp", folder=tmp_path / "work", device="cpu", progress=False)
    assert (tmp_path / "cut.nncomp").read_bytes() == (tmp_path / "whole.nncomp").read_bytes() == whole.path.read_bytes()


def test_a_stage_is_never_taken_from_another_run(tmp_path, digits):
    model = small_net()
    fit(model, digits, epochs=2, batch_size=32, progress=False)
    recipe = Recipe(sparsity=0.7, prune_epochs=1, share_epochs=1, bits=3, batch_size=32)
    options = dict(folder=tmp_path / "work", device="cpu", progress=False)
    first = deep_compress(model, digits, recipe, path=tmp_path / "a.nncomp", **options)
    other = deep_compress(model, digits, dataclasses.replace(recipe, sparsity=0.9), path=tmp_path / "b.nncomp", **options)
    assert first.stages[-1].sparsity < 0.75 < 0.85 < other.stages[-1].sparsity


def test_both_stages_train_on_what_the_augmentation_gives(tmp_path, digits):
    model, steps = small_net(), []
    recipe = Recipe(sparsity=0.7, prune_epochs=2, share_epochs=1, bits=3, batch_size=32)

    def flip(xb, generator):
        steps.append(len(xb))
        return xb.flip(3)

    options = dict(folder=tmp_path / "work", device="cpu", progress=False)
    plain = deep_compress(model, digits, recipe, path=tmp_path / "a.nncomp", **options)
    flipped = deep_compress(model, digits, recipe, path=tmp_path / "b.nncomp", augment=flip, **options)
    assert sum(steps) == 3 * len(digits.train), "two epochs of pruning and one of sharing, every image in each"
    mirror = dataclasses.replace(digits, train=Split(digits.train.x.flip(3), digits.train.y))
    by_hand = deep_compress(model, mirror, recipe, path=tmp_path / "c.nncomp", **options)
    assert flipped.path.read_bytes() == by_hand.path.read_bytes() != plain.path.read_bytes()
    steps.clear()
    again = deep_compress(model, digits, recipe, path=tmp_path / "d.nncomp", augment=flip, **options)
    assert again.path.read_bytes() == flipped.path.read_bytes() and not steps, "finished stages are read, and those of this run"


def trained_norms(model):
    "As if it had been trained."
    torch.manual_seed(1)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
                m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
            for p in m.parameters(recurse=False):
                if p.ndim == 1:
                    p.normal_()
    return model.eval()


class Backwards(nn.Sequential):
    "The normalisation comes first."

    def forward(self, x):
        return self[0](self[1](x))


class Residual(nn.Module):
    "A normalisation used twice, a layer used twice, one without scale, one without statistics, and a chain with a forward of its own."

    def __init__(self):
        super().__init__()
        shared = nn.Conv2d(4, 4, 1)
        self.a, self.b = nn.Sequential(shared, nn.BatchNorm2d(4)), nn.Sequential(shared, nn.BatchNorm2d(4))
        norm = nn.BatchNorm2d(4)
        self.c, self.d = nn.Sequential(nn.Conv2d(4, 4, 1), norm), nn.Sequential(nn.Conv2d(4, 4, 1), norm)
        plain, blind = nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, track_running_stats=False)
        self.e = nn.Sequential(nn.Conv2d(4, 4, 1), plain, nn.Conv2d(4, 4, 1), blind)
        self.f = Backwards(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.g = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Linear(6, 3, bias=False), nn.BatchNorm1d(3))

    def forward(self, x):
        for part in (self.a, self.b, self.c, self.d, self.e, self.f):
            x = x + part(x)
        return self.g(x)


def test_absorbed_norms_compute_the_same():
    net = trained_norms(Residual())
    before, x = copy.deepcopy(net.state_dict()), torch.randn(16, 4, 4, 4)
    absorbed = absorb_batch_norm(net)
    assert torch.allclose(absorbed(x), net(x), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items()), "the argument changed"
    assert {k: v.shape for k, v in absorbed.state_dict().items()} == {k: v.shape for k, v in before.items()}
    norms = {name: m for name, m in absorbed.named_modules() if getattr(m, "running_mean", None) is not None}
    absorbed_names = {name for name, m in norms.items() if not m.running_mean.any() and (m.running_var == 1).all()}
    assert absorbed_names == {"a.1", "b.1", "f.1", "g.2", "g.4"}
    assert not absorbed.g[1].bias.any(), "a bias goes where one normalisation follows it"
    assert absorbed.a[0].bias.any() and absorbed.f[0].bias.any(), "and nowhere else"
    twice = absorb_batch_norm(absorbed)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(absorbed.state_dict().values(), twice.state_dict().values()))


def test_prediction_is_the_entropy_of_a_random_layer(tmp_path):
    torch.manual_seed(0)
    w = torch.randn(400, 500) * (torch.rand(400, 500) < 0.1)
    w = (w * 4).round() + 0.0  # plain zeros, not negative ones
    report_bytes = predict_bytes({"w": w})
    from nncomp.container import save

    save({"w": w}, tmp_path / "w.nncomp")
    assert report_bytes <= (tmp_path / "w.nncomp").stat().st_size <= 1.06 * report_bytes + 200


def test_lenet_300_100_on_real_mnist(mnist_root, tmp_path, monkeypatch):
    "A shortened run of the recorded experiment: two epochs each, on a tenth of the images."
    monkeypatch.setenv("NNCOMP_DATA", str(mnist_root))
    full = load_data("mnist")
    few = Data(full.name, Split(full.train.x[:6000], full.train.y[:6000]), Split(full.valid.x[:1000], full.valid.y[:1000]), full.test, 10)
    monkeypatch.setattr("nncomp.deep_compression.load_data", lambda *args, **kwargs: few)
    config = Classic(epochs=3, recipe=Recipe(prune_epochs=4, share_epochs=1))
    metrics, report, dense = run_classic(config, 0, tmp_path, device="cpu", progress=False)
    assert metrics["test_images"] == 10_000
    assert metrics["dense_error_percent"] < 10 and metrics["file_error_percent"] < metrics["dense_error_percent"] + 2
    assert metrics["ratio"] > 40
    again = load(metrics["artefact"], into=copy.deepcopy(dense))
    assert evaluate(again, full.test).error_percent == metrics["file_error_percent"]


class Remembering(nn.Linear):
    "A module with a state that is no tensor."
    def get_extra_state(self): return {"version": 3}
    def set_extra_state(self, state): pass


def test_states_that_are_no_tensors_are_named(tmp_path):
    net = nn.Sequential(nn.Flatten(), Remembering(784, 10))
    assert predict_bytes(net.state_dict()) > 0
    with pytest.raises(ValueError, match="_extra_state"):
        deep_compress(net, None, path=tmp_path / "a.nncomp", folder=tmp_path, progress=False)


def test_biases_are_absorbed_only_where_nothing_comes_between():
    torch.manual_seed(0)
    hooked = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    hooked[0].register_forward_hook(lambda m, args, out: out.relu())
    steps = nn.Sequential(nn.Linear(16, 20), nn.BatchNorm1d(20))                   # on (n, 20, 16) it normalises the steps
    for net, x in ((hooked, torch.randn(6, 2, 8, 8)), (steps, torch.randn(6, 20, 16)), (steps, torch.randn(6, 16))):
        net.train()(x)
        net.eval()
        assert torch.allclose(absorb_batch_norm(net)(x), net(x), atol=1e-5)
