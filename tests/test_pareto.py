"The Pareto figures with none, one and five records, and their tables against the repository."
import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nncomp.results import Record, _plain, _save_record, config_id, discover, find_experiment

pytest.importorskip("matplotlib").use("Agg")
pytest.importorskip("pandas")
pytest.importorskip("scipy")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs" / "91_pareto.ipynb"


def run(root, monkeypatch):
    "The names of the chapter after its cells have run on the records of `root`, and what its labelled cells show: {label: (HTML, saved)}."
    from matplotlib import pyplot

    monkeypatch.setenv("NNCOMP_RESULTS", str(root))
    names, shown = {}, {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "eval: false" in source or "default_exp" in source or "nbdev_export()" in source:
            continue
        *body, last = ast.parse(source).body
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        if not isinstance(last, ast.Expr):
            exec(compile(ast.Module([last], []), "cell", "exec"), names)
            continue
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
        if source.startswith("#| label: tbl-"):
            saved = [o["data"]["text/html"] for o in cell["outputs"] if "text/html" in o.get("data", {})]
            shown[source.split("\n")[0].removeprefix("#| label: ")] = value._repr_html_(), "".join(sum(saved, []))
        pyplot.close("all")
    return names, shown


def write(root, name, metrics, seeds):
    "Made-up records of the first configuration of an experiment."
    config = find_experiment(name).configs[0]
    fields, = _plain(config, "config").values()
    for k in range(seeds):
        _save_record(Record(name, config_id(config, name), k, fields, metrics(k), None, {}, "", 1, "", 0., ""), root)


def classic(model, k, size):
    return dict(model=model, dataset="mnist", dense_error_percent=1.5 + k / 100, file_bytes=size + k, file_error_percent=1.6 + k / 100,
                stages=[dict(name="dense", file_bytes=9 * size, valid_error_percent=1.)])


def distorted(k):
    "As the record of a sweep: the chosen file twice, one arm that only some seeds have, one without a test error."
    arms = {"kmeans-8": dict(bytes=9_000, error_percent=1.9), "kmeans-32": dict(bytes=20_000 + k, error_percent=1.5)}
    arms["unread"] = dict(bytes=1)
    some = {"price-2": dict(bytes=100, error_percent=1.)} if k else {}
    return dict(model="lenet-300-100", dataset="mnist", file_bytes=8_000 + k, file_error_percent=1.7, arms=arms | some,
                priced=dict(bytes=8_000 + k, error_percent=1.7))


def benchmark(root):
    "A made-up record of benchmarks/checkpoints.py, without ZipNN."
    row = dict(case="a model", dtype="float32", raw=1_000, zip=900, zstd=890, zipnn=None, nncomp=800, error=None)
    about = dict(about={}, commit=None, versions={}, device="", cores=1, threads=1, platform="", date="")
    path = root / "results" / "benchmarks" / "checkpoints.json"
    path.parent.mkdir(parents=True)
    rows = [row | dict(part="lossless"), row | dict(part="shared", nncomp=123, error=0.001)]
    path.write_text(json.dumps(dict(benchmark="checkpoints", rows=rows, **about)))


@pytest.mark.parametrize("seeds", [0, 1, 5])
def test_the_chapter_with_none_one_and_five_records(seeds, tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    for name, model, size in (("classic-lenet-300-100", "lenet-300-100", 18_000), ("classic-lenet-5", "lenet-5", 30_000)):
        write(tmp_path, name, lambda k, model=model, size=size: classic(model, k, size), seeds)
    write(tmp_path, "rate-distortion-lenet-300-100", distorted, seeds)
    write(tmp_path, "report004-lenet-5-small", lambda k: classic("lenet-5-small", k, 5_000) | {"dataset": "digits"}, seeds)
    if seeds == 5:
        benchmark(tmp_path)
    names, shown = run(tmp_path, monkeypatch)
    assert ("a model" in shown["tbl-pareto-lossless"][0]) == ("0.00100" in shown["tbl-pareto-shared"][0]) == (seeds == 5)
    dots = {d.name: d for d in names["dots"]}
    assert len(shown) == 7
    if not seeds:
        assert not dots and "none yet" in shown["tbl-pareto-published"][0] and "not run yet" in shown["tbl-pareto-steps"][0]
        return
    assert set(dots) == {"classic-lenet-300-100", "classic-lenet-5", "report004-lenet-5-small", "rate-distortion-lenet-300-100",
                         "rate-distortion-lenet-300-100, arms/kmeans-8", "rate-distortion-lenet-300-100, arms/kmeans-32"}
    assert dots["rate-distortion-lenet-300-100"].sizes == tuple(8_000 + k for k in range(seeds))
    mine = names["of_net"]("LeNet-300-100", names["dots"])
    assert [d.name for d in mine][:2] == ["rate-distortion-lenet-300-100", "rate-distortion-lenet-300-100, arms/kmeans-8"]
    kept = [mine[i].name for i in names["front"]([d.pair for d in mine])]
    assert kept == ["rate-distortion-lenet-300-100", "classic-lenet-300-100", "rate-distortion-lenet-300-100, arms/kmeans-32"]
    assert "lenet-5-small" in shown["tbl-pareto-others"][0] and "lenet-5-small" not in shown["tbl-pareto-lenet-5"][0]
    assert ("[" in shown["tbl-pareto-steps"][0]) == (seeds > 1)


def test_the_tables_are_those_of_the_repository(monkeypatch):
    "As tests/test_results.py does for the chapters that export."
    for label, (html, saved) in run(ROOT, monkeypatch)[1].items():
        assert html == saved, f"{label} is not what the records say; run tools/run_notebooks.py nbs/91_pareto.ipynb"


@pytest.fixture(scope="module")
def chapter(tmp_path_factory):
    (root := tmp_path_factory.mktemp("empty") / "results").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        return run(root.parent, patch)[0]


@settings(deadline=None, max_examples=100)
@given(pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20))
def test_the_front_is_what_nothing_dominates(chapter, pairs):
    kept = chapter["front"](pairs)
    assert {pairs[i] for i in kept} == {p for p in pairs if not any(chapter["dominates"](q, p) for q in pairs)}
    assert len({pairs[i] for i in kept}) == len(kept) and [pairs[i] for i in kept] == sorted(pairs[i] for i in kept)


def test_the_markers_know_every_chapter_that_has_experiments(chapter):
    from nncomp.plot import COLOURS

    dot = chapter["Dot"]("LeNet-300-100", "mnist", "", "", "", (0,), (1,), (1.,))
    for name in discover():
        assert chapter["_kind_of"](replace(dot, experiment=name)) in COLOURS


def test_every_published_point_is_in_the_bibliography(chapter):
    text = (ROOT / "nbs" / "references.bib").read_text(encoding="utf-8")
    book = NOTEBOOK.read_text(encoding="utf-8")
    for paper in chapter["PAPERS"]:
        assert f"{{{paper.key}," in text and f"@{paper.key}" in book and paper.bytes > 1_000
