"The website: built once without Quarto, then read as a reader without a network would meet it."
import ast
import html
import http.server
import json
import re
import sys
import threading
from configparser import ConfigParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from fontTools.ttLib import TTFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

pytest.importorskip("smalldocs", reason="the site's tools come with the extra `dev`")
import build_site  # noqa: E402
import check_links  # noqa: E402
import draw_card  # noqa: E402
import make_readme  # noqa: E402
import site_cells  # noqa: E402
import site_check  # noqa: E402
import site_icons  # noqa: E402
import site_pandoc  # noqa: E402
import site_refs  # noqa: E402
import site_sources  # noqa: E402
from conftest import copy_repository, run_build  # noqa: E402


@pytest.fixture(scope="session")
def pages(site):
    "The text of every page, by name."
    return {p.name: p.read_text(encoding="utf-8") for p in site[0].glob("*.html")}


def config():
    return yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))


def test_the_sidebar_lists_every_notebook():
    names = {p.name for p in (ROOT / "nbs").glob("*.ipynb")}
    entries = build_site.listed(config())
    assert set(entries) == names and len(entries) == len(set(entries))


def test_addresses_agree_with_the_settings():
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    web = config()["website"]
    assert web["repo-url"] == settings["DEFAULT"]["git_url"]
    assert web["site-url"] == settings["DEFAULT"]["doc_host"] + settings["DEFAULT"]["doc_baseurl"]


def test_the_site_builds_without_a_problem(site):
    assert "problem(s)" not in site[1] and site[0].is_dir(), site[1][-4000:]


def test_every_chapter_has_a_page(site, pages):
    modules = [p.stem for p in (ROOT / "nbs").glob("*.ipynb")]
    assert {re.sub(r"^\d+_", "", m) + ".html" for m in modules} <= set(pages)


def test_nothing_is_broken(site):
    assert site_check.check(site[0]) == []


def test_pages_ask_no_other_server(pages):
    for name, text in pages.items():
        assert not re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?(?:https?:)?//", text), name
        assert not re.findall(r"<link[^>]*rel=\"stylesheet\"[^>]*href=[\"']?(?:https?:)?//", text), name


def test_formulas_are_mathml(pages):
    assert '<math display="block"' in pages["core.html"] and "katex" not in pages["core.html"]
    assert '<span class="eq-number">(1)</span>' in pages["core.html"]


def test_figures_are_numbered_and_described(pages):
    for name, text in pages.items():
        captions = re.findall(r'<figure class="nncomp-float nncomp-fig" id="[^"]+">.*?</figure>', text, re.S)
        numbers = [int(re.search(r"<figcaption>\s*<p>Figure\s(\d+): ", c)[1]) for c in captions]
        assert numbers == sorted(numbers) and all(re.search(r'alt="[^"]+" width="\d+" height="\d+"', c) for c in captions), name


def test_labels_become_numbers(pages):
    cells = [c for p in (ROOT / "nbs").glob("*.ipynb") for c in json.loads(p.read_text())["cells"]]
    labels = [x[0] for c in cells for x in site_refs.labels_of(c)]
    assert labels and all(any(f'id="{label}"' in text for text in pages.values()) for label in labels)


def test_citations_lead_to_the_list_of_references(pages):
    for name, text in pages.items():
        for key in re.findall(r'href="#ref-([^"]+)"', text):
            assert f'id="ref-{key}"' in text, (name, key)


def test_every_reference_can_be_found_by_a_reader():
    entries = re.split(r"\n(?=@)", (ROOT / "nbs" / "references.bib").read_text(encoding="utf-8"))
    assert [e.split("\n")[0] for e in entries if not re.search(r"\b(doi|eprint|url|isbn)\s*=", e)] == []


# ---- planted faults: the tool must fail and name them


def notebook(*cells):
    "A minimal notebook of Markdown cells, as nbdev leaves it in `_proc`."
    front = {"cell_type": "raw", "id": "front", "metadata": {}, "source": "---\ntitle: Planted\noutput-file: planted.html\n---\n"}
    prose = [{"cell_type": "markdown", "id": f"m{i}", "metadata": {}, "source": c} for i, c in enumerate(cells)]
    return {"cells": [front, *prose], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def test_planted_faults_make_the_build_fail(tmp_path):
    copy_repository(tmp_path, notebooks=())
    (tmp_path / "nbs" / "404.qmd").unlink(missing_ok=True)
    text = "A [link](nowhere.ipynb), an [anchor](#nothing), @fig-nothing, [@nobody1900] and $\\undefinedmacro{x}$."
    planted = notebook("# Start\n\n> Faults.", text)
    planted["cells"] = planted["cells"][1:]
    (tmp_path / "nbs" / "index.ipynb").write_text(json.dumps(planted))
    settings = config()
    settings["website"]["sidebar"]["contents"] = ["index.ipynb", "missing.ipynb"]
    (tmp_path / "_quarto.yml").write_text(yaml.safe_dump(settings))
    done = run_build(tmp_path)
    assert done.returncode == 1
    wanted = ["broken link: nowhere", "broken anchor: #nothing", "unknown reference @fig-nothing", "unknown citation @nobody1900", "maths:",
              "lists missing.ipynb"]
    assert [w for w in wanted if w not in done.stderr] == [], done.stderr[-3000:]


def test_references_resolve_within_and_across_chapters():
    far = "## Far {#sec-far}\n\n@eq-a-one and [-@eq-a-one], @sec-far, `@eq-a-one`"
    books = {"10_a": notebook("$$x$$ {#eq-a-one}\n\n@eq-a-one"), "20_b": notebook(far)}
    problems = []
    site_refs.prepare(books, problems, here=True)
    assert problems == []
    assert "[Equation\u00a01](#eq-a-one)" in books["10_a"]["cells"][1]["source"]
    far = books["20_b"]["cells"][1]["source"]
    assert "[Equation\u00a01 in Planted](10_a.ipynb#eq-a-one) and [1](10_a.ipynb#eq-a-one)" in far
    assert "[Far](#sec-far)" in far and far.endswith("`@eq-a-one`")


def test_quarto_is_left_the_references_it_resolves_itself():
    books = {"10_a": notebook("$$x$$ {#eq-a-one}\n\n@eq-a-one [@eq-a-one; @eq-a-one]"), "20_b": notebook("@eq-a-one")}
    site_refs.prepare(books, [], here=False)
    assert books["10_a"]["cells"][1]["source"].endswith("@eq-a-one [@eq-a-one; @eq-a-one]")
    assert "10_a.ipynb#eq-a-one" in books["20_b"]["cells"][1]["source"]


def test_citations_skip_code_maths_and_addresses():
    book = notebook("[see @a2015, p. 3; @b] then @c [Eq. 1] [link](x) me@home `@d` $@e$\n\n```\n@f\n```\n")
    assert site_pandoc.citations_of(book) == ["[see @a2015, p. 3; @b]", "@c [Eq. 1]"]


def test_maths_is_converted_in_one_call():
    problems = []
    done = site_pandoc.mathml([(r"\lVert W \rVert_0", "inline"), (r"\begin{cases} 1 & x > 0 \\ 0 \end{cases}", "display")], problems)
    assert problems == [] and all(v.startswith("<math") for v in done.values())


def test_pictures_carry_their_size(tmp_path):
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="72pt" height="36pt"></svg>'
    tag = site_cells.picture({"image/svg+xml": [svg]}, "fig-x", tmp_path / "x_files", 'a "trend"')
    assert 'width="96" height="48"' in tag and "a &quot;trend&quot;" in tag and (tmp_path / "x_files" / "fig-x.svg").read_text() == svg


def test_columns_of_numbers_are_marked():
    rows = "<tr><th>a</th><td>1,024</td><td>x</td></tr><tr><th>b</th><td>1.5 ± 0.2 (5)</td><td>2</td></tr>"
    head = "<thead><tr><th></th><th>bytes</th><th>kind</th></tr></thead>"
    done = site_cells.clean_table(f'<table border="1">{head}<tbody>{rows}</tbody></table>')
    assert done.count('class="num"') == 3 and '<th class="num">bytes</th>' in done and "border" not in done


def test_columns_of_words_may_break_and_code_is_code():
    rows = "".join(f"<tr><td>{text}</td><td>1</td></tr>" for text in ("a network of some length", "`save`"))
    done = site_cells.clean_table(f"<table><thead><tr><th>what</th><th>n</th></tr></thead><tbody>{rows}</tbody></table>")
    assert '<th class="words long" style="--most:24">' in done and "<code>save</code>" in done


def test_an_interval_stays_on_one_line():
    rows = "".join(f"<tr><td>{a}</td><td>{b}</td></tr>" for a, b in (("x", "+0.03 [-0.35, +0.40] no difference"), ("y", "")))
    done = site_cells.clean_table(f"<table><thead><tr><th>a</th><th>gain</th></tr></thead><tbody>{rows}</tbody></table>")
    assert done.count('class="mixed"') == 3 and "+0.03\u00a0[-0.35,\u00a0+0.40] no difference" in done


def test_functions_have_thin_spaces_and_an_index_none():
    done = site_pandoc.mathml([(r"n \log k", "inline"), (r"\log(k)", "inline"), (r"\eta_{\max}", "inline")], [])
    assert [v.count("mspace width") for v in done.values()] == [2, 0, 0]


def test_prose_keeps_units_and_code_spells_labels():
    cells = [{"cell_type": "markdown", "source": "---\ntitle: One\n---"},
             {"cell_type": "markdown", "source": "$$x$$ {#eq-a}\n\n95 % of 28 × 28, [[`fit`](https://a.example)](b.ipynb)"},
             {"cell_type": "code", "source": "#| fig-cap: as in @eq-a\nx = 1  # @eq-a", "outputs": []}]
    site_refs.prepare({"one": {"cells": cells}}, [], here=False)
    assert "95\u00a0% of 28\u00a0×\u00a028, [`fit`](b.ipynb)" in cells[1]["source"]
    assert cells[2]["source"] == "#| fig-cap: as in @eq-a\nx = 1  # Equation 1"


def test_long_lines_are_marked_line_by_line(tmp_path):
    long = "x" * 50
    page = f'<pre class="a"><code class="sourceCode python">  f()\n    <span class="st">{long}\n{long}</span></code></pre>'
    page += f'<pre><code>{long} y</code></pre><pre><code>a    {long}\nbb   1\nc    2</code></pre>'
    (tmp_path / "a.html").write_text(page)
    build_site.long_lines(tmp_path)
    done = (tmp_path / "a.html").read_text()
    assert re.sub("<[^>]*>", "", done) == re.sub("<[^>]*>", "", page)  # the text is what it was
    assert done.count(f'<span class="st">{long}</span></span>') == 2 and "--blanks:4" in done and '<pre class="nn-prose">' in done
    assert f'<pre class="nn-columns"><code>a    {long}\nbb   1\nc    2</code></pre>' in done  # columns stay whole


def test_the_font_of_icons_holds_those_in_use(site):
    style = next((site[0] / "site_libs").rglob("bootstrap-icons*.css"))
    (font,) = style.parent.rglob("bootstrap-icons.woff*")
    glyphs = set(TTFont(font).getBestCmap())
    names, points = site_icons.in_use(site[0], style)
    kept = {m[1]: int(m[2], 16) for m in site_icons.RULE.finditer(style.read_text(encoding="utf-8"))}
    assert {"search", "github", "chevron-right"} <= names <= set(kept)
    assert set(kept.values()) <= glyphs and {int(p, 16) for p in points} <= glyphs and len(glyphs) < 100
    assert style.stat().st_size + font.stat().st_size < 10_000


def test_the_icon_is_drawn_by_code():
    assert (ROOT / "nbs" / "images" / "favicon.svg").read_text(encoding="utf-8") == draw_card.icon()


def cell(source, *marks):
    "A cell as nbdev hands it to its processors."
    return SimpleNamespace(cell_type="code", source=source, directives_=dict.fromkeys(marks), parsed_=lambda: ast.parse(source).body)


def test_helpers_are_shown_folded_and_figures_without_their_code():
    helper = cell("def _f(x): return x\n_A, _B = 1, 2\nclass C: pass\n_D:int = 3", "export")
    site_sources.fold_export(helper)
    site_sources.fold_code(helper)
    assert helper.source.startswith('#| code-fold: true\n#| code-summary: "Source of _f, _A, _B, C, …"\ndef _f')
    for gone in (cell("import math", "export"), cell("def f(): 1", "export", "hide"), cell("x = 1", "default_exp")):
        site_sources.fold_export(gone)
        assert gone.source is None
    shown, figure = cell("def f(): 1", "exports"), cell("#| label: fig-a-b\nplot()")
    own, plain = cell("#| label: tbl-a-b\n#| code-fold: false\nshow()"), cell("f()")
    for each in (shown, figure, own, plain):
        site_sources.fold_export(each)
        site_sources.fold_code(each)
    assert shown.source.startswith('#| code-fold: show\n')
    assert figure.source.startswith('#| code-fold: true\n#| code-summary: "Code of the figure"\n#| label')
    assert own.source.startswith("#| label") and plain.source == "f()"


def test_every_function_and_class_is_shown_in_its_chapter(pages):
    modules = [p for p in sorted((ROOT / "nncomp").glob("*.py")) if not p.stem.startswith("_")]
    for path in modules:
        shown = html.unescape(re.sub(r"<[^>]*>", "", pages[f"{path.stem}.html"]))
        heads = re.findall(r"^(?:def|class) \w+", path.read_text(encoding="utf-8"), re.M)
        assert heads and [h for h in heads if not re.search(rf"{h}\b", shown)] == [], path.stem
    assert len(modules) > 20


def test_of_a_mixed_cell_only_the_imports_run():
    assert build_site.imports_of(cell("import math\nmath.pi")) == "import math"
    assert build_site.imports_of(cell("import math")) is build_site.imports_of(cell("import math\nmath.pi", "exports")) is None


def test_links_to_the_api_become_relative_and_find_an_entry(tmp_path):
    links = [f'<a href="https://a.example/n/core.html#{x}">' for x in ("mask", "mask.clear")]
    (tmp_path / "core.html").write_text('<h3 id="mask">' + "".join(links))
    build_site.own_links(tmp_path, "https://a.example/n")
    assert (tmp_path / "core.html").read_text().count('href="core.html#mask"') == 2


def test_check_finds_requests_and_leftovers(tmp_path):
    loads = '<script src="https://cdn.example/x.js"></script><img src="gone.png" alt="">'
    (tmp_path / "a.html").write_text(f"{loads}<p>see ?@fig-a</p><code>[@ok]</code>")
    (tmp_path / "a.css").write_text('@import url("https://fonts.example/x");')
    faults = "\n".join(site_check.check(tmp_path))
    for word in ("asks another server: https://cdn", "missing file: gone.png", "without alternative", "unresolved", "a.css: asks"):
        assert word in faults
    assert "[@ok]" not in faults


# ---- the README


def test_the_readme_is_the_start_page(capsys):
    assert make_readme.main(["--check"]) == 0, capsys.readouterr().out


def test_readme_shows_code_outputs_and_links_but_no_directives():
    svg = {"output_type": "display_data", "data": {"image/svg+xml": "<svg/>", "text/plain": "<Figure>"}, "metadata": {}}
    frame = {"data": {"text/html": "<table><tr><th>net</th><th>bytes</th></tr><tr><td>a|b</td><td>1,024</td></tr></table>"}}
    book = notebook("See [Pruning](10_pruning.ipynb#why) and @fig-x. $$y$$ {#eq-y}")
    figure = '#| label: fig-x\n#| fig-cap: "**Small.** It is."\ndraw()'
    for source, outputs in [("#| hide\nsecret", []), (figure, [svg]), ("frame", [frame])]:
        book["cells"].append({"cell_type": "code", "source": source, "outputs": outputs})
    text, pictures = make_readme.readme(book, "https://a.example/n")
    assert "secret" not in text and "#|" not in text and "```python\ndraw()\n```" in text
    assert "[Pruning](https://a.example/n/pruning.html#why) and Figure 1. $$y$$" in text and "Figure 1: **Small.** It is." in text
    assert "| net | bytes |\n| --- | ---: |\n| a\\|b | 1,024 |" in text
    assert pictures == {"index_files/fig-x.svg": b"<svg/>"}
    with pytest.raises(ValueError, match="@eq-y"):
        make_readme.readme(notebook("$$y$$ {#eq-y} by @eq-y"), "")


def test_links_that_lead_out_are_listed_and_tried():
    links = check_links.outward()
    assert "https://arxiv.org/abs/1510.00149" in links and len(links) > 50 and links == sorted(set(links))
    assert not any("acme" in link for link in links)

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response({"/here": 200, "/shut": 403}.get(self.path, 404))
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert [check_links.state(f"{address}/{name}") for name in ("here", "shut", "lost")] == ["", "answers 403", "gone"]
        server.shutdown()
