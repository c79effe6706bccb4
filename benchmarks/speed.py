"""Steps per second, time to a return and memory, beside stable-baselines3 or pycma.

    python benchmarks/speed.py                  what speed.toml asks for and is not measured yet
    python benchmarks/speed.py --only dqn       the rows whose name contains dqn
    python benchmarks/speed.py --report         the tables of README.md; measures nothing

A row is measured in turns. In each turn the two sides run one after the other, each in a process of
its own, so that a machine whose speed drifts treats both alike. Steps per second are those of the
training loop, with logging to TensorBoard, without evaluation or checkpoints: of ours the last
charts/SPS, of theirs learn(). A cold start is everything, from the start of the process to the end
of the evaluation. Run nothing beside it.

Each turn is a line of results/speed.csv, so that an interrupted call goes on where it was. It is
measured once, and again only if the row or what measures the peer has changed. If the script has
changed, it is not: the report names the commits that were measured.
"""

import argparse
import hashlib
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
from runner import HERE, ROOT, append, commit, machine, read, scalars, sha, write_between

RESULTS = HERE / "results/speed.csv"
TABLE = tomllib.loads((HERE / "speed.toml").read_text(encoding="utf-8"))
SHORT = "--eval-episodes 1 --checkpoint-every 0"
PINS = (HERE / "requirements.txt").read_text(encoding="utf-8")


def measured(line, threads):
    """Run a command: its last line, the seconds it took and the most megabytes that it held."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    start = time.time()
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{shlex.join(line)}\nfailed")
    return output.splitlines()[-1], time.time() - start, usage.ru_maxrss / 1024


def ours(row, extra="", processes=0, threads=1):
    """One run of our script: what it logged and printed, and what it took."""
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {processes}"
    with tempfile.TemporaryDirectory() as run_dir:
        line = f"{sys.executable} {launcher if processes else ''} {ROOT}/{row['script']}.py"
        run_dir += "/run"  # ranks write beside it
        line += f" --env-id {row['env']} {row['options']} --run-dir {run_dir} {extra}"
        last, seconds, megabytes = measured(shlex.split(line), threads)
        return SimpleNamespace(
            speed=scalars(run_dir, "charts/SPS")[1][-1],
            lengths=scalars(run_dir, "charts/episodic_length")[1],
            result=dict(pair.split("=") for pair in last.split()),
            seconds=seconds,
            megabytes=megabytes,
        )


def peer(row, seed, threads=1, episodes=0):
    """The same of the peer: steps per second, mean return of so many episodes, what it took."""
    settings = {"env": row["env"], "steps": row.get("steps"), "seed": seed}
    if "population" in row["peer"]:
        file = "pycma.py"
    else:
        file, settings = "peer.py", settings | {"threads": threads, "episodes": episodes}
    line = [sys.executable, "-W", "ignore", f"{HERE}/{file}", json.dumps(settings | row["peer"])]
    last, seconds, megabytes = measured(line, threads)
    speed, mean = json.loads(last)
    return SimpleNamespace(speed=speed, mean=mean, seconds=seconds, megabytes=megabytes)


def speed_turn(row, turn):
    """Steps per second of both; of cem without what it plays on after an episode's end."""
    threads = row["threads"]
    run = ours(row, f"--seed {turn} --total-timesteps {row['steps']} {SHORT}", threads=threads)
    speed = run.speed
    if "population" in row.get("peer", ()):  # an entry of the log is the mean of about a generation
        played = row["peer"]["population"] * run.lengths.sum()
        speed *= played / int(run.result["env_steps"])
    if "peer" not in row:
        return {"a": speed}
    return {"a": speed, "b": peer(row, turn, threads).speed}


def alone_turn(row, turn):
    """Steps per second of the environment with random actions and nothing else, and of a run."""
    import gymnasium

    env = gymnasium.make(row["env"])
    env.reset(seed=turn)
    env.action_space.seed(turn)
    actions = [env.action_space.sample() for _ in range(row["steps"])]
    start = time.time()
    for action in actions:
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()
    speed = row["steps"] / (time.time() - start)
    run = ours(row, f"--seed {turn} --total-timesteps {row['steps']} {SHORT}")
    return {"a": speed, "b": run.speed}


def processes_turn(row, turn):
    """Steps per second of two processes or workers, and of one."""
    extra = f"--seed {turn} --total-timesteps {row['steps']} {SHORT}"
    if row["script"] == "a3c":
        two, one = (ours(row, f"{extra} --workers {count}") for count in (2, 1))
    else:
        two, one = (ours(row, extra, count) for count in (2, 1))
    return {"a": two.speed, "b": one.speed}


def growth_turn(row, turn):
    """Steps per second with each value of an option."""
    extra = f"--seed {turn} --total-timesteps {row['steps']} {SHORT} {row['option']}"
    return {value: ours(row, f"{extra} {value}").speed for value in row["values"]}


def memory_turn(row, turn):
    """Peak memory of a short run of both, in megabytes."""
    found = {"a": ours(row, f"--total-timesteps {row['steps']} {SHORT}").megabytes}
    return found | ({"b": peer(row, turn).megabytes} if "peer" in row else {})


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


def buffer_turn(row, _):
    """Megabytes that a million HalfCheetah transitions take, and those of their numbers alone."""
    last, _, _ = measured([sys.executable, "-c", BUFFER, str(ROOT)], 1)
    return dict(zip("ab", json.loads(last), strict=True))


def cold_turn(row, seed):
    """Seconds from the start of a process to the end of its evaluation, and the mean return."""
    threads = row.get("threads", 1)
    run = ours(row, f"--seed {seed}", threads=threads)
    found = {"a": run.seconds, "return": float(run.result["eval_return_mean"])}
    found["steps"] = int(run.result["env_steps"])
    if "peer" in row:
        theirs = peer(row, seed, threads, episodes=20)
        found |= {"b": theirs.seconds, "their_return": theirs.mean}
    return found


def spread(values, form="{:,.0f}"):
    """Median, and least to most."""
    if not len(values):
        return ""
    low, middle, high = np.percentile(values, [0, 50, 100])
    text = form.format(middle)
    return text if len(values) == 1 else f"{text} ({form.format(low)} to {form.format(high)})"


def pair(row, found):
    """Cells of two sides and their ratio, and the numbers that goals are about."""
    a, b = found["a"], found.get("b", [])
    ratio = np.divide(a, b) if len(b) else []
    numbers = {"a": np.median(a)} | ({"ratio": np.median(ratio)} if len(b) else {})
    return [spread(a), spread(b), spread(ratio, "{:.2f}")], numbers


def grown(row, found):
    """Cells of one number for each value of an option: the median."""
    return [f"{np.median(values):,.0f}" for values in found.values()], {}


def cold(row, found):
    """Cells of a cold start. The ratio says something only if ours solves as often as the peer."""
    a, returns, b, theirs = (found.get(name, []) for name in ("a", "return", "b", "their_return"))

    def solved(means):
        return sum(mean >= row["threshold"] for mean in means)

    def side(seconds, means, steps, form):
        if not len(means):
            return ["", "", "", ""]
        share = f"{solved(means)} of {len(means)}"
        return [spread(seconds, form), f"{steps:,}", f"{min(means):.1f}", share]

    numbers = {"a": np.median(a), "least": min(returns), "ratio": 0}
    steps = row.get("peer", {}).get("steps", 0)
    cells = side(a, returns, int(np.median(found["steps"])), "{:.1f}")
    cells += [*side(b, theirs, steps, "{:.0f}"), ""]
    if len(b) and solved(returns) >= solved(theirs):
        ratio = np.divide(b, a)
        numbers["ratio"], cells[-1] = np.median(ratio), spread(ratio, "{:.1f}")
    return cells, numbers


def missed(row, numbers):
    """The numbers that fall short of the row's goals, by name."""
    short = [name for name, goal in row.get("at_least", {}).items() if numbers[name] < goal]
    over = [name for name, goal in row.get("at_most", {}).items() if numbers[name] > goal]
    return short + over


def goal_text(row, numbers):
    """The row's goals, and which of them it misses."""
    short = missed(row, numbers)
    if len(row.get("at_least", {}) | row.get("at_most", {})) > 1:
        names = {"ratio": "ratio", "least": "return"}
        names["a"] = "time" if "threshold" in row else "steps/s"
        short = [f"{names[name]} " for name in short]
    else:
        short = ["" for _ in short]
    return row.get("goal", "") + "".join(f": **{name}missed**" for name in short)


def row_sha(row):
    """Hash of what decides a row: all of it but its goal, and the peer's part."""
    kept = {key: value for key, value in row.items() if key not in ("goal", "at_least", "at_most")}
    decides = f"{row.get('options', '')} {sorted(kept.items())}"
    if "peer" in row:
        file = "pycma" if "population" in row["peer"] else "peer"
        decides += PINS + sha(f"benchmarks/{file}", "")
    return hashlib.sha256(decides.encode()).hexdigest()[:12]


FIVE, COLD = range(1, 6), range(321, 331)  # the turns, which are the seeds
TABLES = {  # of speed.toml: how to measure a turn, which turns, how to show them, heading, columns
    "row": (speed_turn, FIVE, pair, "steps per second", "ours | peer | ours / peer | goal"),
    "alone": (
        alone_turn,
        FIVE,
        pair,
        "steps per second",
        "environment alone | run | times as long | goal",
    ),
    "processes": (
        processes_turn,
        FIVE,
        pair,
        "steps per second",
        "2 processes or workers | 1 | ratio | goal",
    ),
    "cold": (
        cold_turn,
        COLD,
        cold,
        "from a cold start",
        "seconds | steps | least return | solved | sb3's seconds | steps | least return | solved "
        "| times as fast | goal",
    ),
    "buffer": (buffer_turn, [1], pair, "megabytes", "buffer | its numbers alone | ratio | goal"),
    "memory": (memory_turn, [1], pair, "peak megabytes", "ours | sb3 | ours / sb3"),
    "environments": (
        growth_turn,
        FIVE[:3],
        grown,
        "steps per second, by environments or candidates",
        "1 (cmaes, nes: 2) | 4 | 16 | 64 | 256",
    ),
    "hidden": (
        growth_turn,
        FIVE[:3],
        grown,
        "steps per second, by hidden units",
        "32 | 64 | 128 | 256 | 512",
    ),
}


def lines_of(row, table):
    """The turns of a row that stand on today's options: {turn: values}."""
    now, found = row_sha(row), {}
    for line in table:
        if (line["row"], line["sha"]) == (row["name"], now):
            pairs = [pair.split(":") for pair in line["values"].split()]
            found[int(line["turn"])] = {name: float(value) for name, value in pairs}
    return found


def table_text(kind, table):
    """The table of a kind of row, as lines; empty if no row of it has all its turns."""
    _, turns, cells_of, heading, columns = TABLES[kind]
    lines = [f"| {heading} | {columns} |", "|---" * (columns.count("|") + 2) + "|"]
    for row in TABLE[kind]:
        found = lines_of(row, table)
        if set(turns) <= set(found):
            names = found[turns[0]]
            cells, numbers = cells_of(row, {n: [found[t][n] for t in turns] for n in names})
            if "goal" in columns:
                cells += [goal_text(row, numbers)]
            lines.append(f"| {' | '.join([row['name'], *cells])} |")
    return [*lines, ""] if len(lines) > 2 else []


def texts():
    """What README.md says between its markers."""
    table = read(RESULTS)
    lines = [line for kind in TABLES for line in table_text(kind, table)]
    missing = sum(
        not set(turns) <= set(lines_of(row, table))
        for kind, (_, turns, *_) in TABLES.items()
        for row in TABLE[kind]
    )
    if missing:
        lines += [f"{missing} of {sum(map(len, TABLE.values()))} rows are not measured yet.", ""]
    commits = ", ".join(dict.fromkeys(line["commit"] for line in table))
    lines += [f"Measured on commits {commits}; scripts of later commits can differ in speed."]
    return HERE / "README.md", "speed", lines


def measure(only):
    """Every turn that is missing, of the rows whose name contains only."""
    failed = 0
    for kind, (turn_of, turns, *_) in TABLES.items():
        for row in TABLE[kind]:
            found = lines_of(row, read(RESULTS))
            for turn in turns:
                if only not in row["name"] or turn in found:
                    continue
                files = "speed.py", "speed.toml", "peer.py", "pycma.py", "requirements.txt"
                files = [f"{row['script']}.py", *(f"benchmarks/{file}" for file in files)]
                try:
                    now, stands_on = row_sha(row), commit(*files)
                    values = turn_of(row, turn)
                except RuntimeError as error:
                    print(error, file=sys.stderr)
                    failed += 1
                    break
                text = " ".join(f"{name}:{value:.9g}" for name, value in values.items())
                line = {"row": row["name"], "turn": turn, "values": text, "sha": now}
                append(RESULTS, line | {"commit": stands_on, "by": machine()})
                print(row["name"], turn, text, flush=True)
    return failed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--report", action="store_true", help="write the tables; measure nothing")
    arguments = parser.parse_args()
    failed = 0 if arguments.report else measure(arguments.only)
    write_between(*texts())
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
