"The smallest networks: narrow ones in the place of wide ones, in any order, and a run that can be taken up again."
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nncomp.container import load
from nncomp.core import named_weights
from nncomp.data import load_data
from nncomp.distillation import Course
from nncomp.models import create_model
from nncomp.neurons import hidden_layers, remove_neurons
from nncomp.results import load_records, shipped
from nncomp.smallest import Smallest, SmallestLeNet5, narrow_net, run_smallest, smallest_table, sort_units, widen
from nncomp.training import evaluate

SMALL = Smallest(dataset="digits", units=(("fc1", 12), ("fc2", 8)), teacher=Course("lenet-300-100", epochs=2), views=2, epochs=2,
                 batch_size=128, weights=300, every=5, plain_epochs=1, share_epochs=2)


def sequence(channels, kernel, hidden, seed):
    "A plain sequence of one convolution and two dense layers for images of 8 by 8."
    torch.manual_seed(seed)
    side = (8 - kernel + 1) // 2
    return nn.Sequential(nn.Conv2d(1, channels, kernel), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                         nn.Linear(channels * side * side, hidden), nn.ReLU(), nn.Linear(hidden, 10))


@settings(deadline=None, max_examples=30)
@given(channels=st.integers(2, 6), kernel=st.sampled_from([1, 3, 5]), hidden=st.integers(2, 9),
       keep=st.tuples(st.integers(1, 6), st.integers(1, 9)), seed=st.integers(0, 9), density=st.floats(0.1, 1.0))
def test_widening_and_sorting_change_no_output(channels, kernel, hidden, keep, seed, density):
    full = sequence(channels, kernel, hidden, seed)
    for w in named_weights(full).values():
        w.data[torch.rand_like(w) > density] = 0
    small = remove_neurons(full, {"0": min(keep[0], channels), "4": min(keep[1], hidden)})
    before = {n: p.clone() for n, p in full.named_parameters()}
    x = torch.randn(4, 1, 8, 8)
    wide = widen(small, full)
    assert torch.allclose(wide(x), small(x), atol=1e-5)
    assert all(torch.equal(p, before[n]) for n, p in full.named_parameters())              # `full` is left as it is
    for net in (small, wide, full):
        ordered = sort_units(net)
        assert torch.allclose(ordered(x), net(x), atol=1e-5)
        assert hidden_layers(ordered) == hidden_layers(net)
        again = sort_units(ordered)
        assert all(torch.equal(a, b) for a, b in zip(ordered.state_dict().values(), again.state_dict().values()))


def test_units_come_in_the_order_of_their_weights():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
    net[0].weight.data = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0, 2, 0]])
    net[0].bias.data = torch.tensor([1.0, 2, 3])
    net[2].weight.data = torch.tensor([[0.0, 5, 6]])
    ordered = sort_units(net)
    assert ordered[0].bias.tolist() == [2, 3, 1] and ordered[2].weight.tolist() == [[5, 6, 0]]


def test_what_does_not_fit_is_refused():
    wide, narrow = create_model("lenet-300-100"), narrow_net(SMALL, load_data("digits", size=28))
    with pytest.raises(ValueError, match="does not fit into"):
        widen(wide, narrow)
    with pytest.raises(ValueError, match="same sequence"):
        widen(narrow, create_model("lenet-5"))
    without = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2))
    assert not widen(without, nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)))[0].bias.any()
    with pytest.raises(ValueError, match="fold BatchNorm first"):
        sort_units(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)))


@pytest.mark.parametrize("change, message", [
    (dict(weights=0), "weights must"), (dict(weights=10**7), "weights must lie between"),
    (dict(units=(("conv1", 3),)), "no hidden layer conv1"),
    (dict(bits=17), "bits must"), (dict(epochs=0), "epochs must"), (dict(score="best"), "score must")])
def test_wrong_configurations_are_one_error(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run_smallest(dataclasses.replace(SMALL, **change), 0, tmp_path, progress=False)
    assert not (tmp_path / "smallest.nncomp").exists()


def test_a_run_is_taken_up_again_and_its_file_is_what_was_measured(tmp_path, monkeypatch):
    whole = run_smallest(SMALL, 0, tmp_path / "a", progress=False)
    import nncomp.smallest as module

    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "share_and_distill", stop)
        with pytest.raises(KeyboardInterrupt):
            run_smallest(SMALL, 0, tmp_path / "b", progress=False)
    assert (tmp_path / "b" / "plain.pt").exists() and not (tmp_path / "b" / "smallest.nncomp").exists()
    resumed = run_smallest(SMALL, 0, tmp_path / "b", progress=False)
    paths = whole.pop("artefact"), resumed.pop("artefact")
    assert whole == resumed and paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].stat().st_size == whole["file_bytes"]
    net = load(paths[0], into=create_model("lenet-300-100"))
    assert evaluate(net, load_data("digits", size=28).test).error_percent == whole["file_error_percent"]
    assert sum(whole["left"].values()) <= SMALL.weights
    for name, p in net.named_parameters():
        assert len(p[p != 0].unique()) <= (15 if name == "fc3.weight" else 8), name


def test_the_table_waits_for_records(tmp_path):
    (tmp_path / "results").mkdir()
    frame = smallest_table(tmp_path)
    ours = frame[frame.source == "ours, the whole file"]
    assert len(ours) == 2 and set(ours["bytes"]) == {"not run yet"}


def test_configurations_differ_where_they_should():
    assert SmallestLeNet5().model == "lenet-5" and {n for n, _ in SmallestLeNet5().units} == set(hidden_layers(create_model("lenet-5")))


@pytest.mark.parametrize(("name", "net"), [("smallest-lenet-300-100", "LeNet-300-100"), ("smallest-lenet-5", "LeNet-5 (Caffe)")])
def test_validation_images_choose_the_shipped_file(name, net):
    records, (ready, path) = load_records(name), shipped(name)
    assert len(records) >= 5 and ready.metrics["valid_error_percent"] == min(r.metrics["valid_error_percent"] for r in records)
    line = smallest_table().set_index("network").loc[net].iloc[-1]
    assert line["source"] == "ours, the shipped file" and line["bytes"] == f"{path.stat().st_size:,} B"
    assert float(line["test error, %"]) == ready.metrics["file_error_percent"]
