"Every notebook runs as `nbdev_test` runs it, is clean, and follows the house rules that a program can check."
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
IDS = [p.stem for p in NOTEBOOKS]
CHAPTERS = [*NOTEBOOKS, ROOT / "tools" / "template.ipynb"]
PRELOADED = ["nbdev.test", "nbformat", "numba", "safetensors.torch", "seaborn", "torchvision", "tqdm.auto"]  # nncomp itself begins anew


def cells(path, kind="code"):
    return [c for c in nbformat.read(path, 4).cells if c.cell_type == kind]


def exported(cell):
    return re.match(r"#\| ?exports?\b", cell.source) is not None


def run_notebook(path, log):
    "What a process for one notebook does, everything printed written to `log`."
    said = os.open(log, os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(said, stream)
    os.chdir(ROOT)
    from nbdev.test import test_nb

    sys.exit(not test_nb(path)[0])


@pytest.fixture(scope="session")
def processes():
    "Processes that begin where the libraries are imported already, which else takes as long as many a notebook."
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@pytest.mark.parametrize("path", CHAPTERS, ids=[*IDS, "template"])
def test_runs(path, processes, tmp_path):
    process = processes.Process(target=run_notebook, args=(path, tmp_path / "log"))
    process.start()
    process.join(600)
    if process.is_alive():
        process.kill()
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text(errors="replace")[-6000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_saved_outputs_are_whole(path):
    outputs = [o for c in cells(path) for o in c.outputs]
    assert path.stat().st_size < 400_000, "over 400 kB"
    assert not [o for o in outputs if o.output_type == "error"]
    assert not [o for o in outputs if o.get("name") == "stderr"]
    if len(cells(path)) > 4:
        assert outputs, "no saved outputs: run tools/run_notebooks.py"
    text = json.dumps(outputs)
    for word in ("object at 0x", "/" + "home/", "/" + "root/", "site-packages", "\\u001b["):
        assert word not in text, f"{word!r} in the saved outputs"


@pytest.mark.parametrize("path", CHAPTERS, ids=[*IDS, "template"])
def test_chapter_form(path):
    nb = nbformat.read(path, 4)
    first = nb.cells[0]
    assert first.cell_type == "markdown" and re.match(r"# .+\n\n> .+", first.source), "begins with `# Title` and `> subtitle`"
    assert "skip_exec" not in path.read_text(encoding="utf-8")
    ours = [c for c in nb.cells if c.cell_type == "code" and exported(c)]
    words = sum(len(c.source.split()) for c in nb.cells if c.cell_type == "markdown")
    asserts = [c for c in nb.cells if re.search(r"\bassert\b|\btest_\w+\(", c.source) and not exported(c)]
    assert words >= 25 * len(ours), f"{words} words of prose for {len(ours)} exported cells"
    assert 2 * len(asserts) >= len(ours), f"{len(asserts)} asserting cells for {len(ours)} exported ones"
    for cell in ours:
        assert not re.search(r"^\s*from \S+ import \*|fastcore", cell.source, flags=re.M)
    assert len({c["id"] for c in nb.cells}) == len(nb.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_figures_are_labelled(path):
    for cell in cells(path):
        drawn = [o for o in cell.outputs if {"image/svg+xml", "image/png"} & set(o.get("data", {}))]
        if drawn:
            for key in ("label: fig-", "fig-cap:", "fig-alt:"):
                assert f"#| {key}" in cell.source, f"a figure without {key} in cell {cell['id']}"
            assert len(json.dumps(drawn)) < 150_000, f"a figure over 150 kB in cell {cell['id']}"


def test_export_and_clean_give_no_diff(tmp_path):
    copy = tmp_path / "nncomp-copy"
    copy.mkdir()
    for name in ("nbs", "nncomp"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "setup.py", "_quarto.yml", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    for module in (copy / "nncomp").glob("*.py"):
        if module.stem not in {"__init__", "__main__"}:
            module.unlink()
    bins = Path(sys.executable).parent
    subprocess.run([bins / "nbdev_clean"], cwd=copy, check=True, capture_output=True)
    subprocess.run([bins / "nbdev_export"], cwd=copy, check=True, capture_output=True)
    for folder, pattern in (("nbs", "*.ipynb"), ("nncomp", "*.py")):
        names = {p.name for p in (ROOT / folder).glob(pattern)}
        assert names == {p.name for p in (copy / folder).glob(pattern)}
        for name in sorted(names):
            assert (copy / folder / name).read_text() == (ROOT / folder / name).read_text(), f"{folder}/{name} is not clean or not exported"


def test_no_word_of_a_machine():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    machine = re.compile("/" + "home/[a-z]|/" + "root/|/" + "work/[a-z]|/" + "tmp/(?!ci)")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.is_file() and path.suffix in {".ipynb", ".py", ".md", ".json", ".yml", ".ini", ".toml", ".html", ".css", ".scss"}:
            found = machine.search(path.read_text(encoding="utf-8"))
            assert not found, f"{name}: {found[0]}"
