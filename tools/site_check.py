"""Check a built site as a reader without a network would meet it.

    python tools/site_check.py _docs

Lists every broken internal link or anchor, missing picture, picture without alternative text, request to another server,
and reference, citation or formula left unresolved; the exit status is 1 when there are any.
"""
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

UNRESOLVED = re.compile(r"\?@\w|(?<![\w@/.])@(?:fig|tbl|eq|sec)-\w|\[-?@\w|\?\?\?|\{#(?:fig|tbl|eq|sec)-|\\\(|\\\[")
LOADED = {"script": "src", "img": "src", "source": "src", "iframe": "src", "video": "src", "audio": "src", "link": "href"}
QUIET = {"code", "pre", "script", "style", "annotation", "textarea"}
REMOTE = re.compile(r"@import\s*(?:url\()?['\"]?(?:https?:)?//|url\(\s*['\"]?(?:https?:)?//")


class Page(HTMLParser):
    "What one page holds: anchors, links, loaded files, prose, and faults seen on the way."

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads, self.prose, self.faults, self.quiet = [], [], [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.quiet += tag in QUIET
        self.ids += [given["id"]] if given.get("id") else []
        self.links += [given["href"]] if tag == "a" and given.get("href") else []
        wanted = tag != "link" or given.get("rel") in ("stylesheet", "icon", "preload")
        self.loads += [given[LOADED[tag]]] if tag in LOADED and wanted and given.get(LOADED[tag]) else []
        if tag == "img" and not given.get("alt"):
            self.faults.append(f"a picture without alternative text: {str(given.get('src'))[:60]}")

    def handle_endtag(self, tag):
        self.quiet -= tag in QUIET

    def handle_data(self, data):
        if not self.quiet:
            self.prose.append(data)
        elif self.lasttag == "script" and re.search(r"\bimport\b[^;]*['\"]https?://", data):
            self.faults.append("a script imports from another server")


def is_remote(address):
    "Whether an address names a server."
    return bool(re.match(r"(?:[a-zA-Z][\w+.-]*:)?//", address))


def link_faults(root, name, page, pages):
    "The links of a page that lead to no file, or to no anchor in it."
    for href in dict.fromkeys(page.links):
        parts = urlsplit(href)
        if parts.scheme or is_remote(href):
            continue
        path = (root / name).parent / unquote(parts.path) if parts.path else root / name
        path = (path / "index.html" if path.is_dir() else path).resolve()
        target = path.relative_to(root).as_posix() if path.is_relative_to(root) else None
        if target is None or not path.is_file():
            yield f"broken link: {href}"
        elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
            yield f"broken anchor: {href}"


def load_faults(root, name, page):
    "The files a page asks for that are missing or on another server."
    for source in page.loads:
        if source.startswith("data:"):
            continue
        if is_remote(source):
            yield f"asks another server: {source}"
        elif not ((root / name).parent / unquote(urlsplit(source).path)).is_file():
            yield f"missing file: {source}"


def text_faults(page):
    "The references, citations and formulas that are still source text, and anchors used twice."
    prose = "".join(page.prose)
    yield from (f"unresolved: …{prose[max(0, m.start() - 30):m.end() + 30].strip()}…" for m in UNRESOLVED.finditer(prose))
    yield from (f"the anchor {i} is used twice" for i in sorted({i for i in page.ids if page.ids.count(i) > 1}))


def check(root):
    "Every fault of the site in the folder `root`, one line each."
    root = Path(root).resolve()
    pages = {p.relative_to(root).as_posix(): Page(p.read_text(encoding="utf-8")) for p in sorted(root.rglob("*.html"))}
    faults = [] if pages else [f"{root}: no pages"]
    for name, page in pages.items():
        found = [*page.faults, *link_faults(root, name, page, pages), *load_faults(root, name, page), *text_faults(page)]
        faults += [f"{name}: {f}" for f in found]
    for sheet in sorted(root.rglob("*.css")):
        if REMOTE.search(sheet.read_text(encoding="utf-8")):
            faults.append(f"{sheet.relative_to(root)}: asks another server")
    return faults


if __name__ == "__main__":
    found = check(sys.argv[1] if len(sys.argv) > 1 else "_docs")
    print("\n".join(found) or "no faults")
    sys.exit(1 if found else 0)
