"""Run the rows of images.toml, from pixels, and report returns and learning curves.

    python benchmarks/images.py                    what is missing, two runs side by side
    python benchmarks/images.py --script dqn       the rows of dqn.py alone
    python benchmarks/images.py --env MinAtar      the rows whose environment's id contains MinAtar
    python benchmarks/images.py --report           table and picture from what was measured
    python benchmarks/images.py --speed            steps a second on Pong beside stable-baselines3

Each finished run is appended to results/images.csv, and a run that was killed goes on from its
checkpoint, so that an interrupted call goes on where it was. MinAtar comes with
benchmarks/requirements.txt.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import tomllib

import numpy as np
from runner import (
    COLORS,
    HERE,
    ROOT,
    append,
    curve,
    execute,
    points,
    read,
    scalars,
    side_by_side,
    write_between,
)

RESULTS = HERE / "results/images.csv"
TABLE = tomllib.loads((HERE / "images.toml").read_text(encoding="utf-8"))


def run(row, seed):
    """One run, appended to the table with 100 points of its learning curve."""
    options = row.get("options", TABLE["options"][row["script"]])
    folder = ROOT / f"runs/images/{row['script']}-{row['env'].rpartition('/')[2]}-{seed}"
    line = f"--env-id {row['env']} --total-timesteps {row['steps']} --seed {seed} {options} "
    line += "--eval-episodes 30"
    if (folder / "checkpoint.pt").exists():
        line += f" --resume {folder}/checkpoint.pt"
    result = execute(row["script"], line, folder, PYTHONPATH=str(HERE))
    line = {"script": row["script"], "env": row["env"], "seed": seed, "options": options}
    line |= {"return_mean": result["eval_return_mean"], "return_std": result["eval_return_std"]}
    line |= {"env_steps": int(result["env_steps"]), "wall_seconds": result["wall_seconds"]}
    text = curve(*scalars(folder, "charts/episodic_return"), points=100)
    append(RESULTS, line | {"curve": text})
    print(f"{row['script']} {row['env']} seed {seed}: {line['return_mean']}", flush=True)


def found(row):
    """The results of a row, in the order of its seeds."""
    lines = [line for line in read(RESULTS) if line["script"] == row["script"]]
    lines = [line for line in lines if line["env"] == row["env"]]
    return sorted(lines, key=lambda line: int(line["seed"]))


def title(row):
    """The environment as a table and a picture name it."""
    return row["env"].removeprefix("minatar_envs:").rpartition("-")[0]


def texts():
    """What benchmarks/README.md says between its markers: path, name of the markers, lines."""
    lines = ["| environment | script | steps | seeds | greedy return of each | published |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in TABLE["row"]:
        seeds = ", ".join(line["seed"] for line in found(row))
        returns = ", ".join(f"{float(line['return_mean']):.1f}" for line in found(row))
        cells = title(row), row["script"], f"{row['steps']:,}", seeds, returns or "not run"
        lines.append(f"| {' | '.join(cells)} | {row['published']} |")
    return HERE / "README.md", "images", lines


def report():
    """The table into benchmarks/README.md, the learning curves into benchmarks/plots."""
    import matplotlib  # before anything is written

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    write_between(*texts())
    names = dict.fromkeys(title(row) for row in TABLE["row"] if found(row))
    figure, grid = plt.subplots(1, len(names), figsize=(3.4 * len(names), 3), squeeze=False)
    for name, axes in zip(names, grid.flat, strict=True):
        for row in TABLE["row"]:
            for i, line in enumerate(found(row) if title(row) == name else []):
                label = None if i else row["script"]  # one for all seeds
                axes.plot(*points(line["curve"]), color=COLORS[row["script"]], lw=1, label=label)
        axes.set(title=name, xlabel="environment steps", xscale="log")
        axes.legend(fontsize=8)
    grid[0, 0].set_ylabel("mean return of 100 episodes")
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
        for name, values in zip(
            ("ours", "stable-baselines3"), zip(*pairs, strict=True), strict=True
        ):
            least, median, most = sorted(values)
            print(f"{script} {name}: {median:.0f} steps/s ({least:.0f} to {most:.0f})")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", help="only the rows of this script")
    parser.add_argument("--env", default="", help="only environments whose id contains this")
    parser.add_argument("--report", action="store_true", help="table and picture, no runs")
    parser.add_argument("--speed", action="store_true", help="steps a second beside its peer")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    arguments = parser.parse_args()
    if arguments.report:
        return report()
    if arguments.speed:
        return speed()
    missing = [
        (row, row["seeds"][i])
        for i in range(3)  # first one seed of each row
        for row in TABLE["row"]
        if i < len(row["seeds"]) and arguments.script in (None, row["script"])
        if arguments.env in row["env"]
        if str(row["seeds"][i]) not in {line["seed"] for line in found(row)}
    ]
    side_by_side(run, missing, arguments.jobs)


if __name__ == "__main__":
    main()
