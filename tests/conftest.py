"Where the tests find real data, and what happens when there is none."
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side: more threads would only get in each other's way


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
