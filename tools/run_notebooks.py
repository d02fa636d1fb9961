"""Run notebooks from top to bottom and save their outputs.

    python tools/run_notebooks.py [--slow] [--check] [NOTEBOOK ...]

Cells under `#| eval: false`, and flagged cells (`#| slow`, `#| gpu`) that were not asked for, are not run and keep the
outputs they have. Warnings, progress bars and widget state are not saved. With `--check` nothing is written: a notebook
that raises fails. Two runs of the same notebook give the same bytes.
"""
import argparse
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
FLAGS = {"slow", "gpu"}
SETTINGS = {
    "TQDM_DISABLE": "1",
    "PYTHONHASHSEED": "0",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}


def directives(source):
    "The set of `#|` directives at the top of a cell, as written after the bar."
    return {m[1].strip() for m in re.finditer(r"^#\|(.*)$", source, flags=re.M)}


def skipped(cell, flags):
    "Whether a cell is not run: not code, `eval: false`, or under a flag that was not asked for."
    marks = directives(cell.source)
    return "eval: false" in marks or bool((marks & FLAGS) - flags)


def tidy(cell):
    "Keep what a reader should see: no stderr, no execution counts, no widget state."
    if cell.cell_type != "code":
        return
    cell.execution_count = None
    cell.metadata.pop("execution", None)
    kept = []
    for out in cell.outputs:
        if out.output_type == "stream" and out.name == "stderr":
            continue
        if "application/vnd.jupyter.widget-view+json" in out.get("data", {}):
            continue
        if "execution_count" in out:
            out.execution_count = None
        if kept and out.output_type == kept[-1].output_type == "stream" and out.name == kept[-1].name:
            kept[-1].text += out.text  # a slow machine sends in pieces what a fast one sends at once
            continue
        if out.output_type in ("display_data", "execute_result"):
            out.data = {k: v for k, v in out.data.items() if not (k == "text/plain" and "<Figure size" in v and len(out.data) > 1)}
            out.metadata = {}
        kept.append(out)
    cell.outputs = kept


def run(path, flags=frozenset(), timeout=600):
    "The notebook at `path`, executed; raises `CellExecutionError` where a cell fails."
    nb = nbformat.read(path, 4)
    for cell in nb.cells:
        if cell.cell_type != "code":
            continue
        if skipped(cell, flags):
            cell.metadata["tags"] = ["skip-execution"]
        else:
            cell.outputs = []
    client = NotebookClient(
        nb,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        skip_cells_with_tag="skip-execution",
    )
    client.execute()
    for cell in nb.cells:
        cell.metadata.pop("tags", None)
        tidy(cell)
    nb.metadata.pop("widgets", None)
    nb.metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    return nb


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="notebooks to run (default: all of nbs/)")
    parser.add_argument("--slow", action="store_true", help="run the cells under #| slow too")
    parser.add_argument("--check", action="store_true", help="run only: save nothing")
    args = parser.parse_args(argv)
    os.environ.update(SETTINGS)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    failed = 0
    for path in args.notebooks or sorted((ROOT / "nbs").glob("*.ipynb")):
        start = time.perf_counter()
        try:
            nb = run(path, {"slow"} if args.slow else set())
        except CellExecutionError as error:
            print(f"{path.name}: FAILED\n{error}", file=sys.stderr)
            failed += 1
            continue
        if not args.check:
            part = path.with_name(path.name + ".part")
            nbformat.write(nb, part)
            part.replace(path)
            from nbdev.clean import nbdev_clean

            nbdev_clean(str(path))
        print(f"{path.name}: ok, {time.perf_counter() - start:.1f} s, {path.stat().st_size / 1000:.0f} kB")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
