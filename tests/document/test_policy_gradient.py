"""The derivations from Markov decision processes to REINFORCE, line by line, on finite MDPs.

Both sides of each equation are computed, by different routes: sums over all trajectories, linear
solves, recursion backwards in time, autograd on the exact objective, quadrature, or simulation.
"""

import math

import numpy as np
import ppo
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
    within_noise,
)

close = torch.testing.assert_close


@pytest.fixture(params=[0, 1])
def task(request):
    """The document's case, no discount: an MDP, θ, and ∇U(θ) from the recursion backwards."""
    mdp = MDP.endless(request.param, gamma=1.0, states=3, actions=2)
    theta = random_policy(request.param + 10, 3, 2).log() * 2
    return mdp, theta, jacobian(lambda x: mdp.episode_value(x.softmax(-1), STEPS), theta)


# The process


def test_markov_property(task):
    """[Markovian States (Why History Can Be Thrown Away), eq. 1] of the law of trajectories.

    Where two states look alike, it does not hold.
    """
    mdp, theta, _ = task
    law = mdp.law(theta.softmax(-1), 3).sum(-1)  # s_0, a_0, s_1, a_1, s_2
    given_all = law / law.sum(-1, keepdim=True)
    given_last = law.sum((0, 1)) / law.sum((0, 1, 4))[..., None]
    close(given_all, given_last.expand_as(given_all))
    alike = torch.stack([law[:, :, 0] + law[:, :, 1], law[:, :, 2]], 2)
    given_all = alike / alike.sum(-1, keepdim=True)
    given_last = alike.sum((0, 1)) / alike.sum((0, 1, 4))[..., None]
    assert (given_all - given_last).abs().max() > 0.01


def test_stationary_policy(task):
    """π(a|s) = Pr(A_t = a | S_t = s) for all t   [Agent, Policy, Model, and Planning, eq. 1]"""
    mdp, theta, _ = task
    pi = theta.softmax(-1)
    states, actions = mdp.sample(pi, STEPS, 100_000)
    for t in range(STEPS):
        count = torch.zeros(3, 2, dtype=F64).index_put(
            (states[:, t], actions[:, t]), torch.ones((), dtype=F64), accumulate=True
        )
        close(count / count.sum(-1, keepdim=True), pi, atol=0.02, rtol=0)


def test_expected_reward_stands_for_the_reward(task):
    """r(s, a) = E[R_{t+1} | s, a] gives the return that rewards by successor give.

    [Rewards and Returns, eq. 1]
    """
    mdp, theta, _ = task
    pi, reward = theta.softmax(-1), torch.randn(3, 2, 3, generator=generator(5), dtype=F64)
    law = torch.einsum("satb,tbu->satbu", mdp.law(pi, 2), mdp.p)  # s_0, a_0, s_1, a_1, s_2
    exact = (law * (reward[..., None, None] + reward)).sum()
    mdp.r = torch.einsum("sat,sat->sa", mdp.p, reward)
    close(mdp.episode_value(pi, 2), exact)


def test_gradient_ascent(task):
    """θ + α ∇U gains α |∇U|² at first order   [Policy-Based RL, eq. 1]"""
    mdp, theta, gradient = task
    objective = lambda x: mdp.episode_value(x.view(3, 2).softmax(-1), STEPS)  # noqa: E731
    alpha = 1e-5
    ahead, behind = (theta.flatten() + a * gradient for a in (alpha, -alpha))
    close((objective(ahead) - objective(behind)) / (2 * alpha), gradient @ gradient)


# REINFORCE


def test_probability_of_a_trajectory(task):
    """[REINFORCE (or Monte Carlo Policy Gradient), eq. 4], with what it lacks.

    Of trajectories as in its eq. 1 the product needs p(s_0), and ends with π(a_H|s_H). As printed
    it adds up to the number of start states: it is the probability given s_0, one step longer.
    """
    mdp, theta, _ = task
    pi, n = theta.softmax(-1), 200_000
    states, actions = mdp.sample(pi, STEPS, n)
    index = torch.zeros(n, dtype=torch.int64)
    for t in range(STEPS):
        index = (index * 3 + states[:, t]) * 2 + actions[:, t]
    product = torch.zeros((3, 2) * STEPS, dtype=F64)
    printed = 0.0
    for tau in np.ndindex(*product.shape):
        s, a = tau[::2], tau[1::2]
        policy = math.prod(pi[s[t], a[t]].item() for t in range(STEPS))
        dynamics = math.prod(mdp.p[s[t], a[t], s[t + 1]].item() for t in range(STEPS - 1))
        product[tau] = mdp.start[s[0]] * dynamics * policy
        printed += sum(dynamics * policy * mdp.p[s[-1], a[-1], end].item() for end in range(3))
    frequency = torch.bincount(index, minlength=product.numel()) / n
    spread = (product * (1 - product) / n).sqrt().flatten()
    assert ((frequency - product.flatten()).abs() < 5 * spread).all()
    assert product.sum().item() == pytest.approx(1) and printed == pytest.approx(3)
    close(mdp.law(pi, STEPS), product)


def test_objective_is_the_mean_return_of_trajectories_played(task):
    """U = E_τ[R(τ)]   [REINFORCE (or Monte Carlo Policy Gradient), eq. 2]"""
    mdp, theta, _ = task
    states, actions = mdp.sample(theta.softmax(-1), STEPS, 100_000)
    exact = mdp.episode_value(theta.softmax(-1), STEPS)
    within_noise(mdp.r[states, actions].sum(-1), exact)


def test_objective_is_the_sum_over_trajectories(task):
    """U = Σ_τ P(τ) R(τ)   [REINFORCE (or Monte Carlo Policy Gradient), eq. 3]"""
    mdp, theta, _ = task
    law = mdp.law(theta.softmax(-1), STEPS)
    close((law * mdp.to_go(0, STEPS)).sum(), mdp.episode_value(theta.softmax(-1), STEPS))


def test_gradient_of_the_expectation(task):
    """∇U by differences of U = ∇ E_τ[R(τ)] over all trajectories, eq. 1 of the derivation."""
    mdp, theta, _ = task
    expected = lambda x: (mdp.law(x.softmax(-1), STEPS) * mdp.to_go(0, STEPS)).sum()  # noqa: E731
    ours = jacobian(expected, theta)
    for i, direction in enumerate(1e-5 * torch.eye(6, dtype=F64).view(6, 3, 2)):
        ahead, behind = ((theta + d).softmax(-1) for d in (direction, -direction))
        difference = mdp.episode_value(ahead, STEPS) - mdp.episode_value(behind, STEPS)
        assert ours[i].item() == pytest.approx(difference.item() / 2e-5, abs=1e-8)


def test_gradient_goes_into_the_sum(task):
    """∇U = Σ_τ ∇P(τ) R(τ)   [REINFORCE (or Monte Carlo Policy Gradient) / Derivation, eq. 2]"""
    mdp, theta, gradient = task
    of_law = jacobian(lambda x: mdp.law(x.softmax(-1), STEPS).flatten(), theta)
    close(mdp.to_go(0, STEPS).flatten() @ of_law, gradient)


def test_log_derivative_trick(task):
    """∇P = P ∇ log P, each trajectory   [REINFORCE (or Monte Carlo Policy Gradient) / Derivation,
    eq. 3]"""
    mdp, theta, _ = task
    law = lambda x: mdp.law(x.softmax(-1), STEPS).flatten()  # noqa: E731
    close(jacobian(law, theta), law(theta)[:, None] * jacobian(lambda x: law(x).log(), theta))


def test_gradient_as_a_sum_weighted_by_probability(task):
    """∇U = Σ_τ P ∇ log P R   [REINFORCE (or Monte Carlo Policy Gradient) / Derivation, eq. 4]"""
    mdp, theta, gradient = task
    law = mdp.law(theta.softmax(-1), STEPS).flatten()
    score = jacobian(lambda x: mdp.law(x.softmax(-1), STEPS).flatten().log(), theta)
    close((law * mdp.to_go(0, STEPS).flatten()) @ score, gradient)


def test_gradient_as_an_expectation(task):
    """∇U = E_τ[∇ log P R], τ played   [REINFORCE (or Monte Carlo Policy Gradient) / Derivation,
    eq. 5]"""
    mdp, theta, gradient = task
    score = jacobian(lambda x: mdp.law(x.softmax(-1), STEPS).log(), theta)
    states, actions = mdp.sample(theta.softmax(-1), STEPS, 50_000)
    index = tuple(x[:, t] for t in range(STEPS) for x in (states, actions))
    within_noise(score[index] * mdp.to_go(0, STEPS)[index][:, None], gradient)


def test_log_probability_of_a_trajectory(task):
    """log P(τ) = Σ log P(s'|s, a) + Σ log π(a|s), to which log p(s_0) belongs.

    [REINFORCE (or Monte Carlo Policy Gradient) / Derivation, eq. 6]
    """
    mdp, theta, _ = task
    policy = sum(place(theta.log_softmax(-1), t, STEPS) for t in range(STEPS))
    log_p = mdp.p.log()
    dynamics = log_p.view(3, 2, 3, 1, 1, 1) + log_p.view(1, 1, 3, 2, 3, 1)
    ours = mdp.start.log().view(3, 1, 1, 1, 1, 1) + dynamics + policy
    close(ours, mdp.law(theta.softmax(-1), STEPS).log())


def test_score_of_a_trajectory_is_the_sum_of_scores(task):
    """∇ log P(τ) = Σ_t ∇ log π

    [REINFORCE (or Monte Carlo Policy Gradient) / Derivation, eq. 7]
    """
    mdp, theta, _ = task
    ours = sum(place(scores(theta), t, STEPS) for t in range(STEPS))
    close(ours, jacobian(lambda x: mdp.law(x.softmax(-1), STEPS).log(), theta))


def test_every_score_takes_the_whole_return(task):
    """∇U = E[Σ_t ∇ log π R(τ)]

    [REINFORCE (or Monte Carlo Policy Gradient) / Derivation, eq. 8]
    """
    mdp, theta, gradient = task
    close(estimator(mdp, theta, lambda t: mdp.to_go(0, STEPS)), gradient)


def played_estimates(mdp, theta, to_go):
    """Σ_t ∇ log π R(τ), or with G_t for R(τ), of trajectories played: (n, |θ|)."""
    states, actions = mdp.sample(theta.softmax(-1), STEPS, 50_000)
    rewards = mdp.r[states, actions]
    weights = rewards.flip(1).cumsum(1).flip(1) if to_go else rewards.sum(1, keepdim=True)
    return (scores(theta)[states, actions] * weights[..., None]).sum(1)


def test_monte_carlo_gradient_of_whole_returns(task):
    """1/N Σ_i Σ_t ∇ log π R   [REINFORCE (or Monte Carlo Policy Gradient) / Derivation, eq. 9]"""
    mdp, theta, gradient = task
    within_noise(played_estimates(mdp, theta, to_go=False), gradient)


def test_an_action_does_not_affect_earlier_rewards(task):
    """E[∇ log π(a_t|s_t) r_k] = 0 for k < t, so G_t of eq. 10 may stand for R(τ)."""
    mdp, theta, gradient = task
    law, score = mdp.law(theta.softmax(-1), STEPS), scores(theta)
    for t in range(STEPS):
        for k in range(STEPS):
            product = place(score, t, STEPS) * place(mdp.r, k, STEPS)[..., None]
            assert (expectation(law, product).norm() < 1e-12) == (k < t)
    close(estimator(mdp, theta, lambda t: mdp.to_go(t, STEPS)), gradient)


def test_monte_carlo_gradient_of_returns_to_go(task):
    """1/N Σ_i Σ_t ∇ log π G_t

    [REINFORCE (or Monte Carlo Policy Gradient) / Derivation, eq. 11]
    """
    mdp, theta, gradient = task
    within_noise(played_estimates(mdp, theta, to_go=True), gradient)


@pytest.mark.parametrize("seed", range(3))
def test_a_discounted_return_needs_its_discount_in_the_gradient(seed):
    """Of U = E[Σ γ^t r_t], ∇U = E[Σ_t γ^t ∇ log π G_t]: the usual estimate leaves γ^t out.

    What is left then is another direction, not the gradient of U at all.
    """
    mdp, theta = MDP.endless(seed, 0.5, 3, 2), random_policy(seed, 3, 2).log()
    exact = jacobian(lambda x: mdp.episode_value(x.softmax(-1), STEPS), theta)
    close(estimator(mdp, theta, lambda t: 0.5**t * mdp.to_go(t, STEPS)), exact)
    without = estimator(mdp, theta, lambda t: mdp.to_go(t, STEPS))
    assert torch.cosine_similarity(without, exact, 0) < 0.999


# Gaussian policy


class Means:
    """m_θ(s) of two dimensions, curved in θ: (9,)."""

    theta = torch.randn(9, generator=generator(0), dtype=F64)
    s = torch.tensor([0.3, -1.2], dtype=F64)
    sigma = torch.tensor([[0.5, 0.2], [0.2, 0.8]], dtype=F64)  # Σ

    @staticmethod
    def mean(theta, s=s):
        return torch.tanh(theta[:6].view(3, 2) @ s)[:2] * theta[6:8] + theta[8]


def test_gaussian_samples_have_the_density():
    """a ~ N(m, σ²), [Gaussian Policy, eq. 2], has the distribution that eq. 1 names."""
    args = ppo.Args(env_id="TruncatesBox-v0", hidden=4, init_std=0.7)
    policy = ppo.make_policy(ppo.make_env(args), args)
    obs, n = np.array([[0.3, -1.2]], np.float32), 100_000
    rng = np.random.default_rng(0)
    actions = policy.sample(ppo.in_numpy(policy)(obs.repeat(n, 0)), rng)[:, 0]
    mean = policy(torch.from_numpy(obs)).item()
    grid = torch.linspace(mean - 7, mean + 7, 10_001, dtype=F64)
    log_std = torch.tensor([math.log(0.7)], dtype=F64)
    density = ppo.gaussian_log_prob(torch.tensor([mean], dtype=F64), log_std, grid[:, None]).exp()
    below = torch.cumulative_trapezoid(density, grid)
    assert below[-1].item() == pytest.approx(1, abs=1e-9)
    share = np.searchsorted(np.sort(actions), grid[1:].numpy()) / n
    assert np.abs(share - below.numpy()).max() < 2 / math.sqrt(n)  # Kolmogorov and Smirnov


def test_log_density_in_one_dimension():
    """log π = -(a - m)²/(2σ²) + C   [Gaussian Policy, eq. 3]"""
    a, mean = torch.linspace(-3, 3, 31, dtype=F64), torch.tensor(0.4, dtype=F64)
    reference = torch.distributions.Normal(mean, 0.7).log_prob(a)
    constant = reference + (a - mean) ** 2 / (2 * 0.7**2)
    close(constant, constant[:1].expand(31))
    assert constant[0].item() == pytest.approx(-math.log(0.7 * math.sqrt(2 * math.pi)))


def test_score_in_one_dimension():
    """∇ log π = (a - m)/σ² ∇m   [Gaussian Policy, eq. 4]"""
    mean = lambda x: Means.mean(x)[0]  # noqa: E731
    log_density = lambda x: torch.distributions.Normal(mean(x), 0.7).log_prob(a)  # noqa: E731
    a = torch.tensor(1.5, dtype=F64)
    ours = (a - mean(Means.theta)) / 0.7**2 * jacobian(mean, Means.theta)
    close(jacobian(log_density, Means.theta), ours)


def test_samples_in_two_dimensions():
    """a ~ N(m, Σ), [Gaussian Policy, eq. 7], is spread as the density of eq. 6 says.

    Of that density ½ (a - m)ᵀ Σ⁻¹ (a - m) is exponentially distributed.
    """
    n, mean = 100_000, Means.mean(Means.theta)
    noise = torch.randn(n, 2, generator=generator(1), dtype=F64)
    a = mean + noise @ torch.linalg.cholesky(Means.sigma).T
    half = -torch.distributions.MultivariateNormal(mean, Means.sigma).log_prob(a)
    half = half - math.log(2 * math.pi) - torch.linalg.det(Means.sigma).log() / 2
    share = torch.arange(1, n + 1, dtype=F64) / n
    assert (1 - (-half.sort().values).exp() - share).abs().max() < 2 / math.sqrt(n)
    close(a.T.cov(), Means.sigma, atol=0.01, rtol=0)


def test_score_in_two_dimensions():
    """∇ log π = (∇m)ᵀ Σ⁻¹ (a - m)   [Gaussian Policy, eq. 9], m = (m_1, m_2) as in eq. 5.

    Printed with ∇m behind, where shapes fit only if it is read as a row times a matrix.
    """
    a, mean = torch.tensor([1.5, -0.3], dtype=F64), Means.mean(Means.theta)
    normal = torch.distributions.MultivariateNormal
    score = jacobian(lambda x: normal(Means.mean(x), Means.sigma).log_prob(a), Means.theta)
    pull = torch.linalg.inv(Means.sigma) @ (a - mean)
    close(jacobian(Means.mean, Means.theta).T @ pull, score)
    rows = [jacobian(lambda x, i=i: Means.mean(x)[i], Means.theta) for i in (0, 1)]
    close(pull[0] * rows[0] + pull[1] * rows[1], score)
    assert torch.linalg.inv(Means.sigma)[0, 1] != 0, "the dimensions pull on each other"


def test_gaussian_update_follows_the_gradient():
    """E[Σ⁻¹ (a - m) ∇m G] = ∇E[G], by quadrature, G a cubic   [Gaussian Policy, eq. 10]"""
    x, weight = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(8))
    noise = torch.cartesian_prod(x, x)
    weight = torch.outer(weight, weight).flatten() / (2 * math.pi)
    root = torch.linalg.cholesky(Means.sigma)
    G = lambda a: a[:, 0] ** 3 - 2 * a[:, 0] * a[:, 1] + a[:, 1] ** 2 + 5  # noqa: E731
    expected = lambda x: weight @ G(Means.mean(x) + noise @ root.T)  # noqa: E731
    deviation = noise @ root.T  # a - m
    pull = deviation @ torch.linalg.inv(Means.sigma)
    update = (pull @ jacobian(Means.mean, Means.theta)) * G(Means.mean(Means.theta) + deviation)[
        :, None
    ]
    close(weight @ update, jacobian(expected, Means.theta))


# Softmax policy


class Scores:
    """h_θ(s, ·) of four actions, curved in θ: (10,); all derivatives by autograd."""

    theta = torch.randn(10, generator=generator(2), dtype=F64)

    @staticmethod
    def h(theta):
        hidden = torch.tanh(theta[:6].view(3, 2) @ torch.tensor([0.3, -1.2], dtype=F64))
        return torch.outer(theta[6:], hidden).sum(-1) + theta[6:] ** 2

    @staticmethod
    def policy(theta):
        return torch.distributions.Categorical(logits=Scores.h(theta)).probs


def test_softmax_is_the_policy():
    """π = exp h(a) / Σ_b exp h(b), of what is drawn as argmax h + Gumbel noise.

    [Softmax Policy, eq. 1], again as [Softmax Policy, eq. 7]
    """
    h, n = Scores.h(Scores.theta), 200_000
    uniform = torch.rand(n, 4, generator=generator(3), dtype=F64)
    drawn = (h - (-uniform.log()).log()).argmax(-1)
    pi = torch.stack([x.exp() / sum(b.exp() for b in h) for x in h])
    close(torch.bincount(drawn, minlength=4).double() / n, pi, atol=0.005, rtol=0)
    close(ppo.softmax_log_prob(h.expand(4, 4), torch.arange(4)).exp(), pi)


def test_softmax_score_is_a_difference():
    """∇ log π = ∇h(a) - ∇ log Σ_b exp h(b)   [Softmax Policy, eq. 3]"""
    log_sum = jacobian(lambda x: Scores.h(x).exp().sum().log(), Scores.theta)
    score = jacobian(lambda x: Scores.policy(x).log(), Scores.theta)
    close(jacobian(Scores.h, Scores.theta) - log_sum, score)


def test_gradient_of_the_logarithm_of_the_sum():
    """∇ log Σ exp h = ∇ Σ exp h / Σ exp h   [Softmax Policy, eq. 4]"""
    total = lambda x: Scores.h(x).exp().sum()  # noqa: E731
    ours = jacobian(total, Scores.theta) / total(Scores.theta)
    close(ours, jacobian(lambda x: Scores.h(x).logsumexp(-1), Scores.theta))


def test_gradient_of_the_sum():
    """∇ Σ exp h = Σ ∇ exp h = Σ exp h ∇h   [Softmax Policy, eq. 5]"""
    exact = jacobian(lambda x: Scores.h(x).exp().sum(), Scores.theta)
    close(jacobian(lambda x: Scores.h(x).exp(), Scores.theta).sum(0), exact)
    close(Scores.h(Scores.theta).exp() @ jacobian(Scores.h, Scores.theta), exact)


def test_gradient_of_the_logarithm_is_a_ratio():
    """∇ log Σ exp h = (Σ exp h ∇h) / Σ exp h = Σ (exp h / Σ exp h) ∇h   [Softmax Policy, eq. 6]"""
    exact = jacobian(lambda x: Scores.h(x).logsumexp(-1), Scores.theta)
    weight, of_h = Scores.h(Scores.theta).exp(), jacobian(Scores.h, Scores.theta)
    close(weight @ of_h / weight.sum(), exact)
    close((weight / weight.sum()) @ of_h, exact)


def test_gradient_of_the_logarithm_is_the_mean_gradient():
    """∇ log Σ exp h = Σ_b π(b) ∇h(b)   [Softmax Policy, eq. 8]"""
    exact = jacobian(lambda x: Scores.h(x).logsumexp(-1), Scores.theta)
    close(Scores.policy(Scores.theta) @ jacobian(Scores.h, Scores.theta), exact)


def test_softmax_score_compares_with_the_mean():
    """∇ log π(a) = ∇h(a) - Σ_b π(b) ∇h(b)   [Softmax Policy, eq. 9]"""
    of_h = jacobian(Scores.h, Scores.theta)
    actions = torch.arange(4)
    log_prob = lambda x: ppo.softmax_log_prob(Scores.h(x).expand(4, 4), actions)  # noqa: E731
    close(of_h - Scores.policy(Scores.theta) @ of_h, jacobian(log_prob, Scores.theta))
