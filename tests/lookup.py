"""The look-up in README.md, from equations.tsv: `python tests/lookup.py` writes it anew.

A row a section of the derivations, in their order: which of its displayed equations, counted from
the section's beginning, are computed by which function, and verified in which file of tests.
"""

import itertools
import pathlib
from collections import Counter

ROOT = pathlib.Path(__file__).resolve().parent.parent
MARK = "<!-- equations -->"


def spans(numbers: list[int]) -> str:
    """1, 2, 3, 5 as 1-3, 5."""
    text = ""
    for n in numbers:
        run = n - 1 in numbers and n + 1 in numbers
        text += "" if run else f"-{n}" if n - 1 in numbers and n - 2 in numbers else f", {n}"
    return text.removeprefix(", ")


def functions(places: list[str]) -> str:
    """script:function to a link for each script, under the name of the function."""
    pairs = sorted(place.split(":")[::-1] for place in places if "::" not in place)
    return ", ".join(
        f"`{name}` of {', '.join(f'[{path}]({path})' for _, path in same)}"
        for name, same in itertools.groupby(pairs, lambda pair: pair[0])
    )


def files(places: list[str]) -> str:
    """file::test to a link for each file."""
    paths = dict.fromkeys(place.split("::")[0] for place in places if "::" in place)
    return ", ".join(f"[{pathlib.PurePath(path).name}]({path})" for path in paths)


def column(rows: list, text) -> str:
    """The numbers of the equations, those with the same text together."""
    same = {}
    for row in rows:
        same.setdefault(text(row[3].split()), []).append(int(row[1]))
    return "; ".join(f"{spans(numbers)}: {where}" for where, numbers in same.items() if where)


def equations() -> list[list[str]]:
    """Section, number, kind and place of each equation."""
    lines = (ROOT / "tests/equations.tsv").read_text(encoding="utf-8").splitlines()[1:]
    return [line.split("\t") for line in lines]


def table() -> str:
    """The table, from tests/equations.tsv."""
    text = ["| section | computed by | verified in |", "|---|---|---|"]
    for section, rows in itertools.groupby(equations(), lambda row: row[0]):
        rows = list(rows)
        text.append(f"| {section} | {column(rows, functions)} | {column(rows, files)} |")
    return "\n".join(text)


def summary() -> str:
    """How many equations are of which kind."""
    count = Counter(row[2] for row in equations())
    kinds = "{implemented} implemented, {verified} verified, {definition} that state a name"
    return f"<summary>{count.total()} equations: {kinds.format(**count)}</summary>"


def readme() -> str:
    """README.md with the table as it should be between its two marks."""
    before, _, after = (ROOT / "README.md").read_text(encoding="utf-8").split(MARK)
    return f"{before}{MARK}\n{summary()}\n\n{table()}\n\n{MARK}{after}"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
