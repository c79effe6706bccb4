"""ddpg.py, and what td3.py shares with it: the updates against plain torch, and the loop."""

import copy

import ddpg
import numpy as np
import pytest
import td3
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

SCRIPTS = {"ddpg": ddpg, "td3": td3}
every = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
COMMON = dict(hidden=32, batch_size=64, gamma=0.9, learning_rate=3e-3, burn_in=200, tau=0.05)


def arguments(script, tmp_path="", **options):
    """Args of short runs in tiny environments."""
    options = {**COMMON, "env_id": "WanderBox-v0", "run_dir": str(tmp_path), **options}
    return script.Args(**options)


def networks(script, args):
    """The actor and the critic as training begins with them."""
    torch.manual_seed(args.seed)
    with script.make_env(args) as env:
        actor = script.make_policy(env, args)
        critic = ddpg.Critic(env, args.hidden) if script is ddpg else None
        return actor, critic or td3.QNetworks(env, args.hidden, 2)


def trained(script, tmp_path, steps, **options):
    """Evaluation returns, the checkpoint, and the mean of Q(s, π(s)) over the critics."""
    args = arguments(script, tmp_path, total_timesteps=steps, **options)
    returns = script.train(args)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    actor, critic = networks(script, args)
    actor.load_state_dict(checkpoint["policy"])
    critic.load_state_dict(checkpoint["critic"])

    def value(*obs):
        obs = torch.tensor(obs).float()
        return critic(obs, actor(obs)).view(-1, len(obs)).mean(0).tolist()

    return returns, checkpoint, value


def logged(tmp_path):
    log = EventAccumulator(str(tmp_path)).Reload()
    return {tag: [event.value for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def fix(monkeypatch, script, output):
    """Let the actor begin with this action whatever it observes."""
    make_policy = script.make_policy

    def fixed(env, args):
        actor = make_policy(env, args)
        nn.init.zeros_(actor[-2].weight)
        nn.init.constant_(actor[-2].bias, np.arctanh(output))
        return actor

    monkeypatch.setattr(script, "make_policy", fixed)


# Equations


@every
def test_exploration_is_clipped_and_nothing_follows_a_terminal_state(script):
    action, noise = torch.tensor([0.5, -0.9, 0.0]), torch.tensor([1.0, -2.0, 3.0])
    assert script.explore(action, noise, 0.1).tolist() == pytest.approx([0.6, -1, 0.3])
    assert script.one_step_discount(0.5, True) == 0
    assert script.one_step_discount(0.5, False) == 0.5


def test_the_target_is_one_step_and_the_value_after_it():
    reward, discount = torch.tensor([1.0, 2.0]), torch.tensor([0.9, 0.0])
    y = ddpg.ddpg_target(reward, discount, torch.tensor([10.0, 20.0]))
    assert y.tolist() == pytest.approx([10, 2])


@every
def test_losses_of_one_critic_and_of_two(script):
    q, y = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([1.0, 4.0])
    assert script.critic_loss(q[0], y).item() == (0 + 4) / 2
    assert script.critic_loss(q, y).item() == (0 + 4) / 2 + (4 + 1) / 2
    assert script.deterministic_actor_loss(q[0]).item() == -(1 + 2) / 2


def test_the_gradient_goes_through_the_action():
    """∇_θ Q(s, a_θ(s)) = ∇_a Q · ∇_θ a_θ(s), in every weight θ; the actor's loss is -Q."""
    actor, critic = networks(ddpg, arguments(ddpg, hidden=8))
    obs, theta = torch.randn(1, 2), [*actor.parameters()]
    action = actor(obs).detach().requires_grad_()
    [slope] = torch.autograd.grad(critic(obs, action).sum(), action)
    ours = torch.autograd.grad(ddpg.deterministic_actor_loss(critic(obs, actor(obs))), theta)
    for gradient, jacobian in zip(ours, torch.autograd.grad(actor(obs).sum(), theta), strict=True):
        torch.testing.assert_close(gradient, -slope.item() * jacobian)
    assert abs(slope.item()) > 1e-3


# Networks


@every
def test_the_actor_begins_near_0_and_acts_by_its_mean(script):
    actor, _ = networks(script, arguments(script, hidden=256, env_id="MatchedBox-v0"))
    for x in actor[-2].parameters():
        assert x.abs().max() <= 3e-3
    assert actor[-2].weight.std().item() == pytest.approx(3e-3 / 3**0.5, rel=0.1)
    for x in actor[0].weight, actor[2].weight:
        assert x.std().item() == pytest.approx((3 * x.shape[1]) ** -0.5, rel=0.1), "as torch's"
    actor[-2].weight.data *= 300
    obs = torch.randn(50, 2)
    x = (obs @ actor[0].weight.T + actor[0].bias).relu()
    x = (x @ actor[2].weight.T + actor[2].bias).relu()
    action = (x @ actor[4].weight.T + actor[4].bias).tanh()
    assert action.std() > 0.05 and action.abs().max() <= 1
    torch.testing.assert_close(actor(obs), action)
    np.testing.assert_allclose(actor.act(obs.numpy()), 5 + 5 * action.detach(), atol=1e-4)


def test_the_critic_is_two_relu_layers_and_a_linear_one_of_observation_and_action():
    _, critic = networks(ddpg, arguments(ddpg))
    obs, action = torch.randn(5, 2), torch.rand(5, 1)
    x = torch.cat([obs, action], -1)
    for layer in critic[0], critic[2]:
        x = (x @ layer.weight.T + layer.bias).relu()
    q = x @ critic[4].weight.T + critic[4].bias
    torch.testing.assert_close(critic(obs, action), q.view(5))


# The updates, against nn.Sequential, torch's plain Adam and the algorithm boxes of the papers


def plain(actor, critic):
    """Actor and critics as nn.Sequentials of their own, the critics of (s, a) side by side."""
    if isinstance(critic, nn.Sequential):
        return nn.Sequential(*copy.deepcopy(actor)), [nn.Sequential(*copy.deepcopy(critic))]
    nets = []
    for i in range(2):
        layers = []
        for w, b in (critic.w_1, critic.b_1), (critic.w_2, critic.b_2), (critic.w_3.mT, critic.b_3):
            layers += [nn.Linear(w.shape[1], w.shape[2]), nn.ReLU()]
            layers[-2].weight.data, layers[-2].bias.data = w[i].T.clone(), b[i].flatten().clone()
        nets.append(nn.Sequential(*layers[:-1]))
    return nn.Sequential(*copy.deepcopy(actor)), nets


def q_of(nets, obs, action):
    return torch.stack([q(torch.cat([obs, action], -1)).squeeze(-1) for q in nets])


def reference(args, actor, critics, batches, noises):
    """Target actor and target critics after the updates, which change actor and critics in place.

    noises: those of td3's smoothing, none in ddpg.
    """
    target_actor, target_critics = copy.deepcopy(actor), copy.deepcopy(critics)
    adam = torch.optim.Adam(actor.parameters(), args.learning_rate)
    critic_adam = torch.optim.Adam(nn.ModuleList(critics).parameters(), args.learning_rate)
    for number, (obs, action, reward, next_obs, discount) in enumerate(batches):
        with torch.no_grad():
            next_action = target_actor(next_obs)
            if noises:
                noise, c = args.target_sigma * noises[number], args.noise_clip
                next_action = (next_action + noise.clamp(-c, c)).clamp(-1, 1)
            y = reward + discount * q_of(target_critics, next_obs, next_action).min(0).values
        loss = sum(nn.functional.mse_loss(q, y) for q in q_of(critics, obs, action))
        critic_adam.zero_grad()
        loss.backward()
        critic_adam.step()
        if noises and (number + 1) % args.actor_every:
            continue
        adam.zero_grad()
        (-q_of(critics, obs, actor(obs))[0]).mean().backward()
        adam.step()
        for target, net in zip([target_actor, *target_critics], [actor, *critics]):
            for x, y in zip(target.parameters(), net.parameters()):
                x.data = (1 - args.tau) * x.data + args.tau * y.data
    return target_actor, target_critics


@every
def test_updates_are_those_of_plain_torch(script, tmp_path, monkeypatch):
    batches, noises, sample, draw = [], [], script.ReplayBuffer.sample, torch.randn_like
    monkeypatch.setattr(
        script.ReplayBuffer, "sample", lambda *a: batches.append(sample(*a)) or batches[-1]
    )
    monkeypatch.setattr(torch, "randn_like", lambda x: noises.append(draw(x)) or noises[-1])
    options = {"target_sigma": 0.5, "noise_clip": 0.4} if script is td3 else {}
    options |= dict(hidden=16, batch_size=32, tau=0.1, learning_rate=1e-2, burn_in=60)
    _, checkpoint, _ = trained(script, tmp_path, 72, **options)
    args = arguments(script, **options)
    actor, critic = networks(script, args)
    expected, critics = plain(actor, critic)
    target_expected, target_critics = reference(args, expected, critics, batches, noises)
    assert len(batches) == 12 and len(noises) == 12 * (script is td3)
    obs, action = torch.randn(50, 2), torch.rand(50, 1)

    def close(x, y, apart):
        torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)
        assert (y - apart).abs().mean() > 0.01, "it has not moved"

    for name, net in ("policy", expected), ("target_actor", target_expected):
        before = actor(obs).detach()
        other = copy.deepcopy(actor)
        other.load_state_dict(checkpoint[name])
        close(other(obs), net(obs), before)
    for name, nets in ("critic", critics), ("target_critic", target_critics):
        before = q_of(plain(actor, critic)[1], obs, action)
        other = copy.deepcopy(critic)
        other.load_state_dict(checkpoint[name])
        close(other(obs, action).view(len(nets), -1), q_of(nets, obs, action), before)


@every
def test_the_actors_step_leaves_the_critics_as_they_are(script, tmp_path, monkeypatch):
    """Its backward pass reaches no weight of theirs, whose gradients stay those of their loss."""
    stepped, step = [], torch.optim.Adam.step

    def spy(self, *a):
        weights = self.param_groups[0]["params"]
        stepped.append((weights, [x.grad.clone() for x in weights]))
        if len(stepped) > 1 and weights is not stepped[-2][0]:  # the actor's, after the critics'
            critics, before = stepped[-2]
            assert all(torch.equal(x.grad, y) for x, y in zip(critics, before, strict=True))
            checked.append(1)
        return step(self, *a)

    checked = []
    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    trained(script, tmp_path, 202)
    assert len(stepped) == (4 if script is ddpg else 3) and checked


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
def test_no_product_is_computed_in_vain(script, tmp_path):
    """Above all none for the critics' weights in the actor's step, or td3's second critic there.

    The last layer of td3's critics, of one output, is no matrix product.
    """
    B, H, o, a, counts = 32, 16, 2, 1, []
    for utd in (1, 0):
        with Products() as products:
            options = dict(hidden=H, batch_size=B, utd=utd, eval_episodes=1)
            trained(script, tmp_path / str(utd), 202, env_id="DrawsBox-v0", **options)
        counts.append(products.count)
    n, last = (1, H) if script is ddpg else (2, 0)
    actor, critic = o * H + H * H + H * a, (o + a) * H + H * H + last
    target = actor + n * critic
    critic_step = n * (critic + critic + H * H + last)  # forward, weights, the layers below
    actor_step = actor + 2 * critic  # forward, and back to the action
    actor_step += actor + H * H + H * a  # weights, and the layers below
    exact = 2 * (target + critic_step) + (1 if script is td3 else 2) * actor_step
    assert counts[0] - counts[1] == B * exact


# Loop


@every
@pytest.mark.parametrize("env_id", ["TerminatesBox-v0", "TruncatesBox-v0"])
def test_stored_transitions_at_both_kinds_of_end(script, tmp_path, env_id):
    _, checkpoint, _ = trained(script, tmp_path, 150, env_id=env_id)
    obs, action, reward, next_obs, discount = checkpoint["buffer"]["data"]
    assert len(reward) == 150 and (reward == 1).all() and action.shape == (150, 1)
    ends = torch.arange(150) % 5 == 4
    terminates = env_id == "TerminatesBox-v0"
    torch.testing.assert_close(discount, torch.where(ends & terminates, 0.0, 0.9))
    if terminates:  # the time is observed
        assert (next_obs[:, 0] == obs[:, 0] + 1).all() and (obs[::5, 0] == -2.5).all()


@every
def test_burn_in_is_uniform_then_the_policy_acts_with_noise_of_sigma(script, tmp_path, monkeypatch):
    """And without noise in an evaluation."""
    fix(monkeypatch, script, 0.3)
    options = dict(burn_in=2_000, learning_rate=0.0, utd=0.01, sigma=0.2, env_id="MatchedBox-v0")
    returns, checkpoint, _ = trained(script, tmp_path, 4_000, **options)
    obs, action, reward, *_ = checkpoint["buffer"]["data"]
    counts = torch.histc(action[:2_000], 4, -1, 1)
    assert counts.min() > 430 and action.abs().max() <= 1
    exact = -((5 * action[:, 0] - 2 * obs[:, 0]) ** 2)  # a Box from 0 to 10 around 5
    torch.testing.assert_close(reward, exact, atol=1e-3, rtol=1e-4)
    noise = action[2_000:] - 0.3
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(0.2, rel=0.1)
    assert abs((noise[1:] * noise[:-1]).mean()) < 0.004, "not correlated in time"
    assert {round(x, 2) for x in returns} == {-((1.5 - 2) ** 2), -((1.5 + 2) ** 2)}


@every
@pytest.mark.parametrize("utd", [0.3, 3.0])
def test_updates_are_exactly_the_ratio(script, tmp_path, monkeypatch, utd):
    calls, loss = [], script.critic_loss
    monkeypatch.setattr(script, "critic_loss", lambda *a: calls.append(1) or loss(*a))
    trained(script, tmp_path, 311, utd=utd)
    assert len(calls) == int(utd * 111)


@every
def test_what_is_logged_of_the_start_of_episodes(script, tmp_path):
    """The value that the critic gives, and the discounted return of five rewards of 1."""
    options = dict(env_id="TerminatesBox-v0", learning_rate=0.0)
    trained(script, tmp_path, 210, **options)
    scalars, first = logged(tmp_path), torch.tensor([[-2.5, 0.0]])
    assert scalars["losses/start_return"][-1] == pytest.approx((1 - 0.9**5) / 0.1)
    assert scalars["charts/episodic_return"][-1] == 5
    actor, critic = networks(script, arguments(script, **options))
    lowest = critic(first, actor(first)).min().item()
    assert scalars["losses/start_value"][-1] == pytest.approx(lowest)


@every
def test_losses_are_means_over_the_updates_since_the_last_time(script, tmp_path, monkeypatch):
    seen = {"critic_loss": [], "deterministic_actor_loss": []}
    for name, values in seen.items():
        loss = getattr(script, name)

        def spy(*a, loss=loss, values=values):
            values.append(loss(*a))
            return values[-1]

        monkeypatch.setattr(script, name, spy)
    trained(script, tmp_path, 500)
    scalars = logged(tmp_path)
    assert len(scalars["losses/critic_loss"]) == 2, "nothing of burn-in's 200 steps"
    for name, tag in ("critic_loss", "critic_loss"), ("deterministic_actor_loss", "actor_loss"):
        values = torch.stack(seen[name]).tolist()
        first = len(values) * 2 // 3  # 200 updates, and 100
        means = [np.mean(values[:first]), np.mean(values[first:])]
        assert scalars[f"losses/{tag}"] == pytest.approx(means, rel=1e-5)


@every
def test_all_that_learns_is_in_the_checkpoint_and_goes_on(script, tmp_path):
    _, checkpoint, _ = trained(script, tmp_path, 210)
    names = "policy critic target_actor target_critic actor_optimizer critic_optimizer buffer"
    assert set(names.split()) == checkpoint.keys() - {"script", "env_steps", "args"}
    for name, number in ("critic_optimizer", 10), ("actor_optimizer", 10 if script is ddpg else 5):
        assert {x["step"].item() for x in checkpoint[name]["state"].values()} == {number}
    options = dict(resume=str(tmp_path / "checkpoint.pt"), learning_rate=0.0)
    _, later, _ = trained(script, tmp_path, 220, **options)
    for name in "policy", "critic":
        assert all(map(torch.equal, checkpoint[name].values(), later[name].values()))
    for name in "target_actor", "target_critic":
        pairs = zip(checkpoint[name].values(), later[name].values())
        assert any(not torch.equal(x, y) for x, y in pairs), "they still follow"
    steps = {x["step"].item() for x in later["critic_optimizer"]["state"].values()}
    assert steps == {20}, "a learning rate given with --resume takes effect"


@every
def test_the_action_that_pays_is_found(script, tmp_path):
    returns, _, _ = trained(script, tmp_path, 1_200, env_id="MatchedBox-v0")
    assert returns.mean() > -0.1


@every
def test_an_integer_box_is_learned(script, tmp_path):
    returns, _, _ = trained(script, tmp_path, 1_000, env_id="Dimmer-v0")
    assert returns.mean() > 0.9


@every
def test_only_termination_ends_the_value_and_a_limit_bootstraps_from_the_final_observation(
    script, tmp_path
):
    """Not from the first one of the next episode, which stands for another state."""
    options = dict(env_id="LimitsBox-v0", gamma=0.5, tau=0.2)
    _, _, value = trained(script, tmp_path, 1_000, **options)
    assert value([1, 0], [-1, 0], [0, 1]) == pytest.approx([2, -2, 1], abs=0.15)
