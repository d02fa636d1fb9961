"""Results: ids that last, runs that resume, records that cannot drift, and no orphan in the repository."""
import ast
import dataclasses
import functools
import importlib
import inspect
import json
import math
import re
import shutil
import statistics
import symtable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nncomp import results
from nncomp.results import (
    Published,
    Record,
    benchmark_table,
    check_results,
    config_id,
    discover,
    experiment,
    find_experiment,
    load_benchmark,
    load_records,
    mean_sd,
    models_root,
    paired_interval,
    read_record,
    reproduce,
    results_root,
    shipped,
    show_table,
    table,
)

REPOSITORY = Path(__file__).resolve().parent.parent
discover()  # before any test: a module registers its experiments when it is first imported


# ---- the repository itself

def test_repository_has_no_orphan_and_every_number_has_its_run():
    assert check_results(REPOSITORY) == []


def test_repository_records_are_small_and_named_by_registered_experiments():
    names = set(discover())
    for path in (REPOSITORY / "results").glob("*/*/*.json"):
        assert path.parts[-3] in names, path
        assert path.stat().st_size <= 10_000, path
    for path in (REPOSITORY / "models").glob("*.nncomp"):
        pair = shipped(path.stem, REPOSITORY)
        assert pair and pair[1] == path and pair[0].artefact_bytes == path.stat().st_size, path


BENCHMARKS = sorted((REPOSITORY / "results" / "benchmarks").glob("*.json"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda p: p.stem)
def test_every_benchmark_of_the_repository_is_whole_and_shown(path):
    found = load_benchmark(path.stem, REPOSITORY)
    assert found.threads >= 1 and found.cores >= 1 and found.device
    assert {"python", "nncomp", "numpy", "numba", "torch"} <= set(found.versions)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found.date)
    book = [json.loads(p.read_text(encoding="utf-8"))["cells"] for p in (REPOSITORY / "nbs").glob("*.ipynb")]
    code = "".join("".join(cell["source"]) for cells in book for cell in cells)
    assert re.search(rf'(benchmark_table|load_benchmark)\(\s*"{re.escape(path.stem)}"', code), f"no chapter shows {path.name}"


# ---- ids

@dataclass(frozen=True)
class Inner:
    lr: float = 0.1
    name: str = "adam"


@dataclass(frozen=True)
class Config:
    sparsity: float = 0.9
    bits: tuple = (8, 5)
    inner: Inner = Inner(lr=0.5)
    parts: tuple[Inner, ...] = ()
    note: str | None = None
    other: Inner | None = None
    made: tuple = field(default_factory=lambda: (1.5,))


numbers = st.one_of(st.integers(-10**6, 10**6), st.floats(allow_nan=False, allow_infinity=False))
inners = st.builds(Inner, lr=numbers, name=st.text(max_size=5))
configs = st.builds(Config, sparsity=numbers, bits=st.lists(numbers, max_size=3).map(tuple), inner=inners,
                    parts=st.lists(inners, max_size=2).map(tuple), note=st.none() | st.text(max_size=5), other=st.none() | inners)


@settings(deadline=None, max_examples=50)
@given(configs, configs)
def test_equal_configs_and_only_those_share_an_id(a, b):
    same = results._json(results._plain(a, "")) == results._json(results._plain(b, ""))
    assert (config_id(a, "x") == config_id(b, "x")) == same
    assert config_id(a, "x") == config_id(dataclasses.replace(a), "x")
    if a == b:
        assert same


@settings(deadline=None, max_examples=50)
@given(configs)
def test_a_config_survives_its_record(config):
    stored = json.loads(results._json(results._plain(config, "")))
    again = results._rebuild([Config], stored)
    assert again == config and config_id(again, "x") == config_id(config, "x")


@settings(deadline=None, max_examples=50)
@given(configs)
def test_new_option_with_default_renames_nothing(config):
    extended = dataclass(frozen=True)(type("Config", (Config,), {"__annotations__": {"momentum": float}, "momentum": 0.0}))
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    assert config_id(extended(**values), "x") == config_id(config, "x")
    assert config_id(extended(**values, momentum=0.9), "x") != config_id(config, "x")


def test_ids_are_pinned():
    "The ids of committed records must never move."
    assert config_id(Config()) == config_id(Config(), "") == "b0909acb87"
    assert config_id(Config(sparsity=0.5), "x") == "0da4df0263"
    assert config_id(Config(other=Inner(lr=1)), "x") == "fb6b24c836"


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.ones(1), Path("a"), {"a": 1}, {1}, b"x", object()])
def test_values_without_stable_form_are_refused(value):
    with pytest.raises(ValueError, match="no stable JSON form"):
        config_id(Config(note=value))


# ---- a tree of records to break

@dataclass(frozen=True)
class Job:
    size: int = 10
    inner: Inner = Inner()


CALLS = []


def work(config: Job, seed: int, folder: Path) -> dict:
    CALLS.append((config.size, seed))
    (folder / "out.nncomp").write_bytes(bytes([seed]) * config.size)
    return {"error": torch.rand(()).item() + config.size, "nested": {"loss": torch.tensor(float("nan"))}, "artefact": folder / "out.nncomp"}


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(results, "_EXPERIMENTS", dict(results._EXPERIMENTS))
    CALLS.clear()
    experiment("test-job", configs=[Job(), Job(size=20)])(work)


@pytest.fixture
def tree(tmp_path):
    reproduce("test-job", 2, root=tmp_path, progress=False)
    assert check_results(tmp_path) == []
    return tmp_path


def first(tree):
    return tree / "results" / "test-job" / config_id(Job(), "test-job") / "seed-0.json"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


MUTATIONS = {
    "config edited": lambda t: edit(first(t), config={"size": 11, "inner": {"Inner": {"lr": 0.1, "name": "adam"}}}),
    "nested config edited": lambda t: edit(first(t), config={"size": 10, "inner": {"Inner": {"lr": 0.2, "name": "adam"}}}),
    "config with unknown option": lambda t: edit(first(t), config={"size": 10, "colour": 1}),
    "config with unknown class": lambda t: edit(first(t), config={"size": 10, "inner": {"Outer": {}}}),
    "config is a list": lambda t: edit(first(t), config=[1]),
    "id edited": lambda t: edit(first(t), id="0123456789"),
    "seed edited": lambda t: edit(first(t), seed=5),
    "other experiment's name": lambda t: edit(first(t), experiment="test-other"),
    "unknown key": lambda t: edit(first(t), colour="red"),
    "not JSON": lambda t: first(t).write_text("{"),
    "not UTF-8": lambda t: first(t).write_bytes(b"\xff\xfe{}"),
    "JSON of another kind": lambda t: first(t).write_text("[1, 2]"),
    "deeply nested JSON": lambda t: first(t).write_text("[" * 9000),
    "empty": lambda t: first(t).write_text(""),
    "too large": lambda t: first(t).write_text(first(t).read_text() + " " * 10_000),
    "wrong file name": lambda t: first(t).rename(first(t).with_name("seed-x.json")),
    "wrong folder": lambda t: first(t).parent.rename(first(t).parent.with_name("0123456789")),
    "orphan experiment": lambda t: (t / "results" / "test-job").rename(t / "results" / "test-gone"),
    "stray file": lambda t: (t / "results" / "notes.txt").write_text("hm"),
    "stray model": lambda t: (t / "models" / "stray.nncomp").write_bytes(b""),
    "model without record": lambda t: shutil.rmtree(t / "results"),
    "model missing": lambda t: (t / "models" / "test-job.nncomp").unlink(),
    "model changed": lambda t: (t / "models" / "test-job.nncomp").write_bytes(b"!" * 10),
    "sha256 edited": lambda t: edit(first(t), artefact_sha256="0" * 64),
    "shipped seed's record gone": lambda t: first(t).unlink(),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_check_results_finds(name, tree):
    MUTATIONS[name](tree)
    problems = check_results(tree)
    assert problems and all("\n" not in p for p in problems), name


@pytest.mark.parametrize("name", ["config edited", "not JSON", "too large", "model changed", "sha256 edited", "wrong folder"])
def test_load_records_refuses(name, tree):
    MUTATIONS[name](tree)
    with pytest.raises(ValueError):
        load_records("test-job", tree)


def test_readmes_and_gitkeeps_are_no_orphans(tree):
    for folder in ("results", "models"):
        (tree / folder / "README.md").write_text("hello")
        (tree / folder / ".gitkeep").touch()
    assert check_results(tree) == []
    assert check_results(tree / "nowhere") == []


def test_default_that_moves_is_noticed(tree):
    @dataclass(frozen=True)
    class Moved:
        size: int = 12
        inner: Inner = Inner()

    Moved.__name__ = "Job"
    results._EXPERIMENTS["test-job"] = dataclasses.replace(find_experiment("test-job"), config_class=Moved)
    with pytest.raises(ValueError, match="was a default or the record changed"):
        load_records("test-job", tree)


# ---- running

def test_record_holds_what_a_reader_needs(tree):
    text = first(tree).read_text()
    record = read_record(first(tree))
    assert list(json.loads(text)) == sorted(json.loads(text)) and len(text.encode()) <= 10_000
    assert set(record.versions) == {"python", "torch", "numpy", "nncomp"} and record.threads >= 1 and record.device
    assert record.metrics["nested"] == {"loss": None}  # NaN is null
    assert (record.artefact, record.artefact_bytes) == ("out.nncomp", 10)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", record.date)
    assert record.commit is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", record.commit)
    assert str(tree) not in text and str(Path.home()) not in text


def test_nothing_runs_twice_and_missing_runs_are_added(tree):
    CALLS.clear()
    assert len(reproduce("test-job", 2, root=tree, progress=False)) == 4 and not CALLS
    reproduce("test-job", [7], root=tree, progress=False)
    assert CALLS == [(10, 7), (20, 7)]
    assert [r.seed for r in load_records("test-job", tree)] == [0, 1, 7, 0, 1, 7]
    assert check_results(tree) == []


def test_force_starts_from_an_empty_folder(tree):
    before = read_record(first(tree))
    folder = tree / "runs" / "test-job" / before.id / "seed-0"
    (folder / "checkpoint").touch()
    after = reproduce("test-job", [0], root=tree, force=True, progress=False)[0]
    assert not (folder / "checkpoint").exists() and after.metrics == before.metrics


def test_every_run_starts_from_its_seed(tmp_path, tree):
    "The order of runs does not matter."
    other = tmp_path / "other"
    reproduce("test-job", [1], root=other, progress=False)
    assert [r.metrics for r in load_records("test-job", other)] == [r.metrics for r in load_records("test-job", tree) if r.seed == 1]


def test_lowest_seed_is_shipped_also_when_it_comes_late(tmp_path):
    reproduce("test-job", [3, 4], root=tmp_path, progress=False)
    assert (tmp_path / "models" / "test-job.nncomp").read_bytes() == b"\x03" * 10
    reproduce("test-job", [1, 2], root=tmp_path, progress=False)
    assert (tmp_path / "models" / "test-job.nncomp").read_bytes() == b"\x01" * 10
    assert check_results(tmp_path) == []


def test_designated_seed_is_shipped(tmp_path):
    experiment("test-job", artefact=2, configs=[Job()])(work)
    reproduce("test-job", [0, 1], root=tmp_path, progress=False)
    assert shipped("test-job", tmp_path) is None and not (tmp_path / "models").exists()
    reproduce("test-job", 3, root=tmp_path, progress=False)
    assert shipped("test-job", tmp_path)[0].seed == 2
    assert (tmp_path / "models" / "test-job.nncomp").read_bytes() == b"\x02" * 10


def halting(config: Job, seed: int, folder: Path) -> dict:
    "Is interrupted the first time."
    if not (folder / "half").exists():
        (folder / "half").touch()
        raise KeyboardInterrupt
    return {"error": 1.0}


def test_interrupted_run_resumes_and_reports_all_its_seconds(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(results.time, "perf_counter", lambda: now[0])

    def slow(config: Job, seed: int, folder: Path) -> dict:
        now[0] += 5
        return halting(config, seed, folder)

    experiment("test-slow")(slow)
    with pytest.raises(KeyboardInterrupt):
        reproduce("test-slow", root=tmp_path, progress=False)
    assert load_records("test-slow", tmp_path) == [] and check_results(tmp_path) == []
    assert reproduce("test-slow", root=tmp_path, progress=False)[0].seconds == 10


def test_a_run_is_not_taken_up_under_other_defaults(tmp_path):
    "The name of its folder is a hash of what differs from the defaults, and stays when one of them changes."
    experiment("test-halting")(halting)
    with pytest.raises(KeyboardInterrupt):
        reproduce("test-halting", root=tmp_path, progress=False)
    begun, = tmp_path.glob("runs/test-halting/*/seed-0/config.json")
    settings = json.loads(begun.read_text())
    begun.write_text(json.dumps({**settings, "Job": {**settings["Job"], "size": -1}}))
    with pytest.raises(ValueError, match="begun with other settings"):
        reproduce("test-halting", root=tmp_path, progress=False)
    begun.write_text(json.dumps({"Job": {k: v for k, v in settings["Job"].items() if k != "size"}}))  # by a version without this option
    assert reproduce("test-halting", root=tmp_path, progress=False)[0].metrics == {"error": 1.0}


@pytest.mark.parametrize("metrics, message", [({"x": object()}, "cannot be recorded"), ({"x": [0.123456] * 2000}, "put long lists"),
                                              ({"artefact": Path(__file__)}, "must lie in the run's folder")])
def test_a_run_that_cannot_be_recorded_leaves_no_record(metrics, message, tmp_path):
    def bad(config: Job, seed: int, folder: Path) -> dict:
        return metrics

    experiment("test-bad")(bad)
    with pytest.raises(ValueError, match=message):
        reproduce("test-bad", root=tmp_path, progress=False)
    assert not list(tmp_path.glob("results/**/*.json")) and not (tmp_path / "models").exists()


def test_registration_errors():
    def untyped(config, seed, folder): return {}
    def short(config: Job): return {}

    @dataclass
    class Thawed:
        size: int = 1

    def thawed(config: Thawed, seed, folder): return {}
    for run in (untyped, short, thawed):
        with pytest.raises(ValueError, match="frozen dataclass"):
            experiment("test-x")(run)
    with pytest.raises(ValueError, match="already registered"):
        experiment("test-job")(_impostor)
    for name in ("", "A", "../up", "a b", ".hidden", "a/b", "benchmarks"):
        with pytest.raises(ValueError, match="name is made of"):
            experiment(name)
    with pytest.raises(ValueError, match="needs configs"):
        experiment("test-y", configs=[])(work)
    with pytest.raises(ValueError, match="no experiment 'nope'; there are: .*test-job"):
        reproduce("nope")


def _impostor(config: Job, seed: int, folder: Path) -> dict:
    return {}


def test_roots(tmp_path, monkeypatch):
    assert results_root(tmp_path) == tmp_path / "results" and models_root(str(tmp_path)) == tmp_path / "models"
    monkeypatch.delenv("NNCOMP_RESULTS", raising=False)
    monkeypatch.chdir(REPOSITORY / "nbs")
    assert results_root() == REPOSITORY / "results"
    monkeypatch.chdir(tmp_path)
    assert results_root() == Path.cwd() / "results"
    monkeypatch.setenv("NNCOMP_RESULTS", str(tmp_path / "elsewhere"))
    assert models_root() == tmp_path / "elsewhere" / "models"


# ---- numbers

@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12))
def test_mean_sd_rounds_both_to_two_digits_of_the_deviation(values):
    text = mean_sd(values)
    mean, sd, n = re.fullmatch(r"(-?[\d,.]+(?:e-\d+)?) ± ([\d,.]+) \((\d+)\)", text).groups()
    true = statistics.stdev(values)
    assert int(n) == len(values)
    if len(set(values)) > 1 and true > 1e-12:
        place = 10.0 ** (math.floor(math.log10(true)) - 1)
        assert abs(float(sd.replace(",", "")) - true) <= place * 0.51
        assert abs(float(mean.replace(",", "")) - statistics.fmean(values)) <= place * 5.1
        digits = sd.replace(",", "").replace(".", "").strip("0")
        assert len(digits) <= 2 and len(mean.partition(".")[2]) == len(sd.partition(".")[2])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(-100, 100), st.floats(-100, 100)), min_size=2, max_size=10), st.floats(0.5, 0.99))
def test_paired_interval_is_scipys(pairs, level):
    stats = pytest.importorskip("scipy.stats")
    a, b = zip(*pairs)
    low, high = paired_interval(a, b, level)
    d = [x - y for x, y in pairs]
    assert low <= statistics.fmean(d) + 1e-9 and high >= statistics.fmean(d) - 1e-9
    if statistics.stdev(d) > 1e-6:
        oracle = stats.ttest_rel(a, b).confidence_interval(level)
        assert math.isclose(low, oracle.low, rel_tol=1e-6, abs_tol=1e-6) and math.isclose(high, oracle.high, rel_tol=1e-6, abs_tol=1e-6)


def test_table_from_records(tree):
    pytest.importorskip("pandas")
    records = load_records("test-job", tree)
    small = [r for r in records if r.config["size"] == 10]
    columns = {"error": "error", "bytes": lambda r: r.artefact_bytes, "file": lambda r: r.artefact, "loss": "nested.loss",
               "error, theirs": Published({"small": "1.64"}, "Han 2016")}
    frame = table({"small": small, "theirs": None}, columns, digits={"error": 1})
    assert list(frame) == ["model", "error", "bytes", "file", "loss", "error, theirs (published: Han 2016)", "run"]
    values = [r.metrics["error"] for r in small]
    sd = statistics.stdev(values)
    assert frame.iloc[0].tolist() == ["small", f"{statistics.fmean(values):.1f} ± {sd:.1f} (2)", "10 ± 0 (2)", "out.nncomp",
                                      "–; 2 failed", "1.64", f"test-job/{config_id(Job(), 'test-job')}"]
    assert frame.iloc[1].tolist() == ["theirs", "", "", "", "", "", ""]
    page = show_table(frame).to_html()
    assert page == show_table(frame.copy()).to_html() and "1.64" in page
    for rows, message in (({"mixed": records}, "mixes 2 configurations"), ({"none": []}, "has no records")):
        with pytest.raises(ValueError, match=message):
            table(rows, columns)
    with pytest.raises(ValueError, match="nncomp reproduce test-job"):
        table({"none": "test-job"}, columns, root=tree / "nowhere")
    with pytest.raises(ValueError, match="no metric 'accuracy'"):
        table({"small": small}, {"x": "accuracy"})


def test_text_in_a_row_must_agree():
    pytest.importorskip("pandas")
    records = [Record("a", "b", k, {}, {"name": n}, None, {}, "", 1, "", 0.0, "") for k, n in enumerate("xy")]
    with pytest.raises(ValueError, match="must agree"):
        table({"a": records}, {"name": "name"})


# ---- benchmarks

@pytest.fixture
def records(monkeypatch):
    "The helper of the benchmark scripts."
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module("records")


def test_a_benchmark_is_written_read_and_shown(records, tree):
    (tree / "benchmarks").mkdir()
    (tree / "benchmarks" / "toy.py").touch()
    rows = [{"case": "a", "ratio": 1 / 3, "bits": np.int64(7), "gone": float("nan")},
            {"case": "b", "ratio": np.float32(2), "bits": 12345, "extra": [1, 2]}]
    path = records.write("toy", rows, packages=["pandas"], versions={"rival": "1.0"}, threads=2, root=tree, repeats=9)
    assert path == tree / "results" / "benchmarks" / "toy.json" and path.read_text().endswith("}\n") and not list(path.parent.glob(".*"))
    found = load_benchmark("toy", tree)
    assert found.rows == [{"case": "a", "ratio": 0.333333, "bits": 7, "gone": None},
                          {"case": "b", "ratio": 2.0, "bits": 12345, "extra": [1, 2]}]
    assert found.threads == 2 and found.about == {"repeats": 9} and {"rival", "pandas", "numba", "torch", "nncomp"} <= set(found.versions)
    assert "2 threads" in found.line() and "rival 1.0" in found.line() and found.device in found.line() and found.date in found.line()
    assert check_results(tree) == []
    pytest.importorskip("pandas")
    columns = {"case": "case", "r": "ratio", "bits": "bits", "gone": "gone", "x": lambda r: "yes"}
    frame = benchmark_table("toy", columns, digits={"r": 2}, root=tree)
    assert frame.values.tolist() == [["a", "0.33", "7", "–", "yes"], ["b", "2.00", "12,345", "–", "yes"]]
    assert benchmark_table("toy", {"r": "ratio"}, where=lambda r: r["case"] == "b", root=tree).values.tolist() == [["2.00"]]
    with pytest.raises(ValueError, match="no row of toy has 'speed'"):
        benchmark_table("toy", {"r": "speed"}, root=tree)
    for bad in ([], [{"text": "x" * 10_000}]):
        with pytest.raises(ValueError):
            records.write("toy", bad, root=tree)
    assert load_benchmark("toy", tree) == found  # a refused record leaves the old one


@pytest.mark.parametrize("value, text", [(0, "0"), (0.0, "0"), (7, "7"), (17_000_000, "17,000,000"), (1234.5, "1,234"),
                                         (12.345, "12.3"), (0.98765, "0.988"), (0.0012345, "0.00123"), (-1.5, "-1.50"),
                                         (None, "–"), ("x", "x")])
def test_numbers_of_a_benchmark(value, text):
    assert results._number(value, None) == text


def test_benchmarks_that_are_wrong_are_found(records, tree):
    for name in ("toy", "other"):
        (tree / "benchmarks").mkdir(exist_ok=True)
        (tree / "benchmarks" / f"{name}.py").touch()
    path = records.write("toy", [{"a": 1}], root=tree)
    good = path.read_text()
    data = json.loads(good)
    changes = [{"rows": []}, {"rows": [1]}, {"rows": None}, {"colour": 1}, {"benchmark": "other"}]
    short = {k: v for k, v in data.items() if k != "device"}
    for bad in ("", "[]", "{", "[" * 5000, good + " " * 10_000, json.dumps(short), *(json.dumps(data | change) for change in changes)):
        path.write_text(bad)
        with pytest.raises(ValueError, match="not a valid benchmark"):
            load_benchmark("toy", tree)
        assert len(check_results(tree)) == 1
    path.write_text(good)
    for stray in ("gone.json", "toy.txt", "folder/toy.json"):
        other = path.parent / stray
        other.parent.mkdir(exist_ok=True)
        other.write_text(good)
        assert len(check_results(tree)) == 1, stray
        other.unlink()
    with pytest.raises(ValueError, match="python benchmarks/nothing.py --record"):
        load_benchmark("nothing", tree)


def test_rivals_live_elsewhere(records, tmp_path, monkeypatch):
    monkeypatch.setenv("NNCOMP_BENCH", str(tmp_path))
    assert records.rival_python("huffman") is None
    (tmp_path / "bench-huffman" / "bin").mkdir(parents=True)
    (tmp_path / "bench-huffman" / "bin" / "python").touch()
    assert records.rival_python("huffman") == tmp_path / "bench-huffman" / "bin" / "python"


CHANGES = ("add", "append", "extend", "insert", "pop", "setdefault", "update")
SHOWN = re.compile(r"^#\| label: (tbl-[\w-]+)", re.M)


def uses(function, code=None):
    "The functions of the package that a function names, itself or in a function inside it."
    code = code or function.__code__
    found = {f for f in map(function.__globals__.get, code.co_names) if inspect.isfunction(f) and f.__module__.startswith("nncomp.")}
    return found.union(*(uses(function, c) for c in code.co_consts if hasattr(c, "co_names")))


@functools.cache
def readers(module):
    "Names in a module of the functions that read records, at whatever depth."
    graph, todo = {}, [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__.startswith("nncomp.")]
    while todo:
        if (f := todo.pop()) not in graph:
            graph[f] = uses(f)
            todo += graph[f]
    found = {load_records, load_benchmark}
    while more := {f for f, used in graph.items() if used & found} - found:
        found |= more
    return {n for n, f in vars(module).items() if inspect.isfunction(f) and f in found}


def in_order(node):
    "The names in a syntax tree, roughly as they are evaluated."
    fields = {ast.Assign: ("value", "targets"), ast.NamedExpr: ("value", "target"), ast.For: ("iter", "target", "body", "orelse"),
              ast.ListComp: ("generators", "elt"), ast.GeneratorExp: ("generators", "elt"), ast.SetComp: ("generators", "elt"),
              ast.DictComp: ("generators", "key", "value"), ast.comprehension: ("iter", "target", "ifs")}.get(type(node), node._fields)
    if isinstance(node, ast.Name):
        yield node
    for part in fields:
        value = getattr(node, part, None)
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from in_order(child)


@functools.cache
def names_of(statement):
    "What a statement of a notebook defines or changes, and what it uses, arguments and names inside comprehensions left out."
    def inside(scope):
        return {x.get_name() for x in scope.get_symbols() if x.is_referenced() and x.is_global()}.union(*map(inside, scope.get_children()))

    top = symtable.symtable(ast.unparse(statement), "cell", "exec")
    made = {x.get_name() for x in top.get_symbols() if x.is_assigned() or x.is_imported()}
    used = {x.get_name() for x in top.get_symbols() if x.is_referenced()}.union(*map(inside, top.get_children()))
    for node in ast.walk(statement):                                   # rows.append(…), frame["x"] = …
        call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES
        inner = node.func if call else node
        while isinstance(inner, (ast.Subscript, ast.Attribute)) and (call or isinstance(node.ctx, ast.Store)):
            inner = inner.value
        if inner is not node and isinstance(inner, ast.Name):
            made.add(inner.id)
    first = {}
    for node in in_order(statement):
        first.setdefault(node.id, isinstance(node.ctx, ast.Store) and not isinstance(statement, ast.AugAssign))
    return made, {name for name in used if not (name in made and first.get(name))}


def notebook_statements(path):
    "(cell, statement) of the code that is not exported, in order, and the module that the rest is exported to."
    module, found = None, []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            continue
        if named := re.match(r"#\| ?default_exp (\w+)", source):
            module = named[1]
        elif not re.match(r"#\| ?exports?\b", source) and "eval: false" not in source and not re.search(r"^[!%]", source, re.M):
            found += [(cell, statement) for statement in ast.parse(source).body]
    return module, found


def sliced(statements, at, known):
    "The statements that the cell at `at` needs, its own included; names in `known` come from elsewhere."
    cell = statements[at][0]
    kept, needed, later = [], set(), None
    while needed != later:                                             # again, for functions that use what is defined below them
        later, kept = needed, []
        for other, statement in reversed(statements[:at + 1]):
            made, used = names_of(statement)
            if other is cell or made & needed:
                kept.append(statement)
                needed = needed | (used - known)
    return kept[::-1]


def record_cells():
    "Every saved cell of the book that shows committed records: (module, statements it needs, its outputs)."
    for path in sorted((REPOSITORY / "nbs").glob("*.ipynb")):
        module, statements = notebook_statements(path)
        module = importlib.import_module(f"nncomp.{module or 'results'}")     # pages without a module of their own show records, too
        last = {id(cell): i for i, (cell, _) in enumerate(statements)}
        for i, (cell, _) in enumerate(statements):
            source = "".join(cell["source"])
            shown = [o for o in cell["outputs"] if "text/html" in o.get("data", {}) or o["output_type"] == "stream"]
            if last[id(cell)] != i or not shown:
                continue
            needed = sliced(statements, i, set(vars(module)))
            used = set().union(*(names_of(s)[1] for s in needed))
            local = set().union(*(names_of(s)[0] for s in needed if not isinstance(s, (ast.Import, ast.ImportFrom))))
            read = (used - local) & (readers(module) | readers(results))
            label = SHOWN.search(source)
            if read and not used & {"mkdtemp", "tempfile", "fit", "reproduce"} and (label or "print" in source):
                yield pytest.param(module, needed, cell, id=f"{path.stem}-{label[1] if label else cell['id']}")


@pytest.mark.parametrize("module, statements, cell", list(record_cells()))
def test_what_the_book_shows_of_records_is_in_them(module, statements, cell, capsys):
    names = vars(importlib.import_module("fastcore.test")) | vars(module)
    *before, last = statements if isinstance(statements[-1], ast.Expr) else [*statements, ast.parse("None").body[0]]
    exec(compile(ast.Module(before, []), "cells", "exec"), names)
    shown = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    html = ["".join(o["data"]["text/html"]) for o in cell["outputs"] if "text/html" in o.get("data", {})]
    printed = "".join("".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream")
    assert html == ([] if shown is None else [shown._repr_html_()])
    assert capsys.readouterr().out == printed


def test_a_record_that_is_too_long_ships_nothing(tmp_path):
    @experiment("test-too-long")
    def run(config: Inner, seed: int, folder: Path) -> dict:
        path = folder / "a.bin"
        path.write_bytes(bytes([seed]))
        return dict(many=list(range(9999)), artefact=path)
    with pytest.raises(ValueError, match="takes"):
        reproduce("test-too-long", root=tmp_path, progress=False)
    assert not (tmp_path / "models").exists()
    assert load_records("test-too-long", tmp_path) == []


def test_what_is_shipped_is_the_lowest_seed_that_has_a_file(tmp_path):
    @experiment("test-some-files")
    def run(config: Inner, seed: int, folder: Path) -> dict:
        path = folder / "a.bin"
        path.write_bytes(bytes([seed]))
        return dict(value=seed) | (dict(artefact=path) if seed else {})
    reproduce("test-some-files", seeds=3, root=tmp_path, progress=False)
    assert (tmp_path / "models" / "test-some-files.bin").read_bytes() == b"\x01"
    assert [r.seed for r in load_records("test-some-files", tmp_path)] == [0, 1, 2]
