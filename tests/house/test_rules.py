"""The house rules: what holds in every script, read off the sources and by running them alone."""

import ast
import csv
import difflib
import io
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib

import pytest
from conftest import NEW, OLD, ROOT, SCRIPTS, SOURCES, TABLE, module
from lookup import readme

SECTIONS = ["Equations", "Networks", "Buffer", "Training", "Plumbing"]
OLD_SECTIONS = ["Networks", "Buffer", "Equations", "Training", "Plumbing"]
HEADINGS = set((ROOT / "tests/sections.txt").read_text(encoding="utf-8").splitlines())
HEADINGS |= {line.split("\t")[0] for line in TABLE}  # where two headings are the same: "A / B"

# Rule 1: the names that may differ in text between scripts, and why.
OWN = {
    "Args": "each algorithm has its options",
    "train": "the algorithm itself",
    "initialise": "the networks that the algorithm has",
    "update": "the algorithm itself",
    "make_policy": "the policy that the algorithm has",
}

# Rule 2: descendant -> (ancestor, names that may differ or be new, most code lines that may differ).
CMAES = set(
    "Args train sample select cem_update check_memory sample_correlated rank_weights update_mean "
    "elite_covariance square_root strategy_parameters cumulate relative_length h_sigma "
    "update_step_size update_covariance".split()
)
TD3 = set("Args train update initialise ddpg_target td3_target smooth".split())
SAC = set(
    "Args train update initialise explore smooth td3_target actor_loss mean_and_log_std "
    "tanh_gaussian sac_target soft_actor_loss temperature_gradient".split()
)
LINEAGE = {
    "double_dqn": ("dqn", {"double_dqn_target", "dqn_target", "train"}, 10),
    "td3": ("ddpg", TD3, None),
    "sac": ("td3", SAC, None),
    "a3c": ("a2c", {"Args", "train", "running_sums", "start_processes", "all_mean"}, None),
    "cmaes": ("cem", CMAES, None),
}


# Rule 4 for the plain scripts: most code lines and tokens (names, operators and numbers) of what a
# reader reads, Equations, Networks, Buffer and Training together; of the plumbing, of which torchrun
# has its own; and of the head, imports and Args. Not to be raised to what a script has grown to.
BUDGET = {
    "ppo": (220, 2_900),
    "dqn": (135, 1_750),
    "double_dqn": (135, 1_780),
    "sac": (175, 2_350),
}
PLUMBING = {"ppo": (140, 1_750)}
HEAD = (75, 450)

# Code lines of the scripts before that pattern.
MOST = {
    "cem": 255,
    "cmaes": 330,
    "nes": 315,
    "reinforce": 372,
    "a2c": 335,
    "a3c": 360,
    "awr": 430,
    "ddpg": 330,
    "td3": 340,
}


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


def equation_table():
    with open(ROOT / "tests/equations.tsv", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


@pytest.mark.parametrize("scripts", [NEW, OLD], ids=["plain", "before"])
def test_same_name_same_text(scripts):
    texts = {}
    for name in scripts:
        for block, text in blocks(name).items():
            texts.setdefault(block, {}).setdefault(text, []).append(name)
    differ = {b: list(t.values()) for b, t in texts.items() if len(t) > 1 and b not in OWN}
    assert not differ, f"same name, different text: {differ}"


def test_options_are_checked_alike():
    """__post_init__ is one text, but that scripts without torchrun refuse it."""
    checks = {}
    for name in NEW:
        text = blocks(name)["Args"].partition("    def __post_init__")[2]
        checks.setdefault(
            text.partition("        if dist.is_torchelastic_launched")[0].rstrip(), []
        ).append(name)
        assert ("does not run under torchrun" in text) == (name != "ppo")
    assert len(checks) == 1


def same_era(name):
    return (name in NEW) == (LINEAGE[name][0] in NEW)


@pytest.mark.parametrize("name", filter(same_era, LINEAGE))
def test_lineage(name):
    ancestor, may_differ, most = LINEAGE[name]
    ours, theirs = blocks(name), blocks(ancestor)
    differ = {b for b in ours.keys() | theirs.keys() if ours.get(b) != theirs.get(b)}
    assert differ <= may_differ, f"{name} departs from {ancestor} in {differ - may_differ}"
    if most is not None:
        code = []
        for script in (ancestor, name):
            lines = SOURCES[script].splitlines()
            code.append([lines[number - 1] for number in sorted(code_lines(SOURCES[script]))])
        changed = [line[0] for line in difflib.ndiff(*code)]
        assert max(changed.count("+"), changed.count("-")) <= most


@pytest.mark.parametrize("name", SCRIPTS)
def test_sections_in_order(name):
    order, _ = section_of_lines(name)
    expected = SECTIONS if name in NEW else OLD_SECTIONS
    assert order == [section for section in expected if section in order]
    assert {"Equations", "Training", "Plumbing"} <= set(order)
    last = LAST_LINES if name in NEW else OLD_LAST_LINES
    assert SOURCES[name].rstrip().endswith(last), "the last thing is the command line"


LAST_LINES = """
        train(args)
    except Refusal as error:
        print(f"{SCRIPT}.py: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)""".rstrip()

OLD_LAST_LINES = """
if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.resume:  # what the command line leaves out is as in the checkpoint
        args = tyro.cli(Args, default=load_checkpoint(args.resume, {})["args"])
    try:
        train(args)
    except (gym.error.Error, ImportError, OSError) as error:
        stop(f"{type(error).__name__}: {error}")""".strip()


@pytest.mark.parametrize("name", SCRIPTS)
def test_steps_of_the_docstring_are_in_train(name):
    steps = re.findall(r"^    (\d+)\. ", ast.get_docstring(ast.parse(SOURCES[name])), re.M)
    training = blocks(name)["train"] + blocks(name).get("update", "")
    comments = re.findall(r"^ +# (\d+)\.", training, re.M)
    assert steps == [str(n + 1) for n in range(len(steps))] and 3 <= len(steps) <= 15
    assert comments == steps, "train shows the numbered steps, each once and in order"


@pytest.mark.parametrize("name", SCRIPTS)
def test_equation_functions_cite_the_document(name):
    table = {(row["section"], row["n"]): row for row in equation_table()}
    for function, doc in equation_functions(name).items():
        cited = citations(doc)
        assert cited, f"{function} cites no section"
        for section, number in cited:
            assert section in HEADINGS, f"{function}: no section {section!r}"
            if number:
                row = table[section, number]
                assert f"{name}.py:{function}" in row["where"].split(), f"not in the table: {row}"
    quoted = re.findall(r'"([^"]+)"', ast.get_docstring(ast.parse(SOURCES[name])).split("\n\n")[1])
    assert quoted, "the docstring says where in the derivations it stands"
    for section in quoted:
        assert " ".join(section.split()) in HEADINGS, f"no section {section!r}"


def test_equation_table():
    rows = equation_table()
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


def test_the_look_up_is_that_of_the_table():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == readme(), "README.md is out of date: python tests/lookup.py"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_and_definition_is_documented(name):
    for line in blocks(name)["Args"].partition("    def ")[0].splitlines():
        if ":" in line and line.startswith("    ") and line.strip():
            assert re.search(r"  # \S", line), f"no comment: {line.strip()}"
    for block, text in blocks(name).items():
        node = ast.parse(text).body[0]
        assert block == "Args" or ast.get_docstring(node), f"{block} has no docstring"


@pytest.mark.parametrize("name", NEW)
def test_budget(name):
    parts = {
        "head": (size(name, "Head"), HEAD),
        "algorithm": (size(name, "Equations", "Networks", "Buffer", "Training"), BUDGET[name]),
        "plumbing": (size(name, "Plumbing"), PLUMBING.get(name, (125, 1_500))),
    }
    for part, (has, most) in parts.items():
        assert has[0] <= most[0] and has[1] <= most[1], f"{part}: {has} lines and tokens of {most}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_shape(name):
    if name in OLD:
        assert len(code_lines(SOURCES[name])) <= MOST[name]
    assert max(map(len, SOURCES[name].splitlines())) <= 100
    for function in equation_functions(name):
        assert len(code_lines(blocks(name)[function])) <= 25

    def depth(node):
        inner = max(map(depth, ast.iter_child_nodes(node)), default=0)
        return inner + isinstance(node, (ast.For, ast.While, ast.If, ast.With, ast.Try))

    assert max(depth(node) for node in ast.walk(ast.parse(SOURCES[name]))) <= 4 + (name in NEW)


@pytest.mark.parametrize("name", NEW)
def test_the_script_metadata_are_the_requirements(name):
    block = re.search(r"# /// script\n(.*?)# ///\n", SOURCES[name], re.S)[1]
    said = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))
    needed = (ROOT / "requirements.txt").read_text().split()
    assert said["dependencies"] == [line for line in needed if not line.startswith("pytest")]
    assert said["requires-python"] == ">=3.11"


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports_only_what_requirements_pin(name):
    pinned = set(re.findall(r"^([\w-]+)", (ROOT / "requirements.txt").read_text(), re.M))
    pinned -= {"pytest", "moviepy", "mujoco"}  # for tests, and for gymnasium
    for node in ast.walk(ast.parse(SOURCES[name])):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            for imported in [node.module or "."] if isinstance(node, ast.ImportFrom) else names:
                top = imported.split(".")[0]
                assert top in sys.stdlib_module_names or top in pinned, f"imports {imported}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_runs_alone(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    options = ["--total-timesteps", "1", "--eval-episodes", "2"]
    run = subprocess.run(
        [sys.executable, f"{name}.py", *options], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    pattern = (
        r"eval_return_mean=\S+ eval_return_std=\S+ eval_episodes=2 env_steps=\d+ wall_seconds=\S+"
    )
    assert re.fullmatch(pattern, run.stdout.splitlines()[-1])
    [path] = tmp_path.glob("runs/*/checkpoint.pt")
    if name in OLD:
        assert not run.stderr
    else:  # the bar names the run directory before training, also where it is not a terminal
        assert run.stderr.strip().startswith(f"{path.parent.relative_to(tmp_path)}:   0%")


@pytest.mark.parametrize("scripts", [NEW, OLD], ids=["plain", "before"])
def test_common_options_mean_the_same(scripts):
    common = set(
        "total_timesteps env_id seed device run_dir eval_episodes eval_every capture_video "
        "checkpoint_every resume".split()
    )
    common |= {"env_kwargs"} if scripts is NEW else set()
    texts = set()
    for name in scripts:
        assert common <= set(module(name).Args.__dataclass_fields__)
        lines = blocks(name)["Args"].partition("    def ")[0].splitlines()
        lines = [line for line in lines if line.split(":")[0].strip() in common]
        own = ("    env_id", "    total_timesteps")  # each script's own first task
        texts.add("\n".join(line for line in lines if not line.startswith(own)))
    assert len(texts) == 1
