"""Return of awr.py against its temperature α on one environment: too small, too large.

    python benchmarks/temperature.py                       what is missing, then table and plot
    python benchmarks/temperature.py --alphas 1 --seeds 1  one run

Each finished run is appended to results/temperature.csv, so that an interrupted call goes on where
it was; script_sha is that of returns.py, and a run whose hash is not today's is run again. All runs
of today's hash are in the table and in plots/temperature.png: the greedy return of 100 episodes,
with weights clipped at awr.py's default of 20, and at 10¹². Effective samples: the share of the
buffer that the weights leave, in the last iteration.
"""

import argparse
import csv
import itertools
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import returns

RESULTS, PLOT = returns.HERE / "results/temperature.csv", returns.HERE / "plots/temperature.png"
COLUMNS = (
    "env alpha max_weight seed env_steps return_mean effective_sample_size wall_seconds script_sha"
)
ALPHAS = [0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]
# The second is as good as none, but at the least α; Adam squares gradients, so 1e20 is too high.
CLIPS = {20.0: "weights at most 20", 1e12: "at most 10¹²"}


def row(arguments, alpha, clip):
    """A row as returns.toml has them."""
    fields = {"script": "awr", "env": arguments.env, "steps": arguments.steps, "metric": "greedy"}
    return fields | {"options": f"--alpha {alpha:g} --max-weight {clip:g}"}


def measured():
    """The rows of results/temperature.csv."""
    if not RESULTS.exists():
        return []
    with open(RESULTS, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def run(arguments, alpha, clip, seed):
    """One run, appended to the table."""
    what = row(arguments, alpha, clip)
    with tempfile.TemporaryDirectory() as run_dir:
        values, _ = returns.run_ours(what, seed, run_dir)
        sizes = returns.scalars(run_dir, "losses/effective_sample_size")[1]
    line = {"env": arguments.env, "alpha": f"{alpha:g}", "max_weight": f"{clip:g}", "seed": seed}
    line |= {name: values[name] for name in ("env_steps", "return_mean", "wall_seconds")}
    line |= {"effective_sample_size": f"{sizes[-1]:.3g}", "script_sha": returns.sha(what)}
    returns.append(RESULTS, COLUMNS.split(), [line])
    print(f"alpha {alpha:g} clip {clip:g} seed {seed}: {values['return_mean']:.1f}", flush=True)


def report(arguments):
    """The table in README.md, and the plot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = [f"{name} | 95% | effective samples" for name in CLIPS.values()]
    table = [f"| α, {arguments.env} | {' | '.join(titles)} |", "|---" * 7 + "|"]
    cells = {alpha: [f"{alpha:g}"] for alpha in arguments.alphas}
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    for clip, name in CLIPS.items():
        points = []
        for alpha in arguments.alphas:
            today = returns.sha(row(arguments, alpha, clip))
            lines = [line for line in measured() if line["script_sha"] == today]
            if not lines:
                cells[alpha] += [""] * 3
                continue
            pairs = [(line["return_mean"], line["effective_sample_size"]) for line in lines]
            values, sizes = np.array(pairs, float).T
            mean, (low, high) = values.mean(), returns.interval(values)
            points.append((alpha, mean, low, high))
            cells[alpha] += [
                f"{mean:.1f}",
                f"{low:.1f} to {high:.1f}",
                f"{100 * sizes.mean():.0f}%",
            ]
        if points:
            alphas, means, lows, highs = np.transpose(points)
            bars = means - lows, highs - means
            axes.errorbar(alphas, means, bars, marker="o", capsize=3, label=name)
    table += [f"| {' | '.join(line)} |" for line in cells.values()]
    returns.write_between(returns.HERE / "README.md", "temperature", table)
    axes.set(xscale="log", xlabel="temperature α", ylabel="greedy return")
    axes.set_title(f"awr.py, {arguments.env}, {arguments.steps:,} steps")
    axes.legend()
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    arguments = parser.parse_args()
    have = {(line["script_sha"], line["seed"]) for line in measured()}
    todo = [
        (alpha, clip, seed)
        for alpha, clip, seed in itertools.product(arguments.alphas, CLIPS, arguments.seeds)
        if (returns.sha(row(arguments, alpha, clip)), str(seed)) not in have
    ]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda what: run(arguments, *what), todo))
    report(arguments)


if __name__ == "__main__":
    main()
