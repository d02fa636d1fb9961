"""Coverage-guided fuzzing of everything in nncomp that reads bytes.

    python tests/fuzz/fuzz.py TARGET [--seconds 60] [--compiled]   fuzz one target; what it finds that is new goes to corpus/TARGET
    python tests/fuzz/fuzz.py replay                               run every file of the corpus in both modes, which must agree
    python tests/fuzz/fuzz.py minimise [--found FOLDER]            keep what adds to the coverage, of the corpus and of FOLDER/TARGET

It needs atheris, which has wheels for CPython up to 3.13: `python -m venv fuzz-env && fuzz-env/bin/pip install -e . atheris==3.0.0`.

Two modes. By default the numba loops run as plain Python, so that the fuzzer sees their branches; every array that is handed to one is
wrapped, and a negative index, which NumPy and numba would both wrap round silently, is a defect like one past the end. With --compiled
they run compiled with bounds checks, in their own cache, and time and memory of each input are held to the limits in targets.py.
"""

import argparse
import hashlib
import inspect
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import traceback
from functools import partial, wraps
from pathlib import Path

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus"
TABLES = "_fill"  # functions that fill tables of many thousand entries: compiled in both modes, or an input would take a second
TARGETS = ("huffman", "positions", "arithmetic", "indices", "tensor", "blocks", "load", "inspect")


def strict_arrays():
    "Make `numba.njit` leave functions as they are, but for wrapping their arrays."
    import numba
    import numpy as np

    class Strict(np.ndarray):
        "Refuses negative indices, and hands out numbers as wide as compiled code has them."

        def __getitem__(self, index):
            refuse_negative(index)
            value = super().__getitem__(index)
            return int(value) if isinstance(value, np.integer) and value.dtype != np.uint64 else value

        def __setitem__(self, index, value):
            refuse_negative(index)
            if isinstance(value, (int, np.integer)) and self.dtype.kind in "ui":  # wrap round as compiled code does
                value = int(value) & (1 << 8 * self.itemsize) - 1
                value -= (self.dtype.kind == "i" and value >> 8 * self.itemsize - 1) << 8 * self.itemsize
            super().__setitem__(index, value)

    def refuse_negative(index):
        for i in index if isinstance(index, tuple) else (index,):
            if isinstance(i, (int, np.integer)) and i < 0:
                raise AssertionError(f"negative index {i}")

    def strict(value):
        if isinstance(value, tuple):
            return tuple(map(strict, value))
        return value.view(Strict) if type(value) is np.ndarray else value

    compiled, inside = numba.njit, []

    def njit(*args, **_):
        def decorate(function):
            if function.__name__.startswith(TABLES):  # from its text, since an instrumented function cannot be compiled
                names, text = {}, textwrap.dedent(inspect.getsource(function))
                exec(text[text.index("def ") :], function.__globals__, names)
                return compiled(boundscheck=True)(names[function.__name__])

            @wraps(function)
            def inner(*arguments):
                if inside:  # called by another loop, whose arrays are wrapped already
                    return function(*arguments)
                inside.append(function)
                try:
                    with np.errstate(over="ignore"):
                        return function(*map(strict, arguments))
                finally:
                    inside.clear()

            return inner

        return decorate(args[0]) if args and callable(args[0]) else decorate

    numba.njit = numba.jit = njit
    return strict


def instrument():
    "Let atheris watch the branches of nncomp's Python functions; loops that are compiled stay as they are."
    try:
        import atheris
    except ImportError:
        return
    for module in [module for name, module in sys.modules.items() if name.startswith("nncomp.")]:
        owners = [module, *(c for c in vars(module).values() if inspect.isclass(c))]
        for found in [getattr(v, "fget", v) for owner in owners for v in vars(owner).values()]:
            if hasattr(found, "py_func"):  # compiled by numba
                continue
            function = inspect.unwrap(found) if callable(found) else None
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                atheris.instrument_func(function)


def prepare(compiled):
    "Environment and module of the targets for a mode; loops are instrumented where they are Python."
    if compiled:
        os.environ["NUMBA_BOUNDSCHECK"] = "1"
        os.environ["NUMBA_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / "nncomp-fuzz-numba")  # code with checks apart from code without
    import safetensors.torch  # noqa: F401  (imported before anything is instrumented)
    import torch

    torch.set_num_threads(1)
    strict = None if compiled else strict_arrays()
    sys.path.insert(0, str(HERE))
    sys.path.insert(0, str(HERE.parents[1]))
    import targets
    if strict:  # tables that the loops take from their module
        for module in [module for name, module in sys.modules.items() if name.startswith("nncomp.")]:
            vars(module).update({name: strict(value) for name, value in vars(module).items() if type(value).__name__ == "ndarray"})
    instrument()
    return targets


def hurry(targets, compiled):
    "Smaller tables and allowances, so that there are more inputs in a second."
    if not compiled and hasattr(targets.huffman, "MAX_LENGTH"):
        targets.huffman.MAX_LENGTH = 15  # a table for codes of 20 bits takes a second to read in plain Python
    targets.MOST = targets.MOST if compiled else 120  # a bit of the arithmetic coder takes a millisecond
    targets.container._SLACK = 1 << 18  # bytes that even a small file may declare


def fuzz(args):
    "Run libFuzzer on one target."
    import atheris

    targets = prepare(args.compiled)
    hurry(targets, args.compiled)
    if args.target not in targets.TARGETS:
        sys.exit(f"this version of nncomp has no target {args.target}")
    corpus, start = CORPUS / args.target, Path(tempfile.mkdtemp(prefix="fuzz-seeds-"))
    corpus.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(targets.seeds(args.target)):
        (start / f"seed-{i}").write_bytes(data)
        targets.run(args.target, data, seconds=None)  # compiles
    options = [f"-max_total_time={args.seconds}", "-timeout=60", "-rss_limit_mb=3000", f"-max_len={args.max_len}", "-print_final_stats=1"]
    found = Path(args.found or corpus)
    found.mkdir(parents=True, exist_ok=True)
    if args.compiled:
        import tracemalloc

        tracemalloc.start()

    crashes, seen = Path(args.crashes or tempfile.mkdtemp(prefix="fuzz-crashes-")), set()
    crashes.mkdir(parents=True, exist_ok=True)

    def one_input(data):
        try:
            targets.run(args.target, data, seconds=targets.SECONDS if args.compiled else None)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__} {where.name} {re.sub('[0-9.]+', '#', str(error))[:60]}"
            if text not in seen:
                seen.add(text)
                (crashes / f"{args.target}-{hashlib.sha1(text.encode()).hexdigest()[:8]}").write_bytes(data)
                print(f"DEFECT {args.target}: {text} ({len(data)} bytes kept in {crashes})", flush=True)

    def mutate_file(data, most, seed):
        return targets.mutate_file(data, most, random.Random(seed), atheris.Mutate)

    options += [f"-artifact_prefix={crashes}/", "-reduce_inputs=1", f"-seed={args.seed}"]
    whole = {"custom_mutator": mutate_file} if args.target in ("load", "inspect") else {}
    folders = [str(found)] + [str(f) for f in (corpus, start) if f != found]
    atheris.Setup([sys.argv[0], *options, *folders], one_input, **whole)
    atheris.Fuzz()


def outcomes(compiled):
    "What comes of each file of the corpus, as JSON on stdout."
    targets = prepare(compiled)
    found = {}
    for path in sorted(CORPUS.glob("*/*")):
        if path.parent.name in targets.TARGETS:
            try:
                outcome = targets.run(path.parent.name, path.read_bytes(), seconds=targets.SECONDS if compiled else None)
            except Exception as error:
                outcome = f"DEFECT {type(error).__name__}: {error}"
                print(path, outcome, file=sys.stderr)
            found[f"{path.parent.name}/{path.name}"] = outcome
    print(json.dumps(found))


def replay():
    "Both modes side by side."
    runs = {}
    for mode in ("pure", "compiled"):
        done = subprocess.run([sys.executable, __file__, f"outcomes-{mode}"], stdout=subprocess.PIPE, check=True)
        runs[mode] = json.loads(done.stdout.splitlines()[-1])
    differ = [name for name in runs["pure"] if runs["pure"][name] != runs["compiled"][name]]
    for name in differ:
        print(f"{name}\n  plain Python: {runs['pure'][name][:200]}\n  compiled:     {runs['compiled'][name][:200]}")
    print(f"{len(runs['pure'])} inputs, {len(differ)} with different outcomes")
    return len(differ) > 0


def arcs(run):
    "The steps from line to line of nncomp that `run()` takes, and what it returns or raises."
    taken, package = set(), str(HERE.parents[1] / "nncomp")

    def trace(frame, event, _):
        name = frame.f_code.co_filename
        if not name.startswith(package):
            return None
        last = [None]

        def line(frame, event, _):
            taken.add((name, last[0], frame.f_lineno))
            last[0] = frame.f_lineno
            return line

        return line

    sys.settrace(trace)
    try:
        return taken, run()
    except Exception as error:
        return taken, repr(error)
    finally:
        sys.settrace(None)


def minimise(folders):
    "Keep in the corpus, shortest first, what takes a step between lines that nothing before took or ends in another kind of outcome."
    targets = prepare(compiled=False)
    hurry(targets, compiled=False)
    for target in targets.TARGETS:
        inputs = {path.read_bytes() for folder in (CORPUS, *folders) for path in Path(folder, target).glob("*")}
        known, kept = set(), []
        for data in [*targets.seeds(target), *sorted(inputs, key=lambda data: (len(data), data))]:
            steps, outcome = arcs(partial(targets.run, target, data, seconds=None))
            steps.add(re.sub(r"[0-9a-f]{16}|[0-9]+|'[^']*'", "#", outcome)[:60] if outcome.startswith("error") else "sound")
            if steps - known:
                kept.append(data)
            known |= steps
        shutil.rmtree(CORPUS / target, ignore_errors=True)
        (CORPUS / target).mkdir(parents=True)
        for data in set(kept) & inputs:
            (CORPUS / target / hashlib.sha1(data).hexdigest()[:12]).write_bytes(data)
        size = sum(len(data) for data in set(kept) & inputs)
        print(f"{target}: {len(set(kept) & inputs)} of {len(inputs)} inputs kept, {size} bytes, {len(known)} steps", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[*TARGETS, "replay", "minimise", "outcomes-pure", "outcomes-compiled"])
    parser.add_argument("--seconds", type=int, default=60, help="how long")
    parser.add_argument("--compiled", action="store_true", help="compiled loops with bounds checks, and limits on time and memory")
    parser.add_argument("--max-len", type=int, default=1500, help="longest input in bytes")
    parser.add_argument("--found", help="folder for new inputs instead of the corpus")
    parser.add_argument("--crashes", help="folder for inputs that show a defect")
    parser.add_argument("--seed", type=int, default=1, help="of the mutations")
    args = parser.parse_args()
    if args.target == "minimise":
        return minimise([args.found] if args.found else [])
    if args.target == "replay":
        sys.exit(replay())
    if args.target.startswith("outcomes"):
        return outcomes(args.target.endswith("compiled"))
    fuzz(args)


if __name__ == "__main__":
    main()
