"""The benchmark runner: what makes a result stale, and what counts as published, level or short."""

import argparse
import shlex
import sys

import pytest
import tyro
from conftest import ROOT, module

sys.path.append(str(ROOT / "benchmarks"))
import returns  # noqa: E402

ALL = argparse.Namespace(tier="all", script=None, env=None)


def test_every_row_can_be_run_and_judged():
    table = list(returns.rows(ALL))
    assert table
    for row in table:
        assert row["metric"] in ("greedy", "best", "train") and row["tier"] in ("standard", "full")
        script = module(row["script"])  # its options are there and in range
        tyro.cli(script.Args, args=shlex.split(returns.command(row)))


def test_only_what_decides_a_result_makes_it_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(returns, "ROOT", tmp_path)
    row = {"script": "x", "env": "E-v0", "steps": 10, "metric": "greedy"}

    def sha(source, **changes):
        (tmp_path / "x.py").write_text(source)
        return returns.sha({**row, **changes})

    base = sha('"""Doc."""\n\ndef f(a: int) -> int:\n    """Doc."""\n    return a + 1\n')
    assert base == sha('"""Other."""\ndef f(a):\n    return a + 1  # why\n')
    assert base != sha("def f(a):\n    return a + 2\n")
    assert base != sha("def f(a):\n    return a + 1\n", options="--gamma 0.9")

    def args(gamma, tau):
        return sha(f"class Args:\n    gamma: float = {gamma}\n    tau: float = {tau}\n", **given)

    given = {"options": "--gamma 0.9"}
    assert args(0.5, 0.1) == args(0.6, 0.1) != args(0.5, 0.2)
    given = {}
    assert args(0.5, 0.1) != args(0.6, 0.1)


@pytest.mark.parametrize(
    ("ours", "peer", "verdict"),
    [
        ([500, 500, 500], None, "published"),
        ([496, 495, 495], None, "published"),  # within the tolerance of 5
        ([500, 500, 450], None, "level"),  # the interval reaches the bar
        ([400, 410, 405], None, "short"),
        ([400, 410, 405], [380, 390, 385], "level"),  # of a single run that the peer misses too
        ([300, 310, 305], [380, 390, 385], "short"),
        ([400, 410, 405], [380, 390], "short"),  # the peer's bar is of the same seeds or not at all
        ([500, 500], None, "unfinished"),
    ],
)
def test_verdicts(monkeypatch, ours, peer, verdict):
    row = {
        "script": "ppo",
        "env": "CartPole-v1",
        "steps": 10,
        "metric": "greedy",
        "tier": "standard",
    }
    row |= {"reference": 500, "tolerance": 5, "peer": {"algorithm": "PPO"}}
    lines = []
    for script, values in (("ppo", ours), ("sb3-ppo", peer or [])):
        for seed, value in enumerate(values, 1):
            line = {"script": script, "env": row["env"], "seed": str(seed), "metric": "greedy"}
            line |= {"return_mean": str(value), "wall_seconds": "601", "env_steps": "10"}
            lines.append(line | {"script_sha": "now"})
    stray = {**lines[0], "seed": "101"}, {**lines[0], "seed": "9", "metric": "best"}
    monkeypatch.setattr(returns, "measured", lambda: [*lines, *stray])
    monkeypatch.setattr(returns, "sha", lambda row, peer=False: "now")
    assert returns.judge(row)["verdict"] == verdict  # of runs over ten minutes three are enough
    short = [{**line, "wall_seconds": "599"} for line in lines]
    monkeypatch.setattr(returns, "measured", lambda: short)
    assert returns.judge(row)["verdict"] == "unfinished"
    monkeypatch.setattr(returns, "sha", lambda row, peer=False: "later")
    assert returns.judge(row)["verdict"] == "stale"


@pytest.mark.parametrize(
    ("mean", "point", "stand"), [("9.0", "3", True), ("9.1", "3", False), ("9.0", "4", False)]
)
def test_other_seeds_stand_only_where_seed_1_is_as_it_was(
    tmp_path, monkeypatch, mean, point, stand
):
    """The result and the learning curve of seed 1 must both be the same under the new hash."""
    row = {"script": "x", "env": "E-v0"}
    monkeypatch.setattr(returns, "rows", lambda _: [row])
    monkeypatch.setattr(returns, "sha", lambda _: "new")
    monkeypatch.setattr(returns, "RESULTS", tmp_path / "returns.csv")
    monkeypatch.setattr(returns, "CURVES", tmp_path / "curves.csv")
    columns = ["script", "env", "seed", "script_sha"]
    runs = [("1", "old", "9.0", "3"), ("2", "old", "8.0", "5"), ("1", "new", mean, point)]
    for seed, sha, value, at_10 in runs:
        line = {**row, "seed": seed, "script_sha": sha}
        result = {"env_steps": "10", "metric": "greedy", "return_mean": value, "return_std": "0"}
        returns.append(returns.RESULTS, [*columns, *result], [line | result])
        at = {"step": "10", "return": at_10}
        returns.append(returns.CURVES, [*columns, *at], [line | at])
    for _ in range(2):  # a second call finds nothing to do
        returns.carry(ALL)
        new = [line for line in returns.measured() if line["script_sha"] == "new"]
        assert [line["return_mean"] for line in new] == ([mean, "8.0"] if stand else [mean])
    assert returns.CURVES.read_text().count("new") == len(new)
