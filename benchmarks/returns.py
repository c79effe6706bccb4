"""Run the rows of returns.toml and report which published returns are reached.

    python benchmarks/returns.py                     rows that have no result yet
    python benchmarks/returns.py --script ppo        the rows of ppo.py
    python benchmarks/returns.py --tier standard     without the long rows
    python benchmarks/returns.py --peer              stable-baselines3 on the first five of the seeds
    python benchmarks/returns.py --report            tables and plots from what was measured
    python benchmarks/returns.py --confirm           rows that a change of the script made stale
    python benchmarks/returns.py --random Hopper-v5  the mean return of random play, 50 episodes

Each finished run is a line of results/returns.csv, so that an interrupted call goes on where it was;
an interrupted run of ours too, from its last checkpoint.
The rules, which this file keeps: a row runs on the seeds that returns.toml gives it, on a committed
script. A result belongs to the code that decides it and to the row's options (column sha, see
runner.py); with others it is stale, and the row needs a block of seeds that nobody has seen (block
= 211), unless --confirm finds that the change left the computation alone: in a short run today's
script learns the same weights, bit for bit, as the script in the commit of the result. What was
compared is in results/confirmed.csv.
"""

import argparse
import os
import re
import subprocess
import sys
import time
import tomllib

import gymnasium as gym
import numpy as np
from runner import (
    HERE,
    ROOT,
    append,
    commit,
    compare,
    curve,
    execute,
    interval,
    machine,
    points,
    read,
    scalars,
    sha,
    side_by_side,
    stands,
    write_between,
)

RESULTS = HERE / "results/returns.csv"
TABLE = tomllib.loads((HERE / "returns.toml").read_text(encoding="utf-8"))
EVALUATIONS = 20  # during training, of ten episodes each
FIVE = 5  # seeds of a row that the peer runs, and that the means over rows are of
VERDICTS = "reached", "level", "below"


def rows(arguments):
    """The rows asked for, in the order of the file."""
    for row in TABLE["row"]:
        asked = arguments.tier in (row.get("tier", "standard"), "all")
        asked &= arguments.script in (None, row["script"]) and arguments.env in (None, row["env"])
        if asked:
            yield row


def command(row):
    """The options that make a run of this row, seed and run directory aside."""
    options = f"--env-id {row['env']} --total-timesteps {row['steps']} {row.get('options', '')}"
    options += f" --eval-episodes 10 --eval-every {row['steps'] // EVALUATIONS}"
    return " ".join(options.split())


def block(row):
    """The first seed of the row's block."""
    return row.get("block", 201)


def seeds(row, peer=False):
    """The seeds of the row, none if it is not to be run."""
    count = row.get("seeds", 0)
    return range(block(row), block(row) + (min(count, FIVE) if peer else count))


def row_sha(row, peer=False):
    """Hash of what decides the row's results."""
    if not peer:
        return sha(row["script"], command(row))
    pinned = re.search(r"stable-baselines3==(\S+)", (HERE / "requirements.txt").read_text())[1]
    return f"{pinned} {sorted(row['peer'].items())}"


def key(row, peer=False):
    """What names the row in the table of results, as text."""
    return f"sb3-{row['script']}" if peer else row["script"], row["env"], str(row["steps"])


def lines_of(row, table, peer=False):
    """The row's results on its block of seeds, in their order, one a seed."""
    mine = [
        line for line in table if (line["script"], line["env"], line["steps"]) == key(row, peer)
    ]
    one = {int(line["seed"]): line for line in mine}  # runs side by side end in any order
    return [one[seed] for seed in seeds(row, peer) if seed in one]


def run(row, seed, peer, stands_on):
    """One run, appended to the table."""
    name, env, steps = key(row, peer)
    folder = ROOT / f"runs/benchmarks/{name}__{env}__{steps}__{seed}__{row_sha(row)}"
    values = run_peer(row, seed) if peer else run_ours(row, seed, folder)
    line = {"script": name, "env": env, "steps": steps, "seed": seed}
    append(
        RESULTS, line | values | {"sha": row_sha(row, peer), "commit": stands_on, "by": machine()}
    )
    print(f"{name} {env} seed {seed}: {values['final']}", flush=True)


def run_ours(row, seed, folder):
    """A run of a script: 20 evaluations of ten episodes on the way, one of a hundred at the end.

    A run that was interrupted goes on from its last checkpoint.
    """
    began = time.time()
    checkpoint, resume, before = f"--resume {folder}/checkpoint.pt", "", 0
    logs = list(folder.glob("events*"))  # of the interrupted run, each named after when it began
    if (folder / "checkpoint.pt").exists():
        resume = checkpoint
        before = sum(log.stat().st_mtime - int(log.name.split(".")[3]) for log in logs)
    else:
        for log in logs:
            log.unlink()
    result = execute(row["script"], f"{command(row)} --seed {seed} {resume}", folder)
    steps, returns = scalars(folder, "charts/episodic_return")
    evaluations = scalars(folder, "charts/eval_return")
    final = execute(row["script"], f"{checkpoint} --eval-episodes 100", folder)
    return {
        "final": final["eval_return_mean"],
        "std": final["eval_return_std"],
        "train": round(float(returns[-1]), 2) if len(returns) else "",  # of the last 100 episodes
        "env_steps": int(result["env_steps"]),
        "seconds": round(before + time.time() - began, 1),
        "curve": curve(*((steps, returns) if row["metric"] == "train" else evaluations)),
    }


def run_peer(row, seed):
    """The same of stable-baselines3, in a process of its own."""
    asked = row["script"], row["env"], str(row["steps"]), str(seed)
    line = [sys.executable, "-W", "ignore", str(HERE / "peer.py"), *asked]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    names = "final", "std", "env_steps", "seconds", "curve"
    values = dict(zip(names, done.stdout.splitlines()[-1].split("|"), strict=True))
    return {"final": values["final"], "std": values["std"], "train": ""} | values


def stale(row, table, peer=False):
    """Whether the row has results, and some of other code or options than today's."""
    name, now = " ".join(key(row, peer)), row_sha(row, peer)
    return any(not stands(name, line["sha"], now) for line in lines_of(row, table, peer))


def run_missing(arguments):
    """What is asked for and not in the table."""
    files = "benchmarks/returns.toml", "benchmarks/peer.py"
    stands_on = commit(*files, *{f"{row['script']}.py" for row in rows(arguments)})
    table, jobs = read(RESULTS), []
    for row in rows(arguments):
        if arguments.peer and "peer" not in row:
            continue
        if not seeds(row):
            print(f"{' '.join(key(row))} has no seeds in returns.toml: it is not run")
        if stale(row, table, arguments.peer):
            print(
                f"{' '.join(key(row, arguments.peer))} is stale: --confirm it, or give it a new block"
            )
            continue
        done = {int(line["seed"]) for line in lines_of(row, table, arguments.peer)}
        jobs += [
            (row, seed, arguments.peer, stands_on)
            for seed in seeds(row, arguments.peer)
            if seed not in done
        ]
    print(f"{len(jobs)} runs to do", flush=True)
    side_by_side(run, jobs, arguments.jobs)


def confirm(arguments):
    """Compare what made the results of each stale row with today's script, in short runs."""
    commit(*{f"{row['script']}.py" for row in rows(arguments)})
    for row in rows(arguments):
        lines = lines_of(row, read(RESULTS))
        for made, stands_on in sorted({(line["sha"], line["commit"]) for line in lines}):
            compare(" ".join(key(row)), command(row), made, row_sha(row), stands_on)


def random_play(env_id, episodes=50):
    """The mean return of random actions, to one decimal."""
    total = 0
    with gym.make(env_id) as env:
        env.action_space.seed(0)
        for episode in range(episodes):
            env.reset(seed=episode)
            ends = [False]
            while not any(ends):
                _, reward, *ends, _ = env.step(env.action_space.sample())
                total += reward
    return round(total / episodes, 1)


def metric(row, lines):
    """The values that the verdict is of, one a seed, by the row's metric."""
    if row["metric"] == "best":  # the best time of the averaged curve
        values = on_grid(row, lines)
        return values[:, values.mean(0).argmax()]
    name = {"greedy": "final", "train": "train"}[row["metric"]]
    return np.array([float(line[name]) for line in lines])


def on_grid(row, lines):
    """The curves of the lines at 20 equal steps of training, (seeds, 20)."""
    grid = np.arange(1, EVALUATIONS + 1) * row["steps"] / EVALUATIONS
    return np.array([np.interp(grid, *points(line["curve"])) for line in lines])


def judge(row, table):
    """Verdict, values, interval and whatever else the tables say of a row."""
    mine = lines_of(row, table)
    wanted = len(seeds(row))
    out = {"row": row, "lines": mine, "values": np.empty(0), "peer": np.empty(0)}
    same = [line for line in table if (line["script"], line["env"], line["steps"]) == key(row)]
    out["attempts"] = len({(int(line["seed"]) - 1) // 10 for line in same})
    theirs = lines_of(row, table, peer=True) if "peer" in row else []
    if theirs and len(theirs) == len(seeds(row, peer=True)) and not stale(row, table, peer=True):
        out["peer"] = metric(row, theirs)
    if not wanted or not mine:
        return out | {"verdict": "not run"}
    if stale(row, table):
        return out | {"verdict": "stale"}
    if len(mine) < wanted:
        return out | {"verdict": f"unfinished, {len(mine)} of {wanted}"}
    values = metric(row, mine)
    low, high = interval(values)
    return out | {"values": values, "low": low, "high": high, "verdict": verdict(row, values)}


def bar(row):
    """What a row is to reach."""
    return row["reference"] - row["tolerance"]


def verdict(row, values):
    """Where the 95% interval of the mean lies."""
    low, high = interval(values)
    return "reached" if low >= bar(row) else "below" if high < bar(row) else "level"


def score(row, values):
    """Returns in units of the way from random play, 0, to the reference, 1."""
    zero = TABLE["random"][row["env"]]
    return (values - zero) / (row["reference"] - zero)


def better(ours, theirs):
    """The probability that a run of ours returns more than one of theirs; a tie counts half."""
    difference = np.subtract.outer(ours, theirs)
    return (difference > 0).mean() + (difference == 0).mean() / 2


def interquartile_mean(scores):
    """The mean of the middle half of all scores, (rows, seeds)."""
    return middle(scores).mean()


def middle(scores):
    """Scores without the best and the worst quarter."""
    ordered = np.sort(scores, axis=None)
    cut = len(ordered) // 4
    return ordered[cut : len(ordered) - cut]


def capped_mean(scores):
    """The mean of scores of which none counts more than the reference."""
    return np.minimum(scores, 1).mean()


def bootstrap(statistic, *groups, repeats=2000):
    """95% interval of a statistic of (rows, seeds) arrays; each row's seeds are drawn anew."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(repeats):
        drawn = [
            np.take_along_axis(group, rng.integers(group.shape[1], size=group.shape), 1)
            for group in groups
        ]
        found.append(statistic(*drawn))
    return np.percentile(found, [2.5, 97.5])


def with_interval(statistic, *groups, digits=3):
    """The statistic and its interval, as text."""
    low, high = bootstrap(statistic, *groups)
    return f"{statistic(*groups):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def mean_better(ours, theirs):
    """The probability of improvement, averaged over rows, of (rows, seeds) arrays."""
    return np.mean([better(*pair) for pair in zip(ours, theirs, strict=True)])


def cost(row, table):
    """Minutes that a run of the row would take, from its own or the nearest of its script; as text."""
    mine = [line for line in table if line["script"] == row["script"]]
    near = [line for line in mine if line["env"] == row["env"]] or mine
    near = [line for line in near if line["steps"] == str(row["steps"])] or near
    if not near:
        return ""
    rate = np.median([float(line["seconds"]) / int(line["env_steps"]) for line in near])
    return f"{max(1, row['steps'] * rate / 60):.0f}"


def number(value):
    """A return with the digits that it needs."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}"


def reference(row):
    """The reference as text; of another algorithm (a proxy) with its name."""
    proxy = re.match(r"proxy: \w+ (\w+)", row["source"])
    return f"{row['reference']:,}" + (f" ({proxy[1]})" if proxy else "")


HEADS = (
    "script | environment | verdict | reference | tolerance | ours | 95% | seeds at the bar "
    "| at the end | metric | steps | seeds | attempts | minutes | sb3 | P(ours better)"
)


def row_text(result):
    """The line of a row that was run, in benchmarks/README.md."""
    row, values, lines = result["row"], result["values"], result["lines"]
    said = "; ".join(filter(None, [result["verdict"], row.get("options"), row.get("remark")]))
    final = np.mean([float(line["final"]) for line in lines])
    minutes = np.median([float(line["seconds"]) for line in lines]) / 60
    cells = [row["script"], row["env"], said, reference(row), f"{row['tolerance']:,}"]
    cells += [number(values.mean()), f"{number(result['low'])} to {number(result['high'])}"]
    there = (values >= bar(row)).sum()
    cells += [f"{there} of {len(values)}", number(final), row["metric"], f"{row['steps']:,}"]
    cells += [f"{seeds(row)[0]} to {seeds(row)[-1]}", result["attempts"], f"{minutes:.1f}"]
    if len(result["peer"]):
        chance = better(values[: len(result["peer"])], result["peer"])
        theirs = f"{number(result['peer'].mean())}, {verdict(row, result['peer'])}"
        cells += [theirs, f"{chance:.2f}"]
    else:
        cells += ["", ""]
    return f"| {' | '.join(map(str, cells))} |"


def open_text(result, table):
    """The line of a row that is not run, or not on all its seeds."""
    row, state = result["row"], result["verdict"]
    if state.startswith("unfinished"):
        state += f": {', '.join(map(number, metric(row, result['lines'])))}"
    cells = row["script"], row["env"], f"{row['steps']:,}", reference(row)
    cells += f"{row['tolerance']:,}", state, cost(row, table)
    return f"| {' | '.join(cells)} |"


def aggregates(results):
    """Lines on all rows at once: interquartile means, and the probability of improvement."""
    ran = [result for result in results if len(result["values"])]
    single = sum("ZOO" in result["row"]["source"] for result in ran)
    level = [result for result in ran if result["verdict"] == "level"]
    lower = [r for r in level if r["values"].mean() < bar(r["row"])]
    lines = [
        f"Of these {len(ran)} references {single} are rl-zoo's, each of a single run. Level is "
        f"undecided: our mean is below the bar in {len(lower)} of the {len(level)} level rows "
        f"({names(lower)}), and above it in the others."
    ]
    whole = [result for result in results if len(result["values"]) >= FIVE]
    short = [result for result in results if 0 < len(result["values"]) < FIVE]
    if whole:
        ours = np.array([score(r["row"], r["values"][:FIVE]) for r in whole])
        half = middle(ours)
        lines += [
            f"Scores of the {len(ours)} rows with five seeds or more, the first five of each "
            f"(left out: {names(short, verdicts=True)}): "
            f"interquartile mean {with_interval(interquartile_mean, ours)}, which leaves out the "
            f"best and the worst quarter of all runs, and says little where many can get no more "
            f"than the reference: {np.isclose(half, 1).sum()} of these {half.size} scores are 1. "
            f"The mean is {with_interval(np.mean, ours)}; if no score counts more than 1, "
            f"{with_interval(capped_mean, ours)}."
        ]
    if not any(len(result["peer"]) for result in results):
        lines += ["stable-baselines3 has not been run yet."]
    both = [result for result in whole if len(result["peer"]) == FIVE]
    if both:
        missing = [r for r in ran if "peer" in r["row"] and not len(r["peer"])]
        lines += beside_the_peer(both, missing)
    return lines


def names(results, verdicts=False):
    """The rows as text, with what was found of them."""
    found = [
        f"{r['row']['script']} {r['row']['env']}" + f" ({r['verdict']})" * verdicts for r in results
    ]
    return ", ".join(found) or "none"


def beside_the_peer(both, missing):
    """Lines on the rows that the peer has run too."""
    ours = np.array([score(r["row"], r["values"][:FIVE]) for r in both])
    theirs = np.array([score(r["row"], r["peer"]) for r in both])
    parts = [
        f"{name} {with_interval(interquartile_mean, scores)} and {with_interval(np.mean, scores)}"
        for name, scores in (("ours", ours), ("stable-baselines3", theirs))
    ]
    chance = with_interval(mean_better, ours, theirs, digits=2)
    every = np.array([score(r["row"], r["values"]).mean() for r in both])  # with all our seeds
    every_chance = np.mean([better(r["values"], r["peer"]) for r in both])
    counts = [
        f"{[verdict(r['row'], r['peer']) for r in both].count(name)} {name}" for name in VERDICTS
    ]
    order = np.abs((ours - theirs).mean(1)).argsort()
    rest, most = order[:-2], [both[i] for i in order[:-3:-1]]
    return [
        f"Scores of the first five seeds on {len(both)} rows, interquartile mean and mean: "
        f"{'; '.join(parts)}. By the rule of our verdicts stable-baselines3's rows are "
        f"{', '.join(counts)}. A run of ours returns more than one of the peer's with probability "
        f"{chance}, the mean over these rows. With all of our seeds our mean is {every.mean():.3f} "
        f"and the probability {every_chance:.2f}. The two differ most on {names(most)}; without "
        f"these rows the means are {ours[rest].mean():.3f} (with all our seeds "
        f"{every[rest].mean():.3f}) and {theirs[rest].mean():.3f}. rl-zoo has settings for "
        f"{len(missing)} more of the rows that we ran, which the peer has not run, or not on all "
        f"its seeds: {names(missing)}."
    ]


def texts():
    """What the two README say between their markers: path, name of the markers, lines."""
    table = read(RESULTS)
    results = [judge(row, table) for row in TABLE["row"]]
    whole = [result for result in results if len(result["values"])]
    lines = [f"| {HEADS} |", "|---" * len(HEADS.split("|")) + "|"]
    lines += [row_text(result) for result in whole]
    for line in aggregates(results):
        lines += ["", line]
    if len(whole) < len(results):
        heads = "script | environment | steps | reference | tolerance | | minutes of a run, about"
        lines += ["", f"The other {len(results) - len(whole)} rows:", ""]
        lines += [f"| {heads} |", "|---" * len(heads.split("|")) + "|"]
        lines += [open_text(result, table) for result in results if not len(result["values"])]
    heads = "script | rows | reached | level | below | not run yet | with default options"
    short = [f"| {heads} |", "|---" * len(heads.split("|")) + "|"]
    scripts = dict.fromkeys(row["script"] for row in TABLE["row"])
    short += [summary(name, [r for r in results if r["row"]["script"] == name]) for name in scripts]
    short += [summary("all", results)]
    drawn = dict.fromkeys(result["row"]["env"] for result in results if len(result["values"]))
    pictures = [f"![{name}](plots/{name}.png)" for name in drawn]
    where = HERE / "README.md"
    return [
        (where, "returns", lines),
        (where, "pictures", pictures),
        (ROOT / "README.md", "returns", short),
    ]


def summary(name, results):
    """A script's line in README.md."""
    counts = [sum(result["verdict"] == verdict for result in results) for verdict in VERDICTS]
    plain = sum("options" not in result["row"] for result in results)
    cells = name, len(results), *counts, len(results) - sum(counts), plain
    return f"| {' | '.join(map(str, cells))} |"


def report():
    """Tables and plots."""
    import plots  # which needs matplotlib: before anything is written

    for place in texts():
        write_between(*place)
    table = read(RESULTS)
    results = [
        result for result in (judge(row, table) for row in TABLE["row"]) if len(result["values"])
    ]
    for name in dict.fromkeys(result["row"]["env"] for result in results):
        plots.environment(name, [r for r in results if r["row"]["env"] == name], on_grid)
    if results:
        plots.glance(results, score)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--script", help="only the rows of this script")
    parser.add_argument("--env", help="only the rows of this environment")
    parser.add_argument("--tier", default="all", choices=["standard", "full", "all"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--peer", action="store_true", help="run stable-baselines3 instead")
    parser.add_argument(
        "--confirm", action="store_true", help="keep results that a change left alone"
    )
    parser.add_argument("--report", action="store_true", help="write tables and plots; run nothing")
    parser.add_argument("--random", metavar="ENV", help="measure random play; run nothing else")
    arguments = parser.parse_args()
    if arguments.random:
        return print(random_play(arguments.random))
    if not list(rows(arguments)):
        parser.error("returns.toml has no such row")
    lacking = {row["env"] for row in TABLE["row"]} - set(TABLE["random"])
    if lacking:
        parser.error(f"[random] in returns.toml lacks {', '.join(lacking)}: see --random")
    if arguments.report:
        return report()
    try:
        confirm(arguments) if arguments.confirm else run_missing(arguments)
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
