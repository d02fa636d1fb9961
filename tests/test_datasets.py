"Data that are read while they are used: the same numbers as from memory, for every function that takes data, with workers and without."
import copy
import multiprocessing
import random
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from toys import Stop, toy_data, toy_net

from nncomp.container import load
from nncomp.core import seed_everything
from nncomp.data import Batches, Data, DatasetSplit, Split, stratified_split
from nncomp.deep_compression import Recipe, deep_compress, run_tag
from nncomp.distillation import cache_logits, distill, fixed_views, judge, without_class
from nncomp.neurons import activation_scores, taylor_scores
from nncomp.pruning import first_order_scores, wanda_scores
from nncomp.schedules import iterative_prune, recalibrate_batch_norm, sensitivity_scan
from nncomp.smallest import with_validation_images
from nncomp.soft_weight_sharing import SoftRecipe, soft_compress
from nncomp.training import evaluate, fit
from nncomp.weight_sharing import choose_bits, weight_importance

QUIET = {"progress": False, "device": "cpu"}


def streamed(data, num_workers=0):
    parts = {name: getattr(data, name) for name in ("train", "valid", "test")}
    return replace(data, **{name: DatasetSplit(TensorDataset(part.x, part.y), num_workers) for name, part in parts.items()})


class Drawn:
    "Examples that draw from all three generators, as transforms do; and that note what was read."
    def __init__(self, n=12, fail=None):
        self.n, self.fail, self.read = n, fail, []

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.read.append(i)
        if i == self.fail:
            raise OSError("the disk is gone")
        return torch.tensor([torch.rand(()), random.random(), np.random.rand()]), i % 3


# --- the same batches


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_are_those_of_the_tensors(workers, shuffle):
    data = toy_data()
    for drop_last in (False, True):
        parts = streamed(data, workers).train, data.train
        there, here = (Batches(part, 20, shuffle=shuffle, drop_last=drop_last, seed=3) for part in parts)
        for epoch in (0, 1):
            there.set_epoch(epoch), here.set_epoch(epoch)
            for one, other in zip(there.indexed(), here.indexed(), strict=True):
                assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


def test_what_is_drawn_depends_on_neither_workers_nor_the_past():
    def epoch(seed, number, workers, batch_size=5):
        batches = Batches(DatasetSplit(Drawn(), workers), batch_size, shuffle=True, seed=seed)
        batches.set_epoch(number)
        index, x = (torch.cat(parts) for parts in list(zip(*batches.indexed()))[:2])
        return x[index.argsort()]

    first = epoch(0, 1, 0)
    torch.rand(3), random.random(), np.random.rand()
    for workers, size in ((0, 5), (2, 5), (2, 1), (0, 12)):
        assert torch.equal(first, epoch(0, 1, workers, size))
    others = [epoch(*which, 0) for which in ((0, 0), (1, 0), (1, 1), (0, 2))]
    assert torch.cat([first, *others]).unique().numel() == 5 * 36


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_numbers_go_on_as_if_nothing_were_read(workers):
    seed_everything(0)
    expected = torch.rand(1).item(), random.random(), np.random.rand()
    seed_everything(0)
    part = DatasetSplit(Drawn(), workers)
    list(Batches(part, 4)), part.take([1, 2]), part.fingerprint(), part.x[0]
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected
    with pytest.raises(OSError, match="the disk is gone"):
        list(DatasetSplit(Drawn(fail=7), workers).in_order(4))
    seed_everything(0)
    with pytest.raises(OSError):
        DatasetSplit(Drawn(fail=0))
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected


def test_only_what_is_asked_for_is_read():
    dataset = Drawn(100)
    part = DatasetSplit(dataset)
    data = Data("drawn", part, part.take(slice(0)), part, 3)
    assert (data.input_shape, data.classification, len(data.train)) == ((3,), True, 100)
    data.to("cpu"), next(iter(Batches(part, 4)))
    assert set(dataset.read) == {0, 1, 2, 3}
    part.fingerprint()
    assert len(set(dataset.read)) <= 4 + 16


@given(st.data())
def test_indexing_is_that_of_tensors(drawn):
    n = drawn.draw(st.integers(1, 9))
    here = Split(torch.randn(n, 2, 3), torch.arange(n) % 4)
    there = DatasetSplit(TensorDataset(here.x, here.y))
    number = st.integers(-n, n - 1)
    numbers = st.lists(number, max_size=5)
    mask = st.lists(st.booleans(), min_size=n, max_size=n).map(torch.tensor)
    forward = st.slices(n).filter(lambda s: (s.step or 1) > 0)
    index = drawn.draw(st.one_of(numbers, forward, numbers.map(lambda v: torch.tensor(v, dtype=torch.long)), mask))
    a, b = here.take(index), there.take(index)
    assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and type(b) is Split
    assert torch.equal(there.x[index], here.x[index]) and torch.equal(there.y[index], here.y[index])
    one = drawn.draw(number)
    assert torch.equal(there.x[one], here.x[one]) and torch.equal(there.y[one], here.y[one])
    assert [len(p) for p in there.x.split(2)] == [len(p) for p in here.x.split(2)]
    assert (there.x.shape, there.x.ndim, there.y.dtype, len(there.x)) == (here.x.shape, 3, torch.int64, n)


def test_numbers_get_the_types_that_training_needs():
    part = DatasetSplit([(np.float32([1, 2]), 3.5), (np.float32([1, 2]), 4.5)])
    assert (part.x.dtype, part.y.dtype, part.y[:].tolist()) == (torch.float32, torch.float32, [3.5, 4.5])
    assert DatasetSplit([(torch.zeros(2), np.int64(3))]).y.dtype == torch.int64
    maps = DatasetSplit([(torch.zeros(3, 4, 4), torch.zeros(4, 4, dtype=torch.long))] * 3)
    data = Data("maps", maps, maps, maps)
    assert (maps.y.shape, data.classification) == ((3, 4, 4), False)


# --- every function that takes data


def test_training_gives_the_same_network_and_goes_on_after_an_interrupt(tmp_path):
    data, nets, histories = toy_data(), [], []
    for one in (data, streamed(data), streamed(data, 2)):
        nets.append(toy_net())
        histories.append(fit(nets[-1], one, epochs=3, batch_size=20, **QUIET))
    for net, history in zip(nets[1:], histories[1:]):
        assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), nets[0].state_dict().values()))
        assert [h["valid_loss"] for h in history] == [h["valid_loss"] for h in histories[0]]
    stopped, path = toy_net(), tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt, match="1 of 3 epochs"):
        fit(stopped, streamed(data), epochs=3, batch_size=20, checkpoint=path, callbacks=[Stop(1)], **QUIET)
    saved = path.read_bytes()
    fit(stopped, streamed(data, 2), epochs=3, batch_size=20, checkpoint=path, callbacks=[Stop(-1)], **QUIET)
    assert all(torch.equal(a, b) for a, b in zip(stopped.state_dict().values(), nets[0].state_dict().values()))
    path.write_bytes(saved)
    with pytest.raises(ValueError, match="belongs to another run: data is"):
        fit(stopped, streamed(toy_data(seed=1)), epochs=3, batch_size=20, checkpoint=path, callbacks=[Stop(-1)], **QUIET)


def test_random_transforms_survive_an_interrupt(tmp_path):
    part = DatasetSplit(Drawn(40))
    data = Data("drawn", part, part.take(slice(8)), part, 3)

    def net():
        seed_everything(0)
        return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))

    whole, stopped = net(), net()
    fit(whole, data, epochs=3, batch_size=8, **QUIET)
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, data, epochs=3, batch_size=8, checkpoint=tmp_path / "run.pt", callbacks=[Stop(1)], **QUIET)
    fit(stopped, data, epochs=3, batch_size=8, checkpoint=tmp_path / "run.pt", callbacks=[Stop(-1)], **QUIET)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), stopped.state_dict().values()))


def both(call):
    "What a call gives for data in memory and for data that are read."
    data = toy_data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [call(one) for one in (data, streamed(data))]


@pytest.mark.parametrize("call", [
    lambda data: evaluate(toy_net(), data.test),
    lambda data: list(activation_scores(toy_net(), data.train).values()),
    lambda data: list(taylor_scores(toy_net(), data.train).values()),
    lambda data: list(first_order_scores(toy_net(), data.batches(batch_size=32)).values()),
    lambda data: list(wanda_scores(toy_net(), data.batches(batch_size=32)).values()),
    lambda data: list(weight_importance(toy_net(), data, images=16).values()),
    lambda data: sensitivity_scan(toy_net(), data, sparsities=(0.5,)).to_dict(),
    lambda data: choose_bits(toy_net(), data, budget_bytes=600),
    lambda data: cache_logits(toy_net(), data.train),
    lambda data: judge(toy_net(), data.test),
    lambda data: list(without_class(data.train, 1)[0].y),
    lambda data: fixed_views(data, lambda xb, g: xb + torch.rand(len(xb), 1, 1, 1, generator=g), 2).train.x,
    lambda data: with_validation_images(data).train.x,
    lambda data: iterative_prune(toy_net(), data, [0.5], epochs=1, **QUIET)[1][0],
], ids="evaluate activations taylor first-order wanda fisher sensitivity bits logits judge class views all rounds".split())
def test_whatever_takes_data_takes_a_dataset(call):
    def told(value):
        if isinstance(value, dict):
            return {key: told(v) for key, v in value.items() if key != "seconds"}
        return [told(v) for v in value] if isinstance(value, list | tuple) else value.tolist() if isinstance(value, torch.Tensor) else value

    here, there = both(call)
    assert told(here) == told(there)


def test_batch_normalisation_is_recalibrated_alike():
    here, there = both(lambda data: [net := toy_net(), recalibrate_batch_norm(net, data, batch_size=32)][0])
    assert all(torch.equal(a, b) for a, b in zip(here.state_dict().values(), there.state_dict().values()))


def test_the_chain_writes_the_same_file(tmp_path):
    recipe = Recipe(prune_epochs=2, share_epochs=1, batch_size=32)
    paths = [tmp_path / name for name in ("here.nncomp", "there.nncomp")]
    for path, data in zip(paths, (toy_data(), streamed(toy_data(), 1))):
        deep_compress(toy_net(), data, recipe, path=path, folder=tmp_path / path.stem, **QUIET)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert evaluate(load(paths[1], into=toy_net()), streamed(toy_data()).test) == evaluate(load(paths[0], into=toy_net()), toy_data().test)


def test_soft_weight_sharing_writes_the_same_file(tmp_path):
    recipe = SoftRecipe(epochs=2, batch_size=32, tune_epochs=1)
    paths = [tmp_path / name for name in ("here.nncomp", "there.nncomp")]
    for path, data in zip(paths, (toy_data(), streamed(toy_data()))):
        soft_compress(toy_net(), data, recipe, path=path, **QUIET)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_teachers_live_and_cached():
    data = toy_data()
    there, teacher = streamed(data), toy_net(1).eval()
    nets = [toy_net() for _ in range(4)]
    known = cache_logits(teacher, there.train)
    for net, one, source in zip(nets, (data, there, data, there), (teacher, teacher, known, known)):
        distill(net, source, one, epochs=1, batch_size=32, **QUIET)
    for a, b in ((0, 1), (2, 3)):
        assert all(torch.equal(p, q) for p, q in zip(nets[a].parameters(), nets[b].parameters()))
    part = DatasetSplit(Drawn(40))
    moving = Data("drawn", part, part.take(slice(0)), part, 3)
    small = nn.Linear(3, 3).eval()
    with pytest.raises(ValueError, match="not to augmented ones"):      # other images each epoch: a cache does not belong to them
        distill(copy.deepcopy(small), cache_logits(small, part), moving, epochs=1, **QUIET)


def test_a_run_is_named_after_its_data():
    data = toy_data()
    tags = [run_tag(toy_net(), one, Recipe(), 0) for one in (streamed(data), streamed(data, 2), streamed(toy_data(seed=1)), data)]
    assert tags[0] == tags[1] and len(set(tags)) == 3
    few = replace(data, train=DatasetSplit(TensorDataset(data.train.x[:50], data.train.y[:50])))
    assert run_tag(toy_net(), few, Recipe(), 0) not in tags


def test_folders_of_images_with_held_out_images(tmp_path):
    torchvision, image = pytest.importorskip("torchvision"), pytest.importorskip("PIL.Image")
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(6):
            image.fromarray(np.full((9, 8, 3), 20 * i + (label == "b"), np.uint8)).save(tmp_path / label / f"{i}.png")
    transform = torchvision.transforms.Compose([torchvision.transforms.RandomCrop(8), torchvision.transforms.ToTensor()])
    folder = torchvision.datasets.ImageFolder(tmp_path, transform)
    kept, held = stratified_split(torch.tensor(folder.targets), 4)
    train, valid = (DatasetSplit(torch.utils.data.Subset(folder, index.tolist()), num_workers=2) for index in (kept, held))
    data = Data("mine", train, valid, valid, num_classes=2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    fit(model, data, epochs=2, batch_size=3, **QUIET)
    assert (data.input_shape, len(train), valid.y[:].bincount().tolist()) == ((3, 8, 8), 8, [2, 2])
    with pytest.raises(ValueError, match="examples must be tensors, arrays or numbers, got a Image; give it a transform"):
        DatasetSplit(torchvision.datasets.ImageFolder(tmp_path))
    with pytest.raises(ValueError, match=r"one shape, and the dataset gives \(3, 8, 8\) and \(3, 9, 8\)"):
        DatasetSplit([(torch.zeros(3, 8, 8), 0), (torch.zeros(3, 9, 8), 0)], num_workers=2).take(slice(None))


# --- what is no dataset


class Endless(IterableDataset):
    def __len__(self):
        return 3

    def __iter__(self):
        return iter([])


@pytest.mark.parametrize("dataset, error", [
    ([], "the dataset is empty"),
    (iter([]), "got a list_iterator"),
    (Endless(), "got a Endless"),
    (DataLoader(TensorDataset(torch.zeros(3, 2))), "got a DataLoader; give its .dataset"),
    ([{"x": 1}], r"a pair \(x, y\), got a dict"),
    ([(1, 2, 3)], r"a pair \(x, y\), got a tuple of 3"),
    ([(torch.zeros(2), "cat")], "answers must be .* got a str"),
    ([(torch.zeros(2), None)], "answers must be .* got a NoneType"),
    (None, "got a NoneType"),
    (5, "got a int"),
])
def test_what_is_no_dataset_is_refused(dataset, error):
    with pytest.raises(ValueError, match=error):
        DatasetSplit(dataset)


@pytest.mark.parametrize("workers", [-1, 1.5, "two"])
def test_workers_are_counted(workers):
    with pytest.raises(ValueError, match="num_workers"):
        DatasetSplit([(torch.zeros(2), 0)], num_workers=workers)


def test_a_dataset_or_a_loader_in_the_place_of_a_split_is_told():
    part = DatasetSplit([(torch.zeros(2), 0)])
    with pytest.raises(ValueError, match=r"train must be a Split\(x, y\) or a DatasetSplit\(dataset\), got a TensorDataset"):
        Data("mine", TensorDataset(torch.zeros(3, 2)), part, part, 2)
    with pytest.raises(ValueError, match="`DatasetSplit`s of what a loader reads"):
        deep_compress(nn.Linear(2, 2), DataLoader(TensorDataset(torch.zeros(3, 2))), path="never.nncomp")


def test_workers_are_gone_after_an_interrupt_and_after_an_error():
    "At once, while the traceback still holds everything."
    part, others = DatasetSplit(Drawn(40), num_workers=2), set(multiprocessing.active_children())
    with pytest.raises(KeyboardInterrupt) as _interrupt:
        fit(nn.Linear(3, 3), Data("drawn", part, part.take(slice(0)), part, 3), epochs=1, batch_size=8, callbacks=[Stop(0)], **QUIET)
    assert set(multiprocessing.active_children()) <= others
    broken = DatasetSplit(Drawn(40, fail=30), num_workers=2)
    with pytest.raises(OSError, match="the disk is gone") as _error:
        evaluate(nn.Linear(3, 3), broken)
    assert set(multiprocessing.active_children()) <= others


class WithHistory(torch.utils.data.Dataset):
    "Items that require a gradient, which no process can send to another."
    def __len__(self):
        return 40

    def __getitem__(self, i):
        return torch.ones(1, 8, 8).requires_grad_() * i, i % 4


def test_examples_leave_their_history_behind():
    for workers in (0, 2):
        xb, _ = next(iter(DatasetSplit(WithHistory(), num_workers=workers).in_order(10)))
        assert not xb.requires_grad and float(xb[3].mean()) == 3


def test_labels_to_split_by_may_be_a_list():
    labels = [0, 1, 2] * 10
    expected = stratified_split(torch.tensor(labels), 6)
    streamed = DatasetSplit([(torch.zeros(1, 2, 2), y) for y in labels])
    for y in (labels, np.array(labels), streamed.y):
        assert all(torch.equal(a, b) for a, b in zip(stratified_split(y, 6), expected))
