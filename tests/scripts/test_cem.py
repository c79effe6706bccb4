"""cem.py: its distribution, its update, its population, and its loop."""

from contextlib import ExitStack

import cem
import envs
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def options(tmp_path, env_id, steps, **more):
    defaults = dict(candidates=32, hidden=8, init_var=1.0, eval_episodes=20, run_dir=str(tmp_path))
    return cem.Args(env_id=env_id, total_timesteps=steps, **{**defaults, **more})


# Search distribution


def test_samples_follow_the_distribution():
    """theta ~ N(mu, diag sigma^2), the document's isotropic case and each coordinate its own."""
    mu, var = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([100.0, 0.25, 4.0])
    torch.manual_seed(0)
    theta = cem.sample(mu, var, torch.randn(200_000, 3))
    torch.testing.assert_close(theta.mean(0), mu, atol=0.1, rtol=0)
    covariance = theta.T.cov() / (var[:, None] * var).sqrt()
    torch.testing.assert_close(covariance, torch.eye(3), atol=0.02, rtol=0)


@pytest.mark.parametrize(("rho", "k"), [(0.2, 2), (0.29, 2), (0.3, 3), (1.0, 10), (0.01, 1)])
def test_elites_are_the_floor_of_rho_n_best(rho, k):
    fitness = torch.tensor([3.0, 9, 1, 7, 5, 8, 2, 6, 4, 0])
    elites = cem.select(fitness[:, None] * 10, fitness, rho)
    assert elites[:, 0].tolist() == [90 - 10 * i for i in range(k)]


def test_rounding_does_not_cost_an_elite():
    """0.29 times 100 is 28.999999999999996 to the machine."""
    assert len(cem.select(torch.zeros(100, 1), torch.zeros(100), 0.29)) == 29


def test_update_is_the_mean_and_the_variance_around_it():
    elites = torch.randn(7, 3, dtype=torch.float64)
    mu, var = cem.cem_update(elites, 0.5)
    for j in range(3):
        column = elites[:, j].tolist()
        mean = sum(column) / 7
        assert mu[j].item() == pytest.approx(mean)
        assert var[j].item() == pytest.approx(sum((x - mean) ** 2 for x in column) / 7 + 0.5)


def test_noise_keeps_the_search_wide():
    """All elites alike: without noise the search would end, with it goes on at sqrt(eta)."""
    _, var = cem.cem_update(torch.ones(3, 2), 0.04)
    assert var.tolist() == pytest.approx([0.04, 0.04])


def test_cem_minimises():
    """A tilted parabola in four dimensions, through the functions that train calls."""
    torch.manual_seed(0)
    best, mu, var = torch.tensor([1.0, -2.0, 3.0, 0.0]), torch.zeros(4), torch.full((4,), 100.0)
    for _ in range(40):
        theta = cem.sample(mu, var, torch.randn(64, 4))
        error = theta - best
        fitness = -error.pow(2).sum(1) - error.sum(1) ** 2
        mu, var = cem.cem_update(cem.select(theta, fitness, 0.2), 0.0)
    torch.testing.assert_close(mu, best, atol=1e-3, rtol=0)


# Population


def population(env_id, n, **more):
    """Policies for env_id with the options, and n of its environments."""
    args = cem.Args(env_id=env_id, **{"hidden": 4, **more})
    env = cem.make_env(args)
    return cem.make_policy(env, args), cem.make_candidates(ExitStack(), env, args, n)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "MatchedBox-v0"])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_all_act_as_each_alone(env_id, layers):
    policies, _ = population(env_id, 1, hidden=8, layers=layers)
    rng = np.random.default_rng(0)
    theta = rng.normal(size=(5, len(policies.mu))).astype(np.float32)
    obs = rng.normal(size=(5, policies.sizes[0])).astype(np.float32)
    together = policies.actions(policies.unpack(theta), obs)
    for i in range(5):
        x, first = torch.from_numpy(obs[i]), 0
        for layer, (inputs, outputs) in enumerate(zip(policies.sizes[:-1], policies.sizes[1:])):
            size = outputs * (inputs + 1)
            rows = torch.from_numpy(theta[i, first : first + size]).reshape(outputs, inputs + 1)
            x, first = rows[:, :inputs] @ x + rows[:, inputs], first + size
            x = x if layer == layers else x.tanh()
        alone = x.argmax().item() if env_id == "CartPole-v1" else (x.numpy() * 5 + 5).clip(0, 10)
        np.testing.assert_allclose(together[i], alone, atol=1e-4)
        policies.mu = torch.from_numpy(theta[i])
        np.testing.assert_allclose(policies.act(obs)[i], alone, atol=1e-4)
    assert first == len(policies.mu)


def test_only_running_episodes_are_stepped_and_counted():
    policies, candidates = population("Both-v0", 8)
    before = envs.Tiny.steps
    theta = np.zeros((8, len(policies.mu)), np.float32)
    returns, lengths, seen, steps = cem.play(candidates, policies, theta, [*range(8)])
    assert envs.Tiny.steps - before == steps == lengths.sum() == len(seen)
    assert len(set(lengths)) > 1
    np.testing.assert_array_equal(returns, lengths)  # reward 1 a step, truncated or not
    assert lengths.max() == 5, "a time limit is an end"


def pushers():
    """θ of three linear policies for CartPole: always right, one that balances, always left."""
    theta = np.zeros((3, 2, 5), np.float32)  # an action a row, of weights and then the bias
    theta[0, :, 4] = [0, 1]  # bias towards 1
    theta[1, 1, 2:4] = 1, 1  # angle plus angular velocity
    theta[2, :, 4] = [1, 0]
    return theta.reshape(3, -1)


@pytest.mark.parametrize("common", [False, True])
def test_whole_episodes_of_the_native_and_the_listed_environments(common):
    """A policy that always pushes right falls in 8 to 11 steps, one that balances does not."""
    policies, candidates = population("CartPole-v1", 3, layers=0, common_seeds=common)
    assert isinstance(candidates, list) == common
    for seed in range(5):
        returns, lengths, seen, steps = cem.play(candidates, policies, pushers(), [seed] * 3)
        np.testing.assert_array_equal(returns, lengths)
        assert 7 <= returns[0] <= 12 and returns[1] > 100 and 7 <= returns[2] <= 12
        assert len(seen) == lengths.sum()
        if common:
            assert steps == lengths.sum()
        else:  # the two that fell play on; each fall costs a reset step, which simulates nothing
            falls = [lengths[1] // (lengths[i] + 1) for i in (0, 2)]
            assert 3 * lengths[1] - 2 * sum(falls) < steps < 3 * lengths[1]


@pytest.mark.parametrize("good", [7, 14], ids=["on the way", "the last one"])
@pytest.mark.parametrize("fault", ["observation", "reward"])
def test_one_number_that_is_not_finite_is_refused(monkeypatch, fault, good):
    """An argmax hides it, and a maximum: the fitness of that candidate would look like any other."""
    monkeypatch.setattr(envs.Faulty, "good", envs.Faulty.steps + good)  # of 3 episodes of 5
    policies, _ = population("Faulty-v0", 1)
    candidates = [envs.Faulty(fault) for _ in range(3)]
    with pytest.raises(cem.Refusal, match="not finite"):
        cem.play(candidates, policies, np.zeros((3, len(policies.mu)), np.float32), [1, 2, 3])


def test_common_seeds_give_equal_candidates_equal_fitness():
    policies, candidates = population("CartPole-v1", 4, common_seeds=True)
    theta = np.random.default_rng(1).normal(size=(1, len(policies.mu))).astype(np.float32)
    returns, *_ = cem.play(candidates, policies, theta.repeat(4, 0), [7] * 4)
    assert len(set(returns)) == 1
    again, *_ = cem.play(candidates, policies, theta.repeat(4, 0), [*range(4)])
    assert len(set(again)) > 1


@pytest.mark.parametrize("common", [False, True])
def test_start_seeds_of_a_generation(tmp_path, monkeypatch, common):
    seen, play = [], cem.play
    monkeypatch.setattr(cem, "play", lambda *a: seen.append(a[-1]) or play(*a))
    more = dict(common_seeds=common, episodes=3, candidates=4)
    cem.train(options(tmp_path, "Matched-v0", 24, **more))
    assert len(seen) == 6, "two generations of three episodes"
    assert all(len(set(seeds)) == (1 if common else 4) for seeds in seen)
    assert len({seeds[0] for seeds in seen}) == 6, "no episode has the seeds of another"


@pytest.mark.parametrize("env_id", ["Both-v0", "CartPole-v1"])
def test_fitness_is_of_whole_episodes_and_all_steps_are_counted(tmp_path, monkeypatch, env_id):
    played, play = [], cem.play
    monkeypatch.setattr(cem, "play", lambda *a: played.append(play(*a)) or played[-1])
    cem.train(options(tmp_path, env_id, 3_000, episodes=2))
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint["env_steps"] == sum(steps for *_, steps in played)
    lengths = sum(lengths.sum() for _, lengths, *_ in played)
    assert (checkpoint["env_steps"] == lengths) == (env_id == "Both-v0")
    log = EventAccumulator(str(tmp_path)).Reload()
    means = [np.mean([a[0], b[0]]) for a, b in zip(played[::2], played[1::2])]
    logged = [event.value for event in log.Scalars("losses/fitness")]
    np.testing.assert_allclose(logged, means, rtol=1e-6)


def test_each_generation_goes_on_from_the_update_of_its_elites(tmp_path, monkeypatch):
    """What is saved, and evaluated, is the last mean."""
    drawn, updates, sample, update = [], [], cem.sample, cem.cem_update
    note = lambda *a: drawn.append([x.clone() for x in a]) or sample(*a)  # noqa: E731
    monkeypatch.setattr(cem, "sample", note)
    monkeypatch.setattr(cem, "cem_update", lambda *a: updates.append(update(*a)) or updates[-1])
    more = dict(rho=0.25, noise=0.5, init_mean=2.0, init_var=9.0)
    cem.train(options(tmp_path, "Both-v0", 600, **more))
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    means, variances = zip(*updates)
    assert len(updates) > 2 and (drawn[0][0] == 2).all() and (drawn[0][1] == 9).all()
    for (mu, var, _), mean, variance in zip(drawn[1:], means, variances):
        assert torch.equal(mu, mean) and torch.equal(var, variance)
    assert torch.equal(saved["policy"]["mu"], means[-1])
    assert torch.equal(saved["search"]["var"], variances[-1])


# Learning


@pytest.mark.parametrize("more", [{}, {"common_seeds": True, "episodes": 2}], ids=str)
def test_reward_depends_on_action_and_observation(tmp_path, more):
    assert cem.train(options(tmp_path, "Matched-v0", 2_000, **more)).mean() == 1


@pytest.mark.parametrize(("noise", "decay"), [(0.01, False), (1.0, True)])
def test_continuous_action(tmp_path, noise, decay):
    more = dict(noise=noise, decay_noise=decay, layers=0, episodes=4)
    returns = cem.train(options(tmp_path, "MatchedBox-v0", 4_000, **more))
    assert returns.mean() > -0.1  # a constant action gets -4 at best


def test_integer_levels(tmp_path):
    """From 100 to 200 in a byte: a level that wraps, or a scale that ends early, misses 180."""
    assert cem.train(options(tmp_path, "Dimmer-v0", 3_000, noise=0.01)).mean() > 0.98


def test_decaying_noise_ends_at_zero(tmp_path):
    """With eta = 0 in the end the search narrows to nothing; with constant eta it cannot."""
    for decay, below in ((True, True), (False, False)):
        more = dict(noise=0.04, decay_noise=decay, layers=0)
        cem.train(options(tmp_path / str(decay), "MatchedBox-v0", 4_000, **more))
        path = tmp_path / str(decay) / "checkpoint.pt"
        var = torch.load(path, weights_only=True)["search"]["var"]
        assert (var.min() < 0.04).item() == below


def test_one_elite_needs_noise(tmp_path):
    for bad in (dict(rho=0.01), dict(init_var=0.0)):
        with pytest.raises(cem.Refusal, match="--noise 0"):
            cem.train(options(tmp_path, "Matched-v0", 10, noise=0.0, **bad))
    cem.train(options(tmp_path, "Matched-v0", 10, rho=0.01))
