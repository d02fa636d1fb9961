"Soft weight sharing: the penalty against formulas, the callback interrupted, rounding on any module, the experiments in small."
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from toys import Stop, toy_data, toy_net

from nncomp.container import load
from nncomp.core import named_weights
from nncomp.data import load_data
from nncomp.deep_compression import Recipe
from nncomp.models import create_model
from nncomp.results import Record, config_id, find_experiment
from nncomp.soft_weight_sharing import (
    SOFT_PUBLISHED,
    Mixture,
    PenaltyCost,
    SoftCurve,
    SoftRecipe,
    SoftRun,
    SoftWeightSharing,
    TrainPrior,
    beta_nll,
    component_log_densities,
    divergences,
    equal_bytes_table,
    merge_components,
    mixture_nll,
    penalty_cost_table,
    run_soft,
    run_soft_curve,
    soft_compress,
    soft_penalty,
    soft_quantize_,
    soft_table,
    soft_verdict,
    tune_values,
)
from nncomp.training import evaluate, fit


def plain(weights, mixture):
    return -sum(component_log_densities(w, mixture).logsumexp(-1).sum() for w in weights)


def made(k, seed=0, low=0.01, high=0.3):
    g = torch.Generator().manual_seed(seed)
    stds = low * (high / low) ** torch.rand(k, generator=g)
    means = torch.cat([torch.zeros(1), torch.randn(k - 1, generator=g)])
    return Mixture(means, 2 * stds.log(), torch.randn(k, generator=g).mul(2).log_softmax(0))


def gradients(f, weights, mixture, dtype):
    leaves = [t.to(dtype).clone().requires_grad_() for t in (*mixture, *weights)]
    value = f(leaves[3:], Mixture(*leaves[:3]))
    return value.detach().double(), [g.double() for g in torch.autograd.grad(value, leaves)]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 18), st.integers(1, 300), st.integers(0, 1000), st.sampled_from([1e-3, 0.1, 3.]))
@example(13, 28, 1000, 0.1)          # a weight where two components hand over, within a hundredth of a standard deviation
@example(5, 5000, 31, 3.)            # a table would be too large, and float32 too coarse for densities of e^-40000
def test_penalty_is_the_formula(k, n, seed, spread):
    mixture, weights = made(k, seed), [spread * torch.randn(n, generator=torch.Generator().manual_seed(seed)), torch.zeros(3, 2)]
    value, exact = gradients(plain, weights, mixture, torch.double)
    for dtype, eps in ((torch.float, 3e-5), (torch.double, 1e-9)):
        found, grads = gradients(mixture_nll, weights, mixture, dtype)
        assert abs(found - value) <= eps * (abs(value) + n)
        for g, e in zip(grads, exact):
            assert (g - e).abs().max() <= eps * max(1., float(e.abs().max()))


def test_where_components_hand_over_the_weights_are_evaluated_one_by_one():
    mixture = Mixture(torch.tensor([0., 0.1, -0.1]), torch.full((3,), 2 * math.log(2e-3)), torch.tensor([0.9, 0.06, 0.04]).log())
    w = torch.cat([torch.linspace(-0.06, 0.06, 2001), 2e-3 * torch.randn(20_000), torch.full((2001,), 0.1)])  # turns at ±0.05
    value, exact = gradients(plain, [w], mixture, torch.double)
    found, grads = gradients(mixture_nll, [w], mixture, torch.float)
    assert abs(found - value) < 1e-6 * abs(value)
    for g, e in zip(grads, exact):
        assert (g - e).abs().max() < 1e-5 * e.abs().max()


def test_any_layout_and_the_factor_above():
    weight = torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    (7 * mixture_nll(weight, made(4))).backward()
    expected = torch.autograd.grad(7 * plain([weight.double()], Mixture(*(t.double() for t in made(4)))), weight)[0]
    assert weight.grad.stride() == weight.stride()
    assert torch.allclose(weight.grad, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    every_other = torch.randn(40)[::2].requires_grad_()
    mixture_nll(every_other, made(4)).backward()
    assert torch.allclose(every_other.grad, torch.autograd.grad(plain([every_other], made(4)), every_other)[0], rtol=1e-3, atol=1e-2)


def test_wide_outliers_and_no_weights():
    weights = torch.tensor([0., 1e6, -1e6])
    assert mixture_nll(weights, made(3)).isfinite()          # a table over this range would be too large: exact pieces
    with pytest.raises(ValueError, match="at least one"):
        mixture_nll([], made(3))


PEAK = """
import math, resource, torch
from nncomp.soft_weight_sharing import Mixture, mixture_nll
torch.set_num_threads(1)
k, n = 17, 10_000_000
mixture = [t.requires_grad_() for t in (torch.linspace(-.6, .6, k), torch.full((k,), 2 * math.log(.02)), torch.full((k,), -math.log(k)))]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
mixture_nll(torch.randn(1000, requires_grad=True), Mixture(*mixture)).backward()
w = torch.empty(n).normal_(0, .05).requires_grad_()
before = peak()
mixture_nll(w, Mixture(*mixture)).backward()
print((peak() - before) / (4 * n))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module")
def test_peak_memory_is_below_twice_the_weights():
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees():
    weights = [torch.randn(300, 70)]
    value, exact = gradients(plain, weights, made(17), torch.double)
    found, grads = gradients(mixture_nll, [w.cuda() for w in weights], Mixture(*(t.cuda() for t in made(17))), torch.float)
    assert abs(found.cpu() / value - 1) < 1e-4
    for g, e in zip(grads, exact):
        assert torch.allclose(g.cpu(), e, rtol=1e-3, atol=1e-3 * float(e.abs().max()))


@pytest.mark.parametrize("options, message", [
    (dict(components=1), "components must be an integer of at least 2"), (dict(components=2.5), "components must be an integer"),
    (dict(zero_mixing=0.), "proportion in"), (dict(zero_mixing=1.), "proportion in"), (dict(zero_mixing=math.nan), "proportion in"),
    (dict(std=-1.), "std must be"), (dict(init="linear"), "'range' or 'quantiles'"),
])
def test_bad_priors(options, message):
    with pytest.raises(ValueError, match=message):
        SoftWeightSharing(toy_net(), **options)


def test_bad_models():
    for model in (nn.ReLU(), nn.BatchNorm2d(3)):
        with pytest.raises(ValueError, match="no weights for a prior"):
            SoftWeightSharing(model)
    net = toy_net()
    with torch.no_grad():
        net[4].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="4.weight holds 1 NaN"):
        SoftWeightSharing(net)
    with pytest.raises(ValueError, match="4.weight holds 1 NaN"):
        soft_quantize_(net, made(3))


def test_proportions_sum_to_one_and_can_be_learnt():
    prior = SoftWeightSharing(toy_net(), 7, 0.8, zero_beta=(8., 2.))
    assert torch.allclose(prior.mixture().log_mixing.exp().sum(), torch.tensor(1.))
    loss = beta_nll(prior.zero_logit, 8., 2.)
    loss.backward()
    assert abs(float(prior.zero_logit.grad) - (0.8 * 8 - 0.2 * 0 - 7 + 0.8 * 1 - 0.2)) < 1 and prior.zero_logit.requires_grad
    fixed = SoftWeightSharing(toy_net(), 2, 0.8)
    assert len(fixed.means) == 1 and not fixed.zero_logit.requires_grad


def test_training_resumes_exactly(tmp_path):
    def run(stop, checkpoint=None):
        net = toy_net()
        training = TrainPrior(SoftWeightSharing(net, 5, 0.9), 1e-4, warmup=0.5)
        options = dict(epochs=4, lr=0.02, batch_size=16, checkpoint=checkpoint, device="cpu", progress=False)
        fit(net, toy_data(), callbacks=[training, stop], **options)
        return net, training

    net, training = run(Stop(-1))
    with pytest.raises(KeyboardInterrupt):
        run(Stop(2), tmp_path / "epochs.pt")
    again, resumed = run(Stop(-1), tmp_path / "epochs.pt")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(training.prior.parameters(), resumed.prior.parameters()))
    assert training.trace == resumed.trace and len(training.trace) == 5


def test_tau_zero_is_no_penalty():
    nets = [toy_net(), toy_net()]
    for net, callbacks in zip(nets, ([], [TrainPrior(SoftWeightSharing(nets[1], 4), 0.)])):
        fit(net, toy_data(), epochs=2, lr=0.01, batch_size=16, callbacks=callbacks, device="cpu", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters()))


def test_merging_keeps_mass_and_mean():
    mixture = made(9, 3, low=0.2, high=0.4)
    merged = merge_components(mixture, 2.)
    assert 1 <= len(merged.means) < 9 and merged.means[0] == 0
    assert torch.allclose(merged.log_mixing.exp().sum(), torch.tensor(1.).double())
    assert len(merged.means) == 1 or float(divergences(merged).fill_diagonal_(math.inf).min()) >= 2.
    assert divergences(mixture).diagonal().abs().max() < 1e-5 and torch.allclose(divergences(mixture), divergences(mixture).T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_quantize_by_brute_force(dtype):
    net, mixture = nn.Linear(50, 40).to(dtype), made(6, 1)
    before = net.weight.detach().clone()
    counts = soft_quantize_(net, mixture, biases=False)
    taken = component_log_densities(before.double(), Mixture(*(t.double() for t in mixture))).argmax(-1)
    assert torch.equal(counts, torch.bincount(taken.flatten(), minlength=6))
    assert torch.equal(net.weight.detach(), mixture.means[taken].to(dtype)) and len(net.bias.detach().unique()) > 6


def test_tied_weights_and_frozen_biases():
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    net[2].weight = net[0].weight
    prior = SoftWeightSharing(net, 4)
    prior(net).backward()
    assert net[2].weight is net[0].weight and net[0].weight.grad is not None
    net[0].bias.requires_grad_(False)
    model = toy_net()
    model[4].bias.requires_grad_(False)
    soft_quantize_(model, made(4))
    tune_values(model, toy_data(), SoftRecipe(components=4, tune_epochs=1, batch_size=16), device="cpu", progress=False)
    assert not model[4].bias.requires_grad and model[6].bias.requires_grad


def test_compress_without_biases_and_with_batch_norm(tmp_path):
    net, data = toy_net(), toy_data()
    fit(net, data, epochs=2, lr=0.01, batch_size=16, device="cpu", progress=False)
    recipe = SoftRecipe(tau=1e-4, epochs=2, batch_size=16, components=6, zero_mixing=0.8, biases=False, tune_epochs=1)
    report = soft_compress(net, data, recipe, path=tmp_path / "a.nncomp", device="cpu", progress=False)
    assert all(len(w.detach().unique()) <= 6 for w in named_weights(report.model).values())
    assert sum(report.counts) == sum(w.numel() for w in named_weights(net).values())
    back = load(tmp_path / "a.nncomp", into=toy_net(1))
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), report.model.state_dict().values(), strict=True))
    assert report.ratio == report.dense_bytes / report.file_bytes
    assert not any((w == 0).any() for w in named_weights(net).values())      # the argument was not touched


def test_values_that_got_worse_are_taken_back(tmp_path, monkeypatch):
    net = toy_net()
    recipe = SoftRecipe(tau=1e-4, epochs=1, batch_size=16, components=4, zero_mixing=0.8, tune_epochs=1)

    def wreck(model, *_, **__):
        with torch.no_grad():
            model[6].bias.copy_(torch.tensor([99., 0., -99.]))

    monkeypatch.setattr("nncomp.soft_weight_sharing.tune_values", wreck)
    report = soft_compress(net, toy_data(), recipe, path=tmp_path / "a.nncomp", device="cpu", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(report.model.parameters(), report.quantized.parameters()))


SMALL = SoftRun(dataset="digits", epochs=1, recipe=SoftRecipe(tau=3e-5, epochs=1, tune_epochs=1))


@pytest.mark.parametrize("model", ["lenet-300-100", "lenet-ullrich"])
def test_run_soft(model, tmp_path):
    config = replace(SMALL, model=model)
    metrics = run_soft(config, 0, tmp_path, progress=False)
    assert metrics["artefact"].stat().st_size == metrics["file_bytes"] and len(json.dumps(metrics, default=str)) < 5000
    again = run_soft(config, 0, tmp_path, progress=False)                     # from its checkpoints
    assert again == metrics
    net = load(tmp_path / "model.nncomp", into=create_model(model))
    assert evaluate(net, load_data("digits").test).error_percent == metrics["file_error_percent"]


TINY_CURVE = SoftCurve(dataset="digits", epochs=1, taus=(1e-5,), sparsities=(0.9,),
                       recipe=SoftRecipe(epochs=1, tune_epochs=1, biases=False), classic=Recipe(prune_epochs=1, share_epochs=1, bits=4))


def test_curve_remembers_its_arms(tmp_path):
    metrics = run_soft_curve(TINY_CURVE, 0, tmp_path, progress=False)
    kept = json.loads((tmp_path / "kmeans-0.9.json").read_text())
    (tmp_path / "kmeans-0.9.json").write_text(json.dumps(kept | {"bytes": 5}))
    assert run_soft_curve(TINY_CURVE, 0, tmp_path, progress=False)["arms"]["kmeans-0.9"]["bytes"] == 5
    assert set(metrics["arms"]["soft-1e-05"]) == set(kept)


def test_registered_configs():
    for name in (*SOFT_PUBLISHED, "soft-curve-lenet-300-100", "soft-penalty"):
        assert len(find_experiment(name).configs) == 1 and f"nncomp reproduce {name}`" in find_experiment(name).run.__doc__


def records(name, metrics, seeds):
    found = find_experiment(name)
    return [Record(name, config_id(found.configs[0], name), k, {}, metrics(k), None, {}, "", 1, "", 0., "") for k in range(seeds)]


@pytest.mark.parametrize("seeds", [0, 1, 5])
def test_tables_of_made_up_records(seeds, monkeypatch, tmp_path):
    def soft(k):
        errors = {f"{s}_error_percent": 1 + k / 10 for s in ("dense", "soft", "quantized", "file")}
        return errors | dict(sparsity=0.98, file_bytes=8000 + k, ratio=100. + k)

    def curve(k):
        arms = {f"soft-{i}": dict(bytes=5000 * 2**i, error_percent=3. - i + k / 100) for i in range(3)}
        arms |= {f"kmeans-{i}": dict(bytes=6000 * 2**i, error_percent=3.5 - i + k / 90) for i in range(3)}
        arms["soft-dominated"] = dict(bytes=7000, error_percent=50.)     # larger than soft-0 and worse: nobody would use it
        for arm in arms.values():
            arm["valid_error_percent"] = arm["error_percent"]
        return dict(dense_error_percent=1., arms=arms)

    def cost(k):
        times = {f"ours-{n}": 1e-8 * n for n in PenaltyCost().sizes} | {f"plain-{n}": 1e-7 * n for n in PenaltyCost().sizes[:2]}
        return dict(times=times, step=0.004, penalised_step=0.006 + k / 1e6)

    made_up = dict.fromkeys(SOFT_PUBLISHED, soft) | {"soft-curve-lenet-300-100": curve, "soft-penalty": cost}
    monkeypatch.setattr("nncomp.soft_weight_sharing.load_records", lambda name, root=None: records(name, made_up[name], seeds))
    table, equal, costs, verdict = soft_table(tmp_path), equal_bytes_table(tmp_path), penalty_cost_table(tmp_path), soft_verdict(tmp_path)
    if not seeds:
        assert "not run yet: nncomp reproduce soft-lenet-5 --seeds 5" in set(table["file"]) and "not run yet" in verdict
        assert "not run yet" in equal.iloc[0, 1] and "not run yet" in costs.iloc[0, 1]
        return
    assert table["zeros, %"].iloc[0].startswith("98") and f"({seeds})" in table["file, B"].iloc[0]
    assert verdict.count("met") == 5 and "missed" not in verdict.splitlines()[0]
    assert equal["difference, points"].iloc[0].endswith("better" if seeds > 1 else "–")
    assert all(float(cell.split()[0]) < 4 for cell in equal["soft weight sharing, error %"] if cell != "–")
    assert costs["faster by"].iloc[0].startswith("10") and costs["faster by"].iloc[2] == "–"


def test_penalty_is_timed(tmp_path):
    metrics = soft_penalty(PenaltyCost(sizes=(1000, 2000), plain_up_to=1000, repeats=2), 0, tmp_path)
    assert set(metrics["times"]) == {"ours-1000", "plain-1000", "ours-2000"} and metrics["step"] > 0


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("turn", [lambda w: w.t(), lambda w: w.view(4, 5, 6, 10).permute(3, 2, 0, 1), lambda w: w[:, ::2],
                                  lambda w: w.view(4, 5, 6, 10).to(memory_format=torch.channels_last)])
def test_any_layout_of_memory(turn, kind):
    "Weights that come from another framework are seldom contiguous: same value, same slopes, same quantized values."
    prior = SoftWeightSharing(nn.Linear(40, 30), components=4)
    mixture = Mixture(*(t.detach().to(kind) for t in prior.mixture()))
    odd = nn.Parameter(turn(0.1 * torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).to(kind)))
    plain = nn.Parameter(odd.detach().clone(memory_format=torch.contiguous_format))
    values = []
    for w in (odd, plain):
        values.append(mixture_nll(w, mixture))
        values[-1].backward()
    torch.testing.assert_close(*values)
    torch.testing.assert_close(odd.grad, plain.grad)
    nets = [nn.ParameterDict({"w": w}) for w in (odd, plain)]
    counts = [soft_quantize_(net, mixture) for net in nets]
    assert torch.equal(*counts) and torch.equal(odd, plain) and len(odd.unique()) <= 4


def test_double_models_and_parametrized_ones():
    net = nn.Linear(30, 40).double()
    assert SoftWeightSharing(net)(net).isfinite()
    with pytest.raises(ValueError, match="make it plain first"):
        SoftWeightSharing(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))


def test_start_of_the_prior_belongs_to_the_run():
    net = nn.Linear(30, 40)
    starts = [dict(), dict(zero_mixing=0.5), dict(std=0.2), dict(init="quantiles"), dict(components=8)]
    assert len({TrainPrior(SoftWeightSharing(net, **start), 1e-3).identity() for start in starts}) == len(starts)


def test_rounding_changes_all_or_nothing():
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    with torch.no_grad():
        net[1].weight[0, 0] = float("nan")
    before = net[0].weight.clone()
    mixture = Mixture(torch.tensor([0., 0.3]), torch.tensor([-6., -6.]), torch.tensor([-0.1, -2.]))
    with pytest.raises(ValueError, match="1.weight holds 1 NaN"):
        soft_quantize_(net, mixture)
    assert torch.equal(net[0].weight, before)
