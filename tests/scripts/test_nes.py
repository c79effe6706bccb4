"""nes.py: its estimate against the analytic gradient, its derivation by quadrature, and its loop."""

import math
import os
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
    mu = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["policy"]["mu"]
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
    play, gradient = nes.play, nes.nes_gradient
    monkeypatch.setattr(nes, "play", lambda *a: played.append(a[2]) or play(*a))
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


@pytest.mark.parametrize("env_id", ["Constant-v0", "Both-v0"])
def test_steps_are_counted(tmp_path, monkeypatch, env_id):
    """As the environments count them."""
    before, counts, evaluate = envs.Tiny.steps, [], nes.Run.evaluate

    def spy(run):
        counts.append((run.step, envs.Tiny.steps - before))
        return evaluate(run)

    monkeypatch.setattr(nes.Run, "evaluate", spy)
    nes.train(options(tmp_path, env_id, 200, candidates=6, episodes=3))
    [(counted, simulated)] = counts
    assert counted == simulated >= 200


def test_a_resumed_run_is_the_run_not_interrupted(tmp_path):
    """Noise and start states depend on the seed and the step alone."""
    found = []
    for folder, parts in (("a", [2_000]), ("b", [1_000, 2_000])):
        for steps in parts:
            resume = str(tmp_path / folder / "checkpoint.pt") if steps != parts[0] else ""
            more = dict(norm_obs=True, resume=resume)
            nes.train(options(tmp_path / folder, "Both-v0", steps, **more))
        found.append(torch.load(tmp_path / folder / "checkpoint.pt", weights_only=True))
    same(*found)


def same(a, b, **tolerance):
    """The same search, optimiser and steps."""
    assert a["env_steps"] == b["env_steps"] and a["policy"].keys() == b["policy"].keys()
    for key, value in a["policy"].items():
        torch.testing.assert_close(b["policy"][key], value, **(tolerance or dict(atol=0, rtol=0)))
    kind = a["args"]["optimizer"]
    state, other = a[kind]["state"], b[kind]["state"]
    if a["args"]["optimizer"] == "adam":
        assert state[0]["step"] > 2
    torch.testing.assert_close(other, state, **(tolerance or dict(atol=0, rtol=0)))


# Episodes


def random_policies(env_id, n):
    """Arguments, policies of one shape and n of them at random."""
    args = nes.Args(env_id=env_id, hidden=4)
    policies = nes.make_policy(nes.make_env(args), args)
    theta = np.random.default_rng(0).normal(size=(n, len(policies.mu)))
    return args, policies, theta.astype(np.float32)


def test_only_running_episodes_of_a_list_are_stepped():
    args, policies, theta = random_policies("Both-v0", 8)
    listed, before = [nes.make_env(args) for _ in theta], envs.Tiny.steps
    returns, lengths, seen, steps = nes.play(listed, policies, theta, list(range(8)))
    assert envs.Tiny.steps - before == steps == lengths.sum() == len(seen)
    assert len(set(lengths)) > 1 and lengths.max() == 5, "a time limit is an end"
    np.testing.assert_array_equal(returns, lengths)  # reward 1 a step


def test_a_slice_of_the_candidates_plays_the_same_episodes():
    args, policies, theta = random_policies("CartPole-v1", 6)
    listed = [nes.make_env(args) for _ in theta]
    whole, seeds = nes.play(listed, policies, theta, list(range(6))), list(range(6))
    parts = [nes.play(listed[:3], policies, theta[i : i + 3], seeds[i : i + 3]) for i in (0, 3)]
    for all_six, three in zip(whole[:2], zip(*parts)):
        np.testing.assert_array_equal(all_six, np.concatenate(three[:2]))
    assert len(set(whole[1])) > 2 and whole[3] == parts[0][3] + parts[1][3]


def test_what_a_native_vector_environment_plays_on_is_counted_and_no_more(monkeypatch):
    """Every step that it simulates pays 1, a reset 0; what came after an end is not seen."""
    args, policies, theta = random_policies("CartPole-v1", 5)
    native, acted, paid = nes.make_envs(args, 5), [], []
    actions, step = policies.actions, native.step
    monkeypatch.setattr(policies, "actions", lambda *a: acted.append(a[1].copy()) or actions(*a))
    monkeypatch.setattr(native, "step", lambda a: paid.append(step(a)) or paid[-1])
    returns, lengths, seen, steps = nes.play(native, policies, theta, list(range(5)))
    assert steps == sum(found[1].sum() for found in paid) > lengths.sum() == len(seen)
    assert len(set(lengths)) > 1 and len(acted) == lengths.max()
    np.testing.assert_array_equal(returns, lengths)
    lived = [acted[t][i] for t in range(len(acted)) for i in range(5) if t < lengths[i]]
    np.testing.assert_array_equal(seen, lived)


# Observations


def test_the_statistics_are_those_of_all_that_was_acted_on(tmp_path, monkeypatch):
    """Of running episodes alone, once a generation, and not yet of the one that is played."""
    counts, seen, play = [], [], nes.play

    def spy(envs, policies, *a):
        counts.append(policies.norm.count.item())
        found = play(envs, policies, *a)
        assert len(found[2]) == found[1].sum()
        seen.append(found[2])
        return found

    monkeypatch.setattr(nes, "play", spy)
    more = dict(norm_obs=True, episodes=2)
    nes.train(options(tmp_path, "CartPole-v1", 6_000, **more))
    lengths = np.array([len(x) for x in seen]).reshape(-1, 2).sum(1)
    assert len(lengths) > 1
    before = np.repeat([0, *lengths.cumsum()[:-1]], 2)
    assert counts == before.tolist()
    norm = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["policy"]
    everything = np.concatenate(seen).astype(np.float64)
    assert norm["norm.count"] == len(everything)
    np.testing.assert_allclose(norm["norm.mean"], everything.mean(0), atol=1e-5)
    np.testing.assert_allclose(norm["norm.var"], everything.var(0), rtol=1e-4)


def test_policies_act_on_normalised_observations():
    """All of them, and the one that is evaluated; at first observations are as they are."""
    args = nes.Args(env_id="CartPole-v1", hidden=4, norm_obs=True)
    policies = nes.make_policy(nes.make_env(args), args)
    rng = np.random.default_rng(0)
    policies.mu = torch.from_numpy(rng.normal(size=len(policies.mu)).astype(np.float32))
    obs = np.float32(rng.normal(size=(200, 4)) * [1, 50, 3, 1] + [0, 9, 7, 0])
    layers = policies.unpack(policies.mu[None].numpy())
    plain = policies.act(obs)
    normed = (obs - obs.mean(0)) / obs.std(0)
    expected = policies.act(normed)
    policies.norm.include(torch.from_numpy(obs))
    np.testing.assert_array_equal(policies.act(obs), expected)
    np.testing.assert_array_equal(policies.actions(layers, obs), expected)
    assert (plain != expected).any()


def test_the_evaluation_is_with_the_normaliser(tmp_path):
    """A saved policy acts as it was evaluated: on CartPole, whose first steps would betray it."""
    more = dict(norm_obs=True, seed=3)
    returns = nes.train(options(tmp_path, "CartPole-v1", 30_000, **more))
    path = tmp_path / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    args = nes.Args(**checkpoint["args"])
    policies = nes.make_policy(nes.make_env(args), args)
    policies.load_state_dict(checkpoint["policy"])
    norm, played = policies.norm, []
    (w, b), (v, c) = ((x[0], y[0]) for x, y in policies.unpack(policies.mu[None].numpy()))
    mean, deviation = norm.mean.numpy(), np.sqrt(norm.var.numpy() + 1e-8)
    for normalised in (True, False):
        env, total, ends = nes.make_env(args), 0, [False]
        obs, _ = env.reset(seed=2**30 + 3000)
        while not any(ends):
            x = ((obs - mean) / deviation).clip(-10, 10) if normalised else obs
            obs, reward, *ends, _ = env.step(int((v @ np.tanh(w @ x + b) + c).argmax()))
            total += reward
        played.append(total)
    assert played[0] == returns[0] != played[1]


# Populations


@pytest.mark.parametrize("common", [False, True])
def test_start_seeds_of_a_generation(tmp_path, monkeypatch, common):
    seen, play = [], nes.play
    monkeypatch.setattr(nes, "play", lambda *a: seen.append(a[-1]) or play(*a))
    more = dict(common_seeds=common, episodes=3, candidates=4)
    nes.train(options(tmp_path, "Matched-v0", 24, **more))
    assert len(seen) == 6, "two generations of three episodes"
    assert all(len(set(seeds)) == (1 if common else 4) for seeds in seen)
    distinct = {seed for seeds in seen for seed in seeds}
    assert len(distinct) == (6 if common else 24), "no episode has the seed of another"


@pytest.mark.parametrize("env_id", ["Both-v0", "CartPole-v1"])
@pytest.mark.parametrize("common", [False, True])
def test_equal_candidates_get_equal_fitness_from_common_seeds(
    tmp_path, monkeypatch, env_id, common
):
    found, shape = [], nes.shape_fitness
    monkeypatch.setattr(nes, "sample_around", lambda mu, _, epsilon: mu.expand(len(epsilon), -1))
    monkeypatch.setattr(nes, "shape_fitness", lambda *a: found.append(a[0].tolist()) or shape(*a))
    nes.train(options(tmp_path, env_id, 1_000, common_seeds=common, episodes=2))
    assert len(found) > 1 and len(set(map(tuple, found))) > 1
    assert all((len(set(fitness)) == 1) == common for fitness in found)


# Processes


RUNS = {
    "ranks": dict(env_id="Acrobot-v1", total_timesteps=4_001, candidates=4, norm_obs=True)
    | dict(weight_decay=0.1),
    "raw": dict(env_id="Both-v0", total_timesteps=500, candidates=8, shaping="raw")
    | dict(optimizer="sgd", episodes=2),
}


def test_two_processes_are_one(tmp_path):
    """Each plays half of the candidates; weights, optimiser, statistics and steps are the same.

    Raw fitness and plain steps show a sum that is taken twice; ranks and Adam would hide it.
    """
    (tmp_path / "two.py").write_text(
        "import sys, envs, nes\n"
        f"for name, more in {RUNS}.items():\n"
        "    nes.train(nes.Args(run_dir=f'{sys.argv[1]}/{name}', eval_episodes=1, **more))\n"
    )
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*line, str(tmp_path / "two.py"), str(tmp_path / "two")],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == len(RUNS)
    for name, more in RUNS.items():
        nes.train(nes.Args(run_dir=str(tmp_path / "one" / name), eval_episodes=1, **more))
        folders = f"one/{name}", f"two/{name}", f"two/{name}__rank1"
        one, two, other = (
            torch.load(tmp_path / folder / "checkpoint.pt", weights_only=True) for folder in folders
        )
        same(two, other)
        same(one, two, atol=1e-12, rtol=1e-12)
        assert one["policy"]["mu"].abs().max() > 0.01
    assert torch.load(tmp_path / "two/ranks/checkpoint.pt")["env_steps"] > 4_000


@pytest.mark.parametrize(
    ("line", "world"),
    [
        ("--candidates 5", 1),
        ("--candidates 1 --no-antithetic", 1),
        ("--candidates 9", 2),
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
    if world > 1:  # as torchrun's processes see it
        monkeypatch.setattr(nes, "start_processes", lambda stack, device: (0, world, device))
        words = dict(zip(line.split()[::2], line.split()[1::2]))
        with pytest.raises(nes.Refusal, match="--candidates"):
            nes.train(nes.Args(candidates=int(words["--candidates"]), antithetic=False))
        return
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
    [
        {},
        {"norm_obs": True, "layers": 1, "learning_rate": 0.03},  # at 0.1 it wanders by -0.3
        {"common_seeds": True, "antithetic": False},
    ],
    ids=str,
)
def test_continuous_action(tmp_path, more):
    more = {"layers": 0, "episodes": 4, **more}
    returns = nes.train(options(tmp_path, "MatchedBox-v0", 8_000, **more))
    assert returns.mean() > -0.1  # a constant action gets -4 at best


def test_reward_comes_a_step_later(tmp_path):
    assert nes.train(options(tmp_path, "TwoStep-v0", 3_000)).mean() == 1


@pytest.mark.parametrize(("first", "then"), [("adam", "sgd"), ("sgd", "adam")])
def test_the_state_of_another_optimizer_is_refused(tmp_path, first, then):
    nes.train(options(tmp_path, "Matched-v0", 100, optimizer=first))
    path = str(tmp_path / "checkpoint.pt")
    with pytest.raises(nes.Refusal, match="other options"):
        nes.train(options(tmp_path, "Matched-v0", 200, optimizer=then, resume=path))
