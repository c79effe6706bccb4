"""sac.py: its density, its soft values on a finite MDP, its temperature, its loop."""

import math

import gymnasium as gym
import numpy as np
import pytest
import sac
import torch
from conftest import command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ALPHA, GAMMA = 0.5, 0.9


# The density of the actions


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.3), (-1.5, 2.0), (3.0, 0.5)])
def test_the_density_integrates_to_one_on_the_open_interval(mean, std):
    """∫ π(a|s) da over (-1, 1), and the entropy against that of the samples."""
    u = torch.linspace(mean - 9 * std, mean + 9 * std, 200_001, dtype=torch.float64)
    log_std = torch.full_like(u, math.log(std)).unsqueeze(-1)
    noise = ((u - mean) / std).unsqueeze(-1)
    action, logp = sac.tanh_gaussian(torch.full_like(noise, mean), log_std, noise)
    slope = 1 / torch.cosh(u) ** 2  # of tanh: da = slope du
    assert torch.trapezoid(logp.exp() * slope, u).item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(action.squeeze(-1), u.tanh())
    exact = -torch.trapezoid(logp * logp.exp() * slope, u).item()
    torch.manual_seed(0)
    many = torch.randn(200_000, 1, dtype=torch.float64)
    _, logp = sac.tanh_gaussian(
        torch.full_like(many, mean), torch.full_like(many, math.log(std)), many
    )
    assert -logp.mean().item() == pytest.approx(exact, abs=0.02)


def test_the_correction_is_the_log_determinant_of_the_jacobian():
    torch.manual_seed(0)
    mean, log_std, noise = torch.randn(3, 4, dtype=torch.float64)
    _, logp = sac.tanh_gaussian(mean, log_std, noise)
    u = mean + log_std.exp() * noise
    jacobian = torch.autograd.functional.jacobian(torch.tanh, u)
    gaussian = torch.distributions.Normal(mean, log_std.exp()).log_prob(u).sum()
    torch.testing.assert_close(logp, gaussian - torch.linalg.slogdet(jacobian).logabsdet)
    h = 1e-5  # and numerically
    slopes = ((u + h).tanh() - (u - h).tanh()) / (2 * h)
    torch.testing.assert_close(logp, gaussian - slopes.log().sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mean", [15.0, -15.0, 60.0, -60.0, 1e4])
def test_saturated_actions_stay_finite_and_exact(mean):
    """Where tanh u rounds to ±1: log(1 - tanh² u) = 2 log 2 - 2|u| there, gradient -2 sign u."""
    m = torch.full((1, 1), mean).requires_grad_()
    action, logp = sac.tanh_gaussian(m, torch.zeros(1, 1), torch.zeros(1, 1))
    assert action.item() == math.copysign(1, mean)
    exact = -0.5 * math.log(2 * math.pi) - 2 * math.log(2) + 2 * abs(mean)
    assert logp.item() == pytest.approx(exact, rel=1e-6)
    assert torch.autograd.grad(logp.sum(), m)[0].item() == pytest.approx(math.copysign(2, mean))


ARGS = dict(env_id="TruncatesBox-v0", hidden=8)


def networks(**options):
    """An actor and two critics for observations (2,) and actions (1,)."""
    args = sac.Args(**{**ARGS, **options})
    env = sac.make_env(args)
    return sac.make_policy(env, args), sac.QNetworks(env, args.hidden, 2)


def fix(actor, mean, log_std):
    """Make the actor's output m and log σ whatever it observes."""
    torch.nn.init.zeros_(actor[-1].weight)
    actor[-1].bias.data = torch.tensor([mean, log_std])


def test_deviations_stay_within_bounds():
    actor, _ = networks()
    for log_std, kept in ((-30.0, -20), (0.5, 0.5), (9.0, 2)):
        fix(actor, 0.0, log_std)
        torch.manual_seed(0)
        action, _ = actor.sample(torch.zeros(1, 2))
        torch.manual_seed(0)
        expected = (math.exp(kept) * torch.randn(1, 1)).tanh()
        torch.testing.assert_close(action, expected)


def test_evaluation_takes_the_mean_and_learning_samples():
    actor, _ = networks()
    fix(actor, 0.4, -1.0)
    obs = np.zeros((1000, 2), np.float32)
    assert np.allclose(actor.act(obs), np.tanh(0.4))
    sampled = actor.sample(torch.from_numpy(obs))[0].atanh()
    assert sampled.std().item() == pytest.approx(math.exp(-1), rel=0.1)
    assert sampled.mean().item() == pytest.approx(0.4, abs=0.05)


def test_critics_differ_and_each_is_two_relu_layers_and_a_linear_one():
    _, critic = networks()
    obs, action = torch.randn(5, 2), torch.rand(5, 1)
    q, x = critic(obs, action), torch.cat([obs, action], -1)
    for i in range(2):
        h = (x @ critic.w_1[i] + critic.b_1[i]).relu()
        h = (h @ critic.w_2[i] + critic.b_2[i]).relu()
        torch.testing.assert_close(q[i], (h * critic.w_3[i]).sum(-1) + critic.b_3[i])
    assert not torch.equal(q[0], q[1])
    assert critic.w_2.abs().max() <= 8**-0.5


# Soft values on a finite MDP


def finite_mdp():
    """Successors and rewards of 4 states and 3 actions, and a policy."""
    torch.manual_seed(0)
    successor, reward = torch.randint(4, (4, 3)), torch.randn(4, 3).double()
    return successor, reward, torch.randn(4, 3).double().softmax(-1)


def soft_value(successor, reward, policy, alpha):
    """V of r - α log π under policy, by solving its linear equations. (S,)"""
    transition = torch.zeros(4, 4).double()
    for s in range(4):
        for a in range(3):
            transition[s, successor[s, a]] += policy[s, a]
    modified = (policy * (reward - alpha * policy.log())).sum(-1)
    return torch.linalg.solve(torch.eye(4).double() - GAMMA * transition, modified)


def test_the_entropy_is_a_reward():
    """Σ γ^t (r + α H(π(·|s_t))), step by step from each state, is the value of r - α log π."""
    successor, reward, policy = finite_mdp()
    entropy = torch.distributions.Categorical(probs=policy).entropy()
    at, total = torch.eye(4).double(), torch.zeros(4).double()  # at[s0, s] at time t
    for t in range(400):
        total += GAMMA**t * at @ ((policy * reward).sum(-1) + ALPHA * entropy)
        onward = torch.zeros(4, 4).double()
        for s in range(4):
            for a in range(3):
                onward[:, successor[s, a]] += at[:, s] * policy[s, a]
        at = onward
    torch.testing.assert_close(total, soft_value(successor, reward, policy, ALPHA))


def test_the_target_is_the_soft_bellman_equation():
    """Averaged over a' ~ π it leaves π's soft Q as it is, and takes the lower of two critics."""
    successor, reward, policy = finite_mdp()
    q = reward + GAMMA * soft_value(successor, reward, policy, ALPHA)[successor]
    logp = policy.log()
    for s in range(4):
        for a in range(3):
            n, r = successor[s, a], reward[s, a].expand(3)
            q_next = torch.stack([q[n], q[n] + torch.tensor([1.0, 0.0, 2.0])])
            y = sac.sac_target(r, torch.tensor(GAMMA), q_next, logp[n], ALPHA)
            torch.testing.assert_close((policy[n] * y).sum(), q[s, a])
    y = sac.sac_target(torch.ones(1), torch.zeros(1), torch.full((2, 1), 9.0), torch.ones(1), 1.0)
    assert y.item() == 1, "a terminal state has neither value nor entropy"


def test_the_soft_optimum():
    """softmax(Q*/α) is better, rewarded for entropy, than other policies; α → 0 is standard RL."""
    successor, reward, _ = finite_mdp()

    def optimum(alpha):
        value = torch.zeros(4).double()
        for _ in range(500):
            q = reward + GAMMA * value[successor]
            value = alpha * (q / alpha).logsumexp(-1) if alpha else q.max(-1).values
        return q, value

    q, value = optimum(ALPHA)
    best = (q / ALPHA).softmax(-1)
    torch.testing.assert_close(soft_value(successor, reward, best, ALPHA), value)
    for _ in range(100):
        other = (q / ALPHA + torch.randn(4, 3)).softmax(-1)
        assert (soft_value(successor, reward, other, ALPHA) <= value + 1e-9).all()
    torch.testing.assert_close(optimum(1e-4)[1], optimum(0)[1], atol=2e-3, rtol=0)


def test_the_policy_gradient_finds_the_soft_optimum_of_a_known_q():
    """Q(a) = -k (a - c)² + const: Adam on soft_actor_loss against the best m and σ on a grid."""
    torch.manual_seed(0)
    theta = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([theta], 0.02)

    def loss(mean, log_std, noise):
        action, logp = sac.tanh_gaussian(mean.expand_as(noise), log_std.expand_as(noise), noise)
        q = -4 * (action.squeeze(-1) - 0.3) ** 2
        return sac.soft_actor_loss(torch.stack([q, q + 1]), logp, ALPHA)

    for _ in range(600):
        optimizer.zero_grad()
        loss(theta[0], theta[1], torch.randn(256, 1)).backward()
        optimizer.step()
    noise = torch.randn(20_000, 1)
    grid = [(m, s) for m in np.linspace(-1, 1, 21) for s in np.linspace(-2.5, 0.5, 31)]
    losses = [loss(torch.tensor(m), torch.tensor(s), noise).item() for m, s in grid]
    best = grid[int(np.argmin(losses))]
    assert theta.tolist() == pytest.approx(best, abs=0.12)
    assert loss(*theta, noise).item() == pytest.approx(min(losses), abs=0.01)


def test_the_actor_loss_takes_the_lower_q_and_pays_for_log_probability():
    q, logp = torch.tensor([[1.0, 5.0], [2.0, 3.0]]), torch.tensor([-1.0, 3.0])
    assert sac.soft_actor_loss(q, logp, torch.tensor([0.5])).item() == ((-0.5 - 1) + (1.5 - 3)) / 2


def test_nothing_follows_a_terminal_state():
    assert sac.one_step_discount(0.5, True) == 0 and sac.one_step_discount(0.5, False) == 0.5


# Temperature


def test_temperature_rises_where_the_entropy_is_too_low():
    logp = torch.tensor([1.0, 3.0], requires_grad=True)  # entropy -2
    for target, slope in ((-1.5, -0.5), (-4, 2.0)):
        log_alpha = torch.tensor(0.7, requires_grad=True)
        loss = sac.temperature_loss(log_alpha, logp, target)
        gradient = torch.autograd.grad(loss, (log_alpha, logp), allow_unused=True)
        assert gradient[0].item() == slope and gradient[1] is None


# Loop

COMMON = dict(hidden=32, batch_size=64, gamma=0.9, learning_rate=3e-3, burn_in=200, tau=0.05)
COMMON |= dict(alpha=0.01, eval_episodes=20)


def trained(tmp_path, env_id, steps, **options):
    """Evaluation returns, the checkpoint, and the mean of Q_i(s, tanh m(s)) over the critics."""
    options = {**COMMON, "run_dir": str(tmp_path), **options}
    args = sac.Args(env_id=env_id, total_timesteps=steps, **options)
    returns = sac.train(args)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    actor, critic = networks(env_id=env_id, hidden=args.hidden)
    actor.load_state_dict(checkpoint["policy"])
    critic.load_state_dict(checkpoint["critic"])

    def value(*obs):
        obs = torch.tensor(obs).float()
        return critic(obs, actor.mean(obs)).mean(0).tolist()

    return returns, checkpoint, value


def logged(tmp_path):
    log = EventAccumulator(str(tmp_path)).Reload()
    return {tag: [event.value for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


@pytest.mark.parametrize("env_id", ["TerminatesBox-v0", "TruncatesBox-v0"])
def test_stored_transitions_at_both_kinds_of_end(tmp_path, env_id):
    _, checkpoint, _ = trained(tmp_path, env_id, 150)
    obs, action, reward, next_obs, discount = checkpoint["buffer"]["data"]
    assert len(reward) == 150 and (reward == 1).all() and action.shape == (150, 1)
    ends = torch.arange(150) % 5 == 4
    terminates = env_id == "TerminatesBox-v0"
    torch.testing.assert_close(discount, torch.where(ends & terminates, 0.0, 0.9))
    if terminates:  # the time is observed
        assert (next_obs[:, 0] == obs[:, 0] + 1).all() and (obs[::5, 0] == -2.5).all()


def test_burn_in_is_uniform_over_the_bounds_then_the_policy_acts(tmp_path, monkeypatch):
    """With the policy's own deviation, which here is e⁻², not 1."""
    make_policy = sac.make_policy

    def fixed(env, args):
        actor = make_policy(env, args)
        fix(actor, 0.3, -2.0)
        return actor

    monkeypatch.setattr(sac, "make_policy", fixed)
    options = dict(burn_in=2_000, learning_rate=0.0, utd=0.01)
    _, checkpoint, _ = trained(tmp_path, "MatchedBox-v0", 3_000, **options)
    obs, action, reward, *_ = checkpoint["buffer"]["data"]
    counts = torch.histc(action[:2_000], 4, -1, 1)
    assert counts.min() > 430 and action.abs().max() <= 1
    exact = -((5 * action[:, 0] - 2 * obs[:, 0]) ** 2)  # a Box from 0 to 10 around 5
    torch.testing.assert_close(reward, exact, atol=1e-3, rtol=1e-4)
    u = action[2_000:].atanh()
    assert u.mean().item() == pytest.approx(0.3, abs=0.02)
    assert u.std().item() == pytest.approx(math.exp(-2), rel=0.1)


@pytest.mark.parametrize("utd", [0.3, 3.0])
def test_updates_are_exactly_the_ratio(tmp_path, monkeypatch, utd):
    updates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *a: updates.append(1) or step(*a))
    trained(tmp_path, "BothBox-v0", 311, utd=utd, burn_in=200)
    assert len(updates) == 2 * int(utd * 111), "of the critics and the actor"


def test_the_actors_step_leaves_the_critics_as_they_are(tmp_path, monkeypatch):
    """Each optimiser changes its own network only, by its own gradient."""
    gradients, step = [], torch.optim.Adam.step

    def spy(self, *a):
        weights = self.param_groups[0]["params"]
        gradients.append(
            (len(weights), [None if w.grad is None else w.grad.clone() for w in weights])
        )
        return step(self, *a)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    trained(tmp_path, "BothBox-v0", 202, alpha=None)
    assert [n for n, _ in gradients] == [6, 6, 1, 6, 6, 1]
    assert all(g is not None for _, group in gradients for g in group)


def test_targets_are_of_the_target_critics(tmp_path, monkeypatch):
    """One module evaluates s' without gradient, and it is not the one that learns."""
    calls, forward = [], sac.QNetworks.forward

    def spy(self, obs, action):
        if len(obs) > 1:  # a batch, not the value at the start of an episode
            calls.append((id(self), torch.is_grad_enabled()))
        return forward(self, obs, action)

    monkeypatch.setattr(sac.QNetworks, "forward", spy)
    trained(tmp_path, "BothBox-v0", 210)
    fixed, learning = ({n for n, grad in calls if grad == kind} for kind in (False, True))
    assert len(fixed) == len(learning) == 1 and fixed != learning


def test_the_target_critics_follow_slowly(tmp_path, monkeypatch):
    history, update = [], sac.soft_update

    def spy(target, theta, tau):
        before = [x.clone() for x in target]
        update(target, theta, tau)
        history.append((before, [x.clone() for x in theta], [x.clone() for x in target], tau))

    monkeypatch.setattr(sac, "soft_update", spy)
    trained(tmp_path, "BothBox-v0", 210)
    assert len(history) == 10
    for before, theta, after, tau in history:
        for b, t, a in zip(before, theta, after, strict=True):
            torch.testing.assert_close(a, (1 - tau) * b + tau * t)


def test_the_action_that_pays_is_found(tmp_path):
    returns, _, _ = trained(tmp_path, "MatchedBox-v0", 1_500)
    assert returns.mean() > -0.1


def test_an_integer_box_is_learned(tmp_path):
    returns, _, _ = trained(tmp_path, "Dimmer-v0", 1_500)
    assert returns.mean() > 0.9


def test_termination_ends_the_value(tmp_path):
    _, _, value = trained(tmp_path, "TerminatesBox-v0", 1_500)
    exact = [(1 - 0.9 ** (5 - t)) / 0.1 for t in range(5)]
    assert value(*([t - 2.5, 0] for t in range(5))) == pytest.approx(exact, abs=0.2)


def test_automatic_temperature_reaches_the_target_entropy(tmp_path):
    trained(tmp_path, "Bandit-v0", 2_500, alpha=None)
    scalars = logged(tmp_path)
    assert scalars["losses/entropy"][-1] == pytest.approx(-1, abs=0.3)
    assert 0 < scalars["losses/alpha"][-1] < 1


@pytest.mark.parametrize("alpha", [0.02, 0.1])
def test_fixed_temperature_stays_and_decides_the_entropy(tmp_path, alpha):
    """A Gaussian of variance α / 2k, the best for Q = -k (a - c)² where tanh is nearly linear."""
    trained(tmp_path, "Bandit-v0", 1_500, alpha=alpha)
    scalars = logged(tmp_path)
    assert scalars["losses/alpha"] == pytest.approx([alpha] * len(scalars["losses/alpha"]))
    exact = 0.5 * math.log(2 * math.pi * math.e * alpha / (2 * 4.0))
    assert scalars["losses/entropy"][-1] == pytest.approx(exact, abs=0.3)


def test_a_fixed_temperature_of_0_is_no_entropy_at_all(tmp_path):
    trained(tmp_path, "Bandit-v0", 600, alpha=0)
    assert set(logged(tmp_path)["losses/alpha"]) == {0.0}


@pytest.mark.parametrize("bound", [np.inf, 1e30])
def test_actions_without_bounds_are_refused(tmp_path, bound):
    box = gym.spaces.Box(-2, 2, (2,))
    space = gym.spaces.Box(np.float32(-1), np.float32(bound), (2,))
    gym.registry["Spaces-v0"].kwargs = {"observation_space": box, "action_space": space}
    status, _, err = command("sac", "--env-id", "Spaces-v0", "--run-dir", tmp_path)
    assert status == 2 and len(err.splitlines()) == 1 and "finite bounds" in err
