"""The scripts called from other code: in a sweep, a thread, a pool, with numbers of other kinds."""

import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading

import envs
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, SOURCES, command, module
from runs import SHORT, TORCHRUN, VECTOR, args, env_id, every_script, load, logged, refused, train


@every_script
def test_train_leaves_its_caller_as_it_was(name, tmp_path):
    """Environments closed, threads and signal handlers as before, also after a failure."""
    opened = []

    class Counted(getattr(envs, env_id(name, "Constant").removesuffix("-v0"))):
        def __init__(self):
            opened.append(self)
            self.good = not fails

        def step(self, action):
            if fails:
                raise OSError("the simulator went away")
            return super().step(action)

        def close(self):
            opened.remove(self)

    def as_it_was():
        return (
            opened == [] and torch.get_num_threads() == 2 and not torch.is_inference_mode_enabled()
        )

    gym.registry.pop("Counted-v0", None)
    gym.register("Counted-v0", Counted, disable_env_checker=True)
    threads, handlers = torch.get_num_threads(), [signal.getsignal(s) for s in (1, 2, 15)]
    torch.set_num_threads(2)
    fails, options = False, dict(env_id="Counted-v0", total_timesteps=200)
    try:
        train(name, tmp_path / "a", **options, eval_every=100)
        assert as_it_was()
        with pytest.raises(module(name).Refusal, match="holds a checkpoint"):
            train(name, tmp_path / "a", **options)
        assert as_it_was()
        fails = True
        with pytest.raises(OSError):
            train(name, tmp_path / "b", **options)
        assert as_it_was()
        fails = False
        train(name, tmp_path / "c", **options)
    finally:
        torch.set_num_threads(threads)
    assert handlers == [signal.getsignal(s) for s in (1, 2, 15)]


@every_script
def test_train_in_a_thread(name, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(name, tmp_path)))
    thread.start()
    thread.join()
    assert len(results[0]) == 3


def test_train_in_the_processes_of_a_pool(tmp_path):
    """Each with weights of its own seed."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        runs = [("ppo", tmp_path / str(seed), {"seed": seed}) for seed in (1, 2)]
        returns = pool.starmap(in_a_pool, runs)
    assert [len(x) for x in returns] == [3, 3]
    train("ppo", tmp_path / "here", seed=2)
    weights = [load(tmp_path / x)["policy"]["1.weight"] for x in ("1", "2", "here")]
    assert torch.equal(*weights[1:]) and not torch.equal(*weights[:2])


def in_a_pool(name, run_dir, options):
    return train(name, run_dir, **options)


FORKED = """
import multiprocessing, sys, envs, torch, {name} as script
def train(run_dir):
    script.train(script.Args(**{options}, run_dir=run_dir))
torch.set_num_threads(2)
train(sys.argv[1] + "/before")
with multiprocessing.get_context("fork").Pool(1) as pool:
    pool.map(train, [sys.argv[1] + "/forked"])
"""


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in ("ddpg", "td3", "sac")])
def test_train_in_a_forked_process_after_training(name, tmp_path):
    """A fork of a process in which torch has used several threads hangs when it uses them too.

    ddpg, td3 and sac use them by default: the README says to spawn.
    """
    options = dict(SHORT[name], env_id=env_id(name), total_timesteps=300, eval_episodes=3)
    options.pop("hidden")  # layers of the size of the defaults
    line = [sys.executable, "-c", FORKED.format(name=name, options=options), str(tmp_path)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.count("eval_return_mean=") == 2, done.stderr[-2000:]


@every_script
def test_a_subclass_of_the_options_can_add_its_own(name, tmp_path):
    """Its checkpoint holds those of the script, and is resumed by subclass and command alike."""

    @dataclasses.dataclass
    class Mine(module(name).Args):
        extra: int = 3

    assert Mine(extra=np.int64(4)).extra == 4
    for wrong in {"extra": 0.5}, {"seed": 0.5}:
        with pytest.raises(module(name).Refusal, match=f"--{next(iter(wrong))}"):
            Mine(**wrong)
    mine = Mine(**vars(args(name, tmp_path, total_timesteps=100)))
    mine.note = {1, 2}  # no option at all
    module(name).train(mine)
    assert load(tmp_path)["args"].keys() == module(name).Args.__dataclass_fields__.keys()
    path = f"{tmp_path}/checkpoint.pt"
    module(name).train(Mine(**vars(args(name, "", resume=path, total_timesteps=300))))
    status, _, err = command(name, "--resume", path, "--total-timesteps", 500)
    assert status == 0 and load(tmp_path)["env_steps"] >= 500, err


@every_script
def test_options_are_checked_where_annotations_are_text(name, tmp_path, monkeypatch):
    """Some code bases ask for this line in every file."""
    head, body = SOURCES[name].split("# ///\n\n")
    source = f"{head}# ///\n\nfrom __future__ import annotations\n\n{body}"
    (tmp_path / "copied.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "copied", raising=False)
    copied = importlib.import_module("copied")
    assert copied.Args(seed=np.int64(4)).seed == 4
    with pytest.raises(copied.Refusal, match="--seed 0.5: it must be int"):
        copied.Args(seed=0.5)


@every_script
def test_readme_says_how_to_use_a_saved_policy(name, tmp_path):
    train(name, tmp_path)
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    code = code.replace("ppo", name).replace("runs/.../checkpoint.pt", f"{tmp_path}/checkpoint.pt")
    found = {}
    exec(code, found)
    assert np.isfinite(found["reward"])


@every_script
def test_a_policy_acts_on_batches_of_any_kind_of_number(name, tmp_path):
    """float32 and float64, one row and many; deterministic, without gradient."""
    options = args(name, tmp_path, env_id=env_id(name, "Draws"))
    env = module(name).make_env(options)
    policy = module(name).make_policy(env, options)
    obs = np.random.default_rng(0).normal(size=(5, 2))
    actions = policy.act(obs)
    assert isinstance(actions, np.ndarray) and all(env.action_space.contains(a) for a in actions)
    for given in (obs.astype(np.float32), torch.from_numpy(obs).float().numpy()):
        np.testing.assert_allclose(policy.act(given), actions, atol=1e-5)
    one = [policy.act(row[None])[0] for row in obs]
    np.testing.assert_allclose(one, actions, atol=1e-5)


SEARCH = [name for name in SCRIPTS if "def make_candidates" in SOURCES[name]]
ALONE = [name for name in SCRIPTS if name not in VECTOR or name in SEARCH]


@pytest.mark.parametrize("name", ALONE)
def test_a_wrapper_in_make_env_is_there_in_training_too(name, tmp_path, monkeypatch):
    """One that leaves the observations alone: a reward of 1 becomes 1001."""
    make, wrap = module(name).make_env, gym.wrappers.TransformReward
    monkeypatch.setattr(
        module(name), "make_env", lambda *given: wrap(make(*given), lambda reward: reward + 1000)
    )
    returns = train(name, tmp_path, env_id=env_id(name, "Constant"), total_timesteps=200)
    assert returns.tolist() == [1001] * 3
    assert set(logged(tmp_path)["charts/episodic_return"]) == {1001}


@pytest.mark.parametrize("name", [name for name in VECTOR if name not in SEARCH])
def test_a_wrapper_that_adds_to_rewards_adds_nothing_to_the_next_episode(
    name, tmp_path, monkeypatch
):
    """The reset step has a reward of 0, which the wrapper raises: it is of no episode."""
    make, wrap = module(name).make_envs, gym.wrappers.vector.TransformReward
    monkeypatch.setattr(
        module(name), "make_envs", lambda *given: wrap(make(*given), lambda reward: reward + 1000)
    )
    train(name, tmp_path, env_id=env_id(name, "Truncates"), total_timesteps=300)
    assert set(logged(tmp_path)["charts/episodic_return"]) == {5 * 1001}
    if name == "ppo":
        sums = np.cumsum(1001 * 0.99 ** np.arange(5))  # discounted, of an episode's rewards so far
        assert load(tmp_path)["reward_norm"]["mean"].item() == pytest.approx(sums.mean(), rel=1e-5)


class Informs(envs.Both):
    """What one step says has another type and shape than what the next says."""

    def step(self, action):
        *outcome, _ = super().step(action)
        return *outcome, {"winner": 1 if self.t % 2 else None, "legal": np.arange(self.t)}


class InformsBox(Informs):
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)


@every_script
def test_infos_need_not_fit_together(name, tmp_path):
    for kind in Informs, InformsBox:
        gym.registry.pop(f"{kind.__name__}-v0", None)
        gym.register(f"{kind.__name__}-v0", kind)
    assert len(train(name, tmp_path, env_id=env_id(name, "Informs"))) == 3


class Counts(envs.Tiny):
    """The time is the reward, for five steps."""

    def outcome(self, action):
        return self.t, self.t == 5, False


class CountsTogether(gym.vector.VectorEnv):
    """The same as a vector environment, which returns its own arrays and changes them later."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
    single_observation_space = envs.Tiny.observation_space
    single_action_space = envs.Tiny.action_space

    def __init__(self, num_envs=1, **_):
        self.num_envs, self.t = num_envs, 0
        self.observation_space = gym.vector.utils.batch_space(
            self.single_observation_space, num_envs
        )
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.obs, self.rewards = np.zeros((num_envs, 2), np.float32), np.zeros(num_envs)
        self.terminated, self.truncated = np.zeros((2, num_envs), bool)

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return self.obs, {}

    def step(self, actions):
        self.t = (self.t + 1) % 6
        self.rewards[:], self.terminated[:] = self.t, self.t == 5
        return self.obs, self.rewards, self.terminated, self.truncated, {}


@pytest.mark.parametrize("name", VECTOR)
def test_a_vector_environment_may_overwrite_what_it_returned(name, tmp_path):
    gym.registry.pop("Counts-v0", None)
    gym.register("Counts-v0", Counts, vector_entry_point=CountsTogether)
    assert train(name, tmp_path, env_id="Counts-v0").tolist() == [15] * 3
    assert set(logged(tmp_path)["charts/episodic_return"]) == {15}


@pytest.mark.parametrize("name", SEARCH)
def test_only_the_environment_that_is_recorded_is_drawn(name):
    """The candidates' are not: of many environments each would hold a renderer."""
    options = module(name).Args(env_id="Acrobot-v1", capture_video=True)
    with module(name).make_env(options) as env, contextlib.ExitStack() as stack:
        assert env.render_mode == "rgb_array"
        for candidate in module(name).make_candidates(stack, env, options, 2):
            assert candidate.render_mode is None


@every_script
def test_what_a_video_needs_is_named_before_training(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "moviepy", None)
    options = ["--env-id", "Pendulum-v1" if name in ("ddpg", "td3", "sac") else "Acrobot-v1"]
    refused(command(name, *options, "--capture-video", "--run-dir", tmp_path / "new"), "moviepy")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SEARCH)
@pytest.mark.parametrize("kwargs, native", [("{}", True), ('{"sutton_barto_reward": true}', False)])
def test_arguments_that_gymnasiums_own_version_may_read_otherwise(name, kwargs, native):
    """Candidates are then a list, in which an ended episode takes no further step."""
    options = module(name).Args(env_id="CartPole-v1", env_kwargs=kwargs)
    with module(name).make_env(options) as env, contextlib.ExitStack() as stack:
        envs = module(name).make_candidates(stack, env, options, 2)
        assert isinstance(envs, gym.vector.VectorEnv) == native


# Options


@every_script
def test_numbers_of_other_kinds(name, tmp_path):
    """numpy's become plain ones, an int where a float stands is one; the checkpoint loads."""
    floats = [key for key, kind in module(name).Args.__annotations__.items() if kind is float]
    fields = module(name).Args.__dataclass_fields__
    whole = {key: int(fields[key].default) for key in floats if fields[key].default % 1 == 0}
    others = {key: np.float64(fields[key].default) for key in floats if key not in whole}
    given = args(name, tmp_path, **whole, **others, seed=np.int64(3), hidden=np.int32(8))
    assert all(type(getattr(given, key)) is float for key in floats) and floats
    assert type(given.seed) is int and type(given.hidden) is int
    module(name).train(given)
    saved = load(tmp_path)["args"]
    assert saved["hidden"] == 8 and all(saved[key] == fields[key].default for key in floats)

    for key, value in others.items():  # set afterwards
        setattr(given, key, value)
    given.run_dir, given.seed = str(tmp_path / "later"), np.int64(3)
    module(name).train(given)
    assert load(tmp_path / "later")["args"] == saved


@every_script
def test_options_of_the_wrong_type_are_refused(name, tmp_path):
    """Given to Args, and out of a checkpoint."""
    train(name, tmp_path, total_timesteps=100)
    saved = load(tmp_path)
    wrong = dict(
        seed="1", hidden=2.5, eval_every=None, capture_video="yes", env_kwargs={}, device=0
    )
    for option, value in wrong.items():
        flag = option.replace("_", "-")
        with pytest.raises(module(name).Refusal, match=flag):
            args(name, tmp_path, **{option: value})
        if option != "device":  # that of a checkpoint is not taken over
            changed = {**saved, "args": {**saved["args"], option: value}}
            torch.save(changed, tmp_path / "changed.pt")
            refused(command(name, "--resume", tmp_path / "changed.pt"), flag)
    with pytest.raises(module(name).Refusal, match="device"):
        args(name, tmp_path, device="tpu")


# Variables of torchrun


def test_torchrun_is_refused_where_it_is_not_supported(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    for name in set(SCRIPTS) - set(TORCHRUN):
        with pytest.raises(module(name).Refusal, match="torchrun"):
            args(name, tmp_path)


@pytest.mark.parametrize("name", TORCHRUN)
def test_variables_of_torchrun_without_torchrun_do_nothing(name, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    train(name, tmp_path, total_timesteps=100)
    assert (tmp_path / "checkpoint.pt").exists()
