"""Two processes of torchrun: they learn as one, and what stops one stops both."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from runs import TORCHRUN, load, same

# Each script once, one after the other in the same two processes. What each process has drawn,
# summed and learned goes to a file.
LEARN = """
import os, torch, envs
from torch.optim.optimizer import register_optimizer_step_pre_hook

out = os.environ["OUT"]


def learn(name, script, options):
    begin, evaluate, all_sum = envs.Matched.reset, script.Run.evaluate, script.all_sum
    seen, summed_with, weights = [], {}, []

    def reset(self, **given):
        first = begin(self, **given)
        seen.append(float(self.sign))
        return first

    def summed(*tensors, weight=1):
        first = all_sum(*tensors, weight=weight)
        summed_with.update((x.data_ptr(), weight) for x in tensors)
        return first

    def step(optimizer, *_):
        gradients = [x.grad for x in optimizer.param_groups[0]["params"]]
        weights.append([summed_with.get(x.data_ptr()) for x in gradients])
        summed_with.clear()

    def tell(run):
        learner = {part: x.state_dict() for part, x in run.learner.items()}
        probe = all_sum(torch.tensor([run.rank + 1.0]), weight=0.25 + run.rank / 2)
        simulated = envs.Tiny.steps
        found = {"learner": learner, "probe": probe, "step": run.step, "simulated": simulated}
        found |= {"seen": seen, "weights": weights, "drawn": run.rng.random()}
        torch.save(found, f"{out}/{name}{run.rank}.pt")
        return evaluate(run)

    envs.Matched.reset, script.Run.evaluate, script.all_sum = reset, tell, summed
    envs.Tiny.steps = 0
    hook = register_optimizer_step_pre_hook(step)
    options |= dict(env_id="Matched-v0", run_dir=f"{out}/{name}", total_timesteps=6_000)
    script.train(script.Args(**options))
    envs.Matched.reset = begin
    hook.remove()
    many = {"candidates": 5} if name == "nes" else {"num_envs": 5}
    try:
        script.train(script.Args(env_id="Matched-v0", run_dir=f"{out}/{name}-odd", **many))
    except script.Refusal as error:
        open(f"{out}/{name}{os.environ['RANK']}.txt", "w").write(str(error))


for name, options in OPTIONS.items():
    learn(name, __import__(name), options)
"""
OPTIONS = {
    "ppo": dict(num_envs=16, num_steps=63, hidden=32, learning_rate=5e-3, norm_obs=True)
    | dict(norm_rewards=True, target_kl=0.05),
    "a2c": dict(num_envs=16, num_steps=7, hidden=32),
    "reinforce": dict(num_envs=32, hidden=32, value_steps=4, norm_obs=True, standardize=True),
    "nes": dict(candidates=32, episodes=2, hidden=16, norm_obs=True),
}


def torchrun(folder, code, *options):
    (folder / "two.py").write_text(code)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = f"{ROOT}:{ROOT / 'tests'}"
    return subprocess.run(
        [*line, str(folder / "two.py"), *options],
        env={**os.environ, "OUT": str(folder), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def learned_together(tmp_path_factory):
    """The folder with what both processes told, and the output of torchrun."""
    folder = tmp_path_factory.mktemp("torchrun")
    run = torchrun(folder, f"OPTIONS = {OPTIONS}\n{LEARN}")
    assert run.returncode == 0, re.findall(r"^\[rank.*|.*Error.*", run.stderr, re.M)[-12:]
    return folder, run


@pytest.mark.parametrize("name", TORCHRUN)
def test_two_processes_learn_as_one(name, learned_together):
    """Different data on each: only sums over both keep weights and statistics the same."""
    folder, _ = learned_together
    ranks = [torch.load(folder / f"{name}{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert same(ranks[0]["learner"], ranks[1]["learner"])
    assert ranks[0]["seen"][:50] != ranks[1]["seen"][:50], "not the same episodes"
    assert ranks[0]["drawn"] != ranks[1]["drawn"], "nor the same actions"
    simulated = sum(rank["simulated"] for rank in ranks)
    assert ranks[0]["step"] == ranks[1]["step"] == load(folder / name)["env_steps"] == simulated
    assert simulated >= 6_000
    assert [rank["probe"].item() for rank in ranks] == [0.25 * 1 + 0.75 * 2] * 2


@pytest.mark.parametrize("name", [name for name in TORCHRUN if name != "nes"])
def test_gradients_are_averaged(name, learned_together):
    """Before each step, of whatever optimiser: the weights of both processes add up to 1."""
    folder, _ = learned_together
    ranks = [torch.load(folder / f"{name}{n}.pt", weights_only=True)["weights"] for n in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) > 20
    for a, b in zip(*ranks, strict=True):
        assert len(a) == len(b) > 1 and len(set(a)) == len(set(b)) == 1
        assert a[0] + b[0] == pytest.approx(1)


@pytest.mark.parametrize("name", TORCHRUN)
def test_rank_0_alone_speaks_and_writes_to_the_run_directory(name, learned_together):
    folder, run = learned_together
    lines = [line for line in run.stdout.splitlines() if line.startswith("eval_return")]
    assert lines[list(OPTIONS).index(name)].startswith("eval_return_mean=1.00 "), run.stdout
    assert len(lines) == len(OPTIONS) and len(list((folder / name).glob("events*"))) == 1
    assert (folder / f"{name}__rank1").is_dir()


@pytest.mark.parametrize("name", TORCHRUN)
def test_numbers_that_cannot_be_shared_out_are_refused(name, learned_together):
    option = "--candidates 5" if name == "nes" else "--num-envs 5"
    folder, _ = learned_together
    for rank in (0, 1):
        assert option in (folder / f"{name}{rank}.txt").read_text()
    assert not (folder / f"{name}-odd").exists()


FAULT = """
import os, sys, envs
import {name} as script
envs.Faulty.good = 100 if os.environ["RANK"] == "1" else 10**9
run_dir = os.environ["OUT"] + "/run"
script.train(script.Args(env_id="Faulty-v0", total_timesteps=10**6, run_dir=run_dir, **{options}))
"""


@pytest.mark.parametrize("name", ["ppo", "a2c"])
def test_not_a_number_on_one_process_ends_both_before_anything_is_saved(name, tmp_path):
    run = torchrun(tmp_path, FAULT.format(name=name, options=OPTIONS[name]))
    assert run.returncode != 0 and "not finite" in run.stderr
    path = tmp_path / "run/checkpoint.pt"
    saved = load(tmp_path / "run") if path.exists() else {"policy": {}, "env_steps": 0}
    assert all(x.isfinite().all() for x in saved["policy"].values()) and saved["env_steps"] < 10_000
