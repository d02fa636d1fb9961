"""Write README.md from the notebook nbs/index.ipynb.

    python tools/make_readme.py [--check]

GitHub-flavoured Markdown: prose, code and saved outputs, without directives, hidden cells, labels or citation keys. Pictures are
saved in index_files/. With `--check` nothing is written, and a difference from what lies there is an error.
"""
import argparse
import base64
import html
import json
import re
import sys
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path

from site_refs import NAME, REFERENCE, WORDS, find_labels

ROOT = Path(__file__).resolve().parent.parent
HEAD = "<!-- Written by tools/make_readme.py from nbs/index.ipynb: change the notebook. -->\n"
DIRECTIVE = re.compile(r"^#\|[^\n]*\n?", re.M)
HIDDEN = re.compile(r"^#\|\s*(?:hide|default_exp|export)\b|^#\|\s*include:\s*false", re.M)
OPTION = re.compile(r"^#\|\s*(echo|output|fig-cap|fig-alt|tbl-cap):\s*(.*)$", re.M)
FENCE = re.compile(r"(^```.*?^```[ \t]*$)", re.M | re.S)
PICTURES = {"image/svg+xml": "svg", "image/png": "png", "image/gif": "gif"}
CALLOUT = re.compile(r"^::: *\{[^}\n]*\} *$|^:::+ *$", re.M)


class Table(HTMLParser):
    "The rows of an HTML table as lists of text."

    def __init__(self, text):
        super().__init__()
        self.rows, self.cell = [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append(" ".join(self.cell.split()).replace("|", "\\|"))
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data


def text_of(value):
    "A notebook field as one string."
    return "".join(value) if isinstance(value, list) else value or ""


def site_address():
    "The address of the site, from settings.ini."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    values = config["DEFAULT"]
    return values["doc_host"] + values["doc_baseurl"]


def page_link(stem, anchor, site):
    "The address of a chapter on the site; nbdev drops the number of its file name."
    return f"{site}/{re.sub(r'^[0-9]+_', '', stem)}.html{anchor or ''}"


def numbered(label, labels):
    "`Figure 1` for a label of the notebook; an empty string for one it lacks."
    target = labels.get(label)
    return f"{WORDS[target.kind]} {target.text}" if target and target.kind in ("fig", "tbl") else ""


def prose(source, site, labels):
    "Markdown that GitHub shows: chapters become links to the site, references become numbers, labels and callout fences go."
    def words(m):
        found = [numbered(name.lstrip("-@"), labels) for name in re.findall(NAME, m[0])]
        return " and ".join(found) if all(found) else m[0]

    parts = FENCE.split(source)
    for i in range(0, len(parts), 2):
        parts[i] = REFERENCE.sub(words, parts[i])
        part = re.sub(r"\]\((\w+)\.ipynb(#[\w-]+)?\)", lambda m: f"]({page_link(m[1], m[2], site)})", parts[i])
        part = re.sub(r"\]\((images/)", r"](nbs/\1", part)
        part = re.sub(r"\s*\{[#.][^}\n]*\}", "", CALLOUT.sub("", part))
        parts[i] = re.sub(r"\n{3,}", "\n\n", re.sub(r"^: +(?=\S)", "", part, flags=re.M))
    return "".join(parts).strip()


def markdown_table(text):
    "An HTML table as a GitHub table, numbers to the right."
    rows = [r for r in Table(text).rows if r]
    right = [all(re.match(r"[-−+]?[\d.]", r[i]) for r in rows[1:] if i < len(r) and r[i]) for i in range(len(rows[0]))]
    rule = ["---:" if r else "---" for r in right]
    return "\n".join("| " + " | ".join(r) + " |" for r in [rows[0], rule, *rows[1:]])


def shown(out, options, name, number, pictures):
    "One saved output as Markdown; a picture is noted in `pictures`."
    data = out.get("data", {})
    mime = next((m for m in PICTURES if m in data), None)
    if mime:
        value = text_of(data[mime])
        path = f"index_files/{name}.{PICTURES[mime]}"
        pictures[path] = value.encode("utf-8") if mime == "image/svg+xml" else base64.b64decode(value)
        return f'<img src="{path}" alt="{html.escape(options.get("fig-alt", ""))}">' + caption(number, options.get("fig-cap"))
    if "<table" in text_of(data.get("text/html")):
        return markdown_table(text_of(data["text/html"])) + caption(number, options.get("tbl-cap"))
    if "nncomp-interactive" in text_of(data.get("text/html")):
        still = re.search(r'<img src="(?P<src>[^"]+)"[^>]*alt="(?P<alt>[^"]*)"', text_of(data["text/html"]))
        return f'[<img src="nbs/{still["src"]}" alt="{still["alt"]}">]({site_address()}/)' if still else ""
    if "text/markdown" in data:
        return text_of(data["text/markdown"]).strip()
    text = text_of(out.get("text") or data.get("text/plain")).rstrip()
    return f"```text\n{text}\n```" if text else ""


def caption(number, text):
    "A caption under a picture or table."
    return f"\n\n{f'{number}: ' if number else ''}{text}" if text else ""


def code(cell, index, labels, pictures):
    "A code cell: its source without directives, then its outputs."
    source = text_of(cell["source"])
    if HIDDEN.search(source):
        return []
    options = {k: v.strip().strip("\"'") for k, v in OPTION.findall(source)}
    body = DIRECTIVE.sub("", source).strip()
    parts = [f"```python\n{body}\n```"] if body and options.get("echo") != "false" else []
    if options.get("output") != "false":
        label = re.search(r"^#\|\s*label:\s*(\S+)", source, re.M)
        name, number = (label[1], numbered(label[1], labels)) if label else (f"cell-{index}", "")
        parts += [shown(out, options, name + (f"-{i}" if i else ""), number, pictures) for i, out in enumerate(cell["outputs"])]
    return [p for p in parts if p]


def readme(notebook, site):
    "The text of the README, and the pictures it shows: path -> bytes."
    parts, pictures, labels = [HEAD.strip()], {}, find_labels({"index": notebook}, [])
    for index, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "markdown":
            parts.append(prose(text_of(cell["source"]), site, labels))
        elif cell["cell_type"] == "code":
            parts += code(cell, index, labels, pictures)
    text = "\n\n".join(p for p in parts if p) + "\n"
    left = re.findall(r"(?<![\w@/.`])@(?:fig|tbl|eq|sec)-[\w-]+|\[-?@\w[^\]]*\]", FENCE.sub("", text))
    if left:
        raise ValueError(f"index.ipynb refers to {', '.join(left)}, which GitHub cannot resolve; write an ordinary link")
    return text, pictures


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository (default: this one)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the files would change")
    args = parser.parse_args(argv)
    text, pictures = readme(json.loads((args.root / "nbs" / "index.ipynb").read_text(encoding="utf-8")), site_address())
    wanted = {"README.md": text.encode("utf-8"), **pictures}
    old = {p.relative_to(args.root).as_posix() for p in (args.root / "index_files").glob("*")}
    there = {name: (args.root / name).read_bytes() for name in wanted if (args.root / name).exists()}
    stale = sorted(name for name in wanted if there.get(name) != wanted[name]) + sorted(old - set(wanted))
    if args.check:
        faults = [f"{name} does not match nbs/index.ipynb; run python tools/make_readme.py" for name in stale]
        print("\n".join(faults) or "README.md is up to date")
        return 1 if stale else 0
    for name in stale:
        path = args.root / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(wanted[name]) if name in wanted else path.unlink()
        print(f"{'wrote' if name in wanted else 'removed'} {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
