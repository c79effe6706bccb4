"""Run the rows of images.toml, from pixels, and report returns and learning curves.

    python benchmarks/images.py                    what is missing, two runs side by side
    python benchmarks/images.py --script dqn       the rows of dqn.py alone
    python benchmarks/images.py --report           table and picture from what was measured
    python benchmarks/images.py --speed            steps a second on Pong beside stable-baselines3

Each finished run is appended to results/images.csv, and a run that was killed goes on from its
checkpoint, so that an interrupted call goes on where it was. MinAtar comes with
benchmarks/requirements.txt.
"""

import argparse
import csv
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from returns import COLORS, append, scalars, write_between

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS, CURVES = HERE / "results/images.csv", HERE / "results/images_curves.csv"
COLUMNS = "script env seed env_steps options return_mean return_std episodes wall_seconds".split()
TABLE = tomllib.loads((HERE / "images.toml").read_text(encoding="utf-8"))


def measured(path=RESULTS):
    """The lines of a table, as dictionaries."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def run(row, seed):
    """One run, appended to the tables with 200 points of its learning curve."""
    options = TABLE["options"][row["script"]]
    folder = ROOT / f"runs/images/{row['script']}-{row['env'].rpartition('/')[2]}-{seed}"
    line = [sys.executable, str(ROOT / f"{row['script']}.py"), "--env-id", row["env"]]
    line += ["--total-timesteps", str(row["steps"]), "--seed", str(seed), *options.split()]
    line += ["--run-dir", str(folder), "--eval-episodes", "30"]
    if (folder / "checkpoint.pt").exists():
        line += ["--resume", str(folder / "checkpoint.pt")]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    if done.returncode:
        print(f"{line}\nfailed:\n{done.stderr[-2000:]}", file=sys.stderr)
        return
    result = dict(pair.split("=") for pair in done.stdout.splitlines()[-1].split())
    line = {"script": row["script"], "env": row["env"], "seed": seed, "options": options}
    line |= {"return_mean": result["eval_return_mean"], "return_std": result["eval_return_std"]}
    line |= {"env_steps": result["env_steps"], "episodes": result["eval_episodes"]}
    append(RESULTS, COLUMNS, [line | {"wall_seconds": result["wall_seconds"]}])
    steps, returns = scalars(folder, "charts/episodic_return")
    kept = np.unique(np.linspace(0, len(steps) - 1, 200).astype(int))
    points = [{"step": steps[i], "return": round(float(returns[i]), 2)} for i in kept]
    name = {key: line[key] for key in ("script", "env", "seed")}
    append(CURVES, [*name, "step", "return"], [name | point for point in points])


def report():
    """The table into benchmarks/README.md, the learning curves into benchmarks/plots."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    lines = ["| environment | script | steps | greedy return, seeds 251 on | published |"]
    lines += ["|---|---|---|---|---|"]
    points, drawn = measured(CURVES), {}
    for row in TABLE["row"]:
        name = row["env"].rpartition("/")[2]
        found = [
            f"{float(line['return_mean']):.1f}"
            for seed in row["seeds"]
            for line in measured()
            if [line[key] for key in ("script", "env", "seed")] == [row["script"], row["env"], str(seed)]
        ]
        lines += [
            f"| {name} | {row['script']} | {row['steps']:,} | {', '.join(found) or 'not run'} "
            f"| {row['published']} |"
        ]
        for seed in row["seeds"]:
            curve = [
                (int(point["step"]), float(point["return"]))
                for point in points
                if [point[key] for key in ("script", "env", "seed")]
                == [row["script"], row["env"], str(seed)]
            ]
            if curve:
                drawn.setdefault(name, []).append((row["script"], curve))
    write_between(HERE / "README.md", "images", lines)
    if drawn:
        figure, grid = plt.subplots(1, len(drawn), figsize=(3.4 * len(drawn), 3), squeeze=False)
        for (name, curves), axes in zip(drawn.items(), grid.flat, strict=True):
            for script, curve in curves:
                label = script if script not in axes.get_legend_handles_labels()[1] else None
                axes.plot(*zip(*curve, strict=True), color=COLORS[script], lw=1, label=label)
            axes.set(title=name, xlabel="environment steps", xscale="log")
            axes.legend(fontsize=8)
        grid[0, 0].set_ylabel("return, mean of 100 training episodes")
        figure.tight_layout()
        figure.savefig(HERE / "plots/images.png", dpi=90)


def ours(script, steps):
    """Steps a second of a script on Pong, evaluation aside."""
    options = {
        "ppo": "--num-envs 8 --epochs 4 --minibatches 4",
        "dqn": "--utd 0.25 --batch-size 32 --burn-in 500 --buffer-size 10000 --n-step 1",
    }
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, str(ROOT / f"{script}.py"), "--env-id", "ALE/Pong-v5"]
        line += ["--total-timesteps", str(steps), "--run-dir", folder, "--eval-episodes", "1"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*line, *options[script].split()], env=environment, check=True)
        return scalars(folder, "charts/SPS")[1][-1]


def peer(script, steps):
    """The same of stable-baselines3, with the same network, pixels and hyperparameters."""
    import ale_py
    import gymnasium as gym
    import stable_baselines3
    import torch
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
    from stable_baselines3.common.vec_env import DummyVecEnv
    from torch import nn

    class Torso(BaseFeaturesExtractor):
        def __init__(self, space):
            super().__init__(space, 256)
            convolutions = nn.Conv2d(4, 16, 8, 4), nn.ReLU(), nn.Conv2d(16, 32, 4, 2), nn.ReLU()
            last = nn.Linear(32 * 9 * 9, 256)
            self.layers = nn.Sequential(*convolutions, nn.Flatten(), last, nn.ReLU())

        def forward(self, x):
            return self.layers(x)

    def make():
        gym.register_envs(ale_py)
        env = gym.wrappers.AtariPreprocessing(gym.make("ALE/Pong-v5", frameskip=1))
        env = gym.wrappers.FrameStackObservation(env, 4)
        return gym.wrappers.TransformReward(env, lambda reward: float(np.clip(reward, -1, 1)))

    torch.set_num_threads(1)
    settings = {
        "ppo": dict(n_steps=128, n_epochs=4, batch_size=256),
        "dqn": dict(train_freq=4, batch_size=32, learning_starts=500, buffer_size=10_000),
    }[script]
    kind = {"ppo": stable_baselines3.PPO, "dqn": stable_baselines3.DQN}[script]
    network = dict(features_extractor_class=Torso, net_arch=[])
    envs = DummyVecEnv([make] * (8 if script == "ppo" else 1))
    model = kind("CnnPolicy", envs, policy_kwargs=network, device="cpu", **settings)
    began = time.time()
    model.learn(steps)
    return steps / (time.time() - began)


def speed():
    """Three runs of each, in turns; median, least and most."""
    for script, steps in ("ppo", 8192), ("dqn", 4000):
        pairs = [(ours(script, steps), peer(script, steps)) for _ in range(3)]
        for name, values in zip(("ours", "stable-baselines3"), zip(*pairs, strict=True), strict=True):
            least, median, most = sorted(values)
            print(f"{script} {name}: {median:.0f} steps/s ({least:.0f} to {most:.0f})")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", help="only the rows of this script")
    parser.add_argument("--report", action="store_true", help="table and picture, no runs")
    parser.add_argument("--speed", action="store_true", help="steps a second beside its peer")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    arguments = parser.parse_args()
    if arguments.report:
        return report()
    if arguments.speed:
        return speed()
    done = {(line["script"], line["env"], int(line["seed"])) for line in measured()}
    missing = [
        (row, seed)
        for i in range(3)
        for row in TABLE["row"]
        for seed in row["seeds"][i : i + 1]
        if arguments.script in (None, row["script"])
        and (row["script"], row["env"], seed) not in done
    ]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda job: run(*job), missing))


if __name__ == "__main__":
    main()
