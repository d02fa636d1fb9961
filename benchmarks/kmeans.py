"""One-dimensional k-means against ckwrap, kmeans1d and scikit-learn, side by side in one run, one thread.

    python -m venv "${TMPDIR:-/tmp}/bench-kmeans" && "${TMPDIR:-/tmp}/bench-kmeans/bin/pip" install ckwrap kmeans1d scikit-learn
    python benchmarks/kmeans.py [--scale S] [--repeats R] [--record]

The values are normal, pushed away from zero as in a pruned layer, in float32. Each call starts from unsorted values and ends with the
assignments in their order; scikit-learn runs with its defaults and once more to the end (tol=0). Nothing is timed before a first small
call (which compiles). Two clocks run: wall time, and the CPU time of the process that makes the call, to which other processes on the
machine add little (recorded as `..._cpu`; ratios of both). Of each, our time is the best of the repeats, which stand before and after
the rivals' turns; a rival that takes more than ten seconds has one turn. All inertias are computed alike: the partition that each
returned, about its own means, in float64.

Memory is the growth of the peak resident set of a process of its own (Linux, VmHWM after a reset, less VmRSS before the call): all
that the call allocates and what it returns, without the input, the imports and the compiled code. `--scale 0.1` is a trial run.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"                                          # before NumPy and its BLAS are loaded, and for the children

import numpy as np  # noqa: E402
import records  # noqa: E402
import torch  # noqa: E402

from nncomp.kmeans import inertia, kmeans_1d  # noqa: E402

RIVAL = """
import sys, time
import numpy as np
name, folder, k = sys.argv[1], sys.argv[2], int(sys.argv[3])
x = np.load(folder + "/x.npy")
wide = x.astype(np.float64)
if name == "ckwrap":
    import ckwrap
    call = lambda x: ckwrap.ckmeans(x, k).labels
elif name == "kmeans1d":
    import kmeans1d
    call = lambda x: kmeans1d.cluster(x, k).clusters
else:
    from sklearn.cluster import KMeans
    grid = np.linspace(x.min(), x.max(), k)[:, None]
    options = dict(tol=0, max_iter=10_000) if name.endswith("tol=0") else {}
    call, wide = lambda x: KMeans(k, init=grid, n_init=1, **options).fit(x[:, None]).labels_, x
call(wide[:8 * k])
start, cpu = time.perf_counter(), time.process_time()
labels = call(wide)
print(time.perf_counter() - start, time.process_time() - cpu)
np.save(folder + "/labels.npy", np.asarray(labels, np.int32))
"""

MEMORY = """
import json, sys, time
import torch
torch.set_num_threads(1)
from kmeans import weights
from nncomp.kmeans import kmeans_1d
def status(key): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1e6 * 1024
n, k = int(sys.argv[1]), int(sys.argv[2])
kmeans_1d(weights(5000), 16)
x = weights(n)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
start = time.perf_counter()
found = kmeans_1d(x, k)
print(json.dumps([time.perf_counter() - start, status("VmHWM") - before]))
"""


def weights(n, seed=0):
    "Values like those of a pruned layer, (n,) float32."
    x = np.random.default_rng(seed).normal(size=n) * 0.05
    return (x + np.copysign(0.02, x)).astype(np.float32)


def kinds(n):
    "The inputs on which the optimum is compared, (n,) float64 each."
    rng = np.random.default_rng(0)
    yield "random", rng.normal(size=n)
    yield "tied", rng.integers(-200, 200, n) / 64
    yield "constant", np.full(n, 0.3)
    yield "two values", rng.choice([-0.7, 0.1], n)
    yield "heavy-tailed", rng.standard_cauchy(n)
    yield "ascending", np.sort(rng.normal(size=n))
    yield "two narrow peaks", np.sign(rng.normal(size=n)) + 1e-3 * rng.normal(size=n)


def partition_inertia(x, labels):
    "Inertia of a partition about its own means, whatever the numbers of its clusters, in float64."
    x, (_, labels) = np.asarray(torch.as_tensor(x).double()), np.unique(labels, return_inverse=True)
    means = np.bincount(labels, x) / np.bincount(labels)
    means += np.bincount(labels, x - means[labels]) / np.bincount(labels)
    return inertia(x, means, labels)


def rival(name, x, k):
    "Seconds by the clock and of CPU time, and labels, of a rival's call in its own environment; (None, None) where it is missing."
    python = records.rival_python("kmeans")
    if python is None:
        return None, None
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/x.npy", x)
        done = subprocess.run([python, "-c", RIVAL, name, folder, str(k)], capture_output=True, text=True)
        if done.returncode:
            print(f"{name} left out: {done.stderr.strip().splitlines()[-1]}")
            return None, None
        return tuple(map(float, done.stdout.split())), np.load(f"{folder}/labels.npy")


def ours(x, k, repeats, **options):
    "Seconds by the clock and of CPU time of some calls, and the assignments."
    times = []
    for _ in range(repeats):
        start, cpu = time.perf_counter(), time.process_time()
        found = kmeans_1d(x, k, **options)[1]
        times.append((time.perf_counter() - start, time.process_time() - cpu))
    return times, found


def race(case, x, k, names, repeats, **options):
    "One row: our times and each rival's on the same values, and the inertias."
    kmeans_1d(x[:1000], 16, **options)
    mine, found = ours(x, k, repeats, **options)
    cost = partition_inertia(x, found)
    row = {"part": "speed", "case": case, "n": len(x), "k": k, "inertia": cost}
    for name in names:
        times, turn = [], 0
        while turn < repeats and (turn == 0 or times[-1][0] < 10):
            taken, labels = rival(name, x, k)
            if taken is None:
                break
            times.append(taken)
            mine += ours(x, k, 1, **options)[0]
            turn += 1
        if times:
            wall, cpu = map(min, zip(*times))
            row |= {name: wall, f"{name}_cpu": cpu, f"{name}_inertia": partition_inertia(x, labels) / cost}
    row["seconds"], row["cpu_seconds"] = map(min, zip(*mine))
    for name in names:
        if name in row:
            row |= {f"{name}_ratio": row[name] / row["seconds"], f"{name}_cpu_ratio": row[f"{name}_cpu"] / row["cpu_seconds"]}
    return row


def memory(n, k):
    "One row: seconds and memory of the optimum in a process of its own; MB are None where the system does not tell."
    row = {"part": "memory", "case": "optimum", "n": n, "k": k, "input_megabytes": 4 * n / 1e6, "seconds": None, "megabytes": None}
    if Path("/proc/self/clear_refs").exists():
        path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        done = subprocess.run([sys.executable, "-c", MEMORY, str(n), str(k)], stdout=subprocess.PIPE, text=True, check=True,
                              env=os.environ | {"PYTHONPATH": path})
        row["seconds"], row["megabytes"] = json.loads(done.stdout)
    return row


def exactness(n, k):
    "One row per kind of input: how far our inertia is from that of kmeans1d, relative."
    for kind, x in kinds(n):
        cost = partition_inertia(x, kmeans_1d(x, k)[1])
        many = min(k, len(np.unique(x)))
        labels = rival("kmeans1d", x, many)[1]
        theirs = None if labels is None else partition_inertia(x, labels)
        gap = None if theirs is None else (cost - theirs) / theirs if theirs else cost
        yield {"part": "exact", "case": kind, "n": n, "k": many, "inertia": cost, "difference": gap}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the values, for a trial run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="write results/benchmarks/kmeans.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    million, rows = int(1e6 * args.scale), []
    if records.rival_python("kmeans") is None:
        print("ckwrap, kmeans1d and scikit-learn left out: the environment bench-kmeans is missing (see the first lines of this file)")

    def add(row):
        rows.append(row)
        print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()), flush=True)

    x = weights(million)
    add(race("Lloyd, linear start", x, 32, ["scikit-learn", "scikit-learn, tol=0"], args.repeats, init="linear"))
    add(race("optimum", x, 32, ["ckwrap", "kmeans1d"], args.repeats))
    add(race("optimum", x, 256, ["ckwrap"], args.repeats))
    add(race("k-means++ and Lloyd", x, 256, [], args.repeats, init="k-means++"))
    ten = weights(10 * million)
    add(race("optimum", ten, 256, [], args.repeats))
    add(race("optimum, bfloat16", torch.from_numpy(ten).bfloat16(), 256, [], args.repeats))
    for k in (2, 4, 32, 256):
        add(memory(10 * million, k))
    for row in exactness(int(20_000 * args.scale), 60):
        add(row)
    if args.record:
        python = records.rival_python("kmeans")
        code = "from importlib.metadata import version; print(*map(version, ('ckwrap', 'kmeans1d', 'scikit-learn')))"
        listed = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split() if python else []
        records.write("kmeans", rows, versions=dict(zip(("ckwrap", "kmeans1d", "scikit-learn"), listed)), threads=1, repeats=args.repeats,
                      scale=args.scale)


if __name__ == "__main__":
    main()
