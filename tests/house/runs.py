"""Short runs of every script, and what the tests of this folder look at afterwards."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
from conftest import ROOT, SCRIPTS, SOURCES, module
from gymnasium import spaces
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Options that make a run short, with every normaliser and optimiser switched on. A rollout of 30
# steps is five episodes of five steps and their reset steps.
SHORT = {
    "reinforce": dict(num_envs=4, hidden=16, value_steps=2, value_batch=16),
    "a2c": dict(num_envs=4, num_steps=30, hidden=16),
    "a3c": dict(workers=1, hidden=16),
    "cem": dict(candidates=4, hidden=8, layers=1),
    "cmaes": dict(candidates=4, hidden=8, layers=1),
    "nes": dict(candidates=4, hidden=8, norm_obs=True),
    "dqn": dict(burn_in=50, batch_size=16, hidden=16, utd=0.2, n_step=3),
    "double_dqn": dict(burn_in=50, batch_size=16, hidden=16, utd=0.2, n_step=3),
    "awr": dict(num_envs=4, num_steps=30, critic_steps=4, actor_steps=8, hidden=16),
    "ppo": dict(num_envs=4, num_steps=30, epochs=2, minibatches=4, hidden=16),
    "ddpg": dict(burn_in=50, batch_size=16, hidden=16, utd=0.2),
    "td3": dict(burn_in=50, batch_size=16, hidden=16, utd=0.2),
    "sac": dict(burn_in=50, batch_size=16, hidden=16, utd=0.2),
}
TORCHRUN = [name for name in SCRIPTS if "def start_processes" in SOURCES[name]]
VECTOR = [name for name in SCRIPTS if "def make_envs" in SOURCES[name]]

every_script = pytest.mark.parametrize("name", SCRIPTS)
# One of each kind of plumbing, for what costs a process and is the same text in the others: with
# torchrun, with vector environments, with one environment, with processes of its own.
each_plumbing = pytest.mark.parametrize("name", ["ppo", "cem", "sac", "a3c"])


def env_id(name, kind="Both"):
    """The tiny environment of this kind whose actions the script can take."""
    discrete = spaces.Discrete in module(name).ACTION_SPACES
    return f"{kind}-v0" if discrete else f"{kind}Box-v0"


def args(name, run_dir, **options):
    defaults = dict(env_id=env_id(name), total_timesteps=500, eval_episodes=3)
    defaults |= SHORT[name] | {"run_dir": str(run_dir)}
    return module(name).Args(**{**defaults, **options})


def train(name, run_dir, **options):
    """Returns of the final evaluation of a short run, which logs every 100 steps at the latest."""
    with mock.patch.object(module(name), "LOG_EVERY", 100, create=True):
        return module(name).train(args(name, run_dir, **options))


def has(name, option):
    return option in module(name).Args.__dataclass_fields__


def flags(name):
    """SHORT as command-line options."""
    given = [(f"--{key.replace('_', '-')}", value) for key, value in SHORT[name].items()]
    return [x for key, value in given for x in ([key] if value is True else [key, value])]


def load(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def learned(checkpoint):
    return {name: part for name, part in checkpoint.items() if name != "args"}


def tensors(x):
    """All tensors in nested dictionaries and lists."""
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
    return [x] if isinstance(x, torch.Tensor) else [t for part in parts for t in tensors(part)]


def same(a, b):
    """Equality of nested dictionaries, lists and tensors, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def refused(result, *words):
    """What the script itself refused: status 2, and one line at the end, with these words."""
    status, _, err = result
    last = err.strip().splitlines()[-1]
    assert status == 2 and "Traceback" not in err and re.match(r"\w+\.py: ", last), err
    assert all(str(word) in last for word in words), last
    return last


def logged(run_dir):
    """What a run logged: name -> values; and the steps at which it did, as "steps"."""
    log = EventAccumulator(str(run_dir)).Reload()
    found = {tag: [event.value for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
    return found | {"steps": [event.step for event in log.Scalars("charts/SPS")]}


@contextlib.contextmanager
def started(name, run_dir, *options, ignore=()):
    """The command in a session of its own, which has written a checkpoint; killed at the end."""

    def signals():
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN if number in ignore else signal.SIG_DFL)

    line = [sys.executable, ROOT / f"{name}.py", "--env-id", module(name).Args().env_id]
    line += ["--total-timesteps", 10**9, "--run-dir", run_dir, *flags(name), *options]
    process = subprocess.Popen(
        [str(x) for x in line],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=signals,
    )
    try:
        deadline = time.time() + 120
        while not (run_dir / "checkpoint.pt").exists():
            assert process.poll() is None, process.stderr.read()
            assert time.time() < deadline
            time.sleep(0.05)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
