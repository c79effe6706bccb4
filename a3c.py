"""Asynchronous Advantage Actor-Critic: parallel workers update shared parameters without waiting.

Derivations in the document (tests/document/README.md):
"Asynchronous Deep RL for On-Policy Learning", "The Core Problem",
"The Asynchronous Solution: Parallel Experience Collection",
"Asynchronous Advantage Actor-Critic (A3C)", "Advantage Actor-Critic (A2C)",
"The Core Actor-Critic Framework"; from earlier sections "Gaussian Policy", "Softmax Policy".

    1.  Initialise the shared parameters: θ of the policy π and φ of the critic V.
    Each worker repeats 2 to 6 until all workers together have taken --total-timesteps steps:
    2.  Copy θ, φ to the worker's own θ', φ'.
    3.  Let π_θ' act for T steps: k, or fewer if the episode ends.
    4.  Advantages A_t = G_t - V_φ'(s_t), with the return
        G_t = r_t + γ r_{t+1} + ... + γ^{T-1-t} r_{T-1} + γ^{T-t} V_φ'(s_T).
    5.  L = Σ_t [log π_θ'(a_t|s_t) A_t + c_H H(π_θ') - c_V (V_φ'(s_t) - G_t)²] / k,
        with A_t and G_t held constant.
    6.  One RMSprop step on the shared θ, φ up the gradient of L with respect to θ', φ'.

Notation: in each rollout t counts from 0.  s -> obs -> (k+1, obs_dim);  r_t -> rewards -> (k,);
a -> actions -> (T,) or (T, action_dim);  A_t, G_t -> advantages, returns -> (T,);  V_φ' -> values
-> (T+1,);  log π_θ' -> logp -> (T,).  θ', φ' -> theta;  θ, φ -> shared_theta, lists of tensors.

There are no locks. Two workers may write at once, and a worker may learn from parameters that
another has changed in the meantime, so only a run with --workers 1 is reproducible. Each worker
counts its own steps, and all stop once the sum reaches the total. The run may exceed it by up to k
steps for each worker. The optimiser's mean of squared gradients is shared too, which the paper
found more robust. A return stops where its episode ends. After a time limit (truncated) V_φ' of the
last state stands for the rewards that would have followed; after termination nothing follows.

Beyond the paper: a clip of the gradient's norm, without which some runs on Acrobot never reach the
goal; L divided by k; a weight c_V; ε = 0.1 in RMSprop, for the reason given in a2c.py; networks of
two hidden layers, which share layers only for images; orthogonal initial weights. σ is learned, one
for each action dimension; in the paper it depends on the state. The environment gets actions
clipped to its bounds, but log π_θ' is that of the action before it was clipped. Two defaults differ
from the paper's because they carry over to more tasks: k is 32 (5 in the paper), the entropy bonus
0 (0.01 in the paper). Two workers (16 in the paper) suit a machine of few cores.

Images (Boxes of bytes or bools with three axes, of at least 3 x 3) pass through convolutions
that policy and critic share; each network adds a linear layer. Images are not normalised. With
--clip-rewards rewards are then clipped to [-1, 1] for learning; logs show them unclipped. An ALE/
id is an Atari game: its observation is the last four grey frames of 84 x 84, an action lasts four
frames, and in v5 the game repeats the previous action with probability 1/4 (sticky actions).

Logged: the steps of all workers; the episodes of worker 0 alone, which is the main process, and the
losses and the entropy of its latest update. Workers are started by fork: the script runs on Linux
and macOS, not on Windows. Where torch sees a GPU, a process that has trained before cannot train
with several workers: hide the GPU by CUDA_VISIBLE_DEVICES="" before it starts.

Paper: Mnih et al. 2016, Asynchronous Methods for Deep Reinforcement Learning, arXiv 1602.01783,
algorithm S3.
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
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import distributed as dist, multiprocessing as mp, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = "a3c"
LOG_EVERY = 1_000  # environment steps of all workers
ACTION_SPACES = gym.spaces.Discrete, gym.spaces.Box
IMAGES = True  # whether observations may be images
LIMITS = {"gamma": (0, 1), "init_std": (1e-6, 1e6)}  # least and most


@dataclasses.dataclass
class Args:
    total_timesteps: int = 200_000  # environment steps of all workers together
    workers: int = 2  # number of processes, each with its own environment
    k_step: int = 32  # k, the most steps that a worker takes between its updates
    gamma: float = 0.99  # γ, the discount factor
    learning_rate: float = 7e-3  # RMSprop's step size
    anneal_lr: bool = True  # decrease the learning rate linearly, to 0 at --total-timesteps
    entropy_coef: float = 0.0  # c_H, weight of the entropy bonus
    value_coef: float = 0.5  # c_V, weight of the value loss
    max_grad_norm: float = 5.0  # clip the gradient's norm to this; 0: do not clip
    clip_rewards: bool = True  # if observations are images, clip rewards to [-1, 1] for learning
    init_std: float = 1.0  # initial σ of a Gaussian policy; 1 is half the range of an action
    hidden: int = 64  # units in each of the two hidden layers; unused for images

    env_id: str = "CartPole-v1"  # gymnasium id of the environment; module:Name-v0 imports module
    env_kwargs: str = "{}"  # its arguments in JSON; {"max_episode_steps": 200} limits episodes
    seed: int = 1  # random seed; it repeats a run only with --workers 1
    device: Literal["cpu"] = "cpu"  # the workers share the memory of the CPU
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


def k_step_advantages(rewards, values, terminated, truncated, gamma, k):
    r"""A_t = G_t - V(s_t),   G_t = r_t + γ r_{t+1} + ... + γⁿ⁻¹ r_{t+n-1} + γⁿ V(s_{t+n})

    Here n is k, or what is left of the episode or rollout; after termination there is no V.
    k = 1 is [Advantage Actor-Critic (A2C), eq. 1] and
    [How do we learn the state-dependent baseline $V^\pi(s)$?, eq. 9]; k = ∞ on whole episodes is
    [How do we learn the state-dependent baseline $V^\pi(s)$?, eq. 8].
    Each pass of the loop adds a reward to every return: with 0 rewards it is V(s_t).
    rewards, terminated, truncated: (T, ...); values, V of s_0 to s_T: (T+1, ...). Returns (T, ...),
    in units of reward: those at reset steps are meaningless, but no other advantage uses them.
    """
    returns = values.clone()
    discount = gamma * ~terminated
    for _ in range(min(k, len(rewards))):
        successor = torch.where(truncated, values[1:], returns[1:])
        returns[:-1] = rewards + discount * successor
    return (returns - values)[:-1]


def policy_gradient_loss(logp, advantages):
    """-E[log π_θ(a|s) A], whose gradient is -N/B ĝ of [The Core Actor-Critic Framework, eq. 1]

    ĝ is a mean over N trajectories, this is one over their B steps. Where trajectories are whole
    episodes, their lengths decide B.
    logp log π_θ, advantages A, constants: (B,). Returns (), to be minimised, in units of reward.
    """
    return -(logp * advantages).mean()


def value_loss(values, returns):
    r"""E[(V_φ(s_t) - G_t)²]   [How do we learn the state-dependent baseline $V^\pi(s)$?, eq. 4]

    The document's G_t is a Monte Carlo return; ours, A_t + V_φ(s_t), may bootstrap from V_φ.
    values V_φ, returns G: (B,). Returns (), to be minimised, in squared units of reward.
    """
    return nn.functional.mse_loss(values, returns)


# Networks -----------------------------------------------------------------------------------------


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
    first = [Torso(space)] if len(space.shape) > 1 else []
    discrete = isinstance(env.action_space, gym.spaces.Discrete)
    return (SoftmaxPolicy if discrete else GaussianPolicy)(env, args, *first)


# Training -----------------------------------------------------------------------------------------


def train(args: Args) -> np.ndarray:
    """Run the algorithm above; return the episode returns of the final evaluation."""
    k = args.k_step
    with ExitStack() as stack:
        # 1. Initialise. The networks hold θ', φ', of which each worker has its own copy.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # a worker is one thread
        torch.manual_seed(args.seed)
        env = stack.enter_context(make_env(args))
        policy = make_policy(env, args)
        image = len(env.observation_space.shape) > 1
        torso, head = policy if image else (nn.Identity(), policy)  # both networks share the torso
        critic = nn.Sequential(*mlp(env, args, 1, gain=1.0))
        theta = [*policy.parameters(), *critic.parameters()]
        own = [x.detach() for x in theta]  # in the same memory, without gradients
        shared_theta = [x.clone().share_memory_() for x in own]
        optimizer = torch.optim.RMSprop(shared_theta, eps=0.1, foreach=True)
        for x in shared_theta:
            x.grad = x * 0
        optimizer.step()  # gradients are 0: it only creates the means of squared gradients
        run = stack.enter_context(Run(args, policy=policy, critic=critic, optimizer=optimizer))
        torch._foreach_copy_(shared_theta, own)  # Run may have loaded a checkpoint
        for state in optimizer.state.values():
            state["square_avg"].share_memory_()
        steps = torch.zeros(args.workers, dtype=torch.int64).share_memory_()  # taken by each worker
        steps[0] = run.step  # those before the checkpoint, else 0
        main = os.getpid()

        def work(worker):
            """Act and learn as one worker; return the losses of its last update.

            Worker 0 is the main process. The others stop when it no longer exists.
            """
            run.rank = worker
            run.seed()  # each worker has its own random numbers
            args.capture_video &= not worker  # a forked process that draws can hang
            with make_env(args) as env:
                scalars = {}
                obs_type = env.observation_space.dtype if image else np.float32
                obs = np.zeros((k + 1, *env.observation_space.shape), obs_type)  # (k+1, obs_dim)
                rewards = np.zeros(k, np.float32)
                terminated, truncated = np.zeros((2, k), bool)
                episode = []  # rewards of the running episode
                obs[0], _ = env.reset(seed=random.getrandbits(29))
                pi = in_numpy(policy)
                while run.step < args.total_timesteps and (not worker or os.getppid() == main):
                    remaining = 1 - run.step / args.total_timesteps if args.anneal_lr else 1
                    optimizer.param_groups[0]["lr"] = args.learning_rate * remaining

                    # 2. Copy the parameters.
                    torch._foreach_copy_(own, shared_theta)
                    if not worker and run.step >= run.bar.n + LOG_EVERY:
                        run.log(**scalars)
                        others.join(timeout=0)  # raises here an exception of another worker

                    # 3. Act.
                    actions, t, ended = [], 0, False
                    while t < k and not ended:
                        actions.append(policy.sample(pi(obs[t][None]), run.rng))
                        outcome = env.step(policy.to_env(actions[t])[0])
                        obs[t + 1], rewards[t], terminated[t], truncated[t], _ = outcome
                        ended = terminated[t] or truncated[t]
                        t += 1
                    check_finite("an observation or a reward", (obs, rewards))
                    steps[worker] += t
                    run.step = steps.sum().item()

                    episode += rewards[:t].tolist()
                    if image and args.clip_rewards:
                        rewards.clip(-1, 1, rewards)

                    # 4. Advantages and returns.
                    rollout = np.concatenate(actions), rewards, terminated, truncated
                    a, r, *ends = (torch.from_numpy(x[:t]) for x in rollout)
                    features = torso(torch.from_numpy(obs[: t + 1]))
                    values = critic(features).squeeze(-1)  # (T+1,)
                    advantages = k_step_advantages(r, values.detach(), *ends, args.gamma, k)
                    returns = advantages + values[:-1].detach()

                    # 5. Loss, which is -L.
                    output = head(features[:-1])
                    pg_loss = policy_gradient_loss(policy.log_prob(output, a), advantages)
                    v_loss = value_loss(values[:-1], returns)
                    entropy = policy.entropy(output).mean()
                    loss = pg_loss - args.entropy_coef * entropy + args.value_coef * v_loss
                    loss *= t / k  # the mean over T steps becomes their sum, divided by k

                    # 6. RMSprop step on the shared parameters; the gradient is at the worker's own.
                    for x, gradient in zip(shared_theta, torch.autograd.grad(loss, theta)):
                        x.grad = gradient
                    nn.utils.clip_grad_norm_(shared_theta, args.max_grad_norm or math.inf)
                    optimizer.step()

                    obs[0] = obs[t]
                    if ended:
                        run.episodes.append((sum(episode), len(episode)))
                        obs[0], _ = env.reset()
                        episode = []
                    scalars = {"policy_loss": pg_loss, "value_loss": v_loss, "entropy": entropy}
                return scalars

        # Each forked process has its own copy of what is not in shared memory: networks, options
        # and random generators.
        others = mp.start_processes(
            lambda i: work(i + 1), (), args.workers - 1, False, start_method="fork"
        )
        for process in others.processes:
            stack.callback(process.kill)
            stack.callback(process.join, 2)  # seconds, if it does not end sooner
        stack.callback(steps.fill_, args.total_timesteps)  # tells the others to end
        try:
            scalars = work(0)
            while not others.join():
                pass
        except mp.ProcessRaisedException as error:
            why = str(error).partition("Refusal: ")[2]
            if why:
                raise Refusal(why)
            raise
        torch._foreach_copy_(own, shared_theta)  # the final weights, to save and evaluate
        run.step = steps.sum().item()
        if scalars:  # empty if the checkpoint already had all steps
            run.log(**scalars)
        return run.evaluate()


# Plumbing -----------------------------------------------------------------------------------------


class Refusal(Exception):
    """Something that the script refuses to do; the command line prints it in one line."""


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
