"""ddpg.py, and what td3.py shares with it: updates against plain torch, and the loop."""

import copy
import math

import ddpg
import gymnasium as gym
import numpy as np
import pytest
import td3
import torch
import torch._dynamo
from conftest import command
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

SCRIPTS = {"ddpg": ddpg, "td3": td3}
every = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
BOX = gym.spaces.Box(-2, 2, (2,))


def a_batch(size, obs_dim=3, action_dim=2):
    obs, next_obs = torch.randn(2, size, obs_dim)
    action, reward = torch.rand(size, action_dim) * 2 - 1, torch.randn(size)
    return [obs, action, reward, next_obs, 0.9 * (torch.rand(size) < 0.8)]


def updates(script, args, state, batches):
    """The update of a script on batches; noise as from seed 5."""
    torch.manual_seed(5)
    for number, batch in enumerate(batches):
        scalars = script.update(args, *state, batch, *([number] if script is td3 else []))
    return scalars


# The update, against nn.Sequential, torch.optim.Adam and the algorithm boxes of the papers


def plain(network):
    """An actor as nn.Sequential."""
    first, second, last = copy.deepcopy(network).layers
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)


def plain_critics(critic):
    """Each critic as nn.Sequential of its own."""
    nets = []
    for i in range(len(critic.w_1)):
        layers = []
        for w, b in (critic.w_1, critic.b_1), (critic.w_2, critic.b_2), (critic.w_3.mT, critic.b_3):
            layers += [nn.Linear(w.shape[1], w.shape[2]), nn.ReLU()]
            layers[-2].weight.data, layers[-2].bias.data = w[i].T.clone(), b[i].flatten().clone()
        nets.append(nn.Sequential(*layers[:-1]))
    return nets


def reference(script, args, state, batches):
    """What updates should leave: the actor, the critics and their targets."""
    networks = state[0]
    actor, critics = plain(networks["actor"]), plain_critics(networks["critic"])
    target_actor, target_critics = copy.deepcopy(actor), copy.deepcopy(critics)
    options = {"lr": args.learning_rate, "eps": 1e-5}
    adam = torch.optim.Adam(actor.parameters(), **options)
    critic_adam = torch.optim.Adam([p for q in critics for p in q.parameters()], **options)
    torch.manual_seed(5)

    def q_of(nets, obs, action):
        return [q(torch.cat([obs, action], -1)).squeeze(-1) for q in nets]

    for number, (obs, action, reward, next_obs, bootstrap) in enumerate(batches):
        with torch.no_grad():
            next_action = target_actor(next_obs).tanh()
            if script is td3:
                noise = 0.2 * torch.randn_like(next_action)
                next_action = (next_action + noise.clamp(-0.5, 0.5)).clamp(-1, 1)
            lowest = torch.stack(q_of(target_critics, next_obs, next_action)).min(0).values
            y = reward + bootstrap * lowest
        loss = sum(nn.functional.mse_loss(q, y) for q in q_of(critics, obs, action))
        critic_adam.zero_grad()
        loss.backward()
        critic_adam.step()
        if script is td3 and number % 2 == 0:
            continue
        adam.zero_grad()
        (-q_of(critics, obs, actor(obs).tanh())[0]).mean().backward()
        adam.step()
        pairs = [(target_actor, actor), *zip(target_critics, critics)]
        for p_target, p in (
            (a, b) for x, y in pairs for a, b in zip(x.parameters(), y.parameters())
        ):
            p_target.data = (1 - args.tau) * p_target.data + args.tau * p.data
    return actor, critics, target_actor, target_critics


@every
def test_updates_are_those_of_plain_torch(script):
    torch.manual_seed(0)
    args = script.Args(hidden=16, batch_size=32, tau=0.1, learning_rate=3e-3)
    state = script.initialise(args, 3, BOX)
    batches = [a_batch(32) for _ in range(6)]
    expected = reference(script, args, state, batches)
    updates(script, args, state, batches)
    networks, obs, action = state[0], torch.randn(50, 3), torch.rand(50, 2)
    close = lambda x, y: torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)  # noqa: E731
    actor, critics, target_actor, target_critics = expected
    close(networks["actor"](obs), actor(obs))
    x = torch.cat([obs, action], -1)
    for name, nets in ("critic", critics), ("target_critic", target_critics):
        q = torch.stack([net(x).squeeze(-1) for net in nets])
        assert q.shape == (1 if script is ddpg else 2, 50)
        close(networks[name](obs, action), q)
    close(networks["target_actor"](obs), target_actor(obs))


class Products(TorchDispatchMode):
    """Counts the multiplications of all matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            first, second = args[-2:]
            self.count += first.numel() * second.shape[-1]
        return func(*args, **(kwargs or {}))


@every
def test_no_product_is_computed_in_vain(script):
    """Above all none for the critic's weights in the actor's step, or for td3's second critic there.

    The critics' last layer, of one output, is no matrix product.
    """
    B, H, o, a = 32, 16, 3, 2
    args = script.Args(hidden=H, batch_size=B)
    state = script.initialise(args, o, BOX)
    with Products() as products:
        updates(script, args, state, [a_batch(B)] * 2)
    out, n = a, 1 if script is ddpg else 2
    actor, critic = o * H + H * H + H * out, (o + a) * H + H * H
    target = actor + n * critic
    critic_step = n * (critic + critic + H * H)  # forward, weights, the layer below
    actor_step = actor + 2 * critic  # forward, and back to the action
    actor_step += actor + H * H + H * out  # weights, and the layers below
    exact = 2 * (target + critic_step) + (1 if script is td3 else 2) * actor_step
    assert products.count == B * exact


@every
def test_the_update_is_one_graph(script, monkeypatch):
    """torch.compile takes it whole, and its steps are the same."""
    args = script.Args(hidden=8, batch_size=4)
    torch.manual_seed(0)
    state = script.initialise(args, 3, BOX)
    other, batches = copy.deepcopy(state[0]), [a_batch(4) for _ in range(2)]
    vectors = [script.as_vector(net) for net in other.values()]
    adams = nn.ModuleList([script.Adam(x) for x in vectors[: len(state[2])]])
    updates(script, args, state, batches)
    update = script.update
    monkeypatch.setattr(script, "update", torch.compile(update, backend="eager", fullgraph=True))
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        updates(script, args, (other, vectors, adams), batches)
    torch.testing.assert_close(state[1], vectors)


# Equations


def test_exploration_and_targets():
    action, noise = torch.tensor([0.5, -0.9, 0.0]), torch.tensor([1.0, -2.0, 3.0])
    assert ddpg.explore(action, noise, 0.1).tolist() == pytest.approx([0.6, -1, 0.3])
    reward, bootstrap = torch.tensor([1.0, 2.0]), torch.tensor([0.9, 0.0])
    y = ddpg.ddpg_target(reward, bootstrap, torch.tensor([[10.0, 20.0]]))
    assert y.tolist() == pytest.approx([10, 2])
    q = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    assert ddpg.critic_loss(q, torch.tensor([1.0, 4.0])).item() == (0 + 4) / 2 + (4 + 1) / 2
    assert ddpg.actor_loss(q[:1]).item() == td3.actor_loss(q[:1]).item() == -(1 + 2) / 2


def test_the_gradient_goes_through_the_action():
    """∇_θ Q(s, a_θ(s)) = ∇_a Q · ∇_θ a_θ(s), with the Jacobian written out."""
    torch.manual_seed(0)
    actor, critic = ddpg.Actor(3, BOX, 8, 2), ddpg.QNetworks(3, 2, 8, 1)
    obs = torch.randn(1, 3)
    action = actor(obs).tanh()
    ours = ddpg.gradient_of(-ddpg.actor_loss(critic(obs, action)), actor)
    leaf = action.detach().requires_grad_()
    slope = torch.autograd.grad(critic(obs, leaf).sum(), leaf)[0].flatten()
    jacobian = [ddpg.gradient_of(actor(obs).tanh()[0, j], actor) for j in range(2)]
    torch.testing.assert_close(ours, slope @ torch.stack(jacobian))


def test_q_and_advantage_have_one_maximiser():
    """E[Q - V] over a policy's actions: V, which depends on the state alone, moves no gradient."""
    torch.manual_seed(0)
    q, logits = torch.randn(4, 3).double(), torch.randn(4, 3).double().requires_grad_()
    policy = logits.softmax(-1)
    value = (policy.detach() * q).sum(-1, keepdim=True)
    advantage = q - value
    of_q = torch.autograd.grad((policy * q).sum(-1).mean(), logits, retain_graph=True)[0]
    of_advantage = torch.autograd.grad((policy * advantage).sum(-1).mean(), logits)[0]
    torch.testing.assert_close(of_q, of_advantage)
    assert torch.equal(q.argmax(-1), advantage.argmax(-1))


@every
def test_networks_begin_as_torch_begins_them(script):
    torch.manual_seed(0)
    critic = script.QNetworks(60, 40, 50, 2)
    for weights, bound in (critic.w_1, 0.1), (critic.w_2, 50**-0.5), (critic.w_3, 50**-0.5):
        assert 0.9 * bound < weights.abs().max() <= bound
        assert weights.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not torch.equal(critic.w_1[0], critic.w_1[1]), "critics differ"


@pytest.mark.parametrize("script", [ddpg, td3])
def test_the_actors_last_layer_begins_as_in_the_paper_of_ddpg(script):
    networks = script.initialise(script.Args(), 3, BOX)[0]
    for name in "actor", "target_actor":
        weights = networks[name].layers[-1].weight
        assert 2.9e-3 < weights.abs().max() <= 3e-3
        assert weights.std().item() == pytest.approx(3e-3 / math.sqrt(3), rel=0.1)


@every
def test_numpy_computes_what_torch_does(script):
    actor, obs = script.Actor(3, BOX, 16, 4), torch.randn(5, 3)
    np.testing.assert_allclose(actor.in_numpy()(obs.numpy()), actor(obs).detach(), atol=1e-6)


@every
def test_actions_are_scaled_to_the_bounds_of_each_dimension(script):
    low, high = np.array([[-1.0, 0.0]]), np.array([[3.0, 0.1]])
    actor = script.Actor(3, gym.spaces.Box(low, high, dtype=np.float64), 4, 2)
    action = actor.to_env(np.array([[-1.0, 1.0], [0.0, 0.0], [1.0, -0.5]]))
    assert action.shape == (3, 1, 2)
    np.testing.assert_allclose(action[:, 0], [[-1, 0.1], [1, 0.05], [3, 0.025]], atol=1e-12)


# Loop

COMMON = dict(hidden=32, batch_size=64, gamma=0.9, learning_rate=3e-3, burn_in=200, tau=0.05)


def trained(script, tmp_path, env_id, steps, **options):
    """Evaluation returns, the checkpoint, and the mean of Q(s, π(s)) over critics."""
    options = {**COMMON, "eval_episodes": 20, **options}
    args = script.Args(env_id=env_id, total_timesteps=steps, run_dir=str(tmp_path), **options)
    returns = script.train(args)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    networks = script.initialise(args, 2, gym.spaces.Box(-1, 1, (1,)))[0]
    for name, net in networks.items():
        net.load_state_dict(checkpoint[name])

    def value(*obs):
        obs = torch.tensor(obs).float()
        action = networks["actor"](obs)[:, :1].tanh()
        return networks["critic"](obs, action).mean(0).tolist()

    return returns, checkpoint, value


@every
@pytest.mark.parametrize("env_id", ["TerminatesBox-v0", "TruncatesBox-v0"])
def test_stored_transitions_at_both_kinds_of_end(script, tmp_path, env_id):
    _, checkpoint, _ = trained(script, tmp_path, env_id, 150)
    obs, action, reward, next_obs, bootstrap = checkpoint["buffer"]["data"]
    assert len(reward) == 150 and (reward == 1).all() and action.shape == (150, 1)
    ends = torch.arange(150) % 5 == 4
    terminates = env_id == "TerminatesBox-v0"
    torch.testing.assert_close(bootstrap, torch.where(ends & terminates, 0.0, 0.9))
    if terminates:  # the time is observed
        assert (next_obs[:, 0] == obs[:, 0] + 1).all() and (obs[::5, 0] == -2.5).all()


@every
def test_burn_in_is_uniform_over_the_bounds_then_the_policy_acts(script, tmp_path):
    _, checkpoint, _ = trained(
        script, tmp_path, "MatchedBox-v0", 2_200, burn_in=2_000, utd=0.01, learning_rate=0.0
    )
    _, action, reward, *_ = checkpoint["buffer"]["data"]
    counts = torch.histc(action[:2_000], 4, -1, 1)
    assert counts.min() > 430 and action.abs().max() <= 1
    sign = checkpoint["buffer"]["data"][0][:, 0]
    exact = -((5 * action[:, 0] - 2 * sign) ** 2)  # a Box from 0 to 10 around 5
    torch.testing.assert_close(reward, exact, atol=1e-3, rtol=1e-4)
    assert action[2_000:].std() > 0.05, "it explores"


@every
@pytest.mark.parametrize("utd", [0.3, 3.0])
def test_updates_are_exactly_the_ratio(script, tmp_path, monkeypatch, utd):
    calls, update = [], script.update
    monkeypatch.setattr(script, "update", lambda *a: calls.append(1) or update(*a))
    trained(script, tmp_path, "BothBox-v0", 311, utd=utd, burn_in=200)
    assert len(calls) == int(utd * 111)


@every
def test_the_action_that_pays_is_found(script, tmp_path):
    returns, _, _ = trained(script, tmp_path, "MatchedBox-v0", 1_500)
    assert returns.mean() > -0.1


@every
def test_time_limit_does_not_end_the_value(script, tmp_path):
    _, _, value = trained(script, tmp_path, "TruncatesBox-v0", 1_500, tau=0.2)
    assert value([0, 0]) == pytest.approx([10], abs=0.4)


@every
def test_termination_ends_the_value(script, tmp_path):
    _, _, value = trained(script, tmp_path, "TerminatesBox-v0", 1_500)
    exact = [(1 - 0.9 ** (5 - t)) / 0.1 for t in range(5)]
    assert value(*([t - 2.5, 0] for t in range(5))) == pytest.approx(exact, abs=0.2)


@every
def test_a_million_transitions_cost_their_bytes(script):
    buffer = script.ReplayBuffer(10**6, np.zeros(17, np.float32), np.zeros(6, np.float32))
    assert sum(rows.nbytes for rows in buffer.data) == 10**6 * 4 * (17 + 6 + 1 + 17 + 1)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("bound", [np.inf, 1e30])
def test_actions_without_bounds_are_refused(name, tmp_path, bound):
    space = gym.spaces.Box(np.float32(-1), np.float32(bound), (2,))
    gym.registry["Spaces-v0"].kwargs = {"observation_space": BOX, "action_space": space}
    status, _, err = command(name, "--env-id", "Spaces-v0", "--run-dir", tmp_path)
    assert status == 2 and len(err.splitlines()) == 1 and "finite bounds" in err
