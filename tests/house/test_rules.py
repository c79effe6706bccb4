"""The house rules: what holds in every script, read off the sources and by running them alone."""

import ast
import difflib
import io
import re
import sys
import tokenize
import tomllib

import pytest
from conftest import ROOT, SCRIPTS, SOURCES
from equations import PAGE, anchor, page, sections, table

SECTIONS = ["Equations", "Networks", "Buffer", "Training", "Plumbing"]
HEADINGS = {name.split(" / ")[-1] for _, name in sections()} | {name for _, name in sections()}

# Rule 1: the names that may differ in text between scripts, and why.
OWN = {
    "Args": "each algorithm has its options",
    "train": "the algorithm itself",
    "make_policy": "the policy that the algorithm has",
    "Actor": "deterministic in ddpg and td3, a distribution in sac",
    "Policies": "those of cem do not normalise observations",
    "mlp": "of images the last layer alone, in scripts that learn from them",
}

# The plumbing is one text. Under torchrun run TORCHRUN; the others lack these of its functions, and
# make_envs too where they have no vector environment.
TORCHRUN = "ppo", "a2c", "reinforce", "nes"
VECTOR = *TORCHRUN, "awr", "cem", "cmaes"
PROCESSES = "start_processes", "all_sum"

# Rule 2: descendant -> (ancestor, names that differ or are not in both, most code lines so).
LINEAGE = {
    "double_dqn": ("dqn", "dqn_target double_dqn_target train", 10),
    "td3": ("ddpg", "Args Critic QNetworks ddpg_target td3_target smooth train", None),
    "sac": (
        "td3",
        "Args Actor explore smooth td3_target sac_target deterministic_actor_loss soft_actor_loss "
        "tanh_gaussian temperature_loss train",
        None,
    ),
    "a3c": ("a2c", "Args start_processes all_sum make_envs train", None),
    "cmaes": (
        "cem",
        "Args sample select cem_update sample_correlated rank_weights update_mean elite_covariance "
        "square_root strategy_parameters cumulate relative_length h_sigma update_step_size "
        "update_covariance RunningNorm Policies train",
        None,
    ),
}

# Rule 4: most code lines and tokens (names, operators and numbers) of what a reader reads,
# Equations, Networks, Buffer and Training together; of the plumbing, of which torchrun has its own;
# and of the head, imports and Args. Not to be raised to what a script has grown to.
BUDGET = {
    "reinforce": (190, 2_600),
    "a2c": (160, 2_150),
    "a3c": (185, 2_200),
    "cem": (110, 1_550),
    "cmaes": (160, 2_400),
    "nes": (140, 1_950),
    "dqn": (135, 1_750),
    "double_dqn": (135, 1_780),
    "awr": (240, 3_400),
    "ppo": (220, 2_900),
    "ddpg": (145, 1_950),
    "td3": (165, 2_250),
    "sac": (175, 2_350),
}
PLUMBING = {name: (140, 1_750) for name in TORCHRUN}
HEAD = (75, 450)
DQN = "dqn", "double_dqn"
NORM = (20, 280)  # what a normaliser may add to a script whose budget above is without one
NORMALISED = "cmaes", "dqn", "double_dqn"
# What images may add to the algorithm, and Atari's wrappers to the plumbing.
IMAGES = dict.fromkeys(["ppo", "a2c", "a3c"], (25, 350)) | dict.fromkeys(DQN, (45, 600))
ATARI = (6, 90)


def blocks(name):
    """Top-level functions and classes of a script: name -> source text, decorators included."""
    lines, found = SOURCES[name].splitlines(), {}
    for node in ast.parse(SOURCES[name]).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


IGNORED = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"}


def code_tokens(source):
    """Tokens outside comments and docstrings: (name of its type, first line, last line)."""
    strings = set()
    for node in ast.walk(ast.parse(source)):
        for child in node.body if isinstance(getattr(node, "body", None), list) else []:
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                strings.update(range(child.lineno, child.end_lineno + 1))
    depth = 0  # of f-strings, which Python 3.11 takes as one token and later versions as many
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        depth += (kind == "FSTRING_START") - (kind == "FSTRING_END")
        if kind not in IGNORED and token.start[0] not in strings:
            yield "STRING" if depth else kind, token.start[0], token.end[0]


def code_lines(source):
    """Numbers of the lines that hold code: no comments, no docstrings, no blanks."""
    return {n for _, first, last in code_tokens(source) for n in range(first, last + 1)}


def size(name, *sections):
    """Code lines and tokens of these sections of a script."""
    _, where = section_of_lines(name)
    lines = [n for n in code_lines(SOURCES[name]) if where[n] in sections]
    counted = [
        kind
        for kind, first, _ in code_tokens(SOURCES[name])
        if where[first] in sections and kind in ("NAME", "OP", "NUMBER")
    ]
    return len(lines), len(counted)


def section_of_lines(name):
    """Section headings of a script, in order, and the section of every line."""
    order, where, current = [], {}, "Head"
    for number, line in enumerate(SOURCES[name].splitlines(), 1):
        if heading := re.fullmatch(r"# (\w+) -+", line):
            current = heading[1]
            order.append(current)
        where[number] = current
    return order, where


def equation_functions(name):
    """Functions of the section Equations: name -> docstring."""
    _, where = section_of_lines(name)
    return {
        node.name: ast.get_docstring(node) or ""
        for node in ast.parse(SOURCES[name]).body
        if isinstance(node, ast.FunctionDef) and where[node.lineno] == "Equations"
    }


def citations(text):
    """(section, equation number or None) of every [Section, eq. n] and [Section] in text."""
    found = re.findall(r"\[((?:[^\[\]]|\n)+?)(?:,\s+eq\.\s+(\d+))?\]", text)
    found = [(" ".join(section.split()), number or None) for section, number in found]
    return [(section, number) for section, number in found if number or section in HEADINGS]


def page_blocks():
    """What stands on the page at each equation: (section, n) -> text."""
    found, section = {}, ""
    text = PAGE.read_text(encoding="utf-8")
    for block in re.split(r"^(?=#+ .*\n\n|\*\*eq\. \d+\.\*\*)", text, flags=re.M):
        if number := re.match(r"\*\*eq\. (\d+)\.", block):
            found[section, number[1]] = block
        else:
            section = block.partition("\n")[0].lstrip("#").strip()
    return found


def without(text, names):
    """A text of ppo.py without these of its top-level functions."""
    for name in names:
        block = blocks("ppo")[name] + "\n\n\n"
        assert block in text
        text = text.replace(block, "")
    return text


def test_same_name_same_text():
    """But that RunningNorm adds up over torchrun's processes only where there are some."""
    texts = {}
    for name in SCRIPTS:
        for block, text in blocks(name).items():
            if block == "RunningNorm" and name in TORCHRUN:
                assert text.count(" of all processes.") == text.count("        all_sum(") == 1
                text = text.replace(", of all processes.", ".")
                text = re.sub("        all_sum.*\n", "", text)
            texts.setdefault(block, {}).setdefault(text, []).append(name)
    differ = {b: list(t.values()) for b, t in texts.items() if len(t) > 1 and b not in OWN}
    assert not differ, f"same name, different text: {differ}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_plumbing_is_one_text(name):
    ours, reference = (SOURCES[x].partition("\n# Plumbing -")[2] for x in (name, "ppo"))
    lacks = PROCESSES * (name not in TORCHRUN) + ("make_envs",) * (name not in VECTOR)
    assert ours == without(reference, lacks)
    assert SOURCES[name].count(f'\nSCRIPT = "{name}"\n') == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_options_are_checked_alike(name):
    """__post_init__ is one text, but that scripts without torchrun refuse it."""
    ours, reference = (
        blocks(x)["Args"].partition("    def __post_init__")[2] for x in (name, "ppo")
    )
    if name not in TORCHRUN:
        reference += """
        if dist.is_torchelastic_launched():
            raise Refusal(f"{SCRIPT}.py does not run under torchrun")"""
    assert ours == reference


@pytest.mark.parametrize("name", LINEAGE)
def test_lineage(name):
    ancestor, may_differ, most = LINEAGE[name]
    ours, theirs = blocks(name), blocks(ancestor)
    differ = {b for b in ours.keys() | theirs.keys() if ours.get(b) != theirs.get(b)}
    assert differ == set(may_differ.split()), f"{name} departs from {ancestor} in {differ}"
    if most is not None:
        code = []
        for script in (ancestor, name):
            lines = SOURCES[script].splitlines()
            code.append([lines[number - 1] for number in sorted(code_lines(SOURCES[script]))])
        changed = [line[0] for line in difflib.ndiff(*code)]
        assert max(changed.count("+"), changed.count("-")) <= most


def test_readme_is_short_and_counts_lines_as_they_are():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 9 * 1024
    code = {
        name: [SOURCES[name].splitlines()[n - 1].strip() for n in sorted(code_lines(SOURCES[name]))]
        for name in SCRIPTS
    }
    sizes = re.findall(r"^\| \[(\w+)\]\(\w+\.py\) .* \| (\d+) \|$", text, re.M)
    assert dict(sizes) == {name: str(len(lines)) for name, lines in code.items()}
    parents = {"double_dqn": "dqn", "ddpg": "dqn", "td3": "ddpg", "sac": "td3", "a2c": "reinforce"}
    parents |= {"a3c": "a2c", "ppo": "a2c", "awr": "ppo", "cmaes": "cem", "nes": "cem"}
    for name, parent in parents.items():
        matcher = difflib.SequenceMatcher(None, code[parent], code[name], autojunk=False)
        new = len(code[name]) - sum(block.size for block in matcher.get_matching_blocks())
        assert re.search(rf"[─┬└] {name} {new}\b", text), (
            f"{name} has {new} lines that {parent} has not"
        )


PAGES = (
    "README.md",
    "tests/README.md",
    *(f"benchmarks/{x}.md" for x in ("README", "claims", "defaults", "studies/README")),
)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_are_there(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, place = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if place and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert place in map(anchor, headings), target
        elif place:  # a line of a function that an equation has
            assert re.match(r"def \w+", SOURCES[file.stem].splitlines()[int(place[1:]) - 1]), target


@pytest.mark.parametrize("name", SCRIPTS)
def test_sections_in_order(name):
    order, _ = section_of_lines(name)
    assert order == [section for section in SECTIONS if section in order]
    assert {"Equations", "Networks", "Training", "Plumbing"} <= set(order)


@pytest.mark.parametrize("name", SCRIPTS)
def test_steps_of_the_docstring_are_in_train(name):
    steps = re.findall(r"^    (\d+)\. ", ast.get_docstring(ast.parse(SOURCES[name])), re.M)
    comments = re.findall(r"^ +# (\d+)\.", blocks(name)["train"], re.M)
    assert steps == [str(n + 1) for n in range(len(steps))] and 3 <= len(steps) <= 15
    assert comments == steps, "train shows the numbered steps, each once and in order"


@pytest.mark.parametrize("name", SCRIPTS)
def test_equation_functions_cite_the_document(name):
    rows = {(row["section"], row["n"]): row for row in table("equations.tsv")}
    for function, doc in equation_functions(name).items():
        cited = citations(doc)
        assert cited, f"{function} cites no section"
        for section, number in cited:
            assert section in HEADINGS, f"{function}: no section {section!r}"
            if number:
                row = rows[section, number]
                assert f"{name}.py:{function}" in row["where"].split(), f"not in the table: {row}"
    quoted = re.findall(r'"([^"]+)"', ast.get_docstring(ast.parse(SOURCES[name])).split("\n\n")[1])
    assert quoted, "the docstring says where in the derivations it stands"
    for section in quoted:
        assert " ".join(section.split()) in HEADINGS, f"no section {section!r}"


def test_equation_table():
    rows = table("equations.tsv")
    assert len(rows) == len({(row["section"], row["n"]) for row in rows}) == 194
    for row in rows:
        assert row["kind"] in ("implemented", "verified", "definition") and row["where"], row
        for where in row["where"].split():
            file, _, name = where.replace("::", ":").partition(":")
            defined = {
                node.name
                for node in ast.walk(ast.parse((ROOT / file).read_text()))
                if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            }
            assert name in defined, f"{where} does not exist"
            if "/" not in file and name != "train" and row["kind"] == "implemented":
                doc = equation_functions(file.removesuffix(".py"))[name]
                assert (row["section"], row["n"]) in citations(doc), f"{where} does not cite {row}"


def test_the_lines_to_show_are_there():
    for row in table("equations.tsv"):
        text = page_blocks()[row["section"], row["n"]]
        for start in filter(None, row["lines"].split("; ")):
            assert re.search(rf"^ *{re.escape(start)}", text, re.M), f"no line {start!r}: {row}"


def test_the_page_of_the_equations():
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(), f"{PAGE} is out of date: python tests/equations.py"
    blocks = page_blocks()
    assert blocks.keys() == {(row["section"], row["n"]) for row in table("equations.tsv")}
    for block in blocks.values():
        assert block.count("```math\n") == 1


def test_the_links_of_the_page():
    """To the line of the function or test that is named, in train to a line that is shown."""
    text, links = PAGE.read_text(encoding="utf-8"), 0
    for name, files in re.findall(r"`(\w+)` in ((?:(?:, )?\[[^]]+\]\([^)]+\))+)", text):
        for path, number in re.findall(r"\(([^)#]+)#L(\d+)\)", files):
            line = (PAGE.parent / path).read_text(encoding="utf-8").splitlines()[int(number) - 1]
            defined = re.match(rf"(def|class) {name}\b", line)
            assert defined or name == "train" and line.strip() in text, f"{path}, {number}: {line}"
            links += 1
    anchors = re.findall(r"\]\(#([^)]+)\)", text)
    headings = [line.lstrip("#") for line in text.splitlines() if re.match(r"#+ [^#]", line)]
    slugs = [re.sub(r"[^\w -]", "", heading.strip().lower()) for heading in headings]
    assert set(anchors) <= {slug.replace(" ", "-") for slug in slugs}
    citing = re.findall(r"\]\(\.\./\.\./(\w+)\.py\)", text)
    assert citing and set(citing) <= set(SCRIPTS)
    assert len(set(anchors)) == len(anchors)
    assert text.count("](") == links + len(anchors) + len(citing)


def test_sections_that_docstrings_name_are_headings_of_the_page():
    headings = re.findall(r"^#+ (.+)$", PAGE.read_text(encoding="utf-8"), re.M)
    for name in SCRIPTS:
        doc = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")))
        named = re.findall(r'"([^"]+)"', doc.split("\n\n")[1])
        assert named and set(named) <= set(headings), f"{name}: {set(named) - set(headings)}"


def test_every_erratum_names_a_section_and_a_test():
    numbers = {(row["section"], row["n"]) for row in table("equations.tsv")}
    names, text = {name for _, name in sections()}, PAGE.read_text(encoding="utf-8")
    for row in table("errata.tsv"):
        place = row["section"], row["n"]
        assert place in numbers or place[0] in names | {""} and not place[1], f"no {place}"
        assert row["printed"] and row["holds"] and row["test"], row
        assert text.count(row["holds"]), row
        for where in row["test"].split():
            path, _, name = where.partition("::")
            assert f"\ndef {name}(" in (ROOT / path).read_text(encoding="utf-8"), where
    assert text.count("> **Erratum.**") == len(table("errata.tsv"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_and_definition_is_documented(name):
    for line in blocks(name)["Args"].partition("    def ")[0].splitlines():
        if ":" in line and line.startswith("    ") and line.strip():
            assert re.search(r"  # \S", line), f"no comment: {line.strip()}"
    for block, text in blocks(name).items():
        node = ast.parse(text).body[0]
        assert block == "Args" or ast.get_docstring(node), f"{block} has no docstring"


@pytest.mark.parametrize("name", SCRIPTS)
def test_budget(name):
    norm, images = NORM if name in NORMALISED else (0, 0), IMAGES.get(name, (0, 0))
    algorithm = [sum(x) for x in zip(BUDGET[name], norm, images)]
    plumbing = [sum(x) for x in zip(PLUMBING.get(name, (125, 1_500)), ATARI)]
    parts = {
        "head": (size(name, "Head"), HEAD),
        "algorithm": (size(name, "Equations", "Networks", "Buffer", "Training"), algorithm),
        "plumbing": (size(name, "Plumbing"), plumbing),
    }
    for part, (has, most) in parts.items():
        assert has[0] <= most[0] and has[1] <= most[1], f"{part}: {has} lines and tokens of {most}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_shape(name):
    assert max(map(len, SOURCES[name].splitlines())) <= 100
    for function in equation_functions(name):
        assert len(code_lines(blocks(name)[function])) <= 25

    def depth(node):
        inner = max(map(depth, ast.iter_child_nodes(node)), default=0)
        return inner + isinstance(node, (ast.For, ast.While, ast.If, ast.With, ast.Try))

    assert max(depth(node) for node in ast.walk(ast.parse(SOURCES[name]))) <= 5


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_metadata_are_the_requirements(name):
    block = re.search(r"# /// script\n(.*?)# ///\n", SOURCES[name], re.S)[1]
    said = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))
    needed = (ROOT / "requirements.txt").read_text().split()
    unused = ("pytest",) if name in IMAGES else ("pytest", "ale-py", "opencv")
    assert said["dependencies"] == [line for line in needed if not line.startswith(unused)]
    assert said["requires-python"] == ">=3.11"


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports_only_what_requirements_pin(name):
    pinned = set(re.findall(r"^([\w-]+)", (ROOT / "requirements.txt").read_text(), re.M))
    pinned -= {"pytest", "moviepy", "mujoco", "ale-py"}  # for tests, and for gymnasium
    for node in ast.walk(ast.parse(SOURCES[name])):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            for imported in [node.module or "."] if isinstance(node, ast.ImportFrom) else names:
                top = imported.split(".")[0]
                assert top in sys.stdlib_module_names or top in pinned, f"imports {imported}"


def test_run_options_are_the_same():
    """Name, type, default, comment; but each has its own first task, a3c no GPU and workers."""
    texts = {}
    for name in SCRIPTS:
        run = blocks(name)["Args"].partition("\n\n")[2].partition("\n\n    def ")[0]
        assert run.startswith("    env_id: str") and "    resume: str" in run
        texts[name] = re.sub('env_id: str = "[^"]+"', "", run)
    for option in "device", "seed":
        [line] = re.findall(f"    {option}: .*\n", texts["ppo"])
        texts["a3c"] = re.sub(f"    {option}: .*\n", line, texts["a3c"])
    assert len(set(texts.values())) == 1
