"""What a run survives, or ends with in order: kills, signals, bad numbers, errors, a full disk."""

import os
import signal
import subprocess
import sys
import threading
import time

import envs
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, command, module
from runs import (
    SHORT,
    VECTOR,
    args,
    each_plumbing,
    env_id,
    every_script,
    flags,
    load,
    logged,
    started,
    tensors,
    train,
)
from torch.utils.tensorboard import SummaryWriter

# The process ends

KILLED = """
import os, signal, sys, time
sys.path[:0] = {paths!r}
import envs, {name} as script
import torch._dynamo  # what an optimiser would import in each child
log = script.Run.log
def log_and_save(run, **scalars):
    run.next_save = 0
    log(run, **scalars)
script.Run.log = log_and_save
script.LOG_EVERY = 20
for i, moment in enumerate((0.0, 0.02, 0.05, 0.1, 0.2)):
    folder = f"{{sys.argv[1]}}/{{i}}"
    child = os.fork()
    if not child:
        os.setpgrp()
        script.train(script.Args(run_dir=folder, **{options!r}))
    deadline = time.time() + 60
    while not os.path.exists(f"{{folder}}/checkpoint.pt") and time.time() < deadline:
        time.sleep(0.002)
    time.sleep(moment)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@each_plumbing
def test_no_kill_leaves_an_unreadable_checkpoint(name, tmp_path):
    """Killed at any moment of a run that saves after every log, what is there can be resumed."""
    options = dict(env_id=env_id(name), total_timesteps=10**9, **SHORT[name])
    code = KILLED.format(paths=[str(ROOT), str(ROOT / "tests")], name=name, options=options)
    line = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(line, stderr=subprocess.PIPE, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    steps = [load(tmp_path / str(i))["env_steps"] for i in range(5)]
    assert len(set(steps)) > 1, "the kills came at different moments"
    total = steps[-1] + 300
    train(name, "", resume=str(tmp_path / "4/checkpoint.pt"), total_timesteps=total)
    assert load(tmp_path / "4")["env_steps"] >= total
    steps = logged(tmp_path / "4")["steps"]
    assert steps == sorted(set(steps)), "no stretch is logged twice"


@every_script
def test_signals_save_and_say_how_to_go_on(name, tmp_path, monkeypatch):
    """Ctrl-C, a scheduler, a closed terminal. A second one, while saving, ends it at once."""
    number = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[SCRIPTS.index(name) % 3]
    envs.Tiny.steps, step, save, second = 0, envs.Tiny.step, torch.save, []

    def step_and_signal(self, action):
        if envs.Tiny.steps == 250:
            os.kill(os.getpid(), number)
        return step(self, action)

    def note(*a):
        second.append(signal.getsignal(number))
        save(*a)

    monkeypatch.setattr(envs.Tiny, "step", step_and_signal)
    monkeypatch.setattr(torch, "save", note)
    options = ["--env-id", env_id(name), "--run-dir", tmp_path, *flags(name)]
    status, out, err = command(name, *options, "--total-timesteps", 10**6)
    assert status == 128 + number and not out and "Traceback" not in err
    assert f"--resume {tmp_path}/checkpoint.pt" in err
    assert second[-1] is signal.SIG_DFL and 100 < load(tmp_path)["env_steps"] <= 250


@pytest.mark.parametrize("name", ["sac", "a3c"])
def test_a_real_process_ends_and_leaves_none_behind(name, tmp_path):
    """Started as nohup does, a closed terminal does not end it; Ctrl-C reaches workers too."""
    options = ["--workers", 2] if name == "a3c" else []
    with started(name, tmp_path, *options, ignore=[signal.SIGHUP]) as process:
        before = load(tmp_path)["env_steps"]
        os.killpg(process.pid, signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        err = process.communicate(timeout=60)[1]
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in err
    assert load(tmp_path)["env_steps"] > before


def test_a_run_is_saved_where_nobody_reads_its_output(tmp_path):
    """Ctrl-C ends the `tee` of `2>&1 | tee log` too: what is then written to the pipe fails."""
    with started("ppo", tmp_path) as process:
        before = load(tmp_path)["env_steps"]
        time.sleep(0.5)
        process.stdout.close()
        process.stderr.close()
        process.stdout = process.stderr = None
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60)
    assert load(tmp_path)["env_steps"] > before


@each_plumbing
def test_an_endless_episode_can_be_interrupted(name, tmp_path, monkeypatch):
    """Where an update never comes, a signal still saves."""
    monkeypatch.setattr(envs.Tiny, "step", lambda *_: time.sleep(100))
    before = signal.signal(signal.SIGALRM, lambda *_: sys.exit(9))
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        with pytest.raises(SystemExit):
            train(name, tmp_path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert load(tmp_path)["env_steps"] == 0


@each_plumbing
def test_a_signal_while_the_log_is_written(name, tmp_path, monkeypatch):
    """The log's thread then misses that it is to end; it must look by itself soon, after the save."""
    notify, close, saved = threading.Condition.notify, SummaryWriter.close, []

    def interrupted(condition, n=1):
        inside = sys._getframe(3).f_code.co_name == "add_event" and condition._waiters
        if inside and (tmp_path / "checkpoint.pt").exists():
            monkeypatch.setattr(threading.Condition, "notify", notify)
            condition._waiters[0].release()  # the thread goes on, but stays in the list of waiters
            time.sleep(0.1)
            sys.exit(9)
        notify(condition, n)

    def note(writer):
        saved.append((tmp_path / "checkpoint.pt").stat().st_mtime_ns)
        close(writer)

    monkeypatch.setattr(threading.Condition, "notify", interrupted)
    monkeypatch.setattr(SummaryWriter, "close", note)
    began = time.time()
    with pytest.raises(SystemExit):
        train(name, tmp_path, total_timesteps=10**9)
    assert time.time() - began < 60
    assert saved == [(tmp_path / "checkpoint.pt").stat().st_mtime_ns]


# Numbers that are not finite


@pytest.fixture
def faulty(monkeypatch):
    """Faulty environments that fail after 300 steps from here on."""
    monkeypatch.setattr(envs.Faulty, "steps", 0)
    monkeypatch.setattr(envs.Faulty, "good", 300)


@every_script
@pytest.mark.parametrize("fault", ["reward", "infinite", "observation", "reset"])
def test_numbers_that_are_not_finite_end_a_run_and_poison_nothing(
    name, fault, tmp_path, faulty, monkeypatch
):
    """Said before they reach weights, statistics or buffer; the last checkpoint can be resumed.

    A first observation that is not a number may get as far as the buffer, not into a checkpoint.
    """
    run, left = module(name).Run, []
    leave = run.__exit__

    def look(self, *error):
        left.extend(tensors([part.state_dict() for part in self.learner.values()]))
        return leave(self, *error)

    monkeypatch.setattr(run, "__exit__", look)
    options = dict(env_id=env_id(name, "Faulty"), env_kwargs=f'{{"fault": "{fault}"}}')
    with pytest.raises(module(name).Refusal, match="not finite") as refusal:
        train(name, tmp_path, total_timesteps=10_000, **options)
    if fault != "reset":
        assert left and all(x.isfinite().all() for x in left)
        assert "an observation or a reward" in str(refusal.value)
    saved = load(tmp_path)
    assert all(x.isfinite().all() for x in tensors(saved)) and 0 < saved["env_steps"] <= 300
    envs.Faulty.good = 10**9
    path, total = str(tmp_path / "checkpoint.pt"), saved["env_steps"] + 100
    train(name, "", resume=path, total_timesteps=total, **options)


@every_script
@pytest.mark.parametrize("fault", ["reward", "observation", "reset"])
def test_numbers_that_are_not_finite_end_an_evaluation(name, fault, tmp_path, faulty, monkeypatch):
    """The run, whose steps were all good, is saved."""
    evaluate = module(name).Run.evaluate

    def later(self):
        envs.Faulty.good = -1
        return evaluate(self)

    envs.Faulty.good = 10**9
    monkeypatch.setattr(module(name).Run, "evaluate", later)
    options = dict(env_id=env_id(name, "Faulty"), env_kwargs=f'{{"fault": "{fault}"}}')
    with pytest.raises(module(name).Refusal, match="not finite"):
        train(name, tmp_path, **options)
    assert load(tmp_path)["env_steps"] >= 500


@every_script
def test_weights_that_are_not_finite_are_not_saved(name, tmp_path, monkeypatch):
    run = module(name).Run
    save = run.save

    def poisoned(self):
        next(x for x in tensors(self.learner["policy"].state_dict())).fill_(float("inf"))
        save(self)

    monkeypatch.setattr(run, "save", poisoned)
    with pytest.raises(module(name).Refusal, match="not finite"):
        train(name, tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


@each_plumbing
def test_images_are_saved_without_a_copy(name):
    """Bytes are finite, so a buffer of images is not summed: that took eight times its memory."""
    code = f"""
import resource, numpy, {name} as m
x = numpy.ones(50_000_000, numpy.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
m.check_finite("images", {{"data": [m.torch.from_numpy(x), x]}})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) < 10_000  # KiB; a copy takes 49,000


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_numbers_of_every_precision_are_checked(kind):
    ppo = module("ppo")
    for bad in (np.nan, np.inf, -np.inf):
        for x in (kind(bad), np.array([1, bad], kind), torch.tensor(np.array([1, bad], kind))):
            with pytest.raises(ppo.Refusal):
                ppo.check_finite("x", {"a": [x]})
    ppo.check_finite("x", [kind(1), np.ones(3, kind), torch.ones(3), 1.0, 2, "nan", None])


class Wide(envs.Constant):
    """Numbers of half precision, finite, whose sum is not."""

    def __init__(self, action_space):
        super().__init__()
        self.action_space = action_space
        self.observation_space = gym.spaces.Box(-1e4, 1e4, (10,), np.float16)

    def obs(self):
        return np.full(10, 9e3, np.float16)


@every_script
def test_finite_numbers_whose_sum_is_too_large_for_their_kind_pass(name, tmp_path):
    action_space = gym.make(env_id(name)).action_space
    gym.registry.pop("Wide-v0", None)
    gym.register("Wide-v0", lambda: Wide(action_space), disable_env_checker=True)
    train(name, tmp_path, env_id="Wide-v0", total_timesteps=200)


# Errors


@every_script
def test_an_environment_that_raises_keeps_its_traceback_and_the_progress(name, tmp_path, faulty):
    options = dict(env_id=env_id(name, "Faulty"), env_kwargs='{"fault": "step"}')
    with pytest.raises(OSError, match="the simulator went away") as caught:
        train(name, tmp_path, total_timesteps=10_000, **options)
    assert caught.traceback[-1].path.name == "envs.py"
    envs.Faulty.good = 10**9
    saved = load(tmp_path)["env_steps"]
    assert 150 <= saved <= 301
    path = str(tmp_path / "checkpoint.pt")
    train(name, "", resume=path, total_timesteps=saved + 100, **options)


class Licensed(envs.Both):
    """Cannot be made once the licences are gone."""

    left = True

    def __init__(self, action_space):
        self.action_space = action_space
        if not Licensed.left:
            raise ValueError("no licence left")


@every_script
def test_where_an_evaluation_cannot_begin_the_run_is_saved(name, tmp_path, monkeypatch):
    """Also if no checkpoint was due yet."""
    evaluate, kwargs = (
        module(name).Run.evaluate,
        {"action_space": gym.make(env_id(name)).action_space},
    )

    def too_late(self):
        monkeypatch.setattr(Licensed, "left", False)
        return evaluate(self)

    gym.registry.pop("Licensed-v0", None)
    gym.register("Licensed-v0", Licensed, kwargs=kwargs, disable_env_checker=True)
    monkeypatch.setattr(module(name).Run, "evaluate", too_late)
    options = dict(env_id="Licensed-v0", total_timesteps=10_000, eval_every=200)
    with pytest.raises(module(name).Refusal, match="no licence left"):
        train(name, tmp_path, checkpoint_every=0, **options)
    assert 200 <= load(tmp_path)["env_steps"] < 1_000


@every_script
@pytest.mark.parametrize("closing", [False, True])
def test_a_full_disk_is_named_and_leaves_the_last_checkpoint(name, closing, tmp_path, monkeypatch):
    """It is found full by a write, or when the file is closed."""
    train(name, tmp_path, total_timesteps=200)
    before, save = (tmp_path / "checkpoint.pt").read_bytes(), torch.save
    full, torchs = OSError(28, "No space left on device"), RuntimeError("unexpected pos 576 vs 534")

    def half(what, file):
        save(what, file)
        file.truncate(1_000)
        try:
            raise torchs if closing else full
        except (OSError, RuntimeError):
            raise full if closing else torchs  # noqa: B904  as torch does

    monkeypatch.setattr(torch, "save", half)
    resume = str(tmp_path / "checkpoint.pt")
    with pytest.raises(module(name).Refusal, match="No space left"):
        train(name, tmp_path, resume=resume, total_timesteps=400)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("name", ["ppo", "cem", "sac"])
def test_checkpoints_come_by_the_clock(name, tmp_path, monkeypatch):
    """Every --checkpoint-every seconds."""
    run, saves, now = module(name).Run, [], [0.0]
    save, log = run.save, run.log

    def timed(self):
        saves.append(now[0])
        save(self)

    def later(self, **scalars):
        now[0] += 7
        log(self, **scalars)

    monkeypatch.setattr(module(name).time, "time", lambda: now[0])
    monkeypatch.setattr(run, "log", later)
    monkeypatch.setattr(run, "save", timed)
    train(name, tmp_path, total_timesteps=1_200, checkpoint_every=20)
    gaps = np.diff(saves[:-1])  # the first log saves, then the first one beyond 20 seconds
    assert len(gaps) > 1 and set(gaps) == {21.0}
    saves.clear()
    train(name, tmp_path / "0", checkpoint_every=0)
    assert len(saves) == 1, "only at the end"


def test_saving_takes_a_tenth_of_the_time_at_most(tmp_path, monkeypatch):
    now, save, saves = [0.0], torch.save, []
    ppo = module("ppo")

    def slow(*a):
        now[0] += 30
        saves.append(now[0])
        save(*a)

    monkeypatch.setattr(ppo.time, "time", lambda: now[0])
    monkeypatch.setattr(torch, "save", slow)
    with ppo.Run(args("ppo", tmp_path, checkpoint_every=60), policy=torch.nn.Linear(1, 1)) as run:
        for _ in range(100):
            now[0] += 10
            run.log()
    assert saves[:2] == [40, 380], "the second is 10 times 30 seconds after the end of the first"


# Environments that reset in another way


class Foreign(envs.gym.vector.VectorEnv):
    """Constant as a vector environment that resets in another way."""

    single_observation_space = envs.Constant.observation_space
    single_action_space = envs.Constant.action_space

    def __init__(self, num_envs=1, **_):
        self.num_envs = num_envs


@pytest.mark.parametrize("mode", ["SAME_STEP", "DISABLED", None])
@pytest.mark.parametrize("name", VECTOR)
@pytest.mark.filterwarnings("ignore:.*autoreset.*:UserWarning")
def test_foreign_autoreset_is_refused(name, mode, tmp_path, monkeypatch):
    modes = {} if mode is None else {"autoreset_mode": envs.gym.vector.AutoresetMode[mode]}
    monkeypatch.setattr(Foreign, "metadata", modes, raising=False)
    envs.gym.registry.pop("Foreign-v0", None)
    envs.gym.register("Foreign-v0", envs.Constant, vector_entry_point=Foreign)
    with pytest.raises(module(name).Refusal, match=f"{mode}.*NEXT_STEP"):
        train(name, tmp_path, env_id="Foreign-v0")
