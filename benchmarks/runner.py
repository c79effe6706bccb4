"""What the benchmarks share: running a script, keeping what was measured, intervals, tables."""

import ast
import csv
import functools
import hashlib
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version

import numpy as np
import torch

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
CONFIRMED = HERE / "results/confirmed.csv"
SHORT = dict.fromkeys(("ddpg", "td3", "sac"), "--total-timesteps 800 --burn-in 300")
SHORT["a3c"] = "--total-timesteps 3000 --workers 1"  # with more no run is like another
COLORS = dict(  # of a script in every plot
    reinforce="black",
    a2c="tab:blue",
    a3c="tab:cyan",
    cem="tab:olive",
    cmaes="tab:green",
    nes="limegreen",
    dqn="tab:purple",
    double_dqn="orchid",
    awr="tab:brown",
    ppo="tab:red",
    ddpg="tab:orange",
    td3="navy",
    sac="tab:gray",
)
# Student's t, 97.5% quantile, by degrees of freedom
T = """12.70620 4.30265 3.18245 2.77645 2.57058 2.44691 2.36462 2.30600 2.26216 2.22814 2.20099 2.17881
2.16037 2.14479"""
T = [float(quantile) for quantile in T.split()]
LOCK = threading.Lock()


def read(path):
    """The lines of a table, as dictionaries of text."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def append(path, line):
    """Append a dictionary to a table, whose first line names the columns."""
    with LOCK:
        path.parent.mkdir(exist_ok=True)
        new = not path.exists()
        with open(path, "a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(line), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(line)


def write(path, lines):
    """Write a table anew."""
    path.unlink(missing_ok=True)
    for line in lines:
        append(path, line)


def scalars(run_dir, tag):
    """(steps, values) that a run logged under tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    events = log.Scalars(tag) if tag in log.Tags()["scalars"] else []
    return np.array([event.step for event in events]), np.array([event.value for event in events])


def curve(steps, values, points=20):
    """A learning curve as text, step:value step:value ..., of at most so many points."""
    last = dict(zip(steps.tolist(), values.tolist(), strict=True))  # of two at a step the later
    kept = np.unique(np.linspace(0, len(last) - 1, min(points, len(last))).astype(int))
    pairs = list(last.items())
    return " ".join(f"{pairs[i][0]}:{pairs[i][1]:.5g}" for i in kept)


def points(text):
    """(steps, values) of a learning curve that is text."""
    pairs = [pair.split(":") for pair in text.split()]
    return np.array([(int(step), float(value)) for step, value in pairs]).reshape(-1, 2).T


def execute(script, options, run_dir, folder=ROOT, **environment):
    """Run the script of a folder on one thread: the pairs of its last line, as numbers."""
    line = [sys.executable, f"{folder}/{script}.py", *shlex.split(options)]
    line += ["--run-dir", str(run_dir)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(line)}\nfailed:\n{done.stderr[-2000:]}")
    pairs = [pair.split("=") for pair in done.stdout.splitlines()[-1].split()]
    return {name: float(value) for name, value in pairs}


def side_by_side(work, jobs, count):
    """Call work(*job) for each job, so many at once; after a failure or Ctrl-C nothing new begins."""
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(work, *job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def machine():
    """Versions and processor that a result was measured with."""
    try:
        model = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        model = platform.processor()
    python = platform.python_version()
    return f"torch {version('torch')}, Python {python}, {model} x{os.cpu_count()}"


def commit(*paths):
    """The commit that the working tree stands on; a RuntimeError if these paths differ from it."""
    changed = subprocess.check_output(["git", "status", "--porcelain", *paths], cwd=ROOT, text=True)
    if changed:
        raise RuntimeError(f"commit before you measure: {' '.join(changed.split()[1::2])}")
    line = ["git", "rev-parse", "--short=10", "HEAD"]
    return subprocess.check_output(line, cwd=ROOT, text=True).strip()


def dump(node):
    """The syntax tree as nested lists; ast.dump differs between versions of Python."""
    if isinstance(node, ast.AST):
        fields = [(k, dump(v)) for k, v in ast.iter_fields(node) if v not in (None, [])]
        return [type(node).__name__, *fields]
    return [dump(item) for item in node] if isinstance(node, list) else repr(node)


@functools.cache
def syntax(source, given):
    """The part of the syntax tree that decides a result, as text.

    It is without docstrings, annotations, defaults of given options, the end of a run (__exit__),
    the arguments of the log and the texts of refusals.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and field.target.id in given:
                    field.value = None
        documented = isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module))
        if documented and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.FunctionDef) and node.name == "__exit__":
            node.body = []
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "SummaryWriter",
            "Refusal",
        ):
            node.args = node.keywords = []
    return str(dump(tree))


def sha(script, options):
    """Hash of what decides a result: what syntax() keeps of the script, and the options."""
    source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    given = tuple(name.replace("-", "_") for name in re.findall(r"--(\S+)", options))
    return hashlib.sha256(f"{syntax(source, given)} {options}".encode()).hexdigest()[:12]


def stands(run, made, now):
    """Whether results of the code with one hash are also those of the code with another."""
    written = CONFIRMED.stat().st_mtime_ns if CONFIRMED.exists() else 0
    return made == now or (run, made, now, "yes") in compared(CONFIRMED, written)


@functools.cache
def compared(path, _written):
    """The comparisons in the table, as it was when it was last written."""
    return {(x["run"], x["sha"], x["now"], x["same"]) for x in read(path)}


def compare(run, options, made, now, stands_on):
    """Compare the script of an earlier commit with today's, in a short run; keep what was found.

    run names the results, the script first, made and now are the hashes of their code. They are the
    same if all that today's checkpoint holds is in the other one too, bit for bit.
    """
    asked = {(line["run"], line["sha"], line["now"]) for line in read(CONFIRMED)}
    if made == now or (run, made, now) in asked:
        return
    script = run.split()[0]
    kept = re.sub(r"--(total-timesteps|eval-episodes|eval-every) \S+ ?", "", options)
    short = SHORT.get(script, "--total-timesteps 3000")
    options = f"{kept.strip()} {short} --eval-episodes 1 --seed 101"
    then, today = (learned(script, options, commit) for commit in (stands_on, "HEAD"))
    found = {"same": "yes" if today.items() <= then.items() else "no", "options": options}
    append(CONFIRMED, {"run": run, "sha": made, "now": now, "commit": stands_on} | found)
    print(f"{run} of {stands_on}, the same: {found['same']}", flush=True)


def learned(script, options, stands_on):
    """What the script of a commit has in its checkpoint after a run: name -> text, its options aside.

    The text of a tensor is a hash of its bytes.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = subprocess.check_output(["git", "show", f"{stands_on}:{script}.py"], cwd=ROOT)
        pathlib.Path(folder, f"{script}.py").write_bytes(source)
        execute(script, options, f"{folder}/run", folder)
        checkpoint = torch.load(f"{folder}/run/checkpoint.pt", weights_only=True)
    del checkpoint["args"]
    found = {}

    def add(name, x):
        if isinstance(x, dict | list | tuple):
            for part, value in x.items() if isinstance(x, dict) else enumerate(x):
                add(f"{name}.{part}", value)
        elif isinstance(x, torch.Tensor):
            found[name] = hashlib.sha256(x.numpy().tobytes()).hexdigest()
        else:
            found[name] = str(x)

    add("", checkpoint)
    return found


def interval(values):
    """The 95% interval of the mean by Student's t; of a single value, infinitely wide."""
    values = np.asarray(values, float)
    if len(values) == 1:
        return -np.inf, np.inf
    half = T[len(values) - 2] * values.std(ddof=1) / len(values) ** 0.5
    return values.mean() - half, values.mean() + half


def between(path, name, lines):
    """The text of a file with these lines between its two markers of this name."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = path.read_text(encoding="utf-8").split(begin)
    return before + "\n".join([begin, *lines, end]) + rest.split(end)[1]


def write_between(path, name, lines):
    """Put these lines between the two markers of this name."""
    path.write_text(between(path, name, lines), encoding="utf-8")
