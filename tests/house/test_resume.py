"""Checkpoints: what they hold, that a resume goes on from there, and what is refused."""

import copy
import dataclasses
import gc
import os
import pickle
import weakref

import pytest
import torch
from conftest import SCRIPTS, SOURCES, command, module
from runs import (
    SHORT,
    args,
    env_id,
    every_script,
    has,
    learned,
    load,
    logged,
    refused,
    same,
    tensors,
    train,
)
from torch.optim.optimizer import register_optimizer_step_pre_hook

# What is learned


@every_script
def test_short_runs_have_every_normaliser_switched_on(name):
    options = module(name).Args.__dataclass_fields__
    assert all(SHORT[name].get(x, options[x].default) for x in options if x.startswith("norm_"))


@pytest.fixture
def made(monkeypatch):
    """Weak references to all modules, also copied ones, and all optimisers made from here on."""
    references = []

    def note(cls, method):
        original = getattr(cls, method)

        def noting(self, *a, **k):
            references.append(weakref.ref(self))
            original(self, *a, **k)

        monkeypatch.setattr(cls, method, noting)

    note(torch.nn.Module, "__init__")
    note(torch.nn.Module, "__setstate__")  # what copy.deepcopy calls
    note(torch.optim.Optimizer, "__init__")
    return references


@every_script
def test_everything_that_learns_is_in_the_checkpoint(name, tmp_path, monkeypatch, made):
    """Every parameter, buffer and state of an optimiser that is in use where training ends."""
    run, left_out, seen = module(name).Run, [], []
    evaluate = run.evaluate

    def look(self):
        kept = {x.data_ptr() for part in self.learner.values() for x in tensors(part.state_dict())}
        gc.collect()
        for x in filter(None, (reference() for reference in made)):
            if isinstance(x, torch.optim.Optimizer):
                assert x.state, f"{type(x).__name__} has made no step"
                state = tensors(list(x.state.values()))
            else:
                state = [*x.parameters(recurse=False), *x.buffers(recurse=False)]
            left_out.extend((x, t) for t in state if t.data_ptr() not in kept)
            seen.extend(state)
        return evaluate(self)

    monkeypatch.setattr(run, "evaluate", look)
    train(name, tmp_path)
    assert seen and not left_out


class Stop(Exception):
    pass


@every_script
def test_a_resume_is_as_if_the_run_had_gone_on(name, tmp_path, monkeypatch):
    """It restores what was saved, tensor by tensor, and every later update is the same bit for bit.

    Of scripts whose updates begin from reset, in any environment. In that of the others every
    episode is alike, and none is under way where the checkpoint is written, so that the run that
    begins new ones sees the same data.
    """
    kind = "Matched" if name in ("reinforce", "cem", "cmaes", "nes") else "Terminates"
    run, states = module(name).Run, {}
    init, log = run.__init__, run.log

    def state(self):
        return {part: copy.deepcopy(x.state_dict()) for part, x in self.learner.items()}

    def begin(self, *a, **k):
        init(self, *a, **k)
        states[self.dir] = {self.step: state(self)}

    def note(self, **scalars):
        log(self, **scalars)
        states[self.dir][self.step] = state(self)
        if self.dir == stopped and len(states[self.dir]) == 3:  # at first, and two logs
            raise Stop

    monkeypatch.setattr(run, "__init__", begin)
    monkeypatch.setattr(run, "log", note)
    whole, stopped, resumed = (str(tmp_path / x) for x in ("whole", "stopped", "resumed"))
    options = dict(env_id=env_id(name, kind), total_timesteps=600)
    returns = train(name, whole, **options)
    with pytest.raises(Stop):
        train(name, stopped, **options)
    path = f"{stopped}/checkpoint.pt"
    assert (train(name, resumed, resume=path, **options) == returns).all()
    start = list(states[stopped])[-1]
    assert same(states[stopped][start], states[whole][start])
    saved = learned(load(tmp_path / "stopped"))
    assert same({part: saved[part] for part in states[stopped][start]}, states[whole][start])
    later = [step for step in states[whole] if step >= start]
    assert list(states[resumed]) == later and len(later) > 2
    assert all(same(states[resumed][step], states[whole][step]) for step in later)
    assert not same(states[whole][later[0]]["policy"], states[whole][later[1]]["policy"])


@every_script
def test_a_run_without_steps_left_only_evaluates(name, tmp_path):
    train(name, tmp_path)
    path = tmp_path / "checkpoint.pt"
    before = path.read_bytes()
    for total in (500, 1):
        options = ["--total-timesteps", total, "--eval-episodes", 5]
        status, out, err = command(name, "--resume", path, *options)
        assert status == 0 and "eval_episodes=5 " in out, err
        assert path.read_bytes() == before


# Options


@every_script
def test_a_resume_takes_the_options_of_the_checkpoint(name, tmp_path):
    train(name, tmp_path, seed=7, total_timesteps=300)
    path = tmp_path / "checkpoint.pt"
    status, _, err = command(name, "--resume", path, "--total-timesteps", 600)
    assert status == 0, err
    saved = load(tmp_path)
    expected = args(name, "", seed=7, total_timesteps=600)
    assert saved["env_steps"] >= 600 and saved["args"] == dataclasses.asdict(expected)


@pytest.fixture
def rates():
    """The learning rate of each step of an optimiser from here on that moves anything."""
    found = []

    def note(optimizer, *_):
        group = optimizer.param_groups[0]
        if any(x.grad.any() for x in group["params"]):
            found.append(group["lr"])

    hook = register_optimizer_step_pre_hook(note)
    yield found
    hook.remove()


LEARNING_RATE = [name for name in SCRIPTS if "learning_rate: float" in SOURCES[name]]
ANNEALED = [name for name in SCRIPTS if "anneal_lr: bool" in SOURCES[name]]


def all_rates(name, first, step=0.0):
    """A value for each option that is a learning rate: first, first + step, ..."""
    options = [x for x in module(name).Args.__dataclass_fields__ if x.endswith("learning_rate")]
    return {option: first + i * step for i, option in enumerate(options)}


@pytest.mark.parametrize("name", LEARNING_RATE)
def test_a_learning_rate_given_on_resume_takes_effect(name, tmp_path, rates):
    """Though the state of an optimiser in the checkpoint brings the old one back."""
    train(name, tmp_path, total_timesteps=300)
    given = all_rates(name, 0.0123, 0.001)
    steady = {"anneal_lr": False} if name in ANNEALED else {}
    rates.clear()
    resume = str(tmp_path / "checkpoint.pt")
    train(name, tmp_path, resume=resume, total_timesteps=500, **given, **steady)
    assert set(rates) == set(given.values())


@pytest.mark.parametrize("name", ANNEALED)
def test_raising_the_total_stretches_the_fall_of_the_learning_rate(name, tmp_path, rates):
    given = all_rates(name, 1e-3)
    train(name, tmp_path, total_timesteps=300, **given)
    assert max(rates) > 0.8e-3 and min(rates) < 0.4e-3
    rates.clear()
    steps = load(tmp_path)["env_steps"]
    train(name, tmp_path, resume=str(tmp_path / "checkpoint.pt"), total_timesteps=600, **given)
    at_once, soon = (1e-3 * (1 - step / 600) for step in (steps, steps + 10))
    assert soon < max(rates) < at_once + 1e-9 and min(rates) < 0.2e-3


# Where and of what


@every_script
def test_a_resume_writes_beside_its_checkpoint_or_where_it_is_told(name, tmp_path, monkeypatch):
    """Also by a relative path. Nothing is logged twice."""
    monkeypatch.chdir(tmp_path)
    train(name, "runs/a", total_timesteps=300)
    train(name, "", resume="runs/a/checkpoint.pt", total_timesteps=500)
    steps = logged(tmp_path / "runs/a")["steps"]
    assert steps == sorted(set(steps)) and steps[0] <= 300 and steps[-1] >= 500
    before = (tmp_path / "runs/a/checkpoint.pt").read_bytes()
    train(name, "runs/b", resume="runs/a/checkpoint.pt", total_timesteps=700)
    assert (tmp_path / "runs/a/checkpoint.pt").read_bytes() == before
    assert load(tmp_path / "runs/b")["env_steps"] >= 700
    monkeypatch.chdir(tmp_path / "runs/b")
    train(name, "", resume="checkpoint.pt", total_timesteps=900)
    assert load(tmp_path / "runs/b")["env_steps"] >= 900
    assert not list(tmp_path.glob("runs/b/runs"))


@every_script
def test_where_a_run_was_and_on_what_is_not_saved(name, tmp_path):
    """So that Args(**checkpoint["args"]) is a run like it, here, on any machine."""
    train(name, tmp_path / "a", total_timesteps=200)
    given = args(name, tmp_path / "b", resume=str(tmp_path / "a/checkpoint.pt"))
    given.device = "cuda"
    run = module(name).Run(given, **{})
    run.save()
    run.__exit__(None, None, None)
    saved = load(tmp_path / "b")["args"]
    assert (saved["run_dir"], saved["resume"], saved["device"]) == ("", "", "cpu")
    assert given.device == "cuda"


@every_script
def test_another_environment_of_the_same_spaces_can_be_gone_on_with(name, tmp_path):
    """Its own arguments too: an agent trained on easy levels goes on with harder ones."""
    train(name, tmp_path, total_timesteps=300)
    options = dict(env_id=env_id(name, "Faulty"), env_kwargs='{"fault": "none"}')
    train(name, "", resume=str(tmp_path / "checkpoint.pt"), total_timesteps=500, **options)
    assert load(tmp_path)["args"]["env_id"] == options["env_id"]


class Evil:
    def __reduce__(self):
        return os.system, ("exit 1",)


@every_script
def test_foreign_and_damaged_checkpoints_are_refused(name, tmp_path):
    train(name, tmp_path / "run", total_timesteps=200)
    path = tmp_path / "run/checkpoint.pt"
    saved, whole = load(tmp_path / "run"), path.read_bytes()
    other = "Acrobot-v1" if env_id(name) == "Both-v0" else "Pendulum-v1"
    normaliser = [["--no-norm-obs"]] if has(name, "norm_obs") else []
    for options in (["--env-id", other], ["--hidden", 5], *normaliser):
        refused(command(name, "--resume", path, *options), path, "other options")
    torch.save({**saved, "script": "other"}, path)
    refused(command(name, "--resume", path), path, "other.py")
    for what in (whole[:1000], b"", b"nonsense", pickle.dumps(Evil())):
        path.write_bytes(what)
        assert "documentation" not in refused(command(name, "--resume", path), path, "damaged")
    torch.save(Evil(), path)
    refused(command(name, "--resume", path), path, "damaged")
    torch.save({**saved, "policy": 3}, path)
    refused(command(name, "--resume", path), path)
    refused(command(name, "--resume", tmp_path), tmp_path)
    refused(command(name, "--resume", __file__), __file__, "damaged")


@pytest.mark.parametrize(
    ("name", "other"),
    [("double_dqn", "dqn"), ("dqn", "double_dqn"), ("td3", "ddpg"), ("a3c", "a2c")],
)
def test_the_checkpoint_of_a_relative_is_refused(name, other, tmp_path):
    """Though all its parts may fit."""
    train(other, tmp_path, total_timesteps=200)
    refused(command(name, "--resume", tmp_path / "checkpoint.pt"), f"{other}.py")
