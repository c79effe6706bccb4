"""The evaluation of a run: its line, its episodes, its normaliser and its video."""

import io
import re

import envs
import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT, SCRIPTS, SOURCES, command, module
from runs import env_id, every_script, flags, load, logged, refused, train


@every_script
def test_the_last_line_is_the_evaluation(name, tmp_path, capsys):
    """Mean and deviation of what train returns, not discounted, and the same in the log."""
    returns = train(name, tmp_path, eval_episodes=10, eval_every=200)
    number = r"-?\d+\.\d\d"
    line = capsys.readouterr().out.splitlines()[-1]
    pattern = rf"eval_return_mean={number} eval_return_std={number} eval_episodes=10 "
    assert re.fullmatch(rf"{pattern}env_steps=\d+ wall_seconds=\d+\.\d", line)
    said = dict(pair.split("=") for pair in line.split())
    assert returns.shape == (10,) and len(set(returns)) > 1
    assert float(said["eval_return_mean"]) == pytest.approx(np.mean(returns), abs=0.006)
    assert float(said["eval_return_std"]) == pytest.approx(np.std(returns), abs=0.006)
    assert int(said["env_steps"]) == load(tmp_path)["env_steps"] >= 500
    assert logged(tmp_path)["charts/eval_return"][-1] == pytest.approx(np.mean(returns))


@every_script
def test_an_evaluation_plays_whole_episodes_one_after_the_other(name, tmp_path, monkeypatch):
    """With the policy whose state is in the checkpoint, in one environment."""
    run, made, played = module(name).Run, [], []
    evaluate, make_env = run.evaluate, module(name).make_env

    def count(self):
        begun, simulated = len(made), envs.Tiny.steps
        returns = evaluate(self)
        played.append((len(made) - begun, envs.Tiny.steps - simulated, returns.tolist()))
        return returns

    def noted(*a):
        made.append(1)
        return make_env(*a)

    monkeypatch.setattr(run, "evaluate", count)
    monkeypatch.setattr(module(name), "make_env", noted)
    train(name, tmp_path, env_id=env_id(name, "Truncates"), eval_episodes=7)
    assert played == [(1, 7 * 5, [5.0] * 7)]


def test_an_episode_that_does_not_end_is_cut(tmp_path, monkeypatch):
    """After 100,000 steps, of which 50 are made here; the plumbing is the same in all."""

    class Endless(envs.Tiny):
        def outcome(self, action):
            return 1, False, False

    asked, ppo = [], module("ppo")

    def shorter(n):
        asked.append(n)
        return range(min(n, 50))

    gym.register("Endless-v0", Endless, disable_env_checker=True)
    monkeypatch.setattr(ppo, "range", shorter, raising=False)
    assert train("ppo", tmp_path, env_id="Endless-v0").tolist() == [50] * 3
    assert max(asked) == 100_000


def test_an_environment_that_fails_to_close_takes_no_evaluation_with_it(tmp_path, capsys):
    class Clinging(envs.Both):
        def close(self):
            raise OSError("the simulator does not answer")

    gym.register("Clinging-v0", Clinging, disable_env_checker=True)
    with pytest.raises(OSError, match="does not answer"):
        train("ppo", tmp_path, env_id="Clinging-v0")
    assert "eval_return_mean=" in capsys.readouterr().out
    assert len(logged(tmp_path)["charts/eval_return"]) == 1


NORMALISED = [name for name in SCRIPTS if "class RunningNorm" in SOURCES[name]]
LEARN = {
    "reinforce": dict(num_envs=32, hidden=32, total_timesteps=2_000, value_steps=4),
    "nes": dict(candidates=32, episodes=4, hidden=16, total_timesteps=4_000),
    "cmaes": dict(candidates=32, episodes=4, layers=0, total_timesteps=4_000),
    "dqn": dict(burn_in=200, epsilon_steps=1_000, learning_rate=3e-3, total_timesteps=3_000),
    "double_dqn": dict(burn_in=200, epsilon_steps=1_000, learning_rate=3e-3, total_timesteps=3_000),
    "awr": dict(num_envs=16, num_steps=64, critic_steps=20, actor_steps=100, hidden=32)
    | dict(actor_learning_rate=3e-3, total_timesteps=4_000, alpha=0.5),
    "ppo": dict(num_envs=16, num_steps=32, epochs=4, hidden=32, learning_rate=5e-3)
    | dict(total_timesteps=4_000),
}


@pytest.mark.parametrize("name", NORMALISED)
def test_the_policy_acts_on_normalised_observations_wherever_it_acts(name, tmp_path):
    """1000 ± 1 cannot be told apart otherwise: not while training, not in an evaluation."""
    returns = train(name, tmp_path, env_id="Shifted-v0", eval_episodes=20, **LEARN[name])
    assert returns.mean() == 1


def test_video(tmp_path):
    """Of CartPole, which can draw itself, by the command that README gives."""
    train("ppo", tmp_path, env_id="CartPole-v1", total_timesteps=100, eval_episodes=2)
    path = tmp_path / "checkpoint.pt"
    status, out, err = command("ppo", "--resume", path, "--capture-video")
    assert status == 0 and "eval_episodes=2 " in out, err
    assert len([f for f in tmp_path.rglob("videos/**/*.mp4") if f.stat().st_size > 1000]) == 2


@every_script
def test_an_environment_that_cannot_be_drawn_is_refused_before_training(name, tmp_path):
    before = envs.Tiny.steps
    options = ["--env-id", env_id(name), "--capture-video", "--run-dir", tmp_path]
    refused(command(name, *options, *flags(name)), env_id(name))
    assert envs.Tiny.steps == before


class Undrawn(envs.Both):
    """Draws nothing, grey pictures or text, or does not say what it draws."""

    metadata = {"render_modes": ["rgb_array"]}
    drawings = {"none": None, "grey": np.zeros((8, 8), np.uint8), "text": ["a", "b"]}

    def __init__(self, render_mode=None, drawing="colours"):
        self.render_mode, self.drawing = render_mode if drawing != "colours" else None, drawing

    def render(self):
        return self.drawings.get(self.drawing, np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize("drawing", [*Undrawn.drawings, "colours"])
def test_a_drawing_that_gives_no_video_is_refused_before_training(drawing, tmp_path):
    gym.registry.pop("Undrawn-v0", None)
    gym.register("Undrawn-v0", Undrawn, disable_env_checker=True)
    options = ["--env-id", "Undrawn-v0", "--capture-video", "--run-dir", tmp_path]
    options += ["--env-kwargs", f'{{"drawing": "{drawing}"}}']
    before = envs.Tiny.steps
    refused(command("ppo", *options), "Undrawn-v0: ValueError", "rgb_array")
    assert envs.Tiny.steps == before


def test_on_a_terminal_the_last_line_stands_alone(tmp_path, monkeypatch):
    """The progress bar, written to the same place, is wiped out before it."""
    terminal = io.StringIO()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("sys.stderr", terminal)
    train("ppo", tmp_path)
    before, line, _ = terminal.getvalue().partition("eval_return_mean")
    assert line and before.endswith(("\r", "\n"))


@every_script
def test_every_scalar_is_explained(name, tmp_path):
    """In the table of benchmarks/README.md, which names no other for this script."""
    train(name, tmp_path, eval_every=200)
    text = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:charts|losses)/\w+) \| (.*?) \|", text, re.M)
    named = {tag for tag, scripts in rows if scripts == "all" or name in scripts.split(", ")}
    assert set(logged(tmp_path)) - {"steps"} == named
