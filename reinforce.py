r"""REINFORCE: play whole trajectories, then make actions likelier in proportion to their return.

Derivations in the document (tests/document/README.md): "Rewards and Returns", "Policy-Based RL",
"REINFORCE (or Monte Carlo Policy Gradient)",
"REINFORCE (or Monte Carlo Policy Gradient) / Derivation", "Gaussian Policy", "Softmax Policy",
"Limitations", "Baseline", "How do we learn the state-dependent baseline $V^\pi(s)$?".

    1.  Initialise the policy π_θ and, for a baseline that depends on the state, the critic V_φ.
    2.  Sample N trajectories τ ~ P(τ; θ), one in each environment, each from reset to its end.
    3.  Weight w_t of a step: the return from t on, G_t = r_t + γ G_{t+1}, or R(τ) = G_0 at every t.
    4.  Subtract a baseline from w_t: 0, the mean b of R(τ), the mean b_t of w_t, or V_φ(s_t).
        Standardise the result over the batch.
    5.  One Adam step on θ up the estimate  ∇U(θ) ≈ 1/N Σ_i Σ_t ∇ log π_θ(a_t|s_t) w_t.
    6.  K Adam steps on φ down the gradient of E[(V_φ(s_t) - G_t)²].
    7.  Add the observations to the statistics that normalise them; repeat from 2.

Notation: s -> obs -> (T+1, N, obs_dim), T the longest trajectory;  a -> actions -> (T, N) or
(T, N, action_dim);  r_t, G_t -> rewards, returns -> (T, N);  w_t, before and after the baseline is
subtracted -> weights -> (T, N);  V_φ -> values -> (T+1, N);  real -> (T+1, N): whether the
trajectory has not yet ended at t.  b_... holds the B steps of all trajectories, flat, (B, ...).

An environment whose trajectory has ended plays on until all trajectories have ended. Those extra
steps count towards --total-timesteps, but nothing is learned from them. Where a time limit
(truncated) or --max-steps cuts a trajectory, V_φ of the last state stands for the rewards that
would have followed. With the other baselines V_φ is not used, and the cut return is left as it is.

Bias of the baselines: the means b and b_t contain the very return from which they are subtracted,
and so shrink the expected gradient. Let g be the expected gradient without a baseline. With b_t, or
with R(τ) as the weight and either mean, it becomes (N-1)/N g, whatever the lengths of the
trajectories. With b and G_t it becomes g - 1/N ∇E[R(τ)], which is the same if γ = 1. V_φ is the
baseline of a batch before it is fitted to it, and leaves g as it is. With G_t and γ < 1, g itself
lacks the factor γ^t of the exact gradient, as is usual.

Beyond the document: --standardize subtracts the mean of the batch's weights and divides by their
standard deviation, so it also rescales the gradient. Weights that are all alike become 0, as R(τ)
of a single trajectory, which needs --no-standardize. Adam takes the gradient steps, with ε = 1e-5
(torch's is 1e-8), as in ppo.py. Learning rates fall linearly. Initial weights are orthogonal. The
environment gets actions clipped to its bounds, but log π_θ is that of the action before it was
clipped. With --norm-obs the running mean is subtracted from observations; they are divided by their
running standard deviation and clipped to [-10, 10].

Under torchrun each process gets an equal part of the environments. Gradients of θ are averaged, as
all processes have equally many trajectories; gradients of φ are weighted by the steps of each
process. Each process takes b, b_t and the statistics of --standardize from its own trajectories;
their number is then the N of (N-1)/N.

Logged: value_loss is the mean over the K steps of the latest update; entropy is that of the policy
which played the latest trajectories.

Paper: Williams 1992, Simple Statistical Gradient-Following Algorithms for Connectionist
Reinforcement Learning, Machine Learning 8.
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
from contextlib import AbstractContextManager, ExitStack, closing, redirect_stdout
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import distributed as dist, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = "reinforce"
ACTION_SPACES = gym.spaces.Discrete, gym.spaces.Box
IMAGES = False  # whether observations may be images
LIMITS = {"gamma": (0, 1), "init_std": (1e-6, 1e6)}  # least and most


@dataclasses.dataclass
class Args:
    total_timesteps: int = 150_000  # environment steps, over all environments and processes
    num_envs: int = 16  # N, trajectories in an update, shared out among torchrun's processes
    max_steps: int = 10_000  # cut a trajectory after so many steps, as a time limit does
    weight: Literal["to-go", "trajectory"] = "to-go"  # of a step: return from it on, or full return
    baseline: Literal["none", "constant", "time", "state"] = "state"  # 0, mean, mean at t or value
    standardize: bool = True  # shift and scale a batch's weights to mean 0, standard deviation 1
    gamma: float = 0.99  # γ, the discount factor
    learning_rate: float = 1e-2  # α, Adam's step size for the policy
    anneal_lr: bool = True  # decrease the learning rates linearly, to 0 at --total-timesteps
    value_learning_rate: float = 1e-2  # Adam's step size for the critic, if --baseline is state
    value_steps: int = 32  # K, Adam steps of the critic in an update
    value_batch: int = 256  # environment steps in the minibatch of each Adam step of the critic
    norm_obs: bool = True  # normalise observations by their running mean and standard deviation
    init_std: float = 0.5  # initial σ of a Gaussian; 1: half an action's range; kept on resume
    learn_std: bool = False  # learn σ of the Gaussian policy; in the document it is fixed
    hidden: int = 64  # units in each of the two hidden layers

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


def returns_to_go(rewards, gamma):
    """G_t = Σ_{k≥t} γ^{k-t} r_k = r_t + γ G_{t+1}   [Rewards and Returns, eq. 3]

    With γ = 1 it is [REINFORCE (or Monte Carlo Policy Gradient) / Derivation, eq. 10] and
    [Rewards and Returns, eq. 2]. r_k is the document's R_{k+1}, and G_0 is R(τ).
    rewards r: (T, N), 0 after the end of a trajectory. Returns (T, N), in units of reward.
    """
    returns = [0]  # G_T, G_{T-1}, ..., G_0
    for reward in rewards.flip(0):
        returns.append(reward + gamma * returns[-1])
    return torch.stack(returns[:0:-1])


def constant_baseline(returns):
    """b = 1/N Σ_i R(τ_i), which estimates the E[R(τ)] of [Baseline, eq. 2]

    returns G: (T, N); the first row, G_0, is R(τ). Returns (), in units of reward.
    """
    return returns[0].double().mean().float()  # exact where all are alike


def time_baseline(weights):
    """b_t = 1/N Σ_i w_t(i)   [Baseline, eq. 3]

    The mean is over all N trajectories, also those that have ended before t: with w_t = G_t they
    contribute 0, with w_t = R(τ) the same as at every t.
    weights w, G_t or R(τ): (T, N). Returns (T, 1), in units of reward.
    """
    return weights.double().mean(1, keepdim=True).float()  # exact where all are alike


def reinforce_loss(logp, weights, n):
    """L = -1/N Σ_i Σ_t log π_θ(a_t|s_t) w_t, whose gradient is minus the estimate of ∇U(θ)

    [REINFORCE (or Monte Carlo Policy Gradient) / Derivation, eq. 9] with R(τ) for w,
    [REINFORCE (or Monte Carlo Policy Gradient) / Derivation, eq. 11] with G_t, and with a baseline
    subtracted [Baseline, eq. 2], [Baseline, eq. 3] and [Baseline, eq. 5].
    logp log π_θ, weights w: (B,), all steps of the N = n trajectories. Returns (), to be minimised,
    in units of reward; only its gradient has a meaning.
    """
    return -(logp * weights).sum() / n


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


# Training -----------------------------------------------------------------------------------------


def train(args: Args) -> np.ndarray:
    """Run the algorithm above; return the episode returns of the final evaluation."""
    with ExitStack() as stack:
        rank, world, device = start_processes(stack, args.device)
        N = args.num_envs // world
        if N * world != args.num_envs:
            raise Refusal(f"--num-envs {args.num_envs} must be a multiple of the {world} processes")
        alike = args.standardize and args.weight == "trajectory" and args.baseline == "none"
        if N == 1 and (alike or args.baseline in ("constant", "time")):
            raise Refusal(f"--baseline {args.baseline} needs two trajectories in each process")

        # 1. Initialise, with the same weights in every process.
        torch.manual_seed(args.seed)
        env = stack.enter_context(make_env(args))
        envs = stack.enter_context(closing(make_envs(args, N)))
        # Before the first layer: once torch has used several threads, its process cannot fork.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        if args.hidden < 512:
            torch.set_num_threads(1)  # for layers this small, threads cost more than they save
        policy = make_policy(env, args).to(device)
        norm = [policy[0]] if args.norm_obs else []  # the same one for both networks
        critic = nn.Sequential(*norm, *mlp(env, args, 1, gain=1.0)).to(device)
        theta = [x for name, x in policy.named_parameters() if args.learn_std or name != "log_std"]
        optimizer = torch.optim.Adam(theta, eps=1e-5, fused=True)
        critic_optimizer = torch.optim.Adam(critic.parameters(), eps=1e-5, fused=True)
        learner = {"policy": policy, "critic": critic, "optimizer": optimizer}
        run = stack.enter_context(Run(args, rank, **learner, critic_optimizer=critic_optimizer))

        while run.step < args.total_timesteps:
            remaining = 1 - run.step / args.total_timesteps if args.anneal_lr else 1
            optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
            critic_optimizer.param_groups[0]["lr"] = args.value_learning_rate * remaining

            # 2. Sample trajectories. An environment whose trajectory has ended plays on until all
            # have ended; real is False there.
            obs = [np.array(envs.reset(seed=random.getrandbits(29))[0], np.float32)]
            actions, rewards, cut, real = [], [], [], [np.ones(N, bool)]
            pi, resets, simulated = in_numpy(policy), np.zeros(N, bool), 0
            while real[-1].any():
                actions.append(policy.sample(pi(obs[-1]), run.rng))  # (N,) or (N, action_dim)
                next_obs, reward, terminated, truncated, _ = envs.step(policy.to_env(actions[-1]))
                obs.append(np.array(next_obs, np.float32))
                rewards.append(np.array(reward * real[-1], np.float32))
                simulated += N - resets.sum().item()
                resets = terminated | truncated  # the next step of these only resets them
                real.append(real[-1] & ~resets & (len(actions) < args.max_steps))
                cut.append(real[-2] & ~real[-1] & ~terminated)  # ended without termination
            rows = obs, actions, rewards, cut, real
            obs, actions, rewards, cut, real = (torch.from_numpy(np.stack(x)) for x in rows)
            check_finite("an observation or a reward", (obs, rewards))
            run.episodes.extend(zip(rewards.sum(0).tolist(), real.sum(0).tolist()))

            # 3. Weights. V_φ of all observations is computed in one pass.
            if args.baseline == "state":
                with torch.no_grad():
                    values = critic(obs.to(device)).squeeze(-1).cpu()  # (T+1, N)
                rewards = rewards + args.gamma * cut * values[1:]
            returns = returns_to_go(rewards, args.gamma)
            weights = returns if args.weight == "to-go" else returns[0].expand_as(returns)

            # 4. Subtract the baseline and standardise.
            if args.baseline == "constant":
                weights = weights - constant_baseline(returns)
            elif args.baseline == "time":
                weights = weights - time_baseline(weights)
            elif args.baseline == "state":
                weights = weights - values[:-1]
            rows = obs[:-1], actions, weights, returns
            b_obs, b_actions, b_weights, b_returns = (x[real[:-1]].to(device) for x in rows)
            if args.standardize:
                std, mean = torch.std_mean(b_weights, correction=0)
                b_weights = (b_weights - mean) / (std + 1e-8)
            steps, total = all_sum(torch.tensor([simulated, len(b_obs)])).tolist()
            share = len(b_obs) / total  # this process's part of the gradient of φ

            # 5. Adam step on θ.
            output = policy(b_obs)
            loss = reinforce_loss(policy.log_prob(output, b_actions), b_weights, N)
            scalars = {"policy_loss": loss, "entropy": policy.entropy(output).mean()}
            policy.zero_grad()
            loss.backward(inputs=theta)
            all_sum(*(x.grad for x in theta), weight=1 / world)
            optimizer.step()

            # 6. Adam steps on φ.
            if args.baseline == "state":
                losses = []
                for _ in range(args.value_steps):
                    i = torch.randint(len(b_obs), (args.value_batch,), device=device)
                    v_loss = value_loss(critic(b_obs[i]).squeeze(-1), b_returns[i])
                    critic.zero_grad()
                    v_loss.backward()
                    all_sum(*(x.grad for x in critic.parameters()), weight=share)
                    critic_optimizer.step()
                    losses.append(v_loss.detach())
                scalars["value_loss"] = torch.stack(losses).mean()

            # 7. Statistics of the observations, for the next trajectories.
            if args.norm_obs:
                policy[0].include(b_obs)

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
