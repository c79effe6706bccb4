"""awr.py: its weighted regression against the oracle, its λ-returns, its buffer, and its loop."""

import itertools
import math
import re

import awr
import envs
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Equations


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_regression_recovers_the_oracle_from_samples(alpha):
    """Weighted maximum likelihood on s ~ d, a ~ μ, of a table of logits, is π* ∝ μ exp(A / α)."""
    g = torch.Generator().manual_seed(0)
    double = {"generator": g, "dtype": torch.float64}
    mu, d = torch.randn(4, 3, **double).softmax(-1), torch.rand(4, **double)
    advantages, n = torch.randn(4, 3, **double), 200_000
    states = torch.multinomial(d, n, replacement=True, generator=g)
    actions = torch.multinomial(mu[states], 1, generator=g).squeeze(-1)
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
    oracle = mu * (advantages / alpha).exp()
    oracle /= oracle.sum(-1, keepdim=True)
    torch.testing.assert_close(logits.detach().softmax(-1), oracle, atol=0.02, rtol=0)
    assert (oracle - mu).abs().max() > 0.1


def test_weights_grow_with_the_advantage_up_to_the_clip():
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
    for exponent in -100, -60, 60, 85:  # of weights whose squares float32 cannot hold
        weights = torch.tensor([exponent, exponent, -math.inf]).exp()
        assert awr.effective_sample_size(weights).item() == pytest.approx(2 / 3)
    assert awr.effective_sample_size(torch.zeros(4)).item() == 0


def test_excess_penalty():
    """½ the squared excess, its gradient the excess, as in the authors' code."""
    output = torch.tensor([[0.5, -3.0], [-1.5, 9.0]], requires_grad=True)
    ours = awr.excess_penalty(output, torch.tensor([1.0, torch.inf]))
    assert ours.item() == pytest.approx(0.5 * 0.5**2 / 2)
    slope = torch.autograd.grad(ours, output)[0]
    torch.testing.assert_close(slope, torch.tensor([[0.0, 0.0], [-0.5 / 2, 0.0]]))
    ours = awr.excess_penalty(output, torch.zeros(2))
    assert ours.item() == pytest.approx(0.5 * (0.25 + 9 + 2.25 + 81) / 2)
    torch.testing.assert_close(torch.autograd.grad(ours, output)[0], output.detach() / 2)


def test_lambda_returns_are_the_recursion():
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
    np.testing.assert_allclose(ours, exact[:T], atol=1e-6)


# Networks


LOW = [-1, 0, -np.inf, -1e30, -1, -2e9, -9e8, -np.inf]
HIGH = [1, 10, np.inf, 1e30, 1e30, 5, 9e8, 2]


class AnyBox(envs.Observed):
    """Actions with bounds, without, and with ones so far away that they are none."""

    action_space = gym.spaces.Box(np.float64(LOW), np.float64(HIGH), dtype=np.float64)


def test_the_penalty_has_the_bounds_that_actions_are_scaled_to():
    """Where ±1 is the bound itself, as box_actions has it; huge bounds are none."""
    env = AnyBox()
    limits, to_env = awr.output_limits(env), awr.box_actions(env.action_space)
    least, most = to_env(np.array([8 * [-1.0], 8 * [1.0]]))
    scaled = (least == env.action_space.low) & (most == env.action_space.high)
    assert limits.tolist() == [1.0 if x else math.inf for x in scaled]
    assert scaled.tolist() == [True, True, False, False, False, False, True, False]
    matrix = gym.spaces.Box(-1, 1, (2, 3))
    env.action_space = matrix
    assert awr.output_limits(env).tolist() == 6 * [1.0]
    env.action_space = gym.spaces.Discrete(3, start=5)
    assert awr.output_limits(env).tolist() == 3 * [0.0]


def networks(env_id, **options):
    """A policy and a critic for env_id."""
    args = awr.Args(env_id=env_id, **{"hidden": 8, **options})
    env = awr.make_env(args)
    policy = awr.make_policy(env, args)
    norm = [policy[0]] if args.norm_obs else []
    return policy, torch.nn.Sequential(*norm, *awr.mlp(env, args, 1, 0.01))


def test_each_loss_moves_its_own_network():
    policy, critic = networks("MatchedBox-v0")
    obs, action, weight = torch.randn(9, 2), torch.randn(9, 1), torch.rand(9)

    def receivers(loss):
        policy.zero_grad(), critic.zero_grad()
        loss.backward()
        parameters = [*policy.named_parameters("policy"), *critic.named_parameters("critic")]
        return {name.split(".")[0] for name, p in parameters if p.grad is not None}

    objective = awr.weighted_log_likelihood(weight, policy.log_prob(policy(obs), action))
    assert receivers(objective) == {"policy"}
    assert receivers(awr.excess_penalty(policy(obs), torch.zeros(1))) == {"policy"}
    assert receivers(awr.value_loss(critic(obs).squeeze(-1), weight)) == {"critic"}
    assert not any(p.requires_grad for p in policy[0].buffers())


# Buffer


def small_buffer(rollouts, size=3, obs_dim=5):
    """T = 2, N = 4, every number that of its rollout."""
    example = np.zeros((3, 4, obs_dim), np.float32), np.zeros((2, 4), np.int64)
    buffer = awr.TrajectoryBuffer(size, example)
    for i in range(rollouts):
        buffer.add([np.full_like(x, i) for x in example])
    return buffer


def test_buffer_overwrites_the_oldest_rollout():
    assert [x.shape for x in small_buffer(2).tensors()] == [(3, 2, 4, 5), (2, 2, 4)]
    obs, actions = small_buffer(5).tensors()
    assert (obs == torch.tensor([3, 4, 2])[:, None, None]).all()
    assert actions[0, :, 0].tolist() == [3, 4, 2]


@pytest.mark.parametrize("rollouts", [0, 2, 5])
@pytest.mark.parametrize("size", [3, 4])
def test_buffer_survives_a_checkpoint(rollouts, size):
    """Also one that is to be larger from here on."""
    buffer, restored = small_buffer(rollouts), small_buffer(0, size)
    restored.load_state_dict(buffer.state_dict())
    for ours, theirs in zip(restored.tensors(), buffer.tensors(), strict=True):
        assert torch.equal(ours, theirs)
    restored.add([np.full_like(x[0], 7) for x in restored.data])
    at = rollouts % 3 if size == 3 else min(rollouts, 3)
    assert (restored.data[0][at] == 7).all(), "the ring goes on where it was"
    kept = restored.tensors()[1][0, :, 0].tolist()
    assert len(kept) == min(rollouts + 1, size) and kept.count(7) == 1


def test_saving_does_not_copy_the_buffer():
    buffer = small_buffer(2)
    saved = buffer.state_dict()["data"]
    assert [x.data_ptr() for x in saved] == [x.ctypes.data for x in buffer.data]
    assert [len(x) for x in saved] == [2, 2]
    assert sum(x.untyped_storage().nbytes() for x in saved) == 2 * 4 * (3 * 5 * 4 + 2 * 8)


@pytest.mark.parametrize(
    ("room", "saved"), [(dict(size=2), {}), (dict(obs_dim=6), {}), ({}, dict(obs_dim=1))], ids=str
)
def test_a_buffer_of_another_size_is_refused(room, saved):
    """Also one that numpy would repeat until it fits."""
    with pytest.raises(ValueError):
        small_buffer(0, **room).load_state_dict(small_buffer(3, **saved).state_dict())


@pytest.mark.parametrize("size", [2047, 10**12, 10**18])
def test_buffers_that_cannot_be_are_refused_in_one_line(size, tmp_path):
    status, _, err = command("awr", "--buffer-size", size, "--run-dir", tmp_path)
    assert status == 2 and "--buffer-size" in err and len(err.splitlines()) == 1


def test_minibatches_are_drawn_row_by_row():
    rows = torch.arange(11)
    drawn = [x for x, y in awr.draw((rows, -rows), 4, 700) if torch.equal(x, -y)]
    assert len(drawn) == 700 and {len(x) for x in drawn} == {4}
    counts = torch.cat(drawn).bincount(minlength=11)
    assert counts.min() > 200 and counts.max() < 310, "of 255 on average"


# Loop

COMMON = dict(num_envs=16, num_steps=32, batch_size=64, critic_steps=100, actor_steps=100)
COMMON |= dict(buffer_size=4096, hidden=32, gamma=0.9, eval_episodes=20)
COMMON |= dict(critic_learning_rate=5e-3, actor_learning_rate=2e-3)
ODD = dict(num_steps=7, num_envs=3, actor_steps=1, critic_steps=1, buffer_size=63)


def trained(tmp_path, env_id, steps, **options):
    """Evaluation returns, the checkpoint, and V_φ as a function of observations."""
    args = {**COMMON, "run_dir": str(tmp_path), **options}
    returns = awr.train(awr.Args(env_id=env_id, total_timesteps=steps, **args))
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    _, critic = networks(env_id, hidden=args["hidden"], norm_obs=args.get("norm_obs", True))
    critic.load_state_dict(checkpoint["critic"])

    def value(*obs):
        return (critic(torch.tensor(obs).float()).squeeze(-1) / (1 - args["gamma"])).tolist()

    return returns, checkpoint, value


def scalars(tmp_path):
    """What the run logged: name -> values."""
    log = EventAccumulator(str(tmp_path)).Reload()
    return {tag: [event.value for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def spied(monkeypatch, function):
    """A list of (arguments, result) of every call of this function of awr."""
    calls, original = [], getattr(awr, function)

    def spy(*a):
        calls.append((a, original(*a)))
        return calls[-1][1]

    monkeypatch.setattr(awr, function, spy)
    return calls


def test_two_step_credit(tmp_path):
    returns, _, value = trained(tmp_path, "TwoStep-v0", 6_000)
    assert returns.mean() == 1
    assert value([0, 1], [0, -1]) == pytest.approx([0.8, 0.8], abs=0.12)  # of μ, better by and by


RAW = {"norm_advantages": False, "alpha": 0.3}


@pytest.mark.parametrize("options", [{}, RAW, {"norm_obs": False}], ids=str)
def test_reward_depends_on_action_and_observation(tmp_path, options):
    returns, _, _ = trained(tmp_path, "Matched-v0", 3_000, **options)
    assert returns.mean() == 1


def test_continuous_action(tmp_path):
    returns, checkpoint, _ = trained(tmp_path, "MatchedBox-v0", 5_000)
    assert returns.mean() > -0.1  # a constant action gets -4 at best
    assert checkpoint["policy"]["log_std"].exp().item() == pytest.approx(0.4), "σ is fixed"


def test_an_integer_box_is_learned(tmp_path):
    returns, _, _ = trained(tmp_path, "Dimmer-v0", 5_000)
    assert returns.mean() > 0.95


def test_time_limit_does_not_end_the_value(tmp_path):
    _, _, value = trained(tmp_path, "Truncates-v0", 10_000, actor_steps=1)
    assert value([0, 0]) == pytest.approx([10], abs=0.3)


def test_a_time_limit_bootstraps_from_the_final_observation(tmp_path):
    """Not from the first one of the next episode, which stands for another state."""
    _, _, value = trained(tmp_path, "Stays-v0", 10_000, actor_steps=1)
    assert value([1, 0], [-1, 0]) == pytest.approx([10, -10], abs=0.5)


def test_termination_ends_the_value(tmp_path):
    _, _, value = trained(tmp_path, "Terminates-v0", 6_000, actor_steps=1)
    exact = [(1 - 0.9 ** (5 - t)) / 0.1 for t in range(5)]
    assert value(*([t - 2.5, 0] for t in range(5))) == pytest.approx(exact, abs=0.15)


def test_lambda_decides_the_returns(tmp_path, monkeypatch):
    """Five steps of reward 1, γ = 0.9, with a critic that never moves from about 0."""
    calls, gae = spied(monkeypatch, "value_loss"), spied(monkeypatch, "gae")
    for i, gae_lambda in enumerate((0.0, 0.5, 1.0)):
        options = dict(gae_lambda=gae_lambda, critic_learning_rate=0.0, num_steps=30)
        _, _, value = trained(tmp_path / str(i), "Terminates-v0", 400, **options)
        v = [*value(*([t - 2.5, 0] for t in range(5))), 0.0]
        exact, later = [], 0.0
        for t in reversed(range(5)):
            later = 1 + 0.9 * ((1 - gae_lambda) * v[t + 1] + gae_lambda * later)
            exact.append(later)
        seen = torch.cat([targets for (_, targets), _ in calls]).unique() / (1 - 0.9)
        distance = (seen[:, None] - torch.tensor(exact)).abs()
        assert distance.amin(1).max() < 1e-4 and distance.amin(0).max() < 1e-4
        assert torch.equal(gae[-2][1], gae[-1][1]), "returns and advantages are of one λ"
        calls.clear()


def test_values_are_those_of_the_present_critic(tmp_path, monkeypatch):
    """Twice an iteration, over the whole buffer: before the critic's steps and after them."""
    calls = spied(monkeypatch, "gae")
    _, checkpoint, value = trained(tmp_path, "Both-v0", 1_500)
    seen = [values for (_, values, *_), _ in calls]
    assert len(seen) >= 6 and len(seen) % 2 == 0
    obs = checkpoint["buffer"]["data"][0].transpose(0, 1)
    exact = torch.tensor(value(*obs.tolist()))
    torch.testing.assert_close(seen[-1], exact)
    assert (seen[-2] - exact).abs().max() > 0.01
    assert seen[0].abs().max() < 1, "the last layer begins near 0"


def test_advantages_become_weights_become_the_actors(tmp_path, monkeypatch):
    """Standardised or raw, of real steps alone; with α and w_max; each weight with its action."""
    for norm in (True, False):
        gae, made = spied(monkeypatch, "gae"), spied(monkeypatch, "advantage_weights")
        used, options = spied(monkeypatch, "weighted_log_likelihood"), dict(alpha=0.7, max_weight=2)
        options |= dict(norm_advantages=norm, actor_learning_rate=0.0)
        _, checkpoint, _ = trained(tmp_path / str(norm), "Wander-v0", 1_500, **options)
        *_, real = checkpoint["buffer"]["data"]
        exact = gae[-1][1][real.transpose(0, 1)]
        if norm:
            exact = (exact - exact.mean()) / exact.std(correction=0)
        (advantages, alpha, max_weight), weights = made[-1]
        assert (alpha, max_weight) == (0.7, 2)
        torch.testing.assert_close(advantages, exact, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(weights, (advantages / 0.7).exp().clamp(max=2))
        assert (weights == 2).any() and (weights < 1).any()
        policy, _ = networks("Wander-v0", hidden=32)
        policy.load_state_dict(checkpoint["policy"])
        obs, actions = (x.transpose(0, 1) for x in checkpoint["buffer"]["data"][:2])
        rows = real.transpose(0, 1)
        logp = policy.log_prob(policy(obs[:-1][rows]), actions[rows])
        pairs = torch.stack([weights, logp], -1).detach()
        for (w, lp), _ in used[-3:]:  # every pair that is learned is one of these
            distance = (torch.stack([w, lp], -1).detach()[:, None] - pairs).abs().sum(-1)
            assert len(w) == 64 and distance.amin(1).max() < 1e-4
        monkeypatch.undo()


def test_only_real_steps_are_learned_from(tmp_path, monkeypatch):
    """With the observation they were taken at: the last one of an episode, 2.5, is none of them."""
    batches, draw = [], awr.draw
    spy = lambda batch, *rest: batches.append(batch) or draw(batch, *rest)  # noqa: E731
    monkeypatch.setattr(awr, "draw", spy)
    _, checkpoint, _ = trained(tmp_path, "Terminates-v0", 300, **ODD)
    seen = {time for obs, *_ in batches for time in obs[:, 0].tolist()}
    assert seen == {-2.5, -1.5, -0.5, 0.5, 1.5}
    *_, real = checkpoint["buffer"]["data"]
    assert all(len(x) == real.sum() for x in batches[-1]) and not real.all()


@pytest.mark.parametrize("env_id", ["Constant-v0", "TwoStep-v0", "Truncates-v0"])
def test_only_real_steps_are_counted(tmp_path, capsys, env_id):
    """Odd rollouts, so that reset steps fall on their borders too."""
    before, length = envs.Tiny.steps, {"Constant-v0": 1, "TwoStep-v0": 2, "Truncates-v0": 5}[env_id]
    returns, checkpoint, _ = trained(tmp_path, env_id, 200, **ODD)
    counted = int(re.search(r"env_steps=(\d+)", capsys.readouterr().out)[1])
    assert counted == envs.Tiny.steps - before - length * len(returns)
    lengths = scalars(tmp_path)["charts/episodic_length"]
    assert lengths == pytest.approx([length] * len(lengths))
    *_, terminated, truncated, real = checkpoint["buffer"]["data"]
    assert torch.equal(real[:, 1:], ~(terminated | truncated)[:, :-1])
    added = checkpoint["buffer"]["added"]
    newest, before = (added - 1) % 3, (added - 2) % 3
    ended = (terminated | truncated)[before, -1]
    assert torch.equal(real[newest, 0], ~ended), "the mask carries over"


def test_the_statistics_are_of_real_steps_and_change_before_the_updates(tmp_path, monkeypatch):
    """Once an iteration, so that values, critic and actor see the same, and so does who acts next."""
    counts, include, log = [], awr.RunningNorm.include, awr.Run.log

    def noting(self, x):
        include(self, x)
        counts.append(["include", self.count.item()])

    def logging(self, **losses):
        norm = self.learner["policy"][0]
        counts.append(["log", norm.count.item(), self.step])
        log(self, **losses)

    gae = awr.gae
    monkeypatch.setattr(awr.RunningNorm, "include", noting)
    monkeypatch.setattr(awr.Run, "log", logging)
    monkeypatch.setattr(awr, "gae", lambda *a: counts.append(["gae"]) or gae(*a))
    _, checkpoint, _ = trained(tmp_path, "Terminates-v0", 1_000, num_steps=30)
    assert [kind for kind, *_ in counts] == 3 * ["include", "gae", "gae", "log"]
    assert [c[1:] for c in counts if c[0] == "log"] == [[n, n] for n in (400, 800, 1200)]
    # Five times from -2.5 to 1.5, as often each; the second number is always 0.
    for part in "policy", "critic":
        torch.testing.assert_close(checkpoint[part]["0.mean"], torch.tensor([-0.5, 0.0]))
        torch.testing.assert_close(checkpoint[part]["0.var"], torch.tensor([2.0, 0.0]))


def test_the_policy_is_evaluated_with_its_normaliser(tmp_path):
    """1000 ± 1 cannot be told apart without it."""
    returns, checkpoint, _ = trained(tmp_path, "Shifted-v0", 3_000)
    assert returns.mean() == 1
    policy, _ = networks("Shifted-v0", hidden=32)
    policy.load_state_dict(checkpoint["policy"])
    assert policy.act(np.array([[999.0, 0], [1001.0, 0]])).tolist() == [0, 1]


def test_actions_are_kept_as_they_were_sampled(tmp_path):
    """Of deviation σ around the mean, not scaled to the environment nor clipped to its bounds."""
    options = dict(actor_learning_rate=0.0, init_std=0.7, critic_steps=1, actor_steps=1)
    _, checkpoint, _ = trained(tmp_path, "MatchedBox-v0", 4_000, **options)
    obs, actions, rewards, *_, real = checkpoint["buffer"]["data"]
    policy, _ = networks("MatchedBox-v0", hidden=32)
    policy.load_state_dict(checkpoint["policy"])
    deviation = (actions - policy(obs[:, :-1]).detach())[real]
    assert deviation.std().item() == pytest.approx(0.7, rel=0.05)
    assert abs(deviation.mean().item()) < 0.05 and actions[real].abs().max() > 1.5
    sent = (5 + 5 * actions[real]).clamp(0, 10).squeeze(-1)
    exact = -((sent - 5 - 2 * obs[:, :-1][real][:, 0]) ** 2)
    torch.testing.assert_close(rewards[real], exact, atol=1e-3, rtol=1e-4)


def test_the_temperature_reaches_the_weights(tmp_path):
    """The larger, the more of the buffer counts."""
    sizes = []
    for alpha in (0.1, 1.0, 100.0):
        trained(tmp_path / str(alpha), "Wander-v0", 600, alpha=alpha, max_weight=1e12)
        sizes.append(scalars(tmp_path / str(alpha))["losses/effective_sample_size"][-1])
    assert sizes[0] < 0.2 < 0.4 < sizes[1] < 0.7 < 0.99 < sizes[2]


def test_losses_are_means_over_the_updates_and_the_entropy_is_of_the_whole_buffer(
    tmp_path, monkeypatch
):
    values, likelihoods = spied(monkeypatch, "value_loss"), spied(monkeypatch, "excess_penalty")
    objectives = spied(monkeypatch, "weighted_log_likelihood")
    _, checkpoint, _ = trained(tmp_path, "Wander-v0", 400, num_steps=64)
    logged, n = scalars(tmp_path), COMMON["critic_steps"]
    assert len(values) == len(objectives) == n, "one iteration"
    exact = torch.stack([x.detach() for _, x in values]).mean().item()
    assert logged["losses/value_loss"] == pytest.approx([exact], rel=1e-5)
    losses = [1e-3 * p - o for (_, p), (_, o) in zip(likelihoods, objectives, strict=True)]
    exact = torch.stack(losses).mean().item()
    assert logged["losses/policy_loss"] == pytest.approx([exact], rel=1e-5)
    policy, _ = networks("Wander-v0", hidden=32)
    policy.load_state_dict(checkpoint["policy"])
    obs, *_, real = checkpoint["buffer"]["data"]
    exact = awr.softmax_entropy(policy(obs[:, :-1][real])).mean().item()
    assert logged["losses/last_entropy"] == pytest.approx([exact], rel=1e-5)


# Penalties


class Far(envs.Tiny):
    """-(a - 3)² for an action without bounds, or with one so far away that it is none."""

    def __init__(self, bound=np.inf):
        self.action_space = gym.spaces.Box(-bound, bound, (1,), np.float64)

    def outcome(self, action):
        return -((action[0] - 3) ** 2), True, False


class Outside(envs.Tiny):
    """Rewards the largest action there is: what is sampled beyond the bound is clipped to it."""

    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def outcome(self, action):
        return action[0], True, False


for env in (AnyBox, Far, Outside):
    gym.register(f"{env.__name__}-v0", env, disable_env_checker=True, order_enforce=False)


def mean_action(checkpoint, env_id):
    """m_θ at the observation 0."""
    policy, _ = networks(env_id, hidden=32)
    policy.load_state_dict(checkpoint["policy"])
    return policy(torch.zeros(1, 2)).item()


def test_the_penalty_holds_the_mean_inside_the_bounds(tmp_path, monkeypatch):
    """Clipped, whatever lies beyond the bound is best: without the penalty the mean goes there."""
    means = []
    for factor in (1, 0):
        excess = awr.excess_penalty
        with monkeypatch.context() as patch:
            patch.setattr(awr, "excess_penalty", lambda *a: factor * excess(*a))
            options = dict(actor_learning_rate=5e-3)
            _, checkpoint, _ = trained(tmp_path / str(factor), "Outside-v0", 4_000, **options)
        means.append(mean_action(checkpoint, "Outside-v0"))
    assert means[0] < 1.15 < 1.3 < means[1], means


@pytest.mark.parametrize("bound", ["Infinity", "1e30"])
def test_no_bound_no_penalty(tmp_path, bound):
    options = dict(env_kwargs=f'{{"bound": {bound}}}', actor_learning_rate=5e-3, init_std=1.0)
    _, checkpoint, _ = trained(tmp_path, "Far-v0", 4_000, **options)
    assert mean_action(checkpoint, "Far-v0") == pytest.approx(3, abs=0.3)


# Data without acting


@pytest.mark.parametrize("env_id", ["Matched-v0", "MatchedBox-v0"])
def test_learns_from_the_data_of_a_random_policy(tmp_path, capsys, env_id):
    """Without a step on θ the policy that acts stays random; then its buffer alone, no acting."""
    _, checkpoint, _ = trained(tmp_path / "data", env_id, 4_000, actor_learning_rate=0.0)
    _, _, rewards, *_, real = checkpoint["buffer"]["data"]
    mean_reward = rewards[real].mean().item()
    assert mean_reward == pytest.approx(0 if env_id == "Matched-v0" else -8, abs=0.5)
    capsys.readouterr()
    before = envs.Tiny.steps
    options = {"data": str(tmp_path / "data/checkpoint.pt"), "alpha": 0.2}
    returns, learned, value = trained(tmp_path / "run", env_id, 10**9, **options)
    assert envs.Tiny.steps - before == len(returns), "only the evaluation acted"
    assert f"env_steps={real.sum()} " in capsys.readouterr().out, "of the data, each counted once"
    assert returns.mean() > (0.99 if env_id == "Matched-v0" else -0.5)
    for ours, theirs in zip(learned["buffer"]["data"], checkpoint["buffer"]["data"], strict=True):
        assert torch.equal(ours, theirs)
    assert learned["policy"]["0.count"] == real.sum()
    if env_id == "Matched-v0":  # the value of the random policy, not of the one it leads to
        assert value([1, 0], [-1, 0]) == pytest.approx([0, 0], abs=0.2)


def test_a_run_on_data_can_be_stopped_and_goes_on(tmp_path):
    trained(tmp_path / "data", "Both-v0", 3_000)
    data = str(tmp_path / "data/checkpoint.pt")
    _, whole, _ = trained(tmp_path / "a", "Both-v0", 3_000, data=data)
    _, half, _ = trained(tmp_path / "b", "Both-v0", 1_000, data=data)
    assert 1_000 <= half["env_steps"] < whole["env_steps"] >= 3_000
    resume = str(tmp_path / "b/checkpoint.pt")
    _, rest, _ = trained(tmp_path / "c", "Both-v0", 10**9, data=data, resume=resume)
    for part in "policy", "critic", "actor_optimizer", "critic_optimizer", "buffer", "env_steps":
        torch.testing.assert_close(rest[part], whole[part], atol=0, rtol=0)


def test_data_that_do_not_fit_are_refused_in_one_line(tmp_path):
    trained(tmp_path, "Matched-v0", 500)
    path, bad = tmp_path / "checkpoint.pt", tmp_path / "bad.pt"
    bad.write_bytes(path.read_bytes()[:1000])
    sizes = ["--num-envs", 16, "--num-steps", 32]
    for options in (
        ["--env-id", "Observed-v0", *sizes, "--data", path],
        ["--env-id", "Matched-v0", "--num-envs", 8, "--num-steps", 32, "--data", path],
        ["--env-id", "Matched-v0", "--num-envs", 1, "--num-steps", 32, "--data", path],
        ["--env-id", "CartPole-v1", *sizes, "--data", path],
        ["--env-id", "Matched-v0", *sizes, "--data", "/no/such/file.pt"],
        ["--env-id", "Matched-v0", *sizes, "--data", bad],
    ):
        status, _, err = command("awr", *options, "--run-dir", tmp_path / "run")
        assert status == 2 and str(options[-1]) in err and len(err.splitlines()) == 1, err
    with pytest.raises(awr.Refusal, match="--resume ran without"):
        trained(tmp_path / "run", "Matched-v0", 900, data=str(path), resume=str(path))


# Checkpoints


def test_a_checkpoint_holds_all_that_learns_and_a_resume_goes_on_from_it(tmp_path):
    """Whole episodes a rollout, each alike, so that the run that begins new ones sees the same."""
    short = dict(num_steps=30, critic_steps=4, actor_steps=8, buffer_size=3 * 480)
    _, whole, _ = trained(tmp_path / "a", "Terminates-v0", 4 * 400, **short)
    _, half, _ = trained(tmp_path / "b", "Terminates-v0", 2 * 400, **short)
    resume = str(tmp_path / "b/checkpoint.pt")
    _, rest, _ = trained(tmp_path / "c", "Terminates-v0", 4 * 400, resume=resume, **short)
    parts = "policy", "critic", "actor_optimizer", "critic_optimizer", "buffer", "env_steps"
    for part in parts:
        torch.testing.assert_close(rest[part], whole[part], atol=0, rtol=0)
        assert part == "env_steps" or str(half[part]) != str(whole[part])
    for part, steps in ("actor_optimizer", 4 * 8), ("critic_optimizer", 4 * 4):
        assert {x["step"].item() for x in whole[part]["state"].values()} == {steps}
        assert len(whole[part]["state"]) == 6, "without σ, which is not learned"
    assert whole["policy"]["0.count"] == 4 * 400 == whole["critic"]["0.count"]
    assert whole["buffer"]["added"] == 4 and len(whole["buffer"]["data"][0]) == 3


def test_learning_rates_given_with_resume_take_effect(tmp_path):
    trained(tmp_path / "a", "Matched-v0", 500)
    rates = dict(actor_learning_rate=0.0123, critic_learning_rate=0.0456)
    resume = str(tmp_path / "a/checkpoint.pt")
    _, checkpoint, _ = trained(tmp_path / "b", "Matched-v0", 1_000, resume=resume, **rates)
    for name in "actor", "critic":
        group = checkpoint[f"{name}_optimizer"]["param_groups"][0]
        assert group["lr"] == rates[f"{name}_learning_rate"] and group["eps"] == 1e-5
