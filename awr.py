r"""Advantage-Weighted Regression: imitate actions from a replay buffer, better ones more strongly.

Derivations in the document (tests/document/README.md): "The Performance Difference Lemma",
"The Optimization Problem", "Advantage Weighted Regression (AWR)",
"How Do We Actually Use This Oracle Solution?", "The Practical AWR Algorithm",
"Why AWR is Off-Policy", "The Role of Temperature $\alpha$"; of earlier sections "Gaussian Policy",
"Softmax Policy", "Review: Actor-Critic and the Advantage Function",
"How do we learn the state-dependent baseline $V^\pi(s)$?".

    1.  Initialise the policy π_θ, the critic V_φ and an empty buffer D.
    2.  Let π_θ act for T steps in each of N environments; D keeps the K latest of these rollouts.
        Their behaviour policy μ is the mixture of the policies that acted in them.
    3.  Add the new observations to the statistics that normalise them.
    4.  TD(λ) returns G of all steps in D, with the present V_φ.
    5.  Critic: Adam steps on φ down the gradient of E_D[(V_φ(s) - G)²].
    6.  TD(λ) returns G again, with the new V_φ. Advantages A^μ = G - V_φ, standardised over D.
    7.  w = min(exp(A^μ / α), w_max)
    8.  Actor: Adam steps on θ up the gradient of E_D[w log π_θ(a|s)] - penalty; repeat from 2.

Notation, for one rollout: s_t -> obs -> (T+1, N, obs_dim);  a_t -> actions -> (T, N) or
(T, N, action_dim);  r_t -> rewards -> (T, N).  For all K rollouts in D: s, a, r -> s, a, r;
V_φ, G -> values, returns: the same shapes with K before N.  The step after the end of an episode
only resets the environment; all other steps are real.  b_... holds the B real steps of D, flat:
G, A^μ, w -> b_returns, b_advantages, b_weights -> (B,).  mb_... holds those of a minibatch; there
log π_θ -> logp.

The sum in a return stops where its episode ends. After a time limit (truncated), and at the end of
a rollout, V_φ of the last state stands for the rewards that would have followed; after termination
nothing follows.

Beyond the document, as in the authors' code: TD(λ) returns G = A + V_φ, with the A of generalised
advantage estimation, GAE(λ) (Schulman et al. 2016, arXiv 1506.02438); weights clipped at w_max;
advantages standardised over D, with α = 1 (in the paper's text they are raw, with α = 0.05);
observations from which their running mean is subtracted, divided by their running standard
deviation; a critic network whose output is (1 - γ) V_φ; a σ that is not learned; a penalty. Where
actions have bounds, it is 10 · ½ E[‖excess‖²], with excess the part of the mean action beyond them.
For logits h_θ it is 0.001 · ½ E[‖h_θ‖²]. The code's critic loss has a factor ½ too, left out here
because Adam's steps hardly depend on it.

Unlike that code: Adam, with ε = 1e-5 (torch's is 1e-8), in place of gradient descent with momentum,
whose step sizes (1e-2 on φ, 1e-5 to 5e-4 on θ) do not suit Adam; two tanh layers of equal size and
orthogonal initial weights, in place of ReLU layers of 128 and 64 units. The code collects whole
episodes until it has at least 2,048 steps, and makes updates in proportion to their number. Here a
rollout is T steps in each environment, including the steps that only reset it, and the number of
updates is always the same. The code's minibatches are passes through D in a shuffled order; ours
are drawn with replacement. The code's statistics of observations change after the updates (the
first time before them), and not at all after 100,000 to 300,000 steps. Ours change before the
updates, so that the policy acts with the statistics that it was trained with, and never stop.
Normalised observations are clipped to [-10, 10] here. All other defaults are the code's.

With --data no policy acts. Instead, the rollouts in the buffer of another run's checkpoint enter D
one by one, as if each had just been played. Their steps count towards --total-timesteps, and the
run ends with the last of them at the latest.

Logged: losses are means over all updates since the latest rollout; value_loss is the squared error
of (1 - γ) V_φ. effective_sample_size is that of the weights of all steps in D. last_entropy is that
of the policy after its last update, averaged over D.

Paper: Peng et al. 2019, Advantage-Weighted Regression, arXiv 1910.00177.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium[classic-control,box2d,mujoco]==1.4.0",
#     "moviepy==2.2.1",
#     "mujoco==3.8.1",
#     "numpy==2.4.6",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///

import dataclasses
import functools
import json
import math
import os
import random
import re
import signal
import sys
import time
from collections import deque
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import distributed as dist, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = "awr"
ACTION_SPACES = gym.spaces.Discrete, gym.spaces.Box
IMAGES = False  # whether observations may be images
# Least and most of these options. Other numbers are at least 0, counts at least 1.
LIMITS = {"gamma": (0, 0.99999), "gae_lambda": (0, 1), "alpha": (1e-6, 1e9), "init_std": (1e-6, 9)}


@dataclasses.dataclass
class Args:
    total_timesteps: int = 80_000  # environment steps; with --data at most those in its checkpoint
    num_envs: int = 16  # N, environments that are stepped together
    num_steps: int = 128  # T, steps of each environment between updates
    buffer_size: int = 50_000  # steps in the replay buffer, rounded down to whole rollouts of N T
    data: str = ""  # checkpoint of awr.py with the same N and T: learn from its buffer, do not act
    critic_steps: int = 200  # Adam steps of the critic after each rollout
    actor_steps: int = 1_000  # Adam steps of the policy after each rollout
    batch_size: int = 256  # environment steps in a minibatch
    alpha: float = 1.0  # α, temperature: an action is weighted by exp(advantage / α)
    norm_advantages: bool = True  # standardise advantages over the buffer; if not, adapt --alpha
    max_weight: float = 20.0  # w_max: larger weights are clipped to this
    gamma: float = 0.99  # γ, the discount factor
    gae_lambda: float = 0.95  # λ of the TD(λ) returns; 0: one-step, 1: Monte Carlo
    actor_learning_rate: float = 5e-5  # Adam's step size for the policy
    critic_learning_rate: float = 1e-3  # Adam's step size for the critic
    norm_obs: bool = True  # normalise observations by their running mean and standard deviation
    init_std: float = 0.4  # fixed σ of a Gaussian policy, kept on resume; 1: half an action's range
    hidden: int = 128  # units in each of the two hidden layers

    env_id: str = "CartPole-v1"  # gymnasium id of the environment; module:Name-v0 imports module
    env_kwargs: str = "{}"  # its arguments in JSON; {"max_episode_steps": 200} limits episodes
    seed: int = 1  # random seed; one seed gives the same weights on the same machine
    device: Literal["cpu", "cuda"] = "cpu"  # where networks compute; not saved in checkpoints
    run_dir: str = ""  # directory to write to; if empty that of --resume, or a new one in runs/
    eval_episodes: int = 20  # greedy episodes in an evaluation, each of at most 100000 steps
    eval_every: int = 0  # steps between evaluations, which wait for a log entry; 0: only at the end
    capture_video: bool = False  # record the evaluations as videos in <run-dir>/videos
    checkpoint_every: int = 60  # seconds between checkpoints; 0: save only when the run ends
    resume: str = ""  # checkpoint to continue from; options not given come from it

    def __post_init__(self):
        """Refuse values of the wrong type or out of range; turn numpy numbers into Python's."""
        for name, kind in get_type_hints(self.__class__).items():
            # kinds: its choices, or its types
            kinds, value = get_args(kind) or [kind], getattr(self, name)
            value = getattr(value, "item", lambda: value)()
            value = float(value) if float in kinds and type(value) is int else value
            setattr(self, name, value)
            positive = int in kinds and name not in ("seed", "eval_every", "checkpoint_every")
            low, high = LIMITS.get(name, (positive, 1e18))
            fits = value in kinds or type(value) in kinds
            if not fits or isinstance(value, int | float) and not low <= value <= high:
                raise Refusal(
                    f"--{name.replace('_', '-')} {value}: it must be "
                    f"{' or '.join(getattr(x, '__name__', x) for x in kinds)} from {+low} to {high}"
                )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise Refusal("--device cuda: no GPU is available")
        if dist.is_torchelastic_launched():
            raise Refusal(f"{SCRIPT}.py does not run under torchrun")


# Equations ----------------------------------------------------------------------------------------


def softmax_log_prob(logits, action):
    """log π(a|s) = h(s, a) - log Σ_b exp h(s, b)   [Softmax Policy, eq. 2]

    logits h: (..., A); action: (...), integers in [0, A). Returns (...), in nats.
    """
    return logits.log_softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1)


def softmax_entropy(logits):
    """H(π(·|s)) = E_a[-log π(a|s)]   [What is Maximum Entropy RL?, eq. 3]

    logits h: (..., A). Returns (...), in nats.
    """
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def gaussian_log_prob(mean, log_std, action):
    """log π(a|s) = -½ (a - m)ᵀ Σ⁻¹ (a - m) + C,  Σ = diag σ²   [Gaussian Policy, eq. 8]

    mean m, action: (..., d); log_std log σ: (d,). Returns (...), in nats, with the constant C.
    """
    z = (action - mean) / log_std.exp()
    return -(0.5 * z**2 + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_entropy(log_std):
    """H(π(·|s)) = Σ_j (log σ_j + ½ log 2πe)   [What is Maximum Entropy RL?, eq. 3]

    log_std log σ: (d,). Returns (), in nats.
    """
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()


def gae(rewards, values, terminated, truncated, gamma, gae_lambda):
    """A_t = δ_t + γλ (1 - ended_t) A_{t+1},   δ_t = r_t + γ (1 - terminated_t) V(s_{t+1}) - V(s_t)

    [Review: Actor-Critic and the Advantage Function, eq. 2] and Schulman et al. 2016, eq. 16.
    The sum stops at both kinds of end; V(s_{t+1}) counts as 0 only after termination.
    rewards, terminated, truncated: (T, N); values, V of s_0 to s_T: (T+1, N). Returns (T, N), in
    units of reward: those at reset steps are meaningless, but no other advantage uses them.
    """
    deltas = rewards + gamma * ~terminated * values[1:] - values[:-1]
    traces = gamma * gae_lambda * ~(terminated | truncated)
    advantages = [0]  # A_T, A_{T-1}, ..., A_0
    for delta, trace in zip(deltas.flip(0), traces.flip(0)):
        advantages.append(delta + trace * advantages[-1])
    return torch.stack(advantages[:0:-1])


def value_loss(values, returns):
    r"""E[(V_φ(s_t) - G_t)²]   [How do we learn the state-dependent baseline $V^\pi(s)$?, eq. 4]

    The document's G_t is a Monte Carlo return; ours, A_t + V_φ(s_t), may bootstrap from V_φ.
    values V_φ, returns G: (B,). Returns (), to be minimised, in squared units of reward.
    """
    return nn.functional.mse_loss(values, returns)


def advantage_weights(advantages, alpha, max_weight):
    """w = min(exp(A^μ / α), w_max)   [Advantage Weighted Regression (AWR), eq. 3]

    Without the clip, μ(a|s) w is proportional to π*(a|s).
    advantages A^μ: (B,); alpha α > 0, in the units of A^μ. Returns (B,), in (0, w_max].
    """
    return (advantages / alpha).exp().clamp(max=max_weight)


def weighted_log_likelihood(weights, logp):
    """E_D[w log π_θ(a|s)]   [The Practical AWR Algorithm, eq. 1]

    Since the actions in D are drawn from μ, this is also
    [How Do We Actually Use This Oracle Solution?, eq. 1].
    weights w, logp log π_θ: (B,). Returns (), to be maximised.
    """
    return (weights * logp).mean()


def excess_penalty(output, limit):
    """½ E[Σ_j max(|x_j| - b_j, 0)²], a penalty on the policy of [The Practical AWR Algorithm]

    It is not in the document. output x, mean actions or logits: (B, d); limit b ≥ 0: (d,). Returns
    (), to be minimised.
    """
    return 0.5 * (output.abs() - limit).clamp(min=0).pow(2).sum(-1).mean()


def effective_sample_size(weights):
    r"""(Σw)² / (n Σw²), which falls with α   [The Role of Temperature $\alpha$]

    weights w: (n,). Returns (), between 1/n (one sample has all the weight) and 1 (all weights are
    equal); 0 if all are 0. In float64, because w² can leave the range of float32.
    """
    return weights.double().mean() ** 2 / weights.double().pow(2).mean().clamp(min=1e-300)


# Networks -----------------------------------------------------------------------------------------


class RunningNorm(nn.Module):
    """(x - mean) / deviation, clipped to [-10, 10]; both of all rows passed to include."""

    def __init__(self, *shape):
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(shape))
        self.var = nn.Buffer(torch.ones(shape))
        self.count = nn.Buffer(torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def include(self, x):
        """Add the rows of x, (B, *shape)."""
        x = torch.as_tensor(x).to(self.count) - self.mean
        n, first, second = x.new_tensor(len(x)), x.sum(0), (x**2 - self.var).sum(0)
        self.count += n
        shift = first / self.count
        self.var.add_(second / self.count - shift**2).clamp_(min=0)
        self.mean += shift

    def forward(self, x):
        """Normalise x, (..., *shape)."""
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10, 10)


def mlp(env, args, outputs, gain):
    """Two tanh layers and a linear layer; orthogonal weights, scaled by gain in the last."""
    obs_dim, hidden = env.observation_space.shape[0], args.hidden
    layers = nn.Linear(obs_dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, outputs)
    for layer in layers:
        nn.init.orthogonal_(layer.weight, math.sqrt(2))
        nn.init.zeros_(layer.bias)
    nn.init.orthogonal_(layers[2].weight, gain)
    return layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2]


def in_numpy(net):
    """Turn net into a function of numpy arrays, much faster than torch for a few rows.

    It translates layer by layer. An unknown layer, a linear one with a hook before its forward, and
    a net with a forward of its own run in torch. The function sees later changes of weights on the
    CPU; of weights on a GPU it holds a copy.
    """
    if type(net) is nn.Tanh:
        return np.tanh
    if type(net) is nn.ReLU:
        return lambda x: np.maximum(x, 0)
    if type(net) is nn.Linear and net.bias is not None and not net._forward_pre_hooks:
        weight, bias = (x.detach().cpu().numpy().T for x in (net.weight, net.bias))
        return lambda x: x @ weight + bias
    if type(net).forward is nn.Sequential.forward:
        layers = [in_numpy(layer) for layer in net]
        return lambda x: functools.reduce(lambda y, layer: layer(y), layers, x)
    example = next(iter(net.state_dict().values()), torch.empty(0))
    return lambda x: net(torch.as_tensor(x.copy()).to(example)).detach().cpu().numpy()


def box_actions(space):
    """A function that scales actions (n, d) in [-1, 1] to the Box space, (n, *shape).

    Dimensions without two bounds are not scaled, so 0 should lie in them. Each integer of an
    integer space gets an equal part.
    """
    low, high = np.float64([space.low, space.high])
    bounded = (low > -1e9) & (high < 1e9)
    least, most = np.where(bounded, low, -1), np.where(bounded, high, 1)
    whole = space.dtype.kind in "iub"
    scale, shift = (most - least + whole * bounded) / 2, (most + least) / 2

    def to_env(action):
        check_finite("an action of the policy", action)
        action = action.reshape(-1, *space.shape) * scale + shift
        return (action.round() if whole else action).clip(low, high).astype(space.dtype)

    return to_env


class SoftmaxPolicy(nn.Sequential):
    """π_θ(a|s) = softmax of h_θ(s, ·) over a Discrete space: obs (..., obs_dim) to h_θ (..., A)."""

    log_prob = staticmethod(softmax_log_prob)
    entropy = staticmethod(softmax_entropy)

    def __init__(self, env, args, *first):
        super().__init__(*first, *mlp(env, args, env.action_space.n, gain=0.01))
        self.start = env.action_space.start

    def sample(self, logits, rng):
        """a ~ π_θ(·|s), as argmax_a h_θ(s, a) + Gumbel noise, (...)."""
        return (logits + rng.gumbel(size=logits.shape)).argmax(-1)

    def to_env(self, action):
        """action, (...), counted from 0, as the environment numbers it, in its space's type."""
        return action.astype(self.start.dtype) + self.start

    def act(self, obs):
        """Greedy actions at obs, (n, obs_dim), as the environment takes them, (n,)."""
        logits = self(torch.as_tensor(obs).to(self[-1].weight))
        return self.to_env(logits.argmax(-1).cpu().numpy())


class GaussianPolicy(nn.Sequential):
    """π_θ(a|s) = N(a | m_θ(s), diag σ²) over a Box: obs (..., obs_dim) to m_θ (..., d).

    The document calls m_θ μ_θ; here μ is the behaviour policy.
    """

    def __init__(self, env, args, *first):
        d = env.action_space.low.size
        super().__init__(*first, *mlp(env, args, d, gain=0.01))
        self.log_std = nn.Parameter(torch.full((d,), args.init_std).log())
        self.to_env = box_actions(env.action_space)

    def sample(self, mean, rng):
        """a ~ π_θ(·|s), not clipped to the bounds, (..., d)."""
        std = self.log_std.detach().exp().cpu().numpy()
        return mean + std * rng.standard_normal(mean.shape, np.float32)

    def log_prob(self, mean, action):
        """log π_θ(a|s), (...)."""
        return gaussian_log_prob(mean, self.log_std, action)

    def entropy(self, mean):
        """H(π_θ(·|s)), the same for all s, ()."""
        return gaussian_entropy(self.log_std)

    def act(self, obs):
        """Mean actions at obs, (n, obs_dim), as the environment takes them, (n, *shape)."""
        mean = self(torch.as_tensor(obs).to(self.log_std))
        return self.to_env(mean.detach().cpu().numpy())


def make_policy(env, args):
    """The policy for the spaces of env."""
    norm = [RunningNorm(*env.observation_space.shape)] if args.norm_obs else []
    discrete = isinstance(env.action_space, gym.spaces.Discrete)
    return (SoftmaxPolicy if discrete else GaussianPolicy)(env, args, *norm)


def output_limits(env):
    """Limits b of excess_penalty, (d,): 0 for logits, 1 for bounded actions, ∞ for all others."""
    space = env.action_space
    if isinstance(space, gym.spaces.Discrete):
        return torch.zeros(int(space.n))
    bounded = np.abs(np.float64([space.low, space.high])).max(0) < 1e9
    return torch.from_numpy(np.where(bounded, 1.0, np.inf)).float().flatten()


# Buffer -------------------------------------------------------------------------------------------


class TrajectoryBuffer:
    """The latest `size` rollouts, as arrays (T or T+1, N, ...); new ones replace the oldest."""

    def __init__(self, size, rollout):
        try:
            self.data = [np.zeros((size, *x.shape), x.dtype) for x in rollout]
        except (MemoryError, ValueError) as error:
            raise Refusal(f"--buffer-size of {size} rollouts: {error}") from error
        self.added = 0

    def add(self, rollout):
        """Write one rollout."""
        for rows, x in zip(self.data, rollout):
            rows[self.added % len(rows)] = x
        self.added += 1

    def tensors(self):
        """All rollouts so far: a tensor (T or T+1, K, N, ...) for each array of a rollout."""
        return [torch.from_numpy(rows[: self.added]).transpose(0, 1) for rows in self.data]

    def state_dict(self):
        """The rollouts so far, for a checkpoint; they are not copied."""
        return {"added": self.added, "data": [torch.from_numpy(x[: self.added]) for x in self.data]}

    def load_state_dict(self, state):
        """Take over the rollouts of a checkpoint; raise ValueError if they do not fit."""
        for rows, saved in zip(self.data, state["data"]):
            if rows.shape[1:] != saved.shape[1:]:
                raise ValueError(f"rollouts of {saved.shape[1:]}, not of {rows.shape[1:]}")
            rows[: len(saved)] = saved
        self.added = state["added"] if len(saved) == len(rows) else len(saved)


def draw(batch, size, steps):
    """Yield `steps` minibatches: `size` rows of the tensors in batch, drawn with replacement."""
    for rows in torch.randint(len(batch[0]), (steps, size), device=batch[0].device):
        yield [x.index_select(0, rows) for x in batch]


# Training -----------------------------------------------------------------------------------------


def train(args: Args) -> np.ndarray:
    """Run the algorithm above; return the episode returns of the final evaluation."""
    T, N, gamma, device = args.num_steps, args.num_envs, args.gamma, args.device
    size = args.buffer_size // (N * T)
    if size == 0:
        raise Refusal(f"--buffer-size {args.buffer_size}: less than one rollout of {N} x {T} steps")
    with ExitStack() as stack:
        # 1. Initialise.
        torch.manual_seed(args.seed)
        env = stack.enter_context(make_env(args))
        envs = stack.enter_context(closing(make_envs(args, N)))
        # Before the first layer: once torch has used several threads, its process cannot fork.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        if args.hidden**2 * args.batch_size < 2**23:
            torch.set_num_threads(1)  # for layers this small, threads cost more than they save
        policy = make_policy(env, args).to(device)
        norm = [policy[0]] if args.norm_obs else []  # the same one for both networks
        critic = nn.Sequential(*norm, *mlp(env, args, 1, gain=0.01)).to(device)  # (1 - γ) V_φ
        # θ excludes σ, which is not learned: the optimiser ignores its gradient.
        theta = [x for layer in policy for x in layer.parameters()]
        actor_optimizer = torch.optim.Adam(theta, eps=1e-5, fused=True)
        critic_optimizer = torch.optim.Adam(critic.parameters(), eps=1e-5, fused=True)

        # obs[t + 1] is the true successor of obs[t], also where an episode ended. The step after an
        # end is the reset step: its action was ignored, and real is False there.
        obs = np.zeros((T + 1, *envs.observation_space.shape), np.float32)  # (T+1, N, obs_dim)
        # The weight of the penalty, 0.001 for logits and 10 for mean actions, is the authors'.
        actions, penalty = np.zeros((T, N), np.int64), 1e-3
        if isinstance(env.action_space, gym.spaces.Box):
            actions, penalty = np.zeros((T, N, env.action_space.low.size), np.float32), 10
        limits = output_limits(env).to(device)
        rewards = np.zeros((T, N), np.float32)
        terminated, truncated = np.zeros((2, T, N), bool)
        real = np.ones((T + 1, N), bool)
        rollout = obs, actions, rewards, terminated, truncated, real[:T]
        buffer = TrajectoryBuffer(size, rollout)
        if args.data:
            played = args.resume and not load(args.resume, {})[0].data  # and kept what it played
            if played or load(args.data, {"buffer": buffer})[0].env_id != args.env_id:
                raise Refusal(f"--data {args.data}: not of {args.env_id}, or --resume ran without")
            held = buffer.tensors()[-1].sum().item()  # real steps
            args = dataclasses.replace(args, total_timesteps=min(args.total_timesteps, held))
            buffer.added = 0

        learner = {"policy": policy, "critic": critic, "buffer": buffer}
        learner |= {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer}
        run = stack.enter_context(Run(args, **learner))
        actor_optimizer.param_groups[0]["lr"] = args.actor_learning_rate
        critic_optimizer.param_groups[0]["lr"] = args.critic_learning_rate
        episode_return, episode_length = np.zeros((2, N))
        obs[T], _ = envs.reset(seed=random.getrandbits(29))

        while run.step < args.total_timesteps:
            # 2. π_θ acts, or with --data the next saved rollout enters D.
            if args.data:
                buffer.added += 1  # the saved rollout is already there
            else:
                obs[0], real[0] = obs[T], real[T]
                pi = in_numpy(policy)
                for t in range(T):
                    actions[t] = policy.sample(pi(obs[t]), run.rng)
                    outcome = envs.step(policy.to_env(actions[t]))
                    obs[t + 1], rewards[t], terminated[t], truncated[t], _ = outcome
                    real[t + 1] = ~(terminated[t] | truncated[t])
                    episode_return += rewards[t] * real[t]
                    episode_length += real[t]
                    for n in np.flatnonzero(~real[t + 1]):
                        run.episodes.append((episode_return[n], episode_length[n]))
                        episode_return[n] = episode_length[n] = 0
                check_finite("an observation or a reward", (obs, rewards))
                buffer.add(rollout)

            # 3. Statistics of the observations.
            s, a, r, *ends, real_steps = (x.to(device) for x in buffer.tensors())
            newest = (buffer.added - 1) % size
            new_obs = s[:T, newest][real_steps[:, newest]]  # (steps, obs_dim)
            run.step += len(new_obs)
            if args.norm_obs:
                policy[0].include(new_obs)

            # 4. TD(λ) returns.
            with torch.no_grad():
                values = critic(s).squeeze(-1) / (1 - gamma)  # (T+1, K, N)
                returns = gae(r, values, *ends, gamma, args.gae_lambda) + values[:T]
            b_obs, b_actions, b_returns = s[:T][real_steps], a[real_steps], returns[real_steps]

            # 5. Critic.
            v_losses, losses = [], []
            batch = b_obs, (1 - gamma) * b_returns
            for mb_obs, mb_returns in draw(batch, args.batch_size, args.critic_steps):
                v_loss = value_loss(critic(mb_obs).squeeze(-1), mb_returns)
                critic.zero_grad()
                v_loss.backward()
                critic_optimizer.step()
                v_losses.append(v_loss.detach())

            # 6. Advantages.
            with torch.no_grad():
                values = critic(s).squeeze(-1) / (1 - gamma)
                b_advantages = gae(r, values, *ends, gamma, args.gae_lambda)[real_steps]
            if args.norm_advantages:
                std, mean = torch.std_mean(b_advantages, correction=0)
                b_advantages = (b_advantages - mean) / (std + 1e-5)

            # 7. Weights.
            b_weights = advantage_weights(b_advantages, args.alpha, args.max_weight)

            # 8. Actor.
            batch = b_obs, b_actions, b_weights
            for mb_obs, mb_actions, mb_weights in draw(batch, args.batch_size, args.actor_steps):
                output = policy(mb_obs)
                logp = policy.log_prob(output, mb_actions)
                objective = weighted_log_likelihood(mb_weights, logp)
                loss = penalty * excess_penalty(output, limits) - objective
                for x in theta:  # does what zero_grad does, but faster
                    x.grad = None
                loss.backward()
                actor_optimizer.step()
                losses.append(loss.detach())

            scalars = {"value_loss": torch.stack(v_losses).mean()}
            scalars["policy_loss"] = torch.stack(losses).mean()
            scalars["effective_sample_size"] = effective_sample_size(b_weights)
            scalars["last_entropy"] = policy.entropy(policy(b_obs).detach()).mean()
            run.log(**scalars)
        return run.evaluate()


# Plumbing -----------------------------------------------------------------------------------------


class Refusal(Exception):
    """Something that the script refuses to do; the command line prints it in one line."""


def make_envs(args, n):
    """A vector environment of n copies: gymnasium's own version if it has one and no kwargs."""
    kwargs = json.loads(args.env_kwargs)  # which its own version may read in another way
    envs = gym.make_vec(args.env_id, n, "sync" if kwargs else None, **kwargs)
    envs._add_info = lambda *_: {}  # infos are not used, and need not fit together
    if (mode := envs.metadata.get("autoreset_mode")) != gym.vector.AutoresetMode.NEXT_STEP:
        raise Refusal(f"{args.env_id} resets its episodes by {mode}; {SCRIPT}.py needs NEXT_STEP")
    flat = gym.spaces.flatten_space(envs.single_observation_space) == envs.single_observation_space
    return envs if flat else gym.wrappers.vector.FlattenObservation(envs)


def check_finite(what, x):
    """Refuse to continue unless every number in x, however nested, is finite.

    Integers are; to sum those of an image buffer, torch would need eight times its memory.
    """
    for part in x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ():
        check_finite(what, part)
    if "float" in str(getattr(x, "dtype", type(x))) and not math.isfinite(torch.as_tensor(x).sum()):
        raise Refusal(f"not finite (nan or inf), so no checkpoint is written: {what}")


def make_env(args, video=""):
    """Make the environment. Observations are flat, or images; Atari is preprocessed as for DQN.

    With --capture-video it records its episodes to the folder video, if one is given.
    """
    args.__post_init__()  # again: options may have been set since
    atari = args.env_id.startswith(("ALE/", "ale_py:"))
    try:
        drawn = {"render_mode": "rgb_array"} if args.capture_video and __import__("moviepy") else {}
        kwargs = dict({"frameskip": 1} if atari else {}, **json.loads(args.env_kwargs))
        env = gym.make("ale_py:" * atari + args.env_id.removeprefix("ale_py:"), **kwargs, **drawn)
        if atari:  # 84 x 84, grey, every fourth frame, the last four of them
            env = gym.wrappers.FrameStackObservation(gym.wrappers.AtariPreprocessing(env), 4)
        # Fail now, not after training, if there can be no video.
        if drawn and env.reset() and np.ndim(env.render_mode and env.render()) != 3:
            raise ValueError(drawn)
    except Exception as error:
        raise Refusal(f"{args.env_id}: {type(error).__name__} {error} {args.env_kwargs}") from error
    space = env.observation_space
    image = re.search(r"\(\d+, \d+, \d+\), (uint8|bool)\)", str(space))  # is or holds one
    known = IMAGES and isinstance(space, gym.spaces.Box) if image else space.is_np_flattenable
    if not known or not isinstance(env.action_space, ACTION_SPACES):
        raise Refusal(f"cannot learn {args.env_id}: actions {env.action_space}, observed {space}")
    env = env if image else gym.wrappers.FlattenObservation(env)
    return gym.wrappers.RecordVideo(env, video, lambda _: True) if drawn and video else env


def load(path, learner):
    """Load the checkpoint at path into learner; return its options and number of steps."""
    try:
        checkpoint = torch.load(path, "cpu", weights_only=True, mmap=True)
        if checkpoint["script"] != SCRIPT:
            raise Refusal(f"it was written by {checkpoint['script']}.py")
        for name, part in learner.items():
            part.load_state_dict(checkpoint[name])
        return Args(**checkpoint["args"]), checkpoint["env_steps"]
    except Exception as error:
        why = error if isinstance(error, OSError | Refusal) else "damaged, or it has other options"
        raise Refusal(f"cannot load {path}: {why}") from error


class Run(AbstractContextManager):
    """A run: its directory, random generators, log, evaluations and checkpoints.

    `episodes` holds (return, length) of the last 100 episodes, `learner` what a checkpoint saves.
    An exception saves the run before it ends, but for a number that is not finite. The command line
    turns Ctrl-C, SIGTERM and SIGHUP into exceptions.
    """

    def __init__(self, args, rank=0, **learner):
        self.args, self.rank, self.learner, self.episodes = args, rank, learner, deque(maxlen=100)
        self.step = load(args.resume, learner)[1] if args.resume else 0
        self.next_save = 0 if args.checkpoint_every else math.inf  # in seconds since the epoch
        self.seed()
        new = f"runs/{args.env_id}__{SCRIPT}__{args.seed}__{time.time():.6f}"
        self.dir = args.run_dir or args.resume and os.path.abspath(f"{args.resume}/..") or new
        path = os.path.abspath(f"{self.dir}/checkpoint.pt")
        if os.path.exists(path) and path != os.path.abspath(args.resume):
            raise Refusal(f"--run-dir {self.dir} holds a checkpoint: resume it, or take another")
        try:
            self.dir += f"__rank{rank}" if rank else ""
            os.makedirs(self.dir, exist_ok=self.dir != new)
            self.writer = SummaryWriter(self.dir, purge_step=self.step + 1, flush_secs=1)
        except OSError as error:
            raise Refusal(f"--run-dir {self.dir}: {error.strerror}") from error
        self.writer.add_text("options", "\n".join(f"    {k}: {v}" for k, v in vars(args).items()))
        self.bar = tqdm(None, self.dir, args.total_timesteps, initial=self.step, disable=False)
        self.bar.mininterval = 0.1 if os.isatty(2) else 30  # seconds

    def __exit__(self, kind, error, traceback):
        with self.writer, self.bar:  # the writer closes last: it can take up to flush_secs
            # Not saved: a number that is not finite, the one Refusal raised here without a cause.
            if error and (error.__cause__ or kind is not Refusal):
                self.save()
                tqdm.write(f"saved: --resume {self.dir}/checkpoint.pt continues it", sys.stderr)

    def seed(self):
        """Seed all generators from (seed, step, rank): a resumed run draws the same numbers."""
        self.rng = np.random.default_rng([self.args.seed, self.step, self.rank + 1])
        for set_seed in random.seed, np.random.seed, torch.manual_seed:
            set_seed(int(self.rng.integers(2**32)))

    def log(self, **losses):
        """Write to the log; evaluate and save when due; seed the generators for the next steps."""
        scalars = {f"losses/{name}": torch.as_tensor(x).item() for name, x in losses.items()}
        check_finite(f"{scalars} at step {self.step}", scalars)
        scalars["charts/SPS"] = (self.step - self.bar.initial) / self.bar.format_dict["elapsed"]
        if self.episodes:
            mean_return, scalars["charts/episodic_length"] = np.mean(self.episodes, 0)
            scalars["charts/episodic_return"] = mean_return
            self.bar.set_postfix_str(f"return {mean_return:.1f}", False)
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, self.step)
        if self.args.eval_every and self.step % self.args.eval_every < self.step - self.bar.n:
            self.evaluate()
        self.bar.update(self.step - self.bar.n)
        if time.time() > self.next_save or self.step >= self.args.total_timesteps:
            self.save()
        self.seed()

    def save(self):
        """Write the checkpoint to a temporary file, then replace the last checkpoint by it."""
        began = time.time()
        checkpoint = {name: part.state_dict() for name, part in self.learner.items()}
        check_finite("weights or data", checkpoint)
        args = {name: getattr(self.args, name) for name in Args.__dataclass_fields__}
        args |= {"run_dir": "", "resume": "", "device": "cpu"}  # of this run alone
        checkpoint |= {"script": SCRIPT, "env_steps": self.step, "args": args}
        try:
            with open(f"{self.dir}/checkpoint.tmp", "wb") as file:
                torch.save(checkpoint, file)
            os.replace(f"{self.dir}/checkpoint.tmp", f"{self.dir}/checkpoint.pt")
        except (OSError, RuntimeError) as error:
            Path(f"{self.dir}/checkpoint.tmp").unlink(missing_ok=True)
            raise Refusal(f"{self.dir}: {getattr(error, 'strerror', error.__context__)}") from error
        self.next_save = time.time() + max(self.args.checkpoint_every, 10 * (time.time() - began))

    def evaluate(self):
        """Play episodes on seeds that training never uses; print and return their returns.

        Returns are not discounted. An episode is cut after 100,000 steps.
        """
        policy, returns = self.learner["policy"], np.zeros(self.args.eval_episodes)
        with make_env(self.args, f"{self.dir}/videos/{self.step}") as env:
            for episode in range(len(returns)):
                obs, _ = env.reset(seed=2**30 + (1000 * self.args.seed + episode) % 2**30)
                for _ in range(100_000):
                    check_finite("a number of the evaluation", (obs.astype(float), returns))
                    obs, reward, *ends, _ = env.step(policy.act(obs[None].copy())[0])
                    returns[episode] += reward
                    if any(ends):
                        break
            self.writer.add_scalar("charts/eval_return", returns.mean(), self.step)
            spent = f"env_steps={self.step} wall_seconds={self.bar.format_dict['elapsed']:.1f}"
            found = f"eval_return_mean={returns.mean():.2f} eval_return_std={returns.std():.2f}"
            tqdm.write(f"{found} eval_episodes={len(returns)} {spent}")
        return returns


if __name__ == "__main__":
    for n in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        if signal.getsignal(n) != signal.SIG_IGN:  # nohup ignores SIGHUP: leave it so
            # The run saves before it ends; a second signal of the same kind ends it at once.
            signal.signal(n, lambda n, _: (signal.signal(n, signal.SIG_DFL), sys.exit(128 + n)))
    try:
        args = tyro.cli(Args, description=f"{str(__doc__).splitlines()[0]} Run options come last.")
        # Options not given come from the checkpoint.
        train(tyro.cli(Args, default=load(args.resume, {})[0]) if args.resume else args)
    except Refusal as error:
        print(f"{SCRIPT}.py: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
