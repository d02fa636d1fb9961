"Citations and maths for the site, through the Pandoc that `pypandoc_binary` carries, as Quarto would make them."
import json
import re
import subprocess

import pypandoc
from bs4 import BeautifulSoup
from site_refs import rewrite

APPLY = "\u2061"  # the sign between a function and its argument
KEY = r"(?!(?:fig|tbl|eq|sec)-)[A-Za-z0-9_](?:[\w:.+/-]*\w)?"
CITATION = re.compile(
    rf"\[[^\[\]]*?(?<![\w@])-?@{KEY}[^\[\]]*\](?!\()"      # [see @key, p. 3; @other]
    rf"|(?<![\w@/.\[])-?@{KEY}(?:\s+\[[^\[\]@]*\](?!\()(?!\[))?"  # @key, or @key [p. 3]
)
MATHS = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)


def pandoc(text, *options):
    "What Pandoc makes of `text`, and its warnings."
    done = subprocess.run([pypandoc.get_pandoc_path(), *options], input=text, capture_output=True, text=True, encoding="utf-8", check=True)
    return done.stdout, done.stderr


def bib_keys(path):
    "The keys of a BibTeX file."
    return set(re.findall(r"^\s*@\w+\{\s*([^,\s]+)", path.read_text(encoding="utf-8"), re.M)) if path.exists() else set()


def citations_of(nb):
    "The distinct citations of a notebook, as written, in order."
    found = {}
    rewrite(nb, lambda text: CITATION.sub(lambda m: found.setdefault(m[0], m[0]), text))
    return list(found)


def unknown_keys(citations, known):
    "The cited keys that the bibliography lacks."
    return [k for c in citations for k in re.findall(rf"(?<![\w@])@({KEY})", c) if k not in known]


def format_citations(citations, bibliography):
    "HTML of each citation and of the list of references, by Pandoc's citeproc."
    text = f"---\nbibliography: {json.dumps(str(bibliography))}\nlink-citations: true\n---\n\n" + "\n\n".join(citations)
    out, _ = pandoc(text, "-f", "markdown", "-t", "html", "--citeproc", "--wrap=none")
    body, _, refs = out.partition('<div id="refs"')
    return dict(zip(citations, re.findall(r"<p>(.*?)</p>", body, re.S), strict=True)), '<div id="refs"' + refs


def cite(page, nb, bibliography, problems):
    "Replace the citations of one notebook by text and links, and add its list of references at the end."
    citations = citations_of(nb)
    missing = unknown_keys(citations, bib_keys(bibliography))
    problems += [f"{page}: unknown citation @{key}" for key in missing]
    if missing or not citations:
        return
    done, refs = format_citations(citations, bibliography)
    rewrite(nb, lambda text: CITATION.sub(lambda m: done[m[0]], text))
    source = f"## References {{.unnumbered}}\n\n```{{=html}}\n{refs}\n```"
    nb["cells"].append({"cell_type": "markdown", "id": "references", "metadata": {}, "source": source})


def mathml(formulas, problems):
    "MathML of each (TeX, inline or display) pair, all in one call; what Pandoc cannot convert is a problem."
    kinds = {"inline": "InlineMath", "display": "DisplayMath"}
    blocks = [{"t": "Para", "c": [{"t": "Math", "c": [{"t": kinds[kind]}, tex]}]} for tex, kind in formulas]
    document = json.dumps({"pandoc-api-version": [1, 23], "meta": {}, "blocks": blocks})
    out, warnings = pandoc(document, "-f", "json", "-t", "html", "--mathml", "--wrap=none")
    problems += [f"maths: {w}" for w in re.findall(r"Could not convert TeX math.*?(?=\[WARNING\]|\Z)", warnings, re.S)]
    return dict(zip(formulas, map(space_functions, re.findall(r"<p>(.*?)</p>", out, re.S)), strict=True))


def space_functions(formula):
    "Thin spaces around log, max and their like, as in TeX: browsers set `n log k` without any."
    soup = BeautifulSoup(formula, "html.parser")
    for name in soup.find_all("mi", mathvariant="normal"):
        sign = name.find_next_sibling()
        if sign is None or sign.name != "mo" or sign.get_text() != APPLY:
            continue
        whole = name.parent
        while whole.parent.name in ("msub", "msup", "msubsup", "munder") and whole.parent.find() is whole:
            whole = whole.parent
        if whole.parent.name not in ("mrow", "mtd", "semantics"):
            continue
        before, after = whole.find_previous_sibling(), whole.find_next_sibling()
        operand = before is not None and (before.name != "mo" or before.get("form") == "postfix") and before.get_text() not in "−/+,="
        if operand and before.name != "mspace":
            whole.insert_before(soup.new_tag("mspace", width="0.167em"))
        if after is not None and after.name != "mspace" and after.get("form") != "prefix":
            whole.insert_after(soup.new_tag("mspace", width="0.167em"))
    return str(soup)
