r"""Advantage-Weighted Regression: imitate the actions of a replay buffer, the better the more.

Derivations: "The Performance Difference Lemma", "The Optimization Problem",
"Advantage Weighted Regression (AWR)", "How Do We Actually Use This Oracle Solution?",
"The Practical AWR Algorithm", "Why AWR is Off-Policy", "The Role of Temperature $\alpha$".

    1.  Initialise the policy π_θ, the critic V_φ and an empty buffer D.
    2.  Let π_θ act for T steps in each of N environments; keep the trajectories in D, whose
        policy μ is the mixture of all that acted.
    3.  Update the running statistics of the observations, until they have seen enough.
    4.  TD(λ) returns G of all of D, with the present V_φ.
    5.  Critic: steps on φ down the gradient of  E_D[(V_φ(s) - G)²]
    6.  TD(λ) returns again, with the new V_φ, and advantages A^μ = G - V_φ, standardised.
    7.  w = min(exp(A^μ / α), w_max)
    8.  Actor: steps on θ up the gradient of  E_D[w log π_θ(a|s)] - penalty;  repeat from 2.

Notation: D -> buffer: K rollouts, each a column of segments;  s -> obs -> (T+1, K, N, obs_dim);
a -> actions -> (T, K, N) or (T, K, N, action_dim);  r, A^μ -> rewards, advantages -> (T, K, N);
V_φ -> values -> (T+1, K, N).  b_...: the real steps of D, flat: G, w -> b_returns, b_weights ->
(B,).  Of a minibatch: log π_θ -> logp.

Beyond the document, from the paper and its code: TD(λ), clipped weights, standardised advantages
(the code, with α = 1; the paper's text has them raw, with α = 0.05), observations normalised by
statistics that are frozen in the end, a critic whose output is multiplied by 1/(1 - γ), a fixed σ,
penalties on mean actions out of bounds and on large logits. Adam in place of SGD with momentum,
which --optimizer sgd brings back. Segments end with their rollout, where V_φ(s_T) takes over, as it
does at a time limit (truncated); only terminated ends the value. --data trains without acting.

Paper: Peng et al. 2019, Advantage-Weighted Regression, arXiv 1910.00177.
"""

import math
import os
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.adam import adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = "awr"
ACTION_SPACES = (gym.spaces.Discrete, gym.spaces.Box)
LIMITS = {"gamma": (0, 0.99999), "gae_lambda": (0, 1), "alpha": (1e-6, 1e18)}


@dataclass
class Args:
    total_timesteps: int = 80_000  # environment steps; with --data, N T are counted an iteration
    num_envs: int = 16  # N, environments
    num_steps: int = 128  # T, steps of each environment between updates
    buffer_size: int = 50_000  # transitions kept, in whole rollouts of N T
    data: str = ""  # a checkpoint whose buffer is learned from, without acting
    critic_steps: int = 200  # steps on φ in an iteration
    actor_steps: int = 1_000  # steps on θ in an iteration
    batch_size: int = 256  # transitions in a step
    alpha: float = 1.0  # α, the temperature, in deviations of A^μ, or in its units if that is raw
    norm_advantages: bool = True  # standardise A^μ over the buffer; raw it wants another --alpha
    max_weight: float = 20.0  # w_max, where weights are clipped
    gamma: float = 0.99  # γ, the discount
    gae_lambda: float = 0.95  # λ: 0 is the one-step return, 1 the Monte Carlo one
    optimizer: Literal["adam", "sgd"] = "adam"  # sgd is with momentum 0.9, other step sizes then
    actor_learning_rate: float = 3e-4  # step size on θ; published for sgd: 5e-4 to 2.5e-5
    critic_learning_rate: float = 1e-3  # step size on φ; published for sgd: 1e-2
    bound_penalty: float = 10.0  # weight of the squared excess of mean actions over their bounds
    logit_penalty: float = 1e-3  # weight of the squared logits
    norm_obs: bool = True  # normalise observations by their running mean and variance
    norm_steps: int = 100_000  # observations after which these stay as they are
    init_std: float = 0.4  # σ of the Gaussian policy, always, 1 being half the action's range
    hidden: int = 64  # units in each of the two hidden layers

    env_id: str = "CartPole-v1"  # gymnasium id; module:Name-v0 imports module first
    seed: int = 1  # same seed, same machine: same weights, bit for bit
    device: Literal["cpu", "cuda"] = "cpu"  # where networks and rollouts are kept
    run_dir: str = ""  # default: runs/<env-id>__<script>__<seed>__<time>
    eval_episodes: int = 20  # episodes in each evaluation, greedy or mean action
    eval_every: int = 0  # also evaluate every so many steps; 0: only at the end
    capture_video: bool = False  # record the evaluation episodes to <run-dir>/videos
    checkpoint_every: int = 50_000  # steps between checkpoints; 0: only at the end
    resume: str = ""  # checkpoint to continue from, its options being the defaults


# Networks -----------------------------------------------------------------------------------------


class RunningNorm(nn.Module):
    """Normalise by the running mean and variance of what update was given; clip to [-10, 10]."""

    def __init__(self, *shape: int):
        super().__init__()
        self.count = nn.Buffer(torch.zeros((), dtype=torch.float64))
        self.mean, self.var = nn.Buffer(torch.zeros(shape)), nn.Buffer(torch.ones(shape))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Fold in x, (B, *shape): its sums around the present mean, averaged over processes."""
        deviation = x.double() - self.mean
        n, first, second = self.count.new_tensor(len(x)), deviation.sum(0), deviation.pow(2).sum(0)
        n, first, second = all_mean(n), all_mean(first), all_mean(second)
        total, shift = self.count + n, first / (self.count + n)
        self.var.copy_(((self.count * self.var + second) / total - shift**2).clamp(min=0))
        self.mean += shift
        self.count += n

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10, 10)

    def in_numpy(self):
        """forward, with the present statistics, as a function of arrays."""
        mean, std = self.mean.cpu().numpy(), (self.var + 1e-8).sqrt().cpu().numpy()
        return lambda x: ((x - mean) / std).clip(-10, 10)


class MLP(nn.Module):
    """norm, two tanh layers, a linear one; orthogonal weights, those of the last times gain."""

    def __init__(self, norm: nn.Module | None, inputs: int, hidden: int, outputs: int, gain: float):
        super().__init__()
        layers = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, outputs)
        self.norm, self.layers = norm, nn.ModuleList(layers)
        for layer, scale in zip(layers, (math.sqrt(2), math.sqrt(2), gain), strict=True):
            nn.init.orthogonal_(layer.weight, scale)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        first, second, last = self.layers
        return last(second(first(self.norm(x) if self.norm else x).tanh()).tanh())

    def in_numpy(self):
        """forward, with the present weights, of arrays: for few rows a quarter of torch's time."""
        norm = self.norm.in_numpy() if self.norm else np.asarray
        arrays = (x.detach().cpu().numpy().T for x in self.layers.parameters())
        w_1, b_1, w_2, b_2, w_3, b_3 = arrays
        return lambda x: np.tanh(np.tanh(norm(x) @ w_1 + b_1) @ w_2 + b_2) @ w_3 + b_3


class SoftmaxPolicy(MLP):
    """π_θ(a|s) = softmax of h_θ(s, ·), over a Discrete space."""

    def __init__(self, norm, obs_dim: int, space: gym.spaces.Discrete, hidden: int):
        super().__init__(norm, obs_dim, hidden, int(space.n), gain=0.01)
        self.space = space

    def actor(self):
        """a = argmax_b h_θ(s, b) + noise, which is a ~ π_θ(·|s); without noise greedy. (...)."""
        logits = self.in_numpy()
        return lambda obs, noise=0.0: (logits(obs) + noise).argmax(-1)

    def noise(self, *shape: int) -> np.ndarray:
        """Gumbel noise, (*shape, A)."""
        return -torch.empty(*shape, int(self.space.n)).exponential_().log().numpy()

    def log_prob(self, logits: Tensor, action: Tensor) -> Tensor:
        """log π_θ(a|s), (...)."""
        return softmax_log_prob(logits, action)

    def entropy(self, logits: Tensor) -> Tensor:
        """H(π_θ(·|s)), (...)."""
        return softmax_entropy(logits)

    def to_env(self, action: np.ndarray) -> np.ndarray:
        """What the environments take for action, (N,)."""
        return action + self.space.start


class GaussianPolicy(MLP):
    """π_θ(a|s) = N(a | m_θ(s), diag σ²) over a Box, its bounded dimensions scaled to [-1, 1].

    m_θ is the document's μ_θ, whose letter is the behaviour policy's here.
    """

    def __init__(self, norm, obs_dim: int, space: gym.spaces.Box, hidden: int, std: float):
        bounded = np.maximum(np.abs(space.low), np.abs(space.high)) < 1e9
        low, high = np.where(bounded, space.low, -1), np.where(bounded, space.high, 1)
        super().__init__(norm, obs_dim, hidden, low.size, gain=0.01)
        self.space, self.scale, self.shift = space, (high - low) / 2, (high + low) / 2
        self.log_std = nn.Parameter(torch.full((low.size,), std).log())

    def actor(self):
        """a = m_θ(s) + σ noise, not clipped to the bounds; without noise the mean. (..., d)."""
        mean, std = self.in_numpy(), self.log_std.detach().exp().cpu().numpy()
        return lambda obs, noise=0.0: mean(obs) + std * noise

    def noise(self, *shape: int) -> np.ndarray:
        """Normal noise, (*shape, d)."""
        return torch.randn(*shape, len(self.log_std)).numpy()

    def log_prob(self, mean: Tensor, action: Tensor) -> Tensor:
        """log π_θ(a|s), (...)."""
        return gaussian_log_prob(mean, self.log_std, action)

    def entropy(self, mean: Tensor) -> Tensor:
        """H(π_θ(·|s)), the same for all s, ()."""
        return gaussian_entropy(self.log_std)

    def to_env(self, action: np.ndarray) -> np.ndarray:
        """What the environments take for action: in their units, within bounds, (N, *shape)."""
        action = action.reshape(-1, *self.space.shape) * self.scale + self.shift
        return action.clip(self.space.low, self.space.high).astype(self.space.dtype)


def make_policy(envs: gym.vector.VectorEnv, args: Args) -> nn.Module:
    """The policy for the spaces of envs."""
    obs_dim, space = envs.single_observation_space.shape[0], envs.single_action_space
    norm = RunningNorm(obs_dim) if args.norm_obs else None
    if isinstance(space, gym.spaces.Discrete):
        return SoftmaxPolicy(norm, obs_dim, space, args.hidden)
    return GaussianPolicy(norm, obs_dim, space, args.hidden, args.init_std)


def as_vector(net: nn.Module) -> Tensor:
    """The parameters of net as one vector, of which they become views."""
    parameters = list(net.parameters())
    theta = parameters_to_vector(parameters).detach()
    vector_to_parameters(theta, parameters)
    return theta


class Adam(nn.Module):
    """torch's Adam on one vector θ, changed in place, with its state in buffers.

    torch.optim.Adam is the same, but takes a second to import and three times as long a step.
    """

    def __init__(self, theta: Tensor):
        super().__init__()
        self.theta, self.steps = theta, nn.Buffer(torch.zeros((), device=theta.device))
        self.m, self.v = nn.Buffer(torch.zeros_like(theta)), nn.Buffer(torch.zeros_like(theta))

    def step(self, gradient: Tensor, learning_rate: float) -> None:
        state = [self.m], [self.v], [], [self.steps]
        options = {"lr": learning_rate, "beta1": 0.9, "beta2": 0.999, "eps": 1e-5}
        options |= {"amsgrad": False, "maximize": False, "weight_decay": 0.0}
        adam([self.theta], [gradient], *state, fused=not torch.compiler.is_compiling(), **options)


class Momentum(nn.Module):
    """Gradient descent with momentum 0.9 on one vector θ, changed in place."""

    def __init__(self, theta: Tensor):
        super().__init__()
        self.theta, self.velocity = theta, nn.Buffer(torch.zeros_like(theta))

    def step(self, gradient: Tensor, learning_rate: float) -> None:
        self.velocity.mul_(0.9).add_(gradient)
        self.theta.sub_(self.velocity, alpha=learning_rate)


# Buffer -------------------------------------------------------------------------------------------


class TrajectoryBuffer:
    """The last K rollouts of T steps in N environments, of each quantity (T or T+1, K, N, ...).

    obs[t + 1] is the true successor of obs[t], also where an episode ended. The step after an end
    is the reset step: its action was ignored, its reward is 0, and valid is False there.
    """

    def __init__(self, T: int, K: int, N: int, obs: np.ndarray, action: np.ndarray):
        like = obs, action, np.float32(0), np.False_, np.False_, np.False_
        lengths = T + 1, T, T, T, T, T + 1
        needed = K * N * sum(t * x.nbytes for t, x in zip(lengths, like, strict=True)) / 2**30
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        if needed > 0.8 * memory:
            stop(f"--buffer-size needs {needed:.1f} GiB of the {memory:.1f} there are")
        shapes = ((t, K, N, *x.shape) for t, x in zip(lengths, like, strict=True))
        self.data = [np.zeros(s, x.dtype) for s, x in zip(shapes, like, strict=True)]
        self.added, self.size = 0, K

    def next(self) -> list[np.ndarray]:
        """Where to write the next rollout, over the oldest one when full: (T or T+1, N, ...)."""
        self.added += 1
        return [x[:, (self.added - 1) % self.size] for x in self.data]

    def filled(self) -> list[np.ndarray]:
        """The rollouts so far: obs, actions, rewards, terminated, truncated, valid."""
        return [x[:, : self.added] for x in self.data]

    def state_dict(self) -> dict:
        """What a checkpoint holds: the rollouts so far."""
        return {"added": self.added, "data": [torch.from_numpy(x).clone() for x in self.filled()]}

    def load_state_dict(self, state: dict) -> None:
        """Take the rollouts of a checkpoint; ValueError where they do not fit."""
        self.added = state["added"]
        for x, saved in zip(self.filled(), state["data"], strict=True):
            if x.shape != saved.shape:
                raise ValueError(f"its buffer is of {tuple(saved.shape)}, not of {x.shape}")
            x[:] = saved


def minibatches(batch: list[Tensor], size: int, steps: int):
    """steps minibatches of size rows: pass after pass over batch, each in a new order."""
    in_pass = max(len(batch[0]) // size, 1)
    while steps > 0:
        order = torch.randperm(len(batch[0]), device=batch[0].device)[: in_pass * size]
        yield from islice(zip(*(x[order].split(size) for x in batch)), steps)
        steps -= in_pass


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


def running_sums(x, keep, start):
    """y_t = x_t + keep_t y_{t-1}

    With rewards for x and γ for keep, but 0 on reset steps, the discounted return so far, which
    looks back where that of [Rewards and Returns] looks ahead; γ = 1 ends as the episode's return.
    x, keep: (T, ...); start, y before them: (...). Returns (T, ...), in units of x.
    """
    sums, keep, span = x.clone(), keep.clone(), 1
    sums[0] += keep[0] * start
    while span < len(sums):  # y_t holds what the last span steps add to it, and span doubles
        sums[span:] = torch.addcmul(sums[span:], keep[span:], sums[:-span])
        keep[span:] = keep[span:] * keep[:-span]
        span *= 2
    return sums


def gae(rewards, values, terminated, truncated, gamma, gae_lambda):
    """A_t = δ_t + γλ (1 - ended_t) A_{t+1},   δ_t = r_t + γ (1 - terminated_t) V(s_{t+1}) - V(s_t)

    [Review: Actor-Critic and the Advantage Function, eq. 2] and Schulman et al. 2016, eq. 16.
    Both kinds of end cut the trace, terminated alone the value of the successor.
    rewards, terminated, truncated: (T, N); values, V of s_0 to s_T: (T+1, N). Returns (T, N), in
    units of reward: those of reset steps are meaningless, and no other advantage reads them.
    """
    deltas = rewards + gamma * ~terminated * values[1:] - values[:-1]
    traces = gamma * gae_lambda * ~(terminated | truncated)
    return running_sums(deltas.flip(0), traces.flip(0), torch.zeros_like(deltas[0])).flip(0)


def value_loss(values, returns):
    r"""E[(V_φ(s_t) - G_t)²]   [How do we learn the state-dependent baseline $V^\pi(s)$?, eq. 4]

    values V_φ, returns G: (B,). Returns (), to be minimised, in squared units of reward.
    """
    return nn.functional.mse_loss(values, returns)


def advantage_weights(advantages, alpha, max_weight):
    """w = min(exp(A^μ / α), w_max)   [Advantage Weighted Regression (AWR), eq. 3]

    Times μ(a|s), and not clipped, this is π*(a|s) but for its normalisation.
    advantages A^μ: (B,); alpha α > 0, in their units. Returns (B,), in (0, w_max].
    """
    return (advantages / alpha).exp().clamp(max=max_weight)


def weighted_log_likelihood(weights, logp):
    """E_D[w log π_θ(a|s)]   [The Practical AWR Algorithm, eq. 1]

    With a ~ μ in D, this is [How Do We Actually Use This Oracle Solution?, eq. 1].
    weights w, logp log π_θ: (B,). Returns (), to be maximised.
    """
    return (weights * logp).mean()


def excess_penalty(output, limit):
    """E[‖x - clip(x, -b, b)‖²], beyond the document, of what [The Practical AWR Algorithm] fits

    output x, mean actions or logits: (B, d); limit b ≥ 0: (d,), 0 for logits. Returns (), to be
    minimised.
    """
    return (output - output.clamp(-limit, limit)).pow(2).sum(-1).mean()


def effective_sample_size(weights):
    r"""(Σw)² / (n Σw²), which falls as α does   [The Role of Temperature $\alpha$]

    weights w: (n,). Returns (), from 1/n, where one sample has all the weight, to 1, where all w
    are equal.
    """
    return weights.sum() ** 2 / (len(weights) * weights.pow(2).sum())


# Training -----------------------------------------------------------------------------------------


def train(args: Args) -> np.ndarray:
    """Run the algorithm above; return the episode returns of the final evaluation."""
    check(args)
    T, N, device, gamma = args.num_steps, args.num_envs, args.device, args.gamma
    if N * T > args.buffer_size:
        stop(f"--buffer-size {args.buffer_size} is less than one rollout, {N * T}")

    # 1. Initialise.
    if args.hidden**2 * args.batch_size < 2**23:
        torch.set_num_threads(1)  # layers this small lose more to threads than they gain
    torch.manual_seed(args.seed)
    envs = make_envs(args.env_id, N)
    obs_dim, space = envs.single_observation_space.shape[0], envs.single_action_space
    policy = make_policy(envs, args).to(device)
    critic = MLP(policy.norm, obs_dim, args.hidden, 1, gain=0.01).to(device)
    theta, phi = as_vector(policy.layers), as_vector(critic.layers)  # without σ, which is fixed
    optimizer = {"adam": Adam, "sgd": Momentum}[args.optimizer]
    actor_optimizer, critic_optimizer = optimizer(theta), optimizer(phi)
    if isinstance(space, gym.spaces.Box):
        bounded = torch.from_numpy(space.bounded_below & space.bounded_above).flatten()
        limit, penalty = torch.where(bounded, 1.0, torch.inf).to(device), args.bound_penalty
    else:
        limit, penalty = torch.zeros(int(space.n), device=device), args.logit_penalty
    last_obs, K = np.zeros((N, obs_dim), np.float32), args.buffer_size // (N * T)
    if args.data:
        T, K, N = load_checkpoint(args.data, {})["buffer"]["data"][1].shape[:3]
    buffer = TrajectoryBuffer(T, K, N, last_obs[0], policy.actor()(last_obs)[0])
    modules = {"policy": policy, "critic": critic, "buffer": buffer}
    modules |= {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer}

    def act(obs: np.ndarray) -> np.ndarray:
        return policy.to_env(policy.actor()(obs))

    run = Run(args, modules, act)
    if args.data:
        load_checkpoint(args.data, {"buffer": buffer})
        new_obs, _, _, _, _, new_valid = buffer.filled()
    else:
        last_obs, _ = envs.reset(seed=env_seed(args.seed, run.step, 0))
        last_valid, so_far = np.ones(N, np.bool_), torch.zeros(1, N, 2)
    steps = args.num_envs * args.num_steps

    while run.step < args.total_timesteps and not run.interrupted:
        if not args.data:
            # 2. Act. Nothing is computed but what the next action needs.
            rollout = buffer.next()
            new_obs, new_actions, new_rewards, new_terminated, new_truncated, new_valid = rollout
            new_obs[0], new_valid[0] = last_obs, last_valid
            pi, noise = policy.actor(), policy.noise(T, N)
            for t in range(T):
                new_actions[t] = pi(new_obs[t], noise[t])
                outcome = envs.step(policy.to_env(new_actions[t]))
                new_obs[t + 1], new_rewards[t], new_terminated[t], new_truncated[t], _ = outcome
            new_valid[1:] = ~(new_terminated | new_truncated)
            last_obs, last_valid, steps = new_obs[T], new_valid[T], int(new_valid[:T].sum())
            keep = torch.from_numpy(new_valid[:T]).float()
            gained = torch.stack([torch.from_numpy(new_rewards), keep], -1)
            so_far = running_sums(gained, keep.unsqueeze(-1), so_far[-1])
            run.episodes.extend(so_far[~new_valid[1:]].tolist())  # (return, length) of the ended

        # 3. Statistics of the observations.
        if args.norm_obs and policy.norm.count < args.norm_steps:
            policy.norm.update(torch.from_numpy(new_obs[:T][new_valid[:T]]).to(device))

        # 4. TD(λ) returns.
        data = (torch.from_numpy(x).to(device) for x in buffer.filled())
        obs, actions, rewards, terminated, truncated, valid = data
        ends, real = (terminated, truncated), valid[:T]
        with torch.no_grad():
            values = critic(obs).squeeze(-1) / (1 - gamma)
            advantages = gae(rewards, values, *ends, gamma, args.gae_lambda)
        b_obs, b_actions, b_returns = obs[:T][real], actions[real], (advantages + values[:T])[real]

        # 5. Critic.
        losses = []
        batch = b_obs, (1 - gamma) * b_returns
        for mb_obs, return_ in minibatches(batch, args.batch_size, args.critic_steps):
            loss = value_loss(critic(mb_obs).squeeze(-1), return_)
            gradient = torch.autograd.grad(loss, [*critic.layers.parameters()])
            gradient = torch.cat([g.flatten() for g in gradient])
            critic_optimizer.step(gradient, args.critic_learning_rate)
            losses.append(loss.detach())
        scalars = {"value_loss": torch.stack(losses).mean()}

        # 6. Advantages.
        with torch.no_grad():
            values = critic(obs).squeeze(-1) / (1 - gamma)
            b_advantages = gae(rewards, values, *ends, gamma, args.gae_lambda)[real]
        if args.norm_advantages:
            std, mean = torch.std_mean(b_advantages, correction=0)
            b_advantages = (b_advantages - mean) / (std + 1e-5)

        # 7. Weights.
        b_weights = advantage_weights(b_advantages, args.alpha, args.max_weight)

        # 8. Actor.
        losses, batch = [], (b_obs, b_actions, b_weights)
        for mb_obs, action, weight in minibatches(batch, args.batch_size, args.actor_steps):
            output = policy(mb_obs)
            objective = weighted_log_likelihood(weight, policy.log_prob(output, action))
            loss = penalty * excess_penalty(output, limit) - objective
            gradient = torch.autograd.grad(loss, [*policy.layers.parameters()])
            gradient = torch.cat([g.flatten() for g in gradient])
            actor_optimizer.step(gradient, args.actor_learning_rate)
            losses.append(loss.detach())
        scalars |= {"policy_loss": torch.stack(losses).mean()}

        scalars |= {"effective_sample_size": effective_sample_size(b_weights)}
        scalars |= {"weight_mean": b_weights.mean(), "weight_median": b_weights.median()}
        scalars |= {"weight_clipped": (b_weights == args.max_weight).float().mean()}
        run.update(steps, scalars | {"entropy": policy.entropy(output).mean()})
    return run.finish()


# Plumbing -----------------------------------------------------------------------------------------


def stop(message: str, status: int = 2) -> NoReturn:
    """End the program with one line on stderr."""
    print(f"{SCRIPT}.py: {message.splitlines()[0]}", file=sys.stderr)
    sys.exit(status)


def check(args: Args) -> None:
    """Stop at a number out of range; where LIMITS says nothing, sizes begin at 1, others at 0."""
    for name, value in vars(args).items():
        size = type(value) is int and name not in ("seed", "eval_every", "checkpoint_every")
        low, high = LIMITS.get(name, (int(size), 1e18))
        if isinstance(value, (int, float)) and not low <= value <= high:
            stop(f"--{name.replace('_', '-')} {value} is out of range: {low} to {high}")
    if args.device == "cuda" and not torch.cuda.is_available():
        stop("--device cuda: no GPU is available")


def all_mean(x: Tensor) -> Tensor:
    """The mean of x over torchrun's processes."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def env_seed(seed: int, step: int, rank: int) -> int:
    """Seed, below 2²⁹, of what rank begins at step: environments and random numbers."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]) >> 3


def make_envs(env_id: str, n: int, **kwargs) -> gym.vector.VectorEnv:
    """n copies of env_id, observations flat; the environment's own vector version if it has one."""
    envs = gym.make_vec(env_id, n, **kwargs)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    image = obs_space.dtype == np.uint8 and len(obs_space.shape) > 1
    if image or not obs_space.is_np_flattenable or not isinstance(action_space, ACTION_SPACES):
        names = " and ".join(space.__name__ for space in ACTION_SPACES)
        stop(f"{env_id} maps {obs_space} to {action_space}; supported: no images, {names}")
    flat = isinstance(obs_space, gym.spaces.Box) and len(obs_space.shape) == 1
    return envs if flat else gym.wrappers.vector.FlattenObservation(envs)


def load_checkpoint(path: str, modules: dict) -> dict:
    """Read what Run.save wrote, and restore modules from it."""
    try:
        checkpoint = torch.load(path, "cpu", weights_only=True)
        if checkpoint["script"] != SCRIPT:
            raise ValueError(f"it is of {checkpoint['script']}.py")
        for name, module in modules.items():
            module.load_state_dict(checkpoint[name])
        return checkpoint | {"args": Args(**checkpoint["args"])}
    except Exception as error:
        stop(f"cannot resume from {path}: {type(error).__name__}: {str(error).splitlines()[-1]}")


class Run:
    """Steps, TensorBoard, progress bar, evaluations and checkpoints; only rank 0 writes."""

    def __init__(self, args: Args, modules: dict, act, rank: int = 0, total=lambda x: x):
        self.args, self.modules, self.act, self.rank, self.total = args, modules, act, rank, total
        self.dir = args.run_dir or f"runs/{args.env_id}__{SCRIPT}__{args.seed}__{time.time():.0f}"
        self.step = 0
        if args.resume:
            self.dir = args.run_dir or os.path.dirname(args.resume) or "."
            self.step = load_checkpoint(args.resume, modules)["env_steps"]
        torch.manual_seed(env_seed(args.seed, self.step, rank))
        self.first_step, self.start_time = self.step, time.time()
        self.episodes = deque(maxlen=100)  # (return, length) of the latest
        self.writer = SummaryWriter(self.dir, purge_step=self.step + 1) if rank == 0 else None
        self.bar = tqdm(total=args.total_timesteps, initial=self.step, disable=rank > 0 or None)
        self.signalled = self.interrupted = False  # in this process; in any, as all have agreed
        signal.signal(signal.SIGINT, lambda *_: setattr(self, "signalled", True))

    def update(self, steps: int, losses: dict[str, Tensor]) -> None:
        """Add the steps of all processes; log; evaluate and save where it is time to."""
        counts = self.total(torch.tensor([steps, self.signalled], dtype=torch.float64))
        last_step, self.step = self.step, self.step + round(counts[0].item())
        self.interrupted = counts[1].item() > 0
        scalars = {f"losses/{name}": loss.item() for name, loss in losses.items()}
        if not all(map(math.isfinite, scalars.values())):
            stop(f"not finite at step {self.step}, so the last checkpoint is kept: {scalars}", 1)
        if self.rank > 0:
            return
        scalars["charts/SPS"] = (self.step - self.first_step) / (time.time() - self.start_time)
        if self.episodes:
            mean_return, scalars["charts/episodic_length"] = np.mean(self.episodes, 0)
            scalars["charts/episodic_return"] = mean_return
            self.bar.set_postfix_str(f"return {mean_return:.1f}", False)
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, self.step)
        self.bar.update(self.step - last_step)
        args = self.args
        for every, task in (args.eval_every, self.evaluate), (args.checkpoint_every, self.save):
            if every > 0 and self.step // every > last_step // every:
                task()

    def save(self) -> None:
        """Write the checkpoint aside, then put it in the place of the last one."""
        checkpoint = {name: module.state_dict() for name, module in self.modules.items()}
        checkpoint |= {"script": SCRIPT, "env_steps": self.step}
        checkpoint["args"] = vars(self.args) | {"run_dir": "", "resume": ""}
        self.writer.flush()
        torch.save(checkpoint, f"{self.dir}/checkpoint.tmp")
        os.replace(f"{self.dir}/checkpoint.tmp", f"{self.dir}/checkpoint.pt")

    def evaluate(self) -> np.ndarray:
        """Undiscounted returns of --eval-episodes whole episodes, on seeds training never sees.

        Each environment plays one: of the first to end among many, too many would be short. For a
        video they are played in turn.
        """
        env_id, episodes = self.args.env_id, self.args.eval_episodes
        if self.args.capture_video:
            options = {"name_prefix": f"step-{self.step}", "episode_trigger": lambda _: True}
            envs = make_envs(env_id, 1, render_mode="rgb_array")
            envs = gym.wrappers.vector.RecordVideo(envs, f"{self.dir}/videos", **options)
        else:
            envs = make_envs(env_id, episodes)
        returns = np.zeros(episodes)
        for first in range(0, episodes, envs.num_envs):
            obs, _ = envs.reset(seed=2**30 + env_seed(self.args.seed, 0, 0) + first)
            running = np.ones(envs.num_envs, np.bool_)
            for _ in range(100_000):  # there may be no time limit
                obs, reward, terminated, truncated, _ = envs.step(self.act(obs))
                returns[first : first + envs.num_envs] += reward * running
                running &= ~(terminated | truncated)
                if not running.any():
                    break
        envs.close()
        self.writer.add_scalar("charts/eval_return", returns.mean(), self.step)
        return returns

    def finish(self) -> np.ndarray:
        """The last checkpoint, the final evaluation and the line of results."""
        self.bar.close()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.rank > 0:
            return np.zeros(0)
        if self.step > self.first_step:
            self.save()
        if self.interrupted:
            stop(f"stopped at step {self.step}; --resume {self.dir}/checkpoint.pt goes on", 130)
        returns = self.evaluate()
        self.writer.close()
        wall = time.time() - self.start_time
        print(f"eval_return_mean={returns.mean():.2f} eval_return_std={returns.std():.2f}", end=" ")
        print(f"eval_episodes={len(returns)} env_steps={self.step} wall_seconds={wall:.1f}")
        return returns


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.resume:  # what the command line leaves out is as in the checkpoint
        args = tyro.cli(Args, default=load_checkpoint(args.resume, {})["args"])
    try:
        train(args)
    except (gym.error.Error, ImportError, OSError) as error:
        stop(f"{type(error).__name__}: {error}")
