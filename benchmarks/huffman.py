"""Huffman coding against zstd level 1 and bitarray, side by side in one run.

    python benchmarks/huffman.py [--symbols N] [--repeats R] [--record]

Three streams of `uint8` symbols: 32 values with a skewed distribution, and Gaussian ones rounded to 16 and to 256 values. All coders run on
one thread with the bytes already in memory; calls that compile or warm up are not timed; the calls take turns, and each side's best time is
compared, since whatever else the machine does only adds to a time (the ratios of the medians are recorded too). A time is the thread's
processor time, memory management included: on an idle machine that is the time of the clock, on a busy one it leaves out the waiting.
zstd at level 1 uses its own Huffman coder (huff0) on such data, but spends time on repeats by chance, and bits on the skewed stream.
Where repeats are hardly looked for (a hash table of 64 entries) it is faster both ways, and shorter there: its best setting, measured too.

bitarray lives in an environment of its own, and is left out with a line that says so where that is missing:

    python -m venv "${TMPDIR:-/tmp}/bench-huffman" && "${TMPDIR:-/tmp}/bench-huffman/bin/pip" install bitarray numpy

It decodes the same code lengths, with a decode tree that was built before. There are several ways to get the symbols out of it (as bytes,
as a list, through NumPy, with its canonical decoder): each turn takes them all, and the fastest counts.

A last part measures nncomp alone on alphabets of up to 65,536 symbols, which zstd's Huffman coder does not have.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

RIVAL = """
import json, sys, time
import numpy as np
import bitarray
from bitarray import bitarray as Bits, decodetree
from bitarray.util import canonical_decode, canonical_huffman

lengths, symbols = np.load(sys.argv[1]), np.load(sys.argv[2])
used = sorted((int(l), s) for s, l in enumerate(lengths) if l)
code, word, count, last = {}, 0, [0] * (used[-1][0] + 1), used[0][0]
for length, s in used:                                  # canonical: counted upward, shifted where the length grows
    word <<= length - last
    code[s], last = Bits(f"{word:0{length}b}"), length
    count[length] += 1
    word += 1
tree, order, n = decodetree(code), [s for _, s in used], len(symbols)
coded = Bits()
coded.encode(code, symbols.tobytes())
ways = {"bytes": lambda: bytes(coded.decode(tree)), "list": lambda: list(coded.decode(tree)),
        "numpy": lambda: np.fromiter(coded.decode(tree), np.uint8, n),
        "canonical": lambda: bytes(canonical_decode(coded, count, order))}

def timed(call):
    start = time.thread_time()
    found = call()
    return time.thread_time() - start, found

for name, call in ways.items():
    _, found = timed(call)
    assert np.array_equal(np.asarray(found, np.uint8) if name in ("list", "numpy") else np.frombuffer(found, np.uint8), symbols)
    del found

def decode():
    best = min(ways, key=lambda name: spent.setdefault(name, timed(ways[name])[0]))
    return spent[best], best

def encode():
    out = Bits()
    out.encode(code, raw)
    return out

raw = symbols.tobytes()
print(json.dumps({"version": bitarray.__version__, "bits": len(coded)}), flush=True)
for line in sys.stdin:
    spent = {}
    print(*(decode() if line.strip() == "decode" else (timed(encode)[0], "")), flush=True)
"""


class Bitarray:
    "bitarray in its own interpreter, which times a call when asked to."

    def __init__(self, python, lengths, symbols, folder):
        np.save(folder / "lengths.npy", lengths)
        np.save(folder / "symbols.npy", symbols)
        command = [python, "-c", RIVAL, folder / "lengths.npy", folder / "symbols.npy"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about, self.ways = json.loads(self.process.stdout.readline()), {}

    def seconds(self, what):
        print(what, file=self.process.stdin, flush=True)
        taken, *way = self.process.stdout.readline().split()
        if way:
            self.ways[way[0]] = self.ways.get(way[0], 0) + 1
        return float(taken)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def streams(n):
    "The three test streams, each (n,) uint8, from a fixed seed."
    rng = np.random.default_rng(0)
    skewed = 1 / np.arange(1, 33) ** 1.6
    gaussian = rng.standard_normal(n)
    yield "skewed, 32 values", rng.choice(32, n, p=skewed / skewed.sum()).astype(np.uint8)
    yield "Gaussian, 16 values", np.clip(np.round(gaussian * 2 + 8), 0, 15).astype(np.uint8)
    yield "Gaussian, 256 values", np.clip(np.round(gaussian * 32 + 128), 0, 255).astype(np.uint8)


def large_streams(n):
    "Streams over large alphabets, each (n,) uint16, from a fixed seed."
    rng = np.random.default_rng(0)
    yield "geometric, mean 100", rng.geometric(0.01, n).clip(0, 65535).astype(np.uint16)
    yield "Gaussian, sd 500", rng.normal(32768, 500, n).clip(0, 65535).astype(np.uint16)
    yield "Laplace, scale 3000", np.abs(rng.laplace(0, 3000, n)).clip(0, 65535).astype(np.uint16)
    yield "Gaussian, sd 8000", rng.normal(32768, 8000, n).clip(0, 65535).astype(np.uint16)
    yield "uniform, 65,536", rng.integers(0, 65536, n).astype(np.uint16)


def turns(calls, repeats):
    "Best and median seconds of each call, which returns its seconds or is timed; the calls take turns, so that a busy moment hits all."
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.thread_time()
            found = call()
            times[name].append(found if isinstance(found, float) else time.thread_time() - start)
    return {name: min(taken) for name, taken in times.items()}, {name: statistics.median(taken) for name, taken in times.items()}


def compare(name, symbols, repeats, python, folder):
    "A row: bits a symbol, and speed as a multiple of each rival's."
    import zstandard

    from nncomp.entropy import counts, entropy_bits
    from nncomp.huffman import code_lengths, decode, encode

    raw, ours, n = symbols.tobytes(), encode(symbols), len(symbols)
    compressor, decompressor = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    few = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters.from_level(1, hash_log=6))
    theirs, fewest = compressor.compress(raw), few.compress(raw)
    if not np.array_equal(decode(ours), symbols):
        raise AssertionError(f"{name}: the stream did not come back")
    calls = {"encode": lambda: encode(symbols) and None, "zstd encode": lambda: compressor.compress(raw) and None,
             "few encode": lambda: few.compress(raw) and None, "decode": lambda: decode(ours)[:0],
             "zstd decode": lambda: decompressor.decompress(theirs) and None,
             "few decode": lambda: decompressor.decompress(fewest) and None}
    t, median = turns(calls, repeats)
    row = {"part": "rivals", "case": name, "entropy_bits": entropy_bits(counts(symbols)), "nncomp_bits": 8 * len(ours) / n,
           "zstd_bits": 8 * len(theirs) / n, "decode_msyms": n / t["decode"] / 1e6, "encode_msyms": n / t["encode"] / 1e6,
           "few_bits": 8 * len(fewest) / n, "decode_to_few": t["few decode"] / t["decode"], "encode_to_few": t["few encode"] / t["encode"],
           "decode_to_zstd": t["zstd decode"] / t["decode"], "encode_to_zstd": t["zstd encode"] / t["encode"],
           "median_decode_to_zstd": median["zstd decode"] / median["decode"],
           "median_encode_to_zstd": median["zstd encode"] / median["encode"], "decode_to_bitarray": None, "encode_to_bitarray": None}
    if python:
        rival = Bitarray(python, code_lengths(counts(symbols)), symbols, folder)
        tries = {f"decode {i}": lambda: decode(ours)[:0] for i in range(4)}     # as many tries a turn as the rival has ways
        b, _ = turns(tries | {"bitarray decode": lambda: rival.seconds("decode"), "encode": lambda: encode(symbols) and None,
                              "bitarray encode": lambda: rival.seconds("encode")}, max(3, repeats // 3))
        row |= {"decode_to_bitarray": b["bitarray decode"] / min(b[name] for name in tries),
                "encode_to_bitarray": b["bitarray encode"] / b["encode"], "bitarray_decode_msyms": n / b["bitarray decode"] / 1e6,
                "bitarray_way": max(rival.ways, key=rival.ways.get), "bitarray_version": rival.about["version"]}
        rival.close()
    return row


def alone(name, symbols, repeats):
    "A row for an alphabet that the rivals do not have."
    from nncomp.entropy import counts, entropy_bits
    from nncomp.huffman import STORED, code_lengths, decode, encode

    ours, c, n = encode(symbols), counts(symbols), len(symbols)
    if not np.array_equal(decode(ours), symbols):
        raise AssertionError(f"{name}: the stream did not come back")
    t, _ = turns({"encode": lambda: encode(symbols) and None, "decode": lambda: decode(ours)[:0]}, repeats)
    longest = None if ours[0] >> 1 == STORED else int(code_lengths(c).max())
    return {"part": "large alphabets", "case": name, "alphabet": int(np.count_nonzero(c)), "longest": longest,
            "entropy_bits": entropy_bits(c), "nncomp_bits": 8 * len(ours) / n,
            "decode_msyms": n / t["decode"] / 1e6, "encode_msyms": n / t["encode"] / 1e6}


def line(row):
    "A row as it is printed."
    text = f"{row['case']:21s} entropy {row['entropy_bits']:.3f}  nncomp {row['nncomp_bits']:.3f}"
    speed = f"(decode {row['decode_msyms']:.0f}, encode {row['encode_msyms']:.0f} Msym/s)"
    if row["part"] != "rivals":
        return f"{text} bits/symbol {speed}"
    text += f"  zstd-1 {row['zstd_bits']:.3f} bits/symbol"
    text += f" | decode {row['decode_to_zstd']:.2f} x, encode {row['encode_to_zstd']:.2f} x zstd-1"
    text += f" | with few repeats {row['few_bits']:.3f} bits, decode {row['decode_to_few']:.2f} x, encode {row['encode_to_few']:.2f} x"
    if row["decode_to_bitarray"]:
        text += f" | decode {row['decode_to_bitarray']:.0f} x, encode {row['encode_to_bitarray']:.0f} x bitarray"
        text += f" ({row['bitarray_way']}, {row['bitarray_decode_msyms']:.0f} Msym/s)"
    return f"{text} {speed}"


def main():
    import records
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--symbols", type=int, default=17_000_000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--record", action="store_true", help="write results/benchmarks/huffman.json")
    args = parser.parse_args()
    python, rows = records.rival_python("huffman"), []
    if python is None:
        print("bitarray is left out: its environment is missing (see the docstring)", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        for name, symbols in streams(args.symbols):
            rows.append(compare(name, symbols, args.repeats, python, Path(folder)))
            print(line(rows[-1]), flush=True)
    for name, symbols in large_streams(args.symbols // 4):
        rows.append(alone(name, symbols, args.repeats))
        print(line(rows[-1]), flush=True)
    if args.record:
        version = {"bitarray": rows[0]["bitarray_version"]} if python else {}
        rows = [{k: v for k, v in row.items() if k != "bitarray_version"} for row in rows]
        print(records.write("huffman", rows, packages=["zstandard"], versions=version, symbols=args.symbols,
                            large_symbols=args.symbols // 4, repeats=args.repeats, statistic="best of the turns, processor seconds"))


if __name__ == "__main__":
    main()
