"""Measure the claims of claims.toml, in the order of the document, and write claims.md.

    python benchmarks/claims.py                    runs that are missing; call it again to continue
    python benchmarks/claims.py --only twin        claims whose name contains twin
    python benchmarks/claims.py --alone            those about time on the clock, one run at a time
    python benchmarks/claims.py --confirm          keeps runs whose script has changed and learns the same
    python benchmarks/claims.py --report           claims.md and its pictures; runs nothing

A run is a command line and a seed, and is kept in results/claims.csv, where claims share it. Seeds
are 401 to 408; a claim that is tried again with other options takes 411 to 418, and both attempts stay.
What a claim predicts stands in claims.toml before its first run: which setting has more of which
statistic, and by how much for the difference to count. A prediction *holds* if the 95% interval of
the difference of means (Welch's t) lies above 0 and the difference counts; it *fails* if the interval
excludes a difference that counts; else it is *open*. A run that never gets to a bar gives a lower
bound of its steps and seconds, a number at the floor of a logarithm an upper one: neither shows more.
"""

import argparse
import functools
import importlib
import re
import sys
import time
import tomllib

import numpy as np
import torch
from runner import (
    HERE,
    ROOT,
    T,
    append,
    commit,
    compare,
    curve,
    execute,
    machine,
    points,
    read,
    scalars,
    sha,
    side_by_side,
    stands,
    write,
    write_between,
)

RESULTS = HERE / "results/claims.csv"
SEEDS, AGAIN = range(401, 409), range(411, 419)  # of first attempts, of second ones
CLAIMS = tomllib.loads((HERE / "claims.toml").read_text(encoding="utf-8"))["claim"]
RETURN, EVALUATION, SPEED = "charts/episodic_return", "charts/eval_return", "charts/SPS"
POINTS = 40  # of a curve that is kept
FLOOR = 1e-4  # of numbers whose logarithm is taken
PREDICTION = re.compile(
    r"(?P<what>.+?) on (?P<task>\S+): (?P<more>.+) > (?P<less>.+) by (?P<by>\S+)"
)


# Statistics: a function of a run's line in the table, or of a setting's lines ----------------------


def logged(line, tag):
    """(steps, values) of a scalar of the run."""
    curves = dict(part.split("=") for part in line["logs"].split("|"))
    return points(curves[tag])


def final(lines):
    """The greedy return at the end, of 50 episodes."""
    return [float(line["final"]) for line in lines]


def spread(lines):
    """How far the return at the end is from the median over seeds."""
    values = np.array(final(lines))
    return np.abs(values - np.median(values))


def area(lines):
    """The mean over training of the return of the last 100 episodes."""
    return [
        np.trapezoid(y, x) / (x[-1] - x[0]) for x, y in (logged(line, RETURN) for line in lines)
    ]


def fall(lines):
    """From the best return during training, of 100 episodes, to the last."""
    return [y.max() - y[-1] for _, y in (logged(line, RETURN) for line in lines)]


def first_at(bar, line, tag):
    """The first step at which a scalar is at the bar; the last of all steps if it never is."""
    steps, values = logged(line, tag)
    there = np.flatnonzero(values >= bar)
    return steps[there[0]] if len(there) else float(line["env_steps"])


def steps_to(bar, lines):
    """Steps until an evaluation is at the bar; all steps if none is."""
    return [first_at(bar, line, EVALUATION) for line in lines]


def seconds_to(bar, lines):
    """Seconds until the return of the last 100 episodes is at the bar, start aside."""
    out = []
    for line in lines:
        steps = first_at(bar, line, RETURN)
        out.append(steps / np.interp(steps, *logged(line, SPEED)))
    return out


def pace(lines):
    """Seconds per 1,000 steps, start and evaluations included."""
    return [1000 * float(line["seconds"]) / int(line["env_steps"]) for line in lines]


def bias(lines):
    """Value less discounted return of the greedy policy after training."""
    return [float(line["bias"]) for line in lines]


def changed(lines):
    """The greedy return in the environment that was changed after training."""
    return [float(line["changed"]) for line in lines]


def last(tag, lines):
    """A scalar in the last quarter of training."""
    curves = [logged(line, tag) for line in lines]
    return [values[steps > 0.75 * steps[-1]].mean() for steps, values in curves]


def log10_last(tag, lines):
    """Its logarithm; estimates below FLOOR, which can be negative, count as FLOOR."""
    return np.log10(np.maximum(last(tag, lines), FLOOR))


def bound(what, lines):
    """Whether some value of the statistic only bounds the true one: "least", "most" or ""."""
    name, _, argument = what.rpartition(" ")
    if name in ("steps to", "seconds to"):
        tag = EVALUATION if name == "steps to" else RETURN
        reached = [logged(line, tag)[1].max() >= float(argument) for line in lines]
        return "" if all(reached) else "least"
    if name == "log10 of last":
        return "most" if min(last(f"losses/{argument}", lines)) < FLOOR else ""
    return ""


STATISTICS = {  # name -> function of the runs of a setting, scalars that it needs
    "final": (final, []),
    "spread": (spread, []),
    "area": (area, [RETURN]),
    "fall": (fall, [RETURN]),
    "bias": (bias, []),
    "changed": (changed, []),
    "seconds per 1000 steps": (pace, []),
}
WITH_ARGUMENT = {
    "steps to": (steps_to, float, [EVALUATION]),
    "seconds to": (seconds_to, float, [RETURN, SPEED]),
    "last": (last, "losses/{}".format, []),
    "log10 of last": (log10_last, "losses/{}".format, []),
}


def statistic(name):
    """The function of the runs of a setting, and the scalars that it needs."""
    if name in STATISTICS:
        return STATISTICS[name]
    first, _, rest = name.rpartition(" ")
    function, convert, tags = WITH_ARGUMENT[first]
    argument = convert(rest)
    return functools.partial(function, argument), tags or [argument]


# Runs ---------------------------------------------------------------------------------------------


def predictions(claim):
    """What the claim predicts: dictionaries of what, task, more, less, by."""
    return [PREDICTION.fullmatch(text).groupdict() for text in claim["predicts"]]


def attempts(claim):
    """The claim as first written and, where it was tried again, with the tasks of that attempt."""
    if "again" not in claim:
        return [claim]
    tasks = claim["again"]["tasks"]
    texts = [t for t, p in zip(claim["predicts"], predictions(claim)) if p["task"] in tasks]
    return [claim, claim | {"predicts": texts, "seeds": AGAIN} | claim["again"]]


def line_of(claim, setting, task):
    """The command line of a setting on a task: script and options, 50 episodes at the end."""
    script, _, options = claim["settings"][setting].partition(" ")
    given = f"{claim['tasks'][task]} {options}"
    given += "" if "--eval-episodes" in given else " --eval-episodes 50"
    return " ".join(f"{script} {given}".split())


def pairs(claim):
    """The settings and tasks that some prediction needs, or that the claim shows beside them."""
    found = {}
    for p in predictions(claim):
        shown = claim.get("shown", [])
        for setting in [p["more"], p["less"], *shown]:
            if setting in claim["settings"]:
                found[setting, p["task"]] = None
    order = list(claim["settings"])
    return sorted(
        found, key=lambda pair: (list(claim["tasks"]).index(pair[1]), order.index(pair[0]))
    )


def needed():
    """Of every command line: what to keep of it, and how to run it."""
    out = {}
    for one in [attempt for claim in CLAIMS for attempt in attempts(claim)]:
        for setting, task in pairs(one):
            asked = [p["what"] for p in predictions(one) if p["task"] == task]
            none = {"tags": set(), "change": "", "bias": False, "alone": False}
            entry = out.setdefault(line_of(one, setting, task), none)
            entry["tags"] |= {tag for what in asked for tag in statistic(what)[1]}
            entry["change"] = one.get("change", entry["change"])
            entry["bias"] |= "bias" in asked
            entry["alone"] |= any(what.startswith("seconds") for what in asked)
    return out


def fits(line, need):
    """Whether a run of the table is of today's script and has all that is needed."""
    script, _, options = line["run"].partition(" ")
    tags = {part.split("=")[0] for part in line["logs"].split("|")}
    changed = line["change"] == need["change"] or not need["change"]
    alone = line["alone"] == "True" or not need["alone"]
    bias = bool(line["bias"]) or not need["bias"]
    same = stands(line["run"], line["sha"], sha(script, options))
    return same and tags >= need["tags"] and changed and alone and bias


def value_bias(script, folder, episodes=50):
    """Value less discounted return of a checkpoint's greedy policy, from the starts of episodes.

    The value is max_a Q(s, a) of dqn and double_dqn, Q(s, π(s)) of ddpg, the lower such Q of td3.
    Returns the mean.
    """
    sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []
    module = importlib.import_module(script)
    checkpoint = torch.load(folder / "checkpoint.pt", "cpu", weights_only=True)
    args, found = module.Args(**checkpoint["args"]), []
    with module.make_env(args) as env, torch.no_grad():
        policy, critic = module.make_policy(env, args), None
        policy.load_state_dict(checkpoint["policy"])
        if "critic" in checkpoint:
            td3 = script == "td3"
            critic = (
                module.QNetworks(env, args.hidden, 2) if td3 else module.Critic(env, args.hidden)
            )
            critic.load_state_dict(checkpoint["critic"])
        for episode in range(episodes):
            obs, _ = env.reset(seed=2**30 + 1000 * args.seed + episode)
            s = torch.as_tensor(obs[None], dtype=torch.float32)
            found.append((critic(s, policy(s)).min() if critic else policy(s).max()).item())
            discount, ends = 1.0, [False]
            while not any(ends):
                obs, reward, *ends, _ = env.step(policy.act(obs[None])[0])
                found[-1] -= discount * reward
                discount *= args.gamma
    return np.mean(found)


def run(command, seed, need, stands_on):
    """One run, appended to the table."""
    script, _, options = command.partition(" ")
    folder = ROOT / f"runs/claims/{sha(script, options)}__{seed}"
    for old in folder.glob("*"):
        old.unlink()
    began = time.time()
    result = execute(script, f"{options} --seed {seed}", folder)
    kept = {tag: curve(*scalars(folder, tag), POINTS) for tag in sorted(need["tags"])}
    line = {"run": command, "seed": seed, "final": result["eval_return_mean"], "changed": ""}
    if need["change"]:
        again = f"--resume {folder}/checkpoint.pt --eval-episodes 50 {need['change']}"
        line["changed"] = execute(script, again, folder)["eval_return_mean"]
    line["bias"] = f"{value_bias(script, folder):.5g}" if need["bias"] else ""
    line |= {"change": need["change"], "env_steps": int(result["env_steps"])}
    line |= {"seconds": round(time.time() - began, 1), "alone": need["alone"]}
    line |= {"logs": "|".join(f"{tag}={text}" for tag, text in kept.items())}
    append(RESULTS, line | {"sha": sha(script, options), "commit": stands_on, "by": machine()})
    print(f"{command} seed {seed}: {line['final']}", flush=True)


def run_missing(arguments):
    """What the claims asked for need and the table lacks."""
    asked = [x for claim in CLAIMS if arguments.only in claim["name"] for x in attempts(claim)]
    wanted = {
        (line_of(x, *pair), seed): None
        for x in asked
        for pair in pairs(x)
        for seed in x.get("seeds", SEEDS)
    }
    scripts = {f"{command.split()[0]}.py" for command, _ in wanted}
    stands_on = commit("benchmarks/claims.toml", *scripts)
    need = needed()
    table = [x for x in read(RESULTS) if x["run"] in need and fits(x, need[x["run"]])]
    write(RESULTS, table)  # runs of another script or command leave
    done = {(line["run"], int(line["seed"])) for line in table}
    jobs = [
        (command, seed, need[command], stands_on)
        for command, seed in wanted
        if need[command]["alone"] == arguments.alone and (command, seed) not in done
    ]
    print(f"{len(jobs)} runs to do", flush=True)
    side_by_side(run, jobs, 1 if arguments.alone else arguments.jobs)


def confirm():
    """Compare what made each run with today's script, in a short run; see runner.py."""
    table = read(RESULTS)
    commit(*{f"{line['run'].split()[0]}.py" for line in table})
    for command, made, stands_on in sorted({(x["run"], x["sha"], x["commit"]) for x in table}):
        script, _, options = command.partition(" ")
        compare(command, options, made, sha(script, options), stands_on)


# Report -------------------------------------------------------------------------------------------


def lines_of(claim, table, need):
    """The runs of each (setting, task), one a seed, where all seeds are there."""
    out, seeds = {}, claim.get("seeds", SEEDS)
    for pair in pairs(claim):
        command = line_of(claim, *pair)
        fit = [x for x in table if x["run"] == command and fits(x, need[command])]
        one = {int(line["seed"]): line for line in fit}
        if set(one) >= set(seeds):
            out[pair] = [one[seed] for seed in seeds]
    return out


def difference(a, b):
    """Mean of a less mean of b, and its 95% interval by Welch's t."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    gap = a.mean() - b.mean()
    parts = np.array([x.var(ddof=1) / len(x) if len(x) > 1 else 0.0 for x in (a, b)])
    if not parts.sum():
        return gap, gap, gap
    freedom = parts.sum() ** 2 / sum(p**2 / (len(x) - 1) for p, x in zip(parts, (a, b)) if p)
    half = T[min(int(freedom + 1e-9), len(T)) - 1] * parts.sum() ** 0.5
    return gap, gap - half, gap + half


def judge(prediction, lines, settings):
    """Difference, interval and whether the prediction holds, fails or is open; None if not run.

    Where values are only bounds, the difference may be larger or smaller than measured, and what
    it then could no longer show is open.
    """
    sides, bounds = [], []
    for name in prediction["more"], prediction["less"]:
        if name not in settings:
            sides.append([float(name)])
            bounds.append("")
        elif (name, prediction["task"]) not in lines:
            return None
        else:
            found = lines[name, prediction["task"]]
            sides.append(statistic(prediction["what"])[0](found))
            bounds.append(bound(prediction["what"], found))
    gap, low, high = difference(*sides)
    by = float(prediction["by"])
    may_be_larger = bounds[0] == "least" or bounds[1] == "most"
    may_be_smaller = bounds[0] == "most" or bounds[1] == "least"
    holds = low > 0 and gap >= by and not may_be_smaller
    fails = high < by and not may_be_larger
    verdict = "holds" if holds else "fails" if fails else "open"
    return gap, low, high, verdict


def verdict(found):
    """Of a claim, from what its predictions came to."""
    for one, text in {"not run": "not run yet", "holds": "holds"}.items():
        if set(found) == {one}:
            return text
    if "not run" in found:
        return "not run yet"
    if "holds" in found:
        return f"holds only in part ({found.count('holds')} of {len(found)})"
    return "does not hold here" if set(found) == {"fails"} else "open"


def short(value):
    """A number of three or four digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def judgements(claim, table, need):
    """What each prediction came to, after the first attempt and after each one whose runs are there."""
    out, latest = [], {}
    for attempt in attempts(claim):
        lines = lines_of(attempt, table, need)
        if out and len(lines) < len(pairs(attempt)):
            break
        if attempt["tasks"].keys() >= claim["tasks"].keys():
            latest = {}
        for text, p in zip(attempt["predicts"], predictions(attempt)):
            result = judge(p, lines, attempt["settings"])
            latest[text] = result[3] if result else "not run"
        out.append(list(latest.values()))
    return out


def attempt_text(claim, picture, table, need):
    """Picture, numbers and command lines of one attempt, and whether all its runs are there."""
    lines = lines_of(claim, table, need)
    complete = len(lines) == len(pairs(claim))
    text = [f"![{picture}](plots/claims/{picture}.png)", ""] if complete else []
    text += ["| prediction | difference | 95% | counts from | |", "|---|---|---|---|---|"]
    for p in predictions(claim):
        sentence = f"{p['what']} on {p['task']}: {p['more']} > {p['less']}"
        result = judge(p, lines, claim["settings"])
        if result is None:
            text.append(f"| {sentence} | | | {p['by']} | not run |")
        else:
            gap, low, high, one = result
            text.append(
                f"| {sentence} | {short(gap)} | {short(low)} to {short(high)} | {p['by']} | {one} |"
            )
    text += ["", "<details><summary>settings</summary>", "", "```"]
    text += [
        f"{setting}: python {x.replace(' ', '.py ', 1)}"
        for setting, task in pairs(claim)
        for x in [line_of(claim, setting, task)]
    ]
    if "change" in claim:
        text.append(f"afterwards: --resume ... {claim['change']}")
    return [*text, "```", "", "</details>", ""], complete


def section(number, claim, table, need):
    """The text of a claim, and its verdict."""
    first, *again = attempts(claim)
    body, complete = attempt_text(first, claim["name"], table, need)
    verdicts = [verdict(found) for found in judgements(claim, table, need)]
    if len(verdicts) < len(attempts(claim)):
        verdicts.append("not run yet")
    said = "; second attempt: ".join(verdicts)
    text = [
        f"### {number}. {claim['claim']}",
        "",
        f"Section *{claim['section']}*. **{said[0].upper()}{said[1:]}.**",
    ]
    if "seen" in claim and complete:
        text[-1] += f" {claim['seen']}"
    text += ["", *body]
    for attempt in again:
        body, complete = attempt_text(attempt, f"{claim['name']}-again", table, need)
        text += [f"**Second attempt**, seeds 411 to 418. {claim['again']['why']}"]
        if "seen" in claim["again"] and complete:
            text[-1] += f" {claim['again']['seen']}"
        text += ["", *body]
    return text, said


def texts():
    """What claims.md says between its markers."""
    table, need = read(RESULTS), needed()
    body, rows = [], ["| | claim | verdict |", "|---|---|---|"]
    for number, claim in enumerate(CLAIMS, 1):
        lines, said = section(number, claim, table, need)
        body += lines
        rows.append(f"| {number} | {claim['claim']} | {said} |")
    return [(HERE / "claims.md", "overview", rows), (HERE / "claims.md", "claims", body)]


def picture(claim, name, lines):
    """A picture of an attempt at a claim, where all its runs are there."""
    import plots

    if len(lines) < len(pairs(claim)):
        return
    asked = list(dict.fromkeys((p["what"], p["task"]) for p in predictions(claim)))
    values = {
        (what, task): {
            setting: statistic(what)[0](found)
            for (setting, on), found in lines.items()
            if on == task
        }
        for what, task in asked
    }
    plots.claim(name, values)


def report():
    """claims.md and a picture a claim."""
    import plots  # which needs matplotlib: before anything is written

    table, need = read(RESULTS), needed()
    for claim in CLAIMS:
        for attempt, suffix in zip(attempts(claim), ["", "-again"]):
            picture(attempt, claim["name"] + suffix, lines_of(attempt, table, need))
    plots.claims([(claim["claim"], judgements(claim, table, need)[-1]) for claim in CLAIMS])
    for place in texts():
        write_between(*place)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="claims whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--alone", action="store_true", help="those about the clock, one at a time")
    parser.add_argument(
        "--confirm", action="store_true", help="keep runs that a change of the script left alone"
    )
    parser.add_argument("--report", action="store_true", help="write claims.md; run nothing")
    arguments = parser.parse_args()
    try:
        if arguments.confirm:
            confirm()
        else:
            report() if arguments.report else run_missing(arguments)
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
