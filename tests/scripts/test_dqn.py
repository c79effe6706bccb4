"""dqn.py: its equations, replay, a finite MDP with known values, and the loop."""

import dqn
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import command

# Equations


def test_the_target_takes_the_best_action():
    q = torch.tensor([[9.0, 4.0, 7.0], [6.0, 8.0, 3.0]])
    y = dqn.dqn_target(torch.tensor([1.0, -1.0]), torch.tensor([0.9, 0.0]), q)
    assert y.tolist() == pytest.approx([1 + 0.9 * 9, -1])


@pytest.mark.parametrize("delta", [0.5, 1.0, 2.0])
def test_huber_is_the_piecewise_form(delta):
    x = torch.linspace(-4, 4, 81, dtype=torch.float64).requires_grad_()
    exact = [v * v / 2 if abs(v) <= delta else delta * abs(v) - delta**2 / 2 for v in x.tolist()]
    loss = dqn.huber_loss(x, delta)
    assert loss.item() == pytest.approx(np.mean(exact))
    slope = torch.autograd.grad(loss, x)[0] * len(x)
    torch.testing.assert_close(slope, x.detach().clamp(-delta, delta))
    assert dqn.squared_loss(x).item() == pytest.approx(np.mean(x.detach().numpy() ** 2))


def test_n_step_return_and_discount():
    assert dqn.n_step_discount(0.5, 3, False) == 0.125 and dqn.n_step_discount(0.5, 3, True) == 0
    assert dqn.n_step_return([1.0, 2.0, 4.0], 0.5) == 1 + 1 + 1
    assert dqn.n_step_return([3.0], 0.5) == 3


def test_epsilon_stays_at_1_then_falls_linearly_to_its_end():
    at = [dqn.epsilon_at(step, 100, 50, 0.2) for step in (0, 99, 100, 125, 150, 10_000)]
    assert at == pytest.approx([1, 1, 1, 0.6, 0.2, 0.2])


def test_epsilon_greedy_mixes_the_best_with_uniform_actions():
    rng, q = np.random.default_rng(0), np.array([0.0, 2.0, 1.0])
    for epsilon in (0.0, 0.3, 1.0):
        counts = np.bincount(
            [dqn.epsilon_greedy(q, epsilon, rng) for _ in range(9_000)], minlength=3
        )
        exact = epsilon / 3 + np.array([0, 1 - epsilon, 0])
        np.testing.assert_allclose(counts / 9_000, exact, atol=0.02)


def test_updates_due_are_the_ratio():
    assert [dqn.updates_due(s, 100, 0.3) for s in (0, 100, 103, 104, 110)] == [0, 0, 0, 1, 3]


def test_soft_update():
    target, theta = [torch.zeros(2), torch.ones(3)], [torch.ones(2), torch.ones(3) * 3]
    dqn.soft_update(target, theta, 0.25)
    assert target[0].tolist() == [0.25] * 2 and target[1].tolist() == [1.5] * 3


# A finite MDP


def finite_mdp():
    """Deterministic successors, rewards, and Q* by the document's two updates of value iteration."""
    rng = np.random.default_rng(0)
    successor, reward = rng.integers(6, size=(6, 3)), rng.normal(size=(6, 3))
    value = np.zeros(6)
    for _ in range(500):
        q = reward + 0.9 * value[successor]
        value = q.max(1)
    return torch.from_numpy(successor), torch.from_numpy(reward).float(), torch.from_numpy(q)


def test_value_iteration_finds_the_best_policy():
    """Q = r + gamma V(s'), V = max_a Q, against the value of every deterministic policy."""
    successor, reward, q_star = finite_mdp()
    reward, states, best = reward.double(), torch.arange(6), torch.full((6,), -torch.inf)
    for number in range(3**6):
        policy = torch.tensor([number // 3**s % 3 for s in range(6)])
        transition = torch.eye(6, dtype=torch.float64)[successor[states, policy]]
        system = torch.eye(6, dtype=torch.float64) - 0.9 * transition
        best = torch.maximum(best, torch.linalg.solve(system, reward[states, policy]))
    torch.testing.assert_close(q_star.max(-1).values, best)
    torch.testing.assert_close(q_star, reward + 0.9 * best[successor])


def test_advantages_and_values_have_one_greedy_policy():
    _, _, q = finite_mdp()
    value = q.max(-1, keepdim=True).values
    assert torch.equal((q - value).argmax(-1), q.argmax(-1)) and (q - value).max() == 0


@pytest.mark.parametrize("loss", ["huber", "squared"])
def test_the_update_on_one_hot_states_finds_the_optimal_values(loss):
    """Every transition of the MDP in each batch, a table as the network, a copy every 20 steps."""
    successor, reward, q_star = finite_mdp()
    table = torch.zeros(6, 3, requires_grad=True)
    frozen, states = table.detach().clone(), torch.eye(6)
    factor = torch.full((18,), 0.9)
    optimizer = torch.optim.Adam([table])
    for update in range(4_000):
        y = dqn.dqn_target(reward.view(-1), factor, states[successor.view(-1)] @ frozen)
        x = (states @ table).view(-1) - y
        value = dqn.huber_loss(x, 1.0) if loss == "huber" else dqn.squared_loss(x)
        optimizer.param_groups[0]["lr"] = 0.05 if update < 3_000 else 5e-3
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if update % 20 == 0:
            frozen.copy_(table.detach())
    torch.testing.assert_close(table.detach(), q_star.float(), atol=1e-2, rtol=0)


# Replay


SPACE = gym.spaces.Box(-1, 1, (1,))


def filled(size, steps):
    """A buffer of this size after so many transitions: obs i, action i, reward 10 i, next i + 1."""
    buffer = dqn.ReplayBuffer(size, SPACE, np.int64(0))
    for i in range(steps):
        buffer.add(np.full(1, i), i, 10 * i, np.full(1, i + 1), 0.5)
    return buffer


def test_buffer_overwrites_the_oldest_and_draws_the_rest():
    batch = filled(4, 6).sample(1000, np.random.default_rng(0), "cpu")
    obs, action, reward, next_obs, discount = batch
    assert obs.shape == (1000, 1) and sorted(set(action.tolist())) == [2, 3, 4, 5]
    assert torch.equal(obs[:, 0], action.float()) and torch.equal(next_obs, obs + 1)
    assert torch.equal(reward, 10.0 * action) and (discount == 0.5).all()
    counts = np.bincount(action.numpy())[2:]
    assert counts.min() > 200 and counts.max() < 300, "uniform"


@pytest.mark.parametrize(("steps", "size"), [(3, 10), (3, 5), (12, 10), (12, 20)])
def test_a_buffer_survives_a_checkpoint_also_into_a_larger_one(steps, size):
    buffer, restored = filled(10, steps), dqn.ReplayBuffer(size, SPACE, np.int64(0))
    state = buffer.state_dict()
    assert len(state["data"][0]) == min(steps, 10), "not the whole buffer"
    restored.load_state_dict(state)
    restored.add(np.full(1, steps), steps, 10 * steps, np.full(1, steps + 1), 0.5)
    drawn = restored.sample(1000, np.random.default_rng(0), "cpu")[1]
    kept = set(range(max(steps - 10, 0), steps + 1))
    assert set(drawn.tolist()) == (kept - {steps - 10} if size == 10 else kept)


def test_a_buffer_does_not_fit_into_a_smaller_one():
    with pytest.raises((ValueError, RuntimeError)):
        dqn.ReplayBuffer(2, SPACE, np.int64(0)).load_state_dict(filled(10, 3).state_dict())


def test_saving_a_buffer_copies_nothing():
    buffer = filled(1_000, 2_000)
    for rows, saved in zip(buffer.data, buffer.state_dict()["data"], strict=True):
        assert np.shares_memory(rows, saved.numpy())


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float16, np.float32, np.float64])
def test_observations_are_kept_as_bytes_or_as_float32(dtype):
    space = gym.spaces.Box(0, 100, (7,), dtype)
    obs = dqn.ReplayBuffer(3, space, np.int64(0)).data[0]
    assert obs.dtype == (np.uint8 if dtype is np.uint8 else np.float32)


def test_a_buffer_that_cannot_fit_is_refused():
    status, _, err = command("dqn", "--buffer-size", 10**13)
    assert status == 2 and "--buffer-size" in err and "GiB" in err.splitlines()[-1]


# Loop. Values at time limits: tests/house/test_time_limits.py.

COMMON = dict(hidden=32, batch_size=64, gamma=0.9, learning_rate=3e-3, burn_in=200)
COMMON |= dict(epsilon_steps=1_000, eval_episodes=20, tau=0.02, target_every=1)


def trained(tmp_path, env_id, steps, **options):
    """Evaluation returns, the checkpoint, and max_a Q as a function of observations."""
    options = {**COMMON, **options}
    args = dqn.Args(env_id=env_id, total_timesteps=steps, run_dir=str(tmp_path), **options)
    returns = dqn.train(args)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    q_net = dqn.make_policy(dqn.make_env(args), args)
    q_net.load_state_dict(checkpoint["policy"])
    value = lambda *obs: q_net(torch.tensor(obs).float()).max(-1).values.tolist()  # noqa: E731
    return returns, checkpoint, value


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("env_id", ["Terminates-v0", "Truncates-v0"])
def test_stored_transitions_at_both_kinds_of_end(tmp_path, env_id, n_step):
    """Five steps of reward 1: what N of them leave of reward and of the factor of the value."""
    _, checkpoint, _ = trained(tmp_path, env_id, 150, n_step=n_step)
    obs, _, reward, next_obs, discount = checkpoint["buffer"]["data"]
    assert len(reward) == 150
    for i in range(150):
        k = min(n_step, 5 - i % 5)
        ends = i % 5 + k == 5
        assert reward[i].item() == pytest.approx(sum(0.9**j for j in range(k)))
        terminated = ends and env_id == "Terminates-v0"
        assert discount[i].item() == pytest.approx(0 if terminated else 0.9**k)
        if env_id == "Terminates-v0":  # the time is observed
            assert obs[i, 0] == i % 5 - 2.5 and next_obs[i, 0] == i % 5 + k - 2.5


@pytest.mark.parametrize("utd", [0.25, 0.3, 1.0, 3.0])
def test_updates_are_exactly_the_ratio(tmp_path, monkeypatch, utd):
    updates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *a: updates.append(1) or step(*a))
    trained(tmp_path, "Both-v0", 311, utd=utd, burn_in=100)
    assert len(updates) == int(utd * 211)


def test_updates_wait_for_the_first_transition_of_n_steps(tmp_path, monkeypatch):
    """Burn-in shorter than N: no update of an empty buffer, and none is lost."""
    updates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *a: updates.append(1) or step(*a))
    trained(tmp_path, "Constant-v0", 3, burn_in=1, n_step=20, utd=1.0)
    trained(tmp_path / "2", "CartPole-v1", 40, burn_in=1, n_step=20, utd=1.0)
    assert len(updates) == 2 + 39


@pytest.mark.parametrize("options", [{"target_every": 7, "tau": 1.0}, {"tau": 0.1}], ids=str)
def test_target_network(tmp_path, monkeypatch, options):
    """Hard: the weights of the last multiple of K updates. Soft: the exponential average."""
    history, step = [], torch.optim.Adam.step

    def weights(optimizer):
        return torch.cat([x.detach().flatten() for x in optimizer.param_groups[0]["params"]])

    def spy(self, *a):
        if not history:
            history.append(weights(self))
        step(self, *a)
        history.append(weights(self))

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    _, checkpoint, _ = trained(tmp_path, "Both-v0", 300, utd=1.0, **options)
    if "target_every" in options:
        exact = history[7 * (100 // 7)]
    else:
        exact = history[0]
        for theta in history[1:]:
            exact = 0.9 * exact + 0.1 * theta
    saved = checkpoint["target_net"].items()
    ours = torch.cat([x.flatten() for name, x in saved if name.endswith(("weight", "bias"))])
    torch.testing.assert_close(ours, exact)


def test_the_gradient_is_clipped(tmp_path, monkeypatch):
    for limit, clipped in ((1e-3, True), (0.0, False)):
        norms, step = [], torch.optim.Adam.step

        def spy(self, *a, norms=norms, step=step):
            gradient = torch.cat([x.grad.flatten() for x in self.param_groups[0]["params"]])
            norms.append(gradient.norm().item())
            return step(self, *a)

        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.Adam, "step", spy)
            trained(tmp_path / str(limit), "Terminates-v0", 300, max_grad_norm=limit)
        assert norms and (max(norms) <= 1.001e-3) == clipped


def test_epsilon_follows_its_schedule_also_over_a_resume(tmp_path, monkeypatch):
    seen, choose = [], dqn.epsilon_greedy
    monkeypatch.setattr(
        dqn, "epsilon_greedy", lambda q, e, rng: seen.append(e) or choose(q, e, rng)
    )
    options = dict(burn_in=200, epsilon_steps=400, epsilon=0.1, utd=0.01)
    trained(tmp_path / "a", "Both-v0", 400, **options)
    resume = str(tmp_path / "a/checkpoint.pt")
    trained(tmp_path / "b", "Both-v0", 800, resume=resume, **options)
    exact = [1 - 0.9 * min(max(step - 200, 0) / 400, 1) for step in range(800)]
    assert seen == pytest.approx(exact)


def test_the_target_is_held_fixed(tmp_path, monkeypatch):
    """No gradient goes through it, to neither network."""
    seen, target = [], dqn.dqn_target

    def spy(reward, discount, q_next):
        y = target(reward, discount, q_next)
        seen.append(q_next.requires_grad or y.requires_grad)
        return y

    monkeypatch.setattr(dqn, "dqn_target", spy)
    trained(tmp_path, "Both-v0", 250, utd=1.0)
    assert len(seen) == 50 and not any(seen)


def test_numpy_computes_what_torch_does():
    args = dqn.Args(env_id="Both-v0", hidden=16)
    q_net, obs = dqn.make_policy(dqn.make_env(args), args), torch.randn(5, 2)
    q = q_net(obs).detach()
    np.testing.assert_allclose(dqn.in_numpy(q_net)(obs.numpy()), q, atol=1e-6)
    assert q_net.act(obs.numpy()).tolist() == q.argmax(-1).tolist()


def test_reward_depends_on_action_and_observation(tmp_path):
    returns, _, _ = trained(tmp_path, "Matched-v0", 2_000)
    assert returns.mean() == 1


@pytest.mark.parametrize("n_step", [1, 3])
def test_termination_ends_the_value(tmp_path, n_step):
    _, _, value = trained(tmp_path, "Terminates-v0", 4_000, n_step=n_step)
    exact = [(1 - 0.9 ** (5 - t)) / 0.1 for t in range(5)]
    assert value(*([t - 2.5, 0] for t in range(5))) == pytest.approx(exact, abs=0.15)


def test_both_ends(tmp_path):
    _, _, value = trained(tmp_path, "Both-v0", 6_000, loss="squared")
    assert value([0, 0]) == pytest.approx([1 / (1 - 0.8 * 0.9)], abs=0.2)


def test_two_step_credit(tmp_path):
    """The second observation does not tell the first action: only N = 2 can give it credit."""
    returns, _, value = trained(tmp_path, "TwoStep-v0", 3_000, n_step=2)
    assert returns.mean() == 1
    assert value([0, 1], [0, -1]) == pytest.approx([0.9, 0.9], abs=0.1)
