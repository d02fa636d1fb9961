"""Models that nobody trained here: a ResNet-18, a MobileNetV2 and a transformer block beside zip, zstd and ZipNN.

    python benchmarks/checkpoints.py [--model NAME ...] [--record]

ZipNN runs in the environment `bench-container` (see the top of container.py).

The first two are torchvision's, the block is `torch.nn.TransformerEncoderLayer` with 512 inputs, 8 heads and 2048 hidden units; all have
the random weights of seed 0, so nothing is downloaded. Sizes and round trips need no more; what an accuracy would be, they cannot say.

Part "lossless": the state dict in float32 and in bfloat16, written by every program without loss. Part "shared": the same model after
`share_weights` with 5 bits, without data, training or pruning; `error` is the squared error of the shared tensors over their squared
length. Ours is the whole file of `save`, read back and compared bit for bit; zip (deflate, level 9) and zstd (level 19) get the whole
safetensors file; ZipNN gets the bytes of the tensors, once tensor by tensor and once in one piece, and the smaller total counts.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

BITS = 5
MODELS = ("resnet18", "mobilenet_v2", "transformer block")


def build(name):
    "A model with the random weights of seed 0."
    import torch
    import torchvision

    from nncomp.core import seed_everything

    seed_everything(0)
    if name == "transformer block":
        return torch.nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
    return getattr(torchvision.models, name)(weights=None)


def shared(model):
    "A copy with at most 2**BITS values a tensor, and the squared error over the squared length of the tensors that were shared."
    import copy

    import torch

    from nncomp.core import named_weights
    from nncomp.weight_sharing import share_weights

    after = copy.deepcopy(model)
    share_weights(after, BITS)
    before, after_weights = named_weights(model), named_weights(after)
    with torch.no_grad():
        lost = sum(float((after_weights[n].double() - w.double()).square().sum()) for n, w in before.items())
        return after, lost / sum(float(w.double().square().sum()) for w in before.values())


def zipnn_bytes(rival, tensors, word, folder):
    "Bytes that ZipNN needs for the tensors, by the process `rival`; None where there is none."
    if rival is None:
        return None
    from nncomp.container import bit_patterns

    paths = []
    for i, tensor in enumerate(tensors):
        paths.append(str(folder / f"{i}.bytes"))
        Path(paths[-1]).write_bytes(bit_patterns(tensor).tobytes())
    rival.stdin.write(json.dumps([word, paths]) + "\n")
    rival.stdin.flush()
    return json.loads(rival.stdout.readline())


def sizes(model, word, rival, folder):
    "Bytes of a model's state dict in a type, by every program; our file is read back and compared."
    import torch
    import zstandard
    from container import zipped
    from safetensors.torch import save as safetensors_bytes

    from nncomp import container

    state = {n: t.detach().to(getattr(torch, word) if t.is_floating_point() else t.dtype) for n, t in model.state_dict().items()}
    container.save(state, folder / "x.nncomp")
    back = container.load(folder / "x.nncomp")
    if back.keys() != state.keys() or not all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in state.items()):
        raise RuntimeError("the file does not give back what was saved")
    data = safetensors_bytes({n: t.contiguous() for n, t in state.items()})
    found = dict(raw=len(data), nncomp=(folder / "x.nncomp").stat().st_size, zipnn=zipnn_bytes(rival, state.values(), word, folder))
    return found | dict(zip=zipped(data), zstd=len(zstandard.ZstdCompressor(level=19).compress(data)))


def measure(names, rival):
    "Rows for each model, type and part."
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            model = build(name)
            after, error = shared(model)
            for part, net in (("lossless", model), ("shared", after)):
                for word in ("float32", "bfloat16"):
                    row = dict(part=part, case=name, dtype=word, parameters=sum(p.numel() for p in model.parameters()))
                    yield row | dict(error=error if part == "shared" else None) | sizes(net, word, rival, Path(folder))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, help="only these; not for a record")
    parser.add_argument("--record", action="store_true", help="write results/benchmarks/checkpoints.json")
    args = parser.parse_args()
    if args.record and args.model:
        parser.error("a record holds all models")
    import records
    import torch
    from container import SIZES

    torch.set_num_threads(1)
    python = records.rival_python("container")
    if python is None:
        print("ZipNN is left out: there is no environment bench-container (see the top of container.py)")
    rival = subprocess.Popen([python, "-c", SIZES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) if python else None
    rows = []
    for row in measure(args.model or MODELS, rival):
        rows.append(row)
        print(", ".join(f"{key} {value:,.6f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()), flush=True)
    if rival:
        rival.stdin.close()
        rival.wait()
    if args.record:
        version = [str(python), "-c", "from importlib.metadata import version; print(version('zipnn'))"]
        versions = {"zipnn": subprocess.run(version, capture_output=True, text=True, check=True).stdout.strip()} if python else {}
        records.write("checkpoints", rows, packages=["torchvision", "zstandard", "safetensors"], versions=versions, threads=1, bits=BITS)


if __name__ == "__main__":
    sys.exit(main())
