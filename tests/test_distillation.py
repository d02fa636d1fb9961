"Distillation beyond the chapter: oracles, teachers of every kind, resumption, and each experiment once on small data."
import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from toys import Stop, toy_data, toy_net

from nncomp.container import load
from nncomp.core import count_parameters, seed_everything
from nncomp.data import Split, load_data, random_affine
from nncomp.deep_compression import Recipe
from nncomp.distillation import (
    SIZES,
    VGG_13,
    Chains,
    CompressedVGG13,
    Course,
    Distillation,
    Distilled,
    DistilledMiniVGG,
    Drops,
    Ensemble,
    Matching,
    Report001,
    SoftTargetRun,
    attention_loss,
    attention_map,
    cache_logits,
    chain_table,
    class_recall,
    decoupled_loss,
    decoupled_parts,
    distill,
    distillation_loss,
    distilled_table,
    expected_calibration_error,
    fixed_views,
    hint_loss,
    judge,
    legacy_distillation_loss,
    report001_table,
    run_chains,
    run_compressed_vgg13,
    run_distilled,
    run_report001,
    run_soft_targets,
    soft_loss,
    soft_targets_table,
    soften,
    standardise_logits,
    teacher_verdict,
    temperature_grid,
    train_by,
    vgg13_table,
    watch,
    without_class,
)
from nncomp.models import create_model
from nncomp.results import Record, _plain, config_id, experiment, find_experiment, load_records, reproduce
from nncomp.training import evaluate, fit

OPTIONS = dict(epochs=2, lr=0.02, batch_size=16, device="cpu", progress=False)
QUICK = Recipe(sparsity=0.8, prune_epochs=1, share_epochs=1, coder="best")
TOY = Distilled(dataset="digits", teacher=Course("lenet-5-small", epochs=1, augment="affine"), views=2, recipe=QUICK, recipe_views=1,
                student=Course("mlp-200", epochs=2, lr=3e-3, augment="affine"))


@pytest.fixture(scope="module")
def teacher():
    net = toy_net(1)
    fit(net, toy_data(), **OPTIONS)
    return net.eval()


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def logits(seed, n=6, classes=5, scale=3.):
    return scale * torch.randn(3, n, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), classes=st.integers(2, 12), temperature=st.floats(0.5, 30), alpha=st.floats(0, 1))
def test_loss_is_the_formula(seed, classes, temperature, alpha):
    z, v, _ = logits(seed, classes=classes)
    y = torch.arange(6) % classes
    p, q = (v / temperature).exp(), (z / temperature).exp()
    p, q = (a / a.sum(1, keepdim=True) for a in (p, q))
    hard = -(z.exp() / z.exp().sum(1, keepdim=True)).log()[range(6), y].mean()
    expected = alpha * temperature**2 * float((p * (p / q).log()).sum(1).mean()) + (1 - alpha) * float(hard)
    assert float(distillation_loss(z, v, y, temperature, alpha)) == pytest.approx(expected, abs=1e-6)
    soft = -float((p * q.log()).sum(1).mean())
    assert float(legacy_distillation_loss(z, v, y, temperature, alpha)) == pytest.approx(alpha * soft + (1 - alpha) * float(hard), abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), temperature=st.floats(0.5, 30))
def test_parts_add_up(seed, temperature):
    z, v, _ = logits(seed)
    y = torch.arange(6) % 5
    right, others = decoupled_parts(z, v, y, temperature)
    assert (right >= -1e-12).all() and (others >= -1e-12).all()
    total = (right + (1 - soften(v, temperature)[range(6), y]) * others).mean() * temperature**2
    assert torch.allclose(total, soft_loss(z, v, temperature))
    assert torch.allclose(decoupled_loss(z, v, y, temperature, right=2., others=3.), (2 * right + 3 * others).mean() * temperature**2)


@pytest.mark.parametrize("loss", [
    distillation_loss, legacy_distillation_loss, decoupled_loss,
    lambda z, v, y: soft_loss(standardise_logits(z), standardise_logits(v))], ids=["kd", "legacy", "dkd", "standardised"])
def test_gradients(loss):
    z, v, _ = logits(0)
    y = torch.arange(6) % 5
    assert torch.autograd.gradcheck(lambda z: loss(z, v, y), z.requires_grad_(True))
    v.requires_grad_(True)
    loss(z, v, y).backward()
    assert v.grad is None and z.grad.abs().sum() > 0


def test_high_temperature_is_logit_matching():
    z, v, _ = logits(3, classes=7)
    z.requires_grad_(True)
    gradient = torch.autograd.grad(soft_loss(z, v, 1e5), z)[0]
    matching = (z - z.mean(1, keepdim=True) - v + v.mean(1, keepdim=True)) / 7 / len(z)
    assert torch.allclose(gradient, matching, atol=1e-5)


def test_extreme_logits_stay_finite():
    z = torch.tensor([[1e4, -1e4, 0.]], requires_grad=True)
    for loss in (distillation_loss, decoupled_loss, legacy_distillation_loss):
        value = loss(z, torch.tensor([[-1e4, 1e4, 0.]]), torch.tensor([0]))
        assert value.isfinite() and torch.autograd.grad(value, z)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_widened(dtype):
    z, v, _ = logits(0)
    y = torch.arange(6) % 5
    low = distillation_loss(z.to(dtype), v.to(dtype), y)
    assert low.dtype == torch.float32 and torch.allclose(low, distillation_loss(z.to(dtype).float(), v.to(dtype).float(), y))


@pytest.mark.parametrize("call, message", [
    (lambda z, y: soften(z, -2), "temperature must be a finite number above 0, got -2"),
    (lambda z, y: soft_loss(z, z, float("inf")), "temperature"),
    (lambda z, y: soft_loss(z, z[:, 1:]), r"got \(6, 5\) and \(6, 4\)"),
    (lambda z, y: soft_loss(z[:0], z[:0]), "n at least 1"),
    (lambda z, y: distillation_loss(z, z[1:], y), r"got \(6, 5\) and \(5, 5\)"),
    (lambda z, y: distillation_loss(z, z, y[1:]), "a label for each of 6 images"),
    (lambda z, y: distillation_loss(z, z, y, alpha=1.5), r"alpha must lie in \[0, 1\], got 1.5"),
    (lambda z, y: distillation_loss(z, z, None, alpha=0.5), "only where alpha is 1"),
    (lambda z, y: legacy_distillation_loss(z, z, y, alpha=-1), "alpha"),
    (lambda z, y: decoupled_loss(z, z, y, right=float("nan")), "weights must be at least 0"),
    (lambda z, y: attention_map(z), "attention needs features"),
    (lambda z, y: hint_loss(z, z[:, 1:]), "regressor"),
    (lambda z, y: Drops((2.,)), "moments"),
    (lambda z, y: Distillation(z.long()), "table"),
    (lambda z, y: Distillation(soften(z)), "probabilities do"),
    (lambda z, y: Distillation(z / 0), "NaN or infinite"),
    (lambda z, y: Distilled(views=3), "40 epochs cannot be 3 views"),
    (lambda z, y: expected_calibration_error(z[:0], y[:0]), "n at least 1"),
    (lambda z, y: class_recall(z, y, 11), "no image has the label 11"),
    (lambda z, y: temperature_grid([]), "nncomp reproduce distilled-mlp-200"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(logits(0)[0].float(), torch.arange(6) % 5)


def test_features():
    a = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(attention_map(a).norm(dim=1), torch.ones(4)) and torch.equal(attention_map(a * 0), torch.zeros(4, 36))
    assert float(attention_loss(a, -7 * a)) < 1e-6
    pooled = F.avg_pool2d(a.square().sum(1, keepdim=True), 2)
    small = torch.randn(4, 2, 3, 3)
    expected = (F.normalize(small.square().sum(1).flatten(1), dim=1) - F.normalize(pooled.flatten(1), dim=1)).norm(dim=1).mean()
    assert torch.allclose(attention_loss(small, a), expected, atol=1e-6)


def test_watching_leaves_nothing_behind(teacher):
    names = ["0", "2"]
    with pytest.raises(RuntimeError), watch(teacher, names) as seen:
        teacher(torch.zeros(1, 1, 4, 4))
        assert list(seen) == names
        raise RuntimeError
    assert not any(m._forward_hooks for m in teacher.modules())
    with pytest.raises(ValueError, match="no layer 'x'"), watch(teacher, ["x"]):
        pass


def test_shuffled_rows_follow_their_images(teacher):
    data, known = toy_data(), cache_logits(teacher, toy_data().train)
    live, cached = toy_net(), toy_net()
    a, b = distill(live, teacher, data, **OPTIONS), distill(cached, known, data, **OPTIONS)
    assert [r["loss"] for r in a] == pytest.approx([r["loss"] for r in b], abs=1e-4)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(1))
    moved = replace(data, train=Split(data.train.x[order], data.train.y[order]))
    assert torch.equal(cache_logits(teacher, moved.train).argmax(1), known[order].argmax(1))


def test_same_crop_for_both(teacher):
    seen = []

    class Recorder(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            if len(x) == 16:
                seen.append(x.detach().clone())
            return self.net(x)

    student, watcher = Recorder(toy_net()), Recorder(copy.deepcopy(teacher)).eval()
    data = toy_data()
    data = replace(data, valid=Split(data.valid.x[:5], data.valid.y[:5]))
    distill(student, watcher, data, augment=random_affine, **OPTIONS)
    assert len(seen) == 24 and all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2]))
    assert not torch.equal(seen[0], seen[12])


def test_teacher_is_frozen(teacher):
    teacher.zero_grad(set_to_none=True)
    before = copy.deepcopy(teacher)
    distill(toy_net(), teacher, toy_data(), **OPTIONS)
    assert same(before, teacher) and not teacher.training and all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("make", [
    lambda: toy_net(1).double().eval(),
    lambda: toy_net(1).to(torch.bfloat16).eval(),
    lambda: [toy_net(1).eval(), toy_net(2).eval()],
    lambda: nn.Sequential(nn.Upsample(size=(8, 8)), nn.Flatten(), nn.Linear(64, 3)).eval(),
    lambda: np.ones((96, 3), dtype=np.float64),
], ids=["double", "bfloat16", "ensemble", "larger images", "array"])
def test_any_teacher(make):
    history = distill(toy_net(), make(), toy_data(), **OPTIONS)
    assert all(np.isfinite(r["loss"]) for r in history)


def test_ensemble_is_the_geometric_mean():
    nets = [toy_net(k).eval() for k in range(3)]
    x = toy_data().test.x
    p = torch.stack([net(x).softmax(1) for net in nets]).log().mean(0).exp()
    assert torch.allclose(Ensemble(nets)(x).softmax(1), p / p.sum(1, keepdim=True), atol=1e-6)


def test_refusals(teacher):
    data, known = toy_data(), cache_logits(teacher, toy_data().train)
    four = nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).eval()
    for bad, message, more in ((known, "augmented", dict(augment=random_affine)), (known[1:], "95 images and 96", {}),
                               (toy_net(), "training mode", {}), (four, r"\(16, 3\) and \(16, 4\)", {})):
        with pytest.raises(ValueError, match=message):
            distill(toy_net(), bad, data, **OPTIONS, **more)
    with pytest.raises(ValueError, match="share parameters"):
        distill(teacher, nn.Sequential(teacher).eval(), data, **OPTIONS)
    with pytest.raises(TypeError):
        distill(toy_net(), teacher, data, temprature=3)
    task = Distillation(known)
    with pytest.raises(ValueError, match="augmented"):
        fit(toy_net(), data, loss=task, callbacks=[task], augment=random_affine, **OPTIONS)
    half = copy.deepcopy(teacher)
    half[1].train()
    with pytest.raises(ValueError, match="training mode"):
        distill(toy_net(), half, data, **OPTIONS)


@pytest.mark.parametrize("cached", [False, True])
def test_resumes_exactly_and_only_with_its_teacher(cached, teacher, tmp_path):
    data, path = toy_data(), tmp_path / "epochs.pt"
    source = cache_logits(teacher, data.train) if cached else teacher
    whole, parts = toy_net(), toy_net()
    options = OPTIONS | dict(epochs=3)
    distill(whole, source, data, **options)
    with pytest.raises(KeyboardInterrupt):
        distill(parts, source, data, callbacks=[Stop(2)], checkpoint=path, **options)
    parts = toy_net()
    distill(parts, source, data, callbacks=[Stop(-1)], checkpoint=path, **options)
    assert same(whole, parts)
    for other in (dict(temperature=5.), dict(loss=decoupled_loss)):
        with pytest.raises(ValueError, match="belongs to another run"):
            distill(toy_net(), source, data, callbacks=[Stop(-1)], checkpoint=path, **options, **other)
    with pytest.raises(ValueError, match="belongs to another run"):
        distill(toy_net(), toy_net(7).eval(), data, callbacks=[Stop(-1)], checkpoint=path, **options)


def test_regressors_resume(teacher, tmp_path):
    def run(stop, **more):
        net = toy_net()
        torch.manual_seed(3)
        regressor = nn.Conv2d(4, 4, 1)
        with watch(net, ["2"]) as mine, watch(teacher, ["2"]) as theirs:
            task = Matching(mine, theirs, {"2": "2"}, loss=hint_loss, weight=0.1, regressors={"2": regressor})
            distill(net, teacher, toy_data(), callbacks=[task, stop], **OPTIONS, **more)
        return net, regressor
    net, regressor = run(Stop(-1))
    with pytest.raises(KeyboardInterrupt):
        run(Stop(1), checkpoint=tmp_path / "epochs.pt")
    again, learnt = run(Stop(-1), checkpoint=tmp_path / "epochs.pt")
    assert same(net, again) and same(regressor, learnt)


def test_alpha_and_labels(teacher):
    data, known = toy_data(), cache_logits(teacher, toy_data().train)
    plain, none = toy_net(), toy_net()
    fit(plain, data, **OPTIONS)
    distill(none, known, data, alpha=0., **OPTIONS)
    assert same(plain, none)
    blind, other = toy_net(), toy_net()
    distill(blind, known, data, alpha=1., **OPTIONS)
    distill(other, known, replace(data, train=Split(data.train.x, 0 * data.train.y)), alpha=1., **OPTIONS)
    assert same(blind, other)


def test_mixed_precision(teacher):
    history = distill(toy_net(), teacher, toy_data(), mixed_precision="bf16", **OPTIONS)
    assert np.isfinite(history[-1]["loss"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_teacher_on_another_device(teacher):
    there = copy.deepcopy(teacher).cuda()
    distill(toy_net(), there, toy_data(), **OPTIONS)
    assert cache_logits(there, toy_data().train).device.type == "cpu"


def test_views():
    data = toy_data(n=1100)
    views = fixed_views(data, lambda x, g: x + torch.randn(1, generator=g), 3)
    shift = (views.train.x.view(3, 1100, -1) - data.train.x.flatten(1)).mean((1, 2))
    assert len(views.train) == 3300 and torch.equal(views.train.y, data.train.y.repeat(3)) and len(shift.unique()) == 3
    assert torch.equal(fixed_views(data, lambda x, g: x + torch.randn(1, generator=g), 3).train.x, views.train.x)


def test_calibration_against_bins():
    z = logits(5, n=400, classes=4, scale=1.)[0]
    y = torch.randint(4, (400,), generator=torch.Generator().manual_seed(0))
    p, answer = z.softmax(1).max(1)
    edges = np.digitize(p.numpy(), np.linspace(0, 1, 11), right=True)
    bins = [torch.from_numpy(edges == b) for b in range(1, 11) if (edges == b).any()]
    gaps = [abs(float((answer == y)[b].double().mean() - p[b].mean())) * float(b.double().mean()) for b in bins]
    assert expected_calibration_error(z, y, bins=10) == pytest.approx(sum(gaps), abs=1e-9)


def test_without_class():
    split = toy_data().train
    rest, kept = without_class(split, 1)
    assert 1 not in rest.y and len(rest) == int(kept.sum()) == int((split.y != 1).sum()) and torch.equal(split.x[kept], rest.x)


def test_courses(tmp_path):
    data = load_data("digits")
    data = replace(data, train=Split(data.train.x[:200], data.train.y[:200]))
    course = Course("mlp-10", epochs=2, drops=(0.5,))
    net = train_by(course, data, 0, tmp_path / "new" / "net", progress=False)
    seed_everything(0)
    plain = create_model("mlp-10")
    fit(plain, data, seed=0, epochs=2, lr=1e-3, schedule="constant", callbacks=[Drops((0.5,))], progress=False)
    assert same(net, plain) and not net.training
    assert same(train_by(course, data, 0, tmp_path / "new" / "net", teacher=lambda: 1 / 0, progress=False), net)
    assert judge(net, data.test)["error_percent"] == evaluate(net, data.test).error_percent


def test_sizes_and_pairs():
    assert count_parameters(create_model("mlp-200")) == 159_010 and count_parameters(create_model("mlp-1200-300-100")) == 1_333_410
    assert [count_parameters(create_model(f"mlp-{n}")) for n in SIZES] == [n * 785 + 10 * (n + 1) for n in SIZES]
    assert count_parameters(create_model(DistilledMiniVGG().student.model)) == 1_575_690
    assert count_parameters(create_model(VGG_13.model)) == 9_416_010
    assert replace(DistilledMiniVGG().student, model="vgg13", epochs=10) == DistilledMiniVGG().teacher == CompressedVGG13().course


def test_distilled_both_ways(tmp_path):
    cached = run_distilled(TOY, 0, tmp_path / "cached", progress=False)
    fresh = replace(TOY, views=0, recipe_views=0, teachers=1)
    live = run_distilled(fresh, 5, tmp_path / "live", teachers=tmp_path / "cached", progress=False)
    names = [p.name for p in (tmp_path / "cached").glob("lenet-5-small-*.nncomp")]
    assert len(names) == 1 and names[0].endswith("-0.nncomp") and not list((tmp_path / "live").glob("lenet-5-small-*"))
    for metrics in (cached, live):
        assert metrics["artefact"].stat().st_size == metrics["file_bytes"] and metrics["test_images"] == 297
        net = load(metrics["artefact"], into=create_model("mlp-200"))
        assert evaluate(net, load_data("digits").test).error_percent == metrics["file_error_percent"]
        assert len(json.dumps(metrics | {"artefact": ""})) < 4000
    assert cached["networks"]["teacher"] == live["networks"]["teacher"] and cached["networks"]["alone"] != live["networks"]["alone"]
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "cached").rglob("*.json")}
    assert run_distilled(TOY, 0, tmp_path / "cached", progress=False) == cached
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cached").rglob("*.json")} == files


def test_vgg13(tmp_path):
    config = CompressedVGG13(dataset="digits", course=Course("lenet-5-small", epochs=1, augment="affine"), recipe=QUICK)
    metrics = run_compressed_vgg13(config, 0, tmp_path, progress=False)
    assert metrics["file_bytes"] < metrics["dense_bytes"] == 4 * 44_426
    assert metrics["compressed"]["sparsity"] == pytest.approx(0.8, abs=1e-3)
    taught = run_compressed_vgg13(replace(config, alpha=0.9), 0, tmp_path / "taught", teachers=tmp_path, progress=False)
    assert taught["dense"] == metrics["dense"] and taught["compressed"]["loss"] != metrics["compressed"]["loss"]


def test_soft_targets(tmp_path):
    config = SoftTargetRun(dataset="digits", teacher=Course("lenet-5-small", epochs=2, lr=3e-3),
                           student=Course("mlp-10", epochs=1, lr=3e-3),
                           temperatures=(1., 4.), alphas=(0.5, 1.), sizes=("mlp-10",))
    metrics = run_soft_targets(config, 0, tmp_path, progress=False)
    assert set(metrics["grid"]) == {"1/0.5", "1/1", "4/0.5", "4/1"} and metrics["grid"][metrics["chosen"]] == min(metrics["grid"].values())
    assert metrics["missing"]["alone"] == 0 and set(metrics["sizes"]["mlp-10"]) == {"alone", "distilled"}
    assert metrics == run_soft_targets(config, 0, tmp_path, progress=False)


def test_report001(tmp_path):
    config = Report001(dataset="digits", teacher=Course("lenet-5-small", epochs=1), temperatures=(5.,),
                       student=Course("mlp-10", epochs=1, drops=(0.5,)))
    metrics = run_report001(config, 0, tmp_path, progress=False)
    assert set(metrics["arms"]) == {"alone", "squared-5", "legacy-5"}
    assert metrics["chosen"] == {"squared": "squared-5", "legacy": "legacy-5"}


def test_chains(tmp_path):
    config = Chains(dataset="digits", course=Course("mlp-10", epochs=1), chains=((), ("mlp-25",), ("mlp-50", "mlp-25")))
    metrics = run_chains(config, 0, tmp_path, progress=False)
    assert list(metrics["networks"]) == ["mlp-10", "mlp-25", "mlp-25-mlp-10", "mlp-50", "mlp-50-mlp-25", "mlp-50-mlp-25-mlp-10"]
    taught = load(tmp_path / "mlp-50-mlp-25.nncomp")
    assert not torch.equal(taught["fc1.weight"], load(tmp_path / "mlp-25.nncomp")["fc1.weight"])


def test_reproduce_keeps_the_teacher_beside(tmp_path):
    @experiment("toy-distilled", configs=[TOY])
    def toy_distilled(config: Distilled, seed: int, folder: Path) -> dict:
        return run_distilled(config, seed, folder, teachers=folder.parents[2] / "teachers", progress=False)
    record, = reproduce("toy-distilled", 1, root=tmp_path, progress=False)
    assert len(list((tmp_path / "runs" / "teachers").glob("*.nncomp"))) == 1
    assert load_records("toy-distilled", tmp_path) == [record] and record.artefact_bytes == record.metrics["file_bytes"]
    assert (tmp_path / "models" / "toy-distilled.nncomp").stat().st_size == record.artefact_bytes


def arm(error):
    return dict(error_percent=error, ece=error / 100, loss=0.1, bytes=int(1000 * error), dense_bytes=1, sparsity=0.9)


def made_minivgg(k):
    students = {"alone": arm(10.5 + k / 10), "distilled": arm(9.5 + k / 9)}
    return dict(networks={"teacher": arm(6.), **students, "alone-compressed": arm(11. + k / 10), "distilled-compressed": arm(11. + k % 2)})


def made_soft_targets(k):
    config = SoftTargetRun()
    grid = {f"{T:g}/{a:g}": [1. + T * a + k, 0.1] for T in config.temperatures for a in config.alphas}
    sizes = {m: {"alone": arm(3. + k / 10), "distilled": arm(2. + k / 9)} for m in config.sizes}
    return dict(grid=grid, chosen="4/0.9", sizes=sizes, missing=dict(alone=0., distilled=50. + k))


def made_report001(k):
    arms = ["alone", *(f"{loss}-{T:g}" for T in Report001().temperatures for loss in ("squared", "legacy"))]
    found = {name: dict(valid=1. + i, test=20. + i + k / 10) for i, name in enumerate(arms)}
    return dict(arms=found, chosen=dict(squared="squared-5", legacy="legacy-5"), teacher=arm(15.))


def made_chains(k):
    whole = [(*chain, Chains().course.model) for chain in Chains().chains]
    return dict(networks={"-".join(links[:i]): 18. + len(links) + k / 10 for links in whole for i in range(1, len(links) + 1)})


MADE = {
    "distilled-minivgg": made_minivgg,
    "distilled-mlp-200": made_soft_targets,
    "report001-distillation": made_report001,
    "assistant-chains": made_chains,
    "compressed-vgg13": lambda k: dict(dense=arm(6.5 + k), compressed=arm(7. + k), dense_bytes=37_664_040, file_bytes=600_000 + k),
    "compressed-vgg13-longer": lambda k: dict(dense=arm(3.5 + k), compressed=arm(4. + k), dense_bytes=37_664_040, file_bytes=500_000 + k),
}
TABLES = {
    "distilled-minivgg": partial(distilled_table, "distilled-minivgg", report={"alone": "79.7"}),
    "distilled-mlp-200": soft_targets_table,
    "report001-distillation": report001_table,
    "assistant-chains": chain_table,
    "compressed-vgg13": vgg13_table,
}


def put(root, name, seeds, config=None):
    "Records of an experiment on disk, from made-up metrics."
    config = config or find_experiment(name).configs[0]
    for k in seeds:
        fields, = _plain(config, "config").values()
        record = Record(name, config_id(config, name), k, fields, MADE[name](k), None, {}, "", 1, "", 0., "")
        path = root / "results" / name / record.id / f"seed-{k}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record.__dict__))
        assert path.stat().st_size < 8000


@pytest.mark.parametrize("name", list(TABLES))
@pytest.mark.parametrize("n", [0, 1, 5])
def test_tables_from_records(name, n, tmp_path):
    pytest.importorskip("pandas")
    put(tmp_path, name, range(n))
    table = TABLES[name](root=tmp_path)
    text = table.to_string()
    if not n:
        assert f"not run yet: nncomp reproduce {name} --seeds" in text
    else:
        assert "not run yet" not in text and ("(5)" in text) == (n == 5) and ("[" in text) == (n == 5 and name != "compressed-vgg13")


def test_what_the_tables_say(tmp_path):
    pytest.importorskip("scipy")
    for name in MADE:
        put(tmp_path, name, range(5))
    table = distilled_table("distilled-minivgg", tmp_path).set_index("network")
    brought = table["the teacher brought, points"]
    assert brought["student, taught"].startswith("+0.98") and brought["student, taught"].endswith("better")
    assert "no difference" in brought["student taught, then compressed"]
    assert teacher_verdict("distilled-minivgg", tmp_path).count("no difference seen") == 1
    assert "too few records" in teacher_verdict("distilled-lenet-300-100", tmp_path)
    grid = temperature_grid(load_records("distilled-mlp-200", tmp_path))
    assert grid.shape == (5, 5) and float(grid[2, 4]) == 1 + 4 * 1 + 2
    chains = chain_table(tmp_path).set_index("lesson").iloc[:, -1]
    assert chains["vgg13 → minivgg"] == "" and "better" in chains["minivgg"]
    assert report001_table(tmp_path).iloc[-1, 0] == "chosen on validation images, without T²"
    vgg = vgg13_table(tmp_path)
    assert list(vgg["VGG-13"]) == ["dense, 10 epochs", "compressed, 10 epochs", "dense, 30 epochs", "compressed, 30 epochs"]
    assert vgg["accuracy, %"][3].startswith("94.0")
    assert list(report001_table(tmp_path).student[:4]) == ["(its teacher)", "alone", "T = 5, with T²", "T = 10, with T²"]


def test_records_of_another_configuration_do_not_mix(tmp_path):
    pytest.importorskip("pandas")
    put(tmp_path, "distilled-minivgg", range(2))
    put(tmp_path, "distilled-minivgg", [9], DistilledMiniVGG(teachers=3))
    assert "(2)" in distilled_table("distilled-minivgg", tmp_path).to_string()


def test_classes_of_any_integer_type():
    z, v, y = torch.randn(6, 4), torch.randn(6, 4), torch.arange(6) % 4
    for loss in (distillation_loss, legacy_distillation_loss, decoupled_loss):
        assert torch.equal(loss(z, v, y.int()), loss(z, v, y))


@pytest.mark.parametrize("loss", [hint_loss, attention_loss])
def test_features_of_a_run_in_mixed_precision(loss):
    data, teacher, student = toy_data(), toy_net(1).eval(), toy_net()
    from nncomp.distillation import watch
    with watch(student, ["0"]) as mine, watch(teacher, ["0"]) as theirs:
        regressors = {"0": nn.Conv2d(4, 4, 1)} if loss is hint_loss else None
        match = Matching(mine, theirs, {"0": "0"}, loss=loss, regressors=regressors)
        history = distill(student, teacher, data, epochs=1, mixed_precision="bf16", callbacks=[match], device="cpu", progress=False)
    assert np.isfinite(history[0]["loss"])


def test_views_have_the_type_and_the_size_that_the_augmentation_gives():
    data = toy_data()
    views = fixed_views(data, lambda x, g: x[..., 1:].double(), 2)
    assert views.train.x.shape == (192, 1, 4, 3) and views.train.x.dtype == torch.float64
    assert torch.equal(views.train.x[96:], data.train.x[..., 1:].double()) and torch.equal(views.train.y[96:], data.train.y)
    small = lambda part: Split((part.x.clamp(0, 1) * 255).to(torch.uint8), part.y)  # noqa: E731
    images = replace(data, train=small(data.train), valid=small(data.valid), test=small(data.test))
    with pytest.raises(ValueError, match="must be alike"):                # not a train part of zeros
        fixed_views(images, lambda x, g: x.float() / 255, 2)


def test_distilling_on_something_that_is_no_data():
    with pytest.raises(ValueError, match="data must be"):
        distill(toy_net(), toy_net().eval(), [(torch.zeros(1, 1, 4, 4), torch.zeros(1))])
