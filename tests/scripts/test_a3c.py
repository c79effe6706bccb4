"""a3c.py: its loop, alone and with several workers: counts, crashes, kills, one result of one.

Equations and networks are the text of a2c.py (the house rules), and tested there.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import a2c
import a3c
import envs
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COMMON = dict(workers=1, hidden=32, gamma=0.9, eval_episodes=20, learning_rate=3e-2)


def trained(tmp_path, env_id, steps, **options):
    """Evaluation returns, V_φ as a function of observations, and the checkpoint."""
    options = {**COMMON, **options}
    args = a3c.Args(env_id=env_id, total_timesteps=steps, run_dir=str(tmp_path), **options)
    returns = a3c.train(args)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    critic = torch.nn.Sequential(*a3c.mlp(a3c.make_env(args), args, 1, 1.0))
    critic.load_state_dict(checkpoint["critic"])
    value = lambda *obs: critic(torch.tensor(obs).float()).squeeze(-1).tolist()  # noqa: E731
    return returns, value, checkpoint


# Learning

some_workers = pytest.mark.parametrize("workers", [1, 2])


@some_workers
def test_reward_depends_on_action_and_observation(tmp_path, workers):
    returns, value, _ = trained(tmp_path, "Matched-v0", 3_000, workers=workers)
    assert returns.mean() == 1
    assert value([1, 0], [-1, 0]) == pytest.approx([1, 1], abs=0.3)


def test_continuous_action(tmp_path):
    returns, _, _ = trained(tmp_path, "MatchedBox-v0", 5_000, learning_rate=7e-3)
    assert returns.mean() > -0.2  # a constant action gets -4 at best


def test_credit_over_two_steps(tmp_path):
    returns, _, _ = trained(tmp_path, "TwoStep-v0", 4_000)
    assert returns.mean() == 1


@some_workers
def test_time_limit_does_not_end_the_value(tmp_path, workers):
    _, value, _ = trained(tmp_path, "Truncates-v0", 10_000, workers=workers, k_step=3)
    assert value([0, 0]) == pytest.approx([10], abs=0.3)


def test_a_time_limit_bootstraps_from_the_final_observation(tmp_path):
    """Not from the first one of the next episode, which stands for another state."""
    _, value, _ = trained(tmp_path, "Stays-v0", 8_000)
    assert value([1, 0], [-1, 0]) == pytest.approx([10, -10], abs=0.6)


def test_termination_ends_the_value(tmp_path):
    _, value, _ = trained(tmp_path, "Terminates-v0", 8_000, k_step=3)
    exact = [(1 - 0.9 ** (5 - t)) / 0.1 for t in range(5)]
    assert value(*([t - 2.5, 0] for t in range(5))) == pytest.approx(exact, abs=0.2)


def test_both_ends(tmp_path):
    _, value, _ = trained(tmp_path, "Both-v0", 12_000)
    assert value([0, 0]) == pytest.approx([1 / (1 - 0.8 * 0.9)], abs=0.4)


# Rollouts


@pytest.mark.parametrize("k", [1, 3, 5, 8])
def test_a_rollout_is_k_steps_or_up_to_an_end(tmp_path, monkeypatch, k):
    """Episodes of 5 steps; and what a rollout begins with is what the last one ended with."""
    seen, k_step_advantages = [], a3c.k_step_advantages

    def spy(*a):
        seen.append(tuple(x.numpy().copy() for x in a[:4]))  # the memory is used again
        return k_step_advantages(*a)

    monkeypatch.setattr(a3c, "k_step_advantages", spy)
    trained(tmp_path, "Terminates-v0", 100, k_step=k, learning_rate=0.0)
    pattern = [min(k, 5 - first) for first in range(0, 5, k)]
    assert [len(rewards) for rewards, *_ in seen] == pattern * 20
    before = None
    for rewards, values, terminated, truncated in seen:
        assert len(values) == len(rewards) + 1 and not terminated[:-1].any() and not truncated.any()
        assert before is None or values[0] == pytest.approx(before, abs=1e-6)
        before = None if terminated[-1] else values[-1]
    assert sum(terminated[-1] for _, _, terminated, _ in seen) == 20


def gradients(monkeypatch, also=lambda self: None):
    """Collects what the optimiser is given: lists of gradients. The first are zeros, at the start."""
    seen = []

    def spy(self):
        seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])
        also(self)
        if len(seen) == 1:
            step(self)

    step = torch.optim.RMSprop.step
    monkeypatch.setattr(torch.optim.RMSprop, "step", spy)
    return seen


def test_gradients_are_summed_over_steps(tmp_path, monkeypatch):
    """A rollout of one step counts a quarter of what k = 4 such steps do, for the critic exactly."""
    found = []
    for k in (1, 4):
        with monkeypatch.context() as patch:
            seen = gradients(patch)
            trained(tmp_path / str(k), "Constant-v0", 1, k_step=k, max_grad_norm=0.0)
        found.append(seen[1][-1].item())
    assert found[0] == pytest.approx(4 * found[1]) and found[0] != 0


def test_each_rollout_begins_from_the_shared_parameters(tmp_path, monkeypatch):
    """They are copied before acting. The gradient is clipped; the rate falls to 0 over all steps."""
    policies, make_policy, sample = [], a3c.make_policy, a3c.SoftmaxPolicy.sample
    shared, rates, compared = [], [], []
    monkeypatch.setattr(
        a3c, "make_policy", lambda *a: policies.append(make_policy(*a)) or policies[-1]
    )
    step = torch.optim.RMSprop.step

    def spy_step(self):
        shared[:] = self.param_groups[0]["params"]
        norm = torch.stack([p.grad.norm() for p in shared]).norm()
        rates.append((self.param_groups[0]["lr"], norm.item()))
        step(self)

    def spy_sample(self, *a):
        compared.append(all(map(torch.equal, self.parameters(), shared)))
        return sample(self, *a)

    monkeypatch.setattr(torch.optim.RMSprop, "step", spy_step)
    monkeypatch.setattr(a3c.SoftmaxPolicy, "sample", spy_sample)
    options = dict(k_step=5, max_grad_norm=0.1, learning_rate=1e-1)
    trained(tmp_path, "Truncates-v0", 100, **options)
    rates = rates[1:]  # the first step makes the state
    assert [rate for rate, _ in rates] == pytest.approx(
        [0.1 * (1 - 5 * i / 100) for i in range(20)]
    )
    assert max(norm for _, norm in rates) == pytest.approx(0.1, rel=1e-3)
    assert len(compared) == 100 and all(compared)


def test_the_entropy_bonus_keeps_the_policy_wide(tmp_path):
    trained(tmp_path, "Matched-v0", 3_000, entropy_coef=10.0)
    log = EventAccumulator(str(tmp_path)).Reload()
    assert log.Scalars("losses/entropy")[-1].value > 0.65  # log 2 is 0.69; without it, towards 0


def test_episodes_are_logged_whole(tmp_path):
    """Five steps of reward 1: neither parts of one nor two in one."""
    trained(tmp_path, "Terminates-v0", 3_000, k_step=3)
    log = EventAccumulator(str(tmp_path)).Reload()
    for name in ("charts/episodic_return", "charts/episodic_length"):
        assert [event.value for event in log.Scalars(name)] == [5.0] * len(log.Scalars(name))


# Several workers


class Tallied(envs.Both):
    """Counts, over all processes, steps, and by rank who took them."""

    counts = multiprocessing.Array("q", 8)

    def reset(self, **options):
        self.rank = (multiprocessing.current_process()._identity or (0,))[0]
        return super().reset(**options)

    def outcome(self, action):
        with self.counts.get_lock():
            self.counts[0] += 1
        return super().outcome(action)


class Crashes(envs.Both):
    """Fails, in one kind of process, after 300 steps there."""

    in_child, how = True, None

    def outcome(self, action):
        self.taken = getattr(self, "taken", 0) + 1
        child = multiprocessing.parent_process() is not None
        if child == self.in_child and self.taken > 300:
            self.how()
        return super().outcome(action)

    def poison(self, action):
        self.taken = getattr(self, "taken", 0) + 1
        bad = multiprocessing.parent_process() is not None and self.taken > 3_000
        return np.nan if bad else 1, False, self.t == 5


gym.register("Tallied-v0", Tallied, disable_env_checker=True, order_enforce=False)
gym.register("Crashes-v0", Crashes, disable_env_checker=True, order_enforce=False)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 1_001])
def test_every_step_of_every_worker_is_counted(tmp_path, monkeypatch, workers, steps):
    """As the environments count them; the total is passed by less than a rollout a worker."""
    Tallied.counts[0] = 0
    counts, evaluate = [], a3c.Run.evaluate
    spy = lambda run: counts.append((run.step, Tallied.counts[0])) or evaluate(run)  # noqa: E731
    monkeypatch.setattr(a3c.Run, "evaluate", spy)
    trained(tmp_path, "Tallied-v0", steps, workers=workers, eval_episodes=1)
    [(counted, taken)] = counts
    assert counted == taken and steps <= counted < steps + 16 * workers
    Tallied.counts[0] = 0
    more = dict(workers=workers, eval_episodes=1, resume=str(tmp_path / "checkpoint.pt"))
    trained(tmp_path, "Tallied-v0", counted + 50, **more)
    assert counts[1][0] - counted == counts[1][1] >= 50
    assert not multiprocessing.active_children()


def test_what_one_worker_learns_all_have(tmp_path, monkeypatch):
    """The main process takes no optimiser step: all that it knows, the other has learned."""
    main, step, made = os.getpid(), torch.optim.RMSprop.step, []

    def spy(self):
        if os.getpid() != main or not made:  # the first step makes the state
            made.append(1)
            step(self)

    monkeypatch.setattr(torch.optim.RMSprop, "step", spy)
    returns, _, checkpoint = trained(tmp_path, "Matched-v0", 6_000, workers=2)
    assert returns.mean() == 1
    means = [state["square_avg"] for state in checkpoint["optimizer"]["state"].values()]
    assert all(x.max() > 0 for x in means), "the state of the optimiser is shared"


def test_workers_see_different_episodes(tmp_path, monkeypatch):
    """Each worker's first observations and noise, by seeds of its own."""
    signs = multiprocessing.Array("d", 2 * 40)

    def reset(self, *, seed=None, options=None):
        result = base(self, seed=seed, options=options)
        rank = int(multiprocessing.parent_process() is not None)
        self.n = getattr(self, "n", -1) + 1
        if self.n < 40:
            signs[40 * rank + self.n] = self.sign
        return result

    base = envs.Tiny.reset
    monkeypatch.setattr(envs.Tiny, "reset", reset)
    trained(tmp_path, "Observed-v0", 400, workers=2, eval_episodes=1)  # which writes over signs[0]
    both = [list(signs[1:40]), list(signs[41:])]
    assert both[0] != both[1] and 0 not in both[0][:5] and 0 not in both[1][:5]


class Connected(envs.Both):
    """Belongs to the process that made it, as a connection to a simulator does."""

    def __init__(self):
        self.pid = os.getpid()

    def step(self, action):
        assert self.pid == os.getpid()
        return super().step(action)


def test_each_worker_makes_its_own_environment(tmp_path):
    gym.registry.pop("Connected-v0", None)
    gym.register("Connected-v0", Connected, disable_env_checker=True)
    trained(tmp_path, "Connected-v0", 2_000, workers=3, eval_episodes=1)


def fail():
    raise ArithmeticError("on purpose")


class Opened(Crashes):
    """Notes its render mode when it is made, and when it is closed."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    notes = None  # a path

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.note(f"made {render_mode}")

    def note(self, what):
        with open(Opened.notes, "a") as file:
            print(what, file=file)

    def render(self):
        return np.zeros((32, 32, 3), np.uint8)

    def close(self):
        self.note(f"closed {self.render_mode}")


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """A function that returns what environments noted, in order of the alphabet."""
    monkeypatch.setattr(Opened, "notes", tmp_path / "notes")
    gym.registry.pop("Opened-v0", None)
    gym.register("Opened-v0", Opened, disable_env_checker=True)
    return lambda: sorted(Opened.notes.read_text().splitlines())


@pytest.mark.parametrize(("in_child", "workers"), [(True, 2), (False, 3)])
def test_every_worker_closes_its_environment_also_after_a_crash(
    tmp_path, monkeypatch, opened, in_child, workers
):
    monkeypatch.setattr(Crashes, "in_child", in_child)
    monkeypatch.setattr(Crashes, "how", staticmethod(fail))
    with pytest.raises(Exception, match="on purpose"):
        trained(tmp_path, "Opened-v0", 10**9, workers=workers)
    n = workers + 1  # with the one whose spaces are asked for
    assert opened() == ["closed None"] * n + ["made None"] * n


def test_only_the_environment_that_is_recorded_is_drawn(tmp_path, opened):
    """A forked process that draws can wait for ever for a lock of the graphics library."""
    trained(tmp_path, "Opened-v0", 200, workers=3, eval_episodes=1, capture_video=True)
    done = [note.split()[1] for note in opened()]  # by the test itself too: it makes an environment
    assert done.count("None") == 2 * 2 and list(tmp_path.glob("videos/*/*.mp4"))


def test_a_worker_that_hears_nothing_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(Crashes, "in_child", True)
    monkeypatch.setattr(Crashes, "how", staticmethod(lambda: time.sleep(1_000)))
    monkeypatch.setattr(a3c, "LOG_EVERY", 100)

    def log(run, **_):
        if run.step > 2_000:
            raise ArithmeticError("on purpose")

    monkeypatch.setattr(a3c.Run, "log", log)
    with pytest.raises(ArithmeticError):
        trained(tmp_path, "Crashes-v0", 10**9, workers=2)
    assert all_gone()


def all_gone():
    """Whether the workers, killed in the end, are gone within five seconds."""
    deadline = time.time() + 5
    while multiprocessing.active_children() and time.time() < deadline:
        time.sleep(0.01)
    return not multiprocessing.active_children()


@pytest.mark.parametrize("in_child", [True, False])
def test_a_crash_stops_all_and_saves(tmp_path, monkeypatch, in_child):
    monkeypatch.setattr(Crashes, "in_child", in_child)
    monkeypatch.setattr(Crashes, "how", staticmethod(fail))
    error = torch.multiprocessing.ProcessRaisedException if in_child else ArithmeticError
    with pytest.raises(error, match=r"(?s)Traceback.*in fail.*on purpose" if in_child else "on p"):
        trained(tmp_path, "Crashes-v0", 10**9, workers=3)
    assert all_gone()
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint["env_steps"] > 300
    assert all(x.isfinite().all() for x in checkpoint["policy"].values())


def test_a_killed_worker_stops_all_and_saves(tmp_path, monkeypatch):
    how = staticmethod(lambda: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr(Crashes, "how", how)
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        trained(tmp_path, "Crashes-v0", 10**9, workers=3)
    assert all_gone()
    assert (tmp_path / "checkpoint.pt").exists()


def family(pid):
    """Living processes of the session of pid."""
    found = subprocess.run(
        ["ps", "-o", "pid=,stat=", "-s", str(pid)], capture_output=True, text=True
    )
    rows = [line.split() for line in found.stdout.splitlines()]
    return {int(row[0]) for row in rows if not row[1].startswith("Z")}


@pytest.mark.parametrize("how", ["terminal", "main", "kill"])
def test_no_process_is_left_behind(tmp_path, how):
    """Ctrl-C in a terminal reaches all processes, a signal the main one alone."""
    options = f"--workers 3 --hidden 8 --total-timesteps {10**9} --run-dir {tmp_path}"
    main = subprocess.Popen(
        [sys.executable, ROOT / "a3c.py", *options.split(), "--checkpoint-every", "1"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.time() + 60
        while not (tmp_path / "checkpoint.pt").exists():
            assert main.poll() is None and time.time() < deadline
            time.sleep(0.05)
        assert len(family(main.pid)) == 3
        if how == "terminal":
            os.killpg(main.pid, signal.SIGINT)
        else:
            main.send_signal(signal.SIGINT if how == "main" else signal.SIGKILL)
        err = main.communicate(timeout=60)[1]
        deadline = time.time() + 5
        while family(main.pid) and time.time() < deadline:
            time.sleep(0.05)
        assert not family(main.pid)
    finally:
        for pid in family(main.pid):
            os.kill(pid, signal.SIGKILL)
    if how != "kill":
        assert main.returncode == 130 and "--resume" in err and "Traceback" not in err
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["env_steps"] > 0


def test_bad_options():
    for options in (["--workers", "0"], ["--k-step", "0"]):
        status, out, err = command("a3c", *options)
        assert status == 2 and not out and len(err.splitlines()) == 1 and options[0] in err


def test_a_number_that_is_not_finite_in_one_worker_stops_all(tmp_path, monkeypatch):
    """It is refused as in the main process, and the last checkpoint is kept."""
    monkeypatch.setattr(Crashes, "in_child", True)
    monkeypatch.setattr(Crashes, "outcome", lambda self, action: self.poison(action))
    with pytest.raises(a3c.Refusal, match="not finite"):
        trained(tmp_path, "Crashes-v0", 10**9, workers=2)
    assert all_gone()
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(x.isfinite().all() for x in checkpoint["policy"].values())


def test_one_worker_takes_the_step_of_a2c(tmp_path, monkeypatch):
    """One environment, k steps without an end: the same gradient from the same parameters."""
    found = {}
    for script in (a2c, a3c):
        with monkeypatch.context() as patch:
            found[script] = gradients(patch)
            greedy = staticmethod(lambda logits, rng: logits.argmax(-1))
            patch.setattr(script.SoftmaxPolicy, "sample", greedy)
            own = dict(num_envs=1, num_steps=4) if script is a2c else dict(workers=1)
            path = str(tmp_path / script.SCRIPT)
            args = dict(env_id="Truncates-v0", total_timesteps=4, run_dir=path, k_step=4)
            script.train(script.Args(**args, **own, max_grad_norm=1.0, eval_episodes=1))
    assert len(found[a2c]) == 1 and len(found[a3c]) == 2
    for ours, theirs in zip(found[a2c][0], found[a3c][1], strict=True):
        torch.testing.assert_close(ours, theirs)
