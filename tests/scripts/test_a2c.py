"""a2c.py: k-step advantages against loops and a finite MDP, gradients, and its loop."""

import a2c
import envs
import numpy as np
import pytest
import torch
from conftest import command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

INFINITE = 10**9


def random_rollout(T=40, N=6, seed=0):
    """Rewards, values and ends as a vector environment gives them, reset steps included."""
    rng = np.random.default_rng(seed)
    (terminated, truncated), real = np.zeros((2, T, N), bool), np.ones((T + 1, N), bool)
    for t in range(T):
        terminated[t] = real[t] & (rng.random(N) < 0.1)
        truncated[t] = real[t] & ~terminated[t] & (rng.random(N) < 0.1)
        real[t + 1] = ~(terminated[t] | truncated[t])
    rewards, values = rng.normal(size=(T, N)) * real[:T], rng.normal(size=(T + 1, N))
    return [torch.from_numpy(x) for x in (rewards, values, terminated, truncated, real[:T])]


# Advantages


@pytest.mark.parametrize("k", [1, 2, 5, 39, INFINITE])
def test_k_step_advantages_are_the_sums_they_abbreviate(k):
    rewards, values, terminated, truncated, real = random_rollout()
    assert terminated.sum() > 5 and truncated.sum() > 5
    ours = a2c.k_step_advantages(rewards, values, terminated, truncated, 0.9, k)
    T, N = rewards.shape
    for t, n in real.nonzero().tolist():
        total, i = 0.0, t
        while True:
            total += 0.9 ** (i - t) * rewards[i, n].item()
            i += 1
            ended = terminated[i - 1, n] or truncated[i - 1, n]
            if ended or i == T or i - t == k:
                break
        if not terminated[i - 1, n]:
            total += 0.9 ** (i - t) * values[i, n].item()
        assert ours[t, n].item() == pytest.approx(total - values[t, n].item(), abs=1e-6)


def test_reset_steps_do_not_reach_other_advantages():
    rewards, values, terminated, truncated, real = random_rollout()
    ours = a2c.k_step_advantages(rewards, values, terminated, truncated, 0.9, 7)
    rewards[~real] = 1e6
    again = a2c.k_step_advantages(rewards, values, terminated, truncated, 0.9, 7)
    assert torch.equal(ours[real], again[real])


def test_one_environment_alone_is_the_same():
    rollout = random_rollout()[:4]
    ours = a2c.k_step_advantages(*rollout, 0.9, 5)
    for n in range(6):
        alone = a2c.k_step_advantages(*(x[:, n] for x in rollout), 0.9, 5)
        torch.testing.assert_close(alone, ours[:, n])


def test_one_step_is_the_td_error_and_infinity_the_monte_carlo_return():
    rewards, values = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([5.0, 6.0, 7.0, 8.0])
    no, end = torch.zeros(3, dtype=torch.bool), torch.tensor([False, False, True])
    delta = rewards + 0.5 * values[1:] - values[:-1]
    one_step = a2c.k_step_advantages(rewards, values, no, no, 0.5, 1)
    torch.testing.assert_close(one_step, delta)
    loss = a2c.value_loss(values[:-1], one_step + values[:-1])  # V against r + gamma V(s')
    torch.testing.assert_close(loss, (delta**2).mean())
    returns = torch.tensor([1 + 1 + 1, 2 + 2, 4.0])
    ours = a2c.k_step_advantages(rewards, values, end, no, 0.5, INFINITE)
    torch.testing.assert_close(ours, returns - values[:-1])
    returns = returns + 8 * torch.tensor([0.125, 0.25, 0.5])  # a time limit leaves the value
    ours = a2c.k_step_advantages(rewards, values, no, end, 0.5, INFINITE)
    torch.testing.assert_close(ours, returns - values[:-1])


# A finite MDP


def finite_mdp():
    """P(s'|s,a), r(s,a), pi(a|s) of 4 states and 3 actions, and V, Q of pi at gamma = 0.9."""
    rng = np.random.default_rng(0)
    P, r, pi = rng.dirichlet(np.ones(4), (4, 3)), rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
    pi = np.exp(pi) / np.exp(pi).sum(1, keepdims=True)
    step, reward = np.einsum("sa,sat->st", pi, P), (pi * r).sum(1)
    V = np.linalg.solve(np.eye(4) - 0.9 * step, reward)
    return P, r, pi, V, r + 0.9 * P @ V


def test_value_is_the_expected_return():
    """The sum over k of gamma^k E[r_k], the state distribution carried on step by step."""
    P, r, pi, V, _ = finite_mdp()
    step, reward = np.einsum("sa,sat->st", pi, P), (pi * r).sum(1)
    total, distribution = np.zeros(4), np.eye(4)
    for k in range(400):
        total += 0.9**k * distribution @ reward
        distribution = distribution @ step
    np.testing.assert_allclose(total, V)


def test_the_advantage_is_q_minus_v_and_has_mean_zero():
    """One step from each state by each action to each successor, with the true values."""
    P, r, pi, V, Q = finite_mdp()
    expected = np.zeros((4, 3))
    no = torch.zeros(1, dtype=torch.bool)
    for s, a, successor in np.ndindex(4, 3, 4):
        reward, values = torch.tensor([r[s, a]]), torch.tensor([V[s], V[successor]])
        advantage = a2c.k_step_advantages(reward, values, no, no, 0.9, 1)
        expected[s, a] += P[s, a, successor] * advantage.item()
    np.testing.assert_allclose(expected, Q - V[:, None], atol=1e-6)
    np.testing.assert_allclose((pi * expected).sum(1), 0, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3, INFINITE])
def test_expected_advantages_do_not_depend_on_k_with_the_true_values(k):
    """Trajectories of 12 steps of the MDP, cut there: bootstrapped by V, all k agree on average."""
    P, r, pi, V, Q = finite_mdp()
    rng, N, T = np.random.default_rng(1), 20_000, 12
    states, actions = np.zeros((T + 1, N), int), np.zeros((T, N), int)
    draw = lambda p: (p.cumsum(-1) > rng.random((N, 1))).argmax(-1)  # noqa: E731
    for t in range(T):
        actions[t] = draw(pi[states[t]])
        states[t + 1] = draw(P[states[t], actions[t]])
    rewards, values = torch.from_numpy(r[states[:-1], actions]), torch.from_numpy(V[states])
    no = torch.zeros(T, N, dtype=torch.bool)
    ours = a2c.k_step_advantages(rewards, values, no, no, 0.9, k)[0].numpy()
    for a in range(3):
        assert ours[actions[0] == a].mean() == pytest.approx(Q[0, a] - V[0], abs=0.08)


def test_policy_gradient_loss():
    """Its gradient is minus the mean of grad log pi times A, which is no variable of it."""
    logits, advantages = torch.randn(5, 3, requires_grad=True), torch.randn(5)
    action = torch.tensor([0, 1, 2, 1, 0])
    loss = a2c.policy_gradient_loss(a2c.softmax_log_prob(logits, action), advantages)
    score = torch.eye(3)[action] - logits.detach().softmax(-1)
    ours = torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(ours, -score * advantages.unsqueeze(1) / 5)


# Gradients


def test_each_loss_moves_its_own_network():
    args = a2c.Args(env_id="Matched-v0", hidden=8)
    env = a2c.make_env(args)
    policy, critic = a2c.make_policy(env, args), torch.nn.Sequential(*a2c.mlp(env, args, 1, 1.0))
    obs, action, target = torch.randn(9, 2), torch.randint(2, (9,)), torch.randn(9)

    def receivers(loss):
        policy.zero_grad(), critic.zero_grad()
        loss.backward()
        return [{p.grad is not None for p in m.parameters()} for m in (policy, critic)]

    logp = policy.log_prob(policy(obs), action)
    assert receivers(a2c.policy_gradient_loss(logp, target)) == [{True}, {False}]
    assert receivers(policy.entropy(policy(obs)).mean()) == [{True}, {False}]
    assert receivers(a2c.value_loss(critic(obs).squeeze(-1), target)) == [{False}, {True}]


@pytest.mark.parametrize("coefficient", ["value_coef", "learning_rate"])
def test_the_loop_keeps_the_two_gradients_apart(tmp_path, coefficient):
    """Without value loss the critic stays as it was: the advantages of the actor are constants."""
    before, after = (
        trained(tmp_path / str(steps), "Both-v0", steps, **{coefficient: 0.0})[2]
        for steps in (1, 500)
    )
    same = {
        name: all(torch.equal(x, after[name][key]) for key, x in before[name].items())
        for name in ("policy", "critic")
    }
    assert same == {"policy": coefficient == "learning_rate", "critic": True}


@pytest.mark.parametrize("norm", [1.0, 1e-9], ids=["whole", "clipped"])
def test_the_gradient_is_clipped_and_the_rate_decays(tmp_path, monkeypatch, norm):
    """To the norm allowed; linearly to 0, by the steps taken when the last log was written."""
    norms, rates = [], []

    def spy(self):
        [group] = self.param_groups
        norms.append(torch.stack([p.grad.norm() for p in group["params"]]).norm().item())
        rates.append(group["lr"])

    monkeypatch.setattr(torch.optim.RMSprop, "step", spy)
    monkeypatch.setattr(a2c, "LOG_EVERY", 1)
    trained(tmp_path, "Truncates-v0", 1_000, max_grad_norm=norm, learning_rate=1.0)
    assert max(norms) == pytest.approx(norm, rel=1e-3)
    steps = [e.step for e in EventAccumulator(str(tmp_path)).Reload().Scalars("losses/entropy")]
    assert rates == pytest.approx([1 - x / 1_000 for x in [0, *steps[:-1]]])


def test_the_optimiser_is_rmsprop_with_a_large_epsilon(tmp_path):
    """After 100 updates of calm a failure moves no weight by more than η: with a small ε, 10 η."""
    _, _, checkpoint = trained(tmp_path, "Matched-v0", 500)
    state = checkpoint["optimizer"]
    assert all(x["square_avg"].max() > 0 for x in state["state"].values())
    theta = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.RMSprop([theta])
    optimizer.param_groups[0].update(state["param_groups"][0], params=[theta])
    for gradient, rate in [(0.05, 0.0)] * 100 + [(1e-6, 0.0)] * 2_000 + [(0.05, 1.0)]:
        theta.grad, optimizer.param_groups[0]["lr"] = torch.full((3,), gradient), rate
        optimizer.step()
    assert -1 < theta[0] < -0.4


def test_no_clip_of_the_gradient(tmp_path):
    """--max-grad-norm 0 is no clip: as a very large one, bit for bit."""
    weights = []
    for norm in (0.0, 1e9):
        checkpoint = trained(tmp_path / str(norm), "Matched-v0", 1_000, max_grad_norm=norm)[2]
        weights.append(checkpoint["policy"]["0.weight"])
    assert torch.equal(*weights) and weights[0].abs().max() > 0


# Learning

COMMON = dict(num_envs=16, num_steps=8, hidden=32, gamma=0.9, eval_episodes=20, learning_rate=3e-2)
any_k = pytest.mark.parametrize("k_step", [1, 5, 0])


def trained(tmp_path, env_id, steps, **options):
    """Evaluation returns, V_φ as a function of observations, and the checkpoint."""
    options = {"k_step": 5, **COMMON, **options}
    args = a2c.Args(env_id=env_id, total_timesteps=steps, run_dir=str(tmp_path), **options)
    returns = a2c.train(args)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    critic = torch.nn.Sequential(*a2c.mlp(a2c.make_env(args), args, 1, 1.0))
    critic.load_state_dict(checkpoint["critic"])
    value = lambda *obs: critic(torch.tensor(obs).float()).squeeze(-1).tolist()  # noqa: E731
    return returns, value, checkpoint


@any_k
def test_reward_depends_on_action_and_observation(tmp_path, k_step):
    returns, value, _ = trained(tmp_path, "Matched-v0", 16_000, k_step=k_step)
    assert returns.mean() == 1
    assert value([1, 0], [-1, 0]) == pytest.approx([1, 1], abs=0.2)


def test_reward_depends_on_the_observation(tmp_path):
    _, value, _ = trained(tmp_path, "Observed-v0", 16_000)
    assert value([1, 0], [-1, 0]) == pytest.approx([1, -1], abs=0.05)


def test_continuous_action(tmp_path):
    returns, _, _ = trained(tmp_path, "MatchedBox-v0", 40_000)
    assert returns.mean() > -0.2  # a constant action gets -4 at best


@pytest.mark.parametrize("k_step", [2, 0])
def test_credit_over_two_steps(tmp_path, k_step):
    """The second observation does not tell the first action, whose reward comes then: k = 1 fails."""
    returns, value, _ = trained(tmp_path, "TwoStep-v0", 16_000, k_step=k_step)
    assert returns.mean() == 1
    assert value([0, 1], [0, -1]) == pytest.approx([0.9, 0.9], abs=0.15)


@any_k
def test_time_limit_does_not_end_the_value(tmp_path, k_step):
    _, value, _ = trained(tmp_path, "Truncates-v0", 30_000, k_step=k_step)
    assert value([0, 0]) == pytest.approx([10], abs=0.3)


@any_k
def test_a_time_limit_bootstraps_from_the_final_observation(tmp_path, k_step):
    """Not from the first one of the next episode, which stands for another state."""
    _, value, _ = trained(tmp_path, "Stays-v0", 20_000, k_step=k_step)
    assert value([1, 0], [-1, 0]) == pytest.approx([10, -10], abs=0.6)


@any_k
def test_termination_ends_the_value(tmp_path, k_step):
    _, value, _ = trained(tmp_path, "Terminates-v0", 20_000, k_step=k_step)
    exact = [(1 - 0.9 ** (5 - t)) / 0.1 for t in range(5)]
    assert value(*([t - 2.5, 0] for t in range(5))) == pytest.approx(exact, abs=0.2)


@any_k
def test_both_ends(tmp_path, k_step):
    _, value, _ = trained(tmp_path, "Both-v0", 30_000, k_step=k_step)
    assert value([0, 0]) == pytest.approx([1 / (1 - 0.8 * 0.9)], abs=0.25)


def scalars(tmp_path):
    """What the run logged: name -> values."""
    log = EventAccumulator(str(tmp_path)).Reload()
    return {tag: [event.value for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def test_the_entropy_bonus_keeps_the_policy_wide(tmp_path):
    trained(tmp_path, "Matched-v0", 8_000, entropy_coef=10.0)
    assert scalars(tmp_path)["losses/entropy"][-1] > 0.65  # log 2 is 0.69; without it, towards 0


def test_rollouts_of_infinite_k_are_whole_episodes(tmp_path, monkeypatch):
    """Each environment reaches an end, all from reset, nothing after the first end is learned."""
    seen, losses = [], []
    k_step_advantages, policy_gradient_loss = a2c.k_step_advantages, a2c.policy_gradient_loss

    def spy(*a):
        seen.append(((a[2] | a[3]).numpy().copy(), a[5]))  # the memory is used again
        return k_step_advantages(*a)

    monkeypatch.setattr(a2c, "k_step_advantages", spy)
    spy_loss = lambda *a: losses.append(len(a[0])) or policy_gradient_loss(*a)  # noqa: E731
    monkeypatch.setattr(a2c, "policy_gradient_loss", spy_loss)
    monkeypatch.setattr(a2c, "LOG_EVERY", 1)
    _, _, checkpoint = trained(tmp_path, "Both-v0", 4_000, k_step=0)
    assert len(seen) > 20
    for (ended, k), used in zip(seen, losses, strict=True):
        first = ended.argmax(0) + 1
        assert ended.any(0).all() and k >= len(ended) == first.max()
        assert used == first.sum()
    # Every step is counted, but for those after an end, which only reset.
    simulated = [ended.size - ended[:-1].sum() for ended, _ in seen]
    assert checkpoint["env_steps"] == sum(simulated) > sum(losses)
    lengths = scalars(tmp_path)["charts/episodic_length"]
    assert lengths[-1] == pytest.approx(sum(losses[-7:]) / 112, abs=0.5)  # of the last 100


class Endless(envs.Tiny):
    def outcome(self, action):
        return 1, False, False


def test_an_episode_that_infinite_k_cuts_is_logged(tmp_path, monkeypatch):
    envs.gym.registry.pop("Endless-v0", None)
    envs.gym.register("Endless-v0", Endless, max_episode_steps=20_000)
    monkeypatch.setattr(a2c.Run, "evaluate", lambda run: np.zeros(1))
    trained(tmp_path, "Endless-v0", 1, k_step=0, num_envs=2)
    found = scalars(tmp_path)
    assert found["charts/episodic_return"] == found["charts/episodic_length"] == [10_000]


@pytest.mark.parametrize("k_step", [3, 0])
@pytest.mark.parametrize("env_id", ["Constant-v0", "TwoStep-v0", "Truncates-v0", "Both-v0"])
def test_every_simulated_step_is_counted(tmp_path, monkeypatch, env_id, k_step):
    """As the environments count them. Odd rollouts, so that reset steps fall on borders too."""
    before, evaluate, counts = envs.Tiny.steps, a2c.Run.evaluate, []

    def spy(run):
        counts.append((run.step, envs.Tiny.steps - before))
        return evaluate(run)

    monkeypatch.setattr(a2c.Run, "evaluate", spy)
    trained(tmp_path, env_id, 400, num_steps=7, num_envs=3, k_step=k_step)
    [(counted, simulated)] = counts
    assert counted == simulated >= 400
    lengths = scalars(tmp_path)["charts/episodic_length"]
    if env_id != "Both-v0":
        length = {"Constant-v0": 1, "TwoStep-v0": 2, "Truncates-v0": 5}[env_id]
        assert lengths == pytest.approx([length] * len(lengths))
    returns = scalars(tmp_path)["charts/episodic_return"]
    if env_id != "TwoStep-v0":  # reward 1 a step
        assert returns == pytest.approx(lengths)


@pytest.mark.parametrize("options", [["--num-steps", "1"], ["--k-step", "-1"]], ids=" ".join)
def test_bad_options(options):
    status, out, err = command("a2c", *options)
    assert status == 2 and not out and len(err.splitlines()) == 1 and options[0] in err
