"The website in a real browser: every page, in both themes and at two widths, and everything on it that reacts."
import functools
import http.server
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from nncomp.container import load
from nncomp.data import load_data
from nncomp.models import create_model

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(p.stem for p in (ROOT / "nbs").glob("*.ipynb")), "404"]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SOME = ("index", "notation", "06_results", "31_huffman", "404")  # the colours are the same on all pages, and measuring them takes long
CONTRAST = PAGES if os.environ.get("NNCOMP_SLOW") else SOME
axe = pytest.importorskip("axe_playwright_python", reason="the browser tests need axe, of the extra `dev`")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright, of the extra `dev`")


class Quiet(http.server.SimpleHTTPRequestHandler):
    "Files of a folder, without a line for each."

    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def address(site):
    "The site, served on this machine."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site[0])))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    "Chromium or Chrome of this machine; nothing is downloaded."
    path = os.environ.get("NNCOMP_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        if os.environ.get("CI") == "true" and os.environ.get("NNCOMP_REQUIRE_BROWSER") == "1":
            pytest.fail("there is no chromium on this machine, and CI promised one")
        pytest.skip("there is no chromium on this machine; install it, or name a browser in NNCOMP_BROWSER")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    "visit(page, width, theme) gives the open page; its faults are in `page.faults`."
    contexts = []

    def open_page(name, width=1280, theme="light", motion="no-preference"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, reduced_motion=motion)
        contexts.append(context)
        page = context.new_page()
        page.faults = []
        page.on("console", lambda m: page.faults.append(f"console: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda e: page.faults.append(f"script: {e}"))
        page.on("requestfailed", lambda r: page.faults.append(f"failed: {r.url}"))
        page.on("response", lambda r: page.faults.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
        page.goto(f"{address}/{name}.html", wait_until="load")
        return page

    yield open_page
    for context in contexts:
        context.close()


def page_name(notebook):
    "`00_core` is `core.html`."
    return notebook.split("_", 1)[-1] if notebook[0].isdigit() else notebook


UNDECODED = """async () => {
  const images = [...document.images];
  for (const i of images) i.loading = "eager";
  await Promise.all(images.map(i => i.decode().catch(() => {})));
  return images.filter(i => !i.naturalWidth).map(i => i.src);
}"""
LOADED = """() => [...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")]
  .reduce((sum, entry) => sum + entry.encodedBodySize, 0)"""
# What lies beyond the window, and in no box that scrolls; the page itself clips it, so that its own width says nothing.
TOO_WIDE = """() => [...document.querySelectorAll("main *")].filter(e => {
  const box = e.getBoundingClientRect();
  if (!box.width || !box.height || box.right <= innerWidth + 1 || (e.ownerSVGElement && e.tagName !== "svg")) return false;
  for (let p = e.parentElement; p; p = p.parentElement)
    if (/auto|scroll/.test(getComputedStyle(p).overflowX) && p.getBoundingClientRect().right <= innerWidth + 1) return false;
  return true;
}).slice(0, 5).map(e => e.outerHTML.slice(0, 120))"""


AXE = """async contrast => (await axe.run(document, {rules: {"color-contrast": {enabled: contrast}}})).violations
  .filter(v => ["serious", "critical"].includes(v.impact))
  .map(v => `${v.id}, ${v.nodes.length} times: ${v.nodes[0].html.slice(0, 150)}; ${v.nodes[0].failureSummary.slice(0, 250)}`)"""


DARK = "document.querySelector('.quarto-dark') !== null"
SETTLED = """async () => {
  await Promise.allSettled(document.getAnimations().filter(a => a instanceof CSSTransition).map(a => a.finished));
}"""


@pytest.mark.parametrize("notebook", PAGES)
def test_pages_are_sound(visit, notebook):
    page = visit(page_name(notebook))
    images = page.evaluate(UNDECODED)
    assert 300_000 < page.evaluate(LOADED) <= 1_500_000
    page.add_script_tag(path=str(Path(axe.__file__).parent / "axe.min.js"))
    assert images == []
    for theme in ("light", "dark"):
        if theme == "dark":
            page.locator(".quarto-color-scheme-toggle").first.click()
        page.wait_for_function(f"({DARK}) === {str(theme == 'dark').lower()}")
        page.evaluate(SETTLED)  # the colours of links change over some frames
        if theme == "light" or notebook in CONTRAST:
            assert page.evaluate(AXE, notebook in CONTRAST) == [], theme
        for width in (390, 1280):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(50)
            assert page.evaluate(TOO_WIDE) == [], (theme, width)
    assert page.faults == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_theme_is_that_of_the_system_until_one_is_chosen(visit, theme):
    page = visit("notation", theme=theme)
    page.wait_for_function(f"({DARK}) === {str(theme == 'dark').lower()}")
    page.locator(".quarto-color-scheme-toggle").first.click()
    page.goto(page.url.replace("notation", "cli"), wait_until="load")
    page.wait_for_function(f"({DARK}) === {str(theme == 'light').lower()}")
    assert page.faults == []


def test_search_finds_a_chapter(visit):
    page = visit("index")
    page.locator("input[type=text], input[type=search]").first.fill("Huffman")
    page.locator(".smalldocs-search-results a", has_text="Huffman").first.wait_for(timeout=10_000)


def test_the_reader_turns_pages(visit):
    page = visit("pruning")
    page.locator(".nav-page-next a, .pagination-link").last.click()
    page.wait_for_url("**/schedules.html")
    page.locator(".nav-page-previous a, .pagination-link").first.click()
    page.wait_for_url("**/pruning.html")
    page.locator("#quarto-sidebar a", has_text="Huffman coding").first.click()
    page.wait_for_url("**/huffman.html")
    assert "Huffman" in page.title() and page.faults == []


def slide(page, root, value):
    "Move the slider of a piece, as the keyboard would."
    slider = root.locator("input[type=range]").first
    slider.evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})); }", value)


def piece(page, kind):
    root = page.locator(f'[data-widget="{kind}"]')
    root.scroll_into_view_if_needed()
    assert root.count() == 1 and not root.locator(".nncomp-elsewhere").is_visible()
    return root, root.locator(".nn-says")


def test_temperature_softens_the_answer(visit):
    page = visit("distillation")
    root, says = piece(page, "temperature")
    before = says.inner_text()
    root.locator("input").focus()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    assert says.inner_text() != before
    slide(page, root, 3)
    share = lambda: float(says.inner_text().split(": ")[1].split(" %")[0])  # noqa: E731
    hot = share()
    slide(page, root, -0.7)
    assert share() > 2 * hot and page.faults == []


def test_a_typed_text_has_its_tree(visit):
    page = visit("huffman")
    root, says = piece(page, "huffman")
    assert "11 letters, 5 different: 23 bits" in says.inner_text()
    root.locator("input").fill("aaaabbc")
    assert "7 letters, 3 different: 10 bits" in says.inner_text() and root.locator("circle").count() == 5
    for text in ("", "z", "zzzz"):
        root.locator("input").fill(text)
    assert "4 letters, 1 different: 4 bits" in says.inner_text() and page.faults == []


def test_a_threshold_takes_weights(visit):
    page = visit("pruning")
    root, says = piece(page, "threshold")
    slide(page, root, 0)
    assert says.inner_text().startswith("0.0 %") and root.locator(".nn-gone").count() == 0
    slide(page, root, 20)
    gone = root.locator(".nn-gone").count()
    slide(page, root, 30)
    assert 0 < gone < root.locator(".nn-gone").count() and page.faults == []


def test_centroids_come_to_rest(visit):
    page = visit("kmeans", motion="reduce")
    root, says = piece(page, "centroids")
    page.evaluate("let s = 1; Math.random = () => (s = s * 16807 % 2147483647) / 2147483647")  # the same start each time
    for start in ("linear", "density", "random"):
        root.locator("select").select_option(start)
        slide(page, root, 3)
        assert "nothing moves any more" in says.inner_text() and root.locator("path.nn-mark").count() == 8
        ratio = float(says.inner_text().split("error ")[1].split(", ")[1].split(" times")[0])
        assert 0.999 <= ratio < 2
    assert page.faults == []


def test_motion_waits_for_leave(visit):
    still = "() => [...document.querySelectorAll('.nncomp-animation input')].map(i => i.value === i.max)"
    page = visit("kmeans", motion="reduce")
    page.wait_for_timeout(1500)
    assert page.evaluate(still) and all(page.evaluate(still))
    page = visit("kmeans")
    page.wait_for_function(f"!({still})().every(Boolean)", timeout=10_000)


def test_a_figure_opens_and_closes(visit):
    page = visit("pruning")
    figure = page.locator("figure.nncomp-fig").first
    small = figure.locator("img").bounding_box()
    figure.get_by_role("button", name="Enlarge the figure").press("Enter")
    large = page.get_by_role("dialog").locator("img")
    assert large.bounding_box()["width"] > 1.2 * small["width"] and large.get_attribute("alt")
    page.keyboard.press("Escape")
    assert not page.get_by_role("dialog").is_visible()
    figure.locator("img").click()
    page.get_by_role("button", name="Close").click()
    assert not page.get_by_role("dialog").is_visible()


@pytest.mark.parametrize("name, kind", [("index", "draw"), ("pruning", "threshold"), ("kmeans", "centroids"), ("huffman", "huffman"),
                                        ("distillation", "temperature")])
def test_without_scripts_the_still_picture_stays(browser, address, name, kind):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{address}/{name}.html")
    picture = page.locator(f'[data-widget="{kind}"] .nncomp-elsewhere img')
    assert picture.is_visible() and len(picture.get_attribute("alt")) > 40
    context.close()


LOGITS = "images => images.map(x => Array.from(nncomp.dense(window.net, ['fc1', 'fc2', 'fc3'], x)))"


def test_the_drawing_is_read(visit):
    page = visit("index")
    root, says = piece(page, "draw")
    root.locator("xpath=self::*[@data-ready='yes']").wait_for(timeout=20_000)
    seen = []
    for _ in range(10):
        root.get_by_text("Draw one for me").click()
        seen.append(says.inner_text().split("It reads ")[1][0])
    assert sum(s == str(i) for i, s in enumerate(seen)) >= 8, seen
    root.get_by_text("Clear").click()
    assert says.inner_text() == "Draw a digit."
    box = root.locator(".nn-pad").bounding_box()
    page.mouse.move(box["x"] + 140, box["y"] + 40)
    page.mouse.down()
    for y in range(40, 240, 20):
        page.mouse.move(box["x"] + 140, box["y"] + y)
    page.mouse.up()
    assert says.inner_text().startswith("It reads 1") and page.faults == []
    assert "266,610 parameters" in root.locator(".nn-facts").inner_text()


def test_the_browser_computes_what_python_computes(visit, mnist_root, monkeypatch):
    monkeypatch.setenv("NNCOMP_DATA", str(mnist_root))
    page = visit("index")
    settings = json.loads(page.locator('[data-widget="draw"] script').first.text_content())
    path = ROOT / settings["file"]
    assert path.stat().st_size == settings["bytes"]
    page.evaluate("async file => { window.net = nncomp.read(await (await fetch(file)).arrayBuffer()); }", settings["file"])
    images = load_data("mnist").test.x[:200]
    with torch.no_grad():
        wanted = load(path, into=create_model("lenet-300-100")).eval()(images)
    found = torch.tensor(page.evaluate(LOGITS, images.flatten(1).tolist()))
    assert float((found - wanted).abs().max()) < 1e-4
    assert torch.equal(found.argmax(1), wanted.argmax(1))
