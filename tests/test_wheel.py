"The wheel, installed without extras into a fresh environment, does what it says. Nothing is downloaded."
import shutil
import subprocess
import sys
import zipfile
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


def closure(names):
    "The installed distributions that `names` need, without extras."
    found, todo = {}, list(names)
    while todo:
        requirement = Requirement(todo.pop())
        marker = requirement.marker
        if requirement.name.lower() in found or (marker and not marker.evaluate({"extra": ""})):
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


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    "A new virtual environment that holds the wheel and its requirements, and nothing else."
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "nncomp", source / "nncomp", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "settings.ini", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)],
        check=True, capture_output=True,
    )
    wheel = next(folder.glob("*.whl"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    python = folder / "env" / "bin" / "python"
    site = next((folder / "env").glob("lib/python*/site-packages"))
    requirements = metadata.distribution("nncomp").requires or []
    for dist in closure([r for r in requirements if "extra ==" not in r]):
        link(dist, site)
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(wheel)], check=True)
    return folder, python, wheel


def test_wheel_holds_the_package_only(fresh):
    names = zipfile.ZipFile(fresh[2]).namelist()
    assert {n.split("/")[0].split("-")[0] for n in names} == {"nncomp"}
    assert "nncomp/container.py" in names


def test_use_without_extras(fresh, tmp_path):
    done = subprocess.run([fresh[1], "-c", USE], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip().endswith("used"), done.stderr


def test_command_without_extras(fresh, tmp_path):
    command = fresh[1].parent / "nncomp"
    made = "import torch; from safetensors.torch import save_file; save_file({'w': torch.ones(50, 50)}, 'w.safetensors')"
    subprocess.run([fresh[1], "-c", made], cwd=tmp_path, check=True)
    subprocess.run([command, "compress", "w.safetensors", "-o", "w.nncomp"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "w.nncomp").stat().st_size < 1000
    done = subprocess.run([command, "demo"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'nncomp[book]'" in done.stderr and len(done.stderr.strip().splitlines()) == 1
