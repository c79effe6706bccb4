"""awr.py: the lemma on a finite MDP, the oracle against an optimiser, the buffer, and the loop."""

import itertools
import math
import re

import awr
import envs
import numpy as np
import pytest
import torch
from conftest import command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# A finite MDP

GAMMA = 0.9
G = torch.Generator().manual_seed(0)
DOUBLE = {"generator": G, "dtype": torch.float64}
P = torch.rand(4, 3, 4, **DOUBLE).softmax(-1)  # p(s'|s, a)
R = torch.randn(4, 3, **DOUBLE)  # r(s, a)
START = torch.rand(4, **DOUBLE).softmax(-1)  # p(s_0)
PI, MU = torch.randn(2, 4, 3, **DOUBLE).softmax(-1)  # two policies
HORIZON = 250  # steps after which γ^t is nothing


def solve(policy):
    """V, Q and A of a policy, by linear algebra."""
    transition = torch.einsum("sa,saz->sz", policy, P)
    value = torch.linalg.solve(torch.eye(4) - GAMMA * transition, (policy * R).sum(-1))
    q = R + GAMMA * P @ value
    return value, q, q - value[:, None]


def marginals(policy, start=START):
    """p(s_t) for all t, (HORIZON, 4)."""
    rows = [start]
    for _ in range(HORIZON - 1):
        rows.append(torch.einsum("s,sa,saz->z", rows[-1], policy, P))
    return torch.stack(rows)


DISCOUNTS = GAMMA ** torch.arange(HORIZON, dtype=torch.float64)


def along(policy, f, start=START):
    """E_τ[Σ_t γ^t f(s_t, a_t)], step by step."""
    return (DISCOUNTS[:, None, None] * marginals(policy, start)[..., None] * policy * f).sum()


def test_performance_difference_lemma():
    v_mu, q_mu, a_mu = solve(MU)
    torch.testing.assert_close(q_mu, R + GAMMA * torch.einsum("saz,zb,zb->sa", P, MU, q_mu))
    torch.testing.assert_close(a_mu, q_mu - v_mu[:, None])
    torch.testing.assert_close((MU * a_mu).sum(-1), torch.zeros(4, dtype=torch.float64))
    difference = along(PI, R) - along(MU, R)
    torch.testing.assert_close(difference, along(PI, a_mu))
    assert difference.abs() > 0.1 and (difference - along(MU, a_mu)).abs() > 0.1


def test_steps_of_its_derivation():
    """The numbers of the derivation's equations; E over a and s' is written out as a sum."""
    (v_pi, _, _), (v_mu, _, a_mu) = solve(PI), solve(MU)
    joint = PI[..., None] * P  # π(a|s) p(s'|s, a)
    close = torch.testing.assert_close
    # 1, 2, 3: J of both policies; 4, 5, 18: their difference.
    close(along(PI, R), START @ v_pi)
    close(along(MU, R), START @ v_mu)
    close(along(PI, R) - along(MU, R), START @ (v_pi - v_mu))
    # 6, 7: Bellman. 8 to 10: V^μ(s_1) in and out again.
    reward = R[..., None]
    close((joint * (reward + GAMMA * v_pi)).sum((1, 2)), v_pi)
    difference, centred = v_pi - v_mu, v_mu[:, None, None]
    close((joint * (reward + GAMMA * v_pi)).sum((1, 2)) - v_mu, difference)
    both = reward + GAMMA * v_pi - GAMMA * v_mu + GAMMA * v_mu
    close((joint * both).sum((1, 2)) - v_mu, difference)
    split = reward + GAMMA * v_mu - centred + GAMMA * (v_pi - v_mu)
    close((joint * split).sum((1, 2)), difference)
    # 11: true of the mean over s_1, not of each.
    one_step = reward + GAMMA * v_mu - centred
    close((P * one_step).sum(-1), a_mu)
    assert (one_step - a_mu[..., None]).abs().max() > 0.1
    # 12, 13: at s_0, at s_1. 14, 15: one in the other, then apart.
    close((joint * (a_mu[..., None] + GAMMA * difference)).sum((1, 2)), difference)
    inner = (joint * (a_mu[..., None] + GAMMA * difference)).sum((1, 2))
    close((joint * (a_mu[..., None] + GAMMA * inner)).sum((1, 2)), difference)
    step, first = joint.sum(1), (PI * a_mu).sum(-1)
    close(first + GAMMA * step @ first + GAMMA**2 * step @ step @ difference, difference)
    # 16, 17: to the end, from each s_0. 19, 20: over s_0.
    each = torch.stack([along(PI, a_mu, start) for start in torch.eye(4, dtype=torch.float64)])
    close(each, difference)
    close(START @ each, along(PI, a_mu))


def visitation(policy):
    """d(s), the discounted state visitation, by linear algebra."""
    transition = torch.einsum("sa,saz->sz", policy, P)
    return (1 - GAMMA) * torch.linalg.solve(torch.eye(4) - GAMMA * transition.T, START)


def test_sums_over_time_are_means_over_visited_states():
    """For any f(s, a), and for A^μ."""
    f, d, close = torch.randn(4, 3, **DOUBLE), visitation(PI), torch.testing.assert_close
    # 2: d is a distribution, the discounted mean of p(s_t).
    close(d, (1 - GAMMA) * DISCOUNTS @ marginals(PI))
    assert d.sum().item() == pytest.approx(1)
    # 3 to 6: expectation and sum change places, (1 - γ) comes in. 7 to 9: with g(s).
    g = (PI * f).sum(-1)
    times = marginals(PI) @ g
    close(along(PI, f), (DISCOUNTS * times).sum())
    close(((1 - GAMMA) * DISCOUNTS * times).sum(), d @ g)
    # 1, 10: the identity. 11: for A^μ it is the lemma.
    close(along(PI, f), (d[:, None] * PI * f).sum() / (1 - GAMMA))
    a_mu = solve(MU)[2]
    close(along(PI, R) - along(MU, R), (d[:, None] * PI * a_mu).sum() / (1 - GAMMA))


def test_states_of_mu_for_those_of_pi():
    """The approximation is exact to first order in the step from μ: its error falls with ε²."""
    a_mu, d_mu = solve(MU)[2], visitation(MU)
    errors = []
    for epsilon in (0.02, 0.01):
        near = MU + epsilon * (PI - MU)
        inner = (near * a_mu).sum(-1)
        surrogate = (DISCOUNTS * (marginals(MU) @ inner)).sum()
        torch.testing.assert_close(surrogate, d_mu @ inner / (1 - GAMMA))  # the states as one d
        errors.append((along(near, a_mu) - surrogate).item())
        assert abs(errors[-1]) < 0.1 * abs(surrogate)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


def test_the_best_policy_is_the_best_of_both_sides():
    grid = [
        torch.eye(3, dtype=torch.float64)[list(a)] for a in itertools.product(range(3), repeat=4)
    ]
    a_mu, j_mu = solve(MU)[2], along(MU, R)
    gains = torch.stack([along(policy, R) - j_mu for policy in grid])
    sums = torch.stack([along(policy, a_mu) for policy in grid])
    torch.testing.assert_close(gains, sums)
    assert gains.argmax() == sums.argmax() and gains.max() > 0


# Divergences


def test_divergences():
    """The total variation, a sum of |p - q|, is twice what Pinsker's inequality bounds."""
    p, q = torch.randn(2, 10_000, 4, **DOUBLE).mul(2).softmax(-1)
    variation, kl = (p - q).abs().sum(-1), (p * (p / q).log()).sum(-1)
    reverse = (q * (q / p).log()).sum(-1)
    categorical = torch.distributions.Categorical
    torch.testing.assert_close(
        kl, torch.distributions.kl_divergence(categorical(p), categorical(q))
    )
    for bound in ((kl / 2).sqrt(), (reverse / 2).sqrt()):
        assert (variation / 2 <= bound).all(), "true with the factor of a half"
        assert (variation > bound).any(), "false as printed"
    # Densities: N(0, 1) and N(1, 1), on a grid.
    x = torch.linspace(-12, 13, 100_001, dtype=torch.float64)
    p, q = (torch.exp(-((x - m) ** 2) / 2) / math.sqrt(2 * math.pi) for m in (0, 1))
    variation, kl = torch.trapezoid((p - q).abs(), x), torch.trapezoid(p * (p / q).log(), x)
    assert variation.item() == pytest.approx(2 * math.erf(0.5 / math.sqrt(2)), abs=1e-6)
    assert kl.item() == pytest.approx(0.5, abs=1e-6)


# The oracle


def oracle(mu, advantages, alpha):
    """π*(a|s) from the weights that the script computes, and μ."""
    weights = mu * awr.advantage_weights(advantages, alpha, torch.inf)
    return weights / weights.sum(-1, keepdim=True)


def penalized(pi, mu, advantages, alpha):
    """E_π[A] - α KL(π ‖ μ), of each state."""
    return (pi * advantages - alpha * pi * (pi / mu).log()).sum(-1)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_oracle_maximises_the_penalized_advantage(alpha):
    """On the MDP, its first state being a bandit: against a numerical optimiser over π."""
    advantages, d_mu = solve(MU)[2], visitation(MU)
    logits = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    options = {"tolerance_grad": 1e-12, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([logits], max_iter=500, **options)

    def loss():
        optimizer.zero_grad()
        value = -(d_mu @ penalized(logits.softmax(-1), MU, advantages, alpha))
        value.backward()
        return value

    optimizer.step(loss)
    best = oracle(MU, advantages, alpha)
    torch.testing.assert_close(logits.detach().softmax(-1), best, atol=1e-5, rtol=0)
    others = torch.randn(1000, 4, 3, **DOUBLE).softmax(-1)
    values = penalized(others, MU, advantages, alpha)
    assert (values < penalized(best, MU, advantages, alpha)).all()


def test_temperature():
    """Small α: greedy. Large α: μ. Between them E_π[A] falls as α grows."""
    advantages = solve(MU)[2]
    greedy = torch.nn.functional.one_hot(advantages.argmax(-1), 3).double()
    torch.testing.assert_close(oracle(MU, advantages, 0.005), greedy, atol=1e-3, rtol=0)
    torch.testing.assert_close(oracle(MU, advantages, 1e4), MU, atol=1e-3, rtol=0)
    policies = [oracle(MU, advantages, alpha) for alpha in (0.01, 0.1, 1.0, 10.0, 100.0)]
    gains = torch.stack([(pi * advantages).sum(-1) for pi in policies])
    assert (gains.diff(dim=0) < 0).all() and (gains > 0).all()


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_regression_recovers_the_oracle_from_samples(alpha):
    """Weighted maximum likelihood on s ~ d^μ, a ~ μ, of a table of logits."""
    advantages, n = solve(MU)[2], 200_000
    states = torch.multinomial(visitation(MU), n, replacement=True, generator=G)
    actions = torch.multinomial(MU[states], 1, generator=G).squeeze(-1)
    weights = awr.advantage_weights(advantages[states, actions], alpha, torch.inf)
    logits = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=60)

    def loss():
        optimizer.zero_grad()
        logp = awr.softmax_log_prob(logits[states], actions)
        value = -awr.weighted_log_likelihood(weights, logp)
        value.backward()
        return value

    optimizer.step(loss)
    best = oracle(MU, advantages, alpha)
    torch.testing.assert_close(logits.detach().softmax(-1), best, atol=0.01, rtol=0)
    assert (best - MU).abs().max() > 0.1


# Equations


def test_weights_are_clipped():
    advantages = torch.tensor([-1.0, 0.0, 2.0, 10.0])
    exact = [math.exp(-2), 1, math.exp(4), 60]
    assert awr.advantage_weights(advantages, 0.5, 60.0).tolist() == pytest.approx(exact)


def test_the_likelihood_is_a_weighted_mean():
    weights, logp = torch.tensor([0.5, 2.0]), torch.tensor([-1.0, -3.0])
    assert awr.weighted_log_likelihood(weights, logp).item() == (-0.5 - 6) / 2


def test_effective_sample_size():
    assert awr.effective_sample_size(torch.full((7,), 3.0)).item() == pytest.approx(1)
    assert awr.effective_sample_size(torch.eye(5)[2]).item() == pytest.approx(1 / 5)
    assert awr.effective_sample_size(torch.tensor([1.0, 3.0])).item() == pytest.approx(16 / 20)


def test_excess_penalty():
    output = torch.tensor([[0.5, -3.0], [-1.5, 9.0]], requires_grad=True)
    ours = awr.excess_penalty(output, torch.tensor([1.0, torch.inf]))
    assert ours.item() == pytest.approx(0.5**2 / 2)
    slope = torch.autograd.grad(ours, output)[0]
    torch.testing.assert_close(slope, torch.tensor([[0.0, 0.0], [-0.5, 0.0]]))
    ours = awr.excess_penalty(output, torch.zeros(2))
    assert ours.item() == pytest.approx((0.25 + 9 + 2.25 + 81) / 2)


def test_td_lambda_is_the_recursion():
    """G_t = r_t + γ ((1 - λ) V(s_{t+1}) + λ G_{t+1}), and the ends as they ought to be."""
    rng = np.random.default_rng(0)
    T, K, N = 30, 3, 2
    rewards, values = rng.normal(size=(T, K, N)), rng.normal(size=(T + 1, K, N))
    terminated = rng.random((T, K, N)) < 0.1
    truncated = ~terminated & (rng.random((T, K, N)) < 0.1)
    exact = np.zeros((T + 1, K, N))
    exact[T] = values[T]
    for t, k, n in itertools.product(reversed(range(T)), range(K), range(N)):
        later = 0.2 * values[t + 1, k, n] + 0.8 * exact[t + 1, k, n]
        if truncated[t, k, n]:
            later = values[t + 1, k, n]
        exact[t, k, n] = rewards[t, k, n] + 0.9 * later * (not terminated[t, k, n])
    assert terminated.any() and truncated.any()
    arrays = (torch.from_numpy(x) for x in (rewards, values, terminated, truncated))
    ours = awr.gae(*arrays, 0.9, 0.8).numpy() + values[:T]
    np.testing.assert_allclose(ours, exact[:T], atol=1e-5)  # gae reads γ in float32


def test_momentum_is_torchs():
    theta, ours = torch.randn(2, 7)
    ours.copy_(theta)
    reference, momentum = torch.nn.Parameter(theta.clone()), awr.Momentum(ours)
    optimizer = torch.optim.SGD([reference], lr=0.1, momentum=0.9)
    for _ in range(5):
        reference.grad = torch.randn(7)
        optimizer.step()
        momentum.step(reference.grad, 0.1)
    torch.testing.assert_close(ours, reference.detach())


def test_each_loss_moves_its_own_network():
    norm = awr.RunningNorm(2)
    policy = awr.GaussianPolicy(norm, 2, awr.gym.spaces.Box(-1, 1, (3,)), 8, std=0.4)
    critic = awr.MLP(norm, 2, 8, 1, 0.01)
    obs, action, weight = torch.randn(9, 2), torch.randn(9, 3), torch.rand(9)

    def receivers(loss):
        policy.zero_grad(), critic.zero_grad()
        loss.backward()
        parameters = {f"{name}.{k}": p for name, m in (("policy", policy), ("critic", critic))
                      for k, p in m.named_parameters()}  # fmt: skip
        return {name.split(".")[0] for name, p in parameters.items() if p.grad is not None}

    objective = awr.weighted_log_likelihood(weight, policy.log_prob(policy(obs), action))
    assert receivers(objective) == {"policy"}
    assert receivers(awr.excess_penalty(policy(obs), torch.zeros(3))) == {"policy"}
    assert receivers(awr.value_loss(critic(obs).squeeze(-1), weight)) == {"critic"}
    assert not any(p.requires_grad for p in norm.buffers())


# Buffer


def small_buffer(rollouts, K=3):
    """T = 2, N = 4, every number that of its rollout."""
    buffer = awr.TrajectoryBuffer(2, K, 4, np.zeros(5, np.float32), np.int64(0))
    for i in range(rollouts):
        for x in buffer.next():
            x[:] = i
    return buffer


def test_buffer_overwrites_the_oldest_rollout():
    shapes = [x.shape for x in small_buffer(2).filled()]
    assert shapes == [(3, 2, 4, 5), *4 * [(2, 2, 4)], (3, 2, 4)]
    obs, actions, *_ = small_buffer(5).filled()
    assert (obs == np.array([3, 4, 2])[:, None, None]).all() and actions[0, :, 0].tolist() == [
        3,
        4,
        2,
    ]


def test_buffer_survives_a_checkpoint():
    for rollouts in (0, 2, 5):
        buffer, restored = small_buffer(rollouts), small_buffer(0)
        restored.load_state_dict(buffer.state_dict())
        for ours, theirs in zip(restored.filled(), buffer.filled(), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        restored.next()[0][:] = 7
        assert (restored.data[0][:, rollouts % 3] == 7).all(), "the ring goes on where it was"
    with pytest.raises(ValueError, match="buffer"):
        small_buffer(0, K=2).load_state_dict(small_buffer(5).state_dict())


def test_buffers_that_cannot_be_are_refused():
    for size in (10**12, 2047):
        status, _, err = command("awr", "--buffer-size", size)
        assert status == 2 and "--buffer-size" in err and len(err.splitlines()) == 1


def test_minibatches_are_whole_passes_in_new_orders():
    rows = torch.arange(11)
    batches = [x for x, y in awr.minibatches((rows, -rows), 4, 7) if torch.equal(x, -y)]
    assert [len(x) for x in batches] == 7 * [4]
    passes = [torch.cat(batches[i : i + 2]).tolist() for i in (0, 2, 4)]
    assert all(len(set(p)) == 8 for p in passes) and passes[0] != passes[1]
    assert len(set(sum(passes, []))) > 8, "what one pass leaves out is in others"
    few = list(awr.minibatches((rows,), 20, 3))
    assert [sorted(x.tolist()) for (x,) in few] == 3 * [rows.tolist()]


# Learning

COMMON = dict(num_envs=16, num_steps=32, batch_size=64, critic_steps=100, actor_steps=100)
COMMON |= dict(buffer_size=4096, hidden=32, gamma=0.9, eval_episodes=20)
COMMON |= dict(critic_learning_rate=5e-3, actor_learning_rate=2e-3)


def trained(tmp_path, env_id, steps, **options):
    """Evaluation returns, the checkpoint, and V_φ as a function of observations."""
    options = {**COMMON, **options}
    args = awr.Args(env_id=env_id, total_timesteps=steps, run_dir=str(tmp_path), **options)
    returns = awr.train(args)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    norm = awr.RunningNorm(2) if args.norm_obs else None
    critic = awr.MLP(norm, 2, args.hidden, 1, 0.01)
    critic.load_state_dict(checkpoint["critic"])

    def value(*obs):
        return (critic(torch.tensor(obs).float()).squeeze(-1) / (1 - args.gamma)).tolist()

    return returns, checkpoint, value


def scalars(tmp_path):
    """What the run logged: name -> values."""
    log = EventAccumulator(str(tmp_path)).Reload()
    return {tag: [event.value for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def test_constant_reward(tmp_path):
    _, _, value = trained(tmp_path, "Constant-v0", 3_000, actor_steps=1)
    assert value([0, 0]) == pytest.approx([1], abs=0.02)


def test_two_step_credit(tmp_path):
    returns, _, value = trained(tmp_path, "TwoStep-v0", 6_000)
    assert returns.mean() == 1
    assert value([0, 1], [0, -1]) == pytest.approx([0.8, 0.8], abs=0.12)  # of μ, better by and by


def test_reward_depends_on_the_observation(tmp_path):
    _, _, value = trained(tmp_path, "Observed-v0", 4_000, actor_steps=1)
    assert value([1, 0], [-1, 0]) == pytest.approx([1, -1], abs=0.05)


RAW = {"norm_advantages": False, "alpha": 0.3}
SGD = {"optimizer": "sgd", "actor_learning_rate": 0.05, "critic_learning_rate": 0.05}


@pytest.mark.parametrize("options", [{}, RAW, SGD, {"norm_obs": False}], ids=str)
def test_reward_depends_on_action_and_observation(tmp_path, options):
    returns, _, _ = trained(tmp_path, "Matched-v0", 3_000, **options)
    assert returns.mean() == 1


def test_continuous_action(tmp_path):
    returns, checkpoint, _ = trained(tmp_path, "MatchedBox-v0", 5_000)
    assert returns.mean() > -0.1  # a constant action gets -4 at best
    assert checkpoint["policy"]["log_std"].exp().item() == pytest.approx(0.4), "σ is fixed"


def test_time_limit_does_not_end_the_value(tmp_path):
    _, _, value = trained(tmp_path, "Truncates-v0", 10_000, actor_steps=1)
    assert value([0, 0]) == pytest.approx([10], abs=0.3)


def test_termination_ends_the_value(tmp_path):
    _, _, value = trained(tmp_path, "Terminates-v0", 10_000, actor_steps=1)
    exact = [(1 - 0.9 ** (5 - t)) / 0.1 for t in range(5)]
    assert value(*([t - 2.5, 0] for t in range(5))) == pytest.approx(exact, abs=0.15)


def test_both_ends(tmp_path):
    calm = dict(batch_size=256, critic_learning_rate=2e-3, buffer_size=16_384, actor_steps=1)
    _, _, value = trained(tmp_path, "Both-v0", 16_000, **calm)  # its returns are random
    assert value([0, 0]) == pytest.approx([1 / (1 - 0.8 * 0.9)], abs=0.15)


@pytest.mark.parametrize("env_id", ["Matched-v0", "MatchedBox-v0"])
def test_learns_from_the_data_of_a_random_policy(tmp_path, env_id):
    """Without a step on θ the policy that acts stays random; then its buffer alone, no acting."""
    _, checkpoint, _ = trained(tmp_path / "data", env_id, 4_000, actor_learning_rate=0.0)
    _, _, rewards, _, _, valid = checkpoint["buffer"]["data"]
    mean_reward = rewards[valid[:-1]].mean().item()
    assert mean_reward == pytest.approx(0 if env_id == "Matched-v0" else -8, abs=0.5)
    before = envs.Tiny.steps
    options = {"data": str(tmp_path / "data/checkpoint.pt"), "num_envs": 8, "alpha": 0.2}
    returns, learned, value = trained(tmp_path / "run", env_id, 4_000, **options)
    assert envs.Tiny.steps - before == len(returns), "only the evaluation acted"
    assert returns.mean() > (0.99 if env_id == "Matched-v0" else -0.5)
    for ours, theirs in zip(learned["buffer"]["data"], checkpoint["buffer"]["data"], strict=True):
        assert torch.equal(ours, theirs)
    if env_id == "Matched-v0":  # the value of the random policy, not of the one it leads to
        assert value([1, 0], [-1, 0]) == pytest.approx([0, 0], abs=0.2)


def test_data_of_other_spaces_and_no_data(tmp_path):
    trained(tmp_path, "Matched-v0", 500)
    path = tmp_path / "checkpoint.pt"
    for options in (["--env-id", "Acrobot-v1", "--data", path], ["--data", "/no/such/file.pt"]):
        status, _, err = command("awr", *options, "--run-dir", tmp_path / "run")
        assert status == 2 and str(options[-1]) in err and len(err.splitlines()) == 1


def test_values_are_those_of_the_present_critic(tmp_path, monkeypatch):
    """Twice an iteration, over the whole buffer: before the critic's fit and after it."""
    seen, gae = [], awr.gae
    monkeypatch.setattr(awr, "gae", lambda r, v, *rest: seen.append(v) or gae(r, v, *rest))
    _, checkpoint, value = trained(tmp_path, "Both-v0", 1_500)
    assert len(seen) >= 6 and len(seen) % 2 == 0
    obs = checkpoint["buffer"]["data"][0]
    exact = torch.tensor(value(*obs.tolist()))
    torch.testing.assert_close(seen[-1], exact)
    assert (seen[-2] - exact).abs().max() > 0.01
    assert seen[0].abs().max() < 1, "the last layer begins near 0"


def test_the_normaliser_is_frozen(tmp_path):
    _, checkpoint, _ = trained(tmp_path, "Observed-v0", 2_000, norm_steps=700)
    assert 700 <= checkpoint["policy"]["norm.count"] < 700 + 16 * 32


@pytest.mark.parametrize("env_id", ["Constant-v0", "TwoStep-v0", "Truncates-v0"])
def test_only_real_steps_are_counted(tmp_path, capsys, env_id):
    """Odd rollouts, so that reset steps fall on their borders too."""
    before, length = envs.Tiny.steps, {"Constant-v0": 1, "TwoStep-v0": 2, "Truncates-v0": 5}[env_id]
    options = dict(num_steps=7, num_envs=3, actor_steps=1, critic_steps=1, buffer_size=63)
    returns, checkpoint, _ = trained(tmp_path, env_id, 200, **options)
    counted = int(re.search(r"env_steps=(\d+)", capsys.readouterr().out)[1])
    assert counted == envs.Tiny.steps - before - length * len(returns)
    lengths = scalars(tmp_path)["charts/episodic_length"]
    assert lengths == pytest.approx([length] * len(lengths))
    *_, terminated, truncated, valid = checkpoint["buffer"]["data"]
    assert torch.equal(valid[1:], ~(terminated | truncated))
    added = checkpoint["buffer"]["added"]
    order = [k % 3 for k in range(added - 3, added)]
    assert torch.equal(valid[0, order[1:]], valid[7, order[:-1]]), "the mask carries over"


def test_reset_steps_and_borders_train_nothing(tmp_path, monkeypatch):
    """Every real step of the buffer, with the observation it was taken at, and no other."""
    seen, minibatches = [], awr.minibatches
    spy = lambda batch, *rest: seen.append(batch) or minibatches(batch, *rest)  # noqa: E731
    monkeypatch.setattr(awr, "minibatches", spy)
    options = dict(num_steps=7, num_envs=3, actor_steps=1, critic_steps=1, buffer_size=63)
    trained(tmp_path, "Terminates-v0", 300, **options)
    for obs, returns in seen[::2]:
        assert set(obs[:, 0].tolist()) <= {t - 2.5 for t in range(5)}  # not the last, 2.5
        assert len(obs) == len(returns)


def test_the_temperature_reaches_the_weights(tmp_path):
    sizes = []
    for alpha in (0.1, 1.0, 100.0):
        trained(tmp_path / str(alpha), "Both-v0", 600, alpha=alpha)
        logged = scalars(tmp_path / str(alpha))
        sizes.append(logged["losses/effective_sample_size"][-1])
        assert max(logged["losses/weight_clipped"]) == (0 if alpha > 1 else pytest.approx(0, abs=1))
    assert sizes[0] < sizes[1] < sizes[2] and sizes[2] > 0.99


def test_options_reach_the_update(tmp_path):
    """Options that change an update change the weights; a default spelt out does not."""

    def weights(env_id, **options):
        return trained(tmp_path, env_id, 500, **options)[1]["policy"]

    base = {env_id: weights(env_id) for env_id in ("Both-v0", "MatchedBox-v0")}

    def differs(env_id, **options):
        ours = weights(env_id, **options)
        return any(not torch.equal(ours[k], v) for k, v in base[env_id].items())

    assert not differs("Both-v0", alpha=1.0, max_weight=20.0)
    assert differs("Both-v0", max_weight=0.5) and differs("Both-v0", norm_advantages=False)
    assert differs("Both-v0", logit_penalty=0.0) and not differs("Both-v0", bound_penalty=0.0)
    assert not differs("MatchedBox-v0", logit_penalty=0.0)


def test_the_bound_penalty_holds_the_mean_inside(tmp_path):
    """Clipped, whatever lies beyond the bound is best: without the penalty the mean goes there."""
    means = []
    for penalty in (0.0, 10.0):
        options = dict(bound_penalty=penalty, actor_learning_rate=5e-3)
        _, checkpoint, _ = trained(tmp_path, "Outside-v0", 4_000, **options)
        policy = awr.GaussianPolicy(
            awr.RunningNorm(2), 2, awr.gym.spaces.Box(-1, 1, (1,)), 32, std=0.4
        )
        policy.load_state_dict(checkpoint["policy"])
        means.append(policy(torch.zeros(1, 2)).item())
    assert means[1] < 1.1 < means[0], means


class Outside(envs.Tiny):
    """Rewards the largest action there is: what is sampled beyond the bound is clipped to it."""

    action_space = awr.gym.spaces.Box(-1, 1, (1,), np.float32)

    def outcome(self, action):
        return action[0], True, False


awr.gym.register("Outside-v0", Outside, disable_env_checker=True, order_enforce=False)
