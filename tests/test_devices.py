"The public functions, and the notebooks, with models or data on a GPU: a make-believe one (`make_believe.py`), there on every machine."
import copy
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
FLOWS = {}


def flow(f):
    "Register a function that runs on the make-believe GPU."
    FLOWS[f.__name__] = f
    return f


def digits(device="cpu"):
    from nncomp.data import Data, Split, load_data
    data = load_data("digits", size=8, device=device)
    few = lambda split, n: Split(split.x[:n], split.y[:n])  # noqa: E731
    return Data("digits", few(data.train, 256), few(data.valid, 50), few(data.test, 50), 10)


def dense(device="cuda", norm=False):
    "A small network for the digits, with or without batch normalisation."
    from nncomp.core import seed_everything
    seed_everything(0)
    first = [nn.Flatten(), nn.Linear(64, 32), *([nn.BatchNorm1d(32)] if norm else []), nn.ReLU()]
    return nn.Sequential(*first, nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 10)).to(device)


def conv(device="cuda"):
    from nncomp.core import seed_everything
    seed_everything(0)
    first = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(16, 10)).to(device)


QUICK = dict(epochs=1, batch_size=128, progress=False)


def on_gpu(model):
    places = {t.is_cuda for t in (*model.parameters(), *model.buffers())}
    assert len(places) == 1, "on two devices"
    return places.pop()


@flow
def refusals():
    "What CUDA refuses is refused here: without this the rest would show nothing."
    here, there = torch.randn(3, 3), torch.randn(3, 3).cuda()
    for wrong in (lambda: here + there, lambda: torch.cat([there, here]), lambda: there.mul_(here), lambda: torch.equal(here, there),
                  lambda: here[there > 0], lambda: nn.Linear(3, 3).cuda()(here), lambda: there.numpy(), lambda: torch.histogram(there, 5),
                  lambda: torch.rand(3, device="cuda", generator=torch.Generator())):
        with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
            wrong()
    assert (there + 1).is_cuda and torch.equal((2 * there).cpu(), 2 * there.cpu()) and torch.equal(there[there.cpu() > 0], there[there > 0])


@flow
def datasets():
    from dataclasses import replace

    from torch.utils.data import TensorDataset

    from nncomp.data import Batches, DatasetSplit
    from nncomp.distillation import cache_logits, distill, without_class
    from nncomp.training import evaluate, fit
    from nncomp.weight_sharing import weight_importance
    data, folder = digits(), Path(tempfile.mkdtemp())
    parts = {name: DatasetSplit(TensorDataset(part.x, part.y)) for name in ("train", "valid", "test") for part in [getattr(data, name)]}
    there = replace(data, **parts)
    moved = there.train.to("cuda")
    xb, yb = next(iter(Batches(moved, 4)))
    assert xb.is_cuda and yb.is_cuda and moved.take([0]).x.is_cuda and moved.x[torch.tensor([0]).cuda()].is_cuda
    nets = [dense("cpu"), dense("cpu")]
    for net, one in zip(nets, (data, there)):
        fit(net, one, checkpoint=folder / f"{id(net)}.pt", **QUICK)
        assert on_gpu(net)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters()))
    assert evaluate(nets[1], there.test) == evaluate(nets[0], data.test)
    known = cache_logits(nets[0].eval(), there.train)
    distill(dense(), known, there, **QUICK)
    assert all(h.is_cuda for h in weight_importance(nets[1], there, images=16).values())
    rest, kept = without_class(moved, 3)
    assert rest.x.is_cuda and len(rest) == int(kept.sum())


@flow
def training():
    from nncomp.data import random_affine
    from nncomp.training import evaluate, fit, validate
    for data in (digits(), digits("cuda")):
        model, folder = dense("cpu", norm=True), Path(tempfile.mkdtemp())
        fit(model, data, **QUICK, l1=1e-5, augment=random_affine, checkpoint=folder / "run.pt")
        assert on_gpu(model)
        again = dense("cpu", norm=True)
        fit(again, data, **QUICK, l1=1e-5, augment=random_affine, checkpoint=folder / "run.pt")  # from the checkpoint
        assert on_gpu(again) and all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
        validate(model, data), evaluate(dense("cpu", norm=True), data.test, device="cuda")
        assert evaluate(model, data.test).errors == evaluate(model, data.test, device="cpu").errors and on_gpu(model)

        def mine(net, xb, yb):
            return F.cross_entropy(net(xb), yb)

        fit(model, data, **QUICK, loss=mine, optimizer="sgd", mixed_precision="bf16")
        evaluate(model, data.valid, loss=mine)
    plain = [fit(dense("cpu"), digits(), **QUICK, device=device)[-1]["loss"] for device in ("cpu", "cuda")]
    assert plain[0] == plain[1]


@flow
def one_shot():
    from nncomp.core import named_weights
    from nncomp.one_shot import one_shot_compress
    from nncomp.pruning import wanda_scores
    model, data = dense(), digits()
    assert next(model.parameters()).is_cuda
    for images in (data.train.x[:64].cpu(), data.train.x[:64].cuda()):
        small = one_shot_compress(model, images, sparsity=0.8, bits=3, rounds=2, progress=False)
        assert all(p.is_cuda for p in small.parameters()) and all(len(w.unique()) <= 8 for w in named_weights(small).values())
        wanda_scores(small, [(images, None)])
    assert not one_shot_compress(copy.deepcopy(model).cpu(), images, sparsity=0.8, progress=False)[1].weight.is_cuda


@flow
def masks():
    from nncomp import pruning as p
    from nncomp.core import named_weights, seed_everything
    model, weights = dense(), named_weights(dense())
    w = weights["1.weight"]
    here = w.detach().cpu()
    for make in (lambda w: p.magnitude_mask(w, 0.7), lambda w: p.threshold_mask(w, 0.05), lambda w: p.std_threshold_mask(w, 1.),
                 p.n_m_mask, lambda w: p.random_mask(w, 0.5, torch.Generator().manual_seed(0))):
        assert make(w).is_cuda and torch.equal(make(w).cpu(), make(here))
    scores = {name: v.detach().abs() for name, v in weights.items()}
    for found in (p.global_magnitude_masks(weights, 0.8, floor=0.01), p.drop_lowest_global(scores, 500),
                  p.std_threshold_masks(model, 1.), p.threshold_masks(model, 0.02)):
        assert all(m.is_cuda for m in found.values())
    data = digits()
    batches = [(data.train.x[:100].cuda(), data.train.y[:100].cuda())]
    assert all(s.is_cuda for s in p.first_order_scores(model, batches).values())
    p.first_order_scores(model, [(data.train.x[:100], data.train.y[:100])])
    assert all(s.is_cuda for s in p.wanda_scores(model, batches).values())
    p.fisher_scores(weights, {name: v.detach().square() for name, v in weights.items()})
    found = p.global_magnitude_masks(weights, 0.8)
    for chosen in (found, {name: m.cpu() for name, m in found.items()}):
        seed_everything(0)
        net = copy.deepcopy(model)
        p.apply_masks_(net, chosen)
        optimizer = torch.optim.Adam(net.parameters())
        hold = p.hold_masks(net, optimizer, chosen)
        F.cross_entropy(net(batches[0][0]), batches[0][1]).backward()
        optimizer.step()
        hold.close()
        p.finalize_pruning(net, chosen)
        assert all(not net.get_parameter(name)[~m.cuda()].any() for name, m in chosen.items())
    csr = p.to_csr(net.get_parameter("1.weight").detach())
    assert torch.equal(p.from_csr(csr, (32, 64)).cpu(), net.get_parameter("1.weight").detach().cpu())


@flow
def schedules():
    from nncomp import schedules as s
    from nncomp.core import named_weights
    from nncomp.pruning import MaskCallback, magnitude_mask
    from nncomp.training import fit
    for data in (digits(), digits("cuda")):
        model = dense(norm=True)
        fit(model, data, **QUICK, callbacks=[s.Pruner(0.8)])
        fit(model, data, **QUICK, callbacks=[s.Pruner(0.8, scope="global", every=2)])
        there = {name: magnitude_mask(w.cpu(), 0.5) for name, w in named_weights(model).items()}
        fit(model, data, **QUICK, callbacks=[MaskCallback(there)])
        s.grow_masks(model, 0.9, {})
        s.iterative_prune(model, data, (0.5, 0.8), **QUICK)
        scan = s.sensitivity_scan(model, data, sparsities=(0., 0.5, 0.9))
        s.suggest_qualities(model, s.suggest_sparsities(scan)), s.scan_qualities(model, data, sparsities=(0., 0.5, 0.9))
        s.alternating_steps(model, (0.5, 0.8))
        s.recalibrate_batch_norm(model, data)
        dropped = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 10)).cuda()
        fit(dropped, data, **QUICK, callbacks=[s.Pruner(0.8), s.DropoutRule()])
        assert on_gpu(model)


@flow
def neurons():
    from nncomp import neurons as n
    data = digits()
    for model in (dense(norm=True), conv()):
        for scores in (n.norm_scores(model), n.activation_scores(model, data.train), n.taylor_scores(model, data.train),
                       n.random_scores(model)):
            keep = n.keep_highest(scores, 0.5)
            assert on_gpu(n.remove_neurons(model, keep))
        n.remove_neurons(model, keep, constants=n.mean_outputs(model, data.train))
        n.dead_neurons(model), n.remove_dead_neurons(model)
        for p in model.parameters():
            if p.ndim > 1:
                p.data[:3] = 0
        assert on_gpu(n.remove_dead_neurons(model))
        n.shrink(model, (0.3,), lambda net, step: None)
    n.batch_norm_scores(nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 10)).cuda())
    n.prune_graph(conv(), torch.randn(1, 1, 8, 8).cuda(), 0.5)


@flow
def clustering():
    from nncomp.kmeans import inertia, kmeans_1d
    torch.manual_seed(0)
    x = torch.randn(500)
    for init in ("optimal", "linear", "density", "forgy", "k-means++"):
        for options in ({}, {"keep_zero": True}, {"weights": torch.rand(500)}):
            there = {k: v.cuda() if torch.is_tensor(v) else v for k, v in options.items()}
            (a, b), (c, d) = kmeans_1d(x, 8, init=init, **options), kmeans_1d(x.cuda(), 8, init=init, **there)
            assert c.is_cuda and d.is_cuda and torch.allclose(a, c.cpu()) and torch.equal(b, d.cpu())
            assert abs(float(inertia(x.cuda(), c, d)) - float(inertia(x, a, b))) < 1e-3


@flow
def sharing():
    from nncomp import weight_sharing as s
    from nncomp.training import fit
    for data in (digits(), digits("cuda")):
        model = dense()
        fit(model, data, **QUICK)
        importance = s.weight_importance(model, data, images=200)
        for options in ({}, {"trainable": True}, {"trainable": True, "moving": True}, {"biases": True}, {"lam": 1e-4},
                        {"lam": 1e-4, "importance": importance}):
            net = copy.deepcopy(model)
            s.share_weights(net, 3, **options)
            if options.get("trainable"):
                fit(net, data, **QUICK)
            s.finalize_sharing(net)
            assert on_gpu(net) and net[1].weight.unique().numel() <= 9
        net = copy.deepcopy(model)
        starts = {name: p.detach().clone() for name, p in net.named_parameters() if p.ndim > 1}
        s.share_weights(net, 3, trainable=True)
        fit(net, data, **QUICK, callbacks=[s.Reassign(starts, lam=1e-4)])
        bits = s.choose_bits(model, data, 2500, candidates=range(2, 5))
        assert set(bits) == set(starts)
        w = model[1].weight.detach()
        codebook, labels = s.entropy_constrained(w, 8, 1e-4)
        s.rate_distortion_assign(w, codebook, s.symbol_bits(labels, 8), 1e-4)


@flow
def coding():
    from nncomp import arithmetic, huffman, positions
    from nncomp.container import inspect, load, load_tensors, save
    from nncomp.deep_compression import predict_bytes
    from nncomp.entropy import counts, entropy_bits
    from nncomp.kmeans import kmeans_1d
    from nncomp.measure import count_macs, gzip_bytes, layer_table, sparsity
    from nncomp.pruning import magnitude_mask
    path, model = Path(tempfile.mkdtemp()) / "a.nncomp", conv()
    for p in model.parameters():
        if p.ndim > 1:
            p.data *= magnitude_mask(p, 0.8)
            codebook, labels = kmeans_1d(p, 8, keep_zero=True)
            p.data.copy_(codebook[labels])
    for source in (model, model.state_dict()):
        for coder in ("best", "huffman", "raw"):
            save(source, path, coder=coder)
            assert all(torch.equal(v.cpu(), load(path)[k]) for k, v in model.state_dict().items())
    fresh = load(path, into=conv())
    assert on_gpu(fresh) and all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), model.state_dict().values()))
    assert load(path, map_location="cuda")["0.weight"].is_cuda
    assert all(t.is_cuda for _, t in load_tensors(path, ["0.weight"], map_location="cuda"))
    inspect(path), predict_bytes(model.state_dict()), layer_table(model), gzip_bytes(model), sparsity(model.parameters())
    count_macs(model, (1, 8, 8))
    mask = model[4].weight.detach().flatten() != 0
    assert entropy_bits(counts(labels)) > 0
    assert (huffman.decode(huffman.encode(labels.flatten().to(torch.uint8))) == labels.cpu().numpy().ravel()).all()
    assert (arithmetic.decode(arithmetic.encode(labels.to(torch.uint8))) == labels.cpu().numpy()).all()
    data = positions.encode_positions(mask)
    assert (positions.decode_positions(data, mask.numel()) == mask.cpu().numpy()).all()


@flow
def chains():
    from nncomp.deep_compression import Recipe, absorb_batch_norm, deep_compress
    from nncomp.soft_weight_sharing import SoftRecipe, soft_compress
    from nncomp.training import fit
    short = Recipe(sparsity=0.8, prune_epochs=1, share_epochs=1)
    for data in (digits(), digits("cuda")):
        for model in (dense("cpu"), dense(norm=True), conv()):
            fit(model, data, **QUICK)
            folder = Path(tempfile.mkdtemp())
            report = deep_compress(model, data, short, path=folder / "a.nncomp", folder=folder, progress=False)
            again = deep_compress(model, data, short, path=folder / "b.nncomp", folder=folder, progress=False)
            assert again.file_bytes == report.file_bytes and not on_gpu(report.model)
            absorb_batch_norm(report.model)
        deep_compress(model, None, short, path=folder / "c.nncomp", progress=False)
        other = Recipe(sparsity=0.8, prune_epochs=1, share_epochs=1, coder="best", skip=("5.*",))
        deep_compress(dense(), data, other, path=folder / "d.nncomp", progress=False)
        soft = SoftRecipe(epochs=2, components=8, tune_epochs=1)
        report = soft_compress(dense(), data, soft, path=folder / "e.nncomp", folder=folder / "soft", progress=False)
        assert not any(map(on_gpu, (report.model, report.quantized, report.soft))) and not report.mixture.means.is_cuda


@flow
def distillation():
    from nncomp import distillation as d
    for data in (digits(), digits("cuda")):
        for where in ("cpu", "cuda"):
            teacher = dense(where).eval()
            d.distill(dense("cpu"), teacher, data, **QUICK)
            logits = d.cache_logits(teacher, data.train)
            for rows in (logits, logits.cpu(), logits.cpu().numpy()):
                d.distill(dense("cpu"), rows, data, **QUICK)
            d.distill(dense("cpu"), [teacher, dense().eval()], data, **QUICK)
            d.judge(teacher, data.test)
            d.class_recall(d.cache_logits(teacher, data.test), data.test.y, 3)
            d.without_class(data.train, 3)
        student = dense("cpu")
        with d.watch(student, ["3"]) as a, d.watch(teacher, ["3"]) as b:
            d.distill(student, teacher, data, **QUICK, callbacks=[d.Matching(a, b, {"3": "3"}, loss=d.hint_loss)])
    a, b, y = torch.randn(9, 10).cuda(), torch.randn(9, 10).cuda(), torch.arange(9).cuda()
    for loss in (d.distillation_loss, d.legacy_distillation_loss, d.decoupled_loss):
        assert abs(float(loss(a, b, y)) - float(loss(a.cpu(), b.cpu(), y.cpu()))) < 1e-5
    d.expected_calibration_error(a, y)


@flow
def squeezing():
    from nncomp.squeezenet import fireify, fold_batch_norm
    images = digits().train.x[:50]
    for options in ({"ratio": 0.5}, {"budget": 900}, {"ratio": 0.5, "images": images}, {"ratio": 0.5, "images": images.cuda()},
                    {"ratio": 0.5, "init": "random"}):
        assert on_gpu(fireify(conv(), **options))
    assert on_gpu(fold_batch_norm(conv().eval()))


@flow
def inference():
    from nncomp.inference import CodebookLinear, SparseLinear, lightest, resident_bytes
    model = dense()
    model[1].weight.data *= (torch.rand(32, 64) > 0.9).cuda()
    x = digits().test.x[:7].cuda()
    want = model(x)
    light, _ = lightest(model)
    assert torch.allclose(light(x).cpu(), want.detach().cpu(), atol=1e-5) and resident_bytes(light)
    CodebookLinear(nn.Linear(8, 8).cuda()), SparseLinear(model[1])


@flow
def pictures():
    import matplotlib
    matplotlib.use("Agg")
    from nncomp import plot
    from nncomp.schedules import sensitivity_scan
    model = conv()
    w, later = model[4].weight, model[4].weight.detach() * 2
    plot.weight_histogram(w, later)
    plot.weight_histogram(w)
    plot.weight_cdf(w, later)
    plot.joint_plot(w, later)
    plot.weight_images(model[0].weight[:, 0])
    plot.sensitivity_map(sensitivity_scan(model, digits(), sparsities=(0., 0.5)), model=model)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent)]
    import make_believe

    make_believe.install()
    told = {}
    for name, f in FLOWS.items():
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        before, told[name] = make_believe.There.made, ""
        try:
            with make_believe.GPU():
                f()
            assert make_believe.There.made > before, "nothing ran on the GPU"
        except Exception as error:
            told[name] = traceback.format_exc(limit=-12) if len(sys.argv) == 1 else "".join(traceback.format_exception(error))
        print(name, told[name] or "fine", file=sys.stderr, flush=True)
    print(json.dumps(told))


@pytest.fixture(scope="module")
def told():
    environment = os.environ | {"TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, __file__], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", FLOWS)
def test_on_a_gpu(name, told):
    assert not told[name], told[name]


ALL = sorted(p.stem for p in (ROOT / "nbs").glob("*.ipynb"))
SOME = ["20_kmeans"]  # `make slow` runs all


@pytest.mark.parametrize("name", ALL if os.environ.get("NNCOMP_SLOW") else SOME)
def test_notebooks_on_a_gpu(name):
    path = ROOT / "nbs" / f"{name}.ipynb"
    done = subprocess.run([sys.executable, ROOT / "tests" / "make_believe.py", path], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"TQDM_DISABLE": "1", "MPLBACKEND": "Agg"}, timeout=1800)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
