"Every notebook runs as `nbdev_test` runs it, is clean, and follows the house rules that a program can check."
import json
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
RUN = "import sys; from pathlib import Path; from nbdev.test import test_nb; sys.exit(not test_nb(Path(sys.argv[1]))[0])"


def cells(path, kind="code"):
    return [c for c in nbformat.read(path, 4).cells if c.cell_type == kind]


def exported(cell):
    return re.match(r"#\| ?exports?\b", cell.source) is not None


@pytest.mark.parametrize("path", CHAPTERS, ids=[*IDS, "template"])
def test_runs(path):
    done = subprocess.run([sys.executable, "-c", RUN, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


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
        if module.stem != "__init__":
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
