"""The benchmarks: what makes a result stale, verdicts, and tables that say what was measured."""

import argparse
import ast
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, module

sys.path.append(str(ROOT / "benchmarks"))
import images  # noqa: E402
import returns  # noqa: E402
import runner  # noqa: E402
import speed  # noqa: E402

ROW = {"script": "ppo", "env": "CartPole-v1", "steps": 100, "metric": "greedy", "seeds": 3}
ROW |= {"reference": 500, "tolerance": 5}
ALL = argparse.Namespace(tier="all", script=None, env=None, peer=False, jobs=1)


def test_every_row_can_be_run_and_judged():
    for row in returns.TABLE["row"]:
        assert row["metric"] in ("greedy", "best", "train") and row["tier"] in ("standard", "full")
        assert row["env"] in returns.TABLE["random"] and returns.block(row) % 10 == 1
        assert row.get("seeds", 0) <= 10 and (row.get("seeds", 0) >= 5 or row["tier"] == "full")
        script = module(row["script"])  # its options are there and in range
        tyro.cli(script.Args, args=shlex.split(returns.command(row)))


def test_tables_say_what_the_result_files_say_and_no_row_is_stale():
    table = runner.read(returns.RESULTS)
    for row in returns.TABLE["row"]:
        assert returns.judge(row, table)["verdict"] != "stale", returns.key(row)
    for path, name, lines in *returns.texts(), images.texts(), speed.texts():
        new = runner.between(path, name, lines)
        assert path.read_text(encoding="utf-8") == new, f"{name}: write it again by --report"


def test_a_reference_of_another_algorithm_is_named():
    proxies = [row for row in returns.TABLE["row"] if row["source"].startswith("proxy")]
    assert proxies and all(re.search(r" \(\w+\)$", returns.reference(row)) for row in proxies)
    assert returns.reference({"reference": -4.6, "source": "TD3p, -4.6 at 100k"}) == "-4.6"


def test_only_what_decides_a_result_makes_it_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "ROOT", tmp_path)

    def sha(source, options="--steps 10"):
        (tmp_path / "x.py").write_text(source)
        return runner.sha("x", options)

    base = sha('"""Doc."""\n\ndef f(a: int) -> int:\n    """Doc."""\n    return a + 1\n')
    assert base == sha('"""Other."""\ndef f(a):\n    return a + 1  # why\n')
    assert base != sha("def f(a):\n    return a + 2\n")
    assert base != sha("def f(a):\n    return a + 1\n", "--steps 10 --gamma 0.9")

    end = "def __exit__(self):\n    {}\n\ndef f():\n    return SummaryWriter({})\n"
    assert sha(end.format("pass", "")) == sha(end.format("save()", "x, flush_secs=1"))
    assert sha(end.format("pass", "")) != sha(end.format("pass", "").replace("exit", "enter"))
    refuse = "def f(x):\n    if x > {}:\n        raise Refusal({})\n"
    assert sha(refuse.format(1, "'no'")) == sha(refuse.format(1, "f'{x}: no'"))
    assert sha(refuse.format(1, "'no'")) != sha(refuse.format(2, "'no'"))

    def args(gamma, tau):
        source = f"class Args:\n    gamma: float = {gamma}\n    tau: float = {tau}\n"
        return sha(source, options)

    options = "--gamma 0.9"
    assert args(0.5, 0.1) == args(0.6, 0.1) != args(0.5, 0.2)
    options = ""
    assert args(0.5, 0.1) != args(0.6, 0.1)


def lines(finals, first=201, curves=None, script="ppo"):
    """Results of ROW on as many seeds."""
    out = []
    for i, final in enumerate(finals):
        line = {"script": script, "env": "CartPole-v1", "steps": "100", "seed": str(first + i)}
        line |= {
            "final": str(final),
            "train": "7",
            "sha": "now",
            "seconds": "60",
            "env_steps": "100",
        }
        out.append(line | {"curve": curves[i] if curves else "100:0"})
    return out


@pytest.mark.parametrize(
    ("finals", "verdict"),
    [
        ([500, 500, 500], "reached"),
        ([496, 495, 495], "level"),  # the mean is above the bar of 495, the interval holds it
        ([500, 500, 450], "level"),
        ([400, 410, 405], "below"),
        ([400, 490, 480], "level"),
        ([500, 500], "unfinished, 2 of 3"),
        ([], "not run"),
    ],
)
def test_verdicts(monkeypatch, finals, verdict):
    monkeypatch.setattr(returns, "row_sha", lambda row, peer=False: "now")
    others = lines([0, 0, 0], first=101) + lines([0], script="sb3-ppo")
    assert returns.judge(ROW, lines(finals) + others)["verdict"] == verdict
    monkeypatch.setattr(returns, "row_sha", lambda row, peer=False: "later")
    assert returns.judge(ROW, lines(finals))["verdict"] == ("stale" if finals else "not run")


def test_a_row_stands_on_its_own_block_and_earlier_ones_are_counted(monkeypatch):
    monkeypatch.setattr(returns, "row_sha", lambda row, peer=False: "now")
    table = lines([0, 0, 0]) + lines([500, 500, 500], first=211)
    result = returns.judge({**ROW, "block": 211}, table)
    assert result["verdict"] == "reached" and result["attempts"] == 2
    assert returns.judge(ROW, table)["verdict"] == "below"


def test_best_is_the_best_time_of_the_averaged_curve():
    curves = ["50:10 100:2", "50:0 100:6"]  # each seed's own maximum would give 8
    row = {**ROW, "metric": "best", "seeds": 2}
    assert returns.metric(row, lines([1, 1], curves=curves)).tolist() == [10, 0]
    assert returns.metric({**row, "metric": "train"}, lines([1, 1])).tolist() == [7, 7]


def test_the_peer_counts_on_all_of_its_seeds(monkeypatch):
    monkeypatch.setattr(returns, "row_sha", lambda row, peer=False: "now")
    row = {**ROW, "seeds": 10, "peer": {"algorithm": "PPO"}}
    for count, seen in (4, 0), (5, 5):
        table = lines([500] * 10) + lines([490] * count, script="sb3-ppo")
        assert len(returns.judge(row, table)["peer"]) == seen


def test_runs_that_ended_in_any_order_stand_in_the_order_of_their_seeds(monkeypatch):
    """The peer has the first seeds, so order decides what it is compared with."""
    monkeypatch.setattr(returns, "row_sha", lambda row, peer=False: "now")
    table = lines([1, 2, 3])
    result = returns.judge(ROW, [table[2], table[0], table[1], table[0]])
    assert result["values"].tolist() == [1, 2, 3]
    assert returns.judge(ROW, [table[0], table[1], table[0]])["verdict"] == "unfinished, 2 of 3"


def test_an_unfinished_row_shows_its_returns_and_what_its_own_runs_cost(monkeypatch):
    """A run of the row says more of the next than shorter ones on the same environment."""
    monkeypatch.setattr(returns, "row_sha", lambda row, peer=False: "now")
    shorter = [line | {"steps": "10", "env_steps": "10", "seconds": "1"} for line in lines([9] * 9)]
    own = [line | {"env_steps": "100", "seconds": "6000"} for line in lines([400, 410])]
    table, row = shorter + own, {**ROW, "source": ""}
    text = returns.open_text(returns.judge(row, table), table)
    assert text.endswith("| unfinished, 2 of 3: 400.0, 410.0 | 100 |")


def test_seeds_at_the_bar_are_counted(monkeypatch):
    monkeypatch.setattr(returns, "row_sha", lambda row, peer=False: "now")
    text = returns.row_text(returns.judge({**ROW, "source": ""}, lines([495, 494.9, 500])))
    assert "| 2 of 3 |" in text


def test_every_row_of_the_speeds_can_be_run():
    assert speed.TABLE.keys() == speed.TABLES.keys()
    rows = [row for rows in speed.TABLE.values() for row in rows]
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        given = [f"{row['option']} {value}" for value in row["values"]] if "values" in row else [""]
        for options in given:
            line = shlex.split(f"{row.get('options', '')} {options}")
            arguments = tyro.cli(module(row["script"]).Args, args=line)
            hidden = "--hidden" in row.get("options", "") or row.get("option") == "--hidden"
            assert not hidden or getattr(arguments, "layers", 1), "units in no layer"


def test_every_row_of_the_speeds_has_its_cells_and_the_numbers_of_its_goal():
    for kind, (_, _, cells_of, _, columns) in speed.TABLES.items():
        for row in speed.TABLE[kind]:
            names = {"a", "return", "steps"} | ({"b", "their_return"} if "peer" in row else set())
            names = row.get("values", names if kind in ("cold", "row", "memory") else "ab")
            cells, numbers = cells_of(row, {name: [1.0] for name in names})
            speed.missed(row, numbers)
            goal = ["goal"] if columns.endswith("goal") else []
            assert len(cells) + len(goal) == len(columns.split(" | ")), row["name"]


@pytest.mark.parametrize("file", ["peer", "pycma"])
def test_the_settings_of_a_peer_are_arguments_of_its_functions(file, monkeypatch):
    """stable-baselines3 itself is not installed for the tests."""
    source = ast.parse((ROOT / f"benchmarks/{file}.py").read_text(encoding="utf-8"))
    [found] = [node for node in source.body if getattr(node, "name", "") == "speed"]
    known = {argument.arg for argument in found.args.args}
    asked = []
    monkeypatch.setattr(
        speed, "measured", lambda line, threads: asked.append(line) or ("[1, 2]", 3, 4)
    )
    for row in (row for rows in speed.TABLE.values() for row in rows if "peer" in row):
        speed.peer(row, 1)
        if asked[-1][3].endswith(f"/{file}.py"):
            given = json.loads(asked[-1][4])
            assert given["steps"] > 0
            assert given.keys() <= known or (found.args.kwarg and "algorithm" in given)
    assert {line[3].rpartition("/")[2] for line in asked} == {"peer.py", "pycma.py"}


def test_the_cells_of_a_speed_and_of_a_cold_start():
    found = {"a": [30, 10, 20], "b": [10, 10, 5]}
    cells, numbers = speed.pair({}, found)
    assert cells == ["20 (10 to 30)", "10 (5 to 10)", "3.00 (1.00 to 4.00)"]
    assert numbers == {"a": 20, "ratio": 3}
    assert speed.missed({"at_least": {"ratio": 3.001}}, numbers)
    assert speed.missed({"at_least": {"a": 20}, "at_most": {"ratio": 2}}, numbers)
    assert not speed.missed({"at_least": {"a": 20}, "at_most": {"ratio": 3}}, numbers)
    row = {"threshold": 475, "peer": {"steps": 100}}
    found = {"a": [4, 8], "return": [500, 480], "steps": [50, 50]}
    cells, numbers = speed.cold(row, found | {"b": [40, 40], "their_return": [500, 100]})
    assert cells[1:4] == ["50", "480.0", "2 of 2"] and cells[5:8] == ["100", "100.0", "1 of 2"]
    assert numbers == {"a": 6, "least": 480, "ratio": 7.5} and cells[8] == "7.5 (5.0 to 10.0)"
    cells, numbers = speed.cold(row, found | {"b": [40, 40], "their_return": [500, 500]})
    assert cells[8] and numbers["ratio"]
    found["return"] = [500, 474.9]
    cells, numbers = speed.cold(row, found | {"b": [40, 40], "their_return": [500, 500]})
    assert not cells[8] and not numbers["ratio"], "faster to a worse policy is not faster"


def test_speeds_are_kept_turn_by_turn_for_todays_options_only(tmp_path, monkeypatch):
    row = {"name": "x", "script": "ppo", "env": "CartPole-v1", "steps": 1, "options": ""}
    asked, failing = [], []

    def turn_of(row, turn):
        asked.append(turn)
        if turn in failing:
            raise RuntimeError("no")
        return {"a": turn, "b": 2}

    monkeypatch.setattr(speed, "TABLE", {"row": [row]})
    heads = "steps", "ours | peer | ratio | goal"
    monkeypatch.setattr(speed, "TABLES", {"row": (turn_of, range(1, 4), speed.pair, *heads)})
    monkeypatch.setattr(speed, "RESULTS", tmp_path / "speed.csv")
    monkeypatch.setattr(speed, "commit", lambda *files: "now")
    failing.append(2)
    assert speed.measure("") == 1 and asked == [1, 2]
    named = "Measured on commits now; scripts of later commits can differ in speed."
    assert speed.texts()[2] == ["1 of 1 rows are not measured yet.", "", named]
    failing.clear()
    assert speed.measure("y") == 0 and speed.measure("x") == 0 and asked == [1, 2, 2, 3]
    assert speed.texts()[2][-3] == "| x | 2 (1 to 3) | 2 (2 to 2) | 1.00 (0.50 to 1.50) |  |"
    row["goal"] = "a goal changes nothing that was measured"
    row["at_least"] = {"ratio": 1.1}
    assert speed.texts()[2][-3].endswith("measured: **missed** |")
    row["at_least"] |= {"a": 2}
    assert speed.texts()[2][-3].endswith("measured: **ratio missed** |")
    row["steps"] = 2
    assert speed.texts()[2] == ["1 of 1 rows are not measured yet.", "", named]


def test_statistics_by_hand():
    low, high = runner.interval([1, 2, 3])
    assert (low, high) == pytest.approx((2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5))
    assert returns.better(np.array([1, 3]), np.array([1, 2])) == (0.5 + 0 + 1 + 1) / 4
    assert returns.interquartile_mean(np.array([[-100, 1], [2, 900]])) == 1.5
    row = {**ROW, "reference": 500}
    assert returns.score(row, np.array([21.5, 500])).tolist() == [0, 1]
    scores = np.arange(10.0).reshape(2, 5)
    low, high = returns.bootstrap(returns.interquartile_mean, scores)
    assert low < returns.interquartile_mean(scores) < high


def test_curves_as_text():
    steps, values = np.arange(100) * 10, np.arange(100) / 7
    text = runner.curve(steps, values, 20)
    x, y = runner.points(text)
    assert len(x) == 20 and x[0] == 0 and x[-1] == 990
    assert y[-1] == pytest.approx(99 / 7, rel=1e-4)
    assert runner.curve(np.array([5, 5]), np.array([1.0, 2.0])) == "5:2"  # the later of two


@pytest.mark.parametrize(
    ("today", "stands"),
    [
        ({".policy.w": "1", ".env_steps": "9"}, True),
        ({".policy.w": "1"}, True),  # what is no longer saved decides nothing
        ({".policy.w": "2", ".env_steps": "9"}, False),
        ({".policy.w": "1", ".policy.b": "1", ".env_steps": "9"}, False),
    ],
)
def test_results_stand_after_a_change_only_if_short_runs_learn_the_same(
    tmp_path, monkeypatch, today, stands
):
    monkeypatch.setattr(returns, "RESULTS", tmp_path / "returns.csv")
    monkeypatch.setattr(runner, "CONFIRMED", tmp_path / "confirmed.csv")
    monkeypatch.setattr(returns, "rows", lambda _: [ROW])
    monkeypatch.setattr(returns, "commit", lambda *files: "b")
    for line in lines(["9.0", "8.0", "7.0"]):
        runner.append(returns.RESULTS, line | {"commit": "a"})
    compared = []

    def learned(script, options, stands_on):
        assert options == "--env-id CartPole-v1 --total-timesteps 3000 --eval-episodes 1 --seed 101"
        compared.append(stands_on)
        return today if stands_on == "HEAD" else {".policy.w": "1", ".env_steps": "9"}

    monkeypatch.setattr(runner, "learned", learned)
    monkeypatch.setattr(returns, "row_sha", lambda row, peer=False: "now")
    assert not returns.stale(ROW, runner.read(returns.RESULTS))
    monkeypatch.setattr(returns, "row_sha", lambda row, peer=False: "later")
    before = returns.RESULTS.read_text()
    assert returns.stale(ROW, runner.read(returns.RESULTS))
    for _ in range(2):  # asked once
        returns.confirm(ALL)
    assert compared == ["a", "HEAD"] and returns.RESULTS.read_text() == before
    assert returns.stale(ROW, runner.read(returns.RESULTS)) != stands
    monkeypatch.setattr(returns, "row_sha", lambda row, peer=False: "later still")
    assert returns.stale(ROW, runner.read(returns.RESULTS))


def test_what_a_run_learned_is_all_that_its_checkpoint_holds(monkeypatch):
    def execute(script, options, run_dir, folder):
        assert pathlib.Path(folder, f"{script}.py").read_text() == "source"
        os.mkdir(run_dir)
        state = {"w": torch.ones(2), "steps": [torch.zeros(1), 3]}
        checkpoint = {"policy": state, "env_steps": 9, "args": {"seed": 101}}
        torch.save(checkpoint, f"{run_dir}/checkpoint.pt")

    monkeypatch.setattr(runner, "execute", execute)
    monkeypatch.setattr(runner.subprocess, "check_output", lambda *a, **k: b"source")
    found = runner.learned("ppo", "", "a")
    assert found.keys() == {".policy.w", ".policy.steps.0", ".policy.steps.1", ".env_steps"}
    assert found[".policy.w"] != found[".policy.steps.0"] and found[".env_steps"] == "9"


def test_an_interrupted_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    asked = []

    def execute(script, options, folder):
        asked.append(options)
        log = folder / f"events.out.tfevents.{1000 * len(asked)}.host"
        log.touch()
        os.utime(log, (0, 1000 * len(asked) + 60))
        if len(asked) > 1:
            (folder / "checkpoint.pt").touch()
        if len(asked) < 3:
            raise RuntimeError("interrupted")
        return {"eval_return_mean": 1.0, "eval_return_std": 0.0, "env_steps": 100}

    monkeypatch.setattr(returns, "execute", execute)
    monkeypatch.setattr(returns, "scalars", lambda folder, tag: (np.ones(1), np.ones(1)))
    for _ in range(2):  # without a checkpoint, and with one
        with pytest.raises(RuntimeError):
            returns.run_ours(ROW, 201, tmp_path)
    values = returns.run_ours(ROW, 201, tmp_path)
    assert [f"--resume {tmp_path}/checkpoint.pt" in options for options in asked] == [0, 0, 1, 1]
    assert 60 <= values["seconds"] < 70  # of the second, whose log is left, and the third


def test_a_changed_script_is_committed_before_it_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    (tmp_path / "x.py").write_text("1\n")
    who = "git -c user.name=x -c user.email=x@x.org"
    for line in "git init -q", "git add x.py", f"{who} commit -qm first":
        subprocess.run(shlex.split(line), cwd=tmp_path, check=True)
    assert len(runner.commit("x.py")) == 10
    (tmp_path / "x.py").write_text("2\n")
    with pytest.raises(RuntimeError, match=r"commit before you measure: x\.py"):
        runner.commit("x.py")


class Pays(gym.Env):
    """Two steps, each with its action, 0 or 1, as its reward."""

    observation_space = action_space = gym.spaces.Discrete(2)
    steps = 0

    def reset(self, **_):
        self.steps = 0
        return 0, {}

    def step(self, action):
        self.steps += 1
        return 0, float(action), self.steps == 2, False, {}


def test_random_play_is_the_mean_of_whole_episodes(monkeypatch):
    monkeypatch.setitem(gym.registry, "Pays-v0", gym.envs.registration.EnvSpec("Pays-v0", Pays))
    assert returns.random_play("Pays-v0", episodes=1000) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("options", "random", "said"),
    [
        (["--script", "pp0"], returns.TABLE["random"], "no such row"),
        (["--report"], {"CartPole-v1": 21.5}, "lacks"),
    ],
)
def test_mistakes_are_said_before_anything_runs(options, random, said, monkeypatch, capsys):
    monkeypatch.setitem(returns.TABLE, "random", random)
    monkeypatch.setattr(returns, "run_missing", lambda *_: pytest.fail("it ran"))
    monkeypatch.setattr(returns, "report", lambda: pytest.fail("it wrote"))
    monkeypatch.setattr(sys, "argv", ["returns.py", *options])
    with pytest.raises(SystemExit, match="2"):
        returns.main()
    assert said in capsys.readouterr().err
