"""Build the website of the book into `_docs/`.

    python tools/build_site.py [--root DIR] [--renderer quarto|smalldocs] [--keep-processed]

nbdev processes the notebooks into `_proc/`; Quarto renders them where it is installed, and the PyPI package smalldocs
elsewhere, after the parts that smalldocs lacks are resolved in the processed copies. Pages ask the network for nothing.
Anything broken or unresolved is listed, and the exit status is 1.
"""
import argparse
import ast
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from site_cells import convert_cells
from site_check import check
from site_icons import lean_icons
from site_pandoc import MATHS, cite, mathml
from site_refs import prepare
from site_sources import fold_sources

ROOT = Path(__file__).resolve().parent.parent
OURS = ("bibliography", "link-citations", "crossref", "execute", "html-math-method", "lightbox")  # done here, not by smalldocs
FONT = re.compile(r"""@import\s*(?:url\(\s*)?(["']?)https?://[^"')]*\1\)?;?""")
BESIDE = re.compile(  # a formula with what must not begin the next line, or end the one before
    r'(?:(?<=[\s>])[(\[“])?(?P<maths><math display="inline"(?:(?!</math>).)*</math>)(?:[.,;:!?)\]”’%]+|-\w+|th\b)'
    r'|(?<=[\s>])[(\[“](?P<alone><math display="inline"(?:(?!</math>).)*</math>)', re.S)
REMOTE = re.compile(r'<(?:script|link(?=[^>]*rel="stylesheet"))\b[^>]*\s(?:href|src)="https?://[^"]*"[^>]*>(?:</script>)?\n?')


def imports_of(cell):
    "The import statements of a cell that holds other code too and is not exported, else None."
    trees = cell.parsed_() if cell.cell_type == "code" and cell.source else None
    imports = [t for t in trees or [] if isinstance(t, (ast.Import, ast.ImportFrom))]
    if not imports or len(imports) == len(trees) or any(d.startswith(("export", "exec_doc", "eval")) for d in cell.directives_):
        return None
    return "\n".join(map(ast.unparse, imports))


def spare_outputs():
    "Let nbdev run no more of a mixed cell than its imports: the page shows the output that was saved with the notebook."
    from nbdev.processors import exec_show_docs

    run = exec_show_docs.__call__

    def call(self, cell):
        imports = imports_of(cell)
        return run(self, cell) if imports is None else self.k.run_cell(imports)

    exec_show_docs.__call__ = call


def lenient_signatures():
    "Let nbdev show an annotation such as \"pd.DataFrame\" as text where the chapter does not import the optional package."
    from fastcore import docments

    strict = docments.signature

    def signature(symbol, **options):
        try:
            return strict(symbol, **options)
        except NameError:
            return strict(symbol, **options | {"eval_str": False})

    docments.signature = signature


def process(root):
    "Let nbdev process the notebooks; gives the folder of the processed copies."
    from nbdev.serve import proc_nbs

    os.chdir(root)
    spare_outputs()
    lenient_signatures()
    fold_sources()
    try:
        return Path(proc_nbs(force=True, n_workers=0)).resolve()
    except Exception as error:  # nbdev names the chapter and the cell, and hides the reason in the cause
        raise SystemExit(f"nbdev stopped. {error}\n{type(error.__cause__).__name__}: {error.__cause__}") from error


def listed(config):
    "The files that the sidebar lists, in order."
    def walk(items):
        for item in items:
            yield from walk(item.get("contents", [])) if isinstance(item, dict) and "contents" in item else [item]

    return [i["href"] if isinstance(i, dict) else i for i in walk(config["website"]["sidebar"]["contents"])]


def read_notebooks(folder, order):
    "The processed notebooks by page name, in the sidebar's order."
    rank = {name: i for i, name in enumerate(order)}
    paths = sorted(folder.glob("*.ipynb"), key=lambda p: (rank.get(p.name, len(rank)), p.name))
    return {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in paths}


def write_notebooks(folder, notebooks):
    "Save the processed notebooks."
    for page, nb in notebooks.items():
        (folder / f"{page}.ipynb").write_text(json.dumps(nb, indent=1, ensure_ascii=False), encoding="utf-8")


def sidebar_problems(config, notebooks):
    "Notebooks that the sidebar does not list, and entries that it lists in vain."
    names, entries = {f"{page}.ipynb" for page in notebooks}, set(listed(config))
    yield from (f"_quarto.yml: {n} is not in the sidebar" for n in sorted(names - entries))
    yield from (f"_quarto.yml: the sidebar lists {n}, which does not exist" for n in sorted(entries - names))


def render_quarto(folder, problems):
    "Render with Quarto; its warnings are problems."
    done = subprocess.run(["quarto", "render", str(folder), "--no-cache"], capture_output=True, text=True)
    problems += [line for line in (done.stdout + done.stderr).splitlines() if "WARN" in line or "ERROR" in line]
    if done.returncode:
        problems.append(f"quarto render failed with {done.returncode}:\n{done.stderr[-2000:]}")


def resolve_for_smalldocs(folder, notebooks, labels, problems):
    "Number, cite and caption in the processed copies."
    for page, nb in notebooks.items():
        convert_cells(page, nb, folder / f"{page}_files", labels, problems)
        cite(page, nb, folder / "references.bib", problems)


def output_names(notebooks):
    "nbdev's `output-file` of each page, taken from the front matter: `00_core` -> `core.html`."
    names = {}
    for page, nb in notebooks.items():
        front = "".join(nb["cells"][0]["source"])
        names[page] = (re.findall(r"^output-file: *(\S+)$", front, re.M) or [f"{page}.html"])[0]
        nb["cells"][0]["source"] = re.sub(r"^output-file:.*\n", "", front, flags=re.M)
    return names


def render_smalldocs(folder, config, notebooks, problems):
    "Render with smalldocs; every warning is a problem."
    from smalldocs import site

    names = output_names(notebooks)
    write_notebooks(folder, notebooks)
    config = {k: v for k, v in config.items() if k not in OURS}
    config["format"] = {"html": {k: v for k, v in config["format"]["html"].items() if k not in OURS}}
    (folder / "_quarto.yml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    problems += [w for w in site.build(folder, quiet=True).warnings if "broken link" not in w]  # site_check finds those
    rename_pages(folder / config["project"]["output-dir"], names)
    for files in folder.glob("*_files"):
        shutil.copytree(files, folder / config["project"]["output-dir"] / files.name)


def rename_pages(out, names):
    "Give each page its `output-file` name, and correct the links to it."
    for page, name in names.items():
        if (out / f"{page}.html").exists():
            (out / f"{page}.html").rename(out / name)
    old = re.compile(rf'(["/])({"|".join(map(re.escape, names))})\.html(?=["#])')
    for path in [*out.rglob("*.html"), out / "search.json"]:
        text = path.read_text(encoding="utf-8")
        path.write_text(old.sub(lambda m: m[1] + names[m[2]], text), encoding="utf-8")


def offline(out):
    "Take out what would ask another server, and the times of the sitemap, which change with every build."
    for path in sorted(out.rglob("*.css")):
        path.write_text(FONT.sub("", path.read_text(encoding="utf-8")), encoding="utf-8")
    for path in sorted(out.rglob("*.html")):
        path.write_text(REMOTE.sub("", path.read_text(encoding="utf-8")), encoding="utf-8")
    if (out / "sitemap.xml").exists():
        text = (out / "sitemap.xml").read_text(encoding="utf-8")
        (out / "sitemap.xml").write_text(re.sub(r"\s*<lastmod>.*?</lastmod>", "", text), encoding="utf-8")


def long_lines(out, most=40):
    """Mark the lines of code and output that may be wider than the page, with the number of blanks that they start with: the
    style sheet breaks them there, where it does. An output that is sentences breaks at any width, one of columns at none."""
    block = re.compile(r"<pre([^>]*)>(<code[^>]*>)(.*?)(</code></pre>)", re.S)
    split = re.compile(r"(<span[^>]*>)([^<]*\n[^<]*)</span>")

    def mark(line):
        text = html.unescape(re.sub(r"<[^>]*>", "", line))
        blanks = len(text) - len(text.lstrip(" "))
        return f'<span class="nn-long" style="--blanks:{blanks}">{line}</span>' if len(text) > most else line

    def one(m):  # a token that spans lines becomes one in each of them
        code = split.sub(lambda t: "\n".join(f"{t[1]}{line}</span>" for line in t[2].split("\n")), m[3])
        inner = [bool(re.search(r"\S {2,}\S", line)) for line in html.unescape(code).split("\n") if line.strip()]
        if not m[1] and len(inner) > 2 and 2 * sum(inner) > len(inner):
            return f'<pre class="nn-columns">{m[2]}{code}{m[4]}'
        lines = "\n".join(map(mark, code.split("\n")))
        return "<pre" + (m[1] or ' class="nn-prose"') + ">" + m[2] + lines + m[4]

    for path in sorted(out.rglob("*.html")):
        path.write_text(block.sub(one, path.read_text(encoding="utf-8")), encoding="utf-8")


def accessible(out):
    "Let the keyboard reach what scrolls or folds: boxes of code, formulas, and the headings of callouts."
    press = "if(event.key==='Enter'||event.key===' '){this.click();event.preventDefault()}"
    for path in sorted(out.rglob("*.html")):
        text = re.sub(r"<pre(?![^>]*tabindex)", '<pre tabindex="0"', path.read_text(encoding="utf-8"))
        text = re.sub(r'<p>(?=\s*<math display="block")', '<p tabindex="0">', text)
        folds = re.compile(r'<div(?=[^>]*data-bs-toggle="collapse")(?![^>]*\brole=)')
        path.write_text(folds.sub(f'<div role="button" tabindex="0" onkeydown="{press}"', text), encoding="utf-8")


def enlargeable(out):
    "Let a click show a figure at the full size of the window, as Quarto's `lightbox` does."
    for path in sorted(out.glob("*.html")):
        text = path.read_text(encoding="utf-8")
        if "nncomp-fig" in text:
            path.write_text(text.replace("</body>", '<script src="js/lightbox.js" defer></script>\n</body>'), encoding="utf-8")


def own_links(out, site_url):
    "Make nbdev's links to the API relative; a method without an entry of its own leads to its class."
    pages = {path.name: path.read_text(encoding="utf-8") for path in sorted(out.glob("*.html"))}
    own = re.compile(rf'href="{re.escape(site_url)}/([^"/#]+\.html)(?:#([^"]*))?"')

    def relative(m):
        name, anchor = m[1], m[2] or ""
        if f'id="{anchor}"' not in pages.get(name, ""):
            anchor = anchor.split(".")[0]
        return f'href="{name}{"#" if anchor else ""}{anchor}"'

    for name, text in pages.items():
        (out / name).write_text(own.sub(relative, text), encoding="utf-8")


def write_maths(out, problems):
    "Put MathML in place of the TeX that smalldocs leaves for a script; the punctuation around a formula stays on its line."
    pages = {path: path.read_text(encoding="utf-8") for path in sorted(out.rglob("*.html"))}
    formulas = {(html.unescape(m[2]), m[1]): None for text in pages.values() for m in MATHS.finditer(text)}
    done = mathml(list(formulas), problems) if formulas else {}
    for path, text in pages.items():
        text = MATHS.sub(lambda m: done[html.unescape(m[2]), m[1]], text)
        path.write_text(BESIDE.sub(r'<span class="nn-together">\g<0></span>', text), encoding="utf-8")


def build(root, renderer, keep=False):
    "Build the site of the repository `root`; gives the list of problems."
    folder, problems = process(root), []
    config = yaml.safe_load((folder / "_quarto.yml").read_text(encoding="utf-8"))
    notebooks = read_notebooks(folder, listed(config))
    problems += sidebar_problems(config, notebooks)
    labels = prepare(notebooks, problems, here=renderer != "quarto")
    if renderer == "quarto":
        write_notebooks(folder, notebooks)
        render_quarto(folder, problems)
    else:
        resolve_for_smalldocs(folder, notebooks, labels, problems)
        render_smalldocs(folder, config, notebooks, problems)
        write_maths(folder / "_docs", problems)
        enlargeable(folder / "_docs")
        long_lines(folder / "_docs")
    out = root / "_docs"
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(folder / config["project"]["output-dir"], out)
    for name in ("models", "results"):  # what the start page decodes, and readers download
        if (root / name).is_dir():
            shutil.copytree(root / name, out / name, ignore=shutil.ignore_patterns(".*"))
    offline(out)
    lean_icons(out)
    accessible(out)
    own_links(out, config["website"]["site-url"])
    if not keep:
        shutil.rmtree(folder)
    return problems + check(out)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository to build (default: this one)")
    parser.add_argument("--renderer", choices=["quarto", "smalldocs"], default="quarto" if shutil.which("quarto") else "smalldocs")
    parser.add_argument("--keep-processed", action="store_true", help="leave _proc/ in place")
    args = parser.parse_args(argv)
    problems = build(args.root.resolve(), args.renderer, args.keep_processed)
    if problems:
        print(f"{len(problems)} problem(s):", *problems, sep="\n  ", file=sys.stderr)
        return 1
    print(f"built {len(list((args.root / '_docs').glob('*.html')))} pages with {args.renderer}: {args.root / '_docs'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
