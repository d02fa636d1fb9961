"""What the benchmark scripts share: the record of a run, and the environments of the rivals.

A script measures, prints its lines, and with `--record` calls `write(name, rows, ...)`, which leaves `results/benchmarks/<name>.json`.
The chapter shows it with `nncomp.results.benchmark_table(name, columns)`, so no number is typed.

A rival that is no dependency of nncomp lives in an environment of its own, `bench-<name>` in the folder for temporary files:

    python -m venv "${TMPDIR:-/tmp}/bench-<name>" && "${TMPDIR:-/tmp}/bench-<name>/bin/pip" install <rivals>

or in the folder that `NNCOMP_BENCH` names. `rival_python(name)` is its interpreter, or None where it is missing; such a rival is left
out with a line that says so.
"""
import importlib
import json
import math
import os
import platform
import re
import subprocess
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from nncomp.core import atomic_path

ROOT = Path(__file__).resolve().parent.parent
ALWAYS = ("nncomp", "numpy", "numba", "torch")


def rival_python(name):
    "The interpreter of the environment `bench-<name>`, or None if there is none."
    found = Path(os.environ.get("NNCOMP_BENCH") or tempfile.gettempdir()) / f"bench-{name}" / "bin" / "python"
    return found if found.exists() else None


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return str(importlib.import_module(package).__version__)


def _cpu():
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def _commit():
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _plain(value):
    "NumPy's numbers as Python's, floats to six significant digits, what is not finite as None."
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def write(name, rows, *, packages=(), versions=None, threads=1, device=None, root=ROOT, **about):
    """Write `results/benchmarks/<name>.json`, whole or not at all; its path.

    `rows`: one dict for each case (texts, numbers, None for "not measured"). `packages`: more installed packages whose versions matter;
    `versions`: {package: version} for those of another environment. `device`: None = this processor. `about`: anything else worth saying
    (repeats, symbols, what was left out).
    """
    if not rows:
        raise ValueError("a benchmark without rows is no record")
    found = {"python": platform.python_version()} | {p: _version(p) for p in (*ALWAYS, *packages)} | dict(versions or {})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    data = {"benchmark": name, "rows": _plain(list(rows)), "about": _plain(about), "commit": _commit(), "versions": found,
            "device": device or _cpu(), "cores": cores, "threads": threads, "platform": f"{platform.system()} {platform.machine()}",
            "date": datetime.now(UTC).date().isoformat()}
    text = json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    if len(text.encode()) > 10_000:
        raise ValueError(f"the record of {name} takes {len(text.encode()):,} bytes, more than 10,000")
    path = Path(root) / "results" / "benchmarks" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")
    return path
