"""What training shared values costs: one step of training with and without them, side by side in one run.

    python benchmarks/sharing.py [--repeats R] [--record]

LeNet-300-100 on 128 and on 32 images a step, LeNet-5 on 128, and VGG-13 on 8, dense and with 92 % zeros, 5 bits; the LeNets with Adam
and with SGD (momentum 0.9), VGG-13 with Adam. The plain step trains the weights themselves. The two take turns; each side's best time of
the turns is compared, in seconds of the process's own CPU time, to which other processes add little (the wall-clock ratio of the medians
is recorded too). One thread; steps that compile are not timed. There is no rival to install.
"""
import argparse
import copy
import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.nn import functional as F

from nncomp.core import named_weights, seed_everything
from nncomp.models import create_model, model_input_shape
from nncomp.pruning import apply_masks_, magnitude_mask
from nncomp.weight_sharing import share_weights

CASES = [("lenet-300-100", 128, "Adam"), ("lenet-300-100", 128, "SGD"), ("lenet-300-100", 32, "Adam"), ("lenet-300-100", 32, "SGD"),
         ("lenet-5", 128, "Adam"), ("lenet-5", 128, "SGD"), ("vgg13", 8, "Adam")]
OPTIMIZERS = {"Adam": lambda parameters: torch.optim.Adam(parameters, 1e-4),
              "SGD": lambda parameters: torch.optim.SGD(parameters, 1e-4, momentum=0.9)}


def stepper(model, x, y, optimizer):
    "A function that trains for one step."
    model.to(memory_format=torch.channels_last)
    optimizer = OPTIMIZERS[optimizer](model.parameters())

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return step


def compare(name, batch, optimizer, sparsity, repeats):
    "One row: milliseconds of both steps and their ratio."
    seed_everything(0)
    plain = create_model(name)
    apply_masks_(plain, {n: magnitude_mask(w, sparsity) for n, w in named_weights(plain).items()})
    shared = copy.deepcopy(plain)
    share_weights(shared, 5, trainable=True)
    x = torch.randn(batch, *model_input_shape(name)).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (batch,))
    steps = {"plain": stepper(plain, x, y, optimizer), "shared": stepper(shared, x, y, optimizer)}
    cpu, wall = {n: [] for n in steps}, {n: [] for n in steps}
    for turn in range(repeats + 2):
        for n, step in steps.items():
            start = time.perf_counter(), time.process_time()
            step()
            if turn >= 2:
                wall[n].append(time.perf_counter() - start[0])
                cpu[n].append(time.process_time() - start[1])
    best = {n: 1e3 * min(times) for n, times in cpu.items()}
    return {"net": name, "images": batch, "optimizer": optimizer, "sparsity": sparsity,
            "plain_ms": best["plain"], "shared_ms": best["shared"], "ratio": best["shared"] / best["plain"],
            "wall_ratio": statistics.median(wall["shared"]) / statistics.median(wall["plain"])}


def main():
    import records
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--record", action="store_true", help="write results/benchmarks/sharing.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, batch, optimizer in CASES:
        for sparsity in (0., 0.92):
            rows.append(compare(name, batch, optimizer, sparsity, args.repeats if name.startswith("lenet") else max(args.repeats // 2, 3)))
            r = rows[-1]
            print(f"{name:14s} {batch:3d} {optimizer:4s} {sparsity:.0%} zeros  plain {r['plain_ms']:7.2f} ms  "
                  f"shared {r['shared_ms']:7.2f} ms  ratio {r['ratio']:.3f} (wall {r['wall_ratio']:.3f})", flush=True)
    if args.record:
        print(records.write("sharing", rows, repeats=args.repeats, bits=5, statistic="best of the turns, CPU time"))


if __name__ == "__main__":
    main()
