"""Bytes and speeds of the same quantized tensors: our coders, NNCodec, Han's format, zstd and xz, side by side in one run.

    python -m venv "${TMPDIR:-/tmp}/bench-sizes"
    "${TMPDIR:-/tmp}/bench-sizes/bin/pip" install "numpy<2" nncodec
    NNCOMP_DATA=.data python benchmarks/sizes.py [--repeats R] [--symbols N] [--record]

Real tensors: a LeNet-300-100 and a LeNet-5, trained on MNIST for a few epochs, pruned by magnitude over all layers, retrained, and
each layer's weights shared by k-means with an entry for zero. They are made once (some minutes; one thread, fixed seeds) and kept in
`bench` below the data folder. Structureless tensors: Gaussian numbers rounded to 16 and 256 values, and 90 % zeros among 32 values.

What is counted is the stream of indices, layer by layer; no coder is charged for codebooks, names and shapes. "entropy" is n·H/8 of each
layer with no table. zstd (level 19) and xz (level 9, extreme, raw: no header) get one byte an index. Han's format is the Huffman-coded gaps
of 5 or 8 bits plus the Huffman-coded values, fillers among them.

NNCodec (DeepCABAC, ISO/IEC 15938-17) needs NumPy below 2 and so an environment of its own: the script starts itself there and talks to
it line by line, so that the timed calls take turns. It is called where it is cheapest: the arithmetic coder alone, on the indices less
that of zero, with its optimisation of the context parameters, and with the least bytes over scan orders, profiles, unary lengths and row
skipping; its headers (30 to 60 bytes a tensor) and the choice itself are not counted. Its temporal contexts and its history of
significances need an earlier version of the tensor, and there is none. Times are the best of the repeats at that setting.
"""
import argparse
import copy
import hashlib
import itertools
import json
import lzma
import subprocess
import sys
import time
from functools import partial

import numpy as np

NETS = {"lenet-300-100": (4, 2, ((0.92, 32), (0.97, 16), (0.98, 8), (0.985, 16))), "lenet-5": (2, 1, ((0.92, 32), (0.98, 16)))}
UNARY = (1, 2, 3, 4, 6, 8, 10, 16, 31, 63)
SETTING = ("scan", "profile", "unary", "optimise", "skip")


# NNCodec's side, run by the interpreter that has it: one JSON line in, one out

def _nncodec_server():
    from nncodec.extensions import deepCABAC

    off = [deepCABAC.HdspMode.AlwaysOff, np.zeros(2, np.int8)]

    def encode(levels, codebook, scan, profile, unary, optimise, skip):
        coder = deepCABAC.Encoder()
        coder.initCtxModels(unary, optimise)
        empty = (~levels.reshape(len(levels), -1).any(1)).astype(np.int32)
        coder.encodeLayer(levels, 0, scan, profile, 0, skip, empty, *off, *(codebook if profile else (0, 0)))
        return coder.finish()

    def decode(data, shape, codebook, scan, profile, unary, *_):
        coder, out = deepCABAC.Decoder(), np.zeros(shape, np.int32)
        coder.setStream(data)
        coder.initCtxModels(unary)
        call = coder.decodeLayerAndCreateEPs if scan else coder.decodeLayer
        call(out, 0, scan, profile, 0, *off, *(codebook if profile else (0, 0)))
        return out

    for line in sys.stdin:
        ask = json.loads(line)
        levels, codebook = np.load(ask["path"]).astype(np.int32) - ask["zero"], (ask["k"], ask["zero"])
        settings = [ask["setting"]]
        if ask["setting"] is None:                                # the search
            tried = itertools.product(ask["scans"], (0, 1), UNARY, (0, 1), (0, 1))
            settings = sorted((s for s in tried if s[1] or not s[4]), key=lambda s: encode(levels, codebook, *s).size)
        for setting in settings:
            start = time.perf_counter()
            data = encode(levels, codebook, *setting)
            middle = time.perf_counter()
            back = decode(data, levels.shape, codebook, *setting)
            end = time.perf_counter()
            if np.array_equal(back, levels):
                break
        else:
            raise AssertionError(f"NNCodec did not bring back {ask['path']}")
        print(json.dumps({"bytes": int(data.size), "setting": setting, "encode": middle - start, "decode": end - middle}), flush=True)


class Rival:
    "NNCodec in its own environment, asked about one tensor at a time."

    def __init__(self, python, folder):
        self.process = subprocess.Popen([python, __file__, "--nncodec"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.folder, self.settings = folder, {}
        command = [python, "-c", "from importlib.metadata import version; print(version('nncodec'))"]
        self.version = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def run(self, name, indices, k, zero):
        path = self.folder / f"{name}.npy"
        if name not in self.settings:
            np.save(path, indices)
        scans = [0] if indices.size > 1 << 19 or indices.ndim < 2 else list(range(5))
        ask = {"path": str(path), "k": k, "zero": zero, "scans": scans, "setting": self.settings.get(name)}
        self.process.stdin.write(json.dumps(ask) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"NNCodec's side ended on {name}")
        answer = json.loads(answer)
        self.settings[name] = answer["setting"]
        return answer

    def close(self):
        self.process.stdin.close()
        self.process.wait()


# The tensors

def _make_networks():
    "name of the case -> {layer: (indices, k, index of zero)}"
    import torch

    from nncomp.core import named_weights, seed_everything
    from nncomp.data import load_data
    from nncomp.kmeans import kmeans_1d
    from nncomp.models import create_model
    from nncomp.pruning import MaskCallback, apply_masks_, global_magnitude_masks
    from nncomp.training import fit

    torch.set_num_threads(1)
    data, cases = load_data("mnist", download=False), {}
    for net, (epochs, again, targets) in NETS.items():
        seed_everything(0)
        dense = create_model(net)
        fit(dense, data, epochs=epochs, lr=2e-3, device="cpu", progress=False)
        for sparsity, k in targets:
            model = copy.deepcopy(dense)
            masks = global_magnitude_masks(named_weights(model), sparsity, floor=0.005)
            apply_masks_(model, masks)
            fit(model, data, epochs=again, lr=1e-3, seed=1, device="cpu", callbacks=[MaskCallback(masks)], progress=False)
            layers = cases[f"{net}, {100 * sparsity:g} % zeros, {k} values"] = {}
            for name, weight in named_weights(model).items():
                codebook, indices = kmeans_1d(weight.detach(), k, keep_zero=True)
                layers[name.split(".")[0]] = indices.numpy().astype(np.uint8), len(codebook), int((codebook == 0).nonzero()[0, 0])
            print(f"made {net} at {100 * sparsity:g} %", flush=True)
    return cases


def networks():
    "The real tensors, from the cache or made and put there; and the cache's SHA-256."
    from nncomp.core import atomic_path
    from nncomp.data import data_root

    recipe = hashlib.sha256(repr((NETS, 2)).encode()).hexdigest()[:8]
    path = data_root() / "bench" / f"sizes-{recipe}.npz"
    if not path.exists():
        flat = {f"{case}|{layer}|{k}|{zero}": indices
                for case, layers in _make_networks().items() for layer, (indices, k, zero) in layers.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as part, open(part, "wb") as file:
            np.savez_compressed(file, **flat)
    cases, digest = {}, hashlib.sha256()
    with np.load(path) as stored:
        for key in stored:
            case, layer, k, zero = key.split("|")
            cases.setdefault(case, {})[layer] = stored[key], int(k), int(zero)
            digest.update(key.encode() + stored[key].tobytes())
    return cases, digest.hexdigest()


def structureless(n):
    "Independent symbols, each a tensor of rows of 1,024."
    rng, shape = np.random.default_rng(0), (-(-n // 1024), 1024)
    gaussian = rng.standard_normal(shape)
    sparse = np.where(rng.random(shape) < 0.9, 0, rng.integers(1, 32, shape)).astype(np.uint8)
    return {"Gaussian, 16 values": {"all": (np.clip(np.round(gaussian * 2 + 8), 0, 15).astype(np.uint8), 16, 8)},
            "Gaussian, 256 values": {"all": (np.clip(np.round(gaussian * 32 + 128), 0, 255).astype(np.uint8), 256, 128)},
            "90 % zeros, 32 values": {"all": (sparse, 32, 0)}}


# The coders

def _han(indices, zero, bits):
    "Bytes of Han's format: gaps with fillers and values with the fillers' zeros, both Huffman-coded."
    from nncomp.huffman import encode
    from nncomp.positions import relative_index

    flat = indices.reshape(-1)
    gaps, real = relative_index(flat != zero, bits)
    values = np.full(gaps.size, zero, np.uint8)
    values[real] = flat[flat != zero]
    return len(encode(gaps)) + len(encode(values))


def _arithmetic():
    "Our context coder, or None where this version of nncomp has none."
    try:
        from nncomp import arithmetic
    except ImportError:
        return None
    return arithmetic.encode_indices, arithmetic.decode_indices


def sizes(indices, zero):
    "{coder: bytes} of the coders that look at no neighbours, with the entropy among them."
    import zstandard

    from nncomp.entropy import counts, entropy_bits
    from nncomp.huffman import encode

    raw, flat = indices.tobytes(), indices.reshape(-1)
    chain = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    return {"entropy": flat.size * entropy_bits(counts(flat)) / 8, "han5": _han(indices, zero, 5), "han8": _han(indices, zero, 8),
            "huffman": len(encode(flat)), "zstd": len(zstandard.ZstdCompressor(level=19).compress(raw)),
            "xz": len(lzma.compress(raw, format=lzma.FORMAT_RAW, filters=chain))}


def positions(indices, zero):
    "{method: bytes} of where the non-zeros are, measured, and the entropy of independent ones."
    from nncomp.positions import best_fixed_bits, encode_positions, expected_bits, relative_index_bytes

    mask = (indices != zero).reshape(len(indices), -1)
    found = {"independent": mask.size * expected_bits(mask.mean(), "entropy") / 8, "bitmap": -(-mask.size // 8)}
    found |= {f"gaps{bits}": relative_index_bytes(mask, bits) for bits in (4, 5, 8)}
    found["fixed"] = relative_index_bytes(mask, best_fixed_bits(mask))
    return found | {method: len(encode_positions(mask, method)) for method in ("csr", "gaps", "split", "context", "best")}


def _timed(call):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def measure(name, indices, k, zero, rival, repeats):
    "One layer's row: bytes of every coder, and the best seconds each way of ours and NNCodec's, which take turns."
    row = {"n": indices.size} | sizes(indices, zero)
    ours, symbols = _arithmetic(), indices.reshape(-1)
    times = {}
    for repeat in range(repeats + 1):                             # the first round compiles, and searches NNCodec's settings
        taken = {}
        if ours:
            taken["encode"], data = _timed(lambda: ours[0](symbols, k, shape=indices.shape, zero=zero))
            taken["decode"], back = _timed(partial(ours[1], data, symbols.size, k, shape=indices.shape, zero=zero))
            if not np.array_equal(back.reshape(-1), symbols):
                raise AssertionError(f"{name}: the stream did not come back")
            row["nncomp"] = len(data)
        if rival:
            answer = rival.run(name.replace(" ", "-"), indices, k, zero)
            row["nncodec"], taken["nncodec_encode"], taken["nncodec_decode"] = answer["bytes"], answer["encode"], answer["decode"]
            row["setting"] = dict(zip(SETTING, answer["setting"]))
        if repeat:
            times = {key: min(value, times.get(key, value)) for key, value in taken.items()}
    return row | {"seconds": times}


def total(case, rows):
    "The layers of a case together: bytes added, speeds in million symbols a second over all of them."
    n = sum(row["n"] for row in rows)
    keys = [key for key in rows[0] if key not in ("seconds", "setting")]
    found = {"case": case} | {key: round(sum(row[key] for row in rows)) for key in keys}
    return found | {f"{key}_msym": n / sum(row["seconds"][key] for row in rows) / 1e6 for key in rows[0]["seconds"]}


def main():
    import records

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--symbols", type=int, default=1 << 20, help="of each structureless tensor")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--record", action="store_true", help="write results/benchmarks/sizes.json")
    args = parser.parse_args()
    from nncomp.data import data_root

    python = records.rival_python("sizes")
    cases, digest = networks()
    folder = data_root() / "bench" / "exchange"
    folder.mkdir(parents=True, exist_ok=True)
    rival = Rival(python, folder) if python else print("no NNCodec: its environment is missing (see the docstring)")
    if not _arithmetic():
        print("no nncomp.arithmetic: our context coder is left out")
    rows, where = [], []
    for part, group in (("real", cases), ("structureless", structureless(args.symbols))):
        for case, layers in group.items():
            if args.only not in case:
                continue
            found = []
            for layer, (indices, k, zero) in layers.items():
                found.append(measure(f"{case} {layer}", indices, k, zero, rival, args.repeats))
                print(f"  {case} {layer} {indices.shape}: " + json.dumps(found[-1]), flush=True)
                if len(layers) > 1:
                    bytes_of = {coder: round(found[-1][coder]) for coder in ("entropy", "nncodec", "nncomp") if coder in found[-1]}
                    where.append({"part": "layer", "case": case, "layer": layer, "n": indices.size, "k": k} | bytes_of)
            rows.append({"part": part} | total(case, found))
            print(json.dumps(rows[-1]), flush=True)
            if part == "real":
                found = [positions(indices, zero) for indices, _, zero in layers.values()]
                where.append({"part": "positions", "case": case, "ones": int(sum((i != z).sum() for i, _, z in layers.values()))}
                             | {key: round(sum(row[key] for row in found)) for key in found[0]})
                print("  positions " + json.dumps(where[-1]), flush=True)
    if rival:
        rival.close()
    if args.record:
        if args.only:
            parser.error("a record holds all cases: leave out --only")
        path = records.write("sizes", rows + where, packages=["zstandard"], versions={"nncodec": rival.version} if rival else None,
                             repeats=args.repeats, symbols=args.symbols, tensors=digest)
        print(f"wrote {path}")


if __name__ == "__main__":
    if "--nncodec" in sys.argv:
        _nncodec_server()
    else:
        main()
