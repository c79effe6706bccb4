"""sac.py: its density, its soft values on a finite MDP, its temperature. The rest: test_ddpg.py."""

import math

import gymnasium as gym
import numpy as np
import pytest
import sac
import torch

ALPHA, GAMMA = 0.5, 0.9


# The density of the actions


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.3), (-1.5, 2.0), (3.0, 0.5)])
def test_the_density_integrates_to_one_on_the_open_interval(mean, std):
    """∫ π(a|s) da over (-1, 1), and the entropy against that of the samples."""
    u = torch.linspace(mean - 9 * std, mean + 9 * std, 200_001, dtype=torch.float64)
    log_std = torch.full_like(u, math.log(std)).unsqueeze(-1)
    noise = ((u - mean) / std).unsqueeze(-1)
    action, logp = sac.tanh_gaussian(torch.full_like(noise, mean), log_std, noise)
    slope = 1 / torch.cosh(u) ** 2  # of tanh: da = slope du
    assert torch.trapezoid(logp.exp() * slope, u).item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(action.squeeze(-1), u.tanh())
    exact = -torch.trapezoid(logp * logp.exp() * slope, u).item()
    torch.manual_seed(0)
    many = torch.randn(200_000, 1, dtype=torch.float64)
    _, logp = sac.tanh_gaussian(
        torch.full_like(many, mean), torch.full_like(many, math.log(std)), many
    )
    assert -logp.mean().item() == pytest.approx(exact, abs=0.02)


def test_the_correction_is_the_log_determinant_of_the_jacobian():
    torch.manual_seed(0)
    mean, log_std, noise = torch.randn(3, 4, dtype=torch.float64)
    _, logp = sac.tanh_gaussian(mean, log_std, noise)
    u = mean + log_std.exp() * noise
    jacobian = torch.autograd.functional.jacobian(torch.tanh, u)
    gaussian = torch.distributions.Normal(mean, log_std.exp()).log_prob(u).sum()
    torch.testing.assert_close(logp, gaussian - torch.linalg.slogdet(jacobian).logabsdet)
    h = 1e-5  # and numerically
    slopes = ((u + h).tanh() - (u - h).tanh()) / (2 * h)
    torch.testing.assert_close(logp, gaussian - slopes.log().sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mean", [15.0, -15.0, 60.0, -60.0, 1e4])
def test_saturated_actions_stay_finite_and_exact(mean):
    """Where tanh u rounds to ±1: log(1 - tanh² u) = 2 log 2 - 2|u| there, gradient -2 sign u."""
    m = torch.full((1, 1), mean).requires_grad_()
    action, logp = sac.tanh_gaussian(m, torch.zeros(1, 1), torch.zeros(1, 1))
    assert action.item() == math.copysign(1, mean)
    exact = -0.5 * math.log(2 * math.pi) - 2 * math.log(2) + 2 * abs(mean)
    assert logp.item() == pytest.approx(exact, rel=1e-6)
    assert torch.autograd.grad(logp.sum(), m)[0].item() == pytest.approx(math.copysign(2, mean))


@pytest.mark.parametrize("like", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_deviations_stay_within_bounds(like):
    mean, log_std = sac.mean_and_log_std(like([[1.0, 30.0, -1e9, 1e9], [0.0, -30.0, 0.5, 2.0]]))
    assert mean.tolist() == [[1, 30], [0, -30]] and log_std.tolist() == [[-20, 2], [0.5, 2]]


def test_the_entropy_does_not_depend_on_units():
    """One policy, one seed, bounds a thousand times wider: the same actions, losses and α."""
    results = []
    for bound in (1, 1000):
        args = sac.Args(hidden=8, batch_size=16)
        torch.manual_seed(0)
        state = sac.initialise(args, 3, gym.spaces.Box(-bound, bound, (2,)))
        batch = [torch.randn(16, n) for n in (3, 2, 1, 3, 1)]
        batch = [x.squeeze(-1) for x in batch]
        results.append(sac.update(args, *state, batch))
        action = state[0]["actor"].to_env(np.full((1, 2), 0.5))
        assert (action == 0.5 * bound).all()
    assert results[0] == results[1]


# Soft values on a finite MDP


def finite_mdp():
    """Successors and rewards of 4 states and 3 actions, and a policy."""
    torch.manual_seed(0)
    successor, reward = torch.randint(4, (4, 3)), torch.randn(4, 3).double()
    return successor, reward, torch.randn(4, 3).double().softmax(-1)


def soft_value(successor, reward, policy, alpha):
    """V of r - α log π under policy, by solving its linear equations. (S,)"""
    transition = torch.zeros(4, 4).double()
    for s in range(4):
        for a in range(3):
            transition[s, successor[s, a]] += policy[s, a]
    modified = (policy * (reward - alpha * policy.log())).sum(-1)
    return torch.linalg.solve(torch.eye(4).double() - GAMMA * transition, modified)


def test_the_entropy_is_a_reward():
    """Σ γ^t (r + α H(π(·|s_t))), step by step from each state, is the value of r - α log π."""
    successor, reward, policy = finite_mdp()
    entropy = torch.distributions.Categorical(probs=policy).entropy()
    at, total = torch.eye(4).double(), torch.zeros(4).double()  # at[s0, s] at time t
    for t in range(400):
        total += GAMMA**t * at @ ((policy * reward).sum(-1) + ALPHA * entropy)
        onward = torch.zeros(4, 4).double()
        for s in range(4):
            for a in range(3):
                onward[:, successor[s, a]] += at[:, s] * policy[s, a]
        at = onward
    torch.testing.assert_close(total, soft_value(successor, reward, policy, ALPHA))


def test_the_target_is_the_soft_bellman_equation():
    """Averaged over a' ~ π it leaves π's soft Q as it is, and takes the lower of two critics."""
    successor, reward, policy = finite_mdp()
    q = reward + GAMMA * soft_value(successor, reward, policy, ALPHA)[successor]
    logp = policy.log()
    for s in range(4):
        for a in range(3):
            n, r = successor[s, a], reward[s, a].expand(3)
            q_next = torch.stack([q[n], q[n] + torch.tensor([1.0, 0.0, 2.0])])
            y = sac.sac_target(r, torch.tensor(GAMMA), q_next, logp[n], ALPHA)
            torch.testing.assert_close((policy[n] * y).sum(), q[s, a])
    y = sac.sac_target(torch.ones(1), torch.zeros(1), torch.full((2, 1), 9.0), torch.ones(1), 1.0)
    assert y.item() == 1, "a terminal state has neither value nor entropy"


def test_the_soft_optimum():
    """softmax(Q*/α) is better, rewarded for entropy, than other policies; α → 0 is standard RL."""
    successor, reward, _ = finite_mdp()

    def optimum(alpha):
        value = torch.zeros(4).double()
        for _ in range(500):
            q = reward + GAMMA * value[successor]
            value = alpha * (q / alpha).logsumexp(-1) if alpha else q.max(-1).values
        return q, value

    q, value = optimum(ALPHA)
    best = (q / ALPHA).softmax(-1)
    torch.testing.assert_close(soft_value(successor, reward, best, ALPHA), value)
    for _ in range(100):
        other = (q / ALPHA + torch.randn(4, 3)).softmax(-1)
        assert (soft_value(successor, reward, other, ALPHA) <= value + 1e-9).all()
    torch.testing.assert_close(optimum(1e-4)[1], optimum(0)[1], atol=2e-3, rtol=0)


def test_the_policy_gradient_finds_the_soft_optimum_of_a_known_q():
    """Q(a) = -k (a - c)² + const: Adam on soft_actor_loss against the best m and σ on a grid."""
    torch.manual_seed(0)
    theta = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([theta], 0.02)

    def loss(mean, log_std, noise):
        action, logp = sac.tanh_gaussian(mean.expand_as(noise), log_std.expand_as(noise), noise)
        q = -4 * (action.squeeze(-1) - 0.3) ** 2
        return sac.soft_actor_loss(torch.stack([q, q + 1]), logp, ALPHA)

    for _ in range(600):
        optimizer.zero_grad()
        loss(theta[0], theta[1], torch.randn(256, 1)).backward()
        optimizer.step()
    noise = torch.randn(20_000, 1)
    grid = [(m, s) for m in np.linspace(-1, 1, 21) for s in np.linspace(-2.5, 0.5, 31)]
    losses = [loss(torch.tensor(m), torch.tensor(s), noise).item() for m, s in grid]
    best = grid[int(np.argmin(losses))]
    assert theta.tolist() == pytest.approx(best, abs=0.12)
    assert loss(*theta, noise).item() == pytest.approx(min(losses), abs=0.01)


def test_the_actor_loss_takes_the_lower_q_and_pays_for_log_probability():
    q, logp = torch.tensor([[1.0, 5.0], [2.0, 3.0]]), torch.tensor([-1.0, 3.0])
    assert sac.soft_actor_loss(q, logp, torch.tensor([0.5])).item() == ((-0.5 - 1) + (1.5 - 3)) / 2


# Temperature


def test_temperature_gradient():
    logp = torch.tensor([1.0, 3.0])  # entropy -2
    assert sac.temperature_gradient(logp, -1).item() == -1, "too low: a step down raises α"
    assert sac.temperature_gradient(logp, -3).item() == 1


def updated(alpha, updates, scale):
    """Scalars and α's vector after updates on a bandit whose Q prefers one action by scale."""
    torch.manual_seed(0)
    args = sac.Args(hidden=16, batch_size=64, alpha=alpha, learning_rate=3e-3)
    state = sac.initialise(args, 1, gym.spaces.Box(-1, 1, (1,)))
    obs, none = torch.zeros(64, 1), torch.zeros(64)
    for _ in range(updates):
        action = torch.rand(64, 1) * 2 - 1
        batch = [obs, action, -scale * (action.squeeze(-1) - 0.3) ** 2, obs, none]
        scalars = sac.update(args, *state, batch)
    return {name: x.item() for name, x in scalars.items()}, state[1][2]


def test_automatic_temperature_reaches_the_target_entropy():
    scalars, _ = updated(0.0, 2_000, 4.0)
    assert scalars["entropy"] == pytest.approx(-1, abs=0.25)
    assert 0 < scalars["alpha"] < 1


def test_fixed_temperature_stays_and_decides_the_entropy():
    """A Gaussian of variance α / 2k, the best for Q = -k (a - c)² where tanh is nearly linear."""
    for alpha, scale in ((0.02, 4.0), (0.3, 4.0)):
        scalars, log_alpha = updated(alpha, 800, scale)
        assert log_alpha.exp().item() == pytest.approx(alpha)
        if alpha == 0.02:
            exact = 0.5 * math.log(2 * math.pi * math.e * alpha / (2 * scale))
            assert scalars["entropy"] == pytest.approx(exact, abs=0.3)
            low = scalars["entropy"]
    assert scalars["entropy"] > low + 0.5
