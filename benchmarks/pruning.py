"""What holding masks costs: a training step with `MaskCallback`, and one with `Pruner`, against the plain step, in one run.

    python benchmarks/pruning.py [--repeats R] [--record]

LeNet-300-100 and Caffe's LeNet-5 on random 28 x 28 images in batches of 128, MiniVGG and VGG-13 on random 32 x 32 images in batches
of 32; Adam; one thread; 90 % of each layer pruned. The three kinds of step take turns, so that a busy moment of the machine hits all
of them, and the ratio of the medians is shown. A step is what `fit` does: forward, backward, callbacks, optimizer. The row "gradual"
recomputes the masks over all layers every 50 steps, as `Pruner` does while sparsity grows; its cost is given per step.
"""
import argparse
import copy
import statistics
import time

import records
import torch
from torch import nn

from nncomp.core import named_weights, seed_everything
from nncomp.data import Data, Split
from nncomp.models import create_model, model_input_shape
from nncomp.pruning import MaskCallback, magnitude_mask
from nncomp.schedules import grow_masks
from nncomp.training import Run

CASES = {"lenet-300-100": 128, "lenet-5": 128, "minivgg": 32, "vgg13": 32}


class Stepper:
    "One network with its optimizer and callbacks; `step` trains it on a fixed batch."
    def __init__(self, model, batch, callbacks):
        self.model, self.batch, self.callbacks = copy.deepcopy(model), batch, callbacks
        split = Split(*batch)
        optimizer = torch.optim.Adam(self.model.parameters(), 1e-4)
        self.run = Run(self.model, optimizer, Data("random", split, split, split, 10), torch.device("cpu"), 1, 10**9)
        for callback in callbacks:
            callback.before_fit(self.run)

    def step(self):
        x, y = self.batch
        loss = nn.functional.cross_entropy(self.model(x), y)
        self.run.optimizer.zero_grad()
        loss.backward()
        for callback in self.callbacks:
            callback.after_backward(self.run)
        self.run.optimizer.step()
        self.run.step += 1
        for callback in self.callbacks:
            callback.after_step(self.run)


def seconds(calls, repeats):
    "Median seconds of each call, the calls taking turns."
    times = [[] for _ in calls]
    for _ in range(repeats):
        for call, taken in zip(calls, times):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def compare(name, batch_size, repeats):
    "One row: milliseconds of a plain step, and what masks add to it."
    seed_everything(0)
    model = create_model(name)
    batch = torch.randn(batch_size, *model_input_shape(name)), torch.randint(0, 10, (batch_size,))
    masks = {n: magnitude_mask(w, 0.9) for n, w in named_weights(model).items()}
    plain, masked = Stepper(model, batch, []), Stepper(model, batch, [MaskCallback(masks)])
    for stepper in (plain, masked):
        for _ in range(3):
            stepper.step()
    before, after, update = seconds([plain.step, masked.step, lambda: grow_masks(masked.model, 0.95, masks, scope="global")], repeats)
    for n, mask in masks.items():
        if not (masked.model.get_parameter(n)[~mask] == 0).all():
            raise AssertionError(f"{n}: a pruned weight has come back")
    weights = sum(w.numel() for w in named_weights(model).values())
    return {"case": name, "weights": weights, "batch": batch_size, "plain_ms": 1000 * before, "masked_ms": 1000 * after,
            "ratio": after / before, "gradual_ratio": (after + update / 50) / before}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=30, help="steps of each kind for the small networks; a third of it for the VGGs")
    parser.add_argument("--record", action="store_true", help="write results/benchmarks/pruning.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, batch_size in CASES.items():
        rows.append(compare(name, batch_size, args.repeats if name.startswith("lenet") else max(args.repeats // 3, 3)))
        print("{case:14s} {weights:>9,} weights  plain {plain_ms:8.2f} ms  masked {masked_ms:8.2f} ms  ratio {ratio:.3f}"
              "  gradual {gradual_ratio:.3f}".format(**rows[-1]), flush=True)
    if args.record:
        records.write("pruning", rows, threads=1, repeats=args.repeats)


if __name__ == "__main__":
    main()
