"Of the font of icons, only what the site shows: two thousand icons weigh 200 kB on every page, the dozen in use some three."
import logging
import re

from fontTools import subset
from fontTools.ttLib import TTFont

RULE = re.compile(r'\.bi-([a-z0-9-]+)::?before\s*\{\s*content:\s*"\\([0-9a-f]+)";?\s*\}')
SOURCES = re.compile(r"src:\s*url\([^;}]*", re.S)
NAME = re.compile(r"\bbi-([a-z0-9]+(?:-[a-z0-9]+)*)")
POINT = re.compile(r'content:\s*"\\(f[0-9a-f]{3})"')


def in_use(out, style):
    "Names and code points of icons that any page, script or other style sheet of the site mentions."
    texts = [p.read_text(encoding="utf-8") for kind in ("html", "js", "css") for p in sorted(out.rglob(f"*.{kind}")) if p != style]
    return {n for t in texts for n in NAME.findall(t)}, {p for t in texts for p in POINT.findall(t)}


def small_font(font, points):
    "Write the font again with these code points alone."
    logging.getLogger("fontTools").setLevel(logging.ERROR)  # the font's own table of names is two bytes too long
    made = TTFont(font, recalcTimestamp=False)
    worker = subset.Subsetter(subset.Options(hinting=False, notdef_outline=True))
    worker.populate(unicodes=[int(p, 16) for p in points])
    worker.subset(made)
    made.flavor = "woff"
    made.save(font)


def lean_icons(out):
    "Keep the rules and the glyphs of the icons in use, as one WOFF file beside each style sheet of Bootstrap's icons."
    for style in sorted(out.rglob("bootstrap-icons*.css")):
        text, (names, points) = style.read_text(encoding="utf-8"), in_use(out, style)
        fonts = sorted(style.parent.rglob("bootstrap-icons.woff*"))
        woff = next((p for p in fonts if p.suffix == ".woff"), None)
        if woff is None or not RULE.search(text):
            continue
        kept = {m[1]: m[2] for m in RULE.finditer(text) if m[1] in names or m[2] in points}
        small_font(woff, kept.values())
        for other in fonts:
            if other != woff:
                other.unlink()
        address = woff.relative_to(style.parent).as_posix()
        for m in list(RULE.finditer(text)):
            text = text if m[1] in kept else text.replace(m[0], "")
        style.write_text(SOURCES.sub(f'src:url("{address}") format("woff")', text, count=1), encoding="utf-8")
