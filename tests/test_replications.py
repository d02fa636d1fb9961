"The experiments behind the reports' tables, on small data: what they prune, hold, remember, and print."
import json
from dataclasses import replace

import pytest
import torch
from toys import Stop, toy_data, toy_net

from nncomp.container import load
from nncomp.core import count_parameters, named_weights
from nncomp.data import Split, load_data
from nncomp.models import create_model, model_input_shape
from nncomp.replications import (
    DEMO,
    LENET_5_SMALL,
    PUBLISHED,
    PUBLISHED_004,
    TESTS,
    Cut,
    CutBelow,
    FromPixels,
    Lengths,
    RateDistortion,
    Report003,
    Report004,
    _choose_price,
    demo_table,
    lengths_table,
    longer_table,
    price_verdict,
    pruning_table,
    rate_distortion_table,
    report004_table,
    run_rate_distortion,
    run_report003,
    run_report004,
    run_thresholds,
    share_and_move,
    share_and_tune,
    sharing_table,
    start_table,
    start_verdict,
    train_and_prune,
    tuning_verdict,
    two_bit_table,
    verdict_table,
)
from nncomp.results import Record, config_id, difference, find_experiment
from nncomp.training import evaluate, fit
from nncomp.weight_sharing import Moving

SMALL = Report003(dataset="digits", epochs=1, batch_size=256, cuts=(Cut(1, "std", (("fc1.weight", 1.), ("fc1.bias", 0.1))),), bits=(2,),
                starts=("density", "optimal"), tune_images=300, tune_epochs=(1,))


@pytest.fixture(scope="module")
def digits():
    data = load_data("digits")
    few = Split(data.train.x[:300], data.train.y[:300])
    return replace(data, train=few, valid=few, test=Split(data.test.x[:100], data.test.y[:100]))


@pytest.mark.parametrize("name, parameters", [("lenet-300-100", 266_610), ("lenet-5-same", 655_596)])
def test_nets_of_the_seed(name, parameters):
    net = create_model(f"report003-{name}")
    assert count_parameters(net) == parameters and model_input_shape(f"report003-{name}") == (1, 28, 28)
    for layer in net:
        if hasattr(layer, "weight"):
            fan = sum(torch.nn.init._calculate_fan_in_and_fan_out(layer.weight))
            bound = (6 / fan)**0.5
            assert 0.9 * bound < float(layer.weight.detach().abs().max()) <= bound and not layer.bias.any()
    x = torch.rand(2, 1, 28, 28)
    assert torch.allclose(FromPixels()((x - 0.1307) / 0.3081), x, atol=1e-6)


@pytest.mark.parametrize("by_std", [True, False])
def test_cut_below_resumes_exactly(by_std, tmp_path):
    def run(stop, checkpoint=None):
        net = toy_net()
        cut = CutBelow({"4.weight": 0.8 if by_std else 0.08}, by_std=by_std, until=0.5)
        fit(net, toy_data(), epochs=4, lr=0.02, batch_size=16, callbacks=[cut, stop], checkpoint=checkpoint, device="cpu", progress=False)
        return net, cut

    net, cut = run(Stop(-1))
    zeros = net[4].weight == 0
    assert 0 < int(zeros.sum()) < zeros.numel() and torch.equal(zeros, ~cut.masks["4.weight"])
    with pytest.raises(KeyboardInterrupt):
        run(Stop(2), tmp_path / "epochs.pt")
    again, _ = run(Stop(-1), tmp_path / "epochs.pt")
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))


def test_cut_below_never_gives_back(tmp_path):
    seen = []

    class Watch(Stop):
        def after_step(self, run):
            seen.append((run.model[4].weight == 0).clone())

    fit(toy_net(), toy_data(), epochs=3, lr=0.02, batch_size=16, device="cpu", progress=False,
        callbacks=[CutBelow({"4.weight": 0.5}, by_std=True, until=0.5), Watch(-1)])
    assert all((a <= b).all() for a, b in zip(seen, seen[1:]))
    half = len(seen) // 2
    assert int(seen[0].sum()) < int(seen[half].sum()) == int(seen[-1].sum())


def test_cuts_are_checked():
    with pytest.raises(ValueError, match="rule must be one of std, hard, zeros"):
        Cut(1, "soft", ())
    with pytest.raises(ValueError, match="epochs must be an integer"):
        Cut(-1, "std", ())


def test_stretches_hold_the_zeros_before_them(digits, tmp_path):
    cuts = Cut(1, "zeros", (("fc2.weight", 25_000),)), Cut(1, "zeros", (("fc1.weight", 200_001),)), Cut(1, "hard", (("fc3.weight", 0.05),))
    config = replace(SMALL, cuts=cuts)
    dense, pruned = train_and_prune(config, digits, 0, tmp_path, progress=False)
    assert not any((w == 0).any() for w in named_weights(dense).values())
    assert int((pruned.fc2.weight == 0).sum()) == 25_000 and int((pruned.fc1.weight == 0).sum()) == 200_001
    assert (pruned.fc3.weight == 0).any() and float(pruned.fc3.weight.abs()[pruned.fc3.weight != 0].min()) > 0
    again = train_and_prune(config, digits, 0, tmp_path, progress=False)[1]      # from its checkpoints
    assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), again.parameters()))


def test_tuning_keeps_zeros_and_values(digits):
    torch.manual_seed(0)
    net = create_model("lenet-300-100")
    with torch.no_grad():
        net.fc1.weight[net.fc1.weight.abs() < 0.03] = 0
        net.fc1.bias[:100] = 0
    before = {name: p == 0 for name, p in net.named_parameters()}
    snapped, tuned, model = share_and_tune(net, digits, 2, "k-means++", batch_size=64)
    assert 0 <= snapped <= 100 and tuned == 100 * evaluate(model, digits.test).accuracy
    assert all(len(w.detach().unique()) <= 4 for w in named_weights(model).values())
    assert all(torch.equal(p == 0, before[name]) for name, p in model.named_parameters())
    assert not any((p == 0).sum() != before[name].sum() for name, p in net.named_parameters())


def test_report003_remembers_and_files(tmp_path):
    metrics = run_report003(SMALL, 0, tmp_path, progress=False)
    assert set(metrics["snapped"]) == set(metrics["tuned"]) == set(metrics["moved"]) == {"density-2", "optimal-2"}
    assert metrics["zeros"]["fc1.weight"] > 235_200 / 2 and metrics["zeros"]["fc2.weight"] == 0
    assert len(json.dumps(metrics)) < 4000 and "artefact" not in metrics   # the pruned net is too large to ship
    assert set(metrics["lengths"]) == {"fc1.weight", "fc2.weight", "fc3.weight"} and metrics["lengths"]["fc1.weight"][1] < 1
    (tmp_path / "density-2.json").write_text('{"snapped": 1.5, "tuned": 2.5, "moved": 3.5}')
    again = run_report003(SMALL, 0, tmp_path, progress=False)
    assert again["snapped"]["density-2"] == 1.5 and again["moved"]["density-2"] == 3.5
    assert again["tuned"]["optimal-2"] == metrics["tuned"]["optimal-2"]
    net = load(tmp_path / "pruned.nncomp", into=create_model(SMALL.model))
    data = load_data("digits")
    assert evaluate(net, data.test).error_percent == metrics["file_error_percent"] == pytest.approx(100 - metrics["pruned_accuracy"])


def test_each_number_of_bits_has_its_epochs(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("nncomp.replications.share_and_tune", lambda *a, epochs, **k: (seen.append((a[2], epochs)), (1., 2., None))[1])
    config = replace(SMALL, bits=(3, 2), starts=("optimal",), tune_epochs=(5, 7), move_bits=())
    metrics = run_report003(config, 0, tmp_path, progress=False)
    assert seen == [(3, 5), (2, 7)] and metrics["moved"] == {} and metrics["tuned"] == {"optimal-3": 2., "optimal-2": 2.}


def test_moving_weights_end_as_shared_ones(digits):
    torch.manual_seed(0)
    net = create_model("lenet-5")
    with torch.no_grad():
        for w in named_weights(net).values():
            w.mul_(w.abs() > w.std())
        net.fc1.bias[:100] = 0
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    model = share_and_move(net, digits, 2, "forgy", epochs=2, batch_size=50)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert [n for n, _ in model.named_parameters()] == list(before) and not hasattr(model.fc1, "parametrizations")
    for name, p in model.named_parameters():
        assert (p[before[name] == 0] == 0).all() and not torch.equal(p, before[name])
        assert p.ndim == 1 or len(p.detach().unique()) <= 4
    again = share_and_move(net, digits, 2, "forgy", epochs=2, batch_size=50)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_moving_weights_take_the_nearest_value():
    weight, codebook = torch.randn(7, 5), torch.tensor([-0.8, 0., 0.3, 1.1])
    weight[0] = 0
    moving = Moving(weight, codebook)
    nearest = codebook[(weight[..., None] - codebook).abs().argmin(-1)] * (weight != 0)
    assert torch.equal(moving(weight), nearest)
    with torch.no_grad():
        moving.values.copy_(torch.tensor([0.5, 9., -0.5, 0.2]))    # values may pass each other; the entry zero does not move
    codebook = torch.tensor([-0.5, 0., 0.2, 0.5])
    assert torch.equal(moving(weight), codebook[(weight[..., None] - codebook).abs().argmin(-1)] * (weight != 0))


def test_thresholds_go_on(tmp_path):
    config = Lengths(batch_size=256, epochs=(1, 2), prune_epochs=1)
    metrics = run_thresholds(config, 0, tmp_path, dataset="digits", progress=False)
    assert metrics == run_thresholds(config, 0, tmp_path, dataset="digits", progress=False)      # from its checkpoints
    assert list(metrics["lengths"]) == ["1", "2"] and metrics["zeros"]["fc1.weight"] > 235_200 / 2
    largest, quarter, half = metrics["lengths"]["2"]
    assert 0 < largest < 1 and 1 >= quarter >= half >= 0
    unpruned = run_thresholds(replace(config, prune_epochs=0), 0, tmp_path, dataset="digits", progress=False)
    assert unpruned["pruned_accuracy"] == unpruned["dense_accuracy"] == metrics["dense_accuracy"]


def test_lenet_5_of_the_seed(digits, tmp_path):
    config = replace(TESTS[4], epochs=1, cuts=tuple(replace(c, epochs=1) for c in TESTS[4].cuts), batch_size=100)
    _, pruned = train_and_prune(config, digits, 0, tmp_path, progress=False)
    zeros = {name: int((p == 0).sum()) for name, p in pruned.named_parameters() if "weight" in name}
    assert zeros == {"conv1.weight": 0, "conv2.weight": 24_542, "fc1.weight": 620_797, "fc2.weight": 982}


@pytest.mark.parametrize("config", [Report004(), LENET_5_SMALL], ids=["mlp", "lenet-5"])
def test_report004(config, tmp_path):
    small = replace(config, dataset="digits", epochs=1, retrain_epochs=1, batch_size=128, lr=3e-3)
    metrics = run_report004(small, 0, tmp_path, progress=False)
    assert list(metrics["stages"]) == ["dense", "cut", "pruned", "shared", "tuned"]
    assert metrics["parameters"] == count_parameters(create_model(config.model))
    assert {n for n, z in metrics["zeros"].items() if z} == set(config.pruned)
    assert 0.9 < sum(metrics["zeros"].values()) / sum(create_model(config.model).get_parameter(n).numel() for n in config.pruned) < 1
    assert metrics["file_bytes"] < metrics["pruned_bytes"] and len(json.dumps(metrics | {"artefact": ""})) < 4000
    net = load(metrics["artefact"], into=create_model(config.model))
    assert all(len(w.detach().unique()) <= 32 for w in named_weights(net).values())


def test_rate_distortion(tmp_path):
    config = RateDistortion(dataset="digits", epochs=2, prune_epochs=2, share_epochs=2, bits=(5, 3), prices=(1e-4, 0.05),
                            importance_images=100)
    metrics = run_rate_distortion(config, 0, tmp_path, progress=False)
    arms = metrics["arms"]
    assert list(arms) == ["kmeans-32", "kmeans-8", "price-0.0001", "price-0.05"] and metrics["plain"] == arms["kmeans-32"]
    assert arms["price-0.05"]["bytes"] < arms["price-0.0001"]["bytes"] < arms["kmeans-32"]["bytes"]
    assert metrics["priced"] == arms[metrics["chosen"]] and metrics["file_bytes"] == metrics["artefact"].stat().st_size
    assert ["error_percent" in arm for arm in arms.values()].count(True) == 3
    assert metrics == run_rate_distortion(config, 0, tmp_path, progress=False)


def test_a_price_is_chosen_without_the_test_set():
    plain = dict(bytes=100, valid_loss=.5, valid_error_percent=2.)
    arms = {"kmeans-32": plain, "price-1": plain | {"bytes": 90}, "price-2": plain | {"bytes": 80},
            "price-3": plain | {"bytes": 70, "valid_loss": .6}}
    assert _choose_price(arms) == "price-2"
    worse = {"kmeans-32": plain, "price-1": plain | {"valid_loss": 1.}, "price-2": plain | {"valid_loss": 2., "bytes": 1}}
    assert _choose_price(worse) == "price-1"


def records(name, metrics, seeds=3):
    found = find_experiment(name)
    return [Record(name, config_id(found.configs[0], name), k, {}, metrics(k), None, {}, "", 1, "", 0., "") for k in range(seeds)]


def test_tables_from_records(monkeypatch):
    pytest.importorskip("pandas")
    monkeypatch.setattr("nncomp.replications.load_records", lambda name, root=None: kept.get(name, []))
    keys = [f"{s}-{b}" for b in (2, 5, 8) for s in TESTS[1].starts]
    kept = {f"report003-test-{t}": records(f"report003-test-{t}", lambda k, t=t: dict(
        dense_accuracy=98. + k / 10, pruned_accuracy=97. + k / 10,
        zeros={n: 5 * k for n, _ in create_model(TESTS[t].model).named_parameters()},
        snapped={key: 90. + i + k / 10 for i, key in enumerate(keys)}, tuned={key: 97. + k / 10 for key in keys},
        moved={key: 97. + k / 10 - .5 * (key == "forgy-2") for key in keys if "-2" in key},
        lengths={n: [.5, .25, 0.] for n in named_weights(create_model(TESTS[t].model))})) for t in TESTS}
    for t in TESTS:
        frame = pruning_table(t)
        assert frame["ours"].tolist()[-2:] == ["98.10 ± 0.10 (3)", "97.10 ± 0.10 (3)"] and frame["ours"][0] == "5.0 ± 5.0 (3)"
        assert frame["tensor"].tolist()[:-2] == [n for n, _ in create_model(TESTS[t].model).named_parameters()]
        frame = sharing_table(t)
        assert len(frame) == 15 and frame["the report"].tolist()[:5] == [PUBLISHED[t]["shared"][s][0] for s in TESTS[t].starts[:4]] + ["–"]
        assert set(frame["tuned − pruned net"]) == {"+0.00 [+0.00, +0.00] no difference seen"}
    frame = start_table(2)
    assert frame["shared only"].tolist()[:4] == [f"{d:+.2f} [{d:+.2f}, {d:+.2f}] worse" for d in (-4., -3., -2., -1.)]
    frame = two_bit_table()
    assert frame["limit"].tolist()[:6] == ["", "0.3: target met", "0.3: target missed", "", "1.0: target met", "1.0: target met"]
    assert frame["worst start"].tolist()[::3] == ["linear"] * 4 and frame["worst start"][2] == "forgy"
    assert frame["best − worst start"].tolist()[:3] == ["4 ± 0 (3)", "0 ± 0 (3)", "0.5 ± 0 (3)"] and set(frame["limit"][6:]) == {""}
    frame = verdict_table()
    assert set(frame["against the optimum, shared only"]) == {"linear, forgy, density, k-means++ worse"}
    assert set(frame["against the optimum, trained"]) == {"no difference seen"}
    assert set(frame["density − linear, shared only"]) == {"+2.00 [+2.00, +2.00] better"}
    kept["report003-thresholds"] = [replace(r, seed=k, config=json.loads(json.dumps(vars(c)))) for c in find_experiment(
        "report003-thresholds").configs for k, r in enumerate(records("report003-thresholds", lambda k: dict(
            dense_accuracy=99., pruned_accuracy=98., zeros=dict.fromkeys(("fc1.weight", "fc2.weight", "fc3.weight"), 7),
            lengths={str(e): [e / 100, e / 1000, 0.] for e in (5, 10, 20, 60)}), seeds=2))]
    frame = lengths_table()
    assert frame["largest"].tolist()[:3] == ["0.05 ± 0 (2)", "0.2 ± 0 (2)", "0.6 ± 0 (2)"] and len(frame) == 10
    assert frame["images a step"].tolist() == ["512"] * 3 + ["32"] * 2 + ["128"] * 5
    frame = longer_table()
    assert frame["60 + 30 epochs"].tolist() == ["7 ± 0 (2)"] * 3 + ["99 ± 0 (2)", "98 ± 0 (2)"] and "(2)" in frame["20 + 10 epochs"][3]
    kept["report000-demo"] = kept["report003-test-1"]
    assert demo_table()["ours"].tolist()[-3:] == ["92.10 ± 0.10 (3)", "97.10 ± 0.10 (3)", "97.10 ± 0.10 (3)"]
    stage = {"accuracy": 98., "loss": .05}
    kept["report004-lenet-5-small"] = records("report004-lenet-5-small", lambda k: dict(
        stages=dict.fromkeys(("dense", "cut", "pruned", "shared", "tuned"), stage), pruned=10_000 + k, pruned_bytes=9, file_bytes=7))
    frame = report004_table("report004-lenet-5-small")
    assert frame["ours"].tolist()[:3] == ["98 ± 0 (3)", "10,001.0 ± 1.0 (3)", "98 ± 0 (3)"]
    shown = [v for v in frame["the report"] if v != "–"]
    assert sorted(shown) == sorted(PUBLISHED_004["report004-lenet-5-small"].values())
    arm = dict(bytes=100, nonzero=9, error_percent=2., valid_loss=.1, valid_error_percent=2.)
    kept["rate-distortion-lenet-300-100"] = records("rate-distortion-lenet-300-100", lambda k: dict(
        arms={"kmeans-16": arm | {"bytes": 95}, "kmeans-32": arm, "kmeans-8": arm | {"bytes": 70, "valid_loss": .2}},  # sorted as in files
        priced=arm | {"bytes": 80 + k, "error_percent": 1.9}))
    for r in kept["rate-distortion-lenet-300-100"]:
        r.metrics["plain"] = arm | dict(valid_loss=.1, valid_error_percent=2.)
        r.metrics["priced"] |= dict(valid_loss=.1 + .1 * (r.seed == 2), valid_error_percent=2.)
    assert price_verdict() == ("A price on bits, with weighed distances and new assignments, was at equal validation accuracy, "
                               "the rule of its choice, for 2 of 3 seeds. "
                               "Against k-means with 32 values the file is smaller by 19.0 ± 1.0 (3) % (95 % interval +16.5 to +21.5); "
                               "test accuracy: better (+0.10 to +0.10 points). Against k-means with the number of values chosen by the "
                               "same rule the file is smaller by 14.7 ± 1.1 (3) % (95 % interval +12.1 to +17.4); "
                               "test accuracy: better (+0.10 to +0.10 points).")
    frame = rate_distortion_table()
    assert frame["smaller by, %"].tolist() == ["0 ± 0 (3)", "5 ± 0 (3)", "30 ± 0 (3)", "5 ± 0 (3)", "19.0 ± 1.0 (3)"]
    assert frame["bytes less the chosen plain"].tolist() == ["+5 [+5, +5]", "+0 [+0, +0]", "-25 [-25, -25]", "", "-14 [-16, -12]"]
    assert frame["accuracy gained, points"].tolist()[-1] == "+0.10 [+0.10, +0.10] better"
    assert start_verdict(2) == ("Against the optimum at 2 bits, shared only (4 of 4 tests run): linear worse in 4, forgy worse in 4, "
                                "density worse in 4, k-means++ worse in 4; trained (4 of 4 tests run): no difference seen.")
    gains = tuning_verdict().splitlines()
    assert len(gains) == 12 and gains[0] == "Test 1, 2 bits: +5.00 against values not trained, +0.00 against the pruned net (3 seeds)"


def test_without_records_tables_say_so(tmp_path):
    pytest.importorskip("pandas")
    frames = [pruning_table(1, tmp_path), sharing_table(2, tmp_path), report004_table("report004-lenet-300-100", tmp_path)]
    assert all(set(frame["ours"]) == {"not run yet"} for frame in frames)
    assert set(start_table(5, tmp_path)["tuned"]) == {"–"} and set(rate_distortion_table(tmp_path)["file, B"]) == {"not run yet"}
    assert difference([], None, None) == "–"


def test_configurations_are_those_of_the_experiments():
    for t, config in TESTS.items():
        assert find_experiment(f"report003-test-{t}").configs == (config,)
        assert set(PUBLISHED[t]["zeros"]) == {n for n, _ in create_model(config.model).named_parameters()}
        assert set(PUBLISHED[t]["shared"]) == set(config.starts) - {"optimal"}
    assert find_experiment("report000-demo").configs == (DEMO,)
    assert find_experiment("report004-lenet-5-small").configs == (LENET_5_SMALL,)
    assert find_experiment("rate-distortion-lenet-300-100").configs == (RateDistortion(),)
