"""Baselines, values and advantages: the derivation of actor-critic on finite MDPs, line by line.

As in test_policy_gradient.py, expectations are over all trajectories of three steps.
"""

import pytest
import torch
from mdp import (
    F64,
    MDP,
    STEPS,
    estimator,
    expectation,
    generator,
    jacobian,
    place,
    random_policy,
    scores,
    variance,
    within_noise,
)

close = torch.testing.assert_close


@pytest.fixture(params=[0, 1])
def task(request):
    """The document's case, no discount: an MDP, θ, and ∇U(θ) from the recursion backwards."""
    mdp = MDP.endless(request.param, gamma=1.0, states=3, actions=2)
    theta = random_policy(request.param + 10, 3, 2).log() * 2
    return mdp, theta, jacobian(lambda x: mdp.episode_value(x.softmax(-1), STEPS), theta)


# Baselines


def check_baseline(mdp, theta, gradient, baseline):
    """Taken away it leaves the gradient and lowers the variance, here; added, it raises that."""
    G = lambda t: mdp.to_go(t, STEPS)  # noqa: E731
    close(estimator(mdp, theta, lambda t: G(t) - baseline(t)), gradient)
    variances = [variance(mdp, theta, lambda t, k=k: G(t) + k * baseline(t)) for k in (-1, 0, 1)]
    assert variances[0] < variances[1] < variances[2]


def test_one_trajectory_is_an_unbiased_estimate(task):
    """E[Σ_t ∇ log π G_t] = ∇U   [Limitations, eq. 1], [Baseline, eq. 1], [Baseline, eq. 6]"""
    mdp, theta, gradient = task
    close(estimator(mdp, theta, lambda t: mdp.to_go(t, STEPS)), gradient)


def test_constant_baseline(task):
    """E[Σ_t ∇ log π (G_t - b)] = ∇U, b = E[R(τ)]   [Baseline, eq. 2]

    Its sum begins at t = 1, which would leave out the first action of the trajectory in eq. 1 of
    [REINFORCE (or Monte Carlo Policy Gradient)].
    """
    mdp, theta, gradient = task
    mdp.r += 3  # which leaves the gradient
    b = mdp.episode_value(theta.softmax(-1), STEPS)
    check_baseline(mdp, theta, gradient, lambda t: b)
    from_1 = lambda t: (mdp.to_go(t, STEPS) - b) * (t >= 1)  # noqa: E731
    assert not torch.allclose(estimator(mdp, theta, from_1), gradient)


def test_time_dependent_baseline(task):
    """E[Σ_t ∇ log π (G_t - b_t)] = ∇U, b_t = E[G_t]   [Baseline, eq. 3]"""
    mdp, theta, gradient = task
    mdp.r += 3
    law = mdp.law(theta.softmax(-1), STEPS)
    check_baseline(mdp, theta, gradient, lambda t: (law * mdp.to_go(t, STEPS)).sum())


def test_value_is_the_expected_return_to_go():
    """b(s) = E[r_t + ... + r_{T-1} | s_t = s] = V^π(s)   [Baseline, eq. 4]

    Of one s at all times only where the state tells the time, or the end does not depend on it.
    """
    pi = random_policy(1, 6, 2)
    layered = MDP.layered(0, gamma=1.0)
    law, value = layered.law(pi, STEPS), layered.value(pi)
    for t in range(STEPS):
        axes = [axis for axis in range(6) if axis != 2 * t]
        for s in (2 * t, 2 * t + 1):
            ours = (law * layered.to_go(t, STEPS)).sum(axes)[s] / law.sum(axes)[s]
            close(ours, value[s])
    endless, pi = MDP.endless(0, 1.0, 3, 2), random_policy(1, 3, 2)
    law = endless.law(pi, STEPS)
    first, last = ((law * endless.to_go(t, STEPS)) for t in (0, STEPS - 1))
    first = first.sum((1, 2, 3, 4, 5)) / law.sum((1, 2, 3, 4, 5))
    last = last.sum((0, 1, 2, 3, 5)) / law.sum((0, 1, 2, 3, 5))
    assert (first - last).abs().max() > 0.1, "with a horizon, V is of state and time"


def test_value_baseline():
    """E[Σ_t ∇ log π (G_t - V(s_t))] = ∇U   [Baseline, eq. 5]"""
    mdp, theta = MDP.layered(0, gamma=1.0), random_policy(1, 6, 2).log()
    mdp.r += 3
    value = mdp.value(theta.softmax(-1))[:, None].expand(6, 2)
    exact = jacobian(lambda x: mdp.objective(x.softmax(-1)), theta)
    check_baseline(mdp, theta, exact, lambda t: place(value, t, STEPS))


BASELINE = torch.tensor([3.0, -1.0, 0.5], dtype=F64)[:, None].expand(3, 2)  # any b(s)


def test_any_state_baseline_leaves_the_gradient(task):
    """E[Σ_t ∇ log π (G_t - b(s_t))] = ∇U   [Baseline, eq. 7]; not so if b depends on the action."""
    mdp, theta, gradient = task
    weight = lambda t, b=BASELINE: mdp.to_go(t, STEPS) - place(b, t, STEPS)  # noqa: E731
    close(estimator(mdp, theta, weight), gradient)
    of_actions = BASELINE * torch.tensor([1.0, 2.0], dtype=F64)
    assert not torch.allclose(estimator(mdp, theta, lambda t: weight(t, of_actions)), gradient)


def test_baseline_is_a_term_of_its_own(task):
    """= E[Σ ∇ log π G_t] - E[Σ ∇ log π b(s_t)]   [Baseline, eq. 8], for any b, even b(s, a)."""
    mdp, theta, gradient = task
    b = BASELINE * torch.tensor([1.0, 2.0], dtype=F64)
    together = estimator(mdp, theta, lambda t: mdp.to_go(t, STEPS) - place(b, t, STEPS))
    close(together, gradient - estimator(mdp, theta, lambda t: place(b, t, STEPS)))


def test_baseline_term_factors():
    """E[∇ log π b(s_t)], eq. 9, = E_{s_t}[b(s_t) E_{a_t}[∇ log π]], eq. 10, in [Baseline].

    The same with any f(s, a) for ∇ log π, whose mean is not 0.
    """
    mdp, theta = MDP.endless(0, 1.0, 3, 2), random_policy(0, 3, 2).log()
    f = scores(theta) + torch.randn(3, 2, 6, generator=generator(4), dtype=F64)
    law, marginals = mdp.law(theta.softmax(-1), STEPS), mdp.marginals(theta.softmax(-1), STEPS)
    for t in range(STEPS):
        joint = expectation(law, place(f * BASELINE[..., None], t, STEPS))
        inner = torch.einsum("sa,sad->sd", theta.softmax(-1), f)
        close(marginals[t] * BASELINE[:, 0] @ inner, joint)


def test_the_expected_score_is_zero(task):
    """Σ π ∇ log π = Σ ∇π = ∇ Σ π = ∇1 = 0   [Baseline, eq. 11]"""
    _, theta, _ = task
    pi = theta.softmax(-1)
    zero = torch.zeros(3, 6, dtype=F64)
    close(torch.einsum("sa,sad->sd", pi, scores(theta)), zero)
    close(jacobian(lambda x: x.softmax(-1), theta).sum(1), zero)
    close(jacobian(lambda x: x.softmax(-1).sum(-1), theta), zero)
    close(pi[..., None] * scores(theta), jacobian(lambda x: x.softmax(-1), theta))


def test_a_baseline_can_raise_the_variance():
    """[Baseline] says that it does reduce it. Even V can raise it, here sevenfold.

    Two actions, π = (0.9, 0.1), G = (1, 0), so V = 0.9; the best b is 0.1, G weighted by score².
    """
    pi, G = torch.tensor([0.9, 0.1], dtype=F64), torch.tensor([1.0, 0.0], dtype=F64)
    score = torch.tensor([0.1, -0.9], dtype=F64)  # of log(π_1/π_2)

    def variance(b):
        estimate = score * (G - b)
        return (pi * estimate**2).sum().item() - (pi * estimate).sum().item() ** 2

    best = ((pi * score**2 * G).sum() / (pi * score**2).sum()).item()
    assert best == pytest.approx(0.1) and variance(best) == pytest.approx(0)
    assert variance(0.9) > 7 * variance(0)


# Values


@pytest.fixture(params=[0, 1])
def valued(request):
    """A discounted MDP and a policy."""
    return MDP.endless(request.param, 0.9), random_policy(request.param + 5, 4, 3)


def test_return_of_an_episode():
    """G = R_1 + ... + R_T, of episodes played, has the mean J   [Rewards and Returns, eq. 2]"""
    mdp, pi = MDP.layered(0, gamma=1.0), random_policy(0, 6, 2)
    states, actions = mdp.sample(pi, STEPS, 50_000)
    within_noise(mdp.r[states, actions].sum(1), mdp.objective(pi))


def test_discounted_return():
    """G = Σ γ^k R_{k+1}, for rewards 1, 0, 1, 0, ... 1/(1 - γ²)   [Rewards and Returns, eq. 3]"""
    cycle = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]], dtype=F64)
    reward, start = torch.tensor([[1.0], [0.0]], dtype=F64), torch.tensor([1.0, 0.0], dtype=F64)
    mdp = MDP(cycle, reward, start, 0.9)
    total = sum(0.9**k * [1, 0][k % 2] for k in range(1000))
    assert total == pytest.approx(1 / (1 - 0.9**2))
    assert mdp.objective(torch.ones(2, 1, dtype=F64)).item() == pytest.approx(total)


def test_value_is_the_sum_of_discounted_rewards(valued):
    """V^π(s) = E[Σ_k γ^k r_{t+k} | s_t = s]

    [How do we learn the state-dependent baseline $V^\\pi(s)$?, eq. 1]
    """
    mdp, pi = valued
    for s, start in enumerate(torch.eye(4, dtype=F64)):
        rewards = mdp.marginals(pi, 500, start) @ (pi * mdp.r).sum(-1)
        close(mdp.discounts(500) @ rewards, mdp.value(pi)[s])


def test_the_sampled_return_is_unbiased():
    """V(s_t) ≈ G_t, its mean over trajectories played, G_t summed as in eq. 2

    [How do we learn the state-dependent baseline $V^\\pi(s)$?, eq. 3]
    """
    mdp, pi = MDP.layered(0, gamma=0.8), random_policy(1, 6, 2)
    states, actions = mdp.sample(pi, STEPS, 50_000)
    rewards = mdp.r[states, actions]
    for t in range(STEPS):
        G = sum(0.8 ** (k - t) * rewards[:, k] for k in range(t, STEPS))
        for s in (2 * t, 2 * t + 1):
            within_noise(G[states[:, t] == s], mdp.value(pi)[s])


def test_one_step_lookahead_is_unbiased_where_the_values_are_true(valued):
    """E[r + γ V^π(s')] = V^π(s), eq. 5, and so E[δ] = 0, eq. 6; of other values it is not.

    [How do we learn the state-dependent baseline $V^\\pi(s)$?, eq. 5]
    """
    mdp, pi = valued
    delta = lambda value: mdp.r[..., None] + 0.9 * value - value[:, None, None]  # noqa: E731
    close(mdp.expect(pi, delta(mdp.value(pi))), torch.zeros(4, dtype=F64), atol=1e-12, rtol=0)
    other = mdp.value(pi) + torch.tensor([1.0, 0, 0, 0], dtype=F64)
    bias = mdp.expect(pi, delta(other))
    close(bias, 0.9 * mdp.chain(pi)[:, 0] - torch.eye(4, dtype=F64)[0])


def test_the_squared_td_error_needs_a_stopped_gradient(valued):
    """Values that minimise E[δ²] itself, all of it differentiated, are not V^π.

    With r + γ V(s') held fixed, as eq. 7 of [How do we learn the state-dependent baseline
    $V^\\pi(s)$?] does not say, its gradient is 0 at V^π.
    """
    mdp, pi = valued
    weight = torch.einsum("sa,sat->sat", pi, mdp.p) / 4
    value = mdp.value(pi).requires_grad_()
    loss = lambda v, later: (
        weight * (mdp.r[..., None] + 0.9 * later - v[:, None, None]) ** 2
    ).sum()  # noqa: E731, E501
    half = torch.autograd.grad(loss(value, value.detach()), value)[0]
    whole = torch.autograd.grad(loss(value, value), value)[0]
    assert half.abs().max() < 1e-12 and whole.abs().max() > 0.01


def test_advantages_of_samples_are_right_on_average(valued):
    """E[G_t - V | s, a], eq. 8, and E[r + γ V(s') - V | s, a], eq. 9, are A^π; the second is biased
    where V is, the first is off by a number of the state.

    [How do we learn the state-dependent baseline $V^\\pi(s)$?, eq. 8] and its eq. 9
    """
    mdp, pi = MDP.layered(0, gamma=0.8), random_policy(1, 6, 2)
    law, wrong = mdp.law(pi, STEPS), mdp.value(pi) + torch.randn(6, generator=generator(0)).double()
    for value in (mdp.value(pi), wrong):
        off = (mdp.value(pi) - value)[:, None]
        for t in range(STEPS):
            axes = [axis for axis in range(6) if axis not in (2 * t, 2 * t + 1)]
            reached = slice(2 * t, 2 * t + 2)
            G = (law * mdp.to_go(t, STEPS)).sum(axes)[reached] / law.sum(axes)[reached]
            close(G - value[reached, None], (mdp.advantage(pi) + off)[reached])
        lookahead = mdp.r + 0.8 * mdp.p @ value - value[:, None]
        error = (lookahead - mdp.advantage(pi) - off).abs().max()
        assert error < 1e-12 if value is not wrong else error > 0.1


def test_advantage_is_the_lookahead_on_average_only(valued):
    """A^π = E_{s'}[r + γ V^π(s')] - V^π(s), which [Advantage Actor-Critic (A2C), eq. 1] and
    [Review: Actor-Critic and the Advantage Function, eq. 2] print without the expectation.
    """
    mdp, pi = valued
    value = mdp.value(pi)
    close(mdp.r + 0.9 * mdp.p @ value - value[:, None], mdp.advantage(pi))
    of_each = mdp.r[..., None] + 0.9 * value - value[:, None, None]  # every s'
    assert (of_each - mdp.advantage(pi)[..., None]).abs().max() > 0.1


def test_advantage_is_q_minus_v(valued):
    """A = Q - V, Q from a system over pairs, is the gain of acting a once and then as π.

    [Advantage Actor-Critic (A2C), eq. 2], [Review: Actor-Critic and the Advantage Function, eq. 3],
    [The Performance Difference Lemma, eq. 1],
    [Why do we maximize $Q^\\pi$ and not $A^\\pi$?, eq. 1]
    """
    mdp, pi = valued
    rewards = (pi * mdp.r).sum(-1)
    for s in range(4):
        for a in range(3):
            later = mdp.marginals(pi, 500, mdp.p[s, a]) @ rewards  # r_1, r_2, ...
            stays = mdp.marginals(pi, 500, torch.eye(4, dtype=F64)[s]) @ rewards
            gain = mdp.r[s, a] + 0.9 * mdp.discounts(500) @ later - mdp.discounts(500) @ stays
            close(gain, mdp.advantage(pi)[s, a])


def test_the_expected_advantage_is_zero(valued):
    """E_{a ~ π}[A^π] = 0

    [Advantage Actor-Critic (A2C), eq. 3], [The Performance Difference Lemma, eq. 2]
    """
    mdp, pi = valued
    expected = (pi * mdp.advantage(pi)).sum(-1)
    close(expected, torch.zeros(4, dtype=F64), atol=1e-12, rtol=0)
    assert (random_policy(0, 4, 3) * mdp.advantage(pi)).sum(-1).abs().max() > 0.1, "of others not"


def test_policy_gradient_with_the_advantage():
    """∇U = E[Σ_t γ^t ∇ log π A^π(s_t, a_t)], printed without γ^t, which is right for γ = 1 only.

    [Review: Actor-Critic and the Advantage Function, eq. 1], [The Core Actor-Critic Framework,
    eq. 1], the latter summed from t = 1.
    """
    for gamma in (1.0, 0.5):
        mdp, theta = MDP.layered(0, gamma), random_policy(1, 6, 2).log()
        exact = jacobian(lambda x: mdp.objective(x.softmax(-1)), theta)
        advantage = mdp.advantage(theta.softmax(-1))
        weight = lambda t: place(advantage, t, STEPS)  # noqa: E731
        close(estimator(mdp, theta, lambda t: mdp.gamma**t * weight(t)), exact)
        printed = estimator(mdp, theta, weight)
        assert torch.allclose(printed, exact) == (gamma == 1)
        assert not torch.allclose(estimator(mdp, theta, lambda t: weight(t) * (t >= 1)), exact)
