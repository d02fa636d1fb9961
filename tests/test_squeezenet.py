"Fire modules, squeezed networks, folding, conversion, and the experiments on small data."
import ast
import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from nncomp.container import load
from nncomp.core import count_parameters, evaluating, seed_everything
from nncomp.data import Split, load_data
from nncomp.deep_compression import Recipe
from nncomp.measure import count_macs
from nncomp.models import create_model
from nncomp.results import Record, _plain, config_id, find_experiment
from nncomp.squeezenet import (
    BASE,
    MINIATURES,
    QUESTIONS,
    REPORT_004,
    Augmented,
    Conversion,
    Fire,
    Miniature,
    SoftTargets,
    Squeezed,
    Training,
    augmented,
    conversion_table,
    fire_net,
    fireify,
    fold_batch_norm,
    question_table,
    replaceable,
    run_conversion,
    run_miniature,
    run_squeezed,
    squeezed_table,
    widened,
)
from nncomp.training import evaluate, fit

QUICK = Training(1, batch_size=256)


@pytest.fixture
def few(monkeypatch):
    "Experiments on 300 images of the built-in digits."
    def load_few(name, size=None, device="cpu"):
        data = load_data(name, size=size)
        sizes = {"train": 300, "valid": 60, "test": 60}
        return replace(data, **{part: Split(getattr(data, part).x[:n], getattr(data, part).y[:n]) for part, n in sizes.items()})

    monkeypatch.setattr("nncomp.squeezenet.load_data", load_few)


def lived_in(net):
    "Batch normalisations as if they had been trained."
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            nn.init.uniform_(m.weight, -1.5, 1.5)
            nn.init.normal_(m.bias)
    return net


LIKE = [(3, 1, None), (3, 2, 1), (5, 1, 0), (5, 1, 2), (5, 2, 0), (4, 1, 0), (4, 2, 1), (2, 2, 0), (7, 2, 3), (3, 1, 3)]


@pytest.mark.parametrize("kernel, stride, padding", LIKE)
def test_fire_has_the_shape_of_the_convolution(kernel, stride, padding):
    like = nn.Conv2d(4, 6, kernel, stride, kernel // 2 if padding is None else padding)
    for h, w in ((9, 12), (16, 16)):
        x = torch.randn(2, 4, h, w)
        assert Fire(4, 2, 3, 3, kernel=kernel, stride=stride, padding=padding)(x).shape == like(x).shape


@pytest.mark.parametrize("kernel, padding", [(3, 1), (5, 0), (5, 2), (7, 3)])
def test_narrow_kernels_look_at_the_middle(kernel, padding):
    fire = Fire(3, 2, 1, 1, kernel=kernel, padding=padding, relu=False)
    with torch.no_grad():
        fire.expand3x3.weight.zero_()
        fire.expand3x3.weight[0, :, kernel // 2, kernel // 2] = fire.expand1x1.weight[0, :, 0, 0]
        y = fire(torch.randn(2, 3, 11, 10))
    assert torch.allclose(y[:, 0], y[:, 1], atol=1e-6)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("expand", [(3, 4), (0, 4), (3, 0)])
def test_fold_fire(batch_norm, expand):
    seed_everything(0)
    fire = lived_in(Fire(5, 2, *expand, batch_norm=batch_norm)).eval()
    folded, x = fold_batch_norm(fire), torch.randn(3, 5, 6, 6)
    assert torch.allclose(folded(x), fire(x), atol=1e-4) and not folded.training
    assert count_parameters(folded) == count_parameters(Fire(5, 2, *expand)) and not any("norm" in key for key in folded.state_dict())


@pytest.mark.parametrize("name", ["squeezed-lenet", "squeezed-vgg", "vgg11"])
def test_fold_network(name):
    seed_everything(0)
    net = lived_in(create_model(name) if name == "vgg11" else create_model(name, batch_norm=True)).eval()
    x = torch.randn(2, 1 if name == "squeezed-lenet" else 3, 32, 32)
    keys = list(net.state_dict())
    with torch.no_grad():
        a, b = net(x), fold_batch_norm(net)(x)
    assert float((a - b).abs().max() / a.abs().max()) < 1e-3 and list(net.state_dict()) == keys


def test_fold_without_scale():
    net = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3, affine=False)).eval()
    net[1].running_var.uniform_(0.5, 2)
    x = torch.randn(1, 2, 5, 5)
    assert torch.allclose(fold_batch_norm(net)(x), net(x), atol=1e-5)


@pytest.mark.parametrize("ratio", [0., 0.05, 0.125, 0.3, 0.5])
@pytest.mark.parametrize("share", [0., 0.5, 1.])
def test_ratio_is_kept(ratio, share):
    net = create_model("vgg11")
    made = fireify(net, ratio=ratio, share3x3=share, init="random")
    for name, conv in replaceable(net).items():
        fire = made.get_submodule(name)
        assert count_parameters(fire) <= ratio * count_parameters(conv) or fire.squeeze.out_channels == 1
        assert fire.squeeze.out_channels <= conv.in_channels
    assert made.conv1 is not net.conv1 and isinstance(made.conv1, nn.Conv2d)


@pytest.mark.parametrize("budget", [60_000, 200_000, 1_000_000, 5_000_000])
def test_budget_is_kept_and_used(budget):
    net = create_model("vgg11")
    n = count_parameters(fireify(net, budget=budget, init="random"))
    assert 0.85 * budget < n <= budget


def test_converting_leaves_the_original():
    net = create_model("lenet-5-32").train()
    before = {key: t.clone() for key, t in net.state_dict().items()}
    made = fireify(net, ratio=0.3, images=torch.randn(20, 1, 32, 32))
    assert net.training and made.training and made.conv3.training and not any(isinstance(m, Fire) for m in net.modules())
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())
    assert sum(count_macs(made, (1, 32, 32)).values()) < sum(count_macs(net, (1, 32, 32)).values())
    with pytest.raises(ValueError, match="no convolution to replace"):
        fireify(made)                                                       # what is a Fire module stays one


def test_shared_convolution_stays_shared():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    made = fireify(nn.Sequential(nn.Conv2d(1, 4, 3), conv, nn.ReLU(), conv), ratio=0.5)
    assert isinstance(made[1], Fire) and made[1] is made[3]


def test_unused_convolution_is_named():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            return self.b(self.a(x)).mean((2, 3))

    with pytest.raises(ValueError, match="not used when the model sees images"):
        fireify(Half(), images=torch.randn(4, 1, 8, 8))
    fireify(Half(), images=torch.randn(4, 1, 8, 8), keep="c")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_starts_are_ordered(dtype):
    "On inputs like those of a trained layer, least squares is nearest to the original and random is farthest."
    seed_everything(0)
    net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.Flatten()).to(dtype).eval()
    x = torch.nn.functional.avg_pool2d(torch.randn(64, 1, 24, 24, dtype=dtype), 3, 1)
    error = {}
    for init in ("least-squares", "svd", "random"):
        made = fireify(net, ratio=0.4, images=x, init=init)
        with evaluating(net), evaluating(made):
            error[init] = float((made(x) - net(x)).square().mean() / net(x).var())
    assert made(x).dtype == dtype
    assert error["least-squares"] < error["svd"] < error["random"] and error["least-squares"] < 0.2, error


def test_resnet_with_images():
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.resnet18(num_classes=5).eval()
    made = fireify(net, budget=1_000_000, images=torch.randn(4, 3, 32, 32))
    assert 900_000 < count_parameters(made) <= 1_000_000 and made(torch.randn(2, 3, 32, 32)).isfinite().all()
    mobile = torchvision.models.mobilenet_v2(num_classes=5)
    unfit = r"features.1.conv.0.0 \(groups=32\), .*, features.17.conv.1.0 \(groups=960\) cannot become Fire modules"
    with pytest.raises(ValueError, match=unfit) as said:
        replaceable(mobile, keep="features.1.conv.1")
    advice = str(said.value).split("keep=")[1]
    with pytest.raises(ValueError, match="no convolution to replace"):  # the advice names all of them, and what was kept already
        replaceable(mobile, keep=ast.literal_eval(advice))
    assert advice.startswith("('features.1.conv.1', 'features.1.conv.0.0', ")


def test_a_fire_network_learns():
    data = load_data("digits", size=32)
    seed_everything(0)
    net = create_model("squeezed-lenet", batch_norm=True)
    fit(net, data, epochs=5, lr=1e-2, batch_size=64, channels_last=True, device="cpu", progress=False)
    assert evaluate(fold_batch_norm(net), data.test).accuracy > 0.9
    assert evaluate(fold_batch_norm(net), data.test).errors == evaluate(net, data.test).errors


def test_augmented_everywhere():
    data = augmented("digits", 28)
    assert data.augment is None and isinstance(data.to("cpu"), Augmented)
    seen = []
    noisy = replace(data, augment=lambda xb, generator: (seen.append(len(xb)), xb)[1])
    fit(create_model("lenet-300-100"), noisy, epochs=1, batch_size=500, device="cpu", progress=False)
    assert sum(seen) == len(data.train)


def test_teacher_is_left_alone():
    teacher, student = create_model("squeezed-lenet", batch_norm=True), create_model("squeezed-lenet")
    before = {k: t.clone() for k, t in teacher.state_dict().items()}
    loss, logits = SoftTargets(teacher)(student, torch.randn(4, 1, 32, 32), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    assert logits.shape == (4, 10) and all(p.grad is None for p in teacher.parameters())
    assert teacher.training and all(torch.equal(t, before[k]) for k, t in teacher.state_dict().items())


def test_squeezed_run_resumes_and_files(few, tmp_path):
    tiny = Squeezed(dataset="digits", dense_training=QUICK, plain=QUICK, normalised=QUICK, distilled=QUICK,
                    recipe=Recipe(prune_epochs=1, share_epochs=1, batch_size=300), dense_recipe=Recipe(prune_epochs=0, share_epochs=0))
    metrics = run_squeezed(tiny, 0, tmp_path, device="cpu", progress=False)
    assert list(metrics["history"]) == ["dense", "plain", "normalised", "distilled"]
    assert set(metrics["error_percent"]) == {"dense", "plain", "normalised", "distilled", "file", "dense file"}
    assert set(metrics["bytes"]) == {"dense", metrics["chosen"], "file", "dense file"} and metrics["bytes"][metrics["chosen"]] == 38_280
    assert metrics["artefact"].stat().st_size == metrics["file_bytes"] == metrics["bytes"]["file"]
    load(metrics["artefact"], into=create_model("squeezed-lenet"))
    again = run_squeezed(tiny, 0, tmp_path, device="cpu", progress=False)
    del again["stages"], metrics["stages"]                                  # they hold seconds
    assert again == metrics


@pytest.mark.parametrize("name", list(REPORT_004))
def test_frozen_configs(name):
    config, = find_experiment(name).configs
    assert config.normalised is not None and config.recipe.coder == "best"
    record = json.dumps(asdict(config))
    epochs = sum(t.epochs for t in config.arms().values()) + config.dense_training.epochs
    assert len(record) + 8 * epochs < 8_000                                # a record has at most 10 kB


def made_up(root, name, config, seed, metrics):
    "A record as `reproduce` would write it."
    fields, = _plain(config, "config").values()
    record = Record(name, config_id(config, name), seed, fields, metrics, None, {}, "none", 1, "none", 1., "2026-01-01")
    path = root / "results" / name / record.id / f"seed-{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(record)))


@pytest.mark.parametrize("seeds", [0, 1, 5])
def test_squeezed_table(seeds, tmp_path):
    name = "squeezed-vgg-cifar10"
    config, = find_experiment(name).configs
    for seed in range(seeds):
        error = {"dense": 7. + seed / 10, "plain": 20., "normalised": 9.5, "distilled": 9. + seed / 20, "file": 9.4, "dense file": 7.5}
        size = {"dense": 80_000_000, "distilled": 2_916_136, "file": 250_000, "dense file": 2_000_000}
        made_up(tmp_path, name, config, seed, dict(error_percent=error, bytes=size, chosen="distilled"))
    table = squeezed_table(name, tmp_path)
    assert len(table) == (6 if seeds else 2) and table.iloc[1, 1] == "62, 2.9 MB"
    if not seeds:
        assert table.iloc[0, 2] == "not run yet: nncomp reproduce squeezed-vgg-cifar10 --seeds 3"
    else:
        assert table.iloc[4]["bytes"].startswith("250,000") and table.iloc[0, 2].startswith("93" if seeds == 1 else "92.8")
        assert table.iloc[4]["times smaller"].startswith("320")
        assert ("worse" in table.iloc[1, 5]) == (seeds == 5)


@pytest.mark.parametrize("seeds", [0, 1, 5])
@pytest.mark.parametrize("question", list(QUESTIONS))
def test_question_tables(question, seeds, tmp_path):
    for i, config in enumerate(QUESTIONS[question].values()):
        for seed in range(seeds):
            made_up(tmp_path, "fire-miniatures", config, seed, dict(accuracy=80. - i + seed / 10))
    table = question_table(question, tmp_path)
    assert len(table) == len(QUESTIONS[question]) >= 2 and table.iloc[0, 4] == ""
    assert table.iloc[0, 3].startswith({0: "not run yet", 1: "80", 5: "80.20"}[seeds])
    assert ("worse" in table.iloc[1, 4]) == (seeds == 5)


def test_miniatures(few, tmp_path):
    assert len(MINIATURES) == len(set(MINIATURES)) and find_experiment("fire-miniatures").configs == MINIATURES
    assert QUESTIONS["share of 3 × 3"]["0.5"] == QUESTIONS["bypass"]["none"] == Miniature(BASE)
    assert len({config_id(c, "fire-miniatures") for c in MINIATURES}) == len(MINIATURES)
    tiny = Miniature(widened(BASE, 0.1), "digits", bypass=True, training=QUICK)
    metrics = run_miniature(tiny, 0, tmp_path, device="cpu", progress=False)
    assert 0 <= metrics["accuracy"] <= 100 and metrics["macs"] == sum(count_macs(tiny.net(), (1, 32, 32)).values())
    assert run_miniature(tiny, 0, tmp_path, device="cpu", progress=False) == metrics


@pytest.mark.parametrize("seeds", [0, 1, 5])
def test_conversion_table(seeds, tmp_path):
    for seed in range(seeds):
        converted, tuned = (dict(zip(Conversion().inits, v)) for v in ((10., 50., 70.), (70. + seed / 9, 80., 85.)))
        metrics = dict(parameters=9, converted_parameters=4, original=90., converted=converted, tuned=tuned)
        made_up(tmp_path, "fireify-minivgg", Conversion(), seed, metrics)
    table = conversion_table(tmp_path)
    assert len(table) == (4 if seeds else 3)
    assert "better" in table.iloc[-1, 4] if seeds == 5 else table.iloc[-1, 4] in ("", "–")


def test_conversion_run(few, tmp_path):
    config = Conversion("lenet-5-small", "digits", QUICK, images=50, tuning=QUICK)
    metrics = run_conversion(config, 0, tmp_path, device="cpu", progress=False)
    assert set(metrics["tuned"]) == set(metrics["converted"]) == set(config.inits)
    assert run_conversion(config, 0, tmp_path, device="cpu", progress=False) == metrics


def test_plans_are_checked():
    with pytest.raises(ValueError, match="a step is one of M, A, M3, R"):
        fire_net(10, 1, plan=("X",))
    with pytest.raises(ValueError, match="squeeze must be an integer of at least 1"):
        fire_net(10, 1, plan=((0, 4, 4),))
    assert fire_net(10, 3, plan=((2, 4, 4), (2, 4, 4)), bypass=True).fire2.bypass


class Added(nn.Module):
    "A convolution whose output is changed in place by what comes behind it."
    def __init__(self, how):
        super().__init__()
        self.first, self.conv, self.how = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1), how

    def forward(self, x):
        h = self.first(x)
        y = self.conv(h)
        if self.how == "+=":
            y += h
        elif self.how == "+":
            y = y + h
        return y


def test_least_squares_are_fitted_to_what_the_convolution_gave():
    seed_everything(0)
    plain = Added("+")
    changed = Added("+=")
    changed.load_state_dict(plain.state_dict())
    images = torch.randn(40, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(fireify(plain, ratio=0.5, images=images)(images), fireify(changed, ratio=0.5, images=images)(images))


class Standardised(nn.Conv2d):
    "A forward pass of its own."
    def forward(self, x):
        w = self.weight
        return self._conv_forward(x, (w - w.mean()) / w.std(), self.bias)


def test_only_neighbours_that_can_be_folded_are():
    seed_everything(0)
    act, x = nn.ReLU(), torch.randn(5, 3, 8, 8)
    norm = lambda n: nn.Sequential(nn.BatchNorm2d(n))[0]  # noqa: E731
    for net in (nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), act, nn.Conv2d(4, 4, 3), act, norm(4)),   # one activation in two places
                nn.Sequential(Standardised(3, 4, 3), norm(4))):
        with pytest.raises(ValueError, match="has no convolution directly before it"):
            fold_batch_norm(net)
    hooked = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4))
    hooked[0].register_forward_hook(lambda m, args, out: out.relu())
    with pytest.raises(ValueError, match="has no convolution directly before it"):
        fold_batch_norm(hooked)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), act, nn.Conv2d(4, 4, 3), norm(4))
    net(x)
    net.eval()
    folded = fold_batch_norm(net)
    assert len(folded) == 5 and torch.allclose(folded[:3](x), net[:3](x), atol=1e-5) and torch.allclose(folded(x), net(x), atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded)


def test_soft_targets_take_classes_of_any_integer_type():
    net, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.randint(0, 3, (6,))
    loss = SoftTargets(nn.Linear(4, 3).eval())
    assert loss(net, x, y.int())[0] == loss(net, x, y)[0]
