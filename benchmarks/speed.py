"""Steps per second and time to a return, beside stable-baselines3 or pycma with the same settings.

    python benchmarks/speed.py                  rows of speed.toml that are missing or stale
    python benchmarks/speed.py --only dqn       those of them whose name contains dqn
    python benchmarks/speed.py --report         the tables of README.md; measures nothing

The two sides take turns, A B A B ..., each in a process of its own, so that a machine whose speed
drifts treats both alike. Steps per second are those of the training loop, logging to TensorBoard on
both sides, without evaluation or checkpoints: of ours the last charts/SPS, of theirs learn(). A
cold start is everything, from the start of the process to the end of the evaluation. Run nothing
beside it. Each row goes to results/speed.json as it is measured, with a hash of the script and the
row; it is measured once, and again only after one of these has changed.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import tomllib
from types import SimpleNamespace

import numpy as np
from runner import HERE, ROOT, scalars, sha, write_between

RESULTS = HERE / "results/speed.json"


def ours(row, threads, extra="", processes=0):
    """One run of our script: its speed in steps per second, what it printed, and what it took."""
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {processes}"
    with tempfile.TemporaryDirectory() as run_dir:
        line = f"{sys.executable} {launcher if processes else ''} {ROOT}/{row['script']}.py"
        line += f" --env-id {row['env']} {row['options']} --run-dir {run_dir} {extra}"
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        start = time.time()
        done = subprocess.Popen(
            shlex.split(line), stdout=subprocess.PIPE, text=True, env=environment
        )
        output = done.stdout.read()
        _, status, usage = os.wait4(done.pid, 0)
        seconds = time.time() - start
        if status:
            sys.exit(f"{line}\nfailed")
        return SimpleNamespace(
            speed=scalars(run_dir, "charts/SPS")[1][-1],
            length=scalars(run_dir, "charts/episodic_length")[1].mean(),
            result=dict(pair.split("=") for pair in output.splitlines()[-1].split()),
            seconds=seconds,
            megabytes=usage.ru_maxrss / 1024,
        )


PEER = """
import json, sys, tempfile, time
settings = json.loads(sys.argv[1])
import stable_baselines3, torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
torch.set_num_threads(settings.pop("threads"))
steps, episodes, seed = settings.pop("steps"), settings.pop("episodes"), settings.pop("seed")
env = make_vec_env(settings.pop("env"), settings.pop("n_envs", 1), seed=seed)
algorithm = getattr(stable_baselines3, settings.pop("algorithm"))
if "noise_std" in settings:
    from stable_baselines3.common.noise import NormalActionNoise
    zeros = 0 * env.action_space.high
    settings["action_noise"] = NormalActionNoise(zeros, zeros + settings.pop("noise_std"))
with tempfile.TemporaryDirectory() as logs:
    model = algorithm("MlpPolicy", env, device="cpu", tensorboard_log=logs, seed=seed, **settings)
    start = time.time()
    model.learn(steps)
    seconds = time.time() - start
mean = evaluate_policy(model, env, episodes)[0] if episodes else 0
print(json.dumps([model.num_timesteps / seconds, mean]))
"""


# One candidate at a time: pycma's loop of ask and tell, and a policy of one hidden layer in numpy.
PYCMA = """
import json, sys, time
import cma, gymnasium, numpy as np
settings = json.loads(sys.argv[1])
env, hidden, steps = gymnasium.make(settings["env"]), settings["hidden"], 0
i, o = env.observation_space.shape[0], int(env.action_space.n)
def fitness(theta):
    global steps
    first, second = np.split(theta, [(i + 1) * hidden])
    first, second = first.reshape(i + 1, hidden), second.reshape(hidden + 1, o)
    (obs, _), total, over = env.reset(), 0.0, False
    while not over:
        action = (np.tanh(obs @ first[:i] + first[i]) @ second[:hidden] + second[hidden]).argmax()
        obs, reward, terminated, truncated, _ = env.step(action)
        total, steps, over = total + reward, steps + 1, terminated or truncated
    return total
options = {"popsize": settings["population"], "verbose": -9, "seed": 1}
es = cma.CMAEvolutionStrategy(np.zeros((i + 1) * hidden + (hidden + 1) * o), 1.0, options)
start = time.time()
while steps < settings["steps"]:
    candidates = es.ask()
    es.tell(candidates, [-fitness(theta) for theta in candidates])
print(json.dumps([steps / (time.time() - start), 0]))
"""


def peer(row, threads, steps, episodes=0, seed=1):
    """One run of the peer: steps per second, return, seconds from start to end, megabytes."""
    settings = {"env": row["env"], "steps": steps, "threads": threads, **row["peer"]}
    line = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        PYCMA if "population" in row["peer"] else PEER,
        json.dumps({**settings, "episodes": episodes, "seed": seed}),
    ]
    start = time.time()
    done = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    output = done.stdout.read()
    _, status, usage = os.wait4(done.pid, 0)
    if status:
        sys.exit(f"{row['name']}: the peer failed")
    return *json.loads(output.splitlines()[-1]), time.time() - start, usage.ru_maxrss / 1024


def alone(row):
    """Steps per second of the environment with random actions and nothing else."""
    import gymnasium

    env = gymnasium.make(row["env"])
    env.reset(seed=1)
    env.action_space.seed(1)
    actions = [env.action_space.sample() for _ in range(row["steps"])]
    start = time.time()
    for action in actions:
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()
    return row["steps"] / (time.time() - start)


def spread(values, form="{:,.0f}"):
    """Median, and least to most."""
    low, middle, high = np.percentile(values, [0, 50, 100])
    return f"{form.format(middle)} ({form.format(low)} to {form.format(high)})"


SHORT = "--eval-episodes 1 --checkpoint-every 0"


def speed_row(row, repeats):
    a, b = [], []
    for seed in range(1, repeats + 1):  # what a search meets on its way depends on it
        extra = f"--seed {seed} --total-timesteps {row['steps']} {SHORT}"
        a.append(ours(row, row["threads"], extra).speed)
        if "peer" in row:
            b.append(peer(row, row["threads"], row["steps"])[0])
    theirs = [spread(b), spread(np.divide(a, b), "{:.1f}")] if b else ["", ""]
    return [spread(a), *theirs]


def alone_row(row, repeats):
    a, b = [], []
    for _ in range(repeats):
        a.append(ours(row, 1, f"--total-timesteps {row['steps']} {SHORT}").speed)
        b.append(alone(row))
    return [spread(a), spread(b), spread(np.divide(b, a), "{:.2f}")]


def ranks_row(row, repeats):
    """Candidates per second of the same search by one process or more, bit for bit the same."""
    a, b = [], []
    for _ in range(repeats):
        for values, processes in ((a, 2), (b, 1)):
            run = ours(row, 1, f"--total-timesteps {row['steps']} {SHORT}", processes)
            values.append(run.speed / run.length)
    return [spread(a), spread(b), spread(np.divide(a, b), "{:.2f}")]


def growth_row(row, repeats):
    """Steps per second as one option grows, or the number of processes; medians."""
    cells = []
    for value in row["values"]:
        processes, option = 0, f"{row['option']} {value}"
        if row["option"] == "processes":
            processes, option = value, ""
        extra = f"--total-timesteps {row['steps']} {SHORT} {option}"
        runs = [ours(row, 1, extra, processes).speed for _ in range(repeats)]
        cells.append(np.median(runs))
    return [f"{cell:,.0f}" for cell in cells]


def memory_row(row, _):
    """Peak memory of a short run and, where there is one, of the peer's."""
    a = ours(row, 1, f"--total-timesteps {row['steps']} {SHORT}").megabytes
    if "peer" not in row:
        return [f"{a:,.0f}", "", ""]
    b = peer(row, 1, row["steps"])[3]
    return [f"{a:,.0f}", f"{b:,.0f}", f"{b / a:.1f}"]


# What a full buffer costs beside its transitions, by the resident memory of the process.
BUFFER = """
import gymnasium, json, os, resource, sys
sys.path.insert(0, sys.argv[1])
import numpy as np, sac
env = gymnasium.make("HalfCheetah-v5")
obs, action = np.float32(env.reset(seed=1)[0]), np.float32(env.action_space.sample())
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
before, n = resident(), 1_000_000
buffer = sac.ReplayBuffer(n, env.observation_space, action)
for _ in range(n):
    buffer.add(obs, action, 1.0, obs, 0.99)
bytes = n * (2 * obs.nbytes + action.nbytes + 8)
print(json.dumps([(resident() - before) / 1e6, bytes / 1e6]))
"""


def buffer_row(row, _):
    """Megabytes that a million HalfCheetah transitions take, and those of their numbers alone."""
    line = [sys.executable, "-c", BUFFER, str(ROOT)]
    a, b = json.loads(subprocess.run(line, stdout=subprocess.PIPE, check=True).stdout)
    return [f"{a:,.0f}", f"{b:,.0f}", f"{a / b:.2f}"]


COLD_SEEDS = range(321, 331)


def cold_row(row, _):
    a, b, returns, theirs = [], [], [], []
    threads = row.get("threads", 1)
    for seed in COLD_SEEDS:
        run = ours(row, threads, f"--seed {seed}")
        a.append(run.seconds)
        returns.append(float(run.result["eval_return_mean"]))
        if "peer" in row:
            settings = {name: value for name, value in row["peer"].items() if name != "steps"}
            asked = {**row, "peer": settings}
            _, mean, seconds, _ = peer(asked, threads, row["peer"]["steps"], 20, seed)
            b.append(seconds)
            theirs.append(mean)
    print(f"  {row['name']}: returns {returns} and the peer's {theirs}")

    def solved(means):
        return f"{sum(mean >= row['threshold'] for mean in means)} of {len(means)}"

    cells = [spread(a, "{:.1f}"), f"{min(returns):.0f}", solved(returns)]
    if not b:
        return [*cells, "", "", "", ""]
    ratio = spread(np.divide(b, a), "{:.1f}")
    return [*cells, spread(b, "{:.0f}"), f"{min(theirs):.0f}", solved(theirs), ratio]


def missed(row, cells):
    """Whether the median in a column falls short of the row's goal; goals are by column number."""
    medians = [cell.split(" ")[0].replace(",", "") for cell in cells]
    short = [float(medians[int(i)]) < goal for i, goal in row.get("at_least", {}).items()]
    over = [float(medians[int(i)]) > goal for i, goal in row.get("at_most", {}).items()]
    return any(short + over)


def row_sha(row):
    """Hash of what decides a row: the script, its options and the rest of the row but its goal."""
    kept = {
        name: value for name, value in row.items() if name not in ("goal", "at_least", "at_most")
    }
    return sha(row["script"], f"{row.get('options', '')} {sorted(kept.items())}")


TABLES = {  # of speed.toml: what measures a row, what it is, and the columns
    "row": (speed_row, "", "steps/s | of the peer | ratio | goal"),
    "alone": (
        alone_row,
        "",
        "steps/s | of the environment alone | times as long | goal",
    ),
    "ranks": (ranks_row, "", "candidates/s, 2 processes | 1 process | ratio | goal"),
    "cold": (
        cold_row,
        "",
        "seconds from a cold start | least return | solved | sb3 | least return | solved | ratio | goal",
    ),
    "buffer": (buffer_row, "", "MB | of the numbers alone | ratio | goal"),
    "memory": (memory_row, "peak memory", "MB | sb3 | ratio"),
    "environments": (
        growth_row,
        "steps/s with so many environments or candidates",
        "1 | 4 | 16 | 64 | 256",
    ),
    "hidden": (growth_row, "steps/s with so many hidden units", "32 | 64 | 128 | 256 | 512"),
    "processes": (growth_row, "steps/s of so many processes", "1 | 2"),
}


def table(kind, rows, measured):
    """The table of a kind of row, as lines; empty if nothing of it was measured."""
    _, title, columns = TABLES[kind]
    lines = [f"| {title} | {columns} |", "|---" * (columns.count("|") + 2) + "|"]
    for row in rows:
        found = measured.get(row["name"])
        if found:
            goal = (
                [row["goal"] + ": **missed**" * missed(row, found["cells"])]
                if "goal" in row
                else []
            )
            stale = "" if found["sha"] == row_sha(row) else " (stale)"
            lines.append(f"| {' | '.join([row['name'] + stale, *found['cells'], *goal])} |")
    return [*lines, ""] if len(lines) > 2 else []


def texts():
    """What README.md says between its markers."""
    rows = tomllib.loads((HERE / "speed.toml").read_text(encoding="utf-8"))
    measured = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    lines = [line for kind in TABLES for line in table(kind, rows[kind], measured)]
    return HERE / "README.md", "speed", lines[:-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--report", action="store_true", help="write the tables; measure nothing")
    arguments = parser.parse_args()
    rows = tomllib.loads((HERE / "speed.toml").read_text(encoding="utf-8"))
    measured = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for kind, (measure, *_) in TABLES.items():
        for row in rows[kind]:
            name = row["name"]
            done = name in measured and measured[name]["sha"] == row_sha(row)
            if arguments.report or done or arguments.only not in name:
                continue
            measured[name] = {"cells": measure(row, arguments.repeats), "sha": row_sha(row)}
            print(name, *measured[name]["cells"], sep=" | ", flush=True)
            RESULTS.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    write_between(*texts())


if __name__ == "__main__":
    main()
