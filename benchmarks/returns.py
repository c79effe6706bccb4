"""Run the rows of returns.toml and report which published returns are reached.

    python benchmarks/returns.py --script ppo            the standard rows of ppo.py, what is missing
    python benchmarks/returns.py --script ppo --peer     stable-baselines3 on the same rows and seeds
    python benchmarks/returns.py --carry                 where seed 1 is as it was, keep the others
    python benchmarks/returns.py --report                tables and plots from what was measured
    python benchmarks/returns.py --check                 exit status 1 if a row is short or stale

Each finished run is appended to results/returns.csv, so that an interrupted call goes on where it
was. script_sha hashes the script's syntax tree, without docstrings and annotations, and the row's
options: a result whose hash is not today's is stale, shown as such, and run again.
"""

import argparse
import ast
import csv
import functools
import hashlib
import itertools
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS, CURVES = HERE / "results/returns.csv", HERE / "results/curves.csv"
COLUMNS = (
    "script env seed env_steps metric return_mean return_std episodes wall_seconds script_sha "
    "torch python cpu"
).split()
EVALUATIONS = 20  # during training, for rows whose metric is the best of them
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
LOCK = threading.Lock()


def rows(arguments):
    """The rows asked for, in the order of the file."""
    table = tomllib.loads((HERE / "returns.toml").read_text(encoding="utf-8"))["row"]
    for row in table:
        asked = arguments.tier in (row["tier"], "all")
        asked &= arguments.script in (None, row["script"]) and arguments.env in (None, row["env"])
        if asked and (ROOT / f"{row['script']}.py").exists():
            yield row


def command(row):
    """The options that make a run of this row, seed and run directory aside."""
    options = f"--env-id {row['env']} --total-timesteps {row['steps']} {row.get('options', '')}"
    if row["metric"] == "greedy":
        options += " --eval-episodes 100"
    elif row["metric"] == "best":
        options += f" --eval-episodes 10 --eval-every {row['steps'] // EVALUATIONS}"
    return " ".join(options.split())


def dump(node):
    """The syntax tree as nested lists; ast.dump differs between versions of Python."""
    if isinstance(node, ast.AST):
        fields = [(k, dump(v)) for k, v in ast.iter_fields(node) if v not in (None, [])]
        return [type(node).__name__, *fields]
    return [dump(item) for item in node] if isinstance(node, list) else repr(node)


@functools.cache
def script_dump(path, given, _modified):
    """The syntax tree without docstrings, annotations and defaults of given options, as text."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
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
        if isinstance(node, ast.arg):
            node.annotation = None
    return str(dump(tree))


def sha(row, peer=False):
    """Hash of what decides the result: syntax tree and options, or the peer's settings."""
    if peer:
        pinned = re.search(r"stable-baselines3==\S+", (HERE / "requirements.txt").read_text())[0]
        text = f"{pinned} {row['env']} {row['steps']} {sorted(row['peer'].items())}"
        return hashlib.sha256(text.encode()).hexdigest()[:12]
    path = ROOT / f"{row['script']}.py"
    given = tuple(name.replace("-", "_") for name in re.findall(r"--(\S+)", command(row)))
    text = f"{script_dump(path, given, path.stat().st_mtime_ns)} {command(row)}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def measured():
    """The rows of results/returns.csv."""
    if not RESULTS.exists():
        return []
    with open(RESULTS, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def append(path, columns, lines):
    """Append lines, dictionaries, to the table path; its first line names the columns."""
    with LOCK:
        path.parent.mkdir(exist_ok=True)
        new = not path.exists()
        with open(path, "a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(lines)


def cpu():
    try:
        model = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        model = platform.processor()
    return f"{model} x{os.cpu_count()}"


def scalars(run_dir, tag):
    """(steps, values) that a run logged under tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    events = log.Scalars(tag) if tag in log.Tags()["scalars"] else []
    return np.array([event.step for event in events]), np.array([event.value for event in events])


def run_ours(row, seed, run_dir):
    """One run of a script: the fields of its line in the table, and its learning curve."""
    line = [sys.executable, str(ROOT / f"{row['script']}.py"), *shlex.split(command(row))]
    line += ["--seed", str(seed), "--run-dir", str(run_dir)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # runs side by side share the cores
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{shlex.join(line)}\nfailed:\n{done.stderr}")
    result = dict(pair.split("=") for pair in done.stdout.splitlines()[-1].split())
    values = {
        "return_mean": float(result["eval_return_mean"]),
        "return_std": float(result["eval_return_std"]) if row["metric"] == "greedy" else "",
        "episodes": int(result["eval_episodes"]),
    }
    steps, returns = scalars(run_dir, "charts/episodic_return")
    if row["metric"] == "best":
        values["return_mean"] = round(float(scalars(run_dir, "charts/eval_return")[1].max()), 2)
    elif row["metric"] == "train":  # the last value is the mean of the last 100 episodes
        values.update(return_mean=float(returns[-1]), episodes=100)
    values.update(env_steps=int(result["env_steps"]), wall_seconds=float(result["wall_seconds"]))
    return values, (steps, returns)


def run_peer(row, seed):
    """stable-baselines3 with rl-zoo's settings on one row, evaluated as ours is."""
    import gymnasium as gym
    import stable_baselines3
    import torch
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecNormalize

    torch.set_num_threads(1)
    settings = dict(row["peer"])
    normalize = settings.pop("normalize", False)
    env = make_vec_env(row["env"], settings.pop("n_envs", 1), seed=seed)
    test = make_vec_env(row["env"], 1, seed=2**30 + seed)
    if normalize:
        env = VecNormalize(env, gamma=settings.get("gamma", 0.99))
        test = VecNormalize(test, training=False, norm_reward=False)
        test.obs_rms = env.obs_rms
    for name, value in settings.items():  # rl-zoo's notation for linear decay
        if isinstance(value, str) and value.startswith("lin_"):
            settings[name] = lambda left, first=float(value[4:]): left * first
    algorithm = getattr(stable_baselines3, settings.pop("algorithm"))
    start = time.time()
    model = algorithm("MlpPolicy", env, seed=seed, device="cpu", **settings).learn(row["steps"])
    returns, _ = evaluate_policy(model, test, 100, return_episode_rewards=True)
    assert isinstance(env.action_space, gym.Space)
    print(np.mean(returns), np.std(returns), model.num_timesteps, time.time() - start)


def run(row, seed, peer):
    """One run, appended to the tables."""
    from importlib.metadata import version

    name = f"sb3-{row['script']}" if peer else row["script"]
    run_dir = ROOT / "runs/benchmarks" / f"{name}__{row['env']}__{row['steps']}__{seed}"
    for old in run_dir.glob("*"):
        old.unlink()
    line = {"script": name, "env": row["env"], "seed": seed, "script_sha": sha(row, peer)}
    line |= {"torch": version("torch"), "python": platform.python_version(), "cpu": cpu()}
    line |= {"metric": "greedy" if peer else row["metric"]}
    if peer:
        code = f"import returns; returns.run_peer({row!r}, {seed})"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], cwd=HERE, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(done.stderr)
        mean, std, steps, seconds = map(float, done.stdout.splitlines()[-1].split())
        line |= {"return_mean": mean, "return_std": std, "episodes": 100}
        line |= {"env_steps": int(steps), "wall_seconds": round(seconds, 1)}
    else:
        values, (steps, returns) = run_ours(row, seed, run_dir)
        line |= values
        some = np.unique(np.linspace(0, len(steps) - 1, 100).astype(int)) if len(steps) else []
        keys = {"script": name, "env": row["env"], "seed": seed, "script_sha": line["script_sha"]}
        points = [{**keys, "step": steps[i], "return": f"{returns[i]:.4g}"} for i in some]
        append(CURVES, [*keys, "step", "return"], points)
    append(RESULTS, COLUMNS, [line])
    print(f"{name} {row['env']} seed {seed}: {line['return_mean']:.1f}", flush=True)


def run_missing(arguments):
    """What is asked for and not in the table, --jobs runs side by side."""
    have = {(line["script"], line["env"], line["seed"], line["script_sha"]) for line in measured()}
    todo = []
    for row, seed in itertools.product(rows(arguments), arguments.seeds):
        peer = arguments.peer
        name = f"sb3-{row['script']}" if peer else row["script"]
        if peer and "peer" not in row:
            continue
        if (name, row["env"], str(seed), sha(row, peer)) not in have:
            todo.append((row, seed, peer))
    print(f"{len(todo)} runs to do")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        futures = [pool.submit(run, *job) for job in todo]
        try:
            for future in as_completed(futures):
                future.result()
        finally:  # after Ctrl-C or a failure nothing new begins
            pool.shutdown(wait=False, cancel_futures=True)


def carry(arguments):
    """Take over the other seeds of stale rows whose seed 1 came out as it had been, curve and all.

    That is so after a change that leaves the computation as it was, such as a new default argument.
    """
    table = measured()
    with open(CURVES, encoding="utf-8", newline="") as file:
        points = list(csv.DictReader(file))

    def outcome(row, old):
        """What seed 1 gave under that hash."""
        columns = "env_steps", "metric", "return_mean", "return_std"
        first = [line for line in of(table, row, old) if line["seed"] == "1"]
        curve = [x for x in of(points, row, old) if x["seed"] == "1"]
        return first and [first[0][c] for c in columns], [(x["step"], x["return"]) for x in curve]

    def of(lines, row, old):
        found = (line for line in lines if line["script_sha"] == old)
        return [x for x in found if (x["script"], x["env"]) == (row["script"], row["env"])]

    for row in rows(arguments):
        today, have = sha(row), {line["seed"] for line in of(table, row, sha(row))}
        for old in {line["script_sha"] for line in table} - {today}:
            more = {line["seed"] for line in of(table, row, old)} - have
            if more and "1" in have and outcome(row, old) == outcome(row, today):
                for path, lines in (RESULTS, of(table, row, old)), (CURVES, of(points, row, old)):
                    new = [
                        line | {"script_sha": today} for line in lines if line["seed"] not in have
                    ]
                    append(path, list(lines[0]), new)
                have |= more
                print(f"{row['script']} {row['env']}: seeds {sorted(more)} stand, as under {old}")


def interval(values):
    """95% bootstrap interval of the mean over seeds."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (10_000, len(values))).mean(1)
    return np.percentile(means, [2.5, 97.5])


def judge(row):
    """What returns.toml calls published, level or short; with the numbers that decide."""
    ours, stale, peer, today = {}, False, {}, sha(row)
    for line in measured():
        if line["env"] != row["env"] or int(line["seed"]) > 100:
            continue
        if line["script"] == row["script"] and line["metric"] == row["metric"]:
            if line["script_sha"] == today:
                ours[line["seed"]] = line
            elif row["steps"] <= int(line["env_steps"]) < 1.1 * row["steps"]:
                stale = True
        if "peer" in row and line["script"] == f"sb3-{row['script']}":
            if line["script_sha"] == sha(row, peer=True):
                peer[line["seed"]] = float(line["return_mean"])
    whole = ours.keys() <= peer.keys()  # the peer's bar is of the same seeds
    peer_mean = np.mean([peer[seed] for seed in ours]) if ours and whole else None
    out = {"row": row, "seeds": len(ours), "peer": peer_mean}
    walls = [float(line["wall_seconds"]) for line in ours.values()]
    seconds = np.median(walls) if ours else 0
    if len(ours) < (3 if row["tier"] == "full" or seconds > 600 else 5):  # 3 of over 10 minutes
        return {**out, "verdict": "stale" if stale else "unfinished" if ours else "not run"}
    values = np.array([float(line["return_mean"]) for line in ours.values()])
    low, high = interval(values)
    least = row["reference"] - row["tolerance"]
    bar = row["reference"] if out["peer"] is None else min(row["reference"], out["peer"])
    verdict = "short"
    if values.mean() >= least:
        verdict = "published"
    elif high >= bar - row["tolerance"]:
        verdict = "level"
    out |= {"values": values, "low": low, "high": high, "wall": seconds, "hours": sum(walls) / 3600}
    return {**out, "verdict": verdict}


def report(arguments):
    """Tables into benchmarks/README.md, learning curves into benchmarks/plots."""
    lines = [
        "| script | environment | steps | metric | reference | sb3 | ours | 95% | seeds | wall | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    arguments.tier = "all"
    table, runs, hours = [], 0, 0.0
    for row in rows(arguments):
        result = judge(row)
        if row["tier"] == "full" and result["verdict"] == "not run":
            continue
        table.append(row)
        peer = "" if result["peer"] is None else f"{result['peer']:.1f}"
        line = f"| {row['script']} | {row['env']} | {row['steps']:,} | {row['metric']} "
        line += f"| {row['reference']} ± {row['tolerance']} | {peer} "
        if "values" in result:
            line += (
                f"| {result['values'].mean():.1f} | {result['low']:.1f} to {result['high']:.1f} "
            )
            line += f"| {result['seeds']} | {result['wall']:.0f} s "
            if row["tier"] == "standard":
                runs, hours = runs + result["seeds"], hours + result["hours"]
        else:
            line += "| | | | "
        remark = f"; {row['remark']}" if "remark" in row else ""
        lines.append(f"{line}| {result['verdict']}{remark} |")
    lines += ["", f"The {runs} runs took {hours:.1f} hours together, half of that two at a time."]
    lines += ["", "Each row again, with seed 1:", "", "```"]
    lines += [f"python {row['script']}.py --seed 1 {command(row)}" for row in table]
    write_between(HERE / "README.md", "returns", [*lines, "```"])
    short = [
        "| script | environment | steps | published | ours | 95% | |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in filter(lambda result: "values" in result, map(judge, table)):
        row, low, high = result["row"], result["low"], result["high"]
        short.append(
            f"| {row['script']} | {row['env']} | {row['steps']:,} | {row['reference']} "
            f"| {result['values'].mean():.1f} | {low:.1f} to {high:.1f} | {result['verdict']} |"
        )
    write_between(ROOT / "README.md", "returns", short)
    plot(table)


def write_between(path, name, lines):
    """Replace what stands between the two markers of this name in the file."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = path.read_text(encoding="utf-8").split(begin)
    text = "\n".join([begin, *lines, end])
    path.write_text(before + text + rest.split(end)[1], encoding="utf-8")


def plot(table):
    """One picture an environment: training returns, mean over seeds and 95% band; the references."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    if not CURVES.exists():
        return
    with open(CURVES, encoding="utf-8", newline="") as file:
        points = list(csv.DictReader(file))
    (HERE / "plots").mkdir(exist_ok=True)
    by_env = {}
    for row in table:
        by_env.setdefault(row["env"], []).append(row)
    drawn = []
    for env, its_rows in by_env.items():
        figure, axes = plt.subplots(figsize=(4.5, 3), layout="constrained")
        if any([draw(axes, row, points) for row in its_rows]):
            figure.savefig(HERE / f"plots/{env}.png", dpi=110)
            drawn.append(env)
        plt.close(figure)
    if not drawn:
        return
    columns = min(3, len(drawn))
    shape = (-(-len(drawn) // columns), columns)
    figure, grid = plt.subplots(*shape, figsize=(4 * columns, 2.7 * shape[0]), squeeze=False)
    for axes in grid.flat[len(drawn) :]:
        axes.set_visible(False)
    for env, axes in zip(drawn, grid.flat, strict=False):
        for row in by_env[env]:
            draw(axes, row, points)
    figure.tight_layout()
    figure.savefig(HERE / "plots/overview.png", dpi=90)


def draw(axes, row, points):
    """The curve of one row, if it was measured with today's script."""
    seeds, today = {}, sha(row)
    for point in points:
        if point["script"] == row["script"] and point["env"] == row["env"]:
            if point["script_sha"] == today and int(point["seed"]) <= 100:
                seeds.setdefault(point["seed"], []).append(
                    (int(point["step"]), float(point["return"]))
                )
    if not seeds:
        return False
    x = np.linspace(0, row["steps"], 100)
    curves = np.array(
        [np.interp(x, *zip(*sorted(curve), strict=True), left=np.nan) for curve in seeds.values()]
    )
    from matplotlib.ticker import EngFormatter

    bands = np.array([interval(column) for column in curves.T])
    color = COLORS[row["script"]]
    axes.plot(x, curves.mean(0), label=row["script"], color=color)
    axes.fill_between(x, *bands.T, alpha=0.25, color=color, linewidth=0)
    axes.axhline(row["reference"], linestyle=":", color=color, linewidth=1)
    axes.set(title=row["env"], xlabel="environment steps", ylabel="return of an episode")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k
    axes.locator_params(axis="x", nbins=5)
    axes.legend(loc="lower right", frameon=False, fontsize=7)
    return True


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--script", help="only the rows of this script")
    parser.add_argument("--env", help="only the rows of this environment")
    parser.add_argument("--tier", default="standard", choices=["standard", "full", "all"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--peer", action="store_true", help="run stable-baselines3 instead")
    parser.add_argument("--carry", action="store_true", help="keep seeds that a change left alone")
    parser.add_argument("--report", action="store_true", help="write tables and plots; run nothing")
    parser.add_argument("--check", action="store_true", help="fail where a row is short or stale")
    arguments = parser.parse_args()
    if arguments.report and (arguments.script or arguments.env):
        parser.error("--report is of all rows")
    if arguments.check:
        results = list(map(judge, rows(arguments)))
        for result in results:
            if result["verdict"] != "published":
                print(result["verdict"], result["row"]["script"], result["row"]["env"])
        sys.exit(not results or any(r["verdict"] not in ("published", "level") for r in results))
    if arguments.carry:
        carry(arguments)
    elif arguments.report:
        report(arguments)
    else:
        run_missing(arguments)


if __name__ == "__main__":
    main()
