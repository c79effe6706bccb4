"""Steps per second and time to a return, beside stable-baselines3 with the same settings.

    python benchmarks/speed.py                  every row of speed.toml
    python benchmarks/speed.py --script ppo     those of one script

The two sides take turns, A B A B ..., each in a process of its own, so that a machine whose speed
drifts treats both alike. Steps per second are those of the training loop, logging to TensorBoard on
both sides, without evaluation or checkpoints: of ours the last charts/SPS, of theirs learn(). A
cold start is everything, from the start of the process to the end of the evaluation. Run nothing
beside it. With --script, nothing is written.
"""

import argparse
import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time
import tomllib

import numpy as np
from returns import scalars, write_between

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent


def ours(row, threads, extra=""):
    """One run of our script: steps per second, line of results, and seconds from start to end."""
    with tempfile.TemporaryDirectory() as run_dir:
        line = f"{sys.executable} {ROOT}/{row['script']}.py --env-id {row['env']} {row['options']}"
        line += f" --run-dir {run_dir} {extra}"
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        start = time.time()
        done = subprocess.run(shlex.split(line), stdout=subprocess.PIPE, text=True, env=environment)
        seconds = time.time() - start
        done.check_returncode()
        speed = scalars(run_dir, "charts/SPS")[1][-1]
    return speed, dict(pair.split("=") for pair in done.stdout.splitlines()[-1].split()), seconds


PEER = """
import json, sys, tempfile, time
settings = json.loads(sys.argv[1])
import stable_baselines3, torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
torch.set_num_threads(settings.pop("threads"))
steps, episodes = settings.pop("steps"), settings.pop("episodes")
env = make_vec_env(settings.pop("env"), settings.pop("n_envs", 1), seed=1)
algorithm = getattr(stable_baselines3, settings.pop("algorithm"))
with tempfile.TemporaryDirectory() as logs:
    model = algorithm("MlpPolicy", env, device="cpu", tensorboard_log=logs, seed=1, **settings)
    start = time.time()
    model.learn(steps)
    seconds = time.time() - start
mean = evaluate_policy(model, env, episodes)[0] if episodes else 0
print(json.dumps([model.num_timesteps / seconds, mean]))
"""


def peer(row, threads, steps, episodes=0):
    """One run of stable-baselines3: steps per second, return, and seconds from start to end."""
    settings = {**row["peer"], "env": row["env"], "steps": steps, "threads": threads}
    line = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        PEER,
        json.dumps({**settings, "episodes": episodes}),
    ]
    start = time.time()
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    return *json.loads(done.stdout.splitlines()[-1]), time.time() - start


def spread(values, form="{:,.0f}"):
    """Median, and least to most."""
    low, middle, high = np.percentile(values, [0, 50, 100])
    return f"{form.format(middle)} ({form.format(low)} to {form.format(high)})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold-seeds", type=int, default=10)
    parser.add_argument("--cold-peers", type=int, default=3, help="of them, beside the peer")
    arguments = parser.parse_args()
    table = tomllib.loads((HERE / "speed.toml").read_text(encoding="utf-8"))
    wanted = [row for row in table["row"] if arguments.script in (None, row["script"])]
    lines = ["| | steps/s | sb3 steps/s | ratio | goal |", "|---|---|---|---|---|"]
    for row in wanted:
        a, b = [], []
        for _ in range(arguments.repeats):
            extra = f"--total-timesteps {row['steps']} --eval-episodes 1 --checkpoint-every 0"
            a.append(ours(row, row["threads"], extra)[0])
            if "peer" in row:
                b.append(peer(row, row["threads"], row["steps"])[0])
        theirs = f"{spread(b)} | {spread(np.divide(a, b), '{:.1f}')}" if b else " | "
        goal = f"{row['goal']} times" if b else f"{row['goal_steps_per_second']:,} steps/s"
        lines.append(f"| {row['name']} | {spread(a)} | {theirs} | {goal} |")
        print(lines[-1], flush=True)
    lines += [
        "",
        "| from a cold start | seconds | least return | sb3 | least return | ratio | goal |",
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in [row for row in table["cold"] if arguments.script in (None, row["script"])]:
        a, b, returns, theirs = [], [], [], []
        steps = row["peer"].pop("steps")
        for seed in range(1, arguments.cold_seeds + 1):
            _, result, seconds = ours(row, 1, f"--seed {seed}")
            a.append(seconds)
            returns.append(float(result["eval_return_mean"]))
            if seed <= arguments.cold_peers:
                _, mean, seconds = peer(row, 1, steps, 20)
                b.append(seconds)
                theirs.append(mean)
        lines.append(
            f"| {row['name']} | {spread(a, '{:.1f}')} | {min(returns):.0f} | {spread(b, '{:.0f}')} "
            f"| {min(theirs):.0f} | {spread(np.divide(b, a[: len(b)]), '{:.1f}')} | {row['goal']} |"
        )
        print(lines[-1], returns, theirs, flush=True)
    if arguments.script is None:
        write_between(HERE / "README.md", "speed", lines)


if __name__ == "__main__":
    main()
