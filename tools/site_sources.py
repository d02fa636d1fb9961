"Which code a page shows, and which of it folds: nbdev drops the helpers, and leaves the code of figures in the reader's way."
import ast
import re

DROPPED = {"export", "exporti", "hide", "default_exp"}  # by nbdev
OWN = re.compile(r"^#\|\s*(code-fold|echo):", re.M)
FLOAT = re.compile(r"^#\|\s*label:\s*(fig|tbl)-", re.M)
CODE_OF = {"fig": "Code of the figure", "tbl": "Code of the table"}


def defined(cell):
    "What a cell defines: functions, classes and constants; nothing where it only imports."
    trees = cell.parsed_() if cell.cell_type == "code" and cell.source else None
    for tree in trees or []:
        if isinstance(tree, (ast.FunctionDef, ast.ClassDef)):
            yield tree.name
        for target in getattr(tree, "targets", None) or [getattr(tree, "target", None)]:
            yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name)) if target is not None else ()


def fold_export(cell):
    "A cell under `export` that defines something is shown like one under `exports`, but closed; the others leave the page."
    marks = cell.directives_.keys()
    names = list(defined(cell)) if "export" in marks and "hide" not in marks else []
    if names:
        cell.directives_["exports"] = cell.directives_.pop("export")
        cell.closed_ = "Source of " + ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    elif marks & DROPPED:
        cell.source = None  # nbdev then drops the cell


def fold_code(cell):
    "Exported code folds, open where the text is about it; so does the code of a figure or a table, closed. A cell may say otherwise."
    if cell.cell_type != "code" or OWN.search(cell.source):
        return
    kind, exported = FLOAT.search(cell.source), "exports" in cell.directives_
    if kind or exported:
        summary = CODE_OF[kind[1]] if kind else getattr(cell, "closed_", "Exported source")
        opened = exported and not kind and not hasattr(cell, "closed_")
        cell.source = f'#| code-fold: {"show" if opened else "true"}\n#| code-summary: "{summary}"\n{cell.source}'


def fold_sources():
    "Put the two in place of what nbdev does."
    from nbdev import processors

    processors.rm_export, processors.add_fold = fold_export, fold_code
