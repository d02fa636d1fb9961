"Models, losses, data and files that people bring: what does not fit is one clear error before any work, and nothing is silently wrong."
import copy
import functools
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from toys import toy_data, toy_net

from nncomp import cli
from nncomp.container import load, save
from nncomp.core import check_writable, seed_everything
from nncomp.data import Data, Split, load_data
from nncomp.deep_compression import Recipe, deep_compress, run_tag
from nncomp.distillation import Ensemble, Matching, cache_logits, distill, watch
from nncomp.inference import fastest, lightest
from nncomp.measure import count_macs
from nncomp.models import create_model
from nncomp.neurons import activation_scores, taylor_scores
from nncomp.pruning import first_order_scores, magnitude_mask, wanda_scores
from nncomp.schedules import Pruner, iterative_prune, sensitivity_scan, suggest_sparsities
from nncomp.soft_weight_sharing import SoftRecipe, soft_compress
from nncomp.squeezenet import fireify, fold_batch_norm
from nncomp.training import callable_name, evaluate, fit, validate
from nncomp.weight_sharing import share_weights, weight_importance

QUIET = {"progress": False, "device": "cpu"}
QUICK = Recipe(prune_epochs=1, share_epochs=1, batch_size=32)


def thin_(module, sparsity=0.9):
    for p in module.parameters():
        if p.ndim > 1:
            p.data *= magnitude_mask(p.data, sparsity)
    return module


def smoothed(amount):
    return lambda model, xb, yb: (nn.functional.cross_entropy(logits := model(xb), yb, label_smoothing=amount), logits)


class Smoothed:
    def __init__(self, amount):
        self.amount = amount

    def __call__(self, model, xb, yb):
        return smoothed(self.amount)(model, xb, yb)

    def method(self, model, xb, yb):
        return self(model, xb, yb)


def scaled(xb, generator, by=None):
    return xb if by is None else xb * by[0]


@pytest.mark.parametrize("a, b", [
    (smoothed(0.1), smoothed(0.2)), (Smoothed(0.1), Smoothed(0.2)), (Smoothed(0.1).method, Smoothed(0.2).method),
    (lambda x, g: x * 2, lambda x, g: x * 3),
    (functools.partial(scaled, by=torch.ones(2000)), functools.partial(scaled, by=torch.arange(2000.))),
    (functools.partial(scaled, by=Smoothed(0.1)), functools.partial(scaled, by=Smoothed(0.2))),
    (nn.Linear(2, 2).eval(), nn.Linear(2, 2).eval()),
    (nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(label_smoothing=0.2)),
], ids=["closure", "object", "method", "lambda", "long tensor", "object in a partial", "teacher", "loss"])
def test_other_settings_have_another_name(a, b):
    assert callable_name(a) != callable_name(b) and callable_name(a) == callable_name(a)
    assert " at 0x" not in callable_name(a)
    if not isinstance(a, nn.Module):
        assert callable_name(copy.deepcopy(a)) == callable_name(a), "the same settings in another process are the same run"


def test_what_does_not_tell_runs_apart_is_left_out():
    learning = nn.Linear(2, 2)
    before = callable_name(functools.partial(scaled, by=learning))
    nn.init.ones_(learning.weight)
    assert callable_name(functools.partial(scaled, by=learning)) == before, "a student that goes on is the same"
    a, b = {0, 8}, {8, 0}
    assert list(a) != list(b) and callable_name(functools.partial(scaled, by=a)) == callable_name(functools.partial(scaled, by=b))
    assert callable_name(functools.partial(scaled, by=np.array(["text"])))


def test_a_checkpoint_is_refused_where_layers_or_losses_have_other_settings(tmp_path):
    path, data = tmp_path / "run.pt", toy_data()
    net = nn.Sequential(toy_net(), nn.Dropout(0.1))
    fit(net, data, epochs=1, loss=smoothed(0.1), checkpoint=path, **QUIET)
    with pytest.raises(ValueError, match="belongs to another run: loss is"):
        fit(nn.Sequential(toy_net(), nn.Dropout(0.1)), data, epochs=1, loss=smoothed(0.2), checkpoint=path, **QUIET)
    with pytest.raises(ValueError, match=r"module 1 is Dropout\(p=0.1.* there and Dropout\(p=0.5"):
        fit(nn.Sequential(toy_net(), nn.Dropout(0.5)), data, epochs=1, loss=smoothed(0.1), checkpoint=path, **QUIET)
    net[0][0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen is .* and 0.0.weight here"):
        fit(net, data, epochs=1, loss=smoothed(0.1), checkpoint=path, **QUIET)


def test_a_chain_is_not_resumed_with_other_layers():
    net, data = nn.Sequential(toy_net(), nn.Dropout(0.1)), toy_data()
    tags = {run_tag(net, data, QUICK, 0), *(run_tag(net, data, QUICK, 0, augment) for augment in (lambda x, g: x * 2, lambda x, g: x * 3))}
    net[1].p = 0.
    tags.add(run_tag(net, data, QUICK, 0))
    net[0][0].bias.requires_grad_(False)
    tags.add(run_tag(net, data, QUICK, 0))
    assert len(tags) == 5


def test_sixteen_bits_of_grey(tmp_path):
    image = pytest.importorskip("PIL.Image")
    draw = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(5):
            image.fromarray(draw.integers(0, 2**16, (8, 8), dtype=np.uint16)).save(tmp_path / label / f"{i}.png")
    data = load_data(f"folder:{tmp_path}", size=8, valid_fraction=0.)
    assert data.train.x.shape[1] == 1 and data.train.x.unique().numel() > 100
    image.fromarray(draw.random((8, 8), dtype=np.float32)).save(tmp_path / "a" / "float.tif")
    with pytest.raises(ValueError, match="32 bits a pixel"):
        load_data(f"folder:{tmp_path}", size=8)


def test_a_tied_model_is_not_filled_from_an_untied_file(tmp_path):
    class Words(nn.Module):
        def __init__(self, tied):
            super().__init__()
            self.emb, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            if tied:
                self.head.weight = self.emb.weight

    save(Words(False), tmp_path / "untied.nncomp")
    save(Words(True), tmp_path / "tied.nncomp")
    model = Words(True)
    before = model.emb.weight.detach().clone()
    with pytest.raises(ValueError, match="emb.weight and head.weight are one tensor in the model and differ in the file"):
        load(tmp_path / "untied.nncomp", into=model)
    assert torch.equal(model.emb.weight, before)
    load(tmp_path / "tied.nncomp", into=model)
    assert not torch.equal(model.emb.weight, before) and model.head.weight is model.emb.weight
    load(tmp_path / "tied.nncomp", into=Words(False))  # what is tied in the file may be apart in the model


def test_hooks_and_layers_that_others_read_stay_as_they_are():
    torch.manual_seed(0)
    net = thin_(nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 4)))
    net[0].register_forward_hook(lambda module, args, output: 2 * output)
    x = torch.randn(3, 40)
    quick, choices = lightest(net)
    torch.testing.assert_close(quick(x), net(x))
    assert [c.layer for c in choices] == ["2"]
    encoder = thin_(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 64, batch_first=True), 1, enable_nested_tensor=False).eval())
    tokens = torch.randn(2, 5, 16)
    for call in (lightest, lambda m: fastest(m, tokens, repeats=1)):
        with torch.no_grad():
            torch.testing.assert_close(call(encoder)[0](tokens), encoder(tokens), rtol=1e-3, atol=1e-5)


def test_light_forms_under_autocast_and_read_from_outside():
    torch.manual_seed(0)
    net = thin_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)), 0.97)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert (lightest(net)[0](x) - net(x)).abs().max() < 0.05 * net(x).abs().max()
    shared = nn.Linear(60, 60)
    shared.weight.data = (shared.weight.data * 50).round() / 50
    light, choices = lightest(nn.Sequential(shared))
    assert choices[0].form == "codebook" and torch.equal(light[0].weight, shared.weight)


def test_tensors_that_are_computed_from_others_are_named_before_any_work(tmp_path):
    net = toy_net()
    nn.utils.prune.l1_unstructured(net[4], "weight", 0.5)
    net(torch.randn(2, 1, 4, 4)).sum().backward()
    with pytest.raises(ValueError, match="4.weight is computed from 4.weight_orig; make it plain first"):
        deep_compress(net, toy_data(), QUICK, path=tmp_path / "a.nncomp", **QUIET)
    with pytest.raises(ValueError, match="computed from others"):
        lightest(net)


def test_token_ids_reach_an_embedding_as_they_are():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.fc = nn.Embedding(1000, 4), nn.Linear(4, 3)

        def forward(self, ids):
            return self.fc(self.emb(ids.flatten(1)).mean(1))

    ids, y = torch.randint(257, 1000, (8, 6)), torch.randint(0, 3, (8,))
    net = Words().bfloat16()
    assert evaluate(net, [(ids, y)]).errors == int((net(ids).argmax(1) != y).sum())


def test_hints_need_a_teacher_that_runs():
    data, student, teacher = toy_data(), toy_net(1), toy_net(2).eval()
    table = cache_logits(teacher, data.train)
    with watch(student, ["1"]) as mine, watch(teacher, ["1"]) as theirs:
        for _ in range(2):
            with pytest.raises(ValueError, match="teacher has not run in this step.*'1'"):
                distill(student, table, data, epochs=1, batch_size=32, callbacks=[Matching(mine, theirs, {"1": "1"})], **QUIET)
            cache_logits(teacher, data.train, batch_size=32)  # features of other images are as bad as none
        distill(student, teacher, data, epochs=1, batch_size=32, callbacks=[Matching(mine, theirs, {"1": "1"})], **QUIET)


def test_ensembles_still_answer():
    a, b = toy_net(1).eval(), toy_net(2).eval()
    x = torch.randn(4, 1, 4, 4)
    torch.testing.assert_close(Ensemble([a, b])(x), (a(x) + b(x)) / 2)


def test_norms_that_cannot_be_folded():
    conv = nn.Conv2d(3, 4, 3)
    with pytest.raises(ValueError, match="used in several places"):
        fold_batch_norm(nn.Sequential(nn.Sequential(conv, nn.BatchNorm2d(4)), nn.Sequential(conv, nn.BatchNorm2d(4))))

    class Residual(nn.Sequential):
        def forward(self, x):
            return self.bn(self.conv(x)) + x

    model = Residual()
    model.add_module("conv", nn.Conv2d(3, 3, 3, padding=1))
    model.add_module("bn", nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="bn has no convolution directly before it"):
        fold_batch_norm(model)


def test_small_layers_are_not_lost_to_rounding():
    assert torch.count_nonzero(cli.shape_tensor("head.weight", torch.randn(2, 2), sparsity=0.9)) == 1
    assert torch.count_nonzero(cli.shape_tensor("head.weight", torch.randn(2, 2), sparsity=1.)) == 0


@pytest.mark.parametrize("name", ["back.pt", "back.bin", "back.nncomp"])
def test_a_name_that_promises_another_format(tmp_path, name):
    save({"w": torch.randn(4, 4)}, tmp_path / "a.nncomp")
    with pytest.raises(ValueError, match="would promise another format"):
        cli.expand_file(tmp_path / "a.nncomp", tmp_path / name)
    cli.expand_file(tmp_path / "a.nncomp", tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="would promise another format"):
        cli.compress_file(tmp_path / "b.safetensors", tmp_path / "c.safetensors")


def test_a_file_of_almost_nothing_can_be_read_again(tmp_path):
    with pytest.warns(UserWarning, match="max_expansion="):
        save({"w": torch.zeros(3000, 3000)}, tmp_path / "a.nncomp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recipe = Recipe(sparsity=0.9999, floor=0., bits=1)
        report = deep_compress(nn.Linear(3000, 3000, bias=False), None, recipe, path=tmp_path / "b.nncomp", **QUIET)
    assert report.file_bytes < 3000


@pytest.mark.parametrize("kind, options", [
    (Recipe, dict(share_lr=-1.)), (Recipe, dict(prune_lr="x")), (Recipe, dict(weight_decay=float("nan"))),
    (SoftRecipe, dict(tau=-1.)), (SoftRecipe, dict(tune_lr=float("inf")))])
def test_rates_are_checked_where_they_are_written(kind, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be a finite number of at least 0"):
        kind(**options)


def test_what_cannot_be_compressed_is_said_before_training(tmp_path):
    data, path = toy_data(), tmp_path / "a.nncomp"
    sick = toy_net()
    sick[4].bias.data[0] = float("nan")
    for compress in (functools.partial(deep_compress, recipe=QUICK), functools.partial(soft_compress, recipe=SoftRecipe(epochs=1))):
        with pytest.raises(ValueError, match="4.bias"):
            compress(sick, data, path=path, **QUIET)
        with pytest.raises(ValueError, match="data must be a `Data`"):
            compress(toy_net(), torch.utils.data.DataLoader([0]), path=path, **QUIET)
    with pytest.raises(ValueError, match="needs data"):
        soft_compress(toy_net(), None, path=path, **QUIET)
    with pytest.raises(ValueError, match="recipe must be a SoftRecipe"):
        soft_compress(toy_net(), data, QUICK, path=path, **QUIET)
    with pytest.raises(ValueError, match="recurrent layer"):
        soft_compress(nn.Sequential(nn.Flatten(), nn.LSTM(16, 3)), data, path=path, **QUIET)
    frozen = toy_net().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        fit(frozen, data, epochs=1, **QUIET)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match="cannot be written to"):
        check_writable(tmp_path / "a.nncomp")


def test_divergence_is_named_even_where_a_callback_stumbles_over_it():
    data = Data("toy", *(Split(torch.randn(64, 1, 4, 4), torch.randint(0, 3, (64,))) for _ in range(3)), 3)
    with pytest.raises(FloatingPointError, match="the loss is"):
        options = dict(lr=1e38, optimizer="sgd", schedule="constant", batch_size=16)
        fit(toy_net(), data, epochs=3, callbacks=[Pruner(0.5, every=1)], **options, **QUIET)


def test_a_full_disk_names_the_checkpoint(tmp_path, monkeypatch):
    def full(*args, **options):
        raise RuntimeError("inline_container.cc:672 unexpected pos")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="run.pt could not be written"):
        fit(toy_net(), toy_data(), epochs=1, checkpoint=tmp_path / "run.pt", **QUIET)
    assert not list(tmp_path.iterdir())


def squared(model, xb, yb):
    return nn.functional.mse_loss(model(xb), yb)


def tokens_loss(model, xb, yb):
    logits = model(xb)
    return nn.functional.cross_entropy(logits.flatten(0, 1), yb.flatten()), logits


def mapped(model, xb, yb):
    return nn.functional.cross_entropy(model(xb), yb)


class Reads(nn.Module):
    "A language model of one layer: the next token after each."

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 24), nn.Linear(24, 16)

    def forward(self, tokens):
        return self.head(self.embed(tokens).relu())


def task(kind):
    "(model, data, loss) of a task without classes: numbers, a map of classes, tokens."
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    if kind == "numbers":
        x = torch.randn(160, 6, generator=g)
        model, y, loss = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2)), x[:, :2].square(), squared
    elif kind == "maps":
        x = torch.randn(160, 1, 6, 6, generator=g)
        model, y = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1)), (x[:, 0] > 0).long()
        loss = mapped
    else:
        x = torch.randint(16, (160, 5), generator=g)
        model, y, loss = Reads(), (3 * x + 1) % 16, tokens_loss
    parts = [Split(x[a:b], y[a:b]) for a, b in ((0, 100), (100, 130), (130, 160))]
    return model, Data(kind, *parts), loss


@pytest.mark.parametrize("kind", ["numbers", "maps", "tokens"])
def test_tasks_without_classes_go_through_the_whole_chain(kind, tmp_path):
    model, data, loss = task(kind)
    before = evaluate(model, data.valid, loss=loss)
    history = fit(model, data, loss=loss, epochs=20, lr=1e-2, batch_size=20, **QUIET)
    after = evaluate(model, data.valid, loss=loss)
    assert after.loss < 0.8 * before.loss and after.errors is None and np.isnan(after.accuracy)
    assert history[-1]["valid_loss"] == pytest.approx(after.loss, rel=1e-5) and np.isnan(history[-1]["valid_accuracy"])
    recipe = Recipe(sparsity=0.3, prune_epochs=4, share_epochs=2, batch_size=20, bits=4)
    options = dict(loss=loss, folder=tmp_path / "run", **QUIET)
    report = deep_compress(model, data, recipe, path=tmp_path / "a.nncomp", **options)
    losses = [stage.valid_loss for stage in report.stages]
    assert losses[0] == pytest.approx(after.loss, rel=1e-5) and losses[-1] < before.loss
    assert [stage.valid_error_percent for stage in report.stages] == [None] * 4
    again = load(tmp_path / "a.nncomp", into=copy.deepcopy(model))
    assert evaluate(again, data.test, loss=loss) == evaluate(report.model, data.test, loss=loss)
    files = sorted(p.name for p in (tmp_path / "run").iterdir())
    deep_compress(model, data, recipe, path=tmp_path / "b.nncomp", **options)
    assert (tmp_path / "b.nncomp").read_bytes() == (tmp_path / "a.nncomp").read_bytes()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == files      # resumed: nothing was begun anew
    soft = soft_compress(model, data, SoftRecipe(epochs=2, tune_epochs=1, batch_size=20), path=tmp_path / "s.nncomp", loss=loss, **QUIET)
    assert np.isfinite(evaluate(soft.model, data.valid, loss=loss).loss)
    _, rounds = iterative_prune(model, data, [0.3, 0.6], epochs=2, lr=1e-3, loss=loss, batch_size=20, **QUIET)
    assert all(np.isnan(r["accuracy"]) and np.isfinite([r["pruned_loss"], r["loss"]]).all() for r in rounds)
    scan = sensitivity_scan(model, data, (0.0, 0.5), loss=loss)
    assert scan["loss"].notna().all() and set(suggest_sparsities(scan, 1e9, by="loss").values()) == {0.5}


def test_tasks_without_classes_need_a_loss(tmp_path):
    model, data, loss = task("numbers")
    for call in (lambda: fit(model, data, **QUIET),
                 lambda: deep_compress(model, data, QUICK, path=tmp_path / "a.nncomp", **QUIET),
                 lambda: soft_compress(model, data, path=tmp_path / "a.nncomp", **QUIET),
                 lambda: iterative_prune(model, data, [0.5], **QUIET)):
        with pytest.raises(ValueError, match="so training needs a loss"):
            call()
    assert not list(tmp_path.iterdir())
    assert run_tag(model, data, QUICK, 0, loss=squared) != run_tag(model, data, QUICK, 0, loss=loss and tokens_loss)
    assert run_tag(model, data, QUICK, 0, loss=smoothed(0.1)) != run_tag(model, data, QUICK, 0, loss=smoothed(0.2))


@pytest.mark.parametrize("answer", [
    lambda m, x, y: (m(x) - y).square(), lambda m, x, y: squared(m, x, y).item(), lambda m, x, y: None,
], ids=["vector", "float", "nothing"])
def test_a_loss_that_is_no_mean_is_named(answer):
    model, data, _ = task("numbers")
    for call in (lambda: fit(model, data, loss=answer, **QUIET), lambda: evaluate(model, data.valid, loss=answer)):
        with pytest.raises(ValueError, match="the loss must return the mean over the batch"):
            call()


def test_classes_with_a_loss_are_judged_by_cross_entropy():
    data = toy_data()
    net = toy_net()
    history = fit(net, data, epochs=1, loss=smoothed(0.5), **QUIET)
    found = evaluate(net, data.valid)
    assert (history[-1]["valid_loss"], history[-1]["valid_accuracy"]) == (pytest.approx(found.loss), found.accuracy)
    alone = fit(toy_net(), data, epochs=1, loss=lambda model, xb, yb: nn.functional.cross_entropy(model(xb), yb), **QUIET)
    assert np.isnan(alone[-1]["accuracy"]) and 0 <= alone[-1]["valid_accuracy"] <= 1      # it kept its logits to itself


def test_recipes_by_tensor(tmp_path):
    model, data, loss = task("numbers")
    skipping = Recipe(sparsity=0.5, skip=("2.*",), prune_epochs=1, share_epochs=1, batch_size=20, bits=2)
    report = deep_compress(model, data, skipping, path=tmp_path / "a.nncomp", loss=loss, **QUIET)
    first, last = report.model[0].weight, report.model[2].weight
    assert (int((first == 0).sum()), int((last == 0).sum())) == (96, 0) and len(first.unique()) <= 4 < len(last.unique())
    blind = replace(skipping, prune_epochs=0, share_epochs=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        untouched = deep_compress(model, recipe=blind, path=tmp_path / "b.nncomp", device="cpu").model
    assert torch.equal(untouched[2].weight, model[2].weight) and not torch.equal(untouched[0].weight, model[0].weight)
    for wrong, why in ((replace(blind, skip=("x",)), "skip names 'x'"), (replace(blind, skip=("*",)), "skip leaves no weight"),
                       (Recipe(sparsity={"0.weight": 0.5, "9.weight": 0.5}, scope="layer"), "9.weight is not a parameter"),
                       (Recipe(bits={"9.weight": 3}), "9.weight")):
        with pytest.raises(ValueError, match=why):
            deep_compress(model, data, wrong, path=tmp_path / "c.nncomp", loss=loss, **QUIET)
    assert not (tmp_path / "c.nncomp").exists()


def test_what_is_pruned_and_not_shared_keeps_its_zeros(tmp_path):
    model, data, loss = task("numbers")
    for recipe in (Recipe(sparsity={"0.weight": 0.8}, bits={"2.weight": 4}, scope="layer"), Recipe(sparsity=0.8, bits={"2.weight": 4})):
        short = replace(recipe, prune_epochs=2, share_epochs=2, batch_size=20)
        report = deep_compress(model, data, short, path=tmp_path / "a.nncomp", loss=loss, **QUIET)
        pruned, shared = report.stages[1:3]
        assert shared.sparsity >= pruned.sparsity > 0.5
        assert len(report.model[0].weight.unique()) > 20
    biased = Recipe(sparsity={"0.weight": 0.8, "0.bias": 0.5}, scope="layer", prune_epochs=2, share_epochs=2, batch_size=20)
    report = deep_compress(model, data, biased, path=tmp_path / "b.nncomp", loss=loss, **QUIET)
    assert int((report.model[0].bias == 0).sum()) == 16                    # a bias is pruned, and has no codebook


def test_skipping_sees_through_tied_names():
    model = Reads()
    model.tied = nn.Linear(24, 16, bias=False)
    model.tied.weight = model.embed.weight
    assert Recipe(skip=("tied.*",)).by_tensor(model, "bits") == {"head.weight": 5}
    assert Recipe(skip=("embed.*",), bits={"tied.weight": 3, "head.weight": 4}).by_tensor(model, "bits") == {"head.weight": 4}
    assert Recipe(bits={"tied.weight": 3}).by_tensor(model, "bits") == {"embed.weight": 3}
    model.empty = nn.Parameter(torch.empty(0, 4))
    assert "empty" not in Recipe(skip=("head.*",)).by_tensor(model, "sparsity")
    chosen = {"head.weight": np.float64(0.5)}
    recipe = Recipe(sparsity=chosen)
    chosen["head.weight"] = 7
    assert recipe.sparsity == {"head.weight": 0.5} and type(recipe.sparsity["head.weight"]) is float
    assert repr(Recipe(bits={"a": 1, "b": 2})) == repr(Recipe(bits={"b": 2, "a": 1}))


def test_a_recurrent_layer_may_be_skipped(tmp_path):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x):
            return self.out(self.rnn(x[:, None])[0][:, -1])

    _, data, loss = task("numbers")
    recipe = Recipe(sparsity=0.5, prune_epochs=1, share_epochs=1, batch_size=20)
    with pytest.raises(ValueError, match="a recurrent layer cannot train shared values"):
        deep_compress(Recurrent(), data, recipe, path=tmp_path / "a.nncomp", loss=loss, **QUIET)
    deep_compress(Recurrent(), data, replace(recipe, skip=("rnn.*",)), path=tmp_path / "a.nncomp", loss=loss, **QUIET)


class Counts:
    "A loss that remembers how often it was called, and lowers another loss than it seems to."

    def __init__(self, power):
        self.power, self._steps = power, 0

    def __call__(self, model, xb, yb):
        self._steps += 1
        return (model(xb) - yb).abs().pow(self.power).mean()


FACTOR = 2.0


def test_runs_with_other_losses_do_not_resume_each_other(tmp_path):
    model, data, _ = task("numbers")
    pairs = [(lambda m, x, y: nn.functional.mse_loss(m(x), y), lambda m, x, y: nn.functional.l1_loss(m(x), y)), (Counts(1), Counts(2))]
    for a, b in pairs:
        assert callable_name(a) != callable_name(b) and run_tag(model, data, QUICK, 0, loss=a) != run_tag(model, data, QUICK, 0, loss=b)

    def scaled_by_global(m, x, y):
        return FACTOR * squared(m, x, y)

    name = callable_name(scaled_by_global)
    globals()["FACTOR"] = 3.0
    assert callable_name(scaled_by_global) != name
    spaces = [{}, {}]
    for space, body in zip(spaces, ("m(x) - y", "m(x) + y")):
        exec(f"def mine(m, x, y): return ({body}).square().mean()", space)
    assert callable_name(spaces[0]["mine"]) != callable_name(spaces[1]["mine"])
    remembers = Counts(2)
    fit(copy.deepcopy(model), data, epochs=1, loss=remembers, checkpoint=tmp_path / "a.pt", **QUIET)
    assert remembers._steps > 0
    fit(copy.deepcopy(model), data, epochs=1, loss=Counts(2), checkpoint=tmp_path / "a.pt", **QUIET)


def test_nothing_is_counted_where_there_are_no_classes(tmp_path):
    "One output, integers to hit: a shape that looks like logits."
    x = torch.randn(120, 6)
    y = (x[:, 0] > 0).long()
    data = Data("scores", *(Split(x[i:j], y[i:j]) for i, j in ((0, 80), (80, 100), (100, 120))))

    def binary(model, xb, yb):
        return nn.functional.binary_cross_entropy_with_logits((out := model(xb))[:, 0], yb.float()), out

    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    history = fit(model, data, epochs=2, loss=binary, batch_size=20, **QUIET)
    assert np.isnan([history[-1]["accuracy"], history[-1]["valid_accuracy"]]).all()
    report = deep_compress(model, data, QUICK, path=tmp_path / "a.nncomp", loss=binary, **QUIET)
    assert [s.valid_error_percent for s in report.stages] == [None] * 4
    with pytest.raises(ValueError, match="or, if they are classes, num_classes in the `Data`"):
        fit(model, data, **QUIET)


def test_what_cannot_be_judged_fails_before_the_first_step():
    steps = []

    class Model(nn.Linear):
        def forward(self, x):
            steps.append(self.training)
            return {"logits": super().forward(x)}

    x, y = torch.randn(90, 6), torch.randint(2, (90,))
    data = Data("two", *(Split(x[i:j], y[i:j]) for i, j in ((0, 50), (50, 70), (70, 90))), 2)
    with pytest.raises(ValueError, match="got a dict; wrap it"):
        fit(Model(6, 2), data, loss=lambda m, x, y: nn.functional.cross_entropy(m(x)["logits"], y), **QUIET)
    assert steps == [False]
    with pytest.raises(ValueError, match="parameters of its own"):
        fit(Model(6, 2), data, loss=nn.Sequential(nn.Linear(2, 2)), **QUIET)
    with pytest.raises(ValueError, match="wrap it: loss="):
        fit(Model(6, 2), data, loss=nn.functional.mse_loss, **QUIET)
    whole = Split(x, y.to(torch.int32))
    fit(nn.Linear(6, 2), Data("two", whole, whole, whole, 2), epochs=1, **QUIET)                         # other integers are classes too


def test_validation_goes_in_batches_of_the_training_and_draws_the_same():
    _, data, _ = task("numbers")
    sizes = []

    def noisy(model, xb, yb):
        sizes.append(len(xb))
        return squared(model, xb + torch.randn_like(xb), yb)

    model = nn.Linear(6, 2)
    fit(model, data, epochs=1, loss=noisy, batch_size=25, **QUIET)
    assert max(sizes) == 25
    state = torch.get_rng_state()
    assert validate(model, data, loss=noisy) == validate(model, data, loss=noisy)
    assert torch.equal(state, torch.get_rng_state())
    none = Split(data.valid.x[:0], data.valid.y[:0])
    rounds = iterative_prune(model, replace(data, valid=none), [0.5], epochs=1, loss=squared, **QUIET)[1]
    assert np.isnan(rounds[0]["loss"])


@pytest.mark.parametrize("of_model, of_images", [
    (torch.float64, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float64), (torch.float32, torch.float16),
    (torch.float32, torch.uint8),
])
def test_images_of_any_type_reach_a_model_in_its_own(of_model, of_images):
    model, raw = create_model("lenet-5-small").to(of_model), torch.randint(0, 256, (16, 1, 28, 28), dtype=torch.uint8)
    part = Split(raw if of_images == torch.uint8 else (raw / 255).to(of_images), torch.arange(16) % 10)
    evaluate(model, part)
    activation_scores(model, part)
    taylor_scores(model, part)
    sensitivity_scan(model, part, sparsities=(0.5,))
    weight_importance(model, Data("any", part, part, part, 10), images=4)
    first_order_scores(model, [(part.x, part.y)])
    wanda_scores(model, [(part.x, part.y)])
    fireify(model, ratio=0.3, images=part.x)
    cache_logits(model, part)
    count_macs(model, part.x[:1])


@pytest.mark.parametrize("compress, recipe", [(deep_compress, QUICK), (soft_compress, SoftRecipe(epochs=1, tune_epochs=1, batch_size=32))])
def test_chains_train_in_mixed_precision(compress, recipe, tmp_path):
    chain = functools.partial(compress, toy_net(), toy_data(), recipe, **QUIET)
    seen, kept = set(), nn.Conv2d.forward

    def noted(self, x):
        y = kept(self, x)
        seen.add((self.training, y.dtype))
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Conv2d, "forward", noted)
        model = chain(path=tmp_path / "small.nncomp", mixed_precision="bf16", folder=tmp_path / "run").model
        assert (True, torch.bfloat16) in seen and (True, torch.float32) not in seen
        full = chain(path=tmp_path / "full.nncomp", folder=tmp_path / "run").model       # another run, not the first one's files
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), full.parameters()))
    with pytest.raises(ValueError, match="mixed_precision must be one of"):
        chain(path=tmp_path / "bad.nncomp", mixed_precision="int8")


def test_rounds_of_pruning_train_in_mixed_precision(tmp_path):
    nets = [toy_net() for _ in range(2)]
    for net, precision in zip(nets, (None, "bf16")):
        iterative_prune(net, toy_data(), [0.5], epochs=2, lr=1e-2, batch_size=32, mixed_precision=precision, **QUIET)
    assert not torch.equal(nets[0][0].weight, nets[1][0].weight) and torch.equal(nets[0][4].weight == 0, nets[1][4].weight == 0)


# --- what is refused before any work is done ---

def test_parts_that_are_compiled_by_themselves_are_named(tmp_path):
    model = toy_net()
    model[0] = torch.compile(model[0], backend="eager")
    for compress, recipe in ((deep_compress, QUICK), (soft_compress, SoftRecipe(epochs=1))):
        with pytest.raises(ValueError, match="^0 is compiled by itself.*before its parts are compiled"):
            compress(model, toy_data(), recipe, path=tmp_path / "a.nncomp", **QUIET)
    assert not list(tmp_path.iterdir())
    fit(model, toy_data(), epochs=1, checkpoint=tmp_path / "run.pt", **QUIET)                # training has no quarrel with it


def test_float16_models_are_refused_where_adam_cannot_train_them(tmp_path):
    half = toy_net().half()
    for train in (lambda: fit(half, toy_data(), epochs=1, **QUIET),
                  lambda: deep_compress(half, toy_data(), QUICK, path=tmp_path / "a.nncomp", **QUIET)):
        with pytest.raises(ValueError, match="float16, too coarse for the sums of 'adam'.*bfloat16"):
            train()
    fit(half, toy_data(), epochs=1, optimizer="sgd", **QUIET)


@pytest.mark.parametrize("options, text", [(dict(max_norm=1.0), "max_norm=1.0 rescales"), (dict(sparse=True), "sparse=True gives sparse")])
def test_embeddings_that_cannot_share(options, text, tmp_path):
    seed_everything(0)
    model = nn.Sequential(nn.Embedding(20, 8, **options), nn.Flatten(), nn.Linear(32, 3))
    part = Split(torch.randint(0, 20, (40, 4)), torch.arange(40) % 3)
    before = copy.deepcopy(model.state_dict())
    for call in (lambda: share_weights(model, 3, trainable=True),
                 lambda: deep_compress(model, Data("tokens", part, part, part, 3), QUICK, path=tmp_path / "a.nncomp", **QUIET)):
        with pytest.raises(ValueError, match=text):
            call()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    if "sparse" in options:
        share_weights(model, 3)


@pytest.mark.parametrize("y", [torch.tensor([0, 1, 3]), torch.tensor([0, -1, 2])])
def test_classes_that_are_none(y):
    part = Split(torch.randn(3, 4), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="the classes of valid must lie in 0…2, got"):
        Data("toy", part, Split(part.x, y), part, 3)
    Data("toy", part, Split(part.x, torch.tensor([0, -100, 2])), part, 3)                     # what cross entropy leaves out
    with pytest.raises(ValueError, match="y of train must be a tensor, got a ndarray"):
        Data("toy", Split(part.x, part.y.numpy()), part, part, 3)


@pytest.mark.parametrize("wrong", [toy_data().train, torch.utils.data.DataLoader(torch.arange(4)), {}])
def test_fit_says_what_data_it_takes(wrong):
    with pytest.raises(ValueError, match="data must be a `Data`.*DatasetSplit"):
        fit(toy_net(), wrong, epochs=1, **QUIET)


def test_a_state_dict_is_no_model(tmp_path):
    with pytest.raises(ValueError, match="must be a module, got a OrderedDict.*compress_file"):
        deep_compress(toy_net().state_dict(), toy_data(), QUICK, path=tmp_path / "a.nncomp", **QUIET)
