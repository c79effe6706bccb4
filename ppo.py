r"""Proximal Policy Optimization: take several steps on each batch, near the policy that acted.

Derivations in the document (tests/document/README.md): "Proximal Policy Optimization (PPO)",
"Importance Sampling", "Do We Actually Need the KL Term?", "The PPO Clip Objective",
"Problems with the Clip Objective", "The Asymmetric Clip: DAPO"; from earlier sections
"Gaussian Policy", "Softmax Policy", "Review: Actor-Critic and the Advantage Function",
"How do we learn the state-dependent baseline $V^\pi(s)$?".

    1.  Initialise the policy π_θ and the critic V_φ.
    2.  Let μ = π_θ act for T steps in each of N environments.
    3.  Advantages A^μ by generalised advantage estimation (GAE); returns G = A^μ + V_φ.
        Standardise A^μ over the batch.
    4.  K passes over the batch, each in M minibatches. For each minibatch:
    5.      r(θ) = π_θ(a|s) / μ(a|s)
    6.      L = E[min(r A^μ, clip(r, 1 - ε_low, 1 + ε_high) A^μ)],
            or with --objective kl  L = E[r A^μ] - α KL(μ ‖ π_θ)
    7.      One Adam step on θ, φ up the gradient of  L + c_H H(π_θ) - c_V E[(V_φ - G)²]
    8.      After each pass: end the passes if KL(μ ‖ π_θ) exceeds --target-kl.
    9.  Add the observations to the statistics that normalise them; repeat from 2.

Notation: s -> obs -> (T+1, N, obs_dim);  a -> actions -> (T, N) or (T, N, action_dim);
r_t, A^μ -> rewards, advantages -> (T, N);  V_φ -> values -> (T+1, N).  The step after the end of an
episode only resets the environment; all other steps are real.  b_... holds the B real steps of the
batch, flat: A^μ, G, log μ -> b_advantages, b_returns, b_logp_old -> (B,).  mb_... holds those of a
minibatch; there r(θ), log π_θ -> ratio, logp -> (B/M,).

The sum in an advantage stops where its episode ends. After a time limit (truncated), and at the end
of the T steps, V_φ of the last state stands for the rewards that would have followed; after
termination nothing follows.

Beyond the document: GAE(λ) (Schulman et al. 2016, arXiv 1506.02438), which for λ = 0 gives the
document's one-step advantage; standardised advantages; an entropy bonus; --target-kl; one clip of
the gradient's norm and one optimiser for both networks; a learning rate that falls linearly;
orthogonal initial weights. σ is learned, one for each action dimension. The environment gets
actions clipped to its bounds, but log π_θ is that of the action before it was clipped. With
--norm-obs the running mean is subtracted from observations, which are then divided by their running
standard deviation. With --norm-rewards rewards are divided by the running standard deviation of
their discounted sum so far, or by 0.01 if that is larger. Both are clipped to [-10, 10].

Adam takes the gradient steps, with 1e-5 for the small number in its denominator (torch's is 1e-8),
as is usual for PPO. Many implementations clip the value loss; this one does not. The weight α of
the KL penalty is constant, as in the document; the paper adapts it to a target KL. The defaults of
K, ε, γ and λ and the sizes of batch and minibatch, 2,048 steps and 64, are the paper's for MuJoCo.
Here 16 environments fill a batch (there one does), and the learning rate (there 3e-4) and the
initial σ (1 in the authors' code) are others, which work on more tasks.

Under torchrun each process gets an equal part of the environments and standardises the advantages
of its own. Gradients are averaged over the real steps of all processes.

Images (Boxes of bytes or bools with three axes, of at least 3 x 3) pass through convolutions
that policy and critic share; each network adds a linear layer. Images are not normalised. With
--clip-rewards rewards are then clipped to [-1, 1] for learning; logs show them unclipped. An ALE/
id is an Atari game: its observation is the last four grey frames of 84 x 84, an action lasts four
frames, and in v5 the game repeats the previous action with probability 1/4 (sticky actions).

Logged: losses are means over all minibatches of the latest batch. last_kl, last_entropy and
last_clip_fraction (the share of ratios outside the clip range) are those of the policy after its
last update, over the whole batch. Under torchrun all but last_kl are of a process's own part.

Paper: Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv 1707.06347.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "ale-py==0.12.1",
#     "gymnasium[classic-control,box2d,mujoco]==1.4.0",
#     "moviepy==2.2.1",
#     "mujoco==3.8.1",
#     "numpy==2.4.6",
#     "opencv-python-headless==5.0.0.93",
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
from contextlib import AbstractContextManager, ExitStack, redirect_stdout
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import distributed as dist, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = "ppo"
ACTION_SPACES = gym.spaces.Discrete, gym.spaces.Box
IMAGES = True  # whether observations may be images
LIMITS = {"gamma": (0, 1), "gae_lambda": (0, 1), "init_std": (1e-6, 1e6)}  # least and most


@dataclasses.dataclass
class Args:
    total_timesteps: int = 60_000  # environment steps, over all environments and processes
    num_envs: int = 16  # N, environments, shared out among torchrun's processes
    num_steps: int = 128  # T, steps of each environment between updates
    epochs: int = 10  # K, passes over each batch
    minibatches: int = 32  # M, minibatches in a pass, with one Adam step for each
    clip_low: float = 0.2  # ε_low: the ratio π_θ / μ is clipped to at least 1 - ε_low
    clip_high: float = 0.2  # ε_high: π_θ / μ is clipped to at most 1 + ε_high; larger explores more
    objective: Literal["clip", "kl"] = "clip"  # clip: clip the ratio; kl: subtract α KL(μ ‖ π_θ)
    alpha: float = 1.0  # α, weight of the KL penalty if --objective is kl; 0: no penalty
    target_kl: float = 0.0  # end the passes over a batch if KL(μ ‖ π_θ) exceeds this; 0: never
    gamma: float = 0.99  # γ, the discount factor
    gae_lambda: float = 0.95  # λ of the advantages; 0: one-step, 1: Monte Carlo
    learning_rate: float = 5e-4  # Adam's step size
    anneal_lr: bool = True  # decrease the learning rate linearly, to 0 at --total-timesteps
    entropy_coef: float = 0.0  # c_H, weight of the entropy bonus
    value_coef: float = 0.5  # c_V, weight of the value loss
    max_grad_norm: float = 0.5  # clip the gradient's norm to this; 0: do not clip
    norm_obs: bool = True  # normalise observations, but not images, by running mean and deviation
    norm_rewards: bool = True  # divide rewards by the running deviation of their discounted sum
    clip_rewards: bool = True  # if observations are images, clip rewards to [-1, 1] for learning
    init_std: float = 0.4  # initial σ of a Gaussian policy; 1 is half the range of an action
    hidden: int = 64  # units in each of the two hidden layers; unused for images

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


def clipped_surrogate(ratio, advantages, clip_low, clip_high):
    """E[min(r A^μ, clip(r, 1 - ε_low, 1 + ε_high) A^μ)]   [The PPO Clip Objective, eq. 2]

    The clip range is that of [The Asymmetric Clip: DAPO, eq. 1]. In case 3 of
    [Problems with the Clip Objective], r > 1 + ε and A^μ < 0, the minimum is r A^μ, not
    (1 + ε) A^μ as the document says. This is why the gradient is not zero there.
    ratio r(θ), advantages A^μ: (B,). Returns (), to be maximised.
    """
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.min(ratio * advantages, clipped * advantages).mean()


def penalized_surrogate(ratio, advantages, kl, alpha):
    """E[r A^μ] - α KL(μ ‖ π_θ), whose gradient is [Importance Sampling, eq. 4]

    ratio r(θ), advantages A^μ: (B,); kl: (). Returns (), to be maximised.
    """
    return (ratio * advantages).mean() - alpha * kl


def kl_divergence(logp_old, logp):
    """KL(μ ‖ π_θ) = E_μ[log μ(a|s) - log π_θ(a|s)]   [Importance Sampling, eq. 5]

    logp_old log μ, logp log π_θ: (B,), of actions a ~ μ. Returns (), in nats. This estimate from
    samples can be negative. Its gradient is [Importance Sampling, eq. 6].
    """
    return (logp_old - logp).mean()


def value_loss(values, returns):
    r"""E[(V_φ(s_t) - G_t)²]   [How do we learn the state-dependent baseline $V^\pi(s)$?, eq. 4]

    The document's G_t is a Monte Carlo return; ours, A_t + V_φ(s_t), may bootstrap from V_φ.
    values V_φ, returns G: (B,). Returns (), to be minimised, in squared units of reward.
    """
    return nn.functional.mse_loss(values, returns)


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
        """Add the rows of x, (B, *shape), of all processes."""
        x = torch.as_tensor(x).to(self.count) - self.mean
        n, first, second = x.new_tensor(len(x)), x.sum(0), (x**2 - self.var).sum(0)
        all_sum(n, first, second)
        self.count += n
        shift = first / self.count
        self.var.add_(second / self.count - shift**2).clamp_(min=0)
        self.mean += shift

    def forward(self, x):
        """Normalise x, (..., *shape)."""
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10, 10)


class Torso(nn.Sequential):
    """Features of images, (..., *shape) to (..., 256): convolutions and a linear layer, with ReLU.

    The channels are the first axis where that is shorter than the last, else the last.
    """

    def __init__(self, space):
        relu = nn.ReLU()
        first, middle, last = space.shape
        layers = [nn.LazyConv2d(16, 3), relu]
        # DQN in Nature: (32, 8, 4), (64, 4, 2), (64, 3, 1) and 512
        if min(middle, max(first, last)) >= 36:
            layers = [nn.LazyConv2d(16, 8, 4), relu, nn.Conv2d(16, 32, 4, 2), relu]
        super().__init__(*layers, nn.Flatten(), nn.LazyLinear(256), relu)
        self.axis = 1 if first < last else 3  # of the channels, in a batch
        self.white = float(space.high.max())
        self(torch.zeros(1, *space.shape))  # the lazy layers learn their sizes from it

    def forward(self, x):
        """(..., *shape) to (..., 256)."""
        images = x[None].flatten(0, -4).movedim(self.axis, 1) / self.white
        return super().forward(images).view(*x.shape[:-3], -1)


def mlp(env, args, outputs, gain):
    """Two tanh layers and a linear layer; for images only the linear layer, after the torso.

    Weights are orthogonal, scaled by gain in the last layer.
    """
    shape, hidden = env.observation_space.shape, args.hidden
    sizes = [shape[0], hidden, hidden, outputs] if len(shape) == 1 else [256, outputs]
    layers = []
    for size in zip(sizes, sizes[1:]):
        layers += nn.Linear(*size), nn.Tanh()
    for layer in layers[::2]:
        nn.init.orthogonal_(layer.weight, math.sqrt(2))
        nn.init.zeros_(layer.bias)
    nn.init.orthogonal_(layers[-2].weight, gain)
    return layers[:-1]


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
    space = env.observation_space
    norm = [RunningNorm(*space.shape)] if args.norm_obs else []
    first = [Torso(space)] if len(space.shape) > 1 else norm
    discrete = isinstance(env.action_space, gym.spaces.Discrete)
    return (SoftmaxPolicy if discrete else GaussianPolicy)(env, args, *first)


# Training -----------------------------------------------------------------------------------------


def train(args: Args) -> np.ndarray:
    """Run the algorithm above; return the episode returns of the final evaluation."""
    with ExitStack() as stack:
        rank, world, device = start_processes(stack, args.device)
        T, N = args.num_steps, args.num_envs // world
        clip_low, clip_high = args.clip_low, args.clip_high
        if N * world != args.num_envs:
            raise Refusal(f"--num-envs {args.num_envs} must be a multiple of the {world} processes")
        if args.minibatches > T // 2 * N:  # at worst every second step is a reset step
            raise Refusal(f"--minibatches {args.minibatches}: {N} x {T} steps allow {T // 2 * N}")

        # 1. Initialise, with the same weights in every process.
        torch.manual_seed(args.seed)
        env = stack.enter_context(make_env(args))
        image = len(env.observation_space.shape) > 1
        # For images it copies env: a wrapper of your own must be a gym.utils.RecordConstructorArgs.
        envs = gym.make_vec(env.spec, N, "sync") if image else make_envs(args, N)
        stack.callback(envs.close)
        # Before the first layer: once torch has used several threads, its process cannot fork.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        if not image and args.hidden * N * T // args.minibatches < 2**16:
            torch.set_num_threads(1)  # for layers this small, threads cost more than they save
        policy = make_policy(env, args).to(device)
        # Both networks begin with the same normaliser or torso: it is computed once, by first.
        first, *rest = policy if args.norm_obs or image else (nn.Identity(), *policy)
        head = nn.Sequential(*rest)
        critic = nn.Sequential(*mlp(env, args, 1, gain=1.0)).to(device)
        parameters = [*policy.parameters(), *critic.parameters()]
        optimizer = torch.optim.Adam(parameters, eps=1e-5, fused=True)
        reward_norm = RunningNorm()
        learner = {"policy": policy, "critic": critic, "optimizer": optimizer}
        run = stack.enter_context(Run(args, rank, **learner, reward_norm=reward_norm))

        # obs[t + 1] is the true successor of obs[t], also where an episode ended. The step after an
        # end is the reset step: its action was ignored, and real is False there.
        obs_type = env.observation_space.dtype if image else np.float32
        obs = np.zeros((T + 1, *envs.observation_space.shape), obs_type)  # (T+1, N, obs_dim)
        rewards = np.zeros((T, N), np.float32)
        terminated, truncated = np.zeros((2, T, N), bool)
        real = np.ones((T + 1, N), bool)
        so_far = np.zeros((T, N), np.float32)  # discounted sum of an episode's rewards up to t
        episode_return, episode_length = np.zeros((2, N))
        obs[T], _ = envs.reset(seed=random.getrandbits(29))

        while run.step < args.total_timesteps:
            remaining = 1 - run.step / args.total_timesteps if args.anneal_lr else 1
            optimizer.param_groups[0]["lr"] = args.learning_rate * remaining

            # 2. μ = π_θ acts. Values and log μ are computed after the rollout, all at once.
            obs[0], real[0] = obs[T], real[T]
            mu, actions = in_numpy(policy), []
            for t in range(T):
                actions.append(policy.sample(mu(obs[t]), run.rng))  # (N,) or (N, action_dim)
                outcome = envs.step(policy.to_env(actions[t]))
                obs[t + 1], rewards[t], terminated[t], truncated[t], _ = outcome
                real[t + 1] = ~(terminated[t] | truncated[t])
                episode_return += rewards[t] * real[t]
                episode_length += real[t]
                for n in np.flatnonzero(~real[t + 1]):
                    run.episodes.append((episode_return[n], episode_length[n]))
                    episode_return[n] = episode_length[n] = 0
            check_finite("an observation or a reward", (obs, rewards))

            if image and args.clip_rewards:
                rewards.clip(-1, 1, rewards)

            # 3. Advantages and returns.
            rollout = obs, np.stack(actions), rewards, terminated, truncated, real[:T]
            s, a, r, *ends, real_steps = map(torch.from_numpy, rollout)
            if args.norm_rewards:
                for t in range(T):  # at t = 0, so_far[-1] is from the last rollout
                    so_far[t] = real[t] * rewards[t] + args.gamma * real[t] * so_far[t - 1]
                reward_norm.include(torch.from_numpy(so_far)[real_steps])
                r = (r / reward_norm.var.sqrt().clamp(min=0.01)).clamp(-10, 10)
            with torch.no_grad():
                values = critic(first(s.to(device))).squeeze(-1).cpu()  # (T+1, N)
                advantages = gae(r, values, *ends, args.gamma, args.gae_lambda)
                rows = s[:T], a, advantages, advantages + values[:T]
                b_obs, b_actions, b_advantages, b_returns = (x[real_steps].to(device) for x in rows)
                b_logp_old = policy.log_prob(policy(b_obs), b_actions)
            std, mean = torch.std_mean(b_advantages, correction=0)
            b_advantages = (b_advantages - mean) / (std + 1e-8)
            batch = b_obs, b_actions, b_logp_old, b_advantages, b_returns
            steps = all_sum(torch.tensor(len(b_obs))).item()
            share = len(b_obs) / steps  # this process's share of the real steps
            losses = []

            for epoch in range(args.epochs):
                # 4. One pass over the batch.
                order = torch.randperm(len(b_obs), device=device)
                minibatches = zip(*(x[order].tensor_split(args.minibatches) for x in batch))
                for mb_obs, mb_actions, mb_logp_old, mb_advantages, mb_returns in minibatches:
                    # 5. Importance ratio r(θ)   [Importance Sampling, eq. 3].
                    features = first(mb_obs)
                    output = head(features)
                    logp = policy.log_prob(output, mb_actions)
                    ratio = (logp - mb_logp_old).exp()
                    # 6. Objective.
                    if args.objective == "clip":
                        surrogate = clipped_surrogate(ratio, mb_advantages, clip_low, clip_high)
                    else:
                        kl = kl_divergence(mb_logp_old, logp)
                        surrogate = penalized_surrogate(ratio, mb_advantages, kl, args.alpha)
                    # 7. Adam step.
                    v_loss = value_loss(critic(features).squeeze(-1), mb_returns)
                    loss = args.value_coef * v_loss - surrogate
                    if args.entropy_coef:
                        loss = loss - args.entropy_coef * policy.entropy(output).mean()
                    optimizer.zero_grad()
                    loss.backward()
                    if world > 1:
                        all_sum(*(x.grad for x in parameters), weight=share)
                    nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
                    optimizer.step()
                    losses.append((surrogate.detach(), v_loss.detach()))
                # 8. KL of the policy after this pass, over the whole batch. The last one is logged.
                if epoch == args.epochs - 1 or args.target_kl:
                    with torch.no_grad():
                        output = policy(b_obs)
                        logp = policy.log_prob(output, b_actions)
                        kl = all_sum(kl_divergence(b_logp_old, logp), weight=share)
                    if 0 < args.target_kl < kl:
                        break

            # 9. Statistics of the observations, for the next rollout.
            if args.norm_obs and not image:
                policy[0].include(b_obs)

            # logp and output are those of the policy after its last update.
            surrogate, v_loss = torch.tensor(losses).mean(0)
            scalars = {"policy_loss": -surrogate, "value_loss": v_loss, "last_kl": kl}
            scalars["last_entropy"] = policy.entropy(output).mean()
            if args.objective == "clip":
                ratio = (logp - b_logp_old).exp()
                clipped = (ratio < 1 - clip_low) | (ratio > 1 + clip_high)
                scalars["last_clip_fraction"] = clipped.float().mean()
            run.step += steps
            run.log(**scalars)
        return run.evaluate()


# Plumbing -----------------------------------------------------------------------------------------


class Refusal(Exception):
    """Something that the script refuses to do; the command line prints it in one line."""


def start_processes(stack, device):
    """Rank, number of processes and own device; 0, 1 and device where torchrun does not run."""
    if not dist.is_torchelastic_launched():
        return 0, 1, device
    if not dist.is_initialized():
        dist.init_process_group()
    stack.enter_context(redirect_stdout(sys.stdout if dist.get_rank() == 0 else None))
    own = f"cuda:{dist.get_node_local_rank(0)}" if device == "cuda" else device
    return dist.get_rank(), dist.get_world_size(), own


def all_sum(*tensors, weight=1):
    """Sum weight times each tensor over torchrun's processes, in place; return the first."""
    if dist.is_torchelastic_launched():
        dist.all_reduce(vector := weight * nn.utils.parameters_to_vector(tensors))
        nn.utils.vector_to_parameters(vector, tensors)
    return tensors[0]


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
