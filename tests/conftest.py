"Where the tests find real data, and what happens when there is none; the site, built once for all tests that read it."
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side: more threads would only get in each other's way
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a shell: the tests of Ctrl-C would wait forever
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _absent(what, root):
    "Skip the test with a reason; fail it on a machine that has promised to have the data."
    message = f"{what} is not in {root}; put it there or set NNCOMP_DATA"
    if os.environ.get("CI") == "true" and os.environ.get("NNCOMP_REQUIRE_DATA") == "1":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def data_dir():
    "The folder of the data sets: $NNCOMP_DATA, else .data in the repository."
    root = Path(os.environ.get("NNCOMP_DATA") or ROOT / ".data")
    if not root.is_dir():
        _absent("a folder of data sets", root)
    return root


@pytest.fixture(scope="session")
def mnist_root(data_dir):
    "A root under which MNIST is unpacked."
    if not (data_dir / "MNIST" / "raw" / "train-images-idx3-ubyte").is_file():
        _absent("MNIST", data_dir)
    return data_dir


@pytest.fixture(scope="session")
def cifar10_root(data_dir):
    "A root under which CIFAR-10 is unpacked."
    if not (data_dir / "cifar-10-batches-py" / "test_batch").is_file():
        _absent("CIFAR-10", data_dir)
    return data_dir


COPIED = ("nbs", "nncomp", "settings.ini", "setup.py", "_quarto.yml", "README.md", "results", "models")


def copy_repository(folder, notebooks=None):
    "A copy of what the site is built from, with all the notebooks or only those named."
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, folder / name)
    for path in (folder / "nbs").glob("*.ipynb"):
        if notebooks is not None and path.name not in notebooks:
            path.unlink()
    return folder


def run_build(folder):
    "Build the copy in a process of its own."
    command = [sys.executable, str(ROOT / "tools" / "build_site.py"), "--root", str(folder), "--renderer", "smalldocs"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The built site and what the build said on stderr; built once, whichever of the test processes comes first."
    pytest.importorskip("smalldocs", reason="the site's tools come with the extra `dev`")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "site"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            (folder / "stderr").write_text(run_build(copy_repository(folder)).stderr)
    return folder / "_docs", (folder / "stderr").read_text()
