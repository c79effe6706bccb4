"""The page document/README.md: every displayed equation beside its line of code or its test.

    python tests/equations.py      writes it, from sections.txt, equations.tsv and errata.tsv

An equation is counted from the beginning of its section. Its place is script.py:function or
file.py::test. Of a function all lines are shown if they are three or fewer, else the last
statement; or, where equations.tsv names some, separated by "; ", the lines that begin so.
"""

import ast
import csv
import functools
import os
import pathlib
import re
import textwrap
from collections import Counter

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "tests/document/README.md"

TOP = """\
# The equations and their code

The scripts implement the post *Deep Reinforcement Learning* of 2026-02-10, which they call the
document. This page lists its {total} displayed equations in its order. Docstrings cite them as
`[Section heading, eq. n]`, where n counts from the beginning of the section. `python
tests/equations.py` writes the page.

{implemented} equations are implemented: their lines of code stand below them, with the names that
the docstring of the function explains. {verified} are verified by a test. {definition} are
definitions.

Where the document is wrong or needs a condition, an erratum stands under the equation, or under the
heading if it is about the text. Every erratum names a test that shows it.
"""


def table(name):
    """The rows of a table in tests/, each a dict."""
    with open(ROOT / "tests" / name, encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def sections():
    """Level and name of each section. One of several of the same heading is "parent / heading"."""
    lines = (ROOT / "tests/sections.txt").read_text(encoding="utf-8").splitlines()
    headings = [(len(marks), text) for marks, _, text in (line.partition(" ") for line in lines)]
    count = Counter(text for _, text in headings)
    parents, found = {}, []
    for level, text in headings:
        parents[level] = text
        found.append((level, text if count[text] == 1 else f"{parents[level - 1]} / {text}"))
    return found


def citing(headings):
    """Name of a section -> scripts whose docstring names it."""
    found = {name: [] for _, name in headings}
    for path in sorted(ROOT.glob("*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        text = " ".join(doc.split())
        for name in found:
            if f'"{name}"' in text:
                found[name].append(path.name)
    return found


# Places


@functools.cache
def source(path):
    """The lines of a file."""
    return (ROOT / path).read_text(encoding="utf-8").splitlines()


@functools.cache
def definitions(path):
    """The functions and classes of a file: name -> node."""
    body = ast.parse("\n".join(source(path))).body
    return {node.name: node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def shown(path, name, starts):
    """The numbers of the lines to show of a function."""
    statements = definitions(path)[name].body[1:]  # after the docstring
    start, end = statements[0].lineno, statements[-1].end_lineno
    if starts:
        lines = source(path)[start - 1 : end]
        return [n for n, line in enumerate(lines, start) if line.strip().startswith(starts)]
    return range(start if end - start < 3 else statements[-1].lineno, end + 1)


def excerpt(path, numbers):
    """The text of these lines. Only a line that is further in than the one above it keeps that."""
    runs, indent = [], ""
    for n in numbers:
        line = source(path)[n - 1]
        inside = runs and n - 1 in numbers and line.startswith(indent)
        if not inside:
            runs.append([])
            indent = re.match(" *", line)[0]
        runs[-1].append(line)
    return "\n".join(textwrap.dedent("\n".join(run)) for run in runs)


def link(path, number):
    """A link to a line of a file, from the page."""
    return f"[{os.path.basename(path)}]({os.path.relpath(ROOT / path, PAGE.parent)}#L{number})"


def by_name(places, separator):
    """Name of a function or test -> files in which it stands."""
    found = {}
    for path, same, name in (place.partition(separator) for place in places):
        if same and not name.startswith(":"):
            found.setdefault(name, []).append(path)
    return found


def tests(places):
    """Links to tests."""
    links = []
    for name, paths in by_name(places, "::").items():
        lines = ", ".join(link(path, definitions(path)[name].lineno) for path in sorted(paths))
        links.append(f"`{name}` in {lines}")
    return "; ".join(links)


def functions(places, starts):
    """Links to functions, and the block of code to show."""
    links, blocks = [], {}
    for name, paths in by_name(places, ":").items():
        found, texts = [], set()
        for path in sorted(paths):
            numbers, line = shown(path, name, starts), definitions(path)[name].lineno
            texts.add(excerpt(path, numbers))
            # train is long: the link goes to the first of the lines shown
            found.append(link(path, numbers[0] if name == "train" else line))
        links.append(f"`{name}` in {', '.join(found)}")
        [blocks[name]] = texts  # the same in all of them
    blocks = {name: text for name, text in blocks.items() if text}
    if len(blocks) > 1:
        blocks = {name: f"# {name}\n{text}" for name, text in blocks.items()}
    return "; ".join(links), "\n\n".join(blocks.values())


# The page


def erratum(row):
    """A quotation: what is printed, what holds instead, and the test."""
    said = f"As printed: {row['printed']}. What holds: {row['holds']}."
    return f"> **Erratum.** {said} Test: {tests(row['test'].split())}.\n"


def equation(row):
    """The equation with its number and its places, and the code."""
    places, starts = row["where"].split(), tuple(filter(None, row["lines"].split("; ")))
    where, code = functions(places, starts)
    said = ["Definition"] if row["kind"] == "definition" else []
    if row["kind"] == "implemented":
        said.append(f"Implemented by {where}")
    if tests(places):
        said.append(f"Verified by {tests(places)}")
    if where and row["kind"] != "implemented":
        said.append(f"See {where}")
    text = f"**eq. {row['n']}.** {'. '.join(said)}.\n\n```math\n{row['latex']}\n```\n"
    return text + f"\n```python\n{code}\n```\n" * bool(code)


def anchor(name):
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-")


def contents(headings):
    """The list of contents: a line a chapter, with its sections behind it."""
    text = ""
    for level, name in headings:
        plain = name.split(" / ")[-1].replace("$", "")
        for latex, letter in (r"\pi", "π"), (r"\mu", "μ"), (r"\alpha", "α"):
            plain = plain.replace(latex, letter)
        separator = ["", "\n- ", "\n  - ", " · "][level]
        text += f"{separator}[{plain}](#{anchor(name)})"
    return text.strip() + "\n"


def page():
    """The whole page."""
    rows, errata, headings = table("equations.tsv"), table("errata.tsv"), sections()
    under = {name: [] for _, name in headings}  # what stands under a heading
    for row in errata:
        if row["section"] and not row["n"]:
            under[row["section"]].append(erratum(row))
    for row in rows:
        under[row["section"]].append(equation(row))
        place = row["section"], row["n"]
        under[place[0]] += [erratum(x) for x in errata if (x["section"], x["n"]) == place]
    for name, scripts in citing(headings).items():
        if scripts and not under[name]:
            links = ", ".join(f"[{script}](../../{script})" for script in scripts)
            under[name].append(f"No displayed equation. Cited by {links}.\n")
    kept, level = [], 0  # sections with something under them, and the chapters these belong to
    for heading in reversed(headings):
        if under[heading[1]] or heading[0] < level:
            kept.insert(0, heading)
            level = heading[0]
    kinds = Counter(row["kind"] for row in rows)
    text = [TOP.format(total=len(rows), **kinds)]
    text += [erratum(row) for row in errata if not row["section"]]
    text.append(contents(kept))
    for level, name in kept:
        text += [f"{'#' * level} {name}\n", *under[name]]
    return "\n".join(text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
