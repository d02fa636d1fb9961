"The whole chain on models it has never seen, interrupted and resumed, and on real MNIST where it is there."
import copy
import dataclasses

import pytest
import torch
from torch import nn

from nncomp.container import load
from nncomp.core import named_weights
from nncomp.data import Data, Split, load_data
from nncomp.deep_compression import Classic, Recipe, deep_compress, predict_bytes, run_classic
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
