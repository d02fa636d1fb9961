"The layers of the package, read from its imports: no module imports upward, no method imports another method."
import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NUMBERED = {p.stem.split("_", 1)[1]: int(p.stem.split("_", 1)[0]) for p in (ROOT / "nbs").glob("[0-9]*_*.ipynb")}
MODULES = {p.stem: p for p in (ROOT / "nncomp").glob("*.py") if p.stem not in {"__init__", "__main__", "_modidx"}}

FAMILIES = [
    {"pruning", "schedules", "neurons"},
    {"kmeans", "weight_sharing"},
    {"squeezenet"},
    {"distillation"},
    {"soft_weight_sharing"},
]
LEAN = {"torch", "numpy", "safetensors", "tqdm", "numba"}  # what `pip install nncomp` brings
MAY_PLOT = {name for name, number in NUMBERED.items() if number >= 40} | {"plot"}


def imports(path, top_level=False):
    "The dotted names that a file imports; with `top_level`, only those that run when it is imported."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                yield node.module
            elif node.module:
                yield f"nncomp.{node.module}"
            else:
                yield from (f"nncomp.{alias.name}" for alias in node.names)


def inner(path):
    "The package's own modules that a file imports."
    return {name.split(".")[1] for name in imports(path) if name.startswith("nncomp.") and not name.startswith("nncomp.__")}


def family(module):
    return next((i for i, group in enumerate(FAMILIES) if module in group), None)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_only_lower_numbered(module):
    assert module in NUMBERED, f"nncomp/{module}.py has no numbered notebook"
    for other in inner(MODULES[module]):
        assert other in NUMBERED, f"{module} imports nncomp.{other}, which no notebook writes"
        assert NUMBERED[other] < NUMBERED[module], f"{module} ({NUMBERED[module]}) imports upward: {other} ({NUMBERED[other]})"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_methods_never_import_each_other(module):
    own = family(module)
    if own is not None:
        assert {family(other) for other in inner(MODULES[module])} <= {own, None}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_lean_at_import_time(module):
    allowed = LEAN | sys.stdlib_module_names | {"nncomp"} | ({"matplotlib"} if module == "plot" else set())
    outside = {name.split(".")[0] for name in imports(MODULES[module], top_level=True)} - allowed
    assert not outside, f"{module} needs {outside} as soon as it is imported; use core.require where it is called"


def test_only_late_modules_plot():
    assert {m for m, path in MODULES.items() if "plot" in inner(path)} <= MAY_PLOT


def test_every_chapter_exports_its_module():
    exporting = {s for s in NUMBERED if f"default_exp {s}" in next((ROOT / "nbs").glob(f"[0-9]*_{s}.ipynb")).read_text(encoding="utf-8")}
    assert exporting == set(MODULES)
