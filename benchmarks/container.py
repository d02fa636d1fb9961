"""The file: dense checkpoints beside ZipNN, zip and zstd; speed and memory of reading beside a dense copy; many tensors.

    python -m venv "${TMPDIR:-/tmp}/bench-container" && "${TMPDIR:-/tmp}/bench-container/bin/pip" install zipnn
    python benchmarks/container.py [--weights N] [--repeats R] [--part PART ...] [--record]

Part "dense": unpruned weights, in float32 and in bfloat16, written by every program without loss. Two checkpoints: a LeNet-300-100
and a LeNet-5 trained here on the built-in digits for a few epochs, and six layers of 1024 x 1024 Gaussian weights whose rows have
scales of their own. Ours is the whole file of `save`; zip (deflate, level 9) and zstd (level 19) get the whole safetensors file;
ZipNN gets the bytes of the tensors, once tensor by tensor and once in one piece, and the smaller total counts.

Part "read": one tensor of N weights, 90 % zeros and 32 values, float32; millions of weights a second on one thread: a copy of the dense
array, `unpack_tensor` of what `coder="huffman"` and `coder="best"` wrote. The calls take turns, the best time of each counts.

Part "memory": growth of the peak memory of a process of its own while `load` reads one tensor of ten million weights, dense or 90 %
zeros, minus the tensor and minus the file (megabytes of 10^6 bytes; Linux only).

Part "many": a file of 200 matrices of 256 x 256, of which one is read: milliseconds, and bytes taken from the file; and 20,000 tensors
of 1 to 59 entries of several kinds: seconds to save and to load them all.
"""
import argparse
import io
import itertools
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np

SIZES = """
import json, sys, warnings
import numpy as np
warnings.simplefilter("ignore")
from zipnn import ZipNN
names = {"float32": "float32", "bfloat16": "bfloat16"}
for line in sys.stdin:
    dtype, paths = json.loads(line)
    parts = [open(path, "rb").read() for path in paths]
    def size(data):
        coder = ZipNN(input_format="byte", bytearray_dtype=names[dtype])
        packed = bytes(coder.compress(bytearray(data)))
        assert bytes(ZipNN(input_format="byte", bytearray_dtype=names[dtype]).decompress(packed)) == data
        return len(packed)
    print(json.dumps(min(sum(map(size, parts)), size(b"".join(parts)))), flush=True)
"""


def checkpoints():
    "Name -> state dict of float32 tensors."
    import torch

    from nncomp.core import seed_everything
    from nncomp.data import load_data
    from nncomp.models import create_model
    from nncomp.training import fit

    state = {}
    for net, epochs in (("lenet-300-100", 12), ("lenet-5", 4)):
        seed_everything(0)
        model = create_model(net)
        fit(model, load_data("digits"), epochs=epochs, batch_size=64, device="cpu", progress=False)
        state |= {f"{net}.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    yield "trained LeNets", state
    g = torch.Generator().manual_seed(0)
    scale = lambda: torch.exp(0.4 * torch.randn(1024, 1, generator=g))  # noqa: E731
    yield "Gaussian, 6 layers", {f"{i}.weight": 0.03 * scale() * torch.randn(1024, 1024, generator=g) for i in range(6)}


def zipped(data):
    "Bytes of a zip archive (deflate) of one file."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("model.safetensors", data)
    return len(buffer.getvalue())


def dense(python):
    "Rows of bytes for each checkpoint and type."
    import torch
    import zstandard
    from safetensors.torch import save

    from nncomp import container

    rival = subprocess.Popen([python, "-c", SIZES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) if python else None
    with tempfile.TemporaryDirectory() as folder:
        for name, state in checkpoints():
            for dtype in (torch.float32, torch.bfloat16):
                typed, word, file = {n: t.to(dtype) for n, t in state.items()}, str(dtype).removeprefix("torch."), Path(folder) / "x"
                container.save(typed, file)
                row = dict(part="dense", case=name, dtype=word, nncomp=file.stat().st_size)
                assert all(torch.equal(t, typed[n]) for n, t in container.load(file).items())
                paths = []
                for i, tensor in enumerate(typed.values()):
                    paths.append(str(Path(folder) / f"{i}.bytes"))
                    Path(paths[-1]).write_bytes(container.bit_patterns(tensor).tobytes())
                if rival:
                    rival.stdin.write(json.dumps([word, paths]) + "\n")
                    rival.stdin.flush()
                    row["zipnn"] = json.loads(rival.stdout.readline())
                data = save(typed)
                zstd = len(zstandard.ZstdCompressor(level=19).compress(data))
                yield row | dict(zipnn=row.get("zipnn"), raw=len(data), zip=zipped(data), zstd=zstd)
    if rival:
        rival.stdin.close()
        rival.wait()


def sparse(n):
    "(rows, 1000) float32, 90 % zeros, 31 other values."
    import torch

    rng, out = np.random.default_rng(0), np.zeros((n // 1000, 1000), np.float32)
    levels = np.linspace(-1, 1, 32).astype(np.float32)
    for part in np.array_split(out, max(n // 10_000_000, 1)):
        chosen = np.clip(np.rint(rng.standard_normal(part.shape, np.float32) * 5 + 15.5), 0, 31).astype(np.uint8)
        part[:] = np.where(rng.random(part.shape, np.float32) < 0.1, levels[chosen], 0)
    return torch.from_numpy(out)


def read(n, repeats):
    "Millions of weights a second, and bytes."
    from nncomp.container import pack_tensor, unpack_tensor

    weights = sparse(n)
    packed = {coder: pack_tensor("w", weights, coder) for coder in ("huffman", "best")}
    array, options = weights.numpy(), dict(max_bytes=2 * weights.nbytes)
    calls = {"dense copy": array.copy} | {coder: (lambda data=data: unpack_tensor("w", data, **options)) for coder, data in packed.items()}
    times = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            if name == "best" and turn > 2:
                continue
            start = time.perf_counter()
            result = call()
            taken = time.perf_counter() - start
            assert np.array_equal(np.asarray(result), array) or turn
            del result
            times[name] += [taken] if turn else []
    best = {name: min(taken) for name, taken in times.items()}
    for name, seconds in best.items():
        size = len(packed[name]) if name in packed else array.nbytes
        yield dict(part="read", case=name, weights=n, bytes=size, rate=array.size / seconds / 1e6, ratio=best["dense copy"] / seconds)


MEMORY = """
import ctypes, gc, json, os, sys
import torch
from nncomp.container import load, save
path, dtype, kind, coder = sys.argv[1:]
def status(key): return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
def make(rows):
    w = 0.05 * torch.randn(rows, 1000, generator=torch.Generator().manual_seed(0))
    if kind == "sparse": w = ((w * 100).round_() / 100).masked_fill_(w.abs() < 0.0822, 0).add_(0.0)
    return w.to(getattr(torch, dtype))
torch.set_num_threads(1)
for rows in (10_000, 10_000):                   # compiled loops are loaded before anything is measured
    w = make(rows)
    out = w.nbytes
    save({"w": w}, path, coder=coder)
    del w
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    result = load(path)
    peak = status("VmHWM") - before
    del result
file = os.path.getsize(path)
print(json.dumps(dict(output=out / 1e6, file=file / 1e6, beyond=(peak - out - file) / 1e6)))
"""


def memory():
    "Megabytes of the output and the file, and what reading took beyond them."
    if not Path("/proc/self/clear_refs").exists():
        print("the part on memory is left out: it needs Linux")
        return
    with tempfile.TemporaryDirectory() as folder:
        for dtype, kind, coder in itertools.product(("float32", "bfloat16"), ("dense", "sparse"), ("best", "huffman")):
            if (kind, coder) == ("dense", "huffman"):
                continue
            command = [sys.executable, "-c", MEMORY, str(Path(folder) / "x"), dtype, kind, coder]
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            yield dict(part="memory", case=kind, dtype=dtype, coder=coder) | json.loads(found)


def tiny(count):
    "Many tensors of 1 to 59 entries: dense, few values, bfloat16, one integer, mostly zeros."
    import torch

    rng = np.random.default_rng(1)
    for i in range(count):
        x = torch.from_numpy(rng.standard_normal(int(rng.integers(1, 60))).astype(np.float32))
        yield f"layer{i}.bias", (x, (x * 2).round() + 0.0, x.bfloat16(), torch.tensor(i), x.masked_fill(x < 0.8, 0))[i % 5]


def bytes_read():
    "Bytes that this process has asked the system for; None where that is not known."
    path = Path("/proc/self/io")
    return int(path.read_text().split()[1]) if path.exists() else None


def many(repeats):
    "One tensor out of many, and very many tiny ones."
    import torch

    from nncomp.container import load, load_tensor, save

    g = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        save({f"layer{i}": torch.randn(256, 256, generator=g) for i in range(200)}, path, coder="huffman")
        whole, one = [], []
        for _ in range(repeats):
            for times, call in ((whole, lambda: load(path)), (one, lambda: load_tensor(path, "layer77"))):
                before, start = bytes_read(), time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
        taken = None if before is None else bytes_read() - before
        size = path.stat().st_size
        yield dict(part="one", case="one of 200 matrices", bytes=size, read=taken, ms=1000 * min(one), ms_whole=1000 * min(whole))
        state = dict(tiny(20_000))
        for coder in ("best", "huffman"):
            save(dict(list(state.items())[:100]), path, coder=coder)
            start = time.perf_counter()
            save(state, path, coder=coder)
            saved = time.perf_counter()
            back = load(path)
            loaded = time.perf_counter()
            assert all(torch.equal(tensor, state[name]) for name, tensor in back.items()) and len(back) == len(state)
            row = dict(case="20,000 tiny tensors", coder=coder, bytes=path.stat().st_size)
            yield dict(part="tiny", **row, save_s=saved - start, load_s=loaded - saved)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=int, default=40_000_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--part", nargs="+", choices=("dense", "read", "memory", "many"), help="only these; not for a record")
    parser.add_argument("--record", action="store_true", help="write results/benchmarks/container.json")
    args = parser.parse_args()
    import records
    import torch

    torch.set_num_threads(1)
    python = records.rival_python("container")
    if python is None:
        print("ZipNN is left out: there is no environment bench-container (see the top of this file)")
    if args.record and args.part:
        parser.error("a record holds all parts")
    calls = dict(
        dense=lambda: dense(python), read=lambda: read(args.weights, args.repeats), memory=memory, many=lambda: many(args.repeats)
    )
    rows = []
    for row in itertools.chain.from_iterable(call() for part, call in calls.items() if part in (args.part or calls)):
        rows.append(row)
        print(", ".join(f"{key} {value:,.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()), flush=True)
    if args.record:
        version = [str(python), "-c", "from importlib.metadata import version; print(version('zipnn'))"]
        rival = {"zipnn": subprocess.run(version, capture_output=True, text=True, check=True).stdout.strip()} if python else {}
        records.write("container", rows, packages=["zstandard", "safetensors"], versions=rival, threads=1, repeats=args.repeats)


if __name__ == "__main__":
    sys.exit(main())
