"""From the performance difference lemma to AWR, line by line, on finite MDPs.

π is the policy judged, μ the one whose advantages and states are used.
"""

import itertools
import math

import pytest
import torch
from mdp import F64, MDP, STEPS, generator, jacobian, place, random_policy

close = torch.testing.assert_close
LONG = 1000  # steps after which γ^t is nothing


@pytest.fixture(params=[0.5, 0.9, 0.95], ids=lambda gamma: f"gamma{gamma}")
def pair(request):
    """An endless MDP and two policies far apart."""
    seed = int(100 * request.param)
    mdp = MDP.endless(seed, request.param)
    return mdp, random_policy(seed + 1, 4, 3), random_policy(seed + 2, 4, 3)


@pytest.fixture(params=[0, 1])
def short(request):
    """An MDP that ends after three steps, so that its trajectories can be summed over."""
    mdp = MDP.layered(request.param, 0.8)
    return mdp, random_policy(request.param + 1, 6, 2), random_policy(request.param + 2, 6, 2)


def discounted(mdp, pi, f, start=None):
    """Σ_t γ^t E_{s_t ~ p_π(s_t), a_t ~ π}[f(s_t, a_t)], from the distribution at each step."""
    return mdp.discounts(LONG) @ (mdp.marginals(pi, LONG, start) @ (pi * f).sum(-1))


def mean_over_trajectories(mdp, pi, f, start=None):
    """E_τ[Σ_t γ^t f(s_t, a_t)] by summing over all trajectories of a short MDP."""
    return (mdp.law(pi, STEPS, start) * mdp.to_go(0, STEPS, f)).sum()


def difference(mdp, pi, mu):
    """V^π - V^μ, (S,)."""
    return mdp.value(pi) - mdp.value(mu)


# The performance difference lemma


def test_the_lemma(pair):
    """J(π) - J(μ) = E_{τ ~ π}[Σ γ^t A^μ]

    [The Performance Difference Lemma, eq. 3], again as its derivation's last line, eq. 20
    """
    mdp, pi, mu = pair
    close(discounted(mdp, pi, mdp.advantage(mu)), mdp.objective(pi) - mdp.objective(mu))


def test_objective_is_the_expected_discounted_return(short):
    """J(π) = E_τ[Σ γ^t r] = E_{s_0}[V^π(s_0)]

    [The Performance Difference Lemma / Derivation, eq. 1], its eq. 2, and for μ its eq. 3
    """
    for pi in short[1:]:
        mdp = short[0]
        close(mean_over_trajectories(mdp, pi, mdp.r), mdp.start @ mdp.value(pi))


def test_difference_of_expectations_is_the_expected_difference(short):
    """J(π) - J(μ) = E[V^π] - E[V^μ] = E_{s_0}[V^π(s_0) - V^μ(s_0)], J by summing trajectories.

    [The Performance Difference Lemma / Derivation, eq. 4], its eq. 5 and eq. 18
    """
    mdp, pi, mu = short
    exact = mean_over_trajectories(mdp, pi, mdp.r) - mean_over_trajectories(mdp, mu, mdp.r)
    close(mdp.start @ mdp.value(pi) - mdp.start @ mdp.value(mu), exact)
    close(mdp.start @ difference(mdp, pi, mu), exact)


def test_bellman_equation(pair):
    """V^π(s) = E_{a, s'}[r + γ V^π(s')], V^π as the sum of discounted rewards from s.

    [The Performance Difference Lemma / Derivation, eq. 6], for s = s_0 its eq. 7
    """
    mdp, pi, _ = pair
    value = torch.stack([discounted(mdp, pi, mdp.r, s) for s in torch.eye(4, dtype=F64)])
    close(mdp.expect(pi, mdp.r[..., None] + mdp.gamma * value), value)


def test_the_bellman_equation_is_put_in(pair):
    """V^π - V^μ = E[r + γ V^π(s_1)] - V^μ

    [The Performance Difference Lemma / Derivation, eq. 8]
    """
    mdp, pi, mu = pair
    ours = mdp.expect(pi, mdp.r[..., None] + mdp.gamma * mdp.value(pi)) - mdp.value(mu)
    close(ours, difference(mdp, pi, mu))


def test_the_other_value_is_added_and_taken_away(pair):
    """V^π - V^μ = E[r + γ V^π(s_1) - γ V^μ(s_1) + γ V^μ(s_1)] - V^μ

    [The Performance Difference Lemma / Derivation, eq. 9]
    """
    mdp, pi, mu = pair
    later, other = mdp.gamma * mdp.value(pi), mdp.gamma * mdp.value(mu)
    ours = mdp.expect(pi, mdp.r[..., None] + later - other + other) - mdp.value(mu)
    close(ours, difference(mdp, pi, mu))


def test_terms_are_rearranged(pair):
    """V^π - V^μ = E[r + γ V^μ(s_1) - V^μ(s_0) + γ (V^π(s_1) - V^μ(s_1))]

    [The Performance Difference Lemma / Derivation, eq. 10]
    """
    mdp, pi, mu = pair
    lookahead = mdp.r[..., None] + mdp.gamma * mdp.value(mu) - mdp.value(mu)[:, None, None]
    ours = mdp.expect(pi, lookahead + mdp.gamma * difference(mdp, pi, mu))
    close(ours, difference(mdp, pi, mu))


def test_the_advantage_is_the_lookahead_in_expectation_over_the_successor(pair):
    """A^μ = Q^μ - V^μ = E_{s_1}[r + γ V^μ(s_1)] - V^μ(s_0), printed without the expectation.

    [The Performance Difference Lemma / Derivation, eq. 11]
    """
    mdp, _, mu = pair
    value = mdp.value(mu)
    close(mdp.r + mdp.gamma * mdp.p @ value - value[:, None], mdp.q(mu) - value[:, None])
    of_each = mdp.r[..., None] + mdp.gamma * value - value[:, None, None]  # every s_1
    assert (of_each - mdp.advantage(mu)[..., None]).abs().max() > 0.1


def test_the_difference_repeats_itself_a_step_later(pair):
    """V^π - V^μ = E[A^μ(s_0, a_0) + γ (V^π(s_1) - V^μ(s_1))], from any s_0, so from any s_1 too.

    [The Performance Difference Lemma / Derivation, eq. 12] and its eq. 13
    """
    mdp, pi, mu = pair
    advantage = mdp.advantage(mu)[..., None]
    ours = mdp.expect(pi, advantage + mdp.gamma * difference(mdp, pi, mu))
    close(ours, difference(mdp, pi, mu))


def test_unrolled_twice(pair):
    """V^π - V^μ = E[A^μ(s_0, a_0) + γ E[A^μ(s_1, a_1) + γ (V^π(s_2) - V^μ(s_2))]]

    [The Performance Difference Lemma / Derivation, eq. 14]
    """
    mdp, pi, mu = pair
    advantage = mdp.advantage(mu)[..., None]
    inner = mdp.expect(pi, advantage + mdp.gamma * difference(mdp, pi, mu))  # of s_1
    close(mdp.expect(pi, advantage + mdp.gamma * inner), difference(mdp, pi, mu))


def test_the_expectation_is_distributed(pair):
    """V^π - V^μ = E[A^μ_0] + γ E[A^μ_1] + γ² E[V^π(s_2) - V^μ(s_2)]

    The expectations are by the law of s_1 and of s_2 given s_0.
    [The Performance Difference Lemma / Derivation, eq. 15]
    """
    mdp, pi, mu = pair
    advantage, gamma = (pi * mdp.advantage(mu)).sum(-1), mdp.gamma
    for s, start in enumerate(torch.eye(4, dtype=F64)):
        p_0, p_1, p_2 = mdp.marginals(pi, 3, start)
        rest = gamma**2 * p_2 @ difference(mdp, pi, mu)
        close(p_0 @ advantage + gamma * p_1 @ advantage + rest, difference(mdp, pi, mu)[s])


def test_unrolled_for_ever(pair):
    """V^π(s_0) - V^μ(s_0) = Σ_t γ^t E[A^μ(s_t, a_t)] with s_0 fixed on both sides.

    The document averages the right side over s_0 ~ p(s_0), which gives J(π) - J(μ) instead.
    [The Performance Difference Lemma / Derivation, eq. 16]
    """
    mdp, pi, mu = pair
    averaged = discounted(mdp, pi, mdp.advantage(mu))
    for s, start in enumerate(torch.eye(4, dtype=F64)):
        close(discounted(mdp, pi, mdp.advantage(mu), start), difference(mdp, pi, mu)[s])
    assert (difference(mdp, pi, mu) - averaged).abs().max() > 0.01


def test_the_sum_goes_into_the_expectation(short):
    """V^π(s_0) - V^μ(s_0) = E_τ[Σ γ^t A^μ] over trajectories from that s_0.

    [The Performance Difference Lemma / Derivation, eq. 17]
    """
    mdp, pi, mu = short
    for s, start in enumerate(torch.eye(6, dtype=F64)[:2]):
        ours = mean_over_trajectories(mdp, pi, mdp.advantage(mu), start)
        close(ours, difference(mdp, pi, mu)[s])


def test_the_mean_over_starts(short):
    """J(π) - J(μ) = E_{s_0}[E_τ[Σ γ^t A^μ]], the inner one given s_0, = E_τ[Σ γ^t A^μ].

    [The Performance Difference Lemma / Derivation, eq. 19] and its eq. 20
    """
    mdp, pi, mu = short
    exact, advantage = mdp.objective(pi) - mdp.objective(mu), mdp.advantage(mu)
    starts = torch.eye(6, dtype=F64)
    inner = torch.stack([mean_over_trajectories(mdp, pi, advantage, s) for s in starts[:2]])
    close(mdp.start[:2] @ inner, exact)
    close(mean_over_trajectories(mdp, pi, advantage), exact)


# Visitation


@pytest.fixture
def f():
    """Any function of state and action, (4, 3)."""
    return torch.randn(4, 3, generator=generator(7), dtype=F64)


def test_visitation_is_a_distribution(pair):
    """d^π(s) = (1 - γ) Σ γ^t p_π(s_t = s), its balance equation solved   [Some Additional Math,
    eq. 2]"""
    mdp, pi, _ = pair
    d = (1 - mdp.gamma) * mdp.discounts(LONG) @ mdp.marginals(pi, LONG)
    close(d, mdp.visitation(pi))
    assert d.sum().item() == pytest.approx(1) and d.min() > 0


def test_time_is_replaced_by_visitation(pair, f):
    """E_τ[Σ γ^t f] = 1/(1 - γ) E_{d^π}[E_π[f]], the left as the value of rewards f.

    [Some Additional Math, eq. 1] and its eq. 10
    """
    mdp, pi, _ = pair
    ours = mdp.visitation(pi) @ (pi * f).sum(-1) / (1 - mdp.gamma)
    close(ours, mdp.start @ mdp.value(pi, f))


def test_expectation_of_the_sum_is_the_sum_of_expectations(short):
    """E_τ[Σ γ^t f] = Σ γ^t E_τ[f(s_t, a_t)]   [Some Additional Math, eq. 3] and its eq. 4"""
    mdp, pi, _ = short
    f, law = torch.randn(6, 2, generator=generator(7), dtype=F64), mdp.law(pi, STEPS)
    ours = sum(0.8**t * (law * place(f, t, STEPS)).sum() for t in range(STEPS))
    close(ours, mean_over_trajectories(mdp, pi, f))
    close(ours, mdp.start @ mdp.value(pi, f))


def test_expectation_over_trajectories_is_over_marginals(short):
    """E_τ[f(s_t, a_t)] = E_{s_t}[E_{a_t}[f]], each t   [Some Additional Math, eq. 5]"""
    mdp, pi, _ = short
    f, law = torch.randn(6, 2, generator=generator(7), dtype=F64), mdp.law(pi, STEPS)
    for t, p_t in enumerate(mdp.marginals(pi, STEPS)):
        close(p_t @ (pi * f).sum(-1), (law * place(f, t, STEPS)).sum())


def test_multiplied_and_divided_by_one_minus_gamma(pair, f):
    """= 1/(1 - γ) Σ (1 - γ) γ^t E_{s_t}[E_{a_t}[f]], weights that add up to 1.

    [Some Additional Math, eq. 6]
    """
    mdp, pi, _ = pair
    weights = (1 - mdp.gamma) * mdp.discounts(LONG)
    assert weights.sum().item() == pytest.approx(1)
    ours = weights @ (mdp.marginals(pi, LONG) @ (pi * f).sum(-1)) / (1 - mdp.gamma)
    close(ours, mdp.start @ mdp.value(pi, f))


def test_weighted_times_are_the_visitation(pair, f):
    """Σ (1 - γ) γ^t E_{s_t}[g] = E_{d^π}[g], d^π from its balance equation

    [Some Additional Math, eq. 7]
    """
    mdp, pi, _ = pair
    g = f[:, 0]
    ours = sum(
        (1 - mdp.gamma) * mdp.gamma**t * (p @ g) for t, p in enumerate(mdp.marginals(pi, LONG))
    )
    close(ours, mdp.visitation(pi) @ g)


def test_sums_over_states_and_times_change_places(pair, f):
    """Σ_s [(1 - γ) Σ_t γ^t p(s_t = s)] g(s), eq. 8, = Σ_t (1 - γ) γ^t Σ_s p(s_t = s) g(s), eq. 9.

    Both are E_{d^π}[g]   [Some Additional Math, eq. 8] and its eq. 9
    """
    mdp, pi, _ = pair
    g, p, gamma = f[:, 0], mdp.marginals(pi, LONG), mdp.gamma
    by_state = sum((1 - gamma) * (mdp.discounts(LONG) @ p[:, s]) * g[s] for s in range(4))
    by_time = sum((1 - gamma) * gamma**t * sum(p[t] * g) for t in range(LONG))
    for ours in (by_state, by_time):
        close(ours, mdp.visitation(pi) @ g)


def test_the_lemma_by_visitation(pair):
    """J(π) - J(μ) = 1/(1 - γ) E_{d^π}[E_π[A^μ]]   [Some Additional Math, eq. 11]"""
    mdp, pi, mu = pair
    ours = mdp.visitation(pi) @ (pi * mdp.advantage(mu)).sum(-1) / (1 - mdp.gamma)
    close(ours, mdp.objective(pi) - mdp.objective(mu))


# The optimisation problem


def deterministic_policies(states, actions):
    for choice in itertools.product(range(actions), repeat=states):
        yield torch.eye(actions, dtype=F64)[list(choice)]


def surrogate(mdp, pi, mu):
    """Σ_t E_{s_t ~ p_μ}[E_{a_t ~ π}[γ^t A^μ]], right side of [The Optimization Problem, eq. 2]"""
    advantage = (pi * mdp.advantage(mu)).sum(-1)
    return mdp.discounts(LONG) @ (mdp.marginals(mu, LONG) @ advantage)


def total_variation(p, q):
    """½ Σ |p - q|, over the last axis."""
    return (p - q).abs().sum(-1) / 2


def test_the_best_policy_has_the_largest_sum_of_advantages(pair):
    """max_π (J(π) - J(μ)) = max_π E_{τ ~ π}[Σ γ^t A^μ], whatever μ is: over all that are
    deterministic, among which the best policies are   [The Optimization Problem, eq. 1]
    """
    mdp, pi, mu = pair
    policies = [*deterministic_policies(4, 3), pi, mu]
    left = torch.stack([mdp.objective(x) - mdp.objective(mu) for x in policies])
    right = torch.stack([discounted(mdp, x, mdp.advantage(mu)) for x in policies])
    close(right.max(), left.max())
    assert right.argmax() == left.argmax() < len(policies) - 2


def test_one_greedy_step_improves_but_is_not_the_end():
    """argmax A^μ, [The Value-Based Approach, eq. 1], is better than μ; repeated, best of all.

    "The optimal policy by taking the argmax" would be true of A* only.
    """
    steps = set()
    for seed in range(20):
        mdp, mu = MDP.endless(seed, 0.95), random_policy(seed, 4, 3)
        best = max(mdp.objective(x).item() for x in deterministic_policies(4, 3))
        found = []
        while not found or found[-1] < best - 1e-9:
            greedy = torch.eye(3, dtype=F64)[mdp.advantage(mu).argmax(-1)]
            assert (mdp.value(greedy) >= mdp.value(mu) - 1e-9).all()
            mu, found = greedy, [*found, mdp.objective(greedy).item()]
        steps.add(len(found))
    assert max(steps) > 1


def test_the_surrogate_is_right_to_first_order(pair):
    """On π_x = (1 - x) μ + x π its error is of order x²: halving x quarters it.

    At x = 0 its slope is that of J   [The Optimization Problem, eq. 2]
    """
    mdp, pi, mu = pair

    def error(x):
        mixed = (1 - x) * mu + x * pi
        return (mdp.objective(mixed) - mdp.objective(mu) - surrogate(mdp, mixed, mu)).item()

    assert error(0) == pytest.approx(0, abs=1e-12) and abs(error(1)) > 1e-3
    assert error(1e-3) / error(5e-4) == pytest.approx(4, rel=0.02)
    assert abs(error(1e-3)) < 1e-3 * abs(surrogate(mdp, 0.999 * mu + 1e-3 * pi, mu).item())


def test_the_error_of_the_surrogate_is_bounded_by_the_divergence(pair):
    """|error| ≤ 2γ/(1 - γ)² max_s |E_π[A^μ]| E_{d^μ}[D], as close states make close visitation:
    Σ |d^π - d^μ| ≤ 2γ/(1 - γ) E_{d^μ}[D]. D = total variation, with ½, averaged over d^μ

    [Different Divergence Choices Lead to Different Algorithms, eq. 1]
    """
    mdp, far, mu = pair
    policies = [far, *itertools.islice(deterministic_policies(4, 3), 0, None, 8)]
    for pi in [(1 - x) * mu + x * pi for pi in policies for x in (0.01, 0.3, 1)]:
        gamma, d = mdp.gamma, mdp.visitation(mu)
        D = d @ total_variation(pi, mu)
        apart = (mdp.visitation(pi) - d).abs().sum()
        assert apart <= 2 * gamma / (1 - gamma) * D + 1e-12
        error = mdp.objective(pi) - mdp.objective(mu) - surrogate(mdp, pi, mu)
        largest = (pi * mdp.advantage(mu)).sum(-1).abs().max()
        assert error.abs() <= 2 * gamma / (1 - gamma) ** 2 * largest * D + 1e-12


def test_the_factor_of_the_surrogate_is_left_out(pair):
    """E_{d^μ}[E_π[A^μ]], [The Optimization Problem, eq. 3], is 1 - γ times the sum of eq. 2.

    With the penalty of eq. 4 the factor matters: it makes α stand for α / (1 - γ).
    """
    mdp, pi, mu = pair
    printed = mdp.visitation(mu) @ (pi * mdp.advantage(mu)).sum(-1)
    close(printed, (1 - mdp.gamma) * surrogate(mdp, pi, mu))


# Divergences


def test_the_printed_total_variation_is_twice_the_distance():
    """Σ |p - q|, [Different Divergence Choices Lead to Different Algorithms, eq. 2], is twice the
    largest difference in probability that any event has.
    """
    p, q = random_policy(0, 2, 6)
    subsets = itertools.chain.from_iterable(itertools.combinations(range(6), k) for k in range(7))
    largest = max((p[list(event)].sum() - q[list(event)].sum()).item() for event in subsets)
    assert (p - q).abs().sum().item() == pytest.approx(2 * largest)
    assert total_variation(p, q).item() == pytest.approx(largest)


GRID = torch.linspace(-12, 12, 48_001, dtype=F64)
NORMALS = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(0.8, 1.5)


def test_the_printed_total_variation_of_densities():
    """∫ |p - q|, [Different Divergence Choices Lead to Different Algorithms, eq. 3], twice as well:
    N(0, 1) and N(m, 1) differ most in the probability of a < m/2.
    """
    p, q = NORMALS[0], torch.distributions.Normal(0.8, 1.0)
    half = torch.tensor(0.4)
    largest = (p.cdf(half) - q.cdf(half)).item()
    integral = torch.trapezoid((p.log_prob(GRID).exp() - q.log_prob(GRID).exp()).abs(), GRID)
    assert integral.item() == pytest.approx(2 * largest, rel=1e-5)


def kl(p, q):
    """Σ p log(p/q), over the last axis."""
    return (p * (p / q).log()).sum(-1)


def test_kl_is_cross_entropy_minus_entropy():
    """Σ p log(p/q) = -E_p[log q] - H(p) ≥ 0, 0 for p = q, and not symmetric.

    [Different Divergence Choices Lead to Different Algorithms, eq. 4]
    """
    p, q = random_policy(0, 1000, 6), random_policy(1, 1000, 6)
    entropy = torch.distributions.Categorical(p).entropy()
    draws = torch.multinomial(p[0], 200_000, True, generator=generator(2))
    cross = -q[0].log()[draws].mean()
    close(kl(p, q)[0], cross - entropy[0], atol=0.02, rtol=0)
    close(kl(p, q), -(p * q.log()).sum(-1) - entropy)
    assert kl(p, q).min() > 0 and kl(p, p).abs().max() < 1e-12
    assert (kl(p, q) - kl(q, p)).abs().max() > 0.1


def test_kl_of_densities():
    """∫ p log(p/q) dx against its closed form for Gaussians

    [Different Divergence Choices Lead to Different Algorithms, eq. 5]
    """
    p, q = NORMALS
    log_ratio = p.log_prob(GRID) - q.log_prob(GRID)
    ours = torch.trapezoid(p.log_prob(GRID).exp() * log_ratio, GRID).item()
    assert ours == pytest.approx(math.log(1.5) + (1 + 0.8**2) / (2 * 1.5**2) - 0.5, rel=1e-5)


@pytest.mark.parametrize("reverse", [False, True], ids=["p_q", "q_p"])
def test_pinsker_holds_of_half_the_printed_total_variation(reverse):
    """½ Σ |p - q| ≤ √(½ KL), either way round, and not with a smaller factor; Σ |p - q| is not.

    [Different Divergence Choices Lead to Different Algorithms, eq. 6] and its eq. 7
    """
    p, q = random_policy(0, 5000, 3) ** 2, random_policy(1, 5000, 3)
    p = p / p.sum(-1, keepdim=True)
    bound = ((kl(q, p) if reverse else kl(p, q)) / 2).sqrt()
    assert (total_variation(p, q) <= bound).all()
    assert ((p - q).abs().sum(-1) > bound).float().mean() > 0.9, "as printed it is false"
    close_by = torch.tensor([[0.501, 0.499], [0.5, 0.5]], dtype=F64)
    p, q = close_by.flip(0) if reverse else close_by
    assert (total_variation(p, q) / (kl(p, q) / 2).sqrt()).item() == pytest.approx(1, abs=1e-5)


def test_a_small_kl_does_not_bound_the_ratio():
    """[Do We Actually Need the KL Term?] infers r(θ) ≈ 1 from a small KL(μ ‖ π). Of an action that
    μ hardly takes it does not follow, the other way round neither.
    """
    mu, pi = torch.tensor([1e-6, 1 - 1e-6]).double(), torch.tensor([1e-3, 1 - 1e-3]).double()
    assert kl(mu, pi) < 1e-3 and (pi / mu).max() > 999
    assert kl(pi, mu) < 1e-2 and (mu / pi).min() < 0.0011


def test_the_kl_called_forward_is_the_one_that_seeks_a_mode():
    """One bump π fitted to the two of μ: KL(π ‖ μ) takes one of them, as what is elsewhere called
    reverse, and KL(μ ‖ π) covers both, as what is elsewhere called forward.
    """
    x = torch.linspace(-6, 6, 241, dtype=F64)

    def bump(mean, sigma):
        p = torch.exp(-((x - mean) ** 2) / (2 * sigma**2)).clamp(min=1e-12)
        return p / p.sum()

    mu = (bump(-2, 0.5) + bump(2, 0.5)) / 2
    shapes = [(i / 4, j / 10) for i in range(-12, 13) for j in range(3, 31)]
    of_pi = min(shapes, key=lambda shape: kl(bump(*shape), mu))
    of_mu = min(shapes, key=lambda shape: kl(mu, bump(*shape)))
    assert (abs(of_pi[0]), of_pi[1]) == (2, 0.5)
    assert of_mu == pytest.approx((0, math.sqrt(0.5**2 + 2**2)), abs=0.1)


def test_importance_sampling_and_its_variance():
    """E_q[p/q f] = E_p[f]   [Importance Sampling, eq. 1], where q > 0 wherever p f is not 0.

    The variance of p/q f is Σ (p f)²/q - E_p[f]²: larger the further apart, 0 for q ∝ p f > 0.
    """
    p, q = random_policy(0, 2, 5)
    f = torch.tensor([3.0, -1.0, 2.0, 0.5, 4.0], dtype=F64)
    exact, weighted = (p * f).sum(), p / q * f
    variance = ((p * f) ** 2 / q).sum() - exact**2
    draws = weighted[torch.multinomial(q, 200_000, True, generator=generator(1))]
    assert (draws.mean() - exact).abs() < 5 * (variance / 200_000).sqrt()
    close(draws.var(), variance, rtol=0.05, atol=0)
    best = p * f.abs() / (p * f.abs()).sum()
    assert ((p / best * f.abs()).std() < 1e-12) and variance > (p * f**2).sum() - exact**2
    blind = torch.cat([q[:1] * 0, q[1:] / q[1:].sum()])
    assert ((p * f)[blind > 0].sum() - exact).abs() > 0.1, "what q never draws is missing"


# AWR


def penalized(p, q, f, alpha):
    """E_p[f] - α KL(p ‖ q)   [Advantage Weighted Regression (AWR), eq. 1]"""
    return (p * f).sum(-1) - alpha * kl(p, q)


def tilted(q, f, alpha):
    """p* ∝ q exp(f/α)   [Advantage Weighted Regression (AWR), eq. 2]"""
    return (q.log() + f / alpha).softmax(-1)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_the_tilted_distribution_is_the_maximum(alpha):
    """E_p[f] - α KL(p ‖ q) = α log Z - α KL(p ‖ p*) for every p, Z = E_q[exp(f/α)].

    So the largest value is α log Z, at p* alone.
    [Advantage Weighted Regression (AWR), eq. 1] and its eq. 2
    """
    q, others = random_policy(0, 1, 5)[0], random_policy(1, 1000, 5)
    f = torch.randn(5, generator=generator(2), dtype=F64)
    best, log_Z = tilted(q, f, alpha), (q * (f / alpha).exp()).sum().log()
    close(penalized(others, q, f, alpha), alpha * (log_Z - kl(others, best)))
    close(penalized(best, q, f, alpha), alpha * log_Z)
    assert (penalized(others, q, f, alpha) < alpha * log_Z).all()


def penalized_surrogate(mdp, pi, mu, alpha):
    """E_{d^μ}[E_π[A^μ] - α KL(π ‖ μ)]   [The Optimization Problem, eq. 4]"""
    return mdp.visitation(mu) @ penalized(pi, mu, mdp.advantage(mu), alpha)


def test_the_oracle_policy_maximises_the_penalised_surrogate(pair):
    """π* ∝ μ exp(A^μ/α): no slope in any logit, and larger than of other policies, near and far.

    [The Optimization Problem, eq. 4] and [Advantage Weighted Regression (AWR), eq. 3]
    """
    mdp, pi, mu = pair
    best = tilted(mu, mdp.advantage(mu), 0.3)
    objective = lambda x: penalized_surrogate(mdp, x.softmax(-1), mu, 0.3)  # noqa: E731
    assert jacobian(objective, best.log()).abs().max() < 1e-10
    assert jacobian(objective, mu.log()).abs().max() > 1e-3
    near = [0.99 * best + 0.01 * random_policy(seed, 4, 3) for seed in range(100)]
    highest = penalized_surrogate(mdp, best, mu, 0.3)
    for other in [pi, mu, *near, *deterministic_policies(4, 3)]:
        other = other.clamp(min=1e-30)
        assert penalized_surrogate(mdp, other, mu, 0.3) < highest
    close(
        jacobian(lambda x: mdp.objective(x.softmax(-1)), mu.log()) * (1 - mdp.gamma),
        jacobian(lambda x: penalized_surrogate(mdp, x.softmax(-1), mu, 0.3), mu.log()),
    )


def test_temperature_from_greedy_to_the_behaviour(pair):
    """Small α: argmax A^μ. Large α: μ. Between them E_π*[A^μ] falls, and KL(π* ‖ μ) too."""
    mdp, _, mu = pair
    advantage = mdp.advantage(mu)
    greedy = torch.eye(3, dtype=F64)[advantage.argmax(-1)]
    close(tilted(mu, advantage, 1e-3), greedy)
    close(tilted(mu, advantage, 1e9), mu)
    policies = [tilted(mu, advantage, alpha) for alpha in (0.1, 0.3, 1.0, 3.0, 10.0)]
    gains = torch.stack([(pi * advantage).sum(-1) for pi in policies])
    apart = torch.stack([kl(pi, mu) for pi in policies])
    assert (gains.diff(dim=0) < 0).all() and (gains > 0).all()
    assert (apart.diff(dim=0) < 0).all() and (apart > 0).all()


def maximum_likelihood(weights, features):
    """The policy softmax(features θ), (S, A), that maximises Σ weights log π, by Newton's method.

    features: (S, k).
    """
    theta = torch.zeros(features.shape[1], weights.shape[1], dtype=F64)
    loss = lambda x: -(weights * (features @ x.view_as(theta)).log_softmax(-1)).sum()  # noqa: E731
    for _ in range(30):
        gradient = jacobian(loss, theta.flatten())
        hessian = torch.autograd.functional.hessian(loss, theta.flatten())
        theta = theta - (torch.linalg.pinv(hessian, rtol=1e-10) @ gradient).view_as(theta)
    return (features @ theta).softmax(-1)


def test_weighted_regression_finds_the_oracle_in_a_table(pair):
    """max_θ E_{d^μ}[E_μ[exp(A^μ/α) log π_θ]] is at π* where each state has its own parameters.

    [How Do We Actually Use This Oracle Solution?, eq. 1]
    """
    mdp, _, mu = pair
    weights = mdp.visitation(mu)[:, None] * mu * (mdp.advantage(mu) / 2).exp()
    found = maximum_likelihood(weights, torch.eye(4, dtype=F64))
    close(found, tilted(mu, mdp.advantage(mu), 2.0), atol=1e-7, rtol=0)


def test_weighted_regression_leaves_out_the_normaliser(pair):
    """min_θ E_{d^μ}[KL(π* ‖ π_θ)] has weights exp(A^μ/α)/Z(s), Z(s) = E_μ[exp(A^μ/α)].

    Where states share parameters (here all of them) leaving Z(s) out gives another policy.
    [How Do We Actually Use This Oracle Solution?, eq. 1]
    """
    mdp, _, mu = pair
    best, d = tilted(mu, mdp.advantage(mu), 0.5), mdp.visitation(mu)[:, None]
    weights, shared = d * mu * (mdp.advantage(mu) / 0.5).exp(), torch.ones(4, 1, dtype=F64)
    printed = maximum_likelihood(weights, shared)
    projected = maximum_likelihood(d * best, shared)
    close(projected[0], (d * best).sum(0))
    mean = lambda policy: (d[:, 0] @ kl(best, policy)).item()  # noqa: E731
    assert mean(printed) > mean(projected) + 1e-4
    Z = (mu * (mdp.advantage(mu) / 0.5).exp()).sum(-1, keepdim=True)
    close(maximum_likelihood(weights / Z, shared), projected)
