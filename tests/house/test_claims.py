"""The claims: every one can be run, is judged by its rule, and claims.md says what was measured."""

import shlex
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, SCRIPTS, module

sys.path.append(str(ROOT / "benchmarks"))
import claims  # noqa: E402
import runner  # noqa: E402

SECTIONS = (ROOT / "tests/sections.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim["name"])
def test_every_claim_can_be_run(claim):
    assert claim["section"] in [line.lstrip("# ") for line in SECTIONS]
    used = set()
    for p in claims.predictions(claim):
        claims.statistic(p["what"])
        assert p["task"] in claim["tasks"] and float(p["by"]) >= 0
        for side in p["more"], p["less"]:
            assert side in claim["settings"] or float(side) < 1e9
            used.add(side)
    assert set(claim["settings"]) == (used | set(claim.get("shown", []))) & set(claim["settings"])
    for attempt in claims.attempts(claim):
        assert set(attempt["tasks"]) <= set(claim["tasks"]) and attempt["predicts"]
        assert {line.split()[0] for line in attempt["settings"].values()} <= set(SCRIPTS)
        for pair in claims.pairs(attempt):
            script, _, options = claims.line_of(attempt, *pair).partition(" ")
            tyro.cli(module(script).Args, args=shlex.split(options))


def test_the_page_says_what_the_result_file_says():
    for path, name, lines in claims.texts():
        new = runner.between(path, name, lines)
        assert path.read_text(encoding="utf-8") == new, "python benchmarks/claims.py --report"


def test_no_run_of_a_claim_is_stale():
    need = claims.needed()
    for line in runner.read(claims.RESULTS):
        assert line["run"] in need and claims.fits(line, need[line["run"]]), line["run"]


PREDICTION = {"what": "final", "task": "T", "more": "a", "less": "b", "by": "10"}


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([30, 31, 32], [0, 1, 2], "holds"),
        ([0, 1, 2], [30, 31, 32], "fails"),
        ([5, 6, 7], [0, 1, 2], "fails"),  # there is a difference, and it does not count
        ([60, 0, 30], [0, 1, 2], "open"),
        ([20, 20], [10, 10], "holds"),
    ],
)
def test_predictions_are_judged_by_the_interval_of_the_difference(a, b, verdict):
    runs = {
        (name, "T"): [{"final": str(x)} for x in values] for name, values in (("a", a), ("b", b))
    }
    assert claims.judge(PREDICTION, runs, {"a": "", "b": ""})[3] == verdict
    against_zero = claims.judge(PREDICTION | {"less": "0"}, runs, {"a": ""})
    assert against_zero[0] == pytest.approx(np.mean(a))
    assert claims.judge(PREDICTION, {}, {"a": "", "b": ""}) is None


@pytest.mark.parametrize(
    ("more", "less", "verdict"),
    [
        (([9, 8], [9, 9]), ([1, 2], [9, 9]), "holds"),
        (([9, 8], [9, 9]), ([1, 2], [0, 9]), "open"),  # the other may need more steps
        (([9, 8], [0, 9]), ([1, 2], [9, 9]), "holds"),
        (([1, 2], [9, 9]), ([9, 8], [9, 9]), "fails"),
        (([1, 2], [9, 0]), ([9, 8], [9, 9]), "open"),  # this may need more steps
        (([1, 2], [9, 9]), ([9, 8], [9, 0]), "fails"),
    ],
)
def test_a_run_that_never_gets_there_is_a_lower_bound(more, less, verdict):
    """Of each side: steps of its two runs, and the return that each reaches; the bar is 5."""
    runs = {
        (name, "T"): [
            {"logs": f"charts/eval_return={steps}:{best}", "env_steps": steps}
            for steps, best in zip(*side)
        ]
        for name, side in (("a", more), ("b", less))
    }
    p = PREDICTION | {"what": "steps to 5", "by": "1"}
    assert claims.judge(p, runs, {"a": "", "b": ""})[3] == verdict


@pytest.mark.parametrize(
    ("more", "less", "verdict"),
    [
        ([1, 1.1], [0.01, 0.011], "holds"),
        ([1, 1.1], [-1, 1e-5], "holds"),
        ([2e-4, 1e-5], [1, 1.1], "fails"),
        ([1e-4, 2e-4], [-1, 1e-5], "open"),  # the other may be smaller
        ([1e-5, 1e-5], [1e-6, 1e-6], "open"),
    ],
)
def test_a_logarithm_at_its_floor_is_an_upper_bound(more, less, verdict):
    runs = {
        (name, "T"): [{"logs": f"losses/kl=100:{x}"} for x in values]
        for name, values in (("a", more), ("b", less))
    }
    p = PREDICTION | {"what": "log10 of last kl", "by": "0.5"}
    assert claims.judge(p, runs, {"a": "", "b": ""})[3] == verdict


def test_the_difference_by_hand():
    gap, low, high = claims.difference([1, 2, 3], [1, 1, 1])
    assert (
        gap == 1
        and high - gap == pytest.approx(4.30265 * (1 / 3) ** 0.5)
        and gap - low == high - gap
    )
    for a in np.random.default_rng(0).normal(size=(20, 8)):  # 7 degrees, whatever the rounding
        gap, _, high = claims.difference(a, [1.0] * 8)
        assert high - gap == pytest.approx(2.36462 * (a.var(ddof=1) / 8) ** 0.5)


def test_the_verdict_of_a_claim():
    def verdict(*found):
        return claims.verdict(list(found))

    assert verdict("holds", "holds") == "holds"
    assert verdict("holds", "fails", "open") == "holds only in part (1 of 3)"
    assert verdict("fails", "fails") == "does not hold here"
    assert verdict("fails", "open") == "open"
    assert verdict("holds", "not run") == "not run yet"


def run(final=5, env_steps=100, **logs):
    """A line of the table with these scalars."""
    text = "|".join(f"{tag}={curve}" for tag, curve in logs.items())
    return {"final": str(final), "env_steps": str(env_steps), "seconds": "2", "logs": text}


def test_statistics_by_hand():
    def of(name, *lines):
        return list(claims.statistic(name)[0](list(lines)))

    returns = run(**{"charts/episodic_return": "0:0 50:10 100:6", "charts/SPS": "0:5 100:5"})
    assert of("area", returns) == [(50 * 5 + 50 * 8) / 100]
    assert of("fall", returns) == [4]
    assert of("seconds to 10", returns) == [10] and of("seconds to 11", returns) == [20]
    assert of("seconds per 1000 steps", returns) == [20]
    assert of("spread", run(1), run(2), run(9)) == [1, 0, 7]
    evaluations = run(**{"charts/eval_return": "20:1 40:3 60:2"})
    assert of("steps to 2", evaluations) == [40] and of("steps to 4", evaluations) == [100]
    assert of("last kl", run(**{"losses/kl": "50:7 80:2 100:4"})) == [3]
    assert of("log10 of last kl", run(**{"losses/kl": "50:7 100:100"})) == [2]


class Constant(torch.nn.Module):
    """Values 1 and 3, whatever the state."""

    def forward(self, obs):
        return torch.tensor([[1.0, 3.0]])

    def act(self, obs):
        return [0]


def test_the_bias_of_a_checkpoint_by_hand(monkeypatch, tmp_path):
    script = SimpleNamespace(
        Args=SimpleNamespace,
        make_env=lambda args: gym.make("CartPole-v1", max_episode_steps=2),
        make_policy=lambda env, args: Constant(),
    )
    monkeypatch.setitem(sys.modules, "of_constant_value", script)
    torch.save({"args": {"gamma": 0.9, "seed": 1}, "policy": {}}, tmp_path / "checkpoint.pt")
    assert claims.value_bias("of_constant_value", tmp_path) == pytest.approx(3 - (1 + 0.9))

    class Critics(torch.nn.Module):
        def forward(self, obs, action):
            return torch.tensor([[5.0], [2.0]])

    script.QNetworks = lambda env, hidden, count: Critics()
    monkeypatch.setitem(sys.modules, "td3", script)
    saved = {"args": {"gamma": 0.9, "seed": 1, "hidden": 1}, "policy": {}, "critic": {}}
    torch.save(saved, tmp_path / "checkpoint.pt")
    assert claims.value_bias("td3", tmp_path) == pytest.approx(2 - (1 + 0.9))
