"""Plots: stable bytes, exact counts, colours that can be seen, and a player that behaves."""
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

from nncomp import plot  # noqa: E402
from nncomp.plot import plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SCAN = pd.DataFrame({"layer": ["a.weight"] * 2 + ["b.weight"] * 2, "sparsity": [0.0, 0.5] * 2, "accuracy": [1.0, 0.6, 1.0, 0.4]})
WEIGHTS = torch.randn(3000, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def style():
    plot.use_style()
    yield
    plt.close("all")


def draw_all():
    "One figure from every function that draws."
    after = WEIGHTS * (WEIGHTS.abs() > 0.5)
    history = [dict(epoch=e, loss=1 / e, valid_loss=1.2 / e, accuracy=1 - 0.5 / e) for e in range(1, 6)]
    return {
        "histogram": plot.weight_histogram(WEIGHTS, after, log=True).figure,
        "cdf": plot.weight_cdf(WEIGHTS, after).figure,
        "joint": plot.joint_plot(WEIGHTS, after),
        "small joint": plot.joint_plot(WEIGHTS[:50], after[:50]),
        "band": plot.error_band([1, 2, 3], [[1, 2, 3], [2, 3, 5]]).figure,
        "curves": plot.training_curves([history, history], marks={3: "pruning"}),
        "images": plot.weight_images(WEIGHTS.view(30, 10, 10)).figure,
        "masks": plot.weight_images(WEIGHTS.view(30, 10, 10) > 0).figure,
        "map": plot.sensitivity_map(SCAN).figure,
        "multiples": plot.small_multiples(lambda ax, k: ax.plot([0, k]), [1, 2, 3, 4]),
    }


def test_every_figure_has_stable_bytes_and_is_light(tmp_path):
    first, second = draw_all(), draw_all()
    for name, fig in first.items():
        for suffix in ("svg", "png") if name == "histogram" else ("svg",):
            a, b, c = (tmp_path / f"{k}.{suffix}" for k in "abc")
            plot.save_figure(fig, a)
            plot.save_figure(fig, b)  # the same figure once more
            plot.save_figure(second[name], c)  # the same picture drawn anew
            assert a.read_bytes() == b.read_bytes() == c.read_bytes(), (name, suffix)
            assert a.stat().st_size < 100_000, name


def test_bytes_do_not_depend_on_the_process(tmp_path):
    code = ("import torch; from nncomp import plot; w = torch.arange(-50., 50.); f = plot.weight_histogram(w, w * (w > 3)).figure; "
            "import hashlib; print(hashlib.sha256(plot.figure_svg(f).encode()).hexdigest())")  # without use_style
    env = {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    a, b = (subprocess.run([sys.executable, "-c", code], env=env | {"PYTHONHASHSEED": k}, capture_output=True, text=True, check=True).stdout
            for k in "12")
    assert a == b


def test_svgs_are_wellformed_and_share_no_identifier():
    seen = set()
    for name, fig in draw_all().items():
        svg = plot.figure_svg(fig, 'a "b" < c & d')
        root = ElementTree.fromstring(svg)
        assert root.attrib["aria-label"] == 'a "b" < c & d'
        ids = re.findall(r'\bid="([^"]+)"', svg)
        assert not seen & set(ids), name
        seen |= set(ids)
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= set(ids)
    assert 'aria-hidden="true"' in plot.figure_svg(plot.weight_cdf([1.0]).figure)


def test_compaction_moves_nothing_by_more_than_a_hundredth():
    fig = plot.weight_histogram(WEIGHTS).figure
    fig.draw_without_rendering()
    fig.set_layout_engine("none")
    import io

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "nncomp"}):
        fig.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    number = r"-?\d+\.?\d*"
    places = r'\s[dxy]="([^"]*)"|translate\(([^)]*)\)'
    before, after = ([float(n) for d in re.findall(places, s) for n in re.findall(number, " ".join(d))]
                     for s in (file.getvalue(), plot._compact(file.getvalue())))
    assert len(before) == len(after)
    assert np.abs(np.subtract(before, after)).max() <= 0.0051


def test_palette_is_legible_on_the_pages_of_the_site():
    css = ROOT / "nbs" / "styles.css"
    cards = set(re.findall(r"--nn-card:\s*(#[0-9a-f]{6})", css.read_text())) if css.exists() else set()
    for page in {"#ffffff", "#f4f5f6"} | cards:
        for name, colour in plot.COLOURS.items():
            assert plot.contrast(colour, page) >= 3, (name, page)
    assert set(plot.COLOURS) == set(plot.MARKERS) == set(plot.DASHES)


@given(st.tuples(*[st.floats(0, 1)] * 3), st.tuples(*[st.floats(0, 1)] * 3))
def test_contrast_is_symmetric_and_bounded(a, b):
    a, b = matplotlib.colors.to_hex(a), matplotlib.colors.to_hex(b)
    assert plot.contrast(a, b) == plot.contrast(b, a)
    assert 1 <= plot.contrast(a, b) <= 21.0001


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=60), st.integers(1, 30))
def test_histogram_counts_every_nonzero_weight_once(values, bins):
    ax = plot.weight_histogram(values, std=None, bins=bins)
    assert ax.patches[0].get_data().values.sum() == np.count_nonzero(np.float32(values))
    plt.close("all")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=400))
def test_cdf_passes_through_the_empirical_one(values):
    line = plot.weight_cdf(values).lines[0]
    x, y = line.get_xdata(), line.get_ydata()
    assert len(x) <= 300 and y[-1] == 1 and (np.diff(y) > 0).all() and (np.diff(x) >= 0).all()
    share = [(np.float32(values) <= v).mean() for v in x]
    assert (np.asarray(share) >= y - 1e-9).all()  # equal, except on the lower steps of ties
    plt.close("all")


@pytest.mark.parametrize("weights", [torch.nn.Linear(4, 3), {"a": torch.ones(2, 3), "b": torch.ones(6)}, [torch.ones(5), np.ones(7)],
                                     np.ones((3, 4)), [1.0] * 12, torch.ones(12, dtype=torch.float16), torch.ones(12, dtype=torch.int8),
                                     torch.ones(12, dtype=torch.bfloat16, requires_grad=True)])
def test_weights_come_in_any_form(weights):
    assert plot._flat(weights).shape == (12,)


@pytest.mark.parametrize("call, message", [
    (lambda: plot.weight_histogram([]), "no weights"),
    (lambda: plot.weight_histogram([1.0, float("inf")]), "NaN or infinite"),
    (lambda: plot.weight_cdf([1.0], [1.0], kind="tiny"), "kind must be one of"),
    (lambda: plot.weight_histogram([1.0], bins=0), "bins"),
    (lambda: plot.joint_plot([1.0], [1.0, 2.0]), "same ones"),
    (lambda: plot.error_band([1], [[1, 2]]), "positions"),
    (lambda: plot.training_curves([]), "non-empty"),
    (lambda: plot.training_curves([{"epoch": 1, "loss": 1}], metrics=("f1",)), "no 'f1'"),
    (lambda: plot.weight_images(torch.ones(3)), "(n, h, w)"),
    (lambda: plot.weight_images(torch.ones(1, 2, 2), columns=-1), "columns"),
    (lambda: plot.small_multiples(print, []), "no states"),
    (lambda: plot.sensitivity_map(SCAN.drop(columns="layer")), "without layer"),
    (lambda: plot.animate(print, 0, alt=""), "at least 1 frame"),
])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_save_leaves_nothing_behind_when_it_fails(tmp_path):
    fig = plt.figure()
    with pytest.raises(ValueError, match=r"\.svg or \.png"):
        plot.save_figure(fig, tmp_path / "a.pdf")
    with pytest.raises(ValueError, match="does not exist"):
        plot.save_figure(fig, tmp_path / "no" / "a.svg")
    assert list(tmp_path.iterdir()) == []


def movie(**options):
    fig, ax = plt.subplots()
    point, = ax.plot([0], [0], "o")
    ax.set(xlim=(-1, 5), ylim=(-1, 5))
    return plot.animate(lambda i: point.set_data([i], [i]), 4, fig=fig, alt="a <dot>", **options)


def test_animation_is_stable_self_contained_and_can_be_stopped():
    a, b = movie(), movie()
    page = a._repr_html_()
    assert page == b.html and len(page) < 800_000
    for part in ("prefers-reduced-motion", "<button", 'type="range"', 'alt="a &lt;dot&gt;"', "? 2000 : 167"):
        assert part in page, part
    assert "http" not in page  # nothing is fetched
    assert len(a.frames) == 4 == len(set(a.frames)) and all(f.startswith(b"\x89PNG") for f in a.frames)
    assert "object at" not in repr(a)
    assert plt.get_fignums() == []


def test_animation_limits():
    with pytest.raises(ValueError, match="more than 500;"):
        movie(limit=500)
    with pytest.raises(ValueError, match="lasts at most 10 s"):
        movie(fps=0.1)
    with pytest.raises(ValueError, match="colours"):
        movie(colours=1)


def test_missing_matplotlib_is_one_line():
    code = "import sys; sys.modules['matplotlib'] = None\ntry: import nncomp.plot\nexcept ImportError as e: print(type(e).__name__, e)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.startswith("MissingExtraError matplotlib") and "pip install 'nncomp[book]'" in out.stdout
