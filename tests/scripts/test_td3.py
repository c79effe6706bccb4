"""td3.py: what it adds to ddpg.py. The rest is in test_ddpg.py, for all three at once."""

import gymnasium as gym
import numpy as np
import pytest
import td3
import torch

BOX = gym.spaces.Box(-2, 2, (2,))


def test_smoothing_is_clipped_twice():
    action, noise = torch.tensor([0.0, 0.0, 0.9, -0.9]), torch.tensor([1.0, 9.0, 9.0, -1.0])
    smoothed = td3.smooth(action, noise, 0.2, 0.5)
    assert smoothed.tolist() == pytest.approx([0.2, 0.5, 1.0, -1.0])


def test_target_takes_the_lower_critic():
    reward, bootstrap = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.9, 0.9, 0.0])
    q_next = torch.tensor([[10.0, 30.0, 5.0], [20.0, 20.0, 5.0]])
    assert td3.td3_target(reward, bootstrap, q_next).tolist() == pytest.approx([10, 20, 3])


def test_the_lower_critic_does_not_overestimate():
    """All true values are 0: the best of five noisy actions is overrated by one critic, not by two.

    The five are chosen by the first critic, as an actor that climbs it would.
    """
    torch.manual_seed(0)
    q = torch.randn(2, 100_000, 5)
    best = q[0].argmax(-1, keepdim=True)
    q_next = torch.stack([q[i].gather(-1, best).squeeze(-1) for i in (0, 1)])
    zero, one = torch.zeros(100_000), torch.ones(100_000)
    assert q_next[0].mean().item() == pytest.approx(1.163, abs=0.02)  # maximum of five normals
    assert td3.td3_target(zero, one, q_next).mean() < 0


@pytest.mark.parametrize("actor_every", [1, 2, 3])
def test_actor_and_targets_wait_for_the_critics(actor_every):
    torch.manual_seed(0)
    args = td3.Args(hidden=8, batch_size=4, actor_every=actor_every)
    networks, vectors, optimizers = td3.initialise(args, 3, BOX)
    batch = [torch.randn(4, 3), torch.rand(4, 2), torch.randn(4), torch.randn(4, 3), torch.ones(4)]
    for number in range(6):
        before = [theta.clone() for theta in vectors]
        scalars = td3.update(args, networks, vectors, optimizers, batch, number)
        theta, phi, target_theta, target_phi = (
            not torch.equal(a, b) for a, b in zip(before, vectors, strict=True)
        )
        assert phi and theta == target_theta == target_phi == ((number + 1) % actor_every == 0)
        assert ("actor_loss" in scalars) == theta


def test_the_actor_climbs_the_first_critic_alone():
    """With a second critic of any other weights its step is the same."""
    batch = [torch.randn(4, 3), torch.rand(4, 2), torch.randn(4), torch.randn(4, 3), torch.ones(4)]
    actors = []
    for factor in (1.0, -3.0):
        torch.manual_seed(0)
        args = td3.Args(hidden=8, batch_size=4, actor_every=1, learning_rate=0.0)
        state = td3.initialise(args, 3, BOX)
        for parameter in state[0]["critic"].parameters():
            parameter.data[1] *= factor
        td3.update(args, *state, batch, 0)
        actors.append(state[2][0].m.clone())  # a tenth of the gradient
    assert actors[0].abs().max() > 0
    torch.testing.assert_close(*actors)


def test_exploration_is_normal_around_the_policy():
    noise = np.random.default_rng(0).normal(size=(10_000, 2))
    action = td3.explore(np.array([0.2, -0.1]), noise, 0.1)
    np.testing.assert_allclose(action.mean(0), [0.2, -0.1], atol=0.005)
    np.testing.assert_allclose(action.std(0), 0.1, atol=0.005)
