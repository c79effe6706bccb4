"""Off-policy actor-critic and maximum entropy, line by line: finite MDPs, and quadrature."""

import itertools
import math

import numpy as np
import pytest
import torch
from mdp import F64, MDP, STEPS, generator, jacobian, random_policy

close = torch.testing.assert_close


@pytest.fixture(params=[0, 1])
def task(request):
    """A discounted MDP and a policy."""
    return MDP.endless(request.param, 0.9), random_policy(request.param + 5, 4, 3)


def best_values(mdp, soft_max, sweeps=1000):
    """Q = r + γ E[V(s')], V = soft_max(Q), until nothing changes: V and Q."""
    value = torch.zeros(4, dtype=F64)
    for _ in range(sweeps):
        q = mdp.r + mdp.gamma * mdp.p @ value
        value = soft_max(q)
    return value, q


# Value-based targets


def test_n_steps_of_rewards_before_the_value(task):
    """E[r_0 + ... + γ^{N-1} r_{N-1} + γ^N max Q*(s_N)] = Q* along the best actions.

    s is the first state. [Challenge 2: Reducing Error Compounding with N-Step Returns, eq. 2]
    leaves the last reward to the dots, and its s_{N+1} counts from s = s_1. Along actions of
    another policy, as a replay buffer has them, it is too low.
    """
    mdp, mu = task
    value, q = best_values(mdp, lambda q: q.max(-1).values)
    greedy = torch.eye(3, dtype=F64)[q.argmax(-1)]
    for N in (1, 2, 3):
        for policy, right in ((greedy, True), (mu, N == 1)):
            later = value  # of s_N
            for _ in range(N - 1):
                later = (policy * (mdp.r + 0.9 * mdp.p @ later)).sum(-1)
            y = mdp.r + 0.9 * mdp.p @ later
            assert torch.allclose(y, q) == right and (y <= q + 1e-9).all()


def test_the_double_estimate_errs_downwards():
    """Every outcome of two sample means of two coins, p = 0.6 and 0.4, for A and for B.

    E[max_a Q] is above max_a E[Q], and E[Q_B(argmax Q_A)] is not: it is below, not unbiased.
    """
    chance, flips = torch.tensor([0.6, 0.4], dtype=F64), list(itertools.product([0, 1], repeat=4))
    single = double = total = 0.0
    for a in flips:  # two flips of each coin
        for b in flips:
            bits = torch.tensor([a, b]).view(2, 2, 2)  # A and B, coin, flip
            p = torch.where(bits == 1, chance[:, None], 1 - chance[:, None]).prod().item()
            q_a, q_b = bits.double().mean(-1)
            ties = (q_a == q_a.max()).double()
            total += p
            single += p * q_a.max().item()
            double += p * (ties / ties.sum() @ q_b).item()
    right = 0.4752 + 0.3456 / 2  # how often A prefers the first coin, ties shared
    assert total == pytest.approx(1) and double == pytest.approx(0.4 + 0.2 * right)
    assert single == pytest.approx(((1 - 0.16 * 0.36) + (1 - 0.64 * 0.84)) / 2)
    assert double < 0.6 < single and 0.6 - double < single - 0.6


# Actor and critic off-policy


def test_the_objective_needs_the_actions_of_the_policy(task):
    """E_{s, a ~ μ}[Q(s, a)], [Option 2: Off-Policy Actor-Critic with a Learned Q-Function, eq. 1],
    does not depend on θ once the critic is there. With a ~ π_θ it is an objective, and its slope
    raises J.
    """
    mdp, mu = task
    theta, q = random_policy(9, 4, 3).log(), mdp.q(random_policy(9, 4, 3))
    printed = lambda x: mdp.visitation(mu) @ (mu * q).sum(-1) + 0 * x.sum()  # noqa: E731
    assert jacobian(printed, theta).norm() == 0
    meant = jacobian(lambda x: mdp.visitation(mu) @ (x.softmax(-1) * q).sum(-1), theta)
    of_J = jacobian(lambda x: mdp.objective(x.softmax(-1)), theta)
    assert meant @ of_J > 0.01 * meant.norm() * of_J.norm()


def test_targets_from_any_data_have_one_fixed_point(task):
    """Q ← r + γ E_{s', a' ~ π}[Q(s', a')] ends at Q^π, whichever pairs are updated how often.

    [Option 2: Off-Policy Actor-Critic with a Learned Q-Function, eq. 3]; a' of the behaviour μ
    would give Q^μ.
    """
    mdp, pi = task
    q, pairs = torch.zeros(4, 3, dtype=F64), torch.rand(4000, 4, 3, generator=generator(0)) < 0.2
    for update in pairs:
        y = mdp.r + 0.9 * mdp.p @ (pi * q).sum(-1)
        q = torch.where(update, y, q)
    close(q, mdp.q(pi))
    assert (mdp.q(random_policy(9, 4, 3)) - q).abs().max() > 0.1


def test_the_same_policy_maximises_q_and_advantage(task):
    """argmax_π E_π[Q^μ - V^μ] = argmax_π E_π[Q^μ], critic and states held fixed; the maxima differ
    by E[V^μ], where "=" is printed between them.

    [Why do we maximize $Q^\\pi$ and not $A^\\pi$?, eq. 2] and its eq. 3
    """
    mdp, mu = task
    d = mdp.visitation(random_policy(8, 4, 3))  # of a buffer
    policies = [torch.eye(3, dtype=F64)[list(c)] for c in itertools.product(range(3), repeat=4)]
    by_advantage = torch.stack([d @ (x * mdp.advantage(mu)).sum(-1) for x in policies])
    by_difference = torch.stack([d @ ((x * mdp.q(mu)).sum(-1) - mdp.value(mu)) for x in policies])
    by_q = torch.stack([d @ (x * mdp.q(mu)).sum(-1) for x in policies])
    close(by_advantage, by_difference)
    assert by_advantage.argmax() == by_q.argmax()
    close(by_q.max() - by_advantage.max(), d @ mdp.value(mu))
    assert abs(d @ mdp.value(mu)) > 0.01


def test_the_expected_advantage_of_the_policy_itself_cannot_be_maximised(task):
    """E_{s, a ~ π_θ}[A^{π_θ}] = 0 for every θ: V^π is a constant only while the critic is.

    [Why do we maximize $Q^\\pi$ and not $A^\\pi$?, eq. 2] as printed
    """
    mdp, mu = task
    for seed in range(5):
        theta = random_policy(seed, 4, 3).log()
        objective = lambda x: mdp.visitation(mu) @ (x * mdp.advantage(x)).sum(-1)  # noqa: E731
        assert abs(objective(theta.softmax(-1))) < 1e-12
        assert jacobian(lambda x: objective(x.softmax(-1)), theta).abs().max() < 1e-12


# A critic Q(s, a) and an actor a_θ(s) of two dimensions, both curved.


def critic(a):
    return torch.sin(a[..., 0] + 2 * a[..., 1]) + a[..., 0] ** 2 * a[..., 1]


def actor(theta):
    return torch.tanh(theta.view(2, 3) @ torch.tensor([0.5, -1.0, 0.3], dtype=F64))


THETA = torch.randn(6, generator=generator(3), dtype=F64)


def test_the_gradient_goes_through_the_action():
    """∇_θ Q(s, a_θ(s)) = ∇_a Q ∇_θ a_θ, the left by differences

    [The Deterministic Policy Gradient: How Backprop Works Through the Critic, eq. 1]
    """
    ours = jacobian(critic, actor(THETA)) @ jacobian(actor, THETA)
    for i, direction in enumerate(1e-5 * torch.eye(6, dtype=F64)):
        ahead, behind = critic(actor(THETA + direction)), critic(actor(THETA - direction))
        assert ours[i].item() == pytest.approx(((ahead - behind) / 2e-5).item(), abs=1e-8)


def quadrature(points=40):
    """ε and its weights for E[f(ε)], ε ~ N(0, 1)."""
    x, weight = np.polynomial.hermite_e.hermegauss(points)
    return torch.from_numpy(x), torch.from_numpy(weight / math.sqrt(2 * math.pi))


def test_reparameterised_actions_have_the_gradient():
    """a = m + σ ε: E[∇Q(m + σ ε)] = ∇E[Q] = E[∇ log π Q], in mean and deviation."""
    epsilon, weight = quadrature()
    Q = lambda a: a**3 - 2 * a**2 + a  # noqa: E731  so E[Q] = m³ + 3mσ² - 2m² - 2σ² + m
    m, sigma = torch.tensor([0.7, 0.5], dtype=F64)
    exact = [3 * m**2 + 3 * sigma**2 - 4 * m + 1, 6 * m * sigma - 4 * sigma]
    x = torch.stack([m, sigma])
    close(jacobian(lambda x: weight @ Q(x[0] + x[1] * epsilon), x), torch.stack(exact))
    a = m + sigma * epsilon
    score = jacobian(lambda x: torch.distributions.Normal(x[0], x[1]).log_prob(a), x)
    close((weight * Q(a)) @ score, torch.stack(exact))


def test_the_density_of_a_squashed_gaussian():
    """a = tanh u, u ~ N(m, σ²): log π(a) = log N(u) - log(1 - tanh² u), which the document leaves
    out. Its integral is 1, and over a < x it is Pr(u < artanh x); without the term it is not.
    """
    normal, a = (
        torch.distributions.Normal(0.3, 0.8),
        torch.linspace(-1, 1, 400_001, dtype=F64)[1:-1],
    )
    u = a.atanh()
    log_density = normal.log_prob(u) - (1 - u.tanh() ** 2).log()
    below = torch.cumulative_trapezoid(log_density.exp(), a)
    close(below, normal.cdf(u)[1:], atol=1e-6, rtol=0)
    assert below[-1].item() == pytest.approx(1, abs=1e-5)
    assert torch.trapezoid(normal.log_prob(u).exp(), a) < 0.9
    wide = torch.linspace(-30, 30, 1001, dtype=F64)
    stable = 2 * (math.log(2) - wide - torch.nn.functional.softplus(-2 * wide))
    exact = (1 - wide.tanh() ** 2).log()
    assert exact.isinf().any() and stable.isfinite().all()
    close(stable[exact > -20], exact[exact > -20], atol=1e-6, rtol=1e-6)


# Maximum entropy

ALPHA = 0.4


def entropy(pi):
    return torch.distributions.Categorical(pi).entropy()


def soft_value(mdp, pi, alpha=ALPHA):
    """V of rewards r + α H(π(·|s)), by a linear solve: (S,)."""
    return mdp.value(pi, mdp.r + alpha * entropy(pi)[:, None])


def soft_q(mdp, pi, alpha=ALPHA):
    """Q = r + γ E[V], without the entropy of its own first action: (S, A)."""
    return mdp.r + mdp.gamma * mdp.p @ soft_value(mdp, pi, alpha)


def soft_best(mdp, alpha=ALPHA):
    """V and Q of soft value iteration, V = α log Σ exp(Q/α)."""
    return best_values(mdp, lambda q: alpha * (q / alpha).logsumexp(-1))


def test_the_best_return(task):
    """π*_RL of value iteration has the largest E[Σ γ^t r] of all policies, deterministic or not.

    [What is Maximum Entropy RL?, eq. 1]
    """
    mdp, _ = task
    value, q = best_values(mdp, lambda q: q.max(-1).values)
    best = torch.eye(3, dtype=F64)[q.argmax(-1)]
    J = lambda pi: mdp.discounts(500) @ (mdp.marginals(pi, 500) @ (pi * mdp.r).sum(-1))  # noqa: E731
    close(J(best), mdp.start @ value)
    others = [torch.eye(3, dtype=F64)[list(c)] for c in itertools.product(range(3), repeat=4)]
    others += [0.9 * best + 0.1 * random_policy(seed, 4, 3) for seed in range(50)]
    assert max(J(pi).item() for pi in others) <= J(best).item() + 1e-9


def test_soft_value_iteration_finds_the_policy_of_maximum_entropy(task):
    """π ∝ exp(Q/α) of V = α log Σ exp(Q/α) has the largest E[Σ γ^t (r + α H)]: its value is V, no
    logit has a slope, and others have less   [What is Maximum Entropy RL?, eq. 2]
    """
    mdp, pi = task
    value, q = soft_best(mdp)
    best = (q / ALPHA).softmax(-1)
    rewards = lambda pi: (pi * mdp.r).sum(-1) + ALPHA * entropy(pi)  # noqa: E731
    J = lambda pi: mdp.discounts(500) @ (mdp.marginals(pi, 500) @ rewards(pi))  # noqa: E731
    close(J(best), mdp.start @ value)
    assert jacobian(lambda x: J(x.softmax(-1)), best.log()).abs().max() < 1e-9
    near = [0.95 * best + 0.05 * random_policy(seed, 4, 3) for seed in range(50)]
    greedy = torch.eye(3, dtype=F64)[q.argmax(-1)]
    assert max(J(other).item() for other in [pi, greedy, *near]) < J(best).item()


def test_temperature_from_the_best_return_to_uniform(task):
    """Small α recovers standard RL, large α the uniform policy."""
    mdp, _ = task
    value, q = best_values(mdp, lambda q: q.max(-1).values)
    close(soft_best(mdp, 1e-5)[0], value, atol=2e-4, rtol=0)
    close(
        (soft_best(mdp, 1e6)[1] / 1e6).softmax(-1),
        torch.full((4, 3), 1 / 3, dtype=F64),
        atol=1e-5,
        rtol=0,
    )


def test_the_entropy_goes_into_the_reward():
    """E_τ[Σ γ^t (r - α log π(a_t|s_t))] = E_τ[Σ γ^t (r + α H)] over all trajectories, as values and
    as gradients, so both have one argmax   [Simplifying the MaxEnt Objective, eq. 1]
    """
    mdp, theta = MDP.layered(0, 0.8), random_policy(1, 6, 2).log()

    def expected(reward):
        return lambda x: (
            mdp.law(x.softmax(-1), STEPS) * mdp.to_go(0, STEPS, reward(x.log_softmax(-1)))
        ).sum()

    by_action = expected(lambda logp: mdp.r - ALPHA * logp)
    by_entropy = expected(lambda logp: mdp.r - ALPHA * (logp.exp() * logp).sum(-1, keepdim=True))
    close(by_action(theta), by_entropy(theta))
    close(jacobian(by_action, theta), jacobian(by_entropy, theta))
    close(by_entropy(theta), mdp.start @ soft_value(mdp, theta.softmax(-1)))


def test_the_modified_reward_has_another_q(task):
    """Standard RL with r̃ = r - α log π: V^π of r̃ is the soft V, but Q^π of r̃ is Q - α log π.

    Substituting r̃ into the Bellman equation, as [The SAC Q-Function] says, gives that and not its
    eq. 1, whose Q leaves out the bonus of a itself   [Simplifying the MaxEnt Objective, eq. 2]
    """
    mdp, pi = task
    modified = mdp.r - ALPHA * pi.log()
    value = mdp.value(pi, modified)
    close(value, soft_value(mdp, pi))
    substituted = modified + 0.9 * mdp.p @ value  # Q^π of r̃
    close((pi * substituted).sum(-1), value)
    close(substituted, soft_q(mdp, pi) - ALPHA * pi.log())
    assert (substituted - soft_q(mdp, pi)).abs().max() > 0.1


def test_soft_policy_evaluation(task):
    """Q ← r + γ E_{s', a'}[Q - α log π] ends at r + γ E[V], V of rewards with entropy. The
    expectation over s' is not printed   [The SAC Q-Function, eq. 1]
    """
    mdp, pi = task
    q = torch.zeros(4, 3, dtype=F64)
    for _ in range(500):
        q = mdp.r + 0.9 * mdp.p @ (pi * (q - ALPHA * pi.log())).sum(-1)
    close(q, soft_q(mdp, pi))
    close((pi * (q - ALPHA * pi.log())).sum(-1), soft_value(mdp, pi))


def test_soft_policy_improvement(task):
    """E_π[Q - α log π] is largest, α log Σ exp(Q/α), at π ∝ exp(Q/α); its slope is that of
    E[∇ log π (Q - α log π)], as E[∇ log π] = 0; and the step improves every state.

    [SAC's Policy Update, eq. 1]
    """
    mdp, pi = task
    q, theta = soft_q(mdp, pi), pi.log()
    improved = (q / ALPHA).softmax(-1)
    objective = lambda x: (x.softmax(-1) * (q - ALPHA * x.log_softmax(-1))).sum(-1)  # noqa: E731
    close(objective(improved.log()), ALPHA * (q / ALPHA).logsumexp(-1))
    kl = (pi * (pi / improved).log()).sum(-1)
    close(objective(theta), objective(improved.log()) - ALPHA * kl)
    score = jacobian(lambda x: x.log_softmax(-1), theta)
    ours = torch.einsum("sa,sa,sad->sd", pi, q - ALPHA * pi.log(), score)
    close(jacobian(objective, theta), ours)
    assert (soft_value(mdp, improved) > soft_value(mdp, pi)).all()
    for _ in range(50):
        improved = (soft_q(mdp, improved) / ALPHA).softmax(-1)
    close(soft_value(mdp, improved), soft_best(mdp)[0])
