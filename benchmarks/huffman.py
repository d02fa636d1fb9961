"""Huffman coding against zstd level 1, side by side in one run.

    python benchmarks/huffman.py [--symbols N] [--repeats R]

Three streams of `uint8` symbols: 32 values with a skewed distribution, and Gaussian ones rounded to 16 and to 256 values. Both
coders run on one thread with the bytes already in memory; the first call (which compiles) is not timed; medians over the repeats
are compared as a ratio. zstd at level 1 uses its own Huffman coder (huff0) on such data, since it finds no repeats.
"""
import argparse
import statistics
import time

import numpy as np
import zstandard

from nncomp.entropy import counts, entropy_bits
from nncomp.huffman import decode, encode


def streams(n):
    "The three test streams, each (n,) uint8, from a fixed seed."
    rng = np.random.default_rng(0)
    skewed = 1 / np.arange(1, 33) ** 1.6
    gaussian = rng.standard_normal(n)
    yield "skewed, 32 values", rng.choice(32, n, p=skewed / skewed.sum()).astype(np.uint8)
    yield "Gaussian, 16", np.clip(np.round(gaussian * 2 + 8), 0, 15).astype(np.uint8)
    yield "Gaussian, 256", np.clip(np.round(gaussian * 32 + 128), 0, 255).astype(np.uint8)


def seconds(calls, repeats):
    "Median seconds of each call; the calls take turns, so that a busy moment hits all of them."
    times = [[] for _ in calls]
    for _ in range(repeats):
        for call, taken in zip(calls, times):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def compare(name, symbols, repeats):
    "One line: bits a symbol against the entropy and against zstd, and the speed ratios."
    raw, ours = symbols.tobytes(), encode(symbols)
    compressor, decompressor = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    theirs = compressor.compress(raw)
    if not np.array_equal(decode(ours), symbols):
        raise AssertionError(f"{name}: the stream did not come back")
    calls = [lambda: encode(symbols), lambda: decode(ours), lambda: compressor.compress(raw), lambda: decompressor.decompress(theirs)]
    encoding, decoding, zstd_in, zstd_out = seconds(calls, repeats)
    n, bits = len(symbols), entropy_bits(counts(symbols))
    return (f"{name:18s} entropy {bits:.3f}  nncomp {8 * len(ours) / n:.3f}  zstd-1 {8 * len(theirs) / n:.3f} bits/symbol"
            f" | encode {zstd_in / encoding:.2f} x zstd-1, decode {zstd_out / decoding:.2f} x zstd-1 ({n / decoding / 1e6:.0f} Msym/s)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--symbols", type=int, default=17_000_000)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    for name, symbols in streams(args.symbols):
        print(compare(name, symbols, args.repeats), flush=True)


if __name__ == "__main__":
    main()
