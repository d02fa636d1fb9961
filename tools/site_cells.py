"Figures, tables and equations of the processed notebooks, as Markdown that smalldocs renders the way Quarto does."
import base64
import html
import re
import struct

import yaml
from bs4 import BeautifulSoup
from site_refs import CODE, WORDS, outside, text_of

EQUATION = re.compile(r"\s*\$\$(.+?)\$\$\s*\{#(eq-[\w-]+)\}[ ]*", re.S)
CAPTIONED = re.compile(r"^(?P<colon>(?:[Tt]able)?:[ ]+)[^\n]*\{#(?P<table>tbl-[\w-]+)|!\[[^\]]+\]\([^)]*\)\{#(?P<figure>fig-[\w-]+)", re.M)
OPTION = re.compile(r"^#\|[^\n]*\n?", re.M)
IMAGES = {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpg", "image/gif": "gif"}
OURS = ("label", "fig-cap", "fig-alt", "tbl-cap")
NUMBER = re.compile(r"[-−+<≤≥≈]?\s*(?:\d[\d.,\s±×→%()kKMGiBx/–-]*)?$")
INTERVAL = re.compile(r"(?:\S+ )?\[[^\]]*\]|\S+ ± \S+(?: \(\d+\))?")
TICKS = re.compile(r"`([^`<>\n]+)`")
PX = {"pt": 4 / 3, "px": 1, "in": 96, "": 1}


def options_of(source):
    "The `#|` options of a cell as a dict."
    lines = "\n".join(line[2:].removeprefix(" ") for line in OPTION.findall(source) if ":" in line or line.startswith("#|  "))
    found = yaml.safe_load(lines) or {}
    return found if isinstance(found, dict) else {}


def raw(content):
    "HTML that the Markdown parser passes through untouched."
    return f"\n\n```{{=html}}\n{content}\n```\n\n"


def number_labels(text, labels):
    "Give each labelled equation its anchor and its number, and captions written in Markdown theirs."
    def block(m):
        number = labels[m[2]].text
        return f'\n\n::: {{#{m[2]} .equation}}\n$$\n{m[1].strip()}\n$$\n\n[({number})]{{.eq-number}}\n:::\n\n'

    def caption(m):
        label = labels[m["table"] or m["figure"]]
        words = f"{WORDS[label.kind]}\u00a0{label.text}: "
        return f"{m['colon'] or '!['}{words}{m[0].removeprefix(m['colon'] or '![')}"

    return CAPTIONED.sub(caption, EQUATION.sub(block, text))


def svg_size(text):
    "Width and height of an SVG in pixels, from its first tag."
    pair = [re.search(rf'<svg[^>]*?\s{side}="([\d.]+)(\w*)"', text) for side in ("width", "height")]
    return [round(float(m[1]) * PX.get(m[2], 1)) for m in pair] if all(pair) else None


def size_attributes(mime, data):
    "`width` and `height` of a picture, so that the page does not jump when it loads."
    size = None
    if mime == "image/svg+xml":
        size = svg_size(data.decode("utf-8"))
    elif mime == "image/png":
        size = struct.unpack(">II", data[16:24])
    elif mime == "image/gif":
        size = struct.unpack("<HH", data[6:10])
    return f' width="{size[0]}" height="{size[1]}"' if size else ""


def picture(data, name, folder, alt):
    "Save one picture of an output under `folder`, and give its `<img>`."
    mime = next(m for m in IMAGES if m in data)
    value = text_of(data[mime])
    content = value.encode("utf-8") if mime == "image/svg+xml" else base64.b64decode(value)
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.{IMAGES[mime]}").write_bytes(content)
    source = html.escape(f"{folder.name}/{name}.{IMAGES[mime]}")
    return f'<img src="{source}" alt="{html.escape(alt)}"{size_attributes(mime, content)} class="img-fluid" loading="lazy">'


def clean_table(value):
    "The tables of an output without pandas' scoped style and border, columns marked, in a box that scrolls; `x` is code."
    soup = BeautifulSoup(re.sub(r"<style scoped>.*?</style>", "", value, flags=re.S), "html.parser")
    for table in soup.find_all("table"):
        del table["border"]
        for row in table.select("thead tr"):
            del row["style"]
        mark_columns(table)
    content = TICKS.sub(r"<code>\1</code>", str(soup))
    return f'<div class="sd-table" tabindex="0">{content}</div>'


def column_kind(texts):
    "Classes of a column with these cells: `num`, or `words` where most signs are letters; `long` and `mixed` where these may break."
    if all(map(NUMBER.match, texts)):
        return ["num"]
    letters = sum(c.isalpha() or c.isspace() for text in texts for c in text)
    most = max(map(len, texts))
    return (["words"] + ["long"] * (most > 18)) if 2 * letters > sum(map(len, texts)) else ["mixed"] * (most > 22)


def mark_columns(table):
    "Give the cells and the heading of each column, counted from the right, the classes of what it holds."
    rows = [row.find_all(["td", "th"]) for row in table.select("tbody tr")]
    heads = [row.find_all(["td", "th"]) for row in table.select("thead tr")[-1:]]
    for i in range(1, min(map(len, rows), default=0) + 1):
        texts = [row[-i].get_text().strip() for row in rows]
        kind = [] if (found := column_kind(texts)) == ["num"] and all(row[-i] is row[0] for row in rows) else found  # what a row is called
        for row in [r for r in rows + heads if len(r) >= i]:
            row[-i]["class"] = [*row[-i].get("class", []), *kind]
            if "long" in kind and row in heads:
                row[-i]["style"] = f"--most:{max(map(len, texts))}"  # characters, for the width
            if "mixed" in kind and row[-i].string and row not in heads:  # an interval stays on one line
                row[-i].string = INTERVAL.sub(lambda m: m[0].replace(" ", "\u00a0"), row[-i].string)


def float_block(content, label, caption, number):
    "A numbered figure or table: its content, and its caption as Markdown."
    kind = label[:3] if label else "fig"
    opening = f'<figure class="nncomp-float nncomp-{kind}"{f" id={chr(34)}{label}{chr(34)}" if label else ""}>'
    words = f"{WORDS[kind]}\u00a0{number}: " if number else ""
    caption = raw("<figcaption>") + words + caption + raw("</figcaption>") if caption else ""
    inner = caption + raw(content) if kind == "tbl" else raw(content) + caption
    return raw(opening) + inner + raw("</figure>")


def convert(out, name, options, folder, labels):
    "One output as Markdown, or None where smalldocs shows it well enough itself."
    data = out.get("data", {})
    label = str(options.get("label", ""))
    number = labels[label].text if label in labels else ""
    if any(m in data for m in IMAGES) and "text/html" not in data:
        content = picture(data, name, folder, str(options.get("fig-alt", "")))
        return float_block(content, label if number else "", str(options.get("fig-cap", "")), number)
    if "<table" in text_of(data.get("text/html")):
        content = clean_table(text_of(data["text/html"]))
        return float_block(content, label, str(options.get("tbl-cap", "")), number) if number else raw(content)
    return None


def convert_cell(cell, page, folder, labels, problems):
    "Turn the pictures and tables among a cell's outputs into Markdown, once, and take their options off the source."
    source = text_of(cell["source"])
    options = options_of(source)
    name, shown = str(options.get("label") or f"cell-{cell['id']}"), 0
    for out in cell["outputs"]:
        done = convert(out, name + (f"-{shown + 1}" if shown else ""), options, folder, labels)
        if done is not None:
            out["data"], shown = {"text/markdown": done}, shown + 1
            options = {k: v for k, v in options.items() if k not in OURS}
    if "label" in options and options["label"] in labels:
        problems.append(f"{page}: the cell {options['label']} has no figure or table among its saved outputs")
    cell["source"] = re.sub(rf"^#\|\s*(?:{'|'.join(OURS)}):[^\n]*\n(?:#\|\s{{3,}}[^\n]*\n)*", "", source, flags=re.M)


def convert_cells(page, nb, folder, labels, problems):
    "Equations, figures and tables of one notebook, numbered."
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = outside(CODE, lambda text: number_labels(text, labels), text_of(cell["source"]))
        elif cell["cell_type"] == "code":
            convert_cell(cell, page, folder, labels, problems)
