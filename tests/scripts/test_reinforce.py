"""reinforce.py: its derivation line by line on an MDP whose trajectories are listed; its loop."""

import csv
import itertools
import sys

import gymnasium as gym
import numpy as np
import pytest
import reinforce
import torch
from conftest import ROOT, command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.append(str(ROOT / "benchmarks"))
import variance  # noqa: E402

close = torch.testing.assert_close
jacobian = torch.autograd.functional.jacobian


@pytest.fixture(scope="module")
def mdp():
    return variance.MDP(S=3, A=2, H=3, seed=5)


def probabilities(mdp):
    return mdp.log_probability(mdp.theta).exp()


def scores(mdp):
    """grad log pi(a_t|s_t) is one-hot of (s_t, a_t) less pi in the row of s_t, (H, M, S * A)."""
    pi, each = mdp.theta.softmax(-1), torch.arange(mdp.states.shape[1])
    table = torch.zeros(*mdp.states.shape, mdp.S, mdp.A, dtype=torch.float64)
    for t, (s, a) in enumerate(zip(mdp.states, mdp.actions, strict=True)):
        table[t, each, s] = -pi[s]
        table[t, each, s, a] += 1
    return table.flatten(2)


# Policies


def test_softmax_score_is_the_documents_two_terms():
    torch.manual_seed(0)
    net = reinforce.SoftmaxPolicy(None, 2, gym.spaces.Discrete(3), 4).double()
    torch.nn.init.normal_(net.layers[-1].weight)
    obs, parameters = torch.randn(2, dtype=torch.float64), [*net.parameters()]

    def gradient(f):
        return torch.cat([g.flatten() for g in torch.autograd.grad(f(net(obs)), parameters)])

    h, grad_h = net(obs).detach(), torch.stack([gradient(lambda h, b=b: h[b]) for b in range(3)])
    pi = h.exp() / h.exp().sum()  # eqs. 1 and 7
    close(gradient(lambda h: h.exp().sum()), h.exp() @ grad_h)  # eq. 5
    close(gradient(lambda h: h.exp().sum().log()), h.exp() @ grad_h / h.exp().sum())  # eqs. 4, 6
    close(gradient(lambda h: h.exp().sum().log()), pi @ grad_h)  # eq. 8
    for a in range(3):
        log_prob = lambda h, a=a: reinforce.softmax_log_prob(h, torch.tensor(a))  # noqa: E731
        close(log_prob(h).exp(), pi[a])
        normaliser = gradient(lambda h: h.exp().sum().log())
        close(gradient(log_prob), grad_h[a] - normaliser)  # eq. 3
        close(gradient(log_prob), grad_h[a] - pi @ grad_h)  # eq. 9


@pytest.mark.parametrize("d", [1, 2])
def test_gaussian_score_is_the_deviation_over_the_variance(d):
    torch.manual_seed(0)
    net = reinforce.GaussianPolicy(None, 3, gym.spaces.Box(-1, 1, (d,)), 4, std=0.7).double()
    torch.nn.init.normal_(net.layers[-1].weight)
    obs, action = torch.randn(3, dtype=torch.float64), torch.randn(d, dtype=torch.float64)
    sigma = torch.tensor([0.7, 0.2][:d], dtype=torch.float64)
    net.log_std.data = sigma.log()
    mean, parameters = net(obs), [*net.layers.parameters()]
    grad_mean = [torch.autograd.grad(m, parameters, retain_graph=True) for m in mean]
    logp = net.log_prob(mean, action)
    covariance = sigma.pow(2).diag()
    reference = torch.distributions.MultivariateNormal(mean, covariance)  # eqs. 1, 3, 6, 8
    close(logp, reference.log_prob(action))
    z = torch.linalg.solve(covariance, (action - mean).detach())
    score = [sum(z[j] * grad_mean[j][i] for j in range(d)) for i in range(len(parameters))]
    close([*torch.autograd.grad(logp, parameters, retain_graph=True)], score)  # eqs. 4 and 9
    loss = reinforce.reinforce_loss(logp.unsqueeze(0), torch.tensor([2.5]), 1)
    update = torch.autograd.grad(loss, parameters)
    close([-g for g in update], [2.5 * g for g in score])  # eq. 10


def test_gaussian_actions_follow_the_policy():
    torch.manual_seed(0)
    policy = reinforce.GaussianPolicy(None, 2, gym.spaces.Box(-1, 1, (2,)), 8, std=0.5)
    policy.layers[-1].bias.data = torch.tensor([1.0, -2.0])
    obs = np.ones((1, 2), np.float32)
    mean, actions = policy(torch.from_numpy(obs))[0], policy.actor()(obs, policy.noise(100_000))
    np.testing.assert_allclose(actions.mean(0), mean.detach(), atol=0.01)
    np.testing.assert_allclose(np.cov(actions.T), 0.25 * np.eye(2), atol=0.01)


# Trajectories and the derivation


def test_the_objective_is_the_value_of_the_start(mdp):
    """U(theta) as a sum over trajectories, and by backward induction over states."""
    p = torch.ones(mdp.states.shape[1], dtype=torch.float64)
    pi = mdp.theta.softmax(-1)
    for m in range(len(p)):  # P(tau) as a product, in a loop
        s, a = mdp.states[:, m], mdp.actions[:, m]
        p[m] = mdp.start[s[0]]
        for t in range(mdp.H):
            p[m] *= pi[s[t], a[t]]
            p[m] *= mdp.transition[s[t], a[t], s[t + 1]] if t + 1 < mdp.H else 1
    close(probabilities(mdp), p)
    close(p.sum(), torch.tensor(1.0, dtype=torch.float64))
    close(mdp.objective(mdp.theta), (p * mdp.rewards.sum(0)).sum())
    close(mdp.objective(mdp.theta), mdp.start @ mdp.values()[0])


def test_every_line_of_the_derivation_is_the_gradient(mdp):
    eps, theta = 1e-6, mdp.theta
    numeric = torch.zeros_like(theta)  # by finite differences, eq. 1
    for i in itertools.product(range(mdp.S), range(mdp.A)):
        step = torch.zeros_like(theta)
        step[i] = eps
        numeric[i] = (mdp.objective(theta + step) - mdp.objective(theta - step)) / (2 * eps)
    numeric = numeric.flatten()
    close(mdp.gradient(), numeric, atol=1e-8, rtol=0)
    p, R, score = probabilities(mdp), mdp.rewards.sum(0), scores(mdp)
    grad_p = jacobian(lambda x: mdp.log_probability(x).exp(), theta).flatten(1)
    grad_log_p = jacobian(mdp.log_probability, theta).flatten(1)
    close(R @ grad_p, numeric, atol=1e-8, rtol=0)  # eq. 2
    close(grad_p, p[:, None] * grad_log_p)  # eq. 3
    close((p * R) @ grad_log_p, numeric, atol=1e-8, rtol=0)  # eqs. 4 and 5
    policy = reinforce.softmax_log_prob(theta[mdp.states], mdp.actions).sum(0)
    other = mdp.theta + torch.randn_like(theta)
    dynamics = mdp.log_probability(theta) - policy
    policy_2 = reinforce.softmax_log_prob(other[mdp.states], mdp.actions).sum(0)
    close(mdp.log_probability(other) - policy_2, dynamics)  # eq. 6: dynamics have no theta
    close(grad_log_p, score.sum(0))  # eq. 7
    close(torch.einsum("m,tmd,m->d", p, score, R), numeric, atol=1e-8, rtol=0)  # eq. 8
    close(torch.einsum("m,tmd,m->d", p, score, R), p @ mdp.estimates(R.expand(mdp.H, -1)))  # 9
    G = reinforce.returns_to_go(mdp.rewards, 1.0)
    close(torch.einsum("m,tmd,tm->d", p, score, G), numeric, atol=1e-8, rtol=0)  # eq. 11
    close(p @ mdp.estimates(G), numeric, atol=1e-8, rtol=0)
    for past, t in itertools.combinations(range(mdp.H), 2):  # the past has no share in it
        close((p * mdp.rewards[past]) @ score[t], torch.zeros_like(numeric), atol=1e-12, rtol=0)


def test_the_loss_is_minus_the_estimate():
    """1/N sum_i sum_t of score times weight, added up one step at a time; ragged trajectories."""
    torch.manual_seed(0)
    N, T, lengths = 3, 4, [4, 1, 2]
    valid = torch.arange(T)[:, None] < torch.tensor(lengths)
    logits = torch.randn(T, N, 2, dtype=torch.float64, requires_grad=True)
    actions, weights = torch.randint(2, (T, N)), torch.randn(T, N, dtype=torch.float64)
    logp = reinforce.softmax_log_prob(logits, actions)
    loss = reinforce.reinforce_loss(logp[valid], weights[valid], N)
    expected, pi = torch.zeros_like(logits), logits.detach().softmax(-1)
    for i in range(N):
        for t in range(lengths[i]):
            for b in range(2):
                score = float(b == actions[t, i]) - pi[t, i, b]
                expected[t, i, b] = score * weights[t, i] / N
    close(-torch.autograd.grad(loss, logits)[0], expected)


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_returns_to_go(gamma):
    rewards = torch.randn(6, 3, dtype=torch.float64)
    rewards[4:, 1] = 0
    returns = reinforce.returns_to_go(rewards, gamma)
    for i, t in itertools.product(range(3), range(6)):
        exact = sum(gamma ** (k - t) * rewards[k, i].item() for k in range(t, 6))
        assert returns[t, i].item() == pytest.approx(exact)


# Baselines


def test_means_of_a_batch_of_unequal_lengths():
    lengths = [5, 2, 3]
    valid = torch.arange(5)[:, None] < torch.tensor(lengths)
    rewards = torch.randn(5, 3) * valid
    returns = reinforce.returns_to_go(rewards, 0.9)
    totals = [sum(0.9**t * rewards[t, i].item() for t in range(n)) for i, n in enumerate(lengths)]
    assert reinforce.constant_baseline(returns).item() == pytest.approx(np.mean(totals), rel=1e-5)
    weights = returns + 1  # not 0 after the end, as R(τ) is not
    ours = reinforce.time_baseline(weights, valid)
    assert ours.shape == (5, 1)
    for t in range(5):
        reached = [weights[t, i].item() for i, n in enumerate(lengths) if t < n]
        assert ours[t].item() == pytest.approx(np.mean(reached), rel=1e-5)


@pytest.mark.parametrize("weight", ["trajectory", "to-go"])
def test_a_baseline_of_state_and_time_leaves_the_expected_gradient(mdp, weight):
    """Baseline, eqs. 6 to 11, exactly: a number, one for each t, any function of t and s_t."""
    p, score, exact = probabilities(mdp), scores(mdp), mdp.gradient()
    G = reinforce.returns_to_go(mdp.rewards, 1.0)
    weights = G if weight == "to-go" else G[0].expand_as(G)
    table = torch.randn(mdp.H + 1, mdp.S, dtype=torch.float64)
    vector = torch.randn(mdp.H, 1, dtype=torch.float64)
    baselines = torch.full_like(G, 7.0), vector.expand_as(G), mdp.along(table)[:-1]
    for b in baselines:
        close(p @ mdp.estimates(weights - b), exact)
        zero = torch.einsum("m,tmd,tm->td", p, score, b)  # eq. 9, for each t
        close(zero, torch.zeros_like(zero), atol=1e-12, rtol=0)
    pi = mdp.theta.softmax(-1)
    inner = torch.einsum(
        "sa,sad->sd", pi, jacobian(lambda x: x.log_softmax(-1), mdp.theta).flatten(2)
    )
    close(inner, torch.zeros_like(inner), atol=1e-12, rtol=0)  # eq. 11
    on_action = G + 5 * mdp.actions  # one of the action does change it
    assert (p @ mdp.estimates(on_action) - exact).norm() > 0.1


@pytest.mark.parametrize(
    ("weight", "baseline"), itertools.product(["trajectory", "to-go"], ["constant", "time"])
)
@pytest.mark.parametrize("n", [2, 3])
def test_the_mean_of_the_batch_shrinks_the_gradient(weight, baseline, n):
    """By (n - 1) / n, summing over all batches of n trajectories; the document does not say so."""
    mdp = variance.MDP(S=2, A=2, H=2, seed=3)
    p = probabilities(mdp)
    i = torch.cartesian_prod(*[torch.arange(len(p))] * n)
    mean = p[i].prod(1) @ variance.in_batches(mdp, i, weight, baseline)
    close(mean, (n - 1) / n * mdp.gradient())


def test_values_are_expected_returns(mdp):
    """V(t, s) = E[G_t | s_t = s], and the TD error with it has mean 0 in every state: where the
    gradient of its mean square is 0, its target held fixed.
    """
    p, values = probabilities(mdp), mdp.values()
    G, along = reinforce.returns_to_go(mdp.rewards, 1.0), mdp.along(values)
    delta = mdp.rewards + along[1:] - along[:-1]
    for t, s in itertools.product(range(mdp.H), range(mdp.S)):
        here = p * (mdp.states[t] == s)
        close((here * G[t]).sum() / here.sum(), values[t, s])
        close((here * delta[t]).sum(), torch.tensor(0.0, dtype=torch.float64), atol=1e-12, rtol=0)


def test_regression_on_returns_finds_their_mean():
    returns = torch.tensor([0.5, -1.0, 2.0])
    for guess, slope in (0.5, 0.0), (1.5, 2.0), (0.0, -1.0):
        v = torch.tensor(guess, requires_grad=True)
        loss = reinforce.value_loss(v.expand(3), returns)
        assert loss.item() == pytest.approx(np.mean([(guess - g) ** 2 for g in returns.tolist()]))
        assert torch.autograd.grad(loss, v)[0].item() == pytest.approx(slope, abs=1e-6)


def test_k_step_advantages(mdp):
    """k = 1 is the TD error, k = H Monte Carlo; with wrong values only this one is unbiased."""
    V = mdp.along(mdp.values())
    G = reinforce.returns_to_go(mdp.rewards, 1.0)
    one, all_ = (variance.k_step_advantages(mdp.rewards, V, k) for k in (1, mdp.H))
    close(one, mdp.rewards + V[1:] - V[:-1])
    close(all_, G - V[:-1])
    exact = mdp.gradient()
    wrong = V / 2
    biases, variances = [], []
    for k in range(1, mdp.H + 1):
        advantages = variance.k_step_advantages(mdp.rewards, V, k)
        close(probabilities(mdp) @ mdp.estimates(advantages), exact)
        _, bias, spread = variance.exact(mdp, variance.k_step_advantages(mdp.rewards, wrong, k))
        biases.append(bias.item())
        variances.append(spread.item())
    assert biases[0] > 0.1 and biases == sorted(biases, reverse=True)
    assert biases[-1] == pytest.approx(0, abs=1e-9) and variances == sorted(variances)


def test_the_measured_table():
    """What benchmarks/variance.py measures, with fewer batches, and the table that it left."""
    rows = {tuple(row[:3]): row[3:] for row in variance.table(variance.MDP(), batches=4_000)}
    with open(ROOT / "benchmarks/results/variance.csv", encoding="utf-8") as file:
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


# Gradients


@pytest.mark.parametrize("learn_std", [False, True])
def test_each_loss_moves_its_own_network(tmp_path, monkeypatch, learn_std):
    """Under training too: a fixed deviation stays, a learned one moves, V_φ only for "state"."""
    policy = reinforce.GaussianPolicy(None, 2, gym.spaces.Box(-1, 1, (3,)), 8, std=1.0)
    critic = reinforce.MLP(None, 2, 8, 1, 1.0)
    obs, action, target = torch.randn(9, 2), torch.randn(9, 3), torch.randn(9)

    def receivers(loss):
        policy.zero_grad(), critic.zero_grad()
        loss.backward()
        return [{p.grad is not None for p in m.parameters()} for m in (policy, critic)]

    logp = policy.log_prob(policy(obs), action)
    assert receivers(reinforce.reinforce_loss(logp, target, 3)) == [{True}, {False}]
    assert receivers(reinforce.value_loss(critic(obs).squeeze(-1), target)) == [{False}, {True}]

    for baseline in ("none", "state"):
        before = weights(tmp_path, "MatchedBox-v0", learning_rate=0.0, value_learning_rate=0.0)
        after = weights(tmp_path, "MatchedBox-v0", baseline=baseline, learn_std=learn_std)
        moved = {
            f"{net}.{name}"
            for net in ("policy", "critic")
            for name, x in after[net].items()
            if not torch.equal(x, before[net][name])
        }
        layers = {f"layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")}
        expected = {f"policy.{name}" for name in layers}
        expected |= {f"critic.{name}" for name in layers} if baseline == "state" else set()
        assert moved == expected | ({"policy.log_std"} if learn_std else set())


# Learning

COMMON = dict(num_envs=32, hidden=32, gamma=0.9, eval_episodes=20, max_steps=50, init_std=0.2)
COMMON |= dict(value_steps=8, value_batch=64)


def trained(tmp_path, env_id, steps, **options):
    """Evaluation returns, and V_φ from the checkpoint as a function of observations."""
    options = {**COMMON, "run_dir": str(tmp_path), **options}
    args = reinforce.Args(env_id=env_id, total_timesteps=steps, **options)
    returns = reinforce.train(args)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    env = reinforce.make_envs(env_id, 1)
    norm = reinforce.make_policy(env, args).norm
    critic = reinforce.MLP(norm, env.single_observation_space.shape[0], args.hidden, 1, 1.0)
    critic.load_state_dict(checkpoint["critic"])
    return returns, lambda *obs: critic(torch.tensor(obs).float()).squeeze(-1).tolist()


def weights(tmp_path, env_id="Matched-v0", **options):
    """The checkpoint of a short run."""
    trained(tmp_path, env_id, 200, **options)
    return torch.load(tmp_path / "checkpoint.pt", weights_only=True)


def scalars(tmp_path):
    """What the run logged: name -> values."""
    log = EventAccumulator(str(tmp_path)).Reload()
    return {tag: [event.value for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def test_constant_reward(tmp_path):
    _, value = trained(tmp_path, "Constant-v0", 1_000)
    assert value([0, 0]) == pytest.approx([1], abs=0.02)


@pytest.mark.parametrize(
    "options",
    [
        {"weight": weight, "baseline": baseline}
        for weight in ("to-go", "trajectory")
        for baseline in ("none", "constant", "time", "state")
    ],
    ids=str,
)
def test_two_step_credit(tmp_path, options):
    returns, value = trained(tmp_path, "TwoStep-v0", 4_000, **options)
    assert returns.mean() == 1
    if options["baseline"] == "state":
        both = value([0, 1], [0, -1], [1, 1], [1, -1])
        assert both == pytest.approx([0.9, 0.9, 1, 1], abs=0.1)


def test_reward_depends_on_the_observation(tmp_path):
    _, value = trained(tmp_path, "Observed-v0", 2_000)
    assert value([1, 0], [-1, 0]) == pytest.approx([1, -1], abs=0.05)


@pytest.mark.parametrize(
    "options", [{}, {"norm_obs": True, "standardize": True}, {"baseline": "constant"}], ids=str
)
def test_reward_depends_on_action_and_observation(tmp_path, options):
    returns, _ = trained(tmp_path, "Matched-v0", 2_000, **options)
    assert returns.mean() == 1


@pytest.mark.parametrize(
    "options", [{}, {"learn_std": True, "norm_obs": True, "standardize": True}], ids=str
)
def test_continuous_action(tmp_path, options):
    returns, _ = trained(tmp_path, "MatchedBox-v0", 8_000, **options)
    assert returns.mean() > -0.1  # a constant action gets -4 at best


@pytest.mark.parametrize("max_steps", [50, 3])
def test_a_cut_does_not_end_the_value(tmp_path, max_steps):
    """Neither the environment's own time limit nor --max-steps."""
    _, value = trained(tmp_path, "Truncates-v0", 20_000, max_steps=max_steps)
    assert value([0, 0]) == pytest.approx([10], abs=0.3)


def test_termination_ends_the_value(tmp_path):
    _, value = trained(tmp_path, "Terminates-v0", 10_000)
    exact = [(1 - 0.9 ** (5 - t)) / 0.1 for t in range(5)]
    assert value(*([t - 2.5, 0] for t in range(5))) == pytest.approx(exact, abs=0.15)


def test_both_ends(tmp_path):
    _, value = trained(tmp_path, "Both-v0", 20_000, num_envs=64)
    assert value([0, 0]) == pytest.approx([1 / (1 - 0.8 * 0.9)], abs=0.2)


def test_without_a_critic_the_return_is_used_as_it_is(tmp_path, monkeypatch):
    seen, loss = [], reinforce.reinforce_loss
    spy = lambda logp, w, n: seen.append(w) or loss(logp, w, n)  # noqa: E731
    monkeypatch.setattr(reinforce, "reinforce_loss", spy)
    trained(tmp_path, "Truncates-v0", 100, baseline="none", num_envs=1)
    cut = [(1 - 0.9 ** (5 - t)) / 0.1 for t in range(5)]
    assert len(seen) == 20 and all(w.tolist() == pytest.approx(cut) for w in seen)
    seen.clear()
    trained(tmp_path, "Truncates-v0", 100, baseline="none", num_envs=1, weight="trajectory")
    assert all(w.tolist() == pytest.approx([cut[0]] * 5) for w in seen)
    seen.clear()
    trained(tmp_path, "Truncates-v0", 100, baseline="none", num_envs=1, standardize=True)
    exact = (np.array(cut) - np.mean(cut)) / np.std(cut)
    assert all(w.tolist() == pytest.approx(exact, abs=1e-5) for w in seen)
    seen.clear()
    trained(tmp_path, "Both-v0", 400, standardize=True)  # what is standardised is G less V_φ
    assert len(seen) > 2
    assert all(abs(w.mean()) < 1e-5 and abs(w.std(correction=0) - 1) < 1e-4 for w in seen)


class Wander(gym.Env):
    """Random observations, a reward of 1 to 3 by the action, both kinds of end, 5 steps at most."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action):
        self.t += 1
        obs, terminated = self.np_random.uniform(-1, 1, 2), self.np_random.random() < 0.2
        return obs.astype(np.float32), 1.0 + action, terminated, self.t == 5, {}


gym.register("Wander-v0", Wander, disable_env_checker=True)


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


@pytest.mark.parametrize("longest", [4, 5])
def test_the_batch_is_one_whole_trajectory_of_each(tmp_path, monkeypatch, longest):
    """log pi, weights, regression targets, episodes and steps against a list of what was played;
    no learning, so that the networks of the checkpoint are those that acted.
    """
    make_envs, loss, update = reinforce.make_envs, reinforce.reinforce_loss, reinforce.Run.update
    spied, counted = [], []

    def loss_spy(logp, w, n):
        spied.append((logp.detach(), w, n))
        return loss(logp, w, n)

    def update_spy(run, steps, scalars):
        counted.append((steps, list(run.episodes)[-7:]))
        update(run, steps, scalars)

    monkeypatch.setattr(Played, "batches", [])
    monkeypatch.setattr(reinforce, "reinforce_loss", loss_spy)
    monkeypatch.setattr(reinforce.Run, "update", update_spy)
    monkeypatch.setattr(reinforce, "make_envs", lambda *a, **k: Played(make_envs(*a, **k)))
    frozen = dict(learning_rate=0.0, value_learning_rate=0.0, eval_episodes=1)
    _, V = trained(tmp_path, "Wander-v0", 300, num_envs=7, max_steps=longest, **frozen)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    policy = reinforce.SoftmaxPolicy(None, 2, gym.spaces.Discrete(3), COMMON["hidden"])
    policy.load_state_dict(checkpoint["policy"])
    assert len(counted) > 5 and checkpoint["env_steps"] == sum(steps for steps, _ in counted)
    lengths_seen = set()
    for played, (logp, w, n), (steps, episodes) in zip(Played.batches, spied, counted):
        assert n == 7 and episodes == [(sum(x[2] for x in one), len(one)) for one in played]
        rows = {}
        for i, one in enumerate(played):
            lengths_seen.add(len(one))
            assert one[-1][4] or len(one) == longest, "until it ended or was cut"
            following = 0 if one[-1][4] else V(one[-1][3].tolist())[0]
            for t in range(len(one) - 1, -1, -1):
                obs, action, reward, _, _ = one[t]
                following = reward + 0.9 * following
                with torch.no_grad():
                    exact = policy(torch.from_numpy(obs)).log_softmax(-1)[action].item()
                rows[t, i] = exact, following - V(obs.tolist())[0]
        exact = np.array([rows[key] for key in sorted(rows)])
        assert steps == len(exact)
        np.testing.assert_allclose(logp, exact[:, 0], atol=1e-5)
        np.testing.assert_allclose(w, exact[:, 1], atol=1e-5)
    assert lengths_seen == {*range(1, longest + 1)}


def test_observations_are_normalised_by_their_statistics(tmp_path):
    checkpoint = weights(tmp_path, "TwoStep-v0", norm_obs=True)
    assert checkpoint["policy"]["norm.count"] == checkpoint["env_steps"]
    close(checkpoint["policy"]["norm.mean"][0], torch.tensor(0.5))  # half of them are of t = 0
    assert torch.equal(checkpoint["policy"]["norm.var"], checkpoint["critic"]["norm.var"])


def test_options_reach_the_update(tmp_path):
    base = weights(tmp_path, "TwoStep-v0")["policy"]

    def differs(**options):
        ours = weights(tmp_path, "TwoStep-v0", **options)["policy"]
        return any(not torch.equal(base[name], x) for name, x in ours.items())

    assert not differs(weight="to-go")
    for option in ("standardize", "weight", "baseline", "gamma", "anneal_lr", "value_steps"):
        other = dict(standardize=True, weight="trajectory", baseline="time", gamma=0.5)
        other |= dict(anneal_lr=False, value_steps=3)
        assert differs(**{option: other[option]}), option


@pytest.mark.parametrize(
    "options",
    [
        ["--num-envs", "1", "--baseline", "constant"],
        ["--num-envs", "1", "--baseline", "time"],
        ["--num-envs", "0"],
        ["--max-steps", "0"],
        ["--value-steps", "0"],
        ["--gamma", "1.5"],
        ["--init-std", "-1"],
    ],
    ids=" ".join,
)
def test_bad_options(options):
    status, out, err = command("reinforce", *options)
    assert status == 2 and not out and len(err.splitlines()) == 1 and options[0] in err
