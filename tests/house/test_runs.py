"""What a run of every plain script must survive: kills, resumes, odd spaces, bad input, not-a-number.

And what a caller of `train` may expect. The scripts before that pattern: test_robustness.py.
"""

import copy
import dataclasses
import os
import pickle
import re
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
from conftest import NEW, ROOT, command, module
from gymnasium import spaces
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Options that make a run of each script short, with every normaliser and optimiser switched on.
SHORT = {
    "ppo": dict(num_envs=4, num_steps=32, epochs=2, hidden=16, norm_obs=True, norm_rewards=True),
    "dqn": dict(burn_in=50, batch_size=16, hidden=16, utd=0.2, n_step=3),
    "double_dqn": dict(burn_in=50, batch_size=16, hidden=16, utd=0.2, n_step=3),
    "sac": dict(burn_in=50, batch_size=16, hidden=16, utd=0.2),
}
every_script = pytest.mark.parametrize("name", NEW)


def env_id(name, kind="Both"):
    """An environment of this kind whose actions the script can take."""
    return f"{kind}{'Box' if name == 'sac' else ''}-v0"


def args(name, run_dir, **options):
    defaults = dict(env_id=env_id(name), total_timesteps=1_000, eval_episodes=3)
    defaults |= SHORT[name] | {"run_dir": str(run_dir)}
    return module(name).Args(**{**defaults, **options})


def load(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Equality of nested dictionaries, lists and tensors, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def learned(checkpoint):
    return {name: part for name, part in checkpoint.items() if name != "args"}


def refused(status, err, *words):
    """Refused by the script itself: status 2, and its one line at the end, with these words."""
    last = err.strip().splitlines()[-1]
    assert status == 2 and "Traceback" not in err and re.match(r"\w+\.py: ", last), err
    assert all(str(word) in last for word in words), last
    return last


def flags(name):
    """SHORT as command-line options."""
    given = SHORT[name].items()
    return [x for k, v in given for x in ([f"--{k}"] if v is True else [f"--{k}", v])]


# Same seed, same weights


@every_script
def test_one_seed_one_result(name, tmp_path):
    """Also where the environment draws from numpy's and Python's global generators."""
    runs = []
    for seed, folder in ((1, "a"), (1, "b"), (2, "c")):
        options = args(name, tmp_path / folder, seed=seed, env_id=env_id(name, "Draws"))
        returns = module(name).train(options)
        runs.append((learned(load(tmp_path / folder)), returns.tolist()))
    assert same(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]
    assert not same(runs[0][0], runs[2][0])


@every_script
def test_evaluating_and_saving_on_the_way_change_nothing(name, tmp_path, monkeypatch):
    module(name).train(args(name, tmp_path / "a", env_id=env_id(name, "Draws")))
    run = module(name).Run
    log = run.log

    def log_and_save(self, **scalars):
        self.next_save = 0
        log(self, **scalars)

    monkeypatch.setattr(run, "log", log_and_save)
    options = args(name, tmp_path / "b", env_id=env_id(name, "Draws"), eval_every=200)
    module(name).train(options)
    assert same(learned(load(tmp_path / "a")), learned(load(tmp_path / "b")))
    events = EventAccumulator(str(tmp_path / "b")).Reload()
    assert len(events.Scalars("charts/eval_return")) >= 4


@every_script
def test_agent_and_environment_draw_apart(name, tmp_path, monkeypatch):
    """The agent's generator is on no stream of an environment's, at whatever position of it."""

    def stream(generator):
        return generator.bit_generator.state["state"]["inc"]  # of PCG64, as the key decides it

    cls, agent = module(name).Run, set()
    seed = cls.seed
    monkeypatch.setattr(cls, "seed", lambda self: seed(self) or agent.add(stream(self.rng)))
    envs.Draws.seeds.clear()
    module(name).train(args(name, tmp_path, env_id=env_id(name, "Draws")))
    seeds = [s for s in envs.Draws.seeds if s is not None]
    keyed = {stream(np.random.default_rng(np.random.SeedSequence(s))) for s in seeds}
    assert len(agent) > 3 and keyed and not agent & keyed


@every_script
def test_evaluation_is_on_seeds_that_training_never_sees(name, tmp_path):
    used = {}
    for seed in (1, 2):
        envs.Draws.seeds.clear()
        options = args(name, tmp_path / str(seed), env_id=env_id(name, "Draws"), seed=seed)
        module(name).train(options)
        used[seed] = [s for s in envs.Draws.seeds if s is not None]
        training, evaluation = used[seed][:-3], used[seed][-3:]
        assert training and max(training) < 2**29 <= 2**30 <= min(evaluation)
    assert not set(used[1]) & set(used[2])


# Checkpoints


@every_script
def test_a_resume_restores_everything_that_learns(name, tmp_path, monkeypatch):
    """Tensor by tensor; and one update after it is that of the run that went on, bit for bit.

    Every episode is alike, and none is under way where the checkpoint is written, so that the run
    that begins new ones sees the same data.
    """
    cls = module(name).Run
    log, states = cls.log, {}

    def spy(self, **scalars):
        log(self, **scalars)
        state = {part: copy.deepcopy(x.state_dict()) for part, x in self.learner.items()}
        states.setdefault(self.dir, {})[self.step] = state

    monkeypatch.setattr(cls, "log", spy)
    one = 200  # steps between logs
    options = dict(env_id="Terminates-v0", anneal_lr=False)
    if name == "ppo":  # 30 steps are five episodes of five and their reset steps
        one, options = 4 * 25, {**options, "num_steps": 30}
    if name == "sac":
        options = dict(env_id="TerminatesBox-v0")
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    module(name).train(args(name, a, total_timesteps=4 * one, **options))
    module(name).train(args(name, b, total_timesteps=2 * one, **options))
    assert same(states[a][2 * one], states[b][2 * one])
    path = tmp_path / "b/checkpoint.pt"
    saved = learned(load(tmp_path / "b"))
    assert same({k: saved[k] for k in states[b][2 * one]}, states[b][2 * one])
    c = str(tmp_path / "c")
    module(name).train(args(name, c, total_timesteps=3 * one, resume=str(path), **options))
    assert same(states[a][3 * one], states[c][3 * one])
    assert not same(states[a][2 * one]["policy"], states[c][3 * one]["policy"])
    optimizers = [x for x in states[a][2 * one].values() if "param_groups" in x]
    assert len(optimizers) == (3 if name == "sac" else 1) and all(x["state"] for x in optimizers)


@every_script
def test_save_load_save_is_byte_equal(name, tmp_path):
    """And a run without steps left only evaluates."""
    module(name).train(args(name, tmp_path / "run"))
    path = tmp_path / "run/checkpoint.pt"
    before = path.read_bytes()
    options = args(name, tmp_path / "run", resume=str(path))
    with module(name).Run(options) as run:
        assert run.step == load(tmp_path / "run")["env_steps"]
    status, out, err = command(name, "--resume", path, "--eval-episodes", 5)
    assert status == 0 and "eval_episodes=5 " in out, err
    assert path.read_bytes() == before


@every_script
def test_resume_takes_the_options_of_the_checkpoint(name, tmp_path):
    module(name).train(args(name, tmp_path, seed=7, total_timesteps=400))
    path = tmp_path / "checkpoint.pt"
    status, _, err = command(name, "--resume", path, "--total-timesteps", 800)
    assert status == 0, err
    saved = load(tmp_path)
    expected = args(name, "", seed=7, total_timesteps=800, resume=str(path))
    assert saved["env_steps"] >= 800 and saved["args"] == dataclasses.asdict(expected)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [(name, "learning_rate", 0.0123) for name in NEW],
)
def test_options_given_on_resume_take_effect(name, option, value, tmp_path, monkeypatch):
    module(name).train(args(name, tmp_path, total_timesteps=400))
    rates, step = [], torch.optim.Adam.step
    spy = lambda self, *a: rates.append(self.param_groups[0]["lr"]) or step(self, *a)  # noqa: E731
    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    options = {option: value} | ({} if name == "sac" else {"anneal_lr": False})
    resume = str(tmp_path / "checkpoint.pt")
    module(name).train(args(name, tmp_path, resume=resume, total_timesteps=600, **options))
    assert set(rates) == {value}


def test_another_temperature_on_resume_takes_effect(tmp_path):
    import sac

    sac.train(args("sac", tmp_path / "a", total_timesteps=400))
    path = str(tmp_path / "a/checkpoint.pt")
    sac.train(args("sac", tmp_path / "b", total_timesteps=600, resume=path, alpha=0.01))
    log = EventAccumulator(str(tmp_path / "b")).Reload().Scalars("losses/alpha")
    assert [event.value for event in log] == pytest.approx([0.01] * len(log))
    fixed = str(tmp_path / "b/checkpoint.pt")
    sac.train(args("sac", tmp_path / "c", total_timesteps=800, resume=fixed, alpha=None))
    log = EventAccumulator(str(tmp_path / "c")).Reload().Scalars("losses/alpha")
    assert log[-1].value != pytest.approx(0.01), "tuned again"


def test_raising_the_total_stretches_the_learning_rate_decay(tmp_path, monkeypatch):
    options = dict(learning_rate=1e-3, num_envs=2, num_steps=50, env_id="Truncates-v0")
    used, step = [], torch.optim.Adam.step
    spy = lambda self, *a: used.append(self.param_groups[0]["lr"]) or step(self, *a)  # noqa: E731
    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    for total in (300, 600):
        resume = str(tmp_path / "checkpoint.pt") if total == 600 else ""
        module("ppo").train(args("ppo", tmp_path, **options, total_timesteps=total, resume=resume))
        log = EventAccumulator(str(tmp_path)).Reload().Scalars("losses/last_kl")
        assert used[-1] == pytest.approx(1e-3 * (1 - log[-2].step / total))


@every_script
def test_no_kill_leaves_an_unreadable_checkpoint(name, tmp_path):
    """Killed at any moment of a run that saves after every log, what is there can be resumed."""
    code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import envs, {name} as script
log = script.Run.log
def log_and_save(run, **scalars):
    run.next_save = 0
    log(run, **scalars)
script.Run.log = log_and_save
script.train(script.Args(**eval(sys.argv[1])))
"""
    steps = set()
    for i, moment in enumerate((0.0, 0.05, 0.1, 0.2)):
        options = dataclasses.asdict(args(name, tmp_path / str(i), total_timesteps=10**9))
        process = subprocess.Popen(
            [sys.executable, "-c", code, repr(options)], stderr=subprocess.DEVNULL
        )
        deadline = time.time() + 60
        while not (tmp_path / str(i) / "checkpoint.pt").exists() and time.time() < deadline:
            time.sleep(0.005)
        time.sleep(moment)
        process.kill()
        process.wait()
        steps.add(load(tmp_path / str(i))["env_steps"])
    assert len(steps) > 1, "the kills came at different moments"
    total = load(tmp_path / "3")["env_steps"] + 300
    path = str(tmp_path / "3/checkpoint.pt")
    module(name).train(args(name, "", resume=path, total_timesteps=total))
    assert load(tmp_path / "3")["env_steps"] >= total
    logged = [e.step for e in EventAccumulator(str(tmp_path / "3")).Reload().Scalars("charts/SPS")]
    assert logged == sorted(set(logged)), "no stretch is logged twice"


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("ppo", signal.SIGINT),
        ("dqn", signal.SIGTERM),
        ("double_dqn", signal.SIGHUP),
        ("sac", signal.SIGINT),
    ],
)
def test_signals_save_and_say_how_to_go_on(name, number, tmp_path):
    line = [sys.executable, ROOT / f"{name}.py", "--total-timesteps", 10**9, "--run-dir", tmp_path]
    process = subprocess.Popen(
        [str(x) for x in line + flags(name)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: [signal.signal(s, signal.SIG_DFL) for s in (1, 2, 15)],
    )
    try:
        deadline = time.time() + 120
        while not (tmp_path / "checkpoint.pt").exists():
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.05)
        before = load(tmp_path)["env_steps"]
        time.sleep(1)
        process.send_signal(number)
        err = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + number and "Traceback" not in err
    assert f"--resume {tmp_path}/checkpoint.pt" in err.splitlines()[-1]
    assert load(tmp_path)["env_steps"] > before


def test_an_endless_episode_can_be_interrupted(tmp_path):
    """Where an update never comes, the signal still saves."""
    code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import envs, dqn, signal, time
envs.Tiny.step = lambda self, action: time.sleep(100)
signal.signal(signal.SIGALRM, lambda *_: sys.exit(9))
signal.alarm(2)
dqn.train(dqn.Args(env_id="Constant-v0", run_dir=sys.argv[1]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60)
    assert done.returncode == 9 and load(tmp_path)["env_steps"] == 0


def test_nohup_is_left_as_it_is(tmp_path):
    """Started with SIGHUP ignored, as nohup does, a run goes on when its terminal closes."""
    line = [sys.executable, ROOT / "dqn.py", "--total-timesteps", 10**9, "--run-dir", tmp_path]
    process = subprocess.Popen(
        [str(x) for x in line + flags("dqn")],
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    try:
        deadline = time.time() + 120
        while not (tmp_path / "checkpoint.pt").exists():
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None
    finally:
        process.kill()


@every_script
@pytest.mark.parametrize("fault", ["reward", "observation"])
def test_not_a_number_stops_the_run_and_poisons_no_checkpoint(name, fault, tmp_path):
    envs.Faulty.steps, envs.Faulty.good = 0, 600
    options = ["--env-id", env_id(name, "Faulty"), "--env-kwargs", f'{{"fault": "{fault}"}}']
    status, _, err = command(name, *options, "--run-dir", tmp_path, *flags(name))
    envs.Faulty.good = 10**9
    refused(status, err, "not finite")
    saved = load(tmp_path)

    def finite(x):
        parts = x.values() if isinstance(x, dict) else x if isinstance(x, list) else []
        whole = not isinstance(x, torch.Tensor) or x.isfinite().all()
        return bool(whole) and all(map(finite, parts))

    assert finite(saved) and 0 < saved["env_steps"] <= 600
    path = tmp_path / "checkpoint.pt"
    status, _, err = command(name, "--resume", path, "--total-timesteps", saved["env_steps"] + 200)
    assert status == 0, err


@every_script
def test_weights_that_are_not_finite_are_not_saved(name, tmp_path, monkeypatch):
    run = module(name).Run
    save = run.save

    def poisoned(self):
        next(self.learner["policy"].parameters()).data.fill_(float("inf"))
        save(self)

    monkeypatch.setattr(run, "save", poisoned)
    with pytest.raises(module(name).Refusal, match="not finite"):
        module(name).train(args(name, tmp_path))
    assert not (tmp_path / "checkpoint.pt").exists()


@every_script
def test_an_environment_that_raises_keeps_its_traceback_and_the_progress(name, tmp_path):
    envs.Faulty.steps, envs.Faulty.good = 0, 600
    options = dict(env_id=env_id(name, "Faulty"), env_kwargs='{"fault": "step"}')
    with pytest.raises(OSError, match="the simulator went away"):
        module(name).train(args(name, tmp_path, **options))
    envs.Faulty.good = 10**9
    assert load(tmp_path)["env_steps"] >= 400
    module(name).train(args(name, "", resume=str(tmp_path / "checkpoint.pt"), **options))


@every_script
def test_a_full_disk_is_named_and_leaves_the_last_checkpoint(name, tmp_path, monkeypatch):
    module(name).train(args(name, tmp_path, total_timesteps=400))
    before, save = (tmp_path / "checkpoint.pt").read_bytes(), torch.save

    def half(what, file):
        save(what, file)
        file.truncate(1_000)
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 576 vs 534")  # noqa: B904  as torch does

    monkeypatch.setattr(torch, "save", half)
    resume = str(tmp_path / "checkpoint.pt")
    with pytest.raises(module(name).Refusal, match="No space left"):
        module(name).train(args(name, tmp_path, resume=resume, total_timesteps=800))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


@every_script
def test_checkpoints_come_by_the_clock(name, tmp_path, monkeypatch):
    """Every --checkpoint-every seconds, but at most a tenth of the time goes into saving."""
    module_, saves, now = module(name), [], [0.0]
    run, save = module_.Run, module_.Run.save

    def timed(self):
        saves.append(now[0])
        save(self)

    monkeypatch.setattr(module_.time, "time", lambda: now[0])
    log = run.log

    def later(self, **scalars):
        now[0] += 7
        log(self, **scalars)

    monkeypatch.setattr(run, "log", later)
    monkeypatch.setattr(run, "save", timed)
    options = dict(total_timesteps=1_800, checkpoint_every=20)
    options |= {} if name == "ppo" else {"utd": 0.01}
    module_.train(args(name, tmp_path, **options))
    gaps = np.diff(saves[:-1])  # the first log saves, then the first one beyond 20 seconds
    assert len(gaps) > 1 and set(gaps) == {21.0}
    saves.clear()
    module_.train(args(name, tmp_path / "0", total_timesteps=1_000, checkpoint_every=0))
    assert len(saves) == 1, "only at the end"


# Run directories


@every_script
def test_a_directory_that_holds_a_checkpoint_is_not_overwritten(name, tmp_path):
    module(name).train(args(name, tmp_path, total_timesteps=300))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(module(name).Refusal, match="holds a checkpoint"):
        module(name).train(args(name, tmp_path, total_timesteps=300))
    module(name).train(args(name, tmp_path / "other", total_timesteps=300))
    resume = str(tmp_path / "other/checkpoint.pt")
    with pytest.raises(module(name).Refusal, match="holds a checkpoint"):
        module(name).train(args(name, tmp_path, total_timesteps=600, resume=resume))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@every_script
def test_runs_without_a_directory_get_one_each(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        module(name).train(args(name, "", total_timesteps=100))
    assert len(list(tmp_path.glob(f"runs/{env_id(name)}__{name}__1__*/checkpoint.pt"))) == 2
    monkeypatch.setattr(module(name).time, "time", lambda: 1.5)
    module(name).train(args(name, "", total_timesteps=100))
    with pytest.raises(module(name).Refusal, match="holds a checkpoint|File exists"):
        module(name).train(args(name, "", total_timesteps=100))


@every_script
def test_the_options_are_in_the_log(name, tmp_path):
    module(name).train(args(name, tmp_path, seed=3))
    log = EventAccumulator(str(tmp_path)).Reload()
    text = log.Tensors("options/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    seed: 3" in text and f"    env_id: {env_id(name)}" in text


# As a library


@every_script
def test_train_leaves_its_caller_as_it_was(name, tmp_path):
    """Environments closed, threads and signal handlers as before, also after a failure."""
    opened = []

    class Counted(envs.Constant if name != "sac" else envs.Bandit):
        def __init__(self):
            opened.append(self)

        def close(self):
            opened.remove(self)

    gym.register("Counted-v0", Counted, disable_env_checker=True)
    threads, handlers = torch.get_num_threads(), [signal.getsignal(s) for s in (1, 2, 15)]
    torch.set_num_threads(2)
    try:
        module(name).train(args(name, tmp_path / "a", env_id="Counted-v0", eval_every=300))
        assert opened == [] and torch.get_num_threads() == 2
        with pytest.raises(module(name).Refusal):
            module(name).train(args(name, tmp_path / "a", env_id="Counted-v0"))
        assert opened == [] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert handlers == [signal.getsignal(s) for s in (1, 2, 15)]


@every_script
def test_train_in_a_thread(name, tmp_path):
    results = []
    target = lambda: results.append(module(name).train(args(name, tmp_path)))  # noqa: E731
    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    assert len(results[0]) == 3


@every_script
def test_numbers_of_other_kinds(name, tmp_path):
    """numpy's become plain ones, an int where a float stands is one; the checkpoint loads."""
    options = dict(learning_rate=np.float64(0.01), gamma=1, seed=np.int64(3), hidden=np.int32(8))
    given = args(name, tmp_path, **options)
    assert type(given.learning_rate) is type(given.gamma) is float and type(given.seed) is int
    module(name).train(given)
    assert load(tmp_path)["args"]["hidden"] == 8


@every_script
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seed", "1"),
        ("hidden", 2.5),
        ("gamma", "0.9"),
        ("device", "tpu"),
        ("eval_every", None),
        ("capture_video", "yes"),
    ],
)
def test_options_of_the_wrong_type_are_refused(name, option, value, tmp_path):
    with pytest.raises(module(name).Refusal, match=option.replace("_", "-")):
        args(name, tmp_path, **{option: value})
    if option == "device":
        return  # that of a checkpoint is not taken over
    module(name).train(args(name, tmp_path, total_timesteps=100))
    saved = load(tmp_path)
    saved["args"][option] = value
    torch.save(saved, tmp_path / "checkpoint.pt")
    status, _, err = command(name, "--resume", tmp_path / "checkpoint.pt")
    refused(status, err, option.replace("_", "-"))


# Spaces

OBSERVATIONS = [
    spaces.Box(-1, 1, (3,)),
    spaces.Box(-5, 5, (2, 3), np.float64),
    spaces.Box(0, 255, (3,), np.uint8),
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
    spaces.Box(-100, 100, (1,), np.int8),
    spaces.Box(0, 255, (2,), np.uint8),
]


@every_script
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_spaces(name, tmp_path):
    supported = [space for space in ACTIONS if isinstance(space, module(name).ACTION_SPACES)]
    if name == "sac":
        supported = [space for space in supported if np.isfinite(space.high).all()]
    cases = [(obs, supported[0]) for obs in OBSERVATIONS]
    cases += [(OBSERVATIONS[0], action) for action in supported[1:]]
    for i, (obs, action) in enumerate(cases):
        gym.registry["Spaces-v0"].kwargs = {"observation_space": obs, "action_space": action}
        options = args(name, tmp_path / str(i), env_id="Spaces-v0", total_timesteps=300)
        assert (module(name).train(options) == 0).all()


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
    wrong = action if isinstance(action, spaces.MultiDiscrete) else obs
    refused(status, err, wrong)


class SameStep(gym.vector.VectorEnv):
    """Constant as a vector environment that resets within the step."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    single_observation_space = envs.Constant.observation_space
    single_action_space = envs.Constant.action_space

    def __init__(self, num_envs=1, **_):
        self.num_envs = num_envs


@pytest.mark.parametrize("mode", ["SAME_STEP", "DISABLED", None])
def test_foreign_autoreset_is_refused(mode, tmp_path, monkeypatch):
    modes = {} if mode is None else {"autoreset_mode": gym.vector.AutoresetMode[mode]}
    monkeypatch.setattr(SameStep, "metadata", modes)
    gym.register("SameStep-v0", envs.Constant, vector_entry_point=SameStep)
    status, _, err = command("ppo", "--env-id", "SameStep-v0", "--run-dir", tmp_path)
    refused(status, err, mode, "NEXT_STEP")


# Bad input


@every_script
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--env-id", "NoSuchThing-v0"], ["NoSuchThing"]),
        (["--env-id", "no_such_module:Thing-v0"], ["no_such_module"]),
        (["--env-kwargs", "{nonsense"], ["{nonsense"]),
        (["--env-kwargs", "3"], ["mapping"]),
        (["--env-kwargs", '{"no_such": 1}'], ["no_such"]),
        (["--total-timesteps", "0"], ["--total-timesteps 0"]),
        (["--total-timesteps", "-5"], ["--total-timesteps -5"]),
        (["--seed", "-1"], ["--seed -1"]),
        (["--eval-episodes", "0"], ["--eval-episodes 0"]),
        (["--eval-every", "-1"], ["--eval-every -1"]),
        (["--gamma", "1.5"], ["--gamma 1.5"]),
        (["--learning-rate", "nan"], ["--learning-rate nan"]),
        (["--hidden", "0"], ["--hidden 0"]),
        (["--device", "cuda"], ["--device cuda"]),
        (["--run-dir", "/dev/null/here"], ["/dev/null/here"]),
        (["--resume", "/no/such/file.pt"], ["/no/such/file.pt", "No such file"]),
    ],
    ids=lambda x: " ".join(x),
)
def test_bad_input_gets_one_line(name, options, words):
    if options[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    status, out, err = command(name, *options)
    refused(status, err, *words)
    assert not out and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--num-envs", "2", "--num-steps", "4", "--minibatches", "5"], "--minibatches 5"),
        (["--num-envs", "1", "--num-steps", "1"], "--minibatches 4"),
        (["--gae-lambda", "nan"], "--gae-lambda nan"),
        (["--clip-high", "-0.1"], "--clip-high -0.1"),
        (["--init-std", "0"], "--init-std 0.0"),
    ],
)
def test_bad_options_of_ppo(options, word):
    refused(*command("ppo", *options)[::2], word)


@every_script
def test_words_and_unknown_options_are_refused(name):
    for options in (["--seed", "one"], ["--no-such-option", "1"]):
        status, _, err = command(name, *options)
        assert status == 2 and options[0] in err


class Evil:
    def __reduce__(self):
        return os.system, ("exit 1",)


@every_script
def test_foreign_and_damaged_checkpoints(name, tmp_path):
    module(name).train(args(name, tmp_path / "run", total_timesteps=200))
    path = tmp_path / "run/checkpoint.pt"
    saved, whole = load(tmp_path / "run"), path.read_bytes()
    other = "Pendulum-v1" if name == "sac" else "Acrobot-v1"
    for options in (["--env-id", other], ["--hidden", 5]):
        refused(*command(name, "--resume", path, *options)[::2], path, "other options")
    torch.save({**saved, "script": "other"}, path)
    refused(*command(name, "--resume", path)[::2], path, "other.py")
    for what in (whole[:1000], b"", b"nonsense", pickle.dumps(Evil())):
        path.write_bytes(what)
        last = refused(*command(name, "--resume", path)[::2], path, "damaged")
        assert "documentation" not in last
    torch.save(Evil(), path)
    refused(*command(name, "--resume", path)[::2], path, "damaged")
    torch.save({**saved, "policy": 3}, path)
    refused(*command(name, "--resume", path)[::2], path)
    refused(*command(name, "--resume", __file__)[::2], __file__, "damaged")


def test_torchrun_is_refused_where_it_is_not_supported(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    for name in NEW[1:]:
        with pytest.raises(module(name).Refusal, match="torchrun"):
            args(name, tmp_path)


def test_variables_of_torchrun_without_torchrun_do_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    module("ppo").train(args("ppo", tmp_path, total_timesteps=200))
    assert (tmp_path / "checkpoint.pt").exists()


# Video


def test_video(tmp_path):
    options = args("ppo", tmp_path, env_id="CartPole-v1", total_timesteps=100, eval_episodes=2)
    module("ppo").train(options)
    path = tmp_path / "checkpoint.pt"
    status, out, err = command("ppo", "--resume", path, "--capture-video")
    assert status == 0 and "eval_episodes=2 " in out, err
    assert len([f for f in tmp_path.rglob("videos/**/*.mp4") if f.stat().st_size > 1000]) == 2


@every_script
def test_an_environment_that_cannot_be_drawn_is_refused_before_training(name, tmp_path):
    before = envs.Tiny.steps
    options = ["--env-id", env_id(name), "--capture-video", "--run-dir", tmp_path]
    refused(*command(name, *options, *flags(name))[::2], env_id(name))
    assert envs.Tiny.steps == before


@every_script
def test_readme_says_how_to_use_a_saved_policy(name, tmp_path):
    module(name).train(args(name, tmp_path))
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    code = code.replace("ppo", name).replace(
        "runs/.../checkpoint.pt", str(tmp_path / "checkpoint.pt")
    )
    found = {}
    exec(code, found)
    assert np.isfinite(found["reward"])


# Two processes

TWO = """
import os, sys, torch, tyro, envs, ppo as script
evaluate, log = script.Run.evaluate, script.Run.log
seen, weights, all_sum = [], [], script.all_sum
def summed(*tensors, weight=1):
    weights.append(weight)
    return all_sum(*tensors, weight=weight)
script.all_sum = summed
def tell(run):
    state = {name: part.state_dict() for name, part in run.learner.items()}
    about = {"step": run.step, "obs": envs.Matched.log, "losses": seen, "weights": weights}
    about["probe"] = all_sum(torch.tensor([run.rank + 1.0]), torch.ones(2), weight=0.25 + run.rank / 2)
    torch.save({**about, **state}, f"{os.environ['OUT']}/rank{run.rank}.pt")
    return evaluate(run)
def note(run, **losses):
    seen.append(float(losses["policy_loss"]))
    log(run, **losses)
script.Run.evaluate, script.Run.log = tell, note
envs.Matched.log = []
reset = envs.Matched.reset
def logged(self, **options):
    first = reset(self, **options)
    envs.Matched.log.append(float(self.sign))
    return first
envs.Matched.reset = logged
args = tyro.cli(script.Args)
script.train(args)
"""


def torchrun(tmp_path, code, options, processes=2):
    (tmp_path / "two.py").write_text(code)
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        + ["--nproc-per-node", str(processes), str(tmp_path / "two.py"), *options.split()],
        env={**os.environ, "OUT": str(tmp_path), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_processes_learn_as_one(tmp_path):
    """Different data on each; only sums over both keep weights, optimiser and statistics the same."""
    options = (
        "--num-envs 16 --num-steps 63 --hidden 32 --learning-rate 5e-3 --norm-obs --norm-rewards"
    )
    options += f" --target-kl 0.05 --env-id envs:Matched-v0 --total-timesteps 8000 --run-dir {tmp_path}/run"
    run = torchrun(tmp_path, TWO, options)
    assert run.returncode == 0, run.stderr
    assert re.fullmatch("eval_return_mean=1.00 .*\n", run.stdout), run.stdout + run.stderr
    assert len(list((tmp_path / "run").glob("events*"))) == 1
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert ranks[0]["step"] == ranks[1]["step"] == load(tmp_path / "run")["env_steps"] >= 8_000
    own = "obs", "losses", "weights"
    shared = [{k: v for k, v in x.items() if k not in own} for x in ranks]
    assert ranks[0]["probe"].item() == 0.25 * 1 + 0.75 * 2
    for a, b in zip(ranks[0]["weights"], ranks[1]["weights"], strict=True):
        assert a == b == 1 or a + b == pytest.approx(1), "each process weighs by its steps"
    assert sum(a != 1 for a in ranks[0]["weights"]) > len(ranks[0]["weights"]) / 2
    assert same(*shared), "the same weights, optimiser state and statistics"
    assert ranks[0]["obs"][:50] != ranks[1]["obs"][:50] and ranks[0]["losses"] != ranks[1]["losses"]
    # Every second step is a reset step: an iteration has 8 x 63 real steps, or one less an environment.
    iterations = len(ranks[0]["losses"])
    assert abs(ranks[0]["step"] - 16 * 63 / 2 * iterations) <= 16 * iterations


FAULT = """
import sys, torch, tyro, envs, ppo as script
if script.dist.is_torchelastic_launched():
    import os
    envs.Faulty.good = 300 if os.environ["RANK"] == "1" else 10**9
script.train(tyro.cli(script.Args))
"""


def test_not_a_number_on_one_process_ends_all_before_anything_is_saved(tmp_path):
    options = (
        "--num-envs 8 --num-steps 32 --hidden 16 --env-id envs:Faulty-v0 --total-timesteps 1000000"
    )
    run = torchrun(tmp_path, FAULT, f"{options} --run-dir {tmp_path}/run")
    assert run.returncode != 0 and "not finite" in run.stderr
    saved = load(tmp_path / "run")
    assert all(x.isfinite().all() for x in saved["policy"].values()) and saved["env_steps"] < 10_000


def test_two_trainings_in_one_process_of_torchrun(tmp_path):
    code = """
import sys, ppo, envs
for i in (1, 2):
    options = dict(num_envs=4, num_steps=16, hidden=8, total_timesteps=200, eval_episodes=1)
    ppo.train(ppo.Args(env_id="Matched-v0", run_dir=f"{sys.argv[1]}/{i}", **options))
"""
    run = torchrun(tmp_path, code, str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "2/checkpoint.pt").exists() and run.stdout.count("eval_return_mean") == 2


def test_numbers_of_environments_that_cannot_be_shared_out(tmp_path):
    run = torchrun(tmp_path, FAULT, "--num-envs 3 --env-id envs:Matched-v0")
    assert run.returncode != 0 and "--num-envs 3" in run.stderr
