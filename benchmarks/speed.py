"""Steps per second and time to a return, beside stable-baselines3 or pycma with the same settings.

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


def peer(row, threads, steps, episodes=0):
    """One run of the peer: steps per second, return, and seconds from start to end."""
    settings = {"env": row["env"], "steps": steps, "threads": threads, **row["peer"]}
    line = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        PYCMA if "population" in row["peer"] else PEER,
        json.dumps({**settings, "episodes": episodes}),
    ]
    start = time.time()
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    return *json.loads(done.stdout.splitlines()[-1]), time.time() - start


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


def candidates(row, ranks):
    """Episodes per second of processes that evaluate row["each"] candidates apiece."""
    with tempfile.TemporaryDirectory() as run_dir:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        line = f"--nproc-per-node {ranks} {ROOT}/{row['script']}.py --env-id {row['env']}"
        line += f" --candidates {row['each'] * ranks} --run-dir {run_dir} --checkpoint-every 0"
        line += f" --eval-episodes 1 --total-timesteps {row['steps']} {row['options']}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [*start, *shlex.split(line)], env=environment, check=True, capture_output=True
        )
        _, speed = scalars(run_dir, "charts/SPS")
        _, length = scalars(run_dir, "charts/episodic_length")
    return speed[-1] / length.mean()


# The least time of one update, and of the same matrix products alone, as recorded from the update.
PRODUCTS = """
import json, sys, time
settings = json.loads(sys.argv[1])
sys.path.insert(0, settings["root"])
import gymnasium, importlib, torch
from torch.utils._python_dispatch import TorchDispatchMode
torch.set_num_threads(settings["threads"])
script = importlib.import_module(settings["script"])
args = script.Args()
state = script.initialise(args, 3, gymnasium.spaces.Box(-2, 2, (1,)))
n = args.batch_size
batch = [torch.randn(n, 3), torch.rand(n, 1), torch.randn(n), torch.randn(n, 3), torch.ones(n)]
takes_number = "number" in script.update.__code__.co_varnames
def pair():  # of updates: td3 moves its actor in every second one
    for number in (0, 1):
        script.update(args, *state, batch, *([number] if takes_number else []))
found = []
class Record(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, arguments=(), options=None):
        if func._overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm"):
            x, y = arguments[-2:]
            x, y = (torch.randn(a.shape).as_strided(a.shape, a.stride()) if a.is_contiguous()
                    else torch.randn(a.mT.shape).mT if a.mT.is_contiguous() else a for a in (x, y))
            found.append((x, y, x.detach() @ y.detach()))
        return func(*arguments, **(options or {}))
pair()
with Record():
    pair()
def products():
    with torch.no_grad():
        for x, y, out in found:
            torch.matmul(x, y, out=out)
times = []
for work in (pair, products) * settings["repeats"]:
    start = time.perf_counter()
    work()
    times.append((time.perf_counter() - start) / 2)
print(json.dumps([min(times[::2]), min(times[1::2])]))
"""


def products(row, repeats):
    """Milliseconds of an update, and of its matrix products alone."""
    settings = {**row, "root": str(ROOT), "repeats": repeats}
    environment = {**os.environ, "OMP_NUM_THREADS": str(row["threads"])}
    line = [sys.executable, "-c", PRODUCTS, json.dumps(settings)]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return [1e3 * seconds for seconds in json.loads(done.stdout)]


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
    table = {
        kind: [
            row
            for row in rows
            if arguments.script in (None, row["script"]) and (ROOT / f"{row['script']}.py").exists()
        ]
        for kind, rows in table.items()
    }
    lines = ["| | steps/s | of the peer | ratio | goal |", "|---|---|---|---|---|"]
    for row in table["row"]:
        a, b = [], []
        for _ in range(arguments.repeats):
            extra = f"--total-timesteps {row['steps']} --eval-episodes 1 --checkpoint-every 0"
            a.append(ours(row, row["threads"], extra)[0])
            if "peer" in row:
                b.append(peer(row, row["threads"], row["steps"])[0])
        theirs = f"{spread(b)} | {spread(np.divide(a, b), '{:.1f}')}" if b else " | "
        lines.append(f"| {row['name']} | {spread(a)} | {theirs} | {row['goal']} |")
        print(lines[-1], flush=True)
    lines += ["", "| | steps/s | of the environment alone | times as long | goal |"]
    lines += ["|---|---|---|---|---|"]
    for row in table["alone"]:
        a, b = [], []
        for _ in range(arguments.repeats):
            extra = f"--total-timesteps {row['steps']} --eval-episodes 1 --checkpoint-every 0"
            a.append(ours(row, 1, extra)[0])
            b.append(alone(row))
        ratio = spread(np.divide(b, a), "{:.2f}")
        lines.append(f"| {row['name']} | {spread(a)} | {spread(b)} | {ratio} | {row['goal']} |")
        print(lines[-1], flush=True)
    lines += ["", "| least time of | an update, ms | its matrix products, ms | ratio | goal |"]
    lines += ["|---|---|---|---|---|"]
    for row in table["products"]:
        a, b = products(row, 60 * arguments.repeats)
        lines.append(f"| {row['name']} | {a:.2f} | {b:.2f} | {a / b:.2f} | {row['goal']} |")
        print(lines[-1], flush=True)
    lines += ["", "| | candidates/s, 2 processes | 1 process | ratio | goal |"]
    lines += ["|---|---|---|---|---|"]
    for row in table["ranks"]:
        a, b = [], []
        for _ in range(arguments.repeats):
            a.append(candidates(row, 2))
            b.append(candidates(row, 1))
        theirs = f"{spread(b)} | {spread(np.divide(a, b), '{:.2f}')}"
        lines.append(f"| {row['name']} | {spread(a)} | {theirs} | {row['goal']} |")
        print(lines[-1], flush=True)
    lines += [
        "",
        "| from a cold start | seconds | least return | sb3 | least return | ratio | goal |",
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in table["cold"]:
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
