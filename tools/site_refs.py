"""Labels, numbers and references in the processed notebooks of the site.

A label is Quarto's: `{#eq-x}` after an equation, `{#sec-x}` after a heading, `#| label: fig-x` on a cell. Numbers count
within a chapter. Quarto resolves `@eq-x` inside one page of a website only, so a reference to another chapter, and to any
section, becomes an ordinary link here, whichever renderer follows.
"""
import functools
import re
from typing import NamedTuple

WORDS = {"fig": "Figure", "tbl": "Table", "eq": "Equation"}
FENCE = r"^[ ]{0,3}(?P<fence>`{3,}|~{3,})[^\n]*\n.*?^[ ]{0,3}(?P=fence)[`~]*[ \t]*$"
SPAN = r"(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)|<!--.*?-->"
MATHS = r"\$\$.+?\$\$|(?<![\\$])\$(?=\S)(?:\\.|[^$\\])+?(?<=\S)\$(?!\d)"
CODE = re.compile(f"{FENCE}|{SPAN}", re.M | re.S)
CODE_AND_MATHS = re.compile(f"{FENCE}|{SPAN}|{MATHS}", re.M | re.S)
LABEL = re.compile(r"\{#((fig|tbl|eq|sec)-[\w-]+)")
CELL_LABEL = re.compile(r"^#\|\s*label:\s*((fig|tbl)-[\w-]+)\s*$", re.M)
HEADING = re.compile(r"^#+\s+(.*?)\s*\{#(sec-[\w-]+)[^}]*\}", re.M)
NAME = r"-?@(?:fig|tbl|eq|sec)-[\w-]*\w"
REFERENCE = re.compile(rf"\[((?:{NAME}[;,]?\s*)+)\](?!\()|(?<![\w@/.]){NAME}")
IN_CODE = re.compile(r"(?<![\w@/.\"'])@((?:fig|tbl|eq|sec)-[\w-]*\w)")
OPTIONS = re.compile(r"^#\|.*$", re.M)
CAPTION = re.compile(r"^#\|\s*(?:fig|tbl)-cap:.*(?:\n#\|\s{3,}.*)*", re.M)
BADGE = re.compile(r"\[!\[Open In Colab\]\([^)]*\)\]\(([^)]*)\)")
NESTED = re.compile(r"\[\[(`[^`\n]+`)\]\([^)\s]*\)\]\(([^)\s]*)\)")
PRIVATE = re.compile(r"\[(`_\w+(?:\(\))?`)\]\([^)\s]*\)")
SHOWN = re.compile(r"^show_doc\(([\w.]+)", re.M)
DEFINED = re.compile(r"^(?:async )?(?:def|class) (\w+)", re.M)
UNITS = re.compile(r"(?<=\d) (?=(?:%|×|[kKMG]i?B\b))|(?<=×) (?=\d)|(?<=\d, (?:sec|fig)\.) (?=\d)|(?<=\d, eq\.) (?=\d)")
LINKED = re.compile(r"\[(`[\w.]+`)\]\(https?://[^)\s]*\)")
SIGNATURE = re.compile(r"```python\n.*?\n```\n+", re.S)


class Target(NamedTuple):
    "What a label stands for: the page that holds it, the kind, and the number or the section's title."
    page: str
    kind: str
    text: str


def text_of(value):
    "A notebook field as one string; notebooks store some as lists of lines."
    return "".join(value) if isinstance(value, list) else value or ""


def outside(skip, change, text):
    "Apply `change` to the stretches of `text` that the pattern `skip` leaves over."
    out, at = [], 0
    for m in skip.finditer(text):
        out += [change(text[at:m.start()]), m[0]]
        at = m.end()
    return "".join(out) + change(text[at:])


def rewrite(nb, change, skip=CODE_AND_MATHS):
    "Apply `change` to the prose of a notebook: Markdown cells, Markdown outputs (docstrings) and captions."
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = outside(skip, change, text_of(cell["source"]))
        elif cell["cell_type"] == "code":
            cell["source"] = CAPTION.sub(lambda m: outside(skip, change, m[0]), text_of(cell["source"]))
            for data in (o["data"] for o in cell["outputs"] if "text/markdown" in o.get("data", {})):
                data["text/markdown"] = outside(skip, change, text_of(data["text/markdown"]))


def labels_of(cell):
    "Yield (label, kind, section title or None) of a cell, in order."
    source = text_of(cell["source"])
    if cell["cell_type"] == "code":
        yield from ((m[1], m[2], None) for m in CELL_LABEL.finditer(source))
        return
    prose = CODE.sub("", source)
    titles = {label: title for title, label in HEADING.findall(prose)}
    yield from ((m[1], m[2], titles.get(m[1])) for m in LABEL.finditer(prose))


def find_labels(notebooks, problems):
    "Number every label of the site: dict of label -> `Target`. A label used twice is a problem."
    found = {}
    for page, nb in notebooks.items():
        counts = dict.fromkeys(WORDS, 0)
        for label, kind, title in (x for cell in nb["cells"] for x in labels_of(cell)):
            if label in found:
                problems.append(f"{page}: the label {label} is used twice")
            if kind in counts:
                counts[kind] += 1
            found[label] = Target(page, kind, title or str(counts.get(kind, label)))
    return found


def link(target, label, page, titles, bare=False):
    "Markdown for a reference to `target` as it reads on `page`; `bare` gives the number alone."
    words = target.text if bare or target.kind == "sec" else f"{WORDS[target.kind]}\u00a0{target.text}"
    if target.page == page:
        return f"[{words}](#{label}){{.quarto-xref}}"
    where = "" if bare or target.kind == "sec" else f" in {titles[target.page]}"
    return f"[{words}{where}]({target.page}.ipynb#{label})"


def resolve(page, nb, labels, titles, problems, here):
    "Replace the references of one notebook by links: all of them, or with `here` false those that Quarto would not resolve."
    def one(name):
        label, bare = name.lstrip("-@"), name.startswith("-")
        if label not in labels:
            problems.append(f"{page}: unknown reference @{label}")
            return name
        target = labels[label]
        return link(target, label, page, titles, bare) if here or target.page != page or target.kind == "sec" else name

    def change(text):
        return REFERENCE.sub(lambda m: ", ".join(one(n) for n in re.findall(NAME, m[0])) if here or not m[1] else group(m), text)

    def group(m):
        done = [one(n) for n in re.findall(NAME, m[1])]
        return m[0] if all(n.lstrip("-").startswith("@") for n in done) else ", ".join(done)

    rewrite(nb, change)
    for cell in nb["cells"]:
        if cell["cell_type"] == "code":
            change = functools.partial(IN_CODE.sub, lambda m: spelled(m, labels, page, titles))
            cell["source"] = outside(OPTIONS, change, text_of(cell["source"]))


def spelled(m, labels, page, titles):
    "A label in a comment or docstring as a reader of the code would say it: `Equation 2`."
    if (target := labels.get(m[1])) is None or target.kind not in WORDS:
        return m[0]
    return f"{WORDS[target.kind]} {target.text}" + (f" in {titles[target.page]}" if target.page != page else "")


def title_of(nb, page):
    "The title that nbdev put in the front matter of a processed notebook, or the page's name."
    m = re.search(r"^title: *(.+)$", text_of(nb["cells"][0]["source"]), re.M)
    return m[1].strip().strip("'\"") if m else page


def plain_links(nb):
    "Make the Colab badge, a picture on another server, a link; a private name, which has no entry, plain code; and of two links one."
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown":
            source = BADGE.sub(r"[Open in Colab](\1){.open-in-colab}", text_of(cell["source"]))
            cell["source"] = PRIVATE.sub(r"\1", NESTED.sub(r"[\1](\2)", source))


def keep_together(nb):
    "No line ends between a number and its unit, or within `28 × 28`."
    rewrite(nb, lambda text: UNITS.sub("\u00a0", text))


def tidy_api(nb):
    "Put the entries of an exported cell's symbols above its source, in order, without repeating the signature that the source shows."
    cells = nb["cells"]
    shown = {m[1]: c for c in cells if c["cell_type"] == "code" and (m := SHOWN.search(text_of(c["source"])))}
    for entry in shown.values():
        for data in (o.get("data", {}) for o in entry["outputs"]):
            text = re.sub(r"^---\n+", "", text_of(data.get("text/markdown")))
            data["text/markdown"] = SIGNATURE.sub(lambda m: LINKED.sub(r"\1", m[0]), text)  # code has no links
    for cell in [c for c in cells if c["cell_type"] == "code" and "Exported source" in text_of(c["source"])]:
        entries = [shown[n] for n in DEFINED.findall(text_of(cell["source"])) if n in shown]
        for entry in entries:
            for data in (o.get("data", {}) for o in entry["outputs"]):
                data["text/markdown"] = SIGNATURE.sub("", data["text/markdown"], count=1)
        cells[:] = [c for c in cells if not any(c is e for e in entries)]
        at = next(i for i, c in enumerate(cells) if c is cell)
        cells[at:at] = entries


def prepare(notebooks, problems, here):
    "Make the processed notebooks ready for a renderer; `here` also resolves what Quarto resolves itself. Returns the labels."
    labels = find_labels(notebooks, problems)
    titles = {page: title_of(nb, page) for page, nb in notebooks.items()}
    for page, nb in notebooks.items():
        plain_links(nb)
        keep_together(nb)
        tidy_api(nb)
        resolve(page, nb, labels, titles, problems, here)
    return labels
