"""What the scripts before the plain pattern must survive: kills, resumes, odd spaces, bad input.

The plain scripts: test_runs.py.
"""

import dataclasses
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch._dynamo  # noqa: F401  what Adam imports late; forked runs need not do it again
from conftest import OLD, ROOT, command, module
from gymnasium import spaces
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Options that make a run of each script short.
SHORT = {
    "cem": dict(candidates=4, hidden=8),
    "cmaes": dict(candidates=4, layers=1, hidden=8),
    "nes": dict(candidates=4, hidden=8),
    "reinforce": dict(num_envs=4, hidden=16, value_steps=2, value_batch=16),
    "a2c": dict(num_envs=4, num_steps=5, hidden=16),
    "a3c": dict(workers=1, hidden=16),
    "awr": dict(
        num_envs=4, num_steps=32, buffer_size=512, critic_steps=4, actor_steps=8, hidden=16
    ),
    "ddpg": dict(burn_in=50, batch_size=16, hidden=16, utd=0.1),
    "td3": dict(burn_in=50, batch_size=16, hidden=16, utd=0.1),
}

every_script = pytest.mark.parametrize("name", OLD)


def env_id(name):
    """An environment that ends both ways, with actions that the script can take."""
    discrete = spaces.Discrete in module(name).ACTION_SPACES
    return "Both-v0" if discrete else "BothBox-v0"


def args(name, run_dir, **options):
    defaults = dict(
        env_id=env_id(name), total_timesteps=1_000, eval_episodes=3, run_dir=str(run_dir)
    )
    return module(name).Args(**{**defaults, **SHORT[name], **options})


def load(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Equality of nested dictionaries, lists and tensors, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def flags(name):
    """SHORT as command-line options."""
    return [x for k, v in SHORT[name].items() for x in (f"--{k.replace('_', '-')}", v)]


# Same seed, same weights


@every_script
def test_one_seed_one_result(name, tmp_path):
    runs = []
    for seed, folder in ((1, "a"), (1, "b"), (2, "c")):
        returns = module(name).train(args(name, tmp_path / folder, seed=seed))
        checkpoint = load(tmp_path / folder)
        del checkpoint["args"]
        runs.append((checkpoint, returns.tolist()))
    assert same(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]
    assert not same(runs[0][0], runs[2][0])


@every_script
def test_evaluating_on_the_way_changes_nothing(name, tmp_path):
    module(name).train(args(name, tmp_path / "a"))
    module(name).train(args(name, tmp_path / "b", eval_every=200, checkpoint_every=100))
    a, b = load(tmp_path / "a"), load(tmp_path / "b")
    del a["args"], b["args"]
    assert same(a, b)
    log = EventAccumulator(str(tmp_path / "b")).Reload()
    assert len(log.Scalars("charts/eval_return")) >= 4


# Checkpoints


def kill_after(name, run_dir, seconds):
    """Start a run in a process of its own and kill it."""
    options = args(name, run_dir, total_timesteps=10**9, checkpoint_every=1)
    process = multiprocessing.get_context("fork").Process(
        target=module(name).train, args=(options,)
    )
    process.start()
    deadline = time.time() + 60
    while (
        not (run_dir / "checkpoint.pt").exists() and time.time() < deadline and process.is_alive()
    ):
        time.sleep(0.005)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@every_script
def test_no_kill_leaves_an_unreadable_checkpoint(name, tmp_path):
    moments = np.random.default_rng(0).uniform(0, 0.3, 20)
    steps = set()
    for i, moment in enumerate(moments):
        kill_after(name, tmp_path / str(i), moment)
        checkpoint = load(tmp_path / str(i))
        steps.add(checkpoint["env_steps"])
    assert len(steps) > 2, "the kills came at different moments"


@every_script
def test_resume_after_a_kill(name, tmp_path, capsys):
    kill_after(name, tmp_path, 0.1)
    time.sleep(1)  # event files are ordered by the second
    killed = load(tmp_path)["env_steps"]
    total, path = killed + 500, str(tmp_path / "checkpoint.pt")
    returns = module(name).train(args(name, "", resume=path, total_timesteps=total))
    assert len(returns) == 3 and np.isfinite(returns).all()
    steps = int(re.search(r"env_steps=(\d+)", capsys.readouterr().out)[1])
    assert total <= steps == load(tmp_path)["env_steps"] < total + 4 * 32
    log = EventAccumulator(str(tmp_path)).Reload()
    logged = [event.step for event in log.Scalars("charts/SPS")]
    assert logged == sorted(set(logged)), "no stretch is logged twice"
    assert min(logged) <= killed < max(logged)


@every_script
def test_save_load_save_is_byte_equal(name, tmp_path):
    train = module(name).train
    train(args(name, tmp_path))
    first = (tmp_path / "checkpoint.pt").read_bytes()
    seen = []
    save, finish = module(name).Run.save, module(name).Run.finish

    def finish_after_saving(run):
        save(run)
        seen.append((tmp_path / "checkpoint.pt").read_bytes())
        return finish(run)

    module(name).Run.finish = finish_after_saving
    try:
        train(args(name, tmp_path, resume=str(tmp_path / "checkpoint.pt")))
    finally:
        module(name).Run.finish = finish
    assert seen == [first]


@every_script
def test_resume_without_steps_left_only_evaluates(name, tmp_path):
    module(name).train(args(name, tmp_path / "run"))
    path = tmp_path / "run/checkpoint.pt"
    before = path.read_bytes()
    status, out, err = command(name, "--resume", path, "--eval-episodes", 5)
    assert status == 0 and "eval_episodes=5 " in out, err
    assert path.read_bytes() == before


@every_script
def test_resume_takes_the_options_of_the_checkpoint(name, tmp_path):
    module(name).train(args(name, tmp_path, seed=7, total_timesteps=400))
    path = tmp_path / "checkpoint.pt"
    status, out, err = command(name, "--resume", path, "--total-timesteps", 800)
    assert status == 0, err
    saved = load(tmp_path)
    assert saved["env_steps"] >= 800 and saved["args"]["total_timesteps"] == 800
    assert saved["args"]["seed"] == 7 and saved["args"]["env_id"] == env_id(name)
    expected = dataclasses.asdict(args(name, "", seed=7, total_timesteps=800))
    assert saved["args"] == expected


@every_script
def test_control_c_saves_and_says_how_to_go_on(name, tmp_path):
    first_task = module(name).Args().env_id
    options = ["--env-id", first_task, "--total-timesteps", 10**9, "--run-dir", tmp_path]
    process = subprocess.Popen(
        [sys.executable, ROOT / f"{name}.py", *map(str, options + flags(name))],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.time() + 120
        while not list(tmp_path.glob("events*")):
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130 and "--resume" in err and len(err.splitlines()) == 1
    assert load(tmp_path)["env_steps"] > 0


@every_script
def test_not_a_number_stops_the_run_and_keeps_the_checkpoint(name, tmp_path):
    NaN.steps, NaN.action_space = 0, gym.make(env_id(name)).action_space
    gym.register("NaN-v0", NaN, disable_env_checker=True)
    status, _, err = command(
        name, "--env-id", "NaN-v0", "--run-dir", tmp_path, "--checkpoint-every", 1, *flags(name)
    )
    assert status == 1 and re.search(r"not finite at step \d+", err) and len(err.splitlines()) == 1
    weights = [x for x in load(tmp_path).values() if isinstance(x, dict)]
    for tensors in weights:
        assert all(x.isfinite().all() for x in tensors.values() if isinstance(x, torch.Tensor))


class NaN(gym.Env):
    """Its rewards turn into not-a-number after a while."""

    observation_space = spaces.Box(-1, 1, (2,))
    steps = 0

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        NaN.steps += 1
        return np.zeros(2, np.float32), 1.0 if NaN.steps < 600 else np.nan, True, False, {}


# Spaces

OBSERVATIONS = [
    spaces.Box(-1, 1, (3,)),
    spaces.Box(-5, 5, (2, 3), np.float64),
    spaces.Discrete(5, start=2),
    spaces.MultiDiscrete([3, 4]),
    spaces.MultiBinary(3),
    spaces.Tuple([spaces.Discrete(3), spaces.Box(0, 1, (2,))]),
    spaces.Dict(a=spaces.Discrete(3), b=spaces.Dict(c=spaces.MultiBinary(2))),
]
ACTIONS = [
    spaces.Discrete(3, start=-1),
    spaces.Box(np.array([-1.0, 0.0, -np.inf]), np.array([1.0, 10.0, np.inf]), dtype=np.float64),
    spaces.Box(-2, 2, (2, 2)),
]
FINITE = "ddpg", "td3"  # scripts that scale actions by their bounds, so need some


@every_script
def test_spaces(name, tmp_path):
    supported = [space for space in ACTIONS if isinstance(space, module(name).ACTION_SPACES)]
    if name in FINITE:
        supported = [space for space in supported if np.isfinite(space.high).all()]
    cases = [(obs, supported[0]) for obs in OBSERVATIONS]
    cases += [(OBSERVATIONS[0], action) for action in supported[1:]]
    for obs, action in cases:
        gym.registry["Spaces-v0"].kwargs = {"observation_space": obs, "action_space": action}
        returns = module(name).train(args(name, tmp_path, env_id="Spaces-v0", total_timesteps=300))
        assert (returns == 0).all()


@every_script
@pytest.mark.parametrize(
    ("obs", "action"),
    [
        (spaces.Box(-1, 1, (3,)), spaces.MultiDiscrete([2, 2])),
        (spaces.Box(0, 255, (8, 8, 3), np.uint8), spaces.Discrete(2)),
        (spaces.Sequence(spaces.Discrete(2)), spaces.Discrete(2)),
    ],
    ids=["MultiDiscrete", "image", "Sequence"],
)
def test_unsupported_spaces(name, tmp_path, obs, action):
    gym.registry["Spaces-v0"].kwargs = {"observation_space": obs, "action_space": action}
    status, _, err = command(name, "--env-id", "Spaces-v0", "--run-dir", tmp_path)
    assert status == 2 and len(err.splitlines()) == 1
    wrong = action if isinstance(action, spaces.MultiDiscrete) else obs
    assert err.startswith(f"{name}.py: ") and str(wrong) in err


# Bad input


@every_script
@pytest.mark.parametrize(
    "options",
    [
        ["--env-id", "NoSuchThing-v0"],
        ["--env-id", "no_such_module:Thing-v0"],
        ["--total-timesteps", "0"],
        ["--total-timesteps", "-5"],
        ["--seed", "-1"],
        ["--eval-episodes", "0"],
        ["--eval-every", "-1"],
        ["--device", "cuda"],
        ["--run-dir", "/dev/null/here"],
        ["--resume", "/no/such/file.pt"],
        ["--resume", __file__],
    ],
    ids=" ".join,
)
def test_bad_input_gets_one_line(name, options):
    if options[0] == "--device" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    status, out, err = command(name, *options)
    assert status == 2 and not out
    assert err.startswith(f"{name}.py: ") and len(err.splitlines()) == 1
    assert re.split("[:-]", options[1].lstrip("-"))[0] in err


@every_script
def test_words_and_unknown_options_are_refused(name):
    for options in (["--seed", "one"], ["--no-such-option", "1"]):
        status, _, err = command(name, *options)
        assert status == 2 and options[0] in err


@every_script
def test_foreign_checkpoints(name, tmp_path):
    module(name).train(args(name, tmp_path))
    path = tmp_path / "checkpoint.pt"
    other = "Acrobot-v1" if env_id(name) == "Both-v0" else "Pendulum-v1"
    status, _, err = command(name, "--resume", path, "--env-id", other)
    assert status == 2 and "size mismatch" in err and len(err.splitlines()) == 1
    if "hidden" in SHORT[name]:
        status, _, err = command(name, "--resume", path, "--hidden", 5)
        assert status == 2 and "resume" in err and len(err.splitlines()) == 1
    torch.save({**load(tmp_path), "script": "other"}, path)
    status, _, err = command(name, "--resume", path)
    assert status == 2 and "other.py" in err and len(err.splitlines()) == 1
    path.write_bytes(path.read_bytes()[:1000])
    status, _, err = command(name, "--resume", path)
    assert status == 2 and str(path) in err and len(err.splitlines()) == 1


@every_script
def test_a_failure_while_writing_keeps_the_last_checkpoint(name, tmp_path, monkeypatch):
    module(name).train(args(name, tmp_path, total_timesteps=400))
    before, save = (tmp_path / "checkpoint.pt").read_bytes(), torch.save

    def half(what, path):
        save(what, path)
        os.truncate(path, os.path.getsize(path) // 2)
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        resume = str(tmp_path / "checkpoint.pt")
        module(name).train(args(name, tmp_path, resume=resume, total_timesteps=800))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


# Two processes

TOGETHER = {
    "reinforce": "--num-envs 32 --hidden 32 --value-steps 4 --norm-obs --standardize",
    "a2c": "--num-envs 16 --num-steps 8 --hidden 32 --learning-rate 5e-3",
}
TWO = """
import os, sys, torch, tyro, {name} as script
finish = script.Run.finish
def tell(run):
    state = {{name: module.state_dict() for name, module in run.modules.items()}}
    torch.save({{"step": run.step, **state}}, f"{{os.environ['OUT']}}/rank{{run.rank}}.pt")
    return finish(run)
script.Run.finish = tell
script.train(tyro.cli(script.Args))
"""


@pytest.mark.parametrize("name", [name for name in TOGETHER])
def test_torchrun(name, tmp_path):
    """Both ranks draw different data: only all averages together keep their states the same."""
    (tmp_path / "two.py").write_text(TWO.format(name=name))
    options = (
        f"--env-id Matched-v0 --total-timesteps 8000 --run-dir {tmp_path}/run {TOGETHER[name]}"
    )
    options = options.replace("Matched", "envs:Matched")
    path = f"{ROOT}:{ROOT / 'tests'}"
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [str(tmp_path / "two.py"), *options.split()],
        env={**os.environ, "OUT": str(tmp_path), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert re.fullmatch("eval_return_mean=1.00 .*\n", run.stdout), run.stdout + run.stderr
    assert len(list((tmp_path / "run").glob("events*"))) == 1
    assert load(tmp_path / "run")["env_steps"] >= 8_000
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert same(*ranks), "the same weights, optimiser state and statistics"
