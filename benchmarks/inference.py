"""How fast compressed layers and shipped networks run on the processor, beside the dense ones, in one run, one thread.

    python benchmarks/inference.py [--repeats R] [--record]

Dense and compressed take turns (one call to warm up, then a millisecond of calls), and of each the median counts; ratios are dense
time over the other's, so that more than one is faster. Weights and inputs are random, non-zeros are scattered at random. Dense
convolutions, and dense networks with convolutions, run in both memory layouts, and the faster one counts. Four parts: linear layers by
density and number of inputs, with the codebook form once for each layer; convolutions of VGG-13; the shipped files dense, as `fastest`
makes them (`lightest` gives the bytes), and with their dead units removed; and what `F.linear` does with a sparse weight.
"""
import argparse
import copy
import os

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"                                          # before torch is loaded

import records  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from nncomp.container import load  # noqa: E402
from nncomp.core import named_weights  # noqa: E402
from nncomp.inference import CodebookLinear, SparseConv2d, SparseLinear, fastest, lightest, median_seconds, resident_bytes  # noqa: E402
from nncomp.measure import sparsity  # noqa: E402
from nncomp.models import create_model, model_input_shape  # noqa: E402
from nncomp.neurons import remove_dead_neurons  # noqa: E402

FILES = {"classic-lenet-300-100": "lenet-300-100", "smallest-lenet-300-100": "lenet-300-100",
         "classic-lenet-5": "lenet-5", "smallest-lenet-5": "lenet-5", "compressed-vgg13": "vgg13"}


def thin(layer, density, generator):
    "Leave exactly that fraction of the weights, at random places."
    with torch.no_grad():
        keep = torch.randperm(layer.weight.numel(), generator=generator)[:round(density * layer.weight.numel())]
        mask = torch.zeros(layer.weight.numel())
        mask[keep] = 1
        layer.weight *= mask.view_as(layer.weight)
    return layer


def linear(outputs, inputs, density, repeats, generator):
    "One row: the speed of the sparse form for 1, 16 and 256 inputs at once, and that of the codebook."
    layer = thin(nn.Linear(inputs, outputs), density, generator)
    sparse, row = SparseLinear(layer), {"part": "linear", "case": f"{outputs} × {inputs}", "density": density}
    for batch in (1, 16, 256):
        x = torch.randn(batch, inputs, generator=generator)
        dense, thinned = median_seconds([layer, sparse], x, repeats=repeats)
        row |= {f"dense_us_{batch}": 1e6 * dense, f"sparse_{batch}": dense / thinned}
    return row


def codebook(outputs, inputs, repeats, generator):
    "One row: the speed of sixteen values looked up."
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-8, 8, layer.weight.shape, generator=generator) / 100)
    looked_up, row = CodebookLinear(layer), {"part": "codebook", "case": f"{outputs} × {inputs}"}
    for batch in (1, 16, 256):
        x = torch.randn(batch, inputs, generator=generator)
        dense, other = median_seconds([layer, looked_up], x, repeats=repeats)
        row |= {f"codebook_{batch}": dense / other}
    return row


def convolution(inputs, outputs, size, density, repeats, generator):
    "One row: a 3 × 3 convolution on 1 and 32 images."
    layer = thin(nn.Conv2d(inputs, outputs, 3, padding=1), density, generator)
    last = nn.Conv2d(inputs, outputs, 3, padding=1).to(memory_format=torch.channels_last)
    last.load_state_dict(layer.state_dict())
    sparse, row = SparseConv2d(layer), {"part": "convolution", "case": f"{inputs} → {outputs}, {size} × {size}", "density": density}
    for images in (1, 32):
        x = torch.randn(images, inputs, size, size, generator=generator)
        other = x.contiguous(memory_format=torch.channels_last)
        first, second, thinned = median_seconds([layer, lambda _, other=other: last(other), sparse], x, repeats=repeats)
        row |= {f"dense_ms_{images}": 1e3 * min(first, second), f"sparse_{images}": min(first, second) / thinned}
    return row


def layouts(model):
    "A model in both memory layouts: as it is, and with the channel as the fastest axis."
    return model, copy.deepcopy(model).to(memory_format=torch.channels_last)


def network(file, name, repeats, generator):
    "One row: a shipped file dense, as `fastest` makes it, without its dead units, and in memory; None where the file is missing."
    path = records.ROOT / "models" / f"{file}.nncomp"
    if not path.is_file():
        print(f"{file} left out: no such file")
        return None
    model = load(path, into=create_model(name)).eval()
    smaller, row = remove_dead_neurons(model), {"part": "net", "case": file, "density": 1 - sparsity(named_weights(model).values())}
    for images in (1, 64):
        x = torch.randn(images, *model_input_shape(name), generator=generator)
        quick, choices = fastest(model, x)
        chosen, *others = median_seconds([quick, *layouts(model), *layouts(smaller)], x, repeats=repeats)
        dense, fewer = min(others[:2]), min(others[2:])
        row |= {f"dense_ms_{images}": 1e3 * dense, f"fastest_{images}": dense / chosen, f"smaller_{images}": dense / fewer,
                f"chosen_{images}": sum(c.form == "sparse" for c in choices)}
    return row | {"layers": len(choices), "dense_bytes": resident_bytes(model), "light_bytes": resident_bytes(lightest(model)[0])}


def way(batch, repeats, generator):
    "One row: the same sparse product through `F.linear`."
    sparse, x = SparseLinear(thin(nn.Linear(784, 300), 0.08, generator)), torch.randn(batch, 784, generator=generator)
    ours, theirs = median_seconds([lambda x: sparse.weight @ x.T, lambda x: F.linear(x, sparse.weight)], x, repeats=repeats)
    return {"part": "way", "case": "300 × 784, 8 %", "batch": batch, "ratio": theirs / ours}


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=51)
    parser.add_argument("--record", action="store_true", help="write results/benchmarks/inference.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator, rows = torch.Generator().manual_seed(0), []

    def add(row):
        if row is not None:
            rows.append(row)
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)

    for shape in ((300, 784), (2048, 2048)):
        for density in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5):
            add(linear(*shape, density, args.repeats, generator))
        add(codebook(*shape, args.repeats, generator))
    for shape in ((64, 64, 32), (256, 256, 8), (512, 512, 4)):
        for density in (0.01, 0.03, 0.1):
            add(convolution(*shape, density, args.repeats, generator))
    for file, name in FILES.items():
        add(network(file, name, args.repeats, generator))
    add(way(16, args.repeats, generator))
    if args.record:
        print(records.write("inference", rows, threads=1, repeats=args.repeats))


if __name__ == "__main__":
    main()
