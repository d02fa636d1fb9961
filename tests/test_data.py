"Data sets: splits, batches, augmentation, and every way in which files can be missing or damaged."
import gzip
import http.client
import os
import socket
import urllib.error

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nncomp import data as nd
from nncomp.data import Batches, Data, MissingDataError, Split, load_data, normalise, random_affine, random_crop_flip, stratified_split

datasets = pytest.importorskip("torchvision.datasets")
Image = pytest.importorskip("PIL.Image")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(n):
    return Split(torch.arange(float(n)).view(n, 1, 1, 1), torch.arange(n) % 3)


# --- splits


@given(st.lists(st.integers(0, 6), min_size=1, max_size=80), st.floats(0, 1), st.integers(0, 99))
def test_stratified_split_is_exact_and_fair(labels, fraction, seed):
    y = torch.tensor(labels)
    count = round(fraction * len(y))
    kept, held = stratified_split(y, count, seed)
    assert len(held) == count
    assert sorted(kept.tolist() + held.tolist()) == list(range(len(y)))
    assert kept.tolist() == sorted(kept.tolist()) and held.tolist() == sorted(held.tolist())
    share = torch.bincount(y) * count / len(y)
    got = torch.bincount(y[held], minlength=len(share))
    assert ((got - share).abs() < 1).all()


def test_stratified_split_does_not_change_with_versions():
    assert stratified_split(torch.arange(20) % 2, 6, seed=0)[1].tolist() == [1, 8, 10, 17, 18, 19]


def test_digits_splits_share_no_image():
    data = load_data("digits", size=8)
    assert [len(p) for p in (data.train, data.valid, data.test)] == [1350, 150, 297]
    rows = torch.cat([p.x.flatten(1) for p in (data.train, data.valid, data.test)])
    assert len(rows.unique(dim=0)) == 1797
    assert torch.equal(load_data("digits", size=8).train.x, data.train.x)


@pytest.mark.parametrize("fraction, sizes", [(0, (1500, 0)), (0.5, (750, 750))])
def test_valid_fraction(fraction, sizes):
    data = load_data("digits", size=8, valid_fraction=fraction)
    assert (len(data.train), len(data.valid)) == sizes
    assert data.valid.x.shape[1:] == (1, 8, 8)


@pytest.mark.parametrize("fraction", [-0.1, 1, 10, float("nan")])
def test_bad_valid_fraction(fraction):
    with pytest.raises(ValueError, match="valid_fraction"):
        load_data("digits", valid_fraction=fraction)


@pytest.mark.parametrize("name", ["", "MNIST", "folder", "folder:", "digit", "cifar100:x"])
def test_unknown_name_lists_the_names(name):
    with pytest.raises(ValueError, match="'digits', 'mnist', 'fashion', 'cifar10' or 'folder:PATH'"):
        load_data(name, size=8)


# --- batches


@given(st.integers(0, 40), st.integers(1, 45), st.booleans(), st.booleans(), st.integers(0, 5), st.integers(0, 5))
def test_batches_cover_the_split(n, size, shuffle, drop_last, seed, epoch):
    split = numbered(n)
    batches = Batches(split, size, shuffle=shuffle, drop_last=drop_last, seed=seed)
    batches.set_epoch(epoch)
    got = list(batches.indexed())
    assert len(got) == len(batches)
    assert all(len(i) == size for i, _, _ in (got if drop_last else got[:-1]))
    seen = [int(v) for i, _, _ in got for v in i]
    assert len(set(seen)) == len(seen) == (n // size * size if drop_last else n)
    for i, xb, yb in got:
        assert torch.equal(xb, split.x[i]) and torch.equal(yb, split.y[i])
    assert all(torch.equal(a, b) for (a, _), (_, b, _) in zip(batches, got, strict=True))


def test_epoch_is_a_pure_function_of_seed_and_epoch():
    data = load_data("digits", size=8)

    def epoch(seed, number):
        batches = data.batches(batch_size=500, augment=random_affine, seed=seed)
        batches.set_epoch(number)
        return torch.cat([xb for xb, _ in batches])

    torch.rand(3)  # the global generator plays no part
    assert torch.equal(epoch(0, 1), epoch(0, 1))
    assert not torch.equal(epoch(0, 1), epoch(1, 0))
    assert not torch.equal(epoch(0, 1), epoch(0, 2))


def test_order_does_not_depend_on_augmentation():
    data = load_data("digits", size=8)
    plain, moved = (torch.cat([i for i, _, _ in data.batches(augment=a).indexed()]) for a in (None, random_affine))
    assert torch.equal(plain, moved)


def test_two_iterators_do_not_disturb_each_other():
    batches = Batches(numbered(20), 4, shuffle=True, augment=lambda xb, g: xb + torch.rand(1, generator=g))
    one, two = iter(batches), iter(batches)
    for _ in range(len(batches)):
        assert torch.equal(next(one)[0], next(two)[0])


def test_writing_into_a_batch_leaves_the_data_alone():
    split = numbered(6)
    for shuffle in (False, True):
        for xb, yb in Batches(split, 6, shuffle=shuffle):
            xb.zero_(), yb.zero_()
    assert torch.equal(split.x.flatten(), torch.arange(6.0))


def test_data_moves_and_names_its_splits():
    data = Data("toy", numbered(4), numbered(0), numbered(2), 3)
    moved = data.to("meta")
    assert moved.train.x.device.type == "meta" and data.train.x.device.type == "cpu" and moved.num_classes == 3
    assert len(data.batches("valid")) == 0 and not data.batches("valid").shuffle
    assert not data.batches(shuffle=False).shuffle
    with pytest.raises(ValueError, match="'dev'"):
        data.batches("dev")


# --- values


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.one_of(st.none(), st.integers(1, 12)))
@settings(deadline=None)
def test_normalise_shape_and_range(c, h, w, size):
    images = torch.randint(256, (2, c, h, w), dtype=torch.uint8)
    x = normalise(images, (0.0,) * c, (1.0,) * c, size=size)
    assert x.shape == (2, c, size or h, size or w) and x.dtype == torch.float32
    assert x.min() >= -1e-6 and x.max() <= 1 + 1e-6
    if size in (None, h) and h == w:
        assert torch.equal(x, images.float() / 255)


def test_normalise_leaves_its_argument_alone():
    images = torch.full((1, 1, 2, 2), 9, dtype=torch.uint8)
    normalise(images, (0.5,), (0.5,))
    assert (images == 9).all()


@given(st.integers(0, 4), st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
@settings(deadline=None)
def test_augmentations_keep_shape_and_repeat(n, c, h, w, seed):
    xb = torch.randn(n, c, h, w, generator=seeded(seed))
    before = xb.clone()
    for augment in (random_affine, random_crop_flip):
        a, b = augment(xb, seeded(seed)), augment(xb, seeded(seed))
        assert a.shape == xb.shape and a.dtype == xb.dtype and torch.equal(a, b)
    assert torch.equal(xb, before)


def test_affine_shift_is_in_pixels():
    xb = torch.zeros(200, 1, 21, 31)
    xb[:, :, 10, 15] = 1
    out = random_affine(xb, seeded(), shift=3, degrees=0, scale=0)[:, 0]
    mass = out.sum((1, 2))
    x = (out.sum(1) * torch.arange(31)).sum(1) / mass - 15
    y = (out.sum(2) * torch.arange(21)).sum(1) / mass - 10
    torch.testing.assert_close(mass, torch.ones(200), rtol=0, atol=1e-3)
    for moved in (x, y):
        assert moved.abs().max() <= 3.001 and moved.min() < -2.5 and moved.max() > 2.5 and abs(moved.mean()) < 0.5


def test_affine_rotation_keeps_circles_on_wide_images():
    y, x = torch.meshgrid(torch.arange(21.0) - 10, torch.arange(41.0) - 20, indexing="ij")
    disc = torch.exp(-(x**2 + y**2) / 20).expand(8, 1, 21, 41)
    out = random_affine(disc, seeded(), shift=0, degrees=180, scale=0)
    assert (out - disc).abs().max() < 0.03


def test_affine_zoom_keeps_the_centre_and_the_range():
    xb = torch.rand(16, 1, 9, 9, generator=seeded())
    out = random_affine(xb, seeded(), shift=0, degrees=0, scale=0.5)
    torch.testing.assert_close(out[:, :, 4, 4], xb[:, :, 4, 4])
    assert out.min() >= xb.min() - 1e-6 and out.max() <= xb.max() + 1e-6


def test_crops_reach_every_place_and_half_are_mirrored():
    xb = torch.arange(1.0, 10).view(1, 1, 3, 3).expand(4000, 1, 3, 3)
    out = random_crop_flip(xb, seeded(), padding=1)
    assert len(out.flatten(1).unique(dim=0)) == 3 * 3 * 2
    stayed, mirrored = ((out == image).flatten(1).all(1).float().mean() for image in (xb, xb.flip(3)))
    assert abs(stayed - 1 / 18) < 0.02 and abs(mirrored - 1 / 18) < 0.02


# --- roots and files


def test_root_order(monkeypatch, tmp_path):
    monkeypatch.setenv("NNCOMP_DATA", str(tmp_path))
    assert nd.data_root() == tmp_path
    assert nd.data_root("elsewhere").name == "elsewhere"
    monkeypatch.setenv("NNCOMP_DATA", "")
    assert nd.data_root().parent.name == "nncomp"
    monkeypatch.setattr(nd, "require", lambda name: (_ for _ in ()).throw(nd.MissingExtraError(name)))
    assert nd.data_root().parts[-3:] == (".cache", "nncomp", "data")


def write_idx(folder):
    "MNIST's four raw files with 60,000 and 10,000 images that are all zero (sparse files)."
    folder.mkdir(parents=True)
    for name, size in nd._IDX_BYTES.items():
        n = 60_000 if name.startswith("train") else 10_000
        shape = (n, 28, 28) if "images" in name else (n,)
        (folder / name).write_bytes(bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes())
        os.truncate(folder / name, size)


def refuse(error):
    def fetch(*args, **kwargs):
        raise error

    return fetch


@pytest.fixture
def offline(monkeypatch):
    "A function that makes every download fail with the given error."

    def cut(error):
        monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", refuse(error))
        monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse(error))

    cut(urllib.error.URLError("no network"))
    return cut


def message(name, root, **kwargs):
    with pytest.raises(MissingDataError) as caught:
        load_data(name, root, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and "'digits', which needs no download" in text
    assert isinstance(caught.value, FileNotFoundError)
    return text


@pytest.mark.parametrize("name, file, folder", [
    ("mnist", "train-images-idx3-ubyte.gz", "MNIST/raw"), ("fashion", "t10k-labels-idx1-ubyte.gz", "FashionMNIST/raw"),
    ("cifar10", "cifar-10-python.tar.gz", ""),
])
@pytest.mark.parametrize("download", [False, True])
def test_nothing_there(name, file, folder, download, tmp_path, offline):
    text = message(name, tmp_path / "new", download=download)
    assert file in text and f"into {tmp_path / 'new' / folder}," in text and "from http" in text


@pytest.mark.parametrize("error", [
    urllib.error.URLError("no network"), RuntimeError("File not found or corrupted."), TimeoutError("timed out"), EOFError("ended early"),
    http.client.IncompleteRead(b"abc", 9), ConnectionResetError("reset"), gzip.BadGzipFile("not a gzip file"), PermissionError("read-only"),
])
def test_download_that_fails(error, tmp_path, offline):
    offline(error)
    before = socket.getdefaulttimeout()
    for name in ("mnist", "cifar10"):
        assert repr(name) in message(name, tmp_path)
    assert socket.getdefaulttimeout() == before


def test_root_that_is_a_file(tmp_path, offline):
    (tmp_path / "file").write_text("")
    message("mnist", tmp_path / "file")


@pytest.mark.parametrize("name", sorted(nd._IDX_BYTES))
def test_half_written_file_is_not_taken_for_whole(name, tmp_path, offline):
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw)
    assert not nd._partial(raw)
    os.truncate(raw / name, nd._IDX_BYTES[name] - 1)
    assert f"{name} has" in message("mnist", tmp_path, download=False)
    assert (raw / name).exists()  # only a download clears it away
    message("mnist", tmp_path)


def test_right_size_but_wrong_content(tmp_path, offline):
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw)
    with open(raw / "train-images-idx3-ubyte", "r+b") as file:
        file.write(bytes(16))
    message("mnist", tmp_path, download=False)


def test_archives_put_there_by_hand_need_no_network(tmp_path, monkeypatch):
    source, raw = tmp_path / "source", tmp_path / "MNIST" / "raw"
    write_idx(source)
    raw.mkdir(parents=True)
    for name in nd._IDX_BYTES:
        (raw / f"{name}.gz").write_bytes(gzip.compress((source / name).read_bytes(), 1))
    half = "t10k-images-idx3-ubyte"  # an earlier unpacking was interrupted
    (raw / half).write_bytes((source / half).read_bytes()[:5000])
    monkeypatch.setattr(datasets.MNIST, "resources", [(f"{name}.gz", None) for name in nd._IDX_BYTES])
    monkeypatch.setattr("urllib.request.urlopen", refuse(urllib.error.URLError("no network")))
    message("mnist", tmp_path, download=False)
    data = load_data("mnist", tmp_path)
    assert [len(p) for p in (data.train, data.valid, data.test)] == [54_000, 6_000, 10_000]


def test_cifar_with_a_damaged_batch(tmp_path, offline):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (folder / name).write_bytes(b"not a batch")
    assert "corrupted" in message("cifar10", tmp_path, download=False)


# --- folders


def write_images(folder, classes, n=5, mode="RGB", size=(9, 7)):
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.new(mode, size, 40 * k + i if mode == "L" else (40 * k + i, 10, 200)).save(folder / name / f"{i}.png")


def test_folder_of_classes(tmp_path):
    write_images(tmp_path, ["ant", "bee"], n=10)
    data = load_data(f"folder:{tmp_path}", size=6, valid_fraction=0.25)
    assert (data.classes, data.num_classes, data.input_shape) == (("ant", "bee"), 2, (3, 6, 6))
    assert [len(p) for p in (data.train, data.valid, data.test)] == [12, 4, 4]
    assert torch.equal(load_data(f"folder:{tmp_path}", size=6, seed=9).test.x, data.test.x)
    red = data.test.x[:, 0, 0, 0] * data.std[0] + data.mean[0]
    assert ((red * 255).round().int() // 40).tolist() == data.test.y.tolist()
    assert all(torch.isfinite(p.x).all() for p in (data.train, data.valid, data.test))  # the constant channels too


def test_folder_with_its_own_splits(tmp_path):
    for part, n in (("train", 4), ("valid", 2), ("test", 3)):
        write_images(tmp_path / part, ["a", "b", "c"], n=n, mode="L")
    data = load_data(f"folder:{tmp_path}", size=8)
    assert data.input_shape == (1, 8, 8)
    assert [len(p) for p in (data.train, data.valid, data.test)] == [12, 6, 9]
    (tmp_path / "test" / "c").rename(tmp_path / "test" / "d")
    with pytest.raises(ValueError, match="train has a, b, c"):
        load_data(f"folder:{tmp_path}", size=8)


def test_one_colour_image_makes_the_set_colour(tmp_path):
    write_images(tmp_path, ["a", "b"], mode="L")
    Image.new("RGB", (5, 5), (1, 2, 3)).save(tmp_path / "a" / "colour.png")
    assert load_data(f"folder:{tmp_path}", size=5).input_shape == (3, 5, 5)


def test_bad_folders(tmp_path):
    with pytest.raises(MissingDataError, match="one subfolder"):
        load_data(f"folder:{tmp_path / 'none'}", size=8)
    with pytest.raises(MissingDataError, match="one subfolder"):
        load_data(f"folder:{tmp_path}", size=8)
    write_images(tmp_path, ["a", "b"])
    (tmp_path / "a" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="0.png cannot be read as an image"):
        load_data(f"folder:{tmp_path}", size=8)


# --- the real sets


def test_real_mnist(mnist_root):
    data = load_data("mnist", mnist_root, download=False)
    assert [len(p) for p in (data.train, data.valid, data.test)] == [54_000, 6_000, 10_000]
    assert data.test.y[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert data.input_shape == (1, 28, 28)
    x = torch.cat([data.train.x, data.valid.x])
    assert abs(x.mean()) < 1e-3 and abs(x.std() - 1) < 1e-3


def test_real_cifar10(cifar10_root):
    data = load_data("cifar10", cifar10_root, download=False)
    assert [len(p) for p in (data.train, data.valid, data.test)] == [45_000, 5_000, 10_000]
    assert data.classes[data.test.y[0]] == "cat" and data.input_shape == (3, 32, 32)
    x = torch.cat([data.train.x, data.valid.x])
    assert x.mean((0, 2, 3)).abs().max() < 2e-3 and (x.std((0, 2, 3)) - 1).abs().max() < 2e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("augment", [None, random_affine, random_crop_flip])
def test_a_gpu_sees_the_same_batches(augment):
    there, here = (load_data("digits", device=device).batches(augment=augment) for device in ("cuda", "cpu"))
    for (i, xb, yb), (j, x, y) in zip(there.indexed(), here.indexed(), strict=True):
        assert xb.is_cuda and torch.equal(i.cpu(), j) and torch.equal(yb.cpu(), y)
        torch.testing.assert_close(xb.cpu(), x, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["val", "valid"])
def test_folder_with_train_and_validation_only(tmp_path, name):
    for part, n in (("train", 10), (name, 4)):
        write_images(tmp_path / part, ["cat", "dog"], n)
    data = load_data(f"folder:{tmp_path}", size=6)
    assert data.classes == ("cat", "dog") and (len(data.train), len(data.valid), len(data.test)) == (16, 8, 4)
    write_images(tmp_path / "test", ["cat", "dog"], 3)
    data = load_data(f"folder:{tmp_path}", size=6, valid_fraction=0)
    assert (len(data.train), len(data.valid), len(data.test)) == (20, 8, 6)


def test_a_class_may_be_called_train(tmp_path):
    write_images(tmp_path, ["plane", "test", "train"], 5)
    assert load_data(f"folder:{tmp_path}", size=6).classes == ("plane", "test", "train")


def test_labels_that_cannot_be_held_out_in_proportion():
    with pytest.raises(ValueError, match="classes are counted from 0, got -100"):
        stratified_split(torch.tensor([0, 1, -100]), 1)


def test_normalise_leaves_floats_alone_too():
    x = torch.full((1, 1, 2, 2), 200.)
    normalise(x, (0.5,), (0.5,))
    assert (x == 200).all()
