"The command line as a user meets it: in a process of its own, with good input, bad input and interruptions."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn

from nncomp.cli import compress_file, expand_file
from nncomp.container import load, save
from nncomp.core import BitstreamError
from nncomp.data import load_data

COMMAND = str(Path(sys.executable).with_name("nncomp"))


def nncomp(*args, cwd):
    return subprocess.run([COMMAND, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Checkpoints of several kinds."
    path = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 10))
    state = net.state_dict() | {"half": torch.randn(30, 20).half(), "brain": torch.randn(30, 20).bfloat16()}
    state["nan"] = torch.full((2, 2), torch.nan)
    save_file(state, path / "net.safetensors")
    torch.save(state, path / "net.pt")
    torch.save(net, path / "object.pt")
    (path / "empty.pt").touch()
    (path / "empty.safetensors").touch()
    (path / "garbage.pt").write_bytes(os.urandom(3000))
    (path / "garbage.safetensors").write_bytes(os.urandom(3000))
    (path / "cut.safetensors").write_bytes((path / "net.safetensors").read_bytes()[:-7])
    save(state, path / "net.nncomp")
    (path / "cut.nncomp").write_bytes((path / "net.nncomp").read_bytes()[:-7])
    (path / "text.txt").write_text("hello")
    (path / "list.safetensors.index.json").write_text("[1, 2]")
    (path / "gone.safetensors.index.json").write_text('{"weight_map": {"w": "gone.safetensors"}}')
    (path / "one.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(state, "net.safetensors")}))
    return path


def test_round_trip_keeps_every_bit(folder, tmp_path):
    made = nncomp("compress", folder / "net.safetensors", "-o", "a.nncomp", "--json", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    report = json.loads(made.stdout)
    assert report["file_bytes"] == (tmp_path / "a.nncomp").stat().st_size < report["dense_bytes"]
    assert nncomp("expand", "a.nncomp", "-o", "b.safetensors", cwd=tmp_path).returncode == 0
    before, after = load_file(folder / "net.safetensors"), load_file(tmp_path / "b.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and after[name].shape == tensor.shape
        assert torch.equal(after[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name


def test_sparsity_and_bits(folder, tmp_path):
    state = {k: v for k, v in load_file(folder / "net.safetensors").items() if k != "nan"}
    save_file(state, tmp_path / "in.safetensors")
    assert nncomp("compress", "in.safetensors", "-o", "a.nncomp", "--sparsity", 0.5, "--bits", 3, cwd=tmp_path).returncode == 0
    for name, tensor in load(tmp_path / "a.nncomp").items():
        if tensor.ndim >= 2 and tensor.is_floating_point():
            assert int((tensor == 0).sum()) >= round(0.5 * tensor.numel())
            assert tensor.float().unique().numel() <= 8
        else:
            assert torch.equal(tensor, state[name])


BAD = {
    "demo over an existing file": (["demo", "-o", "net.nncomp"], "--force"),
    "demo whose report would replace its file": (["demo", "-o", "demo.html"], "report"),
    "demo on a device that is not there": (["demo", "--device", "bogus"], "bogus"),
    "index that is no index": (["compress", "list.safetensors.index.json", "-o", "out"], "is not an index"),
    "index of a missing shard": (["compress", "gone.safetensors.index.json", "-o", "out"], "download that shard"),
    "output is a shard": (["compress", "one.safetensors.index.json", "-o", "net.safetensors", "--force"], "part of it"),
    "output is a device": (["compress", "net.pt", "-o", "/dev/null", "--force"], "not an ordinary file"),
    "missing input": (["compress", "nowhere.safetensors", "-o", "out"], "is not a file"),
    "empty pt": (["compress", "empty.pt", "-o", "out"], "is empty"),
    "empty safetensors": (["compress", "empty.safetensors", "-o", "out"], "is empty"),
    "garbage pt": (["compress", "garbage.pt", "-o", "out"], "cannot be read safely"),
    "garbage safetensors": (["compress", "garbage.safetensors", "-o", "out"], "not a whole safetensors file"),
    "truncated safetensors": (["compress", "cut.safetensors", "-o", "out"], "not a whole safetensors file"),
    "pickled object": (["compress", "object.pt", "-o", "out"], "save model.state_dict() instead"),
    "other ending": (["compress", "text.txt", "-o", "out"], "should end in"),
    "NaN under k-means": (["compress", "net.pt", "-o", "out", "--bits", "4"], "nan holds 4 NaN"),
    "sparsity as a percentage": (["compress", "net.pt", "-o", "out", "--sparsity", "90"], "[0, 1]"),
    "sparsity below zero": (["compress", "net.pt", "-o", "out", "--sparsity=-0.1"], "[0, 1]"),
    "no bits": (["compress", "net.pt", "-o", "out", "--bits", "0"], "1…16"),
    "too many bits": (["compress", "net.pt", "-o", "out", "--bits", "17"], "1…16"),
    "missing folder": (["compress", "net.pt", "-o", "no/such/out"], "does not exist"),
    "output is input": (["compress", "net.pt", "-o", "net.pt", "--force"], "is the input"),
    "existing output": (["compress", "net.pt", "-o", "net.safetensors"], "--force"),
    "a size in no unit": (["expand", "net.nncomp", "-o", "out", "--shard-size", "many"], "5GB"),
    "no jobs": (["compress", "net.pt", "-o", "out", "--jobs", "0"], "n_jobs"),
    "contradiction": (["compress", "net.pt", "-o", "out", "--lossless", "--bits", "4"], "contradicts"),
    "truncated nncomp": (["expand", "cut.nncomp", "-o", "out"], "cut.nncomp"),
    "expand what is not nncomp": (["expand", "net.safetensors", "-o", "out"], "net.safetensors"),
    "inspect garbage": (["inspect", "garbage.pt"], "garbage.pt"),
    "inspect nothing": (["inspect", "nowhere.nncomp"], "nowhere.nncomp"),
    "verify nothing": (["verify", "--root", "."], "in a clone"),
    "reproduce unknown": (["reproduce", "magic"], "magic"),
    "demo into a missing folder": (["demo", "-o", "no/such/demo.nncomp"], "does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(folder, case, capsys, monkeypatch):
    from nncomp.cli import main

    args, words = BAD[case]
    monkeypatch.chdir(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert main(args) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("nncomp: error: ") and words in error
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before, "something was written"


def test_python_m_is_the_same_command(folder, tmp_path):
    for name, code, words in ((folder / "net.nncomp", 0, "0.weight"), ("nothing.nncomp", 2, "error: there is no file nothing.nncomp")):
        line = [sys.executable, "-m", "nncomp", "inspect", str(name)]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == code and words in done.stdout + done.stderr, done.stderr


def test_unknown_version_is_refused(folder, tmp_path):
    data = (folder / "net.nncomp").read_bytes()
    assert data.count(b'"version":"1"') == 1
    (tmp_path / "new.nncomp").write_bytes(data.replace(b'"version":"1"', b'"version":"9"'))
    done = nncomp("inspect", "new.nncomp", cwd=tmp_path)
    assert done.returncode == 2 and "version 9" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_leaves_nothing(tmp_path, kill):
    torch.save({f"w{i}": torch.randn(1200, 1000) for i in range(40)}, tmp_path / "big.pt")
    run = subprocess.Popen([COMMAND, "compress", "big.pt", "-o", "big.nncomp", "--bits", "5"], cwd=tmp_path, stderr=subprocess.PIPE)
    for _ in range(600):
        if list(tmp_path.glob(".*.part")) or run.poll() is not None:
            break
        time.sleep(0.05)
    assert run.poll() is None, "finished before it could be interrupted"
    run.send_signal(kill)
    assert run.wait(60) == 130
    assert [p.name for p in tmp_path.iterdir()] == ["big.pt"]


def test_demo_prints_one_object_and_is_taken_up_again(tmp_path):
    (tmp_path / "whole").mkdir()
    done = nncomp("demo", "--json", cwd=tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    result, whole = json.loads(done.stdout), tmp_path / "whole" / "demo.nncomp"
    assert result["file"] == whole.name and result["file_bytes"] == whole.stat().st_size
    assert result["dense_bytes"] == 1_066_440 and result["ratio"] > 20
    assert result["file_error_percent"] < 10
    assert (whole.parent / result["report"]).read_text().count("<svg") == 3
    assert sorted(p.name for p in whole.parent.iterdir()) == ["demo.html", "demo.nncomp"]

    (tmp_path / "runs").mkdir()
    args = [COMMAND, "demo", "--json", "--folder", "runs", "-o", "cut.nncomp"]
    run = subprocess.Popen(args, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while run.poll() is None and not (tmp_path / "runs" / "dense-epochs.pt").exists():
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    error = run.communicate(timeout=60)[1]
    assert run.returncode == 130 and "run the same command again to go on" in error
    assert not list(tmp_path.glob("cut*")) and not list(tmp_path.glob(".*.part"))
    again = nncomp(*args[1:], cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "cut.nncomp").read_bytes() == whole.read_bytes()


def test_a_sharded_checkpoint_is_one_file(folder, tmp_path):
    assert nncomp("compress", folder / "one.safetensors.index.json", "-o", "a.nncomp", cwd=tmp_path).returncode == 0
    assert load(tmp_path / "a.nncomp").keys() == load_file(folder / "net.safetensors").keys()


def test_metadata_and_bytes_come_back(tmp_path):
    from nncomp.cli import compress_file, expand_file

    state = {
        "b.weight": torch.randn(3, 4),
        "a.half": torch.randn(5).half(),
        "empty": torch.zeros(0, 3),
        "n": torch.tensor(4),
        "ü": torch.tensor([True, False]),
    }
    for metadata in ({"format": "pt"}, {"note": "two \"words\" ✓"}):
        save_file(state, tmp_path / "a.safetensors", metadata=metadata)
        compress_file(tmp_path / "a.safetensors", tmp_path / "a.nncomp", force=True, progress=False)
        expand_file(tmp_path / "a.nncomp", tmp_path / "b.safetensors", force=True)
        assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    save(state, tmp_path / "c.nncomp", metadata={"safetensors": "[1]"})
    with pytest.raises(ValueError, match="metadata of the checkpoint is damaged"):
        expand_file(tmp_path / "c.nncomp", tmp_path / "c.safetensors")
    save({"__metadata__": torch.ones(2)}, tmp_path / "d.nncomp")
    with pytest.raises(ValueError, match="__metadata__"):
        expand_file(tmp_path / "d.nncomp", tmp_path / "d.safetensors")
    assert not list(tmp_path.glob(".*.part")) and not (tmp_path / "c.safetensors").exists()


def test_the_order_of_types_is_the_library_s(tmp_path):
    from safetensors.torch import _SIZE  # an older library writes fewer types

    from nncomp.cli import compress_file, expand_file
    from nncomp.container import _TORCH

    known = {tag: t for tag, t in _TORCH.items() if t in _SIZE}
    assert len(known) == len([t for t in _TORCH.values() if t]) or Version(safetensors.__version__) < Version("0.8")
    state = {tag: torch.arange(8, dtype=torch.uint8).view(t) for tag, t in known.items() if t != torch.bool}
    save_file(state | {"BOOL": torch.tensor([True])}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    compress_file(tmp_path / "a.safetensors", tmp_path / "a.nncomp", progress=False)
    expand_file(tmp_path / "a.nncomp", tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_shards_out_and_in(folder, tmp_path):
    from nncomp.cli import compress_file, expand_file, read_tensors

    done = nncomp("expand", folder / "net.nncomp", "-o", "net.safetensors", "--shard-size", "2KB", "--jobs", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    index = json.loads((tmp_path / "net.safetensors.index.json").read_text())
    before = load_file(folder / "net.safetensors")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in before.values())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"net-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)] and len(shards) > 2
    for shard in shards:
        state = load_file(tmp_path / shard)
        assert sum(t.nbytes for t in state.values()) <= 2000 or len(state) == 1
        assert all(index["weight_map"][name] == shard for name in state)
    after = dict(read_tensors(tmp_path / "net.safetensors.index.json"))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n].flatten().view(torch.uint8), t.flatten().view(torch.uint8)) for n, t in before.items())
    compress_file(tmp_path / "net.safetensors.index.json", tmp_path / "again.nncomp", progress=False)
    made = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="add --force"):
        expand_file(tmp_path / "again.nncomp", tmp_path / "net.safetensors", shard_size=2000)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == made
    expand_file(tmp_path / "again.nncomp", tmp_path / "net.safetensors", shard_size=2000, force=True)
    assert expand_file(tmp_path / "again.nncomp", tmp_path / "one.safetensors", shard_size=10**9)["files"] == ["one.safetensors"]


def test_jobs_and_coders(folder, tmp_path):
    from nncomp.cli import compress_file

    sizes = {}
    for coder in ("best", "huffman", "raw"):
        for jobs in (1, 2):
            done = compress_file(folder / "net.safetensors", tmp_path / f"{jobs}", coder=coder, n_jobs=jobs, force=True, progress=False)
            sizes[coder] = done["file_bytes"]
        assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert sizes["best"] <= sizes["huffman"] <= sizes["raw"]
    state = {k: v for k, v in load_file(folder / "net.safetensors").items() if k != "nan"}
    save_file(state, tmp_path / "in.safetensors")
    for jobs in (1, 2):
        compress_file(tmp_path / "in.safetensors", tmp_path / f"{jobs}", bits=3, sparsity=0.5, n_jobs=jobs, force=True, progress=False)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("2 GiB", 2 << 30), ("10m", 10**7), ("7", 7)])
def test_sizes_in_words(text, size):
    from nncomp.cli import _parse_bytes

    assert _parse_bytes(text) == size


def test_expand_wants_leave_for_a_bomb(tmp_path):
    save({"zeros": torch.zeros(5_000_000)}, tmp_path / "a.nncomp")
    assert nncomp("expand", "a.nncomp", "-o", "a.safetensors", cwd=tmp_path).returncode == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a.nncomp"]
    assert nncomp("expand", "a.nncomp", "-o", "a.safetensors", "--max-expansion", "1e6", cwd=tmp_path).returncode == 0


MEMORY = """
import ctypes, gc, json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from nncomp.cli import compress_file, expand_file
def status(key): return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
def peak(run):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    run()
    return status("VmHWM") - before
folder = Path(sys.argv[1])
torch.manual_seed(0)
save_file({f"w{i}": torch.randn(2000, 1000) for i in range(12)}, folder / "a.safetensors")
for turn in range(3):  # the first compiles all loops that the others need
    print(peak(lambda: compress_file(folder / "a.safetensors", folder / "a.nncomp", force=True, progress=False)))
    print(peak(lambda: expand_file(folder / "a.nncomp", folder / "b.safetensors", shard_size=40_000_000, force=True)))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")
def test_memory_is_that_of_two_tensors(tmp_path):
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}  # what is freed goes back at once: the peak is of what is held
    run = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, timeout=300, env=env)
    assert run.returncode == 0, run.stderr
    peaks = list(map(int, run.stdout.split()))  # twelve tensors of 8 MB
    compressing, expanding = min(peaks[2::2]), min(peaks[3::2])
    assert compressing <= 2 * 8_000_000 + 16_000_000 and expanding <= 2 * 8_000_000 + 16_000_000, (compressing, expanding)


def test_tied_tensors_are_stored_once(tmp_path):
    w = torch.randn(200, 100)
    torch.save({"embed": w, "out": w}, tmp_path / "tied.pt")
    torch.save({"embed": w}, tmp_path / "once.pt")
    for name in ("tied", "once"):
        assert nncomp("compress", f"{name}.pt", "-o", f"{name}.nncomp", cwd=tmp_path).returncode == 0
    assert (tmp_path / "tied.nncomp").stat().st_size < (tmp_path / "once.nncomp").stat().st_size + 60


def test_verify_reports_damage_as_a_row(tmp_path, monkeypatch):
    from nncomp.cli import verify
    from nncomp.results import results_root

    shutil.copytree(results_root(), tmp_path / "results")
    shutil.copytree(results_root().parent / "models", tmp_path / "models")
    for path in (tmp_path / "models").glob("*.nncomp"):
        path.write_bytes(path.read_bytes()[:-9])
    (tmp_path / "models" / "stray.nncomp").write_bytes(b"?")
    monkeypatch.setattr("nncomp.cli.load_data", lambda name, size: load_data("digits", size=size))
    rows = verify(root=tmp_path)
    assert len(rows) == len(list((tmp_path / "models").glob("*.nncomp"))) > 1
    assert not any(row["ok"] for row in rows) and all(row["problem"] for row in rows)
    (tmp_path / "models" / "stray.nncomp").unlink()
    with pytest.raises(ValueError, match="fashion"):
        verify("fashion", root=tmp_path)


def test_verify_the_shipped_files(mnist_root, monkeypatch):
    from nncomp.cli import verify
    from nncomp.results import models_root

    if not list(models_root().glob("*.nncomp")):
        pytest.fail("no shipped files")
    monkeypatch.setenv("NNCOMP_DATA", str(mnist_root))
    rows = verify("mnist")
    assert rows and all(row["ok"] for row in rows), rows


def test_a_program_that_calls_main_keeps_its_signal_handlers(tmp_path, capsys):
    save({"w": torch.ones(3)}, tmp_path / "a.nncomp")
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    from nncomp.cli import main

    for argv, code in ((["inspect", str(tmp_path / "a.nncomp")], 0), (["inspect", str(tmp_path / "none")], 2)):
        assert main(argv) == code
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_file_that_needs_trust_says_so(tmp_path):
    "Zeros shrink beyond what `expand` takes without being told; the number in the warning is enough."
    from nncomp.cli import compress_file, expand_file
    torch.save({"w": torch.zeros(3000, 3000)}, tmp_path / "zeros.pt")
    with pytest.warns(UserWarning, match="--max-expansion") as caught:
        compress_file(tmp_path / "zeros.pt", tmp_path / "zeros.nncomp", progress=False)
    needed = int(re.search(r"max_expansion=(\d+)", str(caught[0].message))[1])
    with pytest.raises(ValueError, match="max_expansion"):
        expand_file(tmp_path / "zeros.nncomp", tmp_path / "zeros.safetensors")
    expand_file(tmp_path / "zeros.nncomp", tmp_path / "zeros.safetensors", max_expansion=needed)


def test_a_source_that_is_replaced_while_it_is_expanded(tmp_path, monkeypatch):
    import nncomp.cli as cli
    source, out = tmp_path / "a.nncomp", tmp_path / "a.safetensors"
    save({"w": torch.randn(4, 5)}, source)
    real = cli.load_tensors

    def replacing(path, *args, **kwargs):
        save({"w": torch.randn(3, 2)}, path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(cli, "load_tensors", replacing)
    with pytest.raises(BitstreamError, match="was changed while it was read"):
        expand_file(source, out)
    assert not out.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["a.nncomp"]


def test_tied_tensors_expand_with_the_number_that_loads_them(tmp_path):
    w = torch.zeros(5_000_000)
    save({"a": w, "b": w}, tmp_path / "a.nncomp")
    size = (tmp_path / "a.nncomp").stat().st_size
    enough = (w.numel() * 4) / size
    load(tmp_path / "a.nncomp", max_expansion=enough)
    expand_file(tmp_path / "a.nncomp", tmp_path / "a.safetensors", max_expansion=enough)


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_shaping_leaves_the_message_to_saving(tmp_path, kind):
    odd = torch.eye(4).to_sparse() if kind == "sparse" else torch.empty(4, 4, device="meta")
    torch.save({"w": odd}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="must be dense and hold data"):
        compress_file(tmp_path / "a.pt", tmp_path / "a.nncomp", bits=2)


def test_letters_that_the_terminal_lacks(tmp_path):
    save({"层.weight": torch.zeros(3)}, tmp_path / "a.nncomp")
    for coding in ("ascii", "cp1252"):
        env = os.environ | {"PYTHONIOENCODING": coding, "PYTHONUTF8": "0"}
        for args in (["inspect", str(tmp_path / "a.nncomp")], ["compress", "--help"]):
            done = subprocess.run([sys.executable, "-m", "nncomp", *args], env=env, capture_output=True)
            assert done.returncode == 0 and done.stdout, done.stderr
