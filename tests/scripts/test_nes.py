"""nes.py: its estimate against the analytic gradient, its derivation by quadrature, and its loop."""

import math
import re
import subprocess
import sys

import envs
import nes
import numpy as np
import pytest
import torch
from conftest import ROOT, command

F64 = torch.float64
SIGMA = 0.3
MU = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
B = torch.tensor([1.0, -3.0, 0.5], dtype=F64)
A = torch.tensor([[2.0, 1.0, 0.0], [1.0, -1.0, 0.5], [0.0, 0.5, 3.0]], dtype=F64)


def options(tmp_path, env_id, steps, **more):
    defaults = dict(candidates=16, sigma=0.1, hidden=8, eval_episodes=20, run_dir=str(tmp_path))
    return nes.Args(env_id=env_id, total_timesteps=steps, **{**defaults, **more})


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=F64)


def quadratic(theta):
    """F(θ) = bᵀθ + ½ θᵀAθ, whose U(μ) has the gradient b + Aμ."""
    return theta @ B + 0.5 * (theta @ A * theta).sum(-1)


def log_density(theta, mu):
    """log P_μ(θ), with its constant, by torch."""
    return torch.distributions.Normal(mu, SIGMA).log_prob(theta).sum(-1)


# Derivation


def test_samples_follow_the_distribution():
    """θ ~ N(μ, σ²I): mean, deviation, and no coordinate correlated with another."""
    theta = nes.sample_around(MU, SIGMA, normal(200_000, 3))
    torch.testing.assert_close(theta.mean(0), MU, atol=0.005, rtol=0)
    torch.testing.assert_close(theta.T.cov(), SIGMA**2 * torch.eye(3, dtype=F64), atol=1e-3, rtol=0)


def test_every_line_of_the_derivation_is_the_gradient():
    """F = sin + square in one dimension: U(μ) = exp(-σ²/2) sin μ + μ² + σ², eqs 1 to 6."""
    sigma, mu = 0.7, torch.tensor(0.4, dtype=F64, requires_grad=True)
    theta = torch.linspace(-8, 8, 4001, dtype=F64)
    fitness = theta.sin() + theta**2
    exact = math.exp(-(sigma**2) / 2) * math.cos(0.4) + 2 * 0.4

    def density(mu):
        return (-0.5 * ((theta - mu) / sigma) ** 2).exp() / (sigma * math.sqrt(2 * math.pi))

    def gradient(of):  # ∇_μ at every θ
        return torch.autograd.functional.jacobian(of, mu)

    P, grad_P = density(mu).detach(), gradient(density)
    score = gradient(lambda mu: density(mu).log())
    expected = torch.trapezoid(density(mu) * fitness, theta)  # U(μ), eqs 1 and 2
    draws = mu.detach() + sigma * normal(10**5, 1).squeeze()
    sampled = (draws - 0.4) / sigma**2 * (draws.sin() + draws**2)  # eq. 6
    lines = {
        1: torch.autograd.grad(expected, mu)[0],
        3: torch.trapezoid(grad_P * fitness, theta),
        4: torch.trapezoid(P * (grad_P / P) * fitness, theta),
        5: torch.trapezoid(P * score * fitness, theta),
    }
    for number, value in lines.items():
        assert value.item() == pytest.approx(exact, rel=1e-9), f"eq. {number}"
    assert sampled.mean().item() == pytest.approx(exact, abs=4 * sampled.std().item() / 10**2.5)


def test_log_density_and_its_gradient():
    """log P_μ(θ) = -|θ - μ|²/(2σ²) + const, eq. 8; its gradient is (θ - μ)/σ², eq. 9."""
    theta, mu = normal(50, 3), normal(50, 3, seed=1).requires_grad_()
    constant = log_density(theta, mu) + (theta - mu).pow(2).sum(-1) / (2 * SIGMA**2)
    torch.testing.assert_close(constant, constant[:1].expand(50))
    score = torch.autograd.grad(log_density(theta, mu).sum(), mu)[0]
    torch.testing.assert_close(score, ((theta - mu) / SIGMA**2).detach())


def test_estimate_is_the_mean_of_score_times_fitness():
    """Eq. 7, its score by autograd, is the gradient in eq. 10."""
    epsilon, mu = normal(20, 3), MU.expand(20, 3).clone().requires_grad_()
    theta = nes.sample_around(MU, SIGMA, epsilon)
    score = torch.autograd.grad(log_density(theta, mu).sum(), mu)[0]
    by_score = (score * quadratic(theta)[:, None]).mean(0)
    torch.testing.assert_close(nes.nes_gradient(quadratic(theta), epsilon, SIGMA), by_score)


# Gradient


@pytest.mark.parametrize("curved", [0, 1], ids=["linear", "quadratic"])
def test_estimate_is_exact_where_the_noise_is(curved):
    """Noise of mean 0, covariance I and no third moments is all that linear and quadratic F see."""
    epsilon = math.sqrt(3) * torch.cat([torch.eye(3, dtype=F64), -torch.eye(3, dtype=F64)])
    theta = nes.sample_around(MU, SIGMA, epsilon)
    fitness = theta @ B + curved * (quadratic(theta) - theta @ B)
    ours = nes.nes_gradient(fitness, epsilon, SIGMA)
    torch.testing.assert_close(ours, B + curved * A @ MU)


def test_estimate_is_unbiased():
    """The mean of many small estimates, within four of its deviations, for three functions."""
    functions = [
        (lambda theta: theta @ B, B),
        (quadratic, B + A @ MU),
        (lambda theta: (theta @ B).sin(), B * (MU @ B).cos() * (-(SIGMA**2) * B @ B / 2).exp()),
    ]
    for F, exact in functions:
        epsilon = normal(40 * 2_000, 3).reshape(-1, 40, 3)
        fitness = F(nes.sample_around(MU, SIGMA, epsilon))
        pairs = zip(fitness, epsilon, strict=True)
        estimates = torch.stack([nes.nes_gradient(f, e, SIGMA) for f, e in pairs])
        error = (estimates.mean(0) - exact) / (estimates.std(0) / math.sqrt(len(estimates)))
        assert error.abs().max() < 4


def test_pairs_remove_the_noise_of_even_terms():
    half = normal(10, 3)
    pairs, single = torch.cat([half, -half]), normal(20, 3, seed=1)
    even = lambda epsilon: 5 + epsilon.pow(2).sum(-1)  # noqa: E731
    zero = torch.zeros(3, dtype=F64)
    torch.testing.assert_close(nes.nes_gradient(even(pairs), pairs, SIGMA), zero)
    assert nes.nes_gradient(even(single), single, SIGMA).norm() > 1
    torch.testing.assert_close(
        nes.nes_gradient(even(pairs) + pairs @ B, pairs, SIGMA),
        nes.nes_gradient(pairs @ B, pairs, SIGMA),
    )


def test_the_update_is_the_plain_gradient_not_the_natural_one():
    """The Fisher matrix of N(μ, σ²I) in μ is I/σ², so the natural gradient is σ² times eq. 10.

    And a constant added to raw fitness moves the estimate, by c times the mean noise over σ.
    """
    epsilon, fitness = normal(200_000, 3), normal(200_000, 1, seed=1).squeeze()
    score = (nes.sample_around(MU, SIGMA, epsilon) - MU) / SIGMA**2
    fisher = score.T @ score / len(score)
    torch.testing.assert_close(fisher * SIGMA**2, torch.eye(3, dtype=F64), atol=0.02, rtol=0)
    few, F = epsilon[:10], fitness[:10]
    moved = nes.nes_gradient(F + 7, few, SIGMA) - nes.nes_gradient(F, few, SIGMA)
    torch.testing.assert_close(moved, 7 * few.mean(0) / SIGMA)
    assert moved.norm() > 1


# Fitness shaping


def test_ranks():
    fitness = torch.tensor([3.0, -100, 7, 7, 1e9], dtype=F64)
    ranks = nes.shape_fitness(fitness, "ranks")
    assert ranks.tolist() == [-0.25, -0.5, 0.125, 0.125, 0.5], "those that tie share their mean"
    torch.testing.assert_close(nes.shape_fitness((fitness / 1e9).exp(), "ranks"), ranks)
    assert nes.shape_fitness(torch.full((6,), 500.0), "ranks").tolist() == [0] * 6
    many = nes.shape_fitness(normal(1001, 1).squeeze(), "ranks")
    torch.testing.assert_close(many.sort().values, torch.linspace(-0.5, 0.5, 1001, dtype=F64))


def test_standardised_and_raw_fitness():
    fitness = 100 + 7 * normal(9, 1).squeeze()
    shaped = nes.shape_fitness(fitness, "standardized")
    assert shaped.mean().item() == pytest.approx(0, abs=1e-9)
    assert shaped.std(correction=0).item() == pytest.approx(1)
    assert torch.equal(shaped.argsort(), fitness.argsort()), "more is better"
    torch.testing.assert_close(nes.shape_fitness(3 * fitness - 5, "standardized"), shaped)
    assert nes.shape_fitness(torch.full((6,), 500.0), "standardized").tolist() == [0] * 6
    assert nes.shape_fitness(fitness, "raw") is fitness


# Steps of the loop


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("weight_decay", [0.0, 2.0])
def test_steps_go_up_the_gradient_and_decay(tmp_path, monkeypatch, optimizer, weight_decay):
    """With the gradient always 1: μ ← μ + α (1 - λμ), or Adam's step of about α along 1 - λμ."""
    monkeypatch.setattr(
        nes, "nes_gradient", lambda fitness, epsilon, _: torch.ones_like(epsilon[0])
    )
    more = dict(candidates=2, learning_rate=0.01, optimizer=optimizer, weight_decay=weight_decay)
    nes.train(options(tmp_path, "Constant-v0", 2 * 5, **more))
    mu = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["search"]["mu"]
    exact = torch.zeros(1, requires_grad=True)
    if optimizer == "sgd":
        stepper = torch.optim.SGD([exact], 0.01, maximize=True)
    else:
        stepper = torch.optim.Adam([exact], 0.01, eps=1e-5, maximize=True)
    for _ in range(5):
        exact.grad = 1 - weight_decay * exact.detach()
        stepper.step()
    torch.testing.assert_close(mu, exact.detach().expand(len(mu)))
    assert (mu > 0).all()


@pytest.mark.parametrize("antithetic", [True, False])
def test_candidates_and_their_gradient(tmp_path, monkeypatch, antithetic):
    """What is played is μ + σε, in pairs ±ε or not, and eq. 10 gets these ε and the shaped F."""
    played, graded = [], []
    play, gradient = nes.play_and_sum, nes.nes_gradient
    monkeypatch.setattr(nes, "play_and_sum", lambda *a: played.append(a[2]) or play(*a))
    monkeypatch.setattr(nes, "nes_gradient", lambda *a: graded.append(a) or gradient(*a))
    more = dict(
        antithetic=antithetic, sigma=0.5, optimizer="sgd", learning_rate=0.05, shaping="raw"
    )
    nes.train(options(tmp_path, "Observed-v0", 32, layers=0, **more))
    (_, epsilon, sigma), (fitness, later, _) = graded
    assert len(epsilon) == 16 and sigma == 0.5 and set(fitness.tolist()) == {-1, 1}
    np.testing.assert_allclose(played[0], 0.5 * epsilon, rtol=1e-6)
    assert torch.equal(epsilon[:8], -epsilon[8:]) == antithetic
    assert not torch.equal(epsilon, later), "each generation has noise of its own"
    mu = 0.05 * gradient(*graded[0])
    np.testing.assert_allclose(played[1], mu + 0.5 * later, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("env_id", "length"), [("Constant-v0", 1), ("Truncates-v0", 5)])
def test_steps_are_counted(tmp_path, capsys, env_id, length):
    before = envs.Tiny.steps
    nes.train(options(tmp_path, env_id, 200, candidates=6, episodes=3))
    counted = int(re.search(r"env_steps=(\d+)", capsys.readouterr().out)[1])
    assert counted == envs.Tiny.steps - before - 20 * length >= 200 > counted - 18 * length


def test_a_resumed_run_is_the_run_not_interrupted(tmp_path):
    """Noise and start states depend on the seed and the step alone."""
    found = []
    for folder, parts in (("a", [2_000]), ("b", [1_000, 2_000])):
        for steps in parts:
            resume = str(tmp_path / folder / "checkpoint.pt") if steps != parts[0] else ""
            more = dict(norm_obs=True, resume=resume)
            nes.train(options(tmp_path / folder, "Both-v0", steps, **more))
        found.append((tmp_path / folder / "checkpoint.pt").read_bytes())
    assert found[0] == found[1]


# Observations


def play(vector, policies, theta, seeds):
    """What play_and_sum returns, and the observations that the policies saw, one call each."""
    seen = []
    found = nes.play_and_sum(vector, policies, theta, seeds, lambda x: seen.append(x.copy()) or x)
    return found, seen


def random_policies(vector):
    policies = nes.Policies(vector, 4, 1)
    theta = np.random.default_rng(0).normal(size=(vector.num_envs, policies.dim))
    return policies, theta.astype(np.float32)


def test_sums_in_slices_equal_those_of_everything():
    """Slices of the candidates give the same episodes and sums, those of what the policies saw."""
    six, three = (nes.make_envs("CartPole-v1", n, vectorization_mode="sync") for n in (6, 3))
    policies, theta = random_policies(six)
    (returns, lengths, sums), seen = play(six, policies, theta, np.arange(6))
    for own in (slice(0, 3), slice(3, 6)):
        part, _ = play(three, policies, theta[own], np.arange(6)[own])
        for all_six, three_of_them in zip((returns, lengths, sums), part, strict=True):
            np.testing.assert_array_equal(all_six[own], three_of_them)
    seen = np.concatenate(seen).astype(np.float64)
    assert lengths.sum() == returns.sum() == len(seen) and len(set(lengths)) > 1
    np.testing.assert_allclose(sums.sum(0), [seen.sum(0), (seen**2).sum(0)])


def test_only_running_episodes_are_stepped_and_counted():
    vector, before = nes.make_envs("Both-v0", 8), envs.Tiny.steps
    (returns, lengths, _), seen = play(vector, *random_policies(vector), np.arange(8))
    assert envs.Tiny.steps - before == lengths.sum() == sum(map(len, seen))
    assert len(set(lengths)) > 1 and lengths.max() == 5, "a time limit is an end"
    np.testing.assert_array_equal(returns, lengths)  # reward 1 a step


def test_sums_of_a_native_vector_environment_end_with_the_episodes():
    vector = nes.make_envs("CartPole-v1", 5)
    (_, lengths, sums), seen = play(vector, *random_policies(vector), np.arange(5))
    assert len(set(lengths)) > 1 and len(seen) == lengths.max()
    for i, length in enumerate(lengths.astype(int)):
        lived = np.array(seen)[:length, i].astype(np.float64)
        np.testing.assert_allclose(sums[i], [lived.sum(0), (lived**2).sum(0)])


def test_normaliser_has_the_statistics_of_everything():
    data = normal(1000, 3) * torch.tensor([1, 50, 0]) + torch.tensor([0, 9, 7])
    array, sums = data.float().numpy(), torch.zeros(2, 3, dtype=F64)
    assert nes.normaliser(torch.tensor(0.0), sums)(array) is array, "nothing seen: as it is"
    norm = nes.normaliser(torch.tensor(1000.0), torch.stack([data.sum(0), data.pow(2).sum(0)]))
    exact = (data - data.mean(0)) / (data.var(0, correction=0) + 1e-8).sqrt()
    np.testing.assert_allclose(norm(array), exact.clamp(-10, 10), atol=1e-5)
    assert norm(array).dtype == np.float32 and norm(array * 100).max() == 10


def test_statistics_change_between_generations_and_are_evaluated_with(tmp_path, monkeypatch):
    used, play = [], nes.play_and_sum
    probe = np.array([[1.0, 0.0]], np.float32)
    monkeypatch.setattr(nes, "play_and_sum", lambda *a: used.append(a[4](probe)[0, 0]) or play(*a))
    more = dict(norm_obs=True, episodes=2, eval_every=1)
    returns = nes.train(options(tmp_path, "Observed-v0", 3 * 32, **more))
    assert used[0] == used[1] == 1 and used[2] == used[3] != 1 and used[4] == used[5] != used[2]
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["search"]
    assert saved["count"] == 96 and saved["sums"][1].tolist() == [96, 0]
    again = nes.train(options("", "Observed-v0", 1, resume=str(tmp_path / "checkpoint.pt")))
    np.testing.assert_array_equal(returns, again)


# Processes


def test_two_ranks_are_one_bit_for_bit(tmp_path):
    """Both play half of the candidates; the weights, Adam's state and statistics are the same."""
    line = "--env-id Acrobot-v1 --total-timesteps 4001 --candidates 4 --eval-episodes 1 --norm-obs"
    line = [*line.split(), "--weight-decay", "0.1", "--run-dir"]
    status, _, err = command("nes", *line, tmp_path / "one")
    assert status == 0, err
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [str(ROOT / "nes.py"), *line, str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 1 and len(list(tmp_path.glob("two/events*"))) == 1
    one, two = ((tmp_path / folder / "checkpoint.pt").read_bytes() for folder in ("one", "two"))
    assert one == two
    checkpoint = torch.load(tmp_path / "two/checkpoint.pt", weights_only=True)
    assert checkpoint["env_steps"] == checkpoint["search"]["count"] > 4_000
    assert checkpoint["optimizer"]["steps"] == 3, "later noise depends on the steps counted"


@pytest.mark.parametrize(
    ("line", "world"),
    [
        ("--candidates 5", 1),
        ("--candidates 1 --no-antithetic", 1),
        ("--candidates 9 --no-antithetic", 2),
        ("--candidates 8", 3),
        ("--sigma 0", 1),
        ("--learning-rate -1", 1),
        ("--weight-decay nan", 1),
        ("--layers 3", 1),
        ("--hidden 0", 1),
        ("--episodes 0", 1),
    ],
)
def test_bad_options_get_one_line(monkeypatch, line, world):
    if world > 1:
        monkeypatch.setenv("WORLD_SIZE", str(world))  # without RANK no process group is started
    status, out, err = command("nes", *line.split())
    assert status == 2 and not out and len(err.splitlines()) == 1 and line.split()[0] in err


def test_words_for_shaping_and_optimizer_are_checked():
    assert command("nes", "--shaping", "rank")[0] == command("nes", "--optimizer", "Adam")[0] == 2


# Learning


@pytest.mark.parametrize("shaping", ["raw", "standardized", "ranks"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_reward_depends_on_action_and_observation(tmp_path, shaping, optimizer):
    more = dict(shaping=shaping, optimizer=optimizer, episodes=2, layers=0)
    assert nes.train(options(tmp_path, "Matched-v0", 3_000, **more)).mean() == 1


@pytest.mark.parametrize(
    "more",
    [{}, {"norm_obs": True, "layers": 1}, {"common_seeds": True, "antithetic": False}],
    ids=str,
)
def test_continuous_action(tmp_path, more):
    more = {"layers": 0, "episodes": 4, **more}
    returns = nes.train(options(tmp_path, "MatchedBox-v0", 8_000, **more))
    assert returns.mean() > -0.1  # a constant action gets -4 at best


def test_reward_comes_a_step_later(tmp_path):
    assert nes.train(options(tmp_path, "TwoStep-v0", 3_000)).mean() == 1
