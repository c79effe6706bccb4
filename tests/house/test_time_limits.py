"""True time limits: what the value of a state is at both kinds of end, and which steps count."""

import contextlib

import envs
import numpy as np
import pytest
import torch
from conftest import module
from runs import VECTOR, env_id, every_script, load, logged, train

# Options under which each script with a value function finds the values of Limits soon.
FAST = dict(hidden=32, batch_size=64, burn_in=200, utd=1.0, learning_rate=3e-3)
ROLLOUT = dict(num_envs=16, num_steps=32, hidden=32, norm_obs=False)
OPTIONS = {
    "a2c": dict(num_envs=16, num_steps=8, k_step=4, hidden=32, total_timesteps=12_000),
    "a3c": dict(workers=1, k_step=7, hidden=32, total_timesteps=6_000),
    "awr": ROLLOUT
    | dict(critic_steps=60, actor_steps=4, critic_learning_rate=1e-2, total_timesteps=4_000),
    "ppo": ROLLOUT | dict(epochs=8, learning_rate=5e-3, norm_rewards=False, total_timesteps=6_000),
    "dqn": FAST | dict(n_step=3, target_every=1, tau=0.1, total_timesteps=2_000),
    "double_dqn": FAST | dict(n_step=3, target_every=1, tau=0.1, total_timesteps=2_000),
    "ddpg": FAST | dict(tau=0.1, total_timesteps=1_500),
    "td3": FAST | dict(tau=0.1, total_timesteps=1_500),
    "sac": FAST | dict(tau=0.1, total_timesteps=1_500, alpha=0.0),
}


def values(name, learner, obs):
    """V(s), or Q(s, a) of the policy's action, the mean where there are two critics."""
    policy = learner["policy"]
    if "critic" not in learner:
        return policy(obs).max(-1).values
    if "target_critic" in learner:
        action = torch.as_tensor(policy.act(obs.numpy()))
        return learner["critic"](obs, action).reshape(-1, len(obs)).mean(0)
    scale = 0.5 if name == "awr" else 1  # its critic gives (1 - γ) V
    if name == "ppo" and isinstance(policy[0], module("ppo").RunningNorm):
        obs = policy[0](obs)  # it normalises for both networks
    return learner["critic"](obs).squeeze(-1) / scale


@pytest.mark.parametrize("name", OPTIONS)
def test_only_termination_ends_a_value_and_the_successor_is_the_final_observation(
    name, tmp_path, monkeypatch
):
    """Not the next episode's first one; and termination counts where both ends meet."""
    run, found = module(name).Run, []
    evaluate = run.evaluate

    def look(self):
        obs = torch.tensor([[1.0, 0], [-1.0, 0], [0, 1.0]])
        found.extend(values(name, self.learner, obs).tolist())
        return evaluate(self)

    monkeypatch.setattr(run, "evaluate", look)
    train(name, tmp_path, env_id=env_id(name, "Limits"), gamma=0.5, **OPTIONS[name])
    assert found == pytest.approx([2, -2, 1], abs=0.2)


@pytest.mark.parametrize("name", VECTOR)
@pytest.mark.parametrize("limit, first", [("-1", None), ("null", 500), ("7", 7)])
def test_a_limit_means_the_same_to_environments_of_both_kinds(name, limit, first):
    """CartPole's own vectorised version reads -1 as the end of every step, and not null."""
    kwargs = f'{{"max_episode_steps": {limit}, "sutton_barto_reward": true}}'
    script = module(name)
    options = script.Args(env_id="CartPole-v1", env_kwargs=kwargs)
    with contextlib.closing(script.make_envs(options, 2)) as envs, script.make_env(options) as env:
        assert env.spec.max_episode_steps in (first, -1)
        for some in (env, envs):
            state = np.float32([0, 0, 0, 0])
            some.reset(seed=0)
            for t in range(1, 520):
                for one in getattr(envs, "envs", [env]) if some is envs else [env]:
                    one.unwrapped.state = state  # it never falls
                *_, truncated, _ = some.step(np.zeros_like(some.action_space.sample()))
                if np.any(truncated):
                    break
            assert (t if np.any(truncated) else None) == first


@every_script
@pytest.mark.parametrize("kind", ["Constant", "Both"])
def test_every_simulated_step_is_counted_and_no_other(name, kind, tmp_path, monkeypatch):
    """Rollouts of odd lengths: reset steps, which simulate nothing, fall on their borders."""
    run, simulated = module(name).Run, []
    evaluate = run.evaluate

    def note(self):
        simulated.append(envs.Tiny.steps - before)
        return evaluate(self)

    monkeypatch.setattr(run, "evaluate", note)
    before = envs.Tiny.steps
    odd = dict(num_envs=3, num_steps=7) if name in ("a2c", "awr", "ppo") else {}
    train(name, tmp_path, env_id=env_id(name, kind), total_timesteps=200, **odd)
    assert simulated == [load(tmp_path)["env_steps"]] and simulated[0] >= 200


@every_script
def test_episodes_are_logged_whole(name, tmp_path):
    """Five steps of reward 1, also where an episode spans two rollouts."""
    odd = dict(num_envs=3, num_steps=7) if name in ("a2c", "awr", "ppo") else {}
    train(name, tmp_path, env_id=env_id(name, "Truncates"), **odd)
    found = logged(tmp_path)
    for tag in ("charts/episodic_return", "charts/episodic_length"):
        assert set(found[tag]) == {5.0}, tag
