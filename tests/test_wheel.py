"The wheel, installed into a fresh environment without extras or with those of the book, does what it says. Nothing is downloaded."
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent

USE = """
import torch, numpy as np
from torch import nn
from nncomp import save, load
from nncomp.kmeans import kmeans_1d
from nncomp.huffman import encode, decode
from nncomp.pruning import magnitude_mask

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
with torch.no_grad():
    for p in (model[0].weight, model[2].weight):
        p *= magnitude_mask(p, 0.9)
        codebook, assignments = kmeans_1d(p, 16, keep_zero=True)
        p.copy_(codebook[assignments])
save(model, "model.nncomp")
back = load("model.nncomp")
assert all(torch.equal(back[k], v) for k, v in model.state_dict().items())
symbols = np.arange(1000, dtype=np.uint8) % 7
assert (decode(encode(symbols)) == symbols).all()

import importlib.util, sys
for name in ("fastcore", "nbdev", "matplotlib", "torchvision", "sklearn"):
    assert importlib.util.find_spec(name) is None, name
    assert name not in sys.modules
print("used")
"""

TOY = """
from dataclasses import dataclass
from pathlib import Path
from nncomp.results import experiment

@dataclass(frozen=True)
class Config:
    n: int = 1

@experiment("toy")
def toy(config: Config, seed: int, folder: Path) -> dict:
    return {"n": config.n}
"""

# Runs a notebook as Colab does, cell after cell in IPython, except for the install cell.
READ = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
for cell in json.load(open(sys.argv[1]))["cells"]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "code" and "pip install" not in source and not source.startswith(("#| slow", "#| gpu")):
        result = shell.run_cell(source)
        if not result.success:
            sys.exit(f"{source}\\n{result.error_in_exec or result.error_before_exec!r}")
print("read to the end")
"""


def closure(names, extra=""):
    "The installed distributions that `names` need, for one of our extras."
    found, todo = {}, list(names)
    while todo:
        requirement = Requirement(todo.pop())
        marker = requirement.marker
        if requirement.name.lower() in found or (marker and not any(marker.evaluate({"extra": e}) for e in {"", extra})):
            continue
        try:
            dist = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        found[requirement.name.lower()] = dist
        todo += dist.requires or []
    return found.values()


def link(dist, site):
    "Make one installed distribution importable from another environment's site-packages, top name by top name."
    for name in {file.parts[0] for file in dist.files or [] if file.parts[0] not in {"..", "__pycache__", "bin"}}:
        source = Path(dist.locate_file(name))
        target = site / name
        if source.is_dir() and target.is_dir():  # a namespace shared by several distributions, such as nvidia/
            continue
        if source.exists() and not target.exists():
            target.symlink_to(source)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    "The package as pip builds it."
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("nncomp", "results", "models"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "settings.ini", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)],
        check=True, capture_output=True,
    )
    return next(folder.glob("*.whl"))


def test_the_page_of_the_package_has_its_pictures(wheel):
    archive = zipfile.ZipFile(wheel)
    text = archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))).decode()
    pictures = re.findall(r'<img src="([^"]+)"', text)
    assert pictures and all(p.startswith("https://raw.githubusercontent.com/") for p in pictures)


def environment(folder, wheel, extra=""):
    "The Python of a new virtual environment that holds the wheel, its requirements and those of an extra, and nothing else."
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python, site = folder / "bin" / "python", next(folder.glob("lib/python*/site-packages"))
    name = next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("/METADATA"))
    requirements = message_from_bytes(zipfile.ZipFile(wheel).read(name)).get_all("Requires-Dist")
    for dist in closure([r for r in requirements if "extra ==" not in r or f'extra == "{extra}"' in r], extra):
        link(dist, site)
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(wheel)], check=True)
    return python


@pytest.fixture(scope="session")
def fresh(tmp_path_factory, wheel):
    "The Python of an environment without extras."
    return environment(tmp_path_factory.mktemp("bare") / "env", wheel)


@pytest.fixture(scope="session")
def colab(tmp_path_factory, wheel):
    "The Python of an environment with what the chapters need."
    return environment(tmp_path_factory.mktemp("book") / "env", wheel, "book")


def test_wheel_holds_the_package_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0].split("-")[0] for n in names} == {"nncomp"}
    assert "nncomp/container.py" in names
    for folder, pattern in (("results", "*.json"), ("models", "*.nncomp")):
        assert {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob(pattern)} == {
            n.removeprefix("nncomp/_book/") for n in names if n.startswith(f"nncomp/_book/{folder}/")
        }
    assert wheel.stat().st_size < 2_000_000


def test_use_without_extras(fresh, tmp_path):
    done = subprocess.run([fresh, "-c", USE], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip().endswith("used"), done.stderr


def test_command_without_extras(fresh, tmp_path):
    command = fresh.parent / "nncomp"
    made = "import torch; from safetensors.torch import save_file; save_file({'w': torch.ones(50, 50)}, 'w.safetensors')"
    subprocess.run([fresh, "-c", made], cwd=tmp_path, check=True)
    subprocess.run([command, "compress", "w.safetensors", "-o", "w.nncomp"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "w.nncomp").stat().st_size < 1000
    done = subprocess.run([command, "demo"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'nncomp[book]'" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def call(python, folder, *arguments):
    "Run Python in a folder with no data, no cache and no network."
    kept = {k: v for k, v in os.environ.items() if not k.startswith("NNCOMP") and k not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    nowhere = "http://127.0.0.1:9"
    away = {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache"), "HTTPS_PROXY": nowhere, "HTTP_PROXY": nowhere}
    return subprocess.run([python, *arguments], cwd=folder, env=kept | away | {"MPLBACKEND": "Agg"}, capture_output=True, text=True)


ALL = sorted(p.stem for p in (ROOT / "nbs").glob("*.ipynb"))
SOME = ["10_pruning", "91_pareto"]  # these look for records; `make slow` runs all


@pytest.mark.parametrize("name", ALL if os.environ.get("NNCOMP_SLOW") else SOME)
def test_chapters_run_where_only_the_package_is(colab, name, tmp_path):
    shutil.copy(ROOT / "nbs" / f"{name}.ipynb", tmp_path)
    done = call(colab, tmp_path, "-c", READ, f"{name}.ipynb")
    assert done.returncode == 0 and "read to the end" in done.stdout, done.stderr[-3000:] + done.stdout[-1000:]


def test_tables_are_read_and_nothing_is_written_beside_the_package(colab, tmp_path):
    code = """
from pathlib import Path
import nncomp
from nncomp.results import load_records, reproduce, results_root, shipped
brought = Path(nncomp.__file__).parent / "_book"
Path("results/of-my-own").mkdir(parents=True)    # hides nothing: it has no record
assert results_root() == brought / "results" and len(load_records("classic-lenet-5")) >= 5
assert shipped("classic-lenet-5")[1].is_file()
before = sorted(brought.rglob("*"))

from toy_experiment import Config
reproduce("toy", progress=False)
assert Path("results/toy").is_dir() and sorted(brought.rglob("*")) == before
assert results_root() == Path.cwd() / "results" and not load_records("classic-lenet-5")
print("read")
"""
    (tmp_path / "toy_experiment.py").write_text(TOY)
    done = call(colab, tmp_path, "-c", code)
    assert done.stdout == "read\n", done.stderr


def test_mnist_asks_for_its_download(colab, tmp_path):
    done = call(colab, tmp_path, "-c", "from nncomp.data import load_data; load_data('mnist')")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "mnist" in last.lower() and "download" in last, last
