"""ppo.py: its equations against sums over finite distributions, their gradients, and its loop."""

import gymnasium as gym
import numpy as np
import ppo
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def finite(seed, actions=5):
    """A finite problem in float64: logits of mu and of pi (with gradient), advantages of actions."""
    g = torch.Generator().manual_seed(seed)
    mu, pi = torch.randn(2, actions, generator=g, dtype=torch.float64)
    return mu, pi.requires_grad_(), torch.randn(actions, generator=g, dtype=torch.float64)


def samples(mu, n=200_000):
    """Actions a ~ mu, (n,)."""
    g = torch.Generator().manual_seed(0)
    return torch.multinomial(mu.softmax(-1), n, replacement=True, generator=g)


def logps(logits, actions):
    return ppo.softmax_log_prob(logits.expand(len(actions), -1), actions)


# Policies


def test_softmax_against_torch():
    logits, action = torch.randn(7, 3, 4), torch.randint(4, (7, 3))
    reference = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(ppo.softmax_log_prob(logits, action), reference.log_prob(action))
    torch.testing.assert_close(ppo.softmax_entropy(logits), reference.entropy())


def test_gaussian_against_torch():
    mean, log_std, action = torch.randn(7, 3), torch.randn(3), torch.randn(7, 3)
    normal = torch.distributions.Normal(mean, log_std.exp())
    reference = torch.distributions.Independent(normal, 1)
    ours = ppo.gaussian_log_prob(mean, log_std, action)
    torch.testing.assert_close(ours, reference.log_prob(action))
    torch.testing.assert_close(ppo.gaussian_entropy(log_std), reference.entropy()[0])


def policy_for(env_id, **options):
    """A policy with the options, and an environment of env_id."""
    args = ppo.Args(env_id=env_id, **{"hidden": 8, "norm_obs": False, **options})
    env = ppo.make_env(args)
    return ppo.make_policy(env, args), env


def test_sampled_actions_follow_the_policy():
    torch.manual_seed(0)
    policy, _ = policy_for("Matched-v0")
    torch.nn.init.normal_(policy[-1].weight)
    obs = np.ones((1, 2), np.float32)
    probability = policy(torch.from_numpy(obs)).softmax(-1)[0]
    logits = ppo.in_numpy(policy)(obs.repeat(100_000, 0))
    count = np.bincount(policy.sample(logits, np.random.default_rng(0)), minlength=2)
    np.testing.assert_allclose(count / 100_000, probability.detach(), atol=0.01)
    assert policy.act(obs) == probability.argmax()


@pytest.mark.parametrize("norm_obs", [False, True])
def test_numpy_computes_what_torch_does(norm_obs):
    policy, _ = policy_for("TruncatesBox-v0", norm_obs=norm_obs, init_std=0.5)
    if norm_obs:
        policy[0].include(torch.randn(50, 2) * 7 + 2)
    obs = np.float32(np.random.default_rng(0).normal(size=(1_000, 2)) * 10)
    mean = policy(torch.from_numpy(obs)).detach().numpy()
    np.testing.assert_allclose(ppo.in_numpy(policy)(obs), mean, atol=1e-6)
    actions = policy.sample(mean, np.random.default_rng(0))
    assert actions.dtype == np.float32 and abs((actions - mean).std() - 0.5) < 0.05
    np.testing.assert_allclose(policy.act(obs), mean.clip(-1, 1), atol=1e-6)


class Doubled(torch.nn.Sequential):
    """A network with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


class Halved(torch.nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, x):
        return super().forward(x) / 2


@pytest.mark.parametrize(
    "layers",
    [
        [torch.nn.Linear(3, 4), torch.nn.GELU(), torch.nn.Linear(4, 2)],
        [torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2)],
        [torch.nn.Linear(3, 4, bias=False), torch.nn.ReLU(), Halved(4, 2)],
        [torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Softplus()), torch.nn.Linear(3, 2)],
        [torch.nn.Linear(3, 2), Doubled(torch.nn.Tanh())],
        [ppo.RunningNorm(3), torch.nn.Linear(3, 2)],
        [torch.nn.utils.spectral_norm(torch.nn.Linear(3, 4)), torch.nn.Linear(4, 2)],
    ],
    ids=["activation", "layers", "no bias", "nested", "own forward", "normaliser", "hook"],
)
def test_a_changed_network_acts_as_it_learns(layers):
    net = torch.nn.Sequential(*layers).eval()
    for x in (np.float32([[0.5, -2, 1], [3, 0, -1]]), np.float32([1, 2, 3])):
        ours = ppo.in_numpy(net)(x)
        np.testing.assert_allclose(ours, net(torch.from_numpy(x)).detach(), atol=1e-6)
    own = Doubled(*layers)
    np.testing.assert_allclose(ppo.in_numpy(own)(x), 2 * ours, atol=1e-6)


def test_box_actions_are_scaled_and_clipped_for_the_environment_only():
    low, high = np.array([-1, 0, -np.inf, 2]), np.array([1, 10, np.inf, np.inf])
    space = gym.spaces.Box(low.reshape(2, 2), high.reshape(2, 2), dtype=np.float64)
    to_env = ppo.box_actions(space)
    action = np.array([[0.5, 0.5, 0.5, 0.5], [2.0, 2.0, 2.0, 2.0], [-2.0, -2.0, -2.0, 9.0]])
    sent = to_env(action)
    assert sent.shape == (3, 2, 2) and all(space.contains(a) for a in sent)
    exact = [[0.5, 7.5, 0.5, 2], [1, 10, 2, 2], [-1, 0, -2, 9]]
    np.testing.assert_allclose(sent.reshape(3, 4), exact)


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [
        (-100, 100, np.int8),
        (0, 255, np.uint8),
        (100, 200, np.uint8),
        (-3, 4, np.int64),
        (0, 1, bool),
    ],
)
def test_the_levels_of_an_integer_box_are_chosen_equally_often(low, high, dtype):
    space = gym.spaces.Box(low, high, (1,), dtype)
    to_env, levels = ppo.box_actions(space), high - low + 1
    uniform = (np.arange(levels * 50) + 0.5) / (levels * 50) * 2 - 1
    sent = to_env(uniform[:, None])
    assert sent.dtype == dtype and all(space.contains(a) for a in sent[::50])
    values, counts = np.unique(sent.astype(int), return_counts=True)
    assert values.tolist() == list(range(low, high + 1)) and set(counts) == {50}
    assert (np.diff(sent[:, 0].astype(int)) >= 0).all(), "not inverted"
    assert to_env(np.array([[-7.0], [7.0]])).flatten().tolist() == [low, high]


def test_actions_that_are_not_finite_never_reach_the_environment():
    to_env = ppo.box_actions(gym.spaces.Box(-1, 1, (1,)))
    with pytest.raises(ppo.Refusal, match="not finite"):
        to_env(np.array([[np.nan]]))


# Surrogates


# A distribution mu whose samples, each action as often as mu has it, are exact.
COUNTS = torch.tensor([1, 2, 3, 4, 10])
EXACT_MU, EACH = COUNTS.double() / COUNTS.sum(), torch.arange(5).repeat_interleave(COUNTS)


def test_importance_sampling_is_unbiased():
    """E_mu[pi / mu f] = E_pi[f], and so are the gradients."""
    _, pi, f = finite(1)
    ratio = (logps(pi, EACH) - logps(EXACT_MU.log(), EACH)).exp()
    ours, exact = ppo.penalized_surrogate(ratio, f[EACH], 0.0, 0.0), (pi.softmax(-1) * f).sum()
    torch.testing.assert_close(ours, exact)
    torch.testing.assert_close(*(torch.autograd.grad(x, pi)[0] for x in (ours, exact)))


def test_penalized_surrogate_is_the_objective():
    """From samples of mu: E_pi[A] - alpha KL(mu || pi), in value and in gradient."""
    mu, pi, advantage = finite(2)
    exact_kl = (mu.softmax(-1) * (mu.log_softmax(-1) - pi.log_softmax(-1))).sum()
    exact = (pi.softmax(-1) * advantage).sum() - 0.7 * exact_kl
    a = samples(mu)
    kl = ppo.kl_divergence(logps(mu, a), logps(pi, a))
    ratio = (logps(pi, a) - logps(mu, a)).exp()
    ours = ppo.penalized_surrogate(ratio, advantage[a], kl, 0.7)
    torch.testing.assert_close(kl, exact_kl, atol=0.02, rtol=0)
    torch.testing.assert_close(ours, exact, atol=0.03, rtol=0)
    gradients = [torch.autograd.grad(x, pi, retain_graph=True)[0] for x in (ours, exact)]
    torch.testing.assert_close(*gradients, atol=0.03, rtol=0)


def test_kl_gradient():
    """-E_mu[grad log pi], which in the logits of pi is pi - mu."""
    _, pi, _ = finite(3)
    kl = ppo.kl_divergence(logps(EXACT_MU.log(), EACH), logps(pi, EACH))
    torch.testing.assert_close(kl, (EXACT_MU * (EXACT_MU.log() - pi.log_softmax(-1))).sum())
    torch.testing.assert_close(torch.autograd.grad(kl, pi)[0], pi.detach().softmax(-1) - EXACT_MU)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (0.5, 2.0, 0.5 * 2, 2.0),  # case 1: rare and good, the gradient goes through
        (0.5, -2.0, 0.9 * -2, 0.0),  # case 2: rare and bad, no gradient
        (1.5, -2.0, 1.5 * -2, -2.0),  # case 3: frequent and bad, the gradient goes through
        (1.5, 2.0, 1.3 * 2, 0.0),  # case 4: frequent and good, no gradient
        (1.2, 2.0, 1.2 * 2, 2.0),  # inside the range nothing is clipped
    ],
)
def test_four_cases_of_the_clip(ratio, advantage, value, slope):
    ratio = torch.tensor([ratio], requires_grad=True)
    ours = ppo.clipped_surrogate(ratio, torch.tensor([advantage]), clip_low=0.1, clip_high=0.3)
    clip_only = (ratio.clamp(0.9, 1.3) * advantage).mean()  # without the min, eq. 1
    assert ours.item() == pytest.approx(value) and ours.item() <= clip_only.item() + 1e-6
    assert torch.autograd.grad(ours, ratio)[0].item() == pytest.approx(slope)


def test_clip_objective_of_a_batch_is_a_mean():
    ratio, advantage = torch.tensor([0.5, 1.5, 1.2]), torch.tensor([2.0, -2.0, 1.0])
    ours = ppo.clipped_surrogate(ratio, advantage, clip_low=0.1, clip_high=0.3)
    assert ours.item() == pytest.approx((0.5 * 2 + 1.5 * -2 + 1.2) / 3)


def test_value_loss_is_the_mean_squared_error():
    loss = ppo.value_loss(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 1.0]))
    assert loss.item() == pytest.approx((3**2 + 1) / 2)


# Advantages


def random_rollout(T=40, N=6, seed=0):
    """Rewards, values and ends as a vector environment gives them, reset steps included."""
    rng = np.random.default_rng(seed)
    terminated, truncated, valid = np.zeros((2, T, N), bool), None, np.ones((T + 1, N), bool)
    terminated, truncated = terminated
    rewards = rng.normal(size=(T, N))
    for t in range(T):
        terminated[t] = valid[t] & (rng.random(N) < 0.1)
        truncated[t] = valid[t] & (rng.random(N) < 0.1)
        valid[t + 1] = ~(terminated[t] | truncated[t])
    rewards[~valid[:T]] = 0
    values = rng.normal(size=(T + 1, N))
    return [torch.from_numpy(x) for x in (rewards, values, terminated, truncated, valid)]


def test_gae_is_the_sum_it_abbreviates():
    rewards, values, terminated, truncated, valid = random_rollout()
    assert (terminated.sum() > 5) and (truncated.sum() > 5)
    ours = ppo.gae(rewards, values, terminated, truncated, 0.9, 0.8)
    T, N = rewards.shape
    for n in range(N):
        for t in range(T):
            if not valid[t, n]:
                continue
            total, k = 0.0, t
            while True:
                bootstrap = 0 if terminated[k, n] else 0.9 * values[k + 1, n]
                delta = rewards[k, n] + bootstrap - values[k, n]
                total += (0.9 * 0.8) ** (k - t) * delta
                if terminated[k, n] or truncated[k, n] or k == T - 1:
                    break
                k += 1
            assert ours[t, n].item() == pytest.approx(total.item(), rel=1e-5, abs=1e-5)


def test_gae_limits():
    """lambda = 0 is the one-step advantage; lambda = 1 with the true ends is G - V."""
    rewards, values = torch.ones(3, 1), torch.tensor([[5.0], [6.0], [7.0], [8.0]])
    no, end = torch.zeros(3, 1, dtype=torch.bool), torch.tensor([[False], [False], [True]])
    one_step = rewards + 0.5 * values[1:] - values[:-1]
    torch.testing.assert_close(ppo.gae(rewards, values, no, no, 0.5, 0.0), one_step)
    returns = torch.tensor([[1.75], [1.5], [1.0]])
    torch.testing.assert_close(ppo.gae(rewards, values, end, no, 0.5, 1.0), returns - values[:-1])
    returns = torch.tensor([[1.75 + 1.0], [1.5 + 2.0], [1.0 + 4.0]])  # the time limit bootstraps
    torch.testing.assert_close(ppo.gae(rewards, values, no, end, 0.5, 1.0), returns - values[:-1])


# Normaliser


def test_running_norm_equals_the_statistics_of_everything():
    data = torch.randn(1000, 3) * torch.tensor([1.0, 50.0, 0.0]) + torch.tensor([0.0, 1000.0, 7.0])
    norm = ppo.RunningNorm(3)
    torch.testing.assert_close(norm(data[:5] / 1000), data[:5] / 1000)  # nothing seen: as it is
    for part in data.split([1, 10, 489, 500]):
        norm.include(part)
    torch.testing.assert_close(norm.mean, data.mean(0))
    torch.testing.assert_close(norm.var, data.var(0, correction=0), rtol=1e-4, atol=1e-3)
    assert norm.count == 1000
    assert norm(data).abs().max() <= 10 and norm(data)[:, 2].abs().max() < 0.1


# Gradients


def test_each_loss_moves_its_own_network():
    policy, env = policy_for("Matched-v0", norm_obs=True)
    args = ppo.Args(hidden=8)
    critic = torch.nn.Sequential(policy[0], *ppo.mlp(env, args, 1, 1.0))
    obs, action, target = torch.randn(9, 2), torch.randint(2, (9,)), torch.randn(9)

    def receivers(loss):
        policy.zero_grad(), critic.zero_grad()
        loss.backward()
        return [{p.grad is not None for p in m.parameters()} for m in (policy, critic)]

    def ratio():
        logp = policy.log_prob(policy(obs), action)
        return (logp - logp.detach()).exp()

    assert receivers(ppo.clipped_surrogate(ratio(), target, 0.2, 0.2)) == [{True}, {False}]
    penalized = ppo.penalized_surrogate(ratio(), target, ratio().mean(), 1)
    assert receivers(penalized) == [{True}, {False}]
    assert receivers(policy.entropy(policy(obs)).mean()) == [{True}, {False}]
    assert receivers(ppo.value_loss(critic(obs).squeeze(-1), target)) == [{False}, {True}]
    assert not any(p.requires_grad for p in policy[0].buffers())
    gaussian, _ = policy_for("TruncatesBox-v0")
    gaussian.entropy(gaussian(obs)).mean().backward()
    moved = {name for name, p in gaussian.named_parameters() if p.grad is not None}
    assert moved == {"log_std"}, "the entropy of a Gaussian is in its deviation alone"


# Learning

COMMON = dict(num_envs=16, num_steps=32, epochs=4, minibatches=4, hidden=32, gamma=0.9)
COMMON |= dict(learning_rate=5e-3, init_std=1.0, norm_obs=False, norm_rewards=False)
COMMON |= dict(eval_episodes=20)


def trained(tmp_path, env_id, steps, **options):
    """Evaluation returns, and the policy and V_φ from the checkpoint as functions of observations."""
    options = {"run_dir": str(tmp_path), **COMMON, **options}
    args = ppo.Args(env_id=env_id, total_timesteps=steps, **options)
    returns = ppo.train(args)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    policy, env = policy_for(env_id, hidden=args.hidden, norm_obs=args.norm_obs)
    norm = [policy[0]] if args.norm_obs else []
    critic = torch.nn.Sequential(*ppo.mlp(env, args, 1, 1.0))
    policy.load_state_dict(checkpoint["policy"])
    critic.load_state_dict(checkpoint["critic"])
    critic = torch.nn.Sequential(*norm, *critic)
    return returns, lambda *obs: critic(torch.tensor(obs).float()).squeeze(-1).tolist()


def test_constant_reward(tmp_path):
    _, value = trained(tmp_path, "Constant-v0", 6_000)
    assert value([0, 0]) == pytest.approx([1], abs=0.02)


def test_two_step_credit(tmp_path):
    returns, value = trained(tmp_path, "TwoStep-v0", 8_000)
    assert returns.mean() == 1
    assert value([0, 1], [0, -1], [1, 1], [1, -1]) == pytest.approx([0.9, 0.9, 1, 1], abs=0.1)


def test_reward_depends_on_the_observation(tmp_path):
    _, value = trained(tmp_path, "Observed-v0", 8_000)
    assert value([1, 0], [-1, 0]) == pytest.approx([1, -1], abs=0.05)


@pytest.mark.parametrize(
    "options",
    [{}, {"norm_obs": True, "norm_rewards": True}, {"objective": "kl"}, {"target_kl": 0.02}],
    ids=str,
)
def test_reward_depends_on_action_and_observation(tmp_path, options):
    returns, _ = trained(tmp_path, "Matched-v0", 8_000, **options)
    assert returns.mean() == 1


@pytest.mark.parametrize("options", [{}, {"objective": "kl"}], ids=str)
def test_continuous_action(tmp_path, options):
    returns, _ = trained(tmp_path, "MatchedBox-v0", 16_000, **options)
    assert returns.mean() > -0.1  # a constant action gets -4 at best


def test_the_entropy_bonus_keeps_the_policy_wide(tmp_path):
    trained(tmp_path, "Matched-v0", 8_000, entropy_coef=10.0)
    assert (
        scalars(tmp_path)["losses/last_entropy"][-1] > 0.65
    )  # log 2 is 0.69; without it, towards 0


def test_an_integer_box_is_learned(tmp_path):
    returns, _ = trained(tmp_path, "Dimmer-v0", 16_000)
    assert returns.mean() > 0.95


def test_termination_ends_the_value(tmp_path):
    _, value = trained(tmp_path, "Terminates-v0", 20_000)
    exact = [(1 - 0.9 ** (5 - t)) / 0.1 for t in range(5)]
    assert value(*([t - 2.5, 0] for t in range(5))) == pytest.approx(exact, abs=0.15)


def test_both_ends(tmp_path):
    _, value = trained(tmp_path, "Both-v0", 60_000, num_steps=128)  # much data: small noise
    assert value([0, 0]) == pytest.approx([1 / (1 - 0.8 * 0.9)], abs=0.15)


def scalars(tmp_path):
    """What the run logged: name -> values."""
    log = EventAccumulator(str(tmp_path)).Reload()
    return {tag: [event.value for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


@pytest.mark.parametrize("norm_obs", [False, True])
@pytest.mark.parametrize("env_id", ["Matched-v0", "MatchedBox-v0"])
def test_without_a_step_the_ratio_stays_1(tmp_path, monkeypatch, env_id, norm_obs):
    """Also where observations are normalised: log μ and π see the same statistics."""
    stored, log_prob = [], ppo.gaussian_log_prob
    spy = lambda mean, log_std, a: stored.append(a) or log_prob(mean, log_std, a)  # noqa: E731
    monkeypatch.setattr(ppo, "gaussian_log_prob", spy)
    trained(tmp_path, env_id, 2_000, learning_rate=0.0, norm_obs=norm_obs)
    assert bool(stored) == (env_id == "MatchedBox-v0")
    assert not stored or max(a.abs().max() for a in stored) > 1, "actions are stored as sampled"
    logged = scalars(tmp_path)
    assert len(logged["losses/policy_loss"]) >= 4
    for name in ("policy_loss", "last_kl", "last_clip_fraction"):  # standardised: mean 0
        values = logged[f"losses/{name}"]
        assert values == pytest.approx([0] * len(values), abs=1e-5)


def test_target_kl_ends_the_passes(tmp_path, monkeypatch):
    """With any KL above the target one pass is made, with none all of them."""
    for target, passes in ((1e-6, 1), (1e6, 4)):
        steps, step = [], torch.optim.Adam.step
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.Adam, "step", lambda *a: steps.append(1) or step(*a))
            # one batch of 16 x 32 real steps, so four updates a pass
            options = {"target_kl": target, "learning_rate": 0.1}
            trained(tmp_path / str(target), "Both-v0", 300, **options)
        assert len(steps) == 4 * passes


def test_the_clip_fraction_is_of_the_clip_objective(tmp_path):
    trained(tmp_path, "Matched-v0", 1_000, objective="kl")
    assert "losses/last_clip_fraction" not in scalars(tmp_path)


def test_the_scale_of_rewards_is_that_of_returns_which_begin_anew(tmp_path):
    """Five steps of reward 1, γ = 0.9: 1, 1.9, 2.71, ... up to t, their mean and variance exactly."""
    trained(tmp_path, "Terminates-v0", 2_000, norm_rewards=True, num_steps=30)
    norm = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["reward_norm"]
    exact = np.cumsum(0.9 ** np.arange(5))  # T = 30 is five episodes and their reset steps
    assert norm["mean"].item() == pytest.approx(exact.mean(), rel=1e-5)
    assert norm["var"].item() == pytest.approx(exact.var(), rel=1e-5)


def test_scaled_rewards_have_a_floor_and_a_clip(tmp_path):
    """A constant return has no deviation: its reward is not multiplied without bound."""
    _, value = trained(tmp_path, "Constant-v0", 20_000, norm_rewards=True, learning_rate=3e-2)
    assert value([0, 0]) == pytest.approx([10], abs=0.5)


def test_no_clip_of_the_gradient(tmp_path):
    """--max-grad-norm 0 is no clip: as a very large one, bit for bit."""
    weights = []
    for norm in (0.0, 1e9):
        trained(tmp_path / str(norm), "Matched-v0", 1_000, max_grad_norm=norm)
        path = tmp_path / str(norm) / "checkpoint.pt"
        weights.append(torch.load(path, weights_only=True)["policy"]["0.weight"])
    assert torch.equal(*weights) and weights[0].abs().max() > 0


def test_asymmetric_clip_and_penalty_reach_the_update(tmp_path):
    """Options that change the objective change the weights; a default spelt out does not."""

    def weights(**options):
        folder = tmp_path / str(options)
        trained(folder, "Matched-v0", 500, **options)
        return torch.load(folder / "checkpoint.pt", weights_only=True)["policy"]

    base = weights()
    differs = lambda **o: any(not torch.equal(base[k], v) for k, v in weights(**o).items())  # noqa: E731
    assert not differs(clip_high=0.2)
    assert differs(clip_high=0.02) and differs(clip_low=0.02, clip_high=0.2)
    assert differs(objective="kl", alpha=0.0) and differs(target_kl=1e-6)
