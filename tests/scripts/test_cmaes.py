"""cmaes.py: both updates against written-out loops, on functions, against pycma, and its loop."""

import itertools
import math
import statistics
import sys
from types import SimpleNamespace

import cmaes
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks/studies")]
import runner  # noqa: E402
import search as study  # noqa: E402
from search import document, ellipsoid, hansen, normal, rosenbrock  # noqa: E402


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_covariance(d, seed=0):
    factor = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T + 0.1 * torch.eye(d)


# Search distribution


def test_square_root():
    C = random_covariance(7)
    root = cmaes.square_root(C)
    torch.testing.assert_close(root @ root, C)
    torch.testing.assert_close(root, root.T)
    C[0, 1] += 1  # rounding may leave C a little asymmetric: only the lower triangle counts
    torch.testing.assert_close(cmaes.square_root(C), root)


def test_a_singular_covariance_has_a_root():
    line = torch.outer(double(1, 2), double(1, 2))
    root = cmaes.square_root(line)
    assert root.isfinite().all()
    torch.testing.assert_close(root @ root, line, atol=1e-6, rtol=0)


def test_eigenvalues_are_raised_to_a_share_of_the_largest():
    root = cmaes.square_root(torch.diag(double(4e6, -1e-3)))
    torch.testing.assert_close(root, torch.diag(double(2e3, 2e-4)))


def test_samples_follow_the_distribution():
    """theta ~ N(mu, Sigma); with Sigma = sigma^2 I it is what the cross-entropy method samples."""
    mu, sigma = double(1, -2, 0), 2.0
    epsilon = torch.randn(
        200_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    for C in (random_covariance(3), torch.eye(3, dtype=torch.float64)):
        theta = cmaes.sample_correlated(mu, sigma * cmaes.square_root(C), epsilon)
        torch.testing.assert_close(theta.mean(0), mu, atol=0.03, rtol=0)
        torch.testing.assert_close(theta.T.cov(), sigma**2 * C, atol=0.1, rtol=0.02)
    torch.testing.assert_close(theta, mu + sigma * epsilon)


# The document's update


@pytest.mark.parametrize(("k", "n"), [(3, 3), (5, 10), (2.5, 5), (1, 2)])
def test_rank_weights(k, n):
    raw = [math.log(k + 0.5) - math.log(i) for i in range(1, n + 1)]
    total = sum(w for w in raw if w > 0)
    assert cmaes.rank_weights(k, n).tolist() == pytest.approx([w / total for w in raw])


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_the_documents_update_written_out(alpha):
    rng = np.random.default_rng(0)
    mu, elites, weights = rng.normal(size=4), rng.normal(size=(6, 4)), rng.dirichlet(np.ones(6))
    new_mu = mu.copy()
    for i in range(6):
        for j in range(4):
            new_mu[j] += alpha * weights[i] * (elites[i, j] - mu[j])
    covariance = np.zeros((4, 4))
    for a in range(4):
        for b in range(4):
            for i in range(6):
                covariance[a, b] += (elites[i, a] - new_mu[a]) * (elites[i, b] - new_mu[b]) / 6
        covariance[a, a] += 0.5
    mu, elites, weights = map(torch.from_numpy, (mu, elites, weights))
    ours = cmaes.update_mean(mu, elites, weights, alpha)
    np.testing.assert_allclose(ours, new_mu)
    np.testing.assert_allclose(cmaes.elite_covariance(elites, ours, 0.5), covariance)


# Hansen's update


@pytest.mark.parametrize("name", study.FUNCTIONS)
def test_as_many_evaluations_as_pycma(name):
    """pycma 4.5.0 with its defaults; it too ends in Rosenbrock's other minimum now and then."""
    counts = [study.evaluations(study.FUNCTIONS[name], seed) for seed in range(study.SEEDS)]
    median = statistics.median(counts)
    assert median == pytest.approx(statistics.median(study.kept(name, "ours")), rel=0.05)
    assert median == pytest.approx(statistics.median(study.kept(name, "pycma")), rel=0.15)


def test_the_table_of_the_study_says_what_its_results_say():
    path, name, lines = study.texts()
    assert path.read_text(encoding="utf-8") == runner.between(path, name, lines)


def test_strategy_parameters_of_ten():
    """Those of pycma 4.5.0 and, for c_sigma, d_sigma and c_c, of the tutorial by hand."""
    weights, mu_eff, c_sigma, d_sigma, c_c, c_1, c_mu = cmaes.strategy_parameters(10, 10)
    pycmas = [0.4563, 0.2708, 0.1622, 0.0852, 0.0255, -0.08, -0.2218, -0.3446, -0.4529, -0.5497]
    assert weights.tolist() == pytest.approx(pycmas, abs=5e-5)
    assert mu_eff == pytest.approx(3.1672992814107017)
    assert (c_1, c_mu) == pytest.approx((0.015283824524751714, 0.02355177665041747))
    assert (c_sigma, d_sigma) == pytest.approx((5.1673 / 18.1673, 1 + 5.1673 / 18.1673), rel=1e-4)
    assert c_c == pytest.approx(4.31673 / 14.63346, rel=1e-4)


def test_many_candidates_damp_the_step_size():
    _, mu_eff, c_sigma, d_sigma, *_ = cmaes.strategy_parameters(200, 3)
    assert d_sigma == pytest.approx(1 + 2 * (((mu_eff - 1) / 4) ** 0.5 - 1) + c_sigma)


@pytest.mark.parametrize("n", [2, 3, 4, 10, 65, 1000])
@pytest.mark.parametrize("d", [1, 2, 10, 300])
def test_strategy_parameters_of_any_size(n, d):
    """C keeps its size on average and stays positive definite, whatever the ranks."""
    weights, mu_eff, *rates = cmaes.strategy_parameters(n, d)
    *_, c_1, c_mu = rates
    assert weights.isfinite().all() and (weights.diff() <= 0).all()
    assert weights[: n // 2].sum().item() == pytest.approx(1)
    assert 1 <= mu_eff <= n / 2 + 1e-9
    assert all(0 < rate for rate in rates) and c_1 + c_mu <= 1
    negative = weights.clamp(max=0).sum().item()
    keep = 1 - c_1 - c_mu * weights.sum().item()
    assert keep + d * c_mu * negative >= -1e-12, "what is taken away never exceeds what is kept"


class Tutorial:
    """Figure 6 of the tutorial in loops, with C^-1/2 by inversion where cmaes.py has epsilon."""

    def __init__(self, mu, sigma, n):
        self.mu, self.sigma, self.n, self.d = mu, sigma, n, len(mu)
        self.C, self.p_sigma, self.p_c = np.eye(self.d), np.zeros(self.d), np.zeros(self.d)
        self.g = 0

    def generation(self, theta):
        """One update by theta, the best first."""
        n, d = self.n, self.d
        raw = [math.log((n + 1) / 2) - math.log(i) for i in range(1, n + 1)]
        best, worst = [w for w in raw if w > 0], [w for w in raw if w < 0]
        mu_eff = sum(best) ** 2 / sum(w**2 for w in best)
        mu_eff_negative = sum(worst) ** 2 / sum(w**2 for w in worst)
        c_1 = 2 / ((d + 1.3) ** 2 + mu_eff)
        c_mu = 2 * (1 / 4 + mu_eff + 1 / mu_eff - 2) / ((d + 2) ** 2 + 2 * mu_eff / 2)
        c_mu = min(1 - c_1, c_mu)
        c_c = (4 + mu_eff / d) / (d + 4 + 2 * mu_eff / d)
        c_sigma = (mu_eff + 2) / (d + mu_eff + 5)
        d_sigma = 1 + 2 * max(0, math.sqrt((mu_eff - 1) / (d + 1)) - 1) + c_sigma
        least = min(
            1 + c_1 / c_mu, 1 + 2 * mu_eff_negative / (mu_eff + 2), (1 - c_1 - c_mu) / (d * c_mu)
        )
        w = [x / sum(best) if x >= 0 else least * x / -sum(worst) for x in raw]

        values, B = np.linalg.eigh(self.C)
        inverse = B @ np.diag(values**-0.5) @ B.T
        y = [(theta[i] - self.mu) / self.sigma for i in range(n)]
        mean_y = np.zeros(d)
        for i in range(len(best)):
            mean_y += w[i] * y[i]
        self.mu = self.mu + self.sigma * mean_y
        expected = math.sqrt(d) * (1 - 1 / (4 * d) + 1 / (21 * d**2))
        p_sigma = (1 - c_sigma) * self.p_sigma
        self.p_sigma = p_sigma + math.sqrt(c_sigma * (2 - c_sigma) * mu_eff) * inverse @ mean_y
        norm = np.linalg.norm(self.p_sigma)
        self.sigma *= math.exp(c_sigma / d_sigma * (norm / expected - 1))
        threshold = (1.4 + 2 / (d + 1)) * expected
        self.h = float(norm / math.sqrt(1 - (1 - c_sigma) ** (2 * (self.g + 1))) < threshold)
        self.p_c = (1 - c_c) * self.p_c + self.h * math.sqrt(c_c * (2 - c_c) * mu_eff) * mean_y
        delta = (1 - self.h) * c_c * (2 - c_c)
        C = (1 + c_1 * delta - c_1 - c_mu * sum(w)) * self.C + c_1 * np.outer(self.p_c, self.p_c)
        for i in range(n):
            w_i = w[i] if w[i] >= 0 else w[i] * d / np.linalg.norm(inverse @ y[i]) ** 2
            C = C + c_mu * w_i * np.outer(y[i], y[i])
        self.C, self.g = C, self.g + 1


@pytest.mark.parametrize("n", [4, 7, 10])
def test_hansens_update_written_out(n):
    """From so small a sigma that p_sigma is long for a while, which halts p_c: h is 0, then 1."""
    d, seen = 3, []
    mu, sigma, draw, epsilons = double(3, -1, 2), double(1e-3).squeeze(), normal(n, d, 0), []
    search = hansen(ellipsoid, mu, sigma, n, lambda: epsilons.append(draw()) or epsilons[-1])
    tutorial = Tutorial(mu.numpy(), sigma.item(), n)
    for _ in range(60):
        root = cmaes.square_root(torch.from_numpy(tutorial.C)).numpy()
        drawn, mu, sigma, C, p_sigma, p_c, h = next(search)
        theta = tutorial.mu + tutorial.sigma * epsilons[-1].numpy() @ root
        tutorial.generation(theta[ellipsoid(drawn).argsort().numpy()])
        seen.append(h.item())
        assert tutorial.h == h
        for ours, theirs in ((mu, tutorial.mu), (C, tutorial.C)):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)
        for ours, theirs in ((p_sigma, tutorial.p_sigma), (p_c, tutorial.p_c)):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
        assert sigma.item() == pytest.approx(tutorial.sigma)
    assert {0.0, 1.0} == set(seen)


@pytest.mark.parametrize("generation", [1, 2, 50])
def test_h_sigma_is_0_beyond_its_border(generation):
    border = (1.4 + 2 / 5) * math.sqrt(1 - 0.7 ** (2 * generation))
    count = torch.tensor(float(generation))
    for factor, h in ((0.999, 1), (1.001, 0)):
        assert cmaes.h_sigma(torch.tensor(factor * border), count, 0.3, 4) == h


def test_random_ranks_leave_p_sigma_normal():
    """p_sigma ~ N(0, I) but for its beginning at 0, so that sigma stays where it is on average."""
    d, n, many = 5, 12, 10_000
    weights, mu_eff, c_sigma, *_ = cmaes.strategy_parameters(n, d)
    draw, path = normal(many, n * d, 0), torch.zeros(many, d).double()
    for generation in range(1, 5):
        step = torch.einsum("n,mnd->md", weights.clamp(min=0), draw().view(many, n, d))
        path = cmaes.cumulate(path, step, c_sigma, mu_eff)
        usual = 1 - (1 - c_sigma) ** (2 * generation)
        torch.testing.assert_close(path.T.cov() / usual, torch.eye(d).to(path), atol=0.06, rtol=0)
    lengths = [cmaes.relative_length(p).item() for p in path[:2000] / math.sqrt(usual)]
    assert np.mean(lengths) == pytest.approx(1, abs=0.03)


def test_random_ranks_leave_the_covariance_on_average():
    d, n, times = 3, 6, 3000
    weights, _, _, _, c_c, c_1, c_mu = cmaes.strategy_parameters(n, d)
    C, draw, total = random_covariance(d), normal(n + 1, d, 0), torch.zeros(d, d).double()
    root = cmaes.square_root(C)
    for _ in range(times):
        epsilon, p = draw().split([n, 1])
        p_c = (p @ root).squeeze()  # it is ~ N(0, C)
        total += cmaes.update_covariance(
            C, p_c, epsilon @ root, epsilon, weights, 1.0, c_c, c_1, c_mu
        )
    torch.testing.assert_close(total / times, C, atol=0, rtol=0.05)


def linear(x):
    """Progress is along the first coordinate, downwards."""
    return x[:, 0]


def test_on_a_slope_the_documents_search_shrinks_and_hansens_grows():
    """The better half is narrow along the progress: 1 - 2 / pi of the variance around its mean."""
    d, n = 4, 2000
    search = document(linear, torch.zeros(d).double(), 1.0, n, 0.5, 0.0, normal(n, d, 0))
    found = [next(search) for _ in range(80)]
    variances = torch.stack([Sigma.diagonal() for _, _, Sigma in found[:10]])
    assert (variances[:, 0] < 0.8 ** torch.arange(1, 11)).all(), "a little around the weighted mean"
    assert (variances[:, 1:] - 1).abs().max() < 0.5, "where there is no progress, as it was"
    assert found[5][1][0] < -2 and found[60][1][0] - found[79][1][0] < 1e-3, "it comes to a halt"

    search = hansen(linear, torch.zeros(d).double(), double(1).squeeze(), 10, normal(10, d, 0))
    spreads, means = [], []
    for _ in range(40):
        _, mu, sigma, C, *_ = next(search)
        spreads.append((sigma * C[0, 0].sqrt()).item())
        means.append(mu[0].item())
    assert spreads[-1] > 100 and means[-1] < 10 * means[19], "it goes ever faster"
    assert C[0, 0] > 2 * C.diagonal()[1:].mean(), "and stretches along the progress"


@pytest.mark.parametrize("function", [ellipsoid, rosenbrock])
def test_only_ranks_matter_and_no_direction_is_special(function):
    """Fitness through a monotone function changes nothing; rotated space, rotated search."""
    d, n, start = 6, 8, torch.full((6,), 0.5, dtype=torch.float64)
    rotation = torch.linalg.qr(random_covariance(d))[0]
    sigma, draw = double(0.5).squeeze(), normal(n, d, 0)
    plain = hansen(function, start, sigma, n, normal(n, d, 0))
    monotone = hansen(lambda x: -1 / function(x), start, sigma, n, normal(n, d, 0))
    rotated = hansen(
        lambda x: function(x @ rotation), rotation @ start, sigma, n, lambda: draw() @ rotation.T
    )
    for _ in range(60):
        theta, mu, sigma_1, *_ = next(plain)
        torch.testing.assert_close(next(monotone)[1], mu, atol=0, rtol=0)
        other_theta, other_mu, sigma_2, *_ = next(rotated)
        torch.testing.assert_close(other_theta @ rotation, theta, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(rotation.T @ other_mu, mu, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(sigma_2, sigma_1, atol=1e-6, rtol=1e-6)


# The loop


class Function(gym.Env):
    """One step: the reward is minus shifted() of the action, which without inputs is theta."""

    observation_space = gym.spaces.Box(-1, 1, (0,), np.float32)
    action_space = gym.spaces.Box(-np.inf, np.inf, (5,), np.float64)

    def reset(self, *, seed=None, options=None):
        return np.zeros(0, np.float32), {}

    def step(self, action):
        value = shifted(torch.from_numpy(action)[None]).item()
        return np.zeros(0, np.float32), -value, True, False, {}


def shifted(theta):
    """The ellipsoid, whose optimum is not where the search begins."""
    return ellipsoid(theta - 1)


gym.register("Function-v0", Function, disable_env_checker=True, order_enforce=False)


def options(tmp_path, env_id, steps, **more):
    defaults = dict(eval_episodes=20, run_dir=str(tmp_path))
    return cmaes.Args(env_id=env_id, total_timesteps=steps, **{**defaults, **more})


def state(tmp_path):
    """The search distribution that a run has saved."""
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    return checkpoint["search"] | checkpoint["policy"]


def draws(n):
    """draw for document and hansen: what train draws, one step for each of n candidates."""
    steps = itertools.count(0, n)

    def draw():
        rng = np.random.default_rng([1, next(steps), 1])
        rng.integers(2**32, size=3)  # seeds of other generators
        return torch.from_numpy(rng.standard_normal((n, 5)))

    return draw


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_train_is_the_search_tested_above(tmp_path, monkeypatch, alpha):
    """Both updates, from the same random numbers: mean, step size, covariance and paths."""
    n = 9
    more = dict(candidates=n, init_sigma=0.5, alpha=alpha)
    start = torch.zeros(5, dtype=torch.float64)
    update_mean = cmaes.update_mean
    cmaes.train(options(tmp_path / "hansen", "Function-v0", 40 * n, update="hansen", **more))
    document_options = dict(update="document", rho=0.5, noise=1e-4)
    cmaes.train(options(tmp_path / "doc", "Function-v0", 20 * n, **document_options, **more))

    monkeypatch.setattr(cmaes, "update_mean", lambda *a: update_mean(*a[:3], alpha))
    search = hansen(shifted, start, double(0.5).squeeze(), n, draws(n))
    for _ in range(40):
        _, mu, sigma, C, p_sigma, p_c, _ = next(search)
    found = state(tmp_path / "hansen")
    expected = {"mu": mu, "sigma": sigma, "C": C, "p_sigma": p_sigma, "p_c": p_c}
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)

    search = document(shifted, start, 0.5, n, 0.5, 1e-4, draws(n))
    for _ in range(20):
        _, mu, Sigma = next(search)
    found = state(tmp_path / "doc")
    torch.testing.assert_close(found["mu"], mu)
    torch.testing.assert_close(found["sigma"] ** 2 * found["C"], Sigma)


def test_a_resumed_search_keeps_its_shape(tmp_path):
    more = dict(candidates=6)
    cmaes.train(options(tmp_path, "Function-v0", 60, **more))
    before = state(tmp_path)
    resume = str(tmp_path / "checkpoint.pt")
    cmaes.train(options(tmp_path, "Function-v0", 66, **more | {"resume": resume}))
    after = state(tmp_path)
    assert (before["generation"], after["generation"]) == (10, 11)
    c_1, c_mu = cmaes.strategy_parameters(6, 5)[-2:]
    change = (after["C"] - before["C"]).norm() / before["C"].norm()
    assert 0 < change < 10 * (c_1 + c_mu) and not torch.equal(after["C"], torch.eye(5).double())


@pytest.mark.parametrize("update", ["hansen", "document"])
@pytest.mark.parametrize("more", [{}, {"common_seeds": True, "episodes": 2}], ids=str)
def test_reward_depends_on_action_and_observation(tmp_path, update, more):
    returns = cmaes.train(options(tmp_path, "Matched-v0", 1_000, update=update, **more))
    assert returns.mean() == 1


@pytest.mark.parametrize(("update", "least"), [("hansen", -1e-4), ("document", -0.02)])
def test_continuous_action(tmp_path, update, least):
    more = dict(update=update, episodes=4, noise=1e-4)
    assert cmaes.train(options(tmp_path, "MatchedBox-v0", 4_000, **more)).mean() > least


def test_observations_are_of_float32_like_their_statistics():
    """0.1 is not float32's 0.1. The difference would be divided by a deviation of 0.0001."""
    obs_space, actions = gym.spaces.Box(-1, 1, (1,), np.float64), gym.spaces.Box(-np.inf, np.inf)
    env = SimpleNamespace(observation_space=obs_space, action_space=actions)
    policies = cmaes.Policies(env, cmaes.Args(layers=0)).double()
    policies.mu += 100
    policies.norm.include(np.full((5, 1), 0.1, np.float32))
    assert policies.act(np.full((1, 1), 0.1)) == 100


def test_hidden_layers_learn_too(tmp_path):
    more = dict(candidates=16, layers=1, hidden=4)
    assert cmaes.train(options(tmp_path, "Matched-v0", 2_000, **more)).mean() == 1


@pytest.mark.parametrize("common", [False, True])
def test_common_seeds(tmp_path, monkeypatch, common):
    seen, play = [], cmaes.play
    monkeypatch.setattr(cmaes, "play", lambda *a: seen.append(a[-1]) or play(*a))
    more = dict(common_seeds=common, episodes=2, candidates=4)
    cmaes.train(options(tmp_path, "Matched-v0", 16, **more))
    assert len(seen) == 4, "two generations of two episodes"
    assert all(len(set(seeds)) == (1 if common else 4) for seeds in seen)
    assert len({seeds[0] for seeds in seen}) == 4, "no episode has the seeds of another"


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(cmaes.Refusal, match="--candidates 1: "):
        cmaes.train(options(tmp_path, "Matched-v0", 10, candidates=1))
    with pytest.raises(cmaes.Refusal, match=r"--layers, --hidden: 9993 parameters"):
        cmaes.train(options(tmp_path, "Matched-v0", 10, layers=2, hidden=97))
