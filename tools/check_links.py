"""The links that lead out of the book: which there are, and which lead nowhere any more.

    python tools/check_links.py [--list]

Links come from the Markdown cells of the chapters, README.md, CONTRIBUTING.md, and the DOIs, arXiv numbers and addresses of the
bibliography. Gone is what answers 404 or 410, or has no host; what refuses a program (403, 429) or fails for the moment is only told.
"""
import argparse
import json
import re
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"https?://[^\s<>\"')\]}`]+")
FIELD = re.compile(r"\b(doi|eprint|url)\s*=\s*\{([^}]+)\}")
FORMS = {"doi": "https://doi.org/{}", "eprint": "https://arxiv.org/abs/{}", "url": "{}"}
OWN = ("https://github.com/acme/", "https://acme.github.io/", "https://colab.research.google.com/", "http://127.0.0.1", "http://localhost")


def texts(root):
    "What is searched for links."
    for path in sorted((root / "nbs").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        yield "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    yield from ((root / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md"))


def outward(root=ROOT):
    "Addresses of others, sorted, each once."
    found = {m.rstrip(".,;:") for text in texts(root) for m in LINK.findall(text)}
    fields = FIELD.findall((root / "nbs" / "references.bib").read_text(encoding="utf-8"))
    found |= {FORMS[kind].format(value.strip()) for kind, value in fields}
    return sorted(link for link in found if not link.startswith(OWN))


def state(link, timeout=20):
    "\"\" where a link leads somewhere, \"gone\" where it leads nowhere, else what hinders a program."
    for method in ("HEAD", "GET"):
        request = urllib.request.Request(link, method=method, headers={"User-Agent": "Mozilla/5.0 (link check of a book)"})
        try:
            with urllib.request.urlopen(request, timeout=timeout):
                return ""
        except urllib.error.HTTPError as error:
            answer = "gone" if error.code in (404, 410) else f"answers {error.code}"
        except (OSError, ValueError) as error:
            answer = "gone" if "Name or service not known" in str(error) else str(error)
    return answer


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true", help="only list the links")
    args = parser.parse_args()
    links = outward()
    if args.list:
        print("\n".join(links))
        return 0
    with ThreadPoolExecutor(8) as pool:
        states = dict(zip(links, pool.map(state, links), strict=True))
    for link, answer in states.items():
        if answer:
            print(f"{answer}: {link}")
    gone = sum(answer == "gone" for answer in states.values())
    print(f"{len(links)} links, {gone} gone")
    return int(gone > 0)


if __name__ == "__main__":
    sys.exit(main())
