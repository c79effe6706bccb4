"""reinforce.py: its estimates on trajectories that can be listed, and its loop, step by step."""

import csv
import itertools
import os
import subprocess
import sys

import envs
import gymnasium as gym
import numpy as np
import pytest
import reinforce
import torch
from conftest import ROOT, command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.append(str(ROOT / "benchmarks/studies"))
import variance  # noqa: E402

close = torch.testing.assert_close
F64 = torch.float64


# Returns and loss


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_returns_to_go(gamma):
    """Each as the sum over what follows; the second trajectory ends after four of six steps."""
    rewards = torch.randn(6, 3, dtype=F64)
    rewards[4:, 1] = 0
    returns = reinforce.returns_to_go(rewards, gamma)
    assert returns.shape == (6, 3)
    for i, t in itertools.product(range(3), range(6)):
        exact = sum(gamma ** (k - t) * rewards[k, i].item() for k in range(t, 6))
        assert returns[t, i].item() == pytest.approx(exact)


def test_the_loss_is_minus_the_estimate():
    """1/N Σ_i Σ_t of score times weight, added up one step at a time; ragged trajectories."""
    torch.manual_seed(0)
    N, T, lengths = 3, 4, [4, 1, 2]
    real = torch.arange(T)[:, None] < torch.tensor(lengths)
    logits = torch.randn(T, N, 2, dtype=F64, requires_grad=True)
    actions, weights = torch.randint(2, (T, N)), torch.randn(T, N, dtype=F64)
    logp = reinforce.softmax_log_prob(logits, actions)
    loss = reinforce.reinforce_loss(logp[real], weights[real], N)
    expected, pi = torch.zeros_like(logits), logits.detach().softmax(-1)
    for i in range(N):
        for t in range(lengths[i]):
            for b in range(2):
                score = float(b == actions[t, i]) - pi[t, i, b]
                expected[t, i, b] = score * weights[t, i] / N
    close(-torch.autograd.grad(loss, logits)[0], expected)


def test_means_of_a_batch_of_unequal_lengths():
    """Over all N trajectories: after its end one counts with G_t = 0, or with R(τ)."""
    lengths = [5, 2, 3]
    rewards = torch.randn(5, 3) * (torch.arange(5)[:, None] < torch.tensor(lengths))
    returns = reinforce.returns_to_go(rewards, 0.9)
    G = [
        [sum(0.9 ** (k - t) * rewards[k, i].item() for k in range(t, n)) for t in range(5)]
        for i, n in enumerate(lengths)
    ]
    total = sum(G[i][0] for i in range(3)) / 3
    assert reinforce.constant_baseline(returns).item() == pytest.approx(total, rel=1e-5)
    ours = reinforce.time_baseline(returns)
    assert ours.shape == (5, 1)
    for t in range(5):
        assert ours[t].item() == pytest.approx(sum(G[i][t] for i in range(3)) / 3, rel=1e-5)
    of_totals = reinforce.time_baseline(returns[0].expand(5, 3))
    assert of_totals.flatten().tolist() == pytest.approx([total] * 5, rel=1e-5)


@pytest.mark.parametrize("n", [3, 8, 10, 16, 32, 57])
def test_trajectories_that_are_all_alike_teach_nothing(n):
    """Rounding would leave weights, and standardised weights are of size 1 however small they were."""
    returns = reinforce.returns_to_go(torch.full((200, n), -1.0), 0.99)
    assert not (returns - reinforce.time_baseline(returns)).any()
    assert not (returns[0] - reinforce.constant_baseline(returns)).any()


# What a baseline does to the expected gradient


class Game:
    """All trajectories of at most three steps in two states, which may end after each step.

    The first state is 0, action a leads to state a, and the trajectory ends after (s, a) with
    probability end[s, a]. The policy is a softmax of θ, a logit for each state and action.
    """

    def __init__(self, gamma):
        g = torch.Generator().manual_seed(0)
        self.gamma = gamma
        self.theta = torch.randn(2, 2, generator=g, dtype=F64).requires_grad_()
        paths = [x for n in (1, 2, 3) for x in itertools.product((0, 1), repeat=n)]
        padded = torch.tensor([(0, *path, 0, 0, 0)[:4] for path in paths]).T
        self.real = torch.arange(3)[:, None] < torch.tensor([len(path) for path in paths])  # (3, M)
        self.pairs = padded[:3], padded[1:]  # (s, a), (3, M) each
        self.rewards = (torch.randn(2, 2, generator=g, dtype=F64) + 2)[self.pairs] * self.real
        self.values = torch.tensor([1.5, -0.5], dtype=F64)[self.pairs[0]]  # any b(s)
        self.logp = self.theta.log_softmax(-1)[self.pairs]
        end = torch.tensor([[0.3, 0.7], [0.5, 0.2]], dtype=F64)[self.pairs]
        goes_on = torch.cat([self.real[1:], torch.zeros_like(self.real[:1])])
        dynamics = torch.where(goes_on, 1 - end, torch.where(self.real, end, 1))
        dynamics[2] = 1  # the third step is the last
        self.p = dynamics.prod(0) * (self.logp * self.real).sum(0).exp()  # (M,)
        discounts = [[gamma ** (k - t) * (k >= t) for k in range(3)] for t in range(3)]
        self.returns = torch.tensor(discounts, dtype=F64) @ self.rewards  # G_t, (3, M)

    def gradient(self, objective):
        return torch.autograd.grad(objective, self.theta, retain_graph=True)[0]

    def exact(self, weight):
        """E[Σ_t ∇ log π w_t], without a baseline."""
        w = self.returns if weight == "to-go" else self.returns[0]
        return self.gradient((self.p.detach() * self.logp * self.real * w).sum())

    def exact_of_the_return(self):
        """∇E[R(τ)], by differentiating the probabilities."""
        return self.gradient((self.p * self.returns[0]).sum())

    def expected_estimate(self, weight, baseline, n):
        """The mean of reinforce.py's estimate over all batches of n trajectories."""
        total, p = 0, self.p.detach()
        for batch in itertools.product(range(len(p)), repeat=n):
            i = list(batch)
            given = self.rewards[:, i], self.values[:, i], weight, baseline, self.gamma
            w, real = variance.batch_weights(*given), self.real[:, i]
            total -= p[i].prod() * reinforce.reinforce_loss(self.logp[:, i][real], w[real], n)
        return self.gradient(total)


@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize("weight", ["to-go", "trajectory"])
def test_a_mean_over_the_batch_shrinks_the_gradient(weight, gamma):
    """Of trajectories of one to three steps, summing over all pairs of them.

    Nothing is taken by a baseline of the state, 1/N by the mean at t. The mean b of R(τ) takes 1/N
    of ∇E[R(τ)], which with R(τ) as the weight, or with γ = 1, is the gradient itself.
    """
    game = Game(gamma)
    assert game.p.sum().item() == pytest.approx(1)
    g, of_the_return = game.exact(weight), game.exact_of_the_return()
    assert torch.allclose(g, of_the_return) == (weight == "trajectory" or gamma == 1)
    close(game.expected_estimate(weight, "none", 2), g)
    close(game.expected_estimate(weight, "state", 2), g)
    close(game.expected_estimate(weight, "time", 2), g / 2)
    close(game.expected_estimate(weight, "constant", 2), g - of_the_return / 2)


def test_the_mean_at_t_of_three_leaves_two_thirds():
    game = Game(0.8)
    close(game.expected_estimate("to-go", "time", 3), game.exact("to-go") * 2 / 3)


# What benchmarks/studies/variance.py measures


def test_the_objective_of_the_measured_mdp():
    """U(θ) as a sum over trajectories, and by backward induction over states."""
    mdp = variance.MDP(S=3, A=2, H=3, seed=5)
    close(mdp.log_probability(mdp.theta).exp().sum(), torch.ones((), dtype=F64))
    close(mdp.objective(mdp.theta), mdp.start @ mdp.values()[0])


def test_k_step_advantages():
    """k = 1 is the TD error, k = H Monte Carlo; with wrong values only this one is unbiased."""
    mdp = variance.MDP(S=3, A=2, H=3, seed=5)
    V = mdp.along(mdp.values())
    one, all_ = (variance.k_step_advantages(mdp.rewards, V, k) for k in (1, mdp.H))
    close(one, mdp.rewards + V[1:] - V[:-1])
    close(all_, reinforce.returns_to_go(mdp.rewards, 1.0) - V[:-1])
    biases, variances = [], []
    for k in range(1, mdp.H + 1):
        _, bias, spread = variance.exact(mdp, variance.k_step_advantages(mdp.rewards, V / 2, k))
        biases.append(bias.item())
        variances.append(spread.item())
    assert biases[0] > 0.1 and biases == sorted(biases, reverse=True)
    assert biases[-1] == pytest.approx(0, abs=1e-9) and variances == sorted(variances)


def test_the_measured_table():
    """What benchmarks/studies/variance.py measures, with fewer batches, and the table that it left."""
    rows = {tuple(row[:3]): row[3:] for row in variance.table(variance.MDP(), batches=4_000)}
    with open(ROOT / "benchmarks/studies/variance.csv", encoding="utf-8") as file:
        kept = {tuple(row[:3]): row[3:] for row in csv.reader(file)}
    assert kept.keys() - rows.keys() == {tuple(variance.COLUMNS[:3])}
    for key, (n, ratio, bias, spread) in rows.items():
        assert kept[key][0] == n
        if n == "1":
            assert kept[key] == [n, ratio, bias, spread]
            assert key[0] == "k-step" or (ratio, bias) == ("1.000", "0.000")
        else:
            assert float(kept[key][1]) == pytest.approx(7 / 8, abs=0.02)
            assert float(spread) == pytest.approx(float(kept[key][3]), rel=0.1)
    spread = {key[1:]: float(row[3]) for key, row in kept.items() if key[0] == "baseline"}
    for weight in ("trajectory", "to-go"):
        assert spread[weight, "state"] < spread[weight, "none"] / 3
        assert spread[weight, "time"] <= spread[weight, "constant"] < spread[weight, "none"]
    for baseline in ("none", "time", "state"):
        assert spread["to-go", baseline] < spread["trajectory", baseline]


# The loop

COMMON = dict(num_envs=32, hidden=32, gamma=0.9, eval_episodes=20, max_steps=50, init_std=0.2)
COMMON |= dict(value_steps=8, value_batch=64, norm_obs=False, standardize=False)


def trained(tmp_path, env_id, steps, **options):
    """Evaluation returns, and V_φ from the checkpoint as a function of observations."""
    options = {**COMMON, "run_dir": str(tmp_path), **options}
    args = reinforce.Args(env_id=env_id, total_timesteps=steps, **options)
    returns = reinforce.train(args)
    env = reinforce.make_env(args)
    norm = [reinforce.make_policy(env, args)[0]] if args.norm_obs else []
    critic = torch.nn.Sequential(*norm, *reinforce.mlp(env, args, 1, 1.0))
    critic.load_state_dict(load(tmp_path)["critic"])
    return returns, lambda *obs: critic(torch.tensor(obs).float()).squeeze(-1).tolist()


def load(tmp_path):
    return torch.load(tmp_path / "checkpoint.pt", weights_only=True)


def weights(tmp_path, env_id="Matched-v0", **options):
    """The checkpoint of a short run."""
    trained(tmp_path, env_id, 200, **options)
    return load(tmp_path)


def scalars(tmp_path):
    """What the run logged: name -> values."""
    log = EventAccumulator(str(tmp_path)).Reload()
    return {tag: [event.value for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


class Played(gym.vector.VectorWrapper):
    """What each environment did up to its first end after each reset: a list for each of them."""

    batches = []

    def reset(self, **kwargs):
        self.obs, info = super().reset(**kwargs)
        self.live, self.played = np.ones(self.num_envs, bool), [[] for _ in range(self.num_envs)]
        self.batches.append(self.played)
        return self.obs, info

    def step(self, action):
        assert self.live.any(), "the last one has ended"
        before, outcome = self.obs.copy(), super().step(action)
        self.obs = outcome[0].copy()
        for i in np.flatnonzero(self.live):
            after = outcome[1][i], self.obs[i], outcome[2][i]
            self.played[i].append((before[i], action[i], *after))
        self.live &= ~(outcome[2] | outcome[3])
        return outcome


@pytest.fixture
def spied(monkeypatch):
    """Of each update: what was played, what the losses were given, steps and episodes counted.

    The steps that the environments have simulated stand beside those that the run has counted.
    """
    found = {"played": [], "policy": [], "value": [], "log": []}
    make_envs, log, start = reinforce.make_envs, reinforce.Run.log, envs.Tiny.steps
    policy_loss, value_loss = reinforce.reinforce_loss, reinforce.value_loss

    def note_policy(logp, w, n):
        found["policy"].append((logp.detach().numpy(), w.numpy(), n))
        return policy_loss(logp, w, n)

    def note_value(values, returns):
        found["value"].append(np.stack([values.detach().numpy(), returns.numpy()], 1))
        return value_loss(values, returns)

    def note_log(run, **losses):
        found["log"].append((run.step, envs.Tiny.steps - start, [*run.episodes][-7:]))
        log(run, **losses)

    monkeypatch.setattr(Played, "batches", found["played"])
    monkeypatch.setattr(reinforce, "make_envs", lambda *a: Played(make_envs(*a)))
    monkeypatch.setattr(reinforce, "reinforce_loss", note_policy)
    monkeypatch.setattr(reinforce, "value_loss", note_value)
    monkeypatch.setattr(reinforce.Run, "log", note_log)
    return found


def returns_of(one, value):
    """G_t of a trajectory as it was played, with γ = 0.9, and value where it was only cut."""
    *_, last, terminated = one[-1]
    following, found = 0 if terminated else value(last), []
    for _, _, reward, _, _ in reversed(one):
        following = reward + 0.9 * following
        found.append(following)
    return found[::-1]


def expected_weights(played, V, weight, baseline):
    """G_t or R(τ) less the baseline of each step, in a dictionary by t and trajectory."""
    G = [returns_of(one, V if baseline == "state" else lambda obs: 0) for one in played]
    found = {}
    for i, one in enumerate(played):
        for t, (obs, *_) in enumerate(one):
            at_t = [x[0] if weight == "trajectory" else x[t] if t < len(x) else 0 for x in G]
            b = {"none": 0, "constant": np.mean([x[0] for x in G]), "time": np.mean(at_t)}
            found[t, i] = at_t[i] - (V(obs) if baseline == "state" else b[baseline])
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_steps": 4, "norm_obs": True},
        {"baseline": "time"},
        {"baseline": "time", "weight": "trajectory", "max_steps": 4},
        {"baseline": "constant"},
        {"baseline": "none", "standardize": True},
        {"weight": "trajectory", "standardize": True, "norm_obs": True},
    ],
    ids=str,
)
def test_the_batch_is_one_whole_trajectory_of_each(tmp_path, spied, options):
    """log π, weights, regression targets, episodes and steps against a list of what was played.

    No weight changes, so that the networks of the checkpoint are those that acted, but for the
    statistics of the observations, which are those of the updates before.
    """
    frozen = dict(learning_rate=0.0, value_learning_rate=0.0, eval_episodes=1, num_envs=7)
    trained(tmp_path, "Wander-v0", 400, **frozen, **options)
    args = reinforce.Args(**{**COMMON, **options})
    env = reinforce.make_env(reinforce.Args(env_id="Wander-v0"))
    net = reinforce.make_policy(env, args)
    norm = [net[0]] if args.norm_obs else []
    critic = torch.nn.Sequential(*norm, *reinforce.mlp(env, args, 1, 1.0))
    saved, seen = load(tmp_path), []
    net.load_state_dict(saved["policy"])
    critic.load_state_dict(saved["critic"])
    lengths, longest = set(), min(args.max_steps, 5)
    assert len(spied["log"]) == len(spied["policy"]) > 5

    @torch.no_grad()
    def V(obs):
        return critic(torch.from_numpy(obs)).item()

    for update, played in enumerate(spied["played"]):
        if args.norm_obs:
            everything = torch.from_numpy(np.array(seen or [[-1, -1], [1, 1]], np.float32))
            net[0].mean.copy_(everything.mean(0))
            net[0].var.copy_(everything.var(0, correction=0))
        lengths |= {len(one) for one in played}
        assert all(one[-1][4] or len(one) == longest for one in played), "until an end or a cut"
        expected = expected_weights(played, V, args.weight, args.baseline)
        rows = sorted(expected)  # by t, then by trajectory
        exact = np.array([expected[row] for row in rows])
        if args.standardize:
            exact = (exact - exact.mean()) / exact.std()
        steps = [played[i][t][:2] for t, i in rows]
        with torch.no_grad():
            all_logp = net(torch.from_numpy(np.array([obs for obs, _ in steps]))).log_softmax(-1)
        logp, w, n = spied["policy"][update]
        assert n == 7
        np.testing.assert_allclose(w, exact, atol=2e-5)
        np.testing.assert_allclose(logp, [x[a] for x, (_, a) in zip(all_logp, steps)], atol=2e-5)
        counted, simulated, episodes = spied["log"][update]
        assert counted == simulated
        assert episodes == [(sum(x[2] for x in one), len(one)) for one in played]
        if args.baseline == "state":
            pairs = [(V(x[0]), G) for one in played for x, G in zip(one, returns_of(one, V))]
            given = np.concatenate(spied["value"][8 * update : 8 * update + 8])
            distance = np.abs(given[:, None] - np.array(pairs)).max(-1).min(-1)
            assert len(given) == 8 * 64 and distance.max() < 2e-5
        seen += [obs for obs, _ in steps]
    assert lengths == {*range(1, longest + 1)}
    assert saved["env_steps"] == counted > len(seen), "some play on after their end"
    if args.norm_obs:
        everything = torch.from_numpy(np.array(seen))
        for net in ("policy", "critic"):
            close(saved[net]["0.mean"], everything.mean(0))
            close(saved[net]["0.var"], everything.var(0, correction=0))


def test_the_baseline_is_used_before_it_is_fitted(tmp_path, spied):
    """The weights of the first update do not depend on how V_φ is fitted in it."""
    given, fitted = [], []
    for rate in (0.0, 0.1):
        spied["policy"].clear()
        checkpoint = weights(tmp_path / str(rate), "Wander-v0", value_learning_rate=rate)
        given.append(spied["policy"][0][1])
        fitted.append(checkpoint["critic"]["0.weight"])
    assert np.array_equal(*given) and not torch.equal(*fitted)


def test_without_a_critic_a_truncated_return_is_used_as_it_is(tmp_path, spied):
    cut = [(1 - 0.9 ** (5 - t)) / 0.1 for t in range(5)]
    options = dict(baseline="none", num_envs=1)
    trained(tmp_path / "a", "Truncates-v0", 100, **options)
    assert len(spied["policy"]) == 20
    assert all(w.tolist() == pytest.approx(cut) for _, w, _ in spied["policy"])
    spied["policy"].clear()
    trained(tmp_path / "b", "Truncates-v0", 100, max_steps=3, **options)
    assert all(w.tolist() == pytest.approx([2.71, 1.9, 1]) for _, w, _ in spied["policy"])


@pytest.mark.parametrize("learn_std", [False, True])
def test_each_loss_moves_its_own_network(tmp_path, monkeypatch, learn_std):
    """A fixed deviation stays, a learned one moves, V_φ is fitted only where it is the baseline.

    Actions are stored as they were sampled, beyond the bounds too.
    """
    stored, log_prob = [], reinforce.gaussian_log_prob
    spy = lambda mean, log_std, a: stored.append(a) or log_prob(mean, log_std, a)  # noqa: E731
    monkeypatch.setattr(reinforce, "gaussian_log_prob", spy)
    for baseline in ("none", "state"):
        folder = tmp_path / baseline
        options = dict(init_std=1.0, learn_std=learn_std, norm_obs=True)
        still = dict(learning_rate=0.0, value_learning_rate=0.0)
        before = weights(folder / "before", "MatchedBox-v0", **still, **options)
        after = weights(folder / "after", "MatchedBox-v0", baseline=baseline, **options)
        moved = {
            f"{net}.{name}"
            for net in ("policy", "critic")
            for name, x in after[net].items()
            if not torch.equal(x, before[net][name]) and not name.startswith("0.")
        }
        layers = {f"{i}.{kind}" for i in (1, 3, 5) for kind in ("weight", "bias")}
        expected = {f"policy.{name}" for name in layers}
        expected |= {f"critic.{name}" for name in layers} if baseline == "state" else set()
        assert moved == expected | ({"policy.log_std"} if learn_std else set())
    assert max(a.abs().max() for a in stored) > 1.5


def test_the_logged_entropy_is_of_the_policy_that_played(tmp_path):
    """Before the step that changes σ."""
    trained(tmp_path, "MatchedBox-v0", 1, init_std=1.0, learn_std=True)
    assert load(tmp_path)["policy"]["log_std"] != 0
    entropy = torch.distributions.Normal(0, 1).entropy()
    assert scalars(tmp_path)["losses/entropy"] == pytest.approx([entropy.item()])


def test_learning_rates_fall_to_nothing(tmp_path, monkeypatch):
    """Both from their own beginning, in proportion to the steps that are left."""
    rates, step = [], torch.optim.Adam.step

    def note(optimizer, *a):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *a)

    monkeypatch.setattr(torch.optim.Adam, "step", note)
    options = dict(num_envs=10, learning_rate=0.1, value_learning_rate=0.2, value_steps=1)
    trained(tmp_path / "a", "Constant-v0", 40, **options)  # ten steps an update
    assert rates == pytest.approx([0.1, 0.2, 0.075, 0.15, 0.05, 0.1, 0.025, 0.05])
    rates.clear()
    trained(tmp_path / "b", "Constant-v0", 40, anneal_lr=False, **options)
    assert rates == pytest.approx([0.1, 0.2] * 4)


# Learning


def test_constant_reward(tmp_path):
    _, value = trained(tmp_path, "Constant-v0", 1_000)
    assert value([0, 0]) == pytest.approx([1], abs=0.02)


@pytest.mark.parametrize("weight", ["to-go", "trajectory"])
@pytest.mark.parametrize("baseline", ["none", "constant", "time", "state"])
def test_two_step_credit(tmp_path, weight, baseline):
    returns, value = trained(tmp_path, "TwoStep-v0", 4_000, weight=weight, baseline=baseline)
    assert returns.mean() == 1
    if baseline == "state":
        both = value([0, 1], [0, -1], [1, 1], [1, -1])
        assert both == pytest.approx([0.9, 0.9, 1, 1], abs=0.1)


@pytest.mark.parametrize(
    ("env_id", "options"),
    [
        ("Matched-v0", {}),
        ("Matched-v0", {"baseline": "constant"}),
        ("Shifted-v0", {"norm_obs": True, "standardize": True}),
    ],
    ids=str,
)
def test_reward_depends_on_action_and_observation(tmp_path, env_id, options):
    """Also where only normalised observations can be told apart, in evaluation too."""
    returns, _ = trained(tmp_path, env_id, 2_500, **options)
    assert returns.mean() == 1


@pytest.mark.parametrize(
    "options", [{}, {"learn_std": True, "norm_obs": True, "standardize": True}], ids=str
)
def test_continuous_action(tmp_path, options):
    returns, _ = trained(tmp_path, "MatchedBox-v0", 8_000, **options)
    assert returns.mean() > -0.1  # a constant action gets -4 at best


def test_values_at_both_ends(tmp_path):
    """Beyond a time limit the value of the final observation, beyond an end nothing."""
    _, value = trained(tmp_path, "Limits-v0", 10_000, gamma=0.5)
    assert value([1, 0], [-1, 0], [0, 1]) == pytest.approx([2, -2, 1], abs=0.2)


def test_a_cut_does_not_end_the_value(tmp_path):
    """Neither does --max-steps."""
    _, value = trained(tmp_path, "Truncates-v0", 12_000, max_steps=3)
    assert value([0, 0]) == pytest.approx([10], abs=0.3)


# Checkpoints


def test_a_resume_equals_a_run_that_was_never_stopped(tmp_path, monkeypatch):
    """Bit for bit, with episodes that end at random, every normaliser and optimiser in use."""
    options = dict(COMMON, env_id="WanderBox-v0", total_timesteps=1_500, norm_obs=True)
    options |= dict(learn_std=True, standardize=True)
    reinforce.train(reinforce.Args(**options, run_dir=str(tmp_path / "whole")))
    log, logs = reinforce.Run.log, []

    def stop(run, **losses):
        log(run, **losses)
        logs.append(run.step)
        if len(logs) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reinforce.Run, "log", stop)
        reinforce.train(reinforce.Args(**options, run_dir=str(tmp_path / "part")))
    path = str(tmp_path / "part/checkpoint.pt")
    assert load(tmp_path / "part")["env_steps"] == logs[-1] < 1_000
    reinforce.train(reinforce.Args(**options, run_dir=str(tmp_path / "rest"), resume=path))
    whole, rest = load(tmp_path / "whole"), load(tmp_path / "rest")
    for checkpoint in (whole, rest):
        del checkpoint["args"]
    assert {"policy", "critic", "optimizer", "critic_optimizer", "env_steps"} <= whole.keys()
    assert repr_of(whole) == repr_of(rest)


def repr_of(x):
    """Nested dictionaries and lists with tensors as lists of numbers, which can be compared."""
    if isinstance(x, dict):
        return {name: repr_of(part) for name, part in x.items()}
    return x.tolist() if isinstance(x, torch.Tensor) else x


# Two processes

TWO = """
import os, sys, torch, envs, reinforce as script
rank, folder = int(os.environ["RANK"]), sys.argv[1]
all_sum, evaluate, loss = script.all_sum, script.Run.evaluate, script.reinforce_loss
calls, shares = [], []
flat = lambda tensors: torch.cat([x.detach().double().flatten() for x in tensors])
def note(*tensors, weight=1):
    before = flat(tensors)
    first = all_sum(*tensors, weight=weight)
    calls.append((float(weight), before, flat(tensors)))
    return first
def note_loss(logp, w, n):
    shares.append(n)
    return loss(logp, w, n)
def tell(run):
    state = {name: part.state_dict() for name, part in run.learner.items()}
    found = {"calls": calls, "state": state, "step": run.step, "simulated": envs.Tiny.steps}
    found["shares"] = shares
    torch.save(found, f"{folder}/rank{rank}.pt")
    return evaluate(run)
script.all_sum, script.Run.evaluate, script.reinforce_loss = note, tell, note_loss
options = dict(num_envs=8, hidden=16, value_steps=3, norm_obs=True, eval_episodes=2)
options |= dict(total_timesteps=500, env_id="Wander-v0", run_dir=f"{folder}/run")
script.train(script.Args(**options))
script.Run.evaluate = evaluate
envs.Faulty.good = 300 if rank == 1 else 10**9
options |= dict(total_timesteps=10**6, env_id="Faulty-v0", run_dir=f"{folder}/faulty")
script.train(script.Args(**options))
"""


def test_two_processes(tmp_path):
    """Gradients are averaged over different data, steps added up; nan on one of them ends both."""
    (tmp_path / "two.py").write_text(TWO)
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [str(tmp_path / "two.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    a, b = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert run.stdout.count("eval_return_mean") == 1, run.stderr
    assert repr_of(a["state"]) == repr_of(b["state"])
    assert a["step"] == b["step"] == a["simulated"] + b["simulated"]
    assert load(tmp_path / "run")["env_steps"] == a["step"] >= 500
    assert {*a["shares"], *b["shares"]} == {4}, "each divides by the trajectories of its own"
    # In each update: the steps, the gradient on θ, K = 3 of those on φ, the statistics.
    assert len(a["calls"]) == len(b["calls"]) and len(a["calls"]) % 6 == 0
    for i, ((w_a, own_a, sum_a), (w_b, own_b, sum_b)) in enumerate(zip(a["calls"], b["calls"])):
        close(w_a * own_a + w_b * own_b, sum_a, rtol=1e-5, atol=1e-6)
        assert torch.equal(sum_a, sum_b)
        if i % 6 == 0:
            real_a, real_b = own_a[1].item(), own_b[1].item()
        elif i % 6 == 1:  # of as many trajectories each
            assert w_a == w_b == 0.5
        elif i % 6 < 5:  # of as many steps as each has
            assert w_a == pytest.approx(real_a / (real_a + real_b))
            assert w_a + w_b == pytest.approx(1)
        if i % 6:
            assert not torch.equal(own_a, own_b), "each has data of its own"
    assert run.returncode != 0 and "not finite" in run.stderr
    saved = load(tmp_path / "faulty")
    assert saved["env_steps"] < 10_000
    assert np.isfinite([y for x in saved["policy"].values() for y in x.flatten().tolist()]).all()


# Refusals


@pytest.mark.parametrize("fault", ["reward", "observation"])
def test_not_a_number_is_refused_and_the_checkpoint_kept(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(envs.Faulty, "good", envs.Faulty.steps + 300)
    with pytest.raises(reinforce.Refusal, match="not finite.*an observation or a reward"):
        options = dict(env_kwargs=f'{{"fault": "{fault}"}}', norm_obs=True)
        trained(tmp_path, "Faulty-v0", 10_000, **options)
    saved = load(tmp_path)
    assert saved["env_steps"] < 300
    assert all(x.isfinite().all() for net in ("policy", "critic") for x in saved[net].values())


@pytest.mark.parametrize(
    "options",
    [
        ["--baseline", "constant", "--num-envs", "1"],
        ["--baseline", "time", "--num-envs", "1"],
        ["--baseline", "none", "--weight", "trajectory", "--num-envs", "1"],
        ["--num-envs", "0"],
        ["--max-steps", "0"],
        ["--value-steps", "0"],
        ["--gamma", "1.5"],
        ["--init-std", "0"],
    ],
    ids=" ".join,
)
def test_bad_options(options):
    status, out, err = command("reinforce", *options)
    assert status == 2 and not out and len(err.splitlines()) == 1 and options[0] in err
