"""Deep Q-Network: learn the value of each action from replayed transitions; take the best action.

Derivations in the document (tests/document/README.md): "The Value-Based Approach",
"Value Iteration and Q-Learning", "Fitted Q-Iteration: Neural Networks for Value Functions",
"Innovation 1: Replay Buffer", "Innovation 2: Target Networks", "Algorithm",
"Key Hyperparameters and Design Choices", "Challenge 1: Overestimation Bias in Q-Values",
"Challenge 2: Reducing Error Compounding with N-Step Returns", "Challenge 3: Cold Start Problem",
"Challenge 4: The Limited Exploration Problem", "Practical Training Details for DQN",
"$V(s)$ is Implicitly Computed, Not Separately Stored",
"Why Advantages and Q-Values Lead to the Same Policy".

    1.  Initialise Q_θ, the target network θ_target = θ and an empty buffer D.
    2.  Take a random action with probability ε, else argmax_a Q_θ(s, a).
    3.  Store (s, a, R, s', discount) in D: R = Σ_{k<N} γ^k r_k, s' is the state after N steps, and
        discount = γ^N (1 - terminated) weighs its value. N is smaller where an episode ends.
    4.  Sample a batch from D; --utd is the number of batches for an environment step.
    5.  y = R + discount max_a Q_target(s', a)
    6.  One Adam step on θ down the gradient of the mean Huber loss of x = Q_θ(s, a) - y;
        --loss squared takes E[x²] instead.
    7.  Once every K of these steps, θ_target = (1 - τ) θ_target + τ θ.
    8.  Every 200 environment steps update the mean and deviation that normalise s. Repeat from 2.

Notation: s, a, R, s' -> obs, action, n_step_reward, next_obs for one transition. In a batch of B
transitions they are b_obs, b_next_obs -> (B, obs_dim);  b_action, b_reward, b_discount -> (B,).
Q_θ, Q_target -> q_net, target_net -> (B, A), a value for each of the A actions;  x, y -> x,
td_target -> (B,).

After a time limit (truncated) the value of s' stands for the rewards that would have followed;
after termination nothing follows.

Beyond the document: the gradient's norm is clipped, and the learning rate falls linearly. Adam
takes the gradient steps, with 1e-5 for the small number in its denominator (torch's is 1e-8). τ is
the α of the document's soft update; τ = 1 is its hard update. Some of the N rewards follow random
actions; the target does not correct for that. Observations are normalised: their running mean is
subtracted, they are divided by their running deviation and clipped to [-10, 10]. Without this, one
learning rate would not suit several tasks.

Unlike in the paper, Adam takes the place of RMSprop, the convolutions are smaller, a lost life does
not end an episode of Atari, and evaluation is greedy (with ε = 0.05 in the paper). The defaults
suit tasks of a hundred thousand steps (the paper's in brackets): N = 5 (1; the document calls 3 the
most common), ε falls to 0.05 over 20,000 steps (to 0.1 over a million), 1,000 steps of burn-in
(50,000), 100,000 transitions in the buffer (a million), B = 128 (32), 0.5 updates per environment
step (0.25), K = 500 (10,000), learning rate 1e-3 (2.5e-4).

Images (Boxes of bytes or bools with three axes, of at least 3 x 3) pass through convolutions and
a linear layer. Images are not normalised. With --clip-rewards rewards are then clipped to [-1, 1]
for learning; logs show them unclipped, except in start_return. An ALE/ id is an Atari game: its
observation is the last four grey frames of 84 x 84, an action lasts four frames, and in v5 the
game repeats the previous action with probability 1/4 (sticky actions). 100,000 transitions of
Atari take 5.3 GiB of memory.

Logged: loss and q_mean, the mean of Q_θ(s, a), are means over the updates since the last entry.
start_value is max_a Q_θ at the first observation of an episode, start_return the discounted return
that followed, random actions included; both are means over the last 100 episodes.

Paper: Mnih et al. 2015, Human-level control through deep reinforcement learning, Nature 518.
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

import copy
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
from torch import distributed as dist, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = "dqn"
LOG_EVERY = 200  # environment steps between log entries, and between updates of the normaliser
ACTION_SPACES = (gym.spaces.Discrete,)
IMAGES = True  # whether observations may be images
LIMITS = {"gamma": (0, 1), "epsilon": (0, 1), "tau": (0, 1), "delta": (1e-9, 1e9)}  # least, most


@dataclasses.dataclass
class Args:
    total_timesteps: int = 80_000  # environment steps
    burn_in: int = 1_000  # steps of random actions before the first update; at least 1
    epsilon: float = 0.05  # final value of ε, the probability of a random action; ε starts at 1
    epsilon_steps: int = 20_000  # steps after burn-in over which ε falls linearly
    gamma: float = 0.99  # γ, the discount factor; after --resume only of new transitions
    n_step: int = 5  # N, rewards that a target sums before it adds the value of the state reached
    buffer_size: int = 100_000  # transitions in the replay buffer; new ones replace the oldest
    batch_size: int = 128  # B, transitions in the batch of an update
    utd: float = 0.5  # update-to-data ratio: updates per environment step
    learning_rate: float = 1e-3  # Adam's step size
    anneal_lr: bool = True  # decrease the learning rate linearly, to 0 at --total-timesteps
    target_every: int = 500  # K: updates of Q between two of the target network; for small τ take 1
    tau: float = 1.0  # τ: the target network becomes (1 - τ) target + τ Q; 1 copies Q
    loss: Literal["huber", "squared"] = "huber"  # Huber loss (--delta) or mean squared error
    delta: float = 1.0  # δ: the Huber loss is quadratic for errors up to δ, linear beyond
    max_grad_norm: float = 10.0  # clip the gradient's norm to this; 0: do not clip
    clip_rewards: bool = True  # if observations are images, clip rewards to [-1, 1] for learning
    hidden: int = 128  # units in each of the two hidden layers; unused for images

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


def epsilon_at(step, burn_in, epsilon_steps, epsilon):
    """ε: 1 during burn-in, then it falls linearly   [Challenge 4: The Limited Exploration Problem]

    step: environment steps so far; epsilon_steps: steps that the fall takes; epsilon: final value.
    Returns ε, the probability of a random action.
    """
    fallen = min(max(step - burn_in, 0) / epsilon_steps, 1)
    return 1 + fallen * (epsilon - 1)


def epsilon_greedy(q, epsilon, rng):
    """argmax_a Q_θ(s, a), but a uniformly random action with probability ε   [Algorithm, eq. 1]

    Also [Why Advantages and Q-Values Lead to the Same Policy, eq. 2]. q Q_θ(s, ·): (A,).
    Returns the index of an action, an integer in [0, A).
    """
    return rng.integers(len(q)) if rng.random() < epsilon else q.argmax()


def n_step_return(rewards, gamma):
    """R = Σ_k γ^k r_k   [Challenge 2: Reducing Error Compounding with N-Step Returns, eq. 2]

    The sum of rewards in that equation, without the value. rewards: N numbers, r_0 first.
    Returns one number, in units of reward.
    """
    return sum(gamma**k * reward for k, reward in enumerate(rewards))


def n_step_discount(gamma, n, terminated):
    """γ^N (1 - terminated), the weight of the value of the state after N rewards

    [Challenge 2: Reducing Error Compounding with N-Step Returns, eq. 2]. The document leaves out
    1 - terminated: nothing follows a terminal state. n: N. Returns a number in [0, 1].
    """
    return gamma**n * (1 - terminated)


def updates_due(steps, burn_in, utd):
    """⌊UTD · steps after burn-in⌋   [Key Hyperparameters and Design Choices]

    Returns the total number of updates due after so many environment steps.
    """
    return math.floor(utd * max(steps - burn_in, 0))


def dqn_target(reward, discount, q_next):
    """y = R + discount max_a Q_target(s', a)
    [Challenge 1: Overestimation Bias in Q-Values, eq. 1]

    The same for one reward is [Challenge 2: Reducing Error Compounding with N-Step Returns, eq. 1],
    for N rewards eq. 2 there. [Fitted Q-Iteration: Neural Networks for Value Functions, eq. 1] has
    Q_θ in place of Q_target. reward R, discount: (B,); q_next Q_target(s', ·): (B, A).
    Returns (B,), in units of reward.
    """
    return reward + discount * q_next.max(-1).values


def squared_loss(x):
    """L = E[x²]   [Fitted Q-Iteration: Neural Networks for Value Functions, eq. 2]

    Since y is computed by the target network, also [Innovation 2: Target Networks, eq. 1] and
    [Algorithm, eq. 2].
    x = Q_θ(s, a) - y: (B,). Returns (), to be minimised, in squared units of reward.
    """
    return x.pow(2).mean()


def huber_loss(x, delta):
    """L = E[x²/2 if |x| ≤ δ else δ|x| - δ²/2]   [Practical Training Details for DQN, eq. 1]

    x = Q_θ(s, a) - y, [Practical Training Details for DQN, eq. 2]: (B,); delta δ > 0. Returns (),
    to be minimised.
    """
    return torch.where(x.abs() <= delta, x.pow(2) / 2, delta * x.abs() - delta**2 / 2).mean()


@torch.no_grad()
def soft_update(target, theta, tau):
    """θ_target ← (1 - τ) θ_target + τ θ   [Key Hyperparameters and Design Choices, eq. 1]

    target θ_target, theta θ: lists of tensors; target is changed in place.
    """
    torch._foreach_lerp_(target, theta, tau)


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


class QNetwork(nn.Sequential):
    """Q_θ(s, ·), (B, obs_dim) to (B, A): a normaliser, two layers with ReLU and a linear layer.

    For images, (B, *shape) to (B, A): a torso and a linear layer.
    """

    def __init__(self, env, hidden):
        shape, relu = env.observation_space.shape, nn.ReLU()
        if len(shape) > 1:
            super().__init__(Torso(env.observation_space), nn.Linear(256, env.action_space.n))
        else:
            first, middle = nn.Linear(*shape, hidden), nn.Linear(hidden, hidden)
            last = nn.Linear(hidden, env.action_space.n)
            super().__init__(RunningNorm(*shape), first, relu, middle, relu, last)
        self.start = env.action_space.start

    def to_env(self, action):
        """action, (...), counted from 0, as the environment numbers it, in its space's type."""
        return action.astype(self.start.dtype) + self.start

    def act(self, obs):
        """Greedy actions at obs, (n, obs_dim), numbered as in the environment, (n,)."""
        q = self(torch.as_tensor(obs).to(self[-1].weight))
        return self.to_env(q.argmax(-1).cpu().numpy())


def make_policy(env, args):
    """The policy for the spaces of env: argmax_a Q_θ(s, a)."""
    return QNetwork(env, args.hidden)


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


# Buffer -------------------------------------------------------------------------------------------


class ReplayBuffer:
    """The last `size` transitions (s, a, R, s', discount); new ones overwrite the oldest."""

    def __init__(self, size, space, action):
        obs = np.zeros(space.shape, space.dtype if space.dtype.itemsize == 1 else np.float32)
        like = obs, action, np.float32(0), obs, np.float32(0)
        need = size * sum(x.nbytes for x in like)
        if need > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            raise Refusal(f"--buffer-size {size}: {need / 2**30:,.1f} GiB exceed the memory")
        self.data = [np.zeros((size, *x.shape), x.dtype) for x in like]
        self.added = 0

    def add(self, *transition):
        """Write one transition."""
        for rows, value in zip(self.data, transition):
            rows[self.added % len(rows)] = value
        self.added += 1

    def sample(self, batch_size, rng, device):
        """Transitions drawn uniformly, with replacement: obs, ..., discount, (B, ...) each."""
        i = rng.integers(min(self.added, len(self.data[0])), size=batch_size)
        return [torch.from_numpy(rows[i]).to(device) for rows in self.data]

    def state_dict(self):
        """What a checkpoint saves: the rows written so far, without a copy."""
        return {"added": self.added, "data": [torch.from_numpy(x[: self.added]) for x in self.data]}

    def load_state_dict(self, state):
        """Restore the rows of a checkpoint; ValueError if they do not fit."""
        for rows, saved in zip(self.data, state["data"]):
            rows[: len(saved)] = saved
        self.added = state["added"] if len(saved) == len(rows) else len(saved)


# Training -----------------------------------------------------------------------------------------


def train(args: Args) -> np.ndarray:
    """Run the algorithm above; return the episode returns of the final evaluation."""
    gamma, device = args.gamma, args.device
    with ExitStack() as stack:
        # 1. Initialise.
        torch.manual_seed(args.seed)
        env = stack.enter_context(make_env(args))
        q_net = make_policy(env, args).to(device)
        target_net = copy.deepcopy(q_net)
        image = len(env.observation_space.shape) > 1
        if not image:
            target_net[0] = q_net[0]  # one normaliser for both networks
        theta, theta_target = [*q_net.parameters()], [*target_net.parameters()]
        optimizer = torch.optim.Adam(theta, eps=1e-5, fused=True)
        buffer = ReplayBuffer(args.buffer_size, env.observation_space, np.int64(0))
        learner = {"policy": q_net, "target_net": target_net, "optimizer": optimizer}
        run = stack.enter_context(Run(args, **learner, buffer=buffer))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        if not image and args.hidden**2 * args.batch_size < 2**23:
            torch.set_num_threads(1)  # for layers this small, threads cost more than they save

        # window: (obs, action) not yet stored; seen: observations that step 8 has yet to include.
        updates = updates_due(run.step, args.burn_in, args.utd)
        window, rewards, episode_return, seen = deque(), [], 0, []
        losses, pairs = [], deque(maxlen=100)  # (start_value, start_return) per episode
        obs, _ = env.reset(seed=random.getrandbits(29))
        q_values = in_numpy(q_net)
        start_value = q_values(obs).max()

        while run.step < args.total_timesteps:
            remaining = 1 - run.step / args.total_timesteps if args.anneal_lr else 1
            optimizer.param_groups[0]["lr"] = args.learning_rate * remaining

            # 2. Act.
            epsilon = epsilon_at(run.step, args.burn_in, args.epsilon_steps, args.epsilon)
            action = epsilon_greedy(q_values(obs), epsilon, run.rng)
            window.append((obs.copy(), action))  # the environment may overwrite obs
            next_obs, reward, terminated, truncated, _ = env.step(q_net.to_env(action))
            reward = float(reward)  # a sum of numpy's int8 or float16 would overflow
            check_finite("an observation or a reward", next_obs.sum(dtype=float) + reward)

            # 3. Store the transition whose N rewards are complete; when the episode ends, all left.
            rewards.append(np.clip(reward, -1, 1) if image and args.clip_rewards else reward)
            episode_return += reward
            seen.append(obs)
            ended = terminated or truncated
            while window and (ended or len(window) == args.n_step):
                n = len(window)
                n_step_reward = n_step_return(rewards[-n:], gamma)
                discount = n_step_discount(gamma, n, terminated)
                buffer.add(*window.popleft(), n_step_reward, next_obs, discount)
            obs = next_obs
            if ended:
                run.episodes.append((episode_return, len(rewards)))
                pairs.append((start_value, n_step_return(rewards, gamma)))
                obs, rewards, episode_return = env.reset()[0], [], 0
                start_value = q_values(obs).max()

            run.step += 1
            while updates < updates_due(run.step, args.burn_in, args.utd) and buffer.added:
                # 4. Sample.
                batch = buffer.sample(args.batch_size, run.rng, device)
                b_obs, b_action, b_reward, b_next_obs, b_discount = batch
                # 5. Target.
                with torch.no_grad():
                    td_target = dqn_target(b_reward, b_discount, target_net(b_next_obs.float()))
                # 6. Adam step.
                q = q_net(b_obs.float()).gather(-1, b_action.unsqueeze(-1)).squeeze(-1)
                x = q - td_target
                td_loss = huber_loss(x, args.delta) if args.loss == "huber" else squared_loss(x)
                q_net.zero_grad()
                td_loss.backward()
                nn.utils.clip_grad_norm_(theta, args.max_grad_norm or math.inf)
                optimizer.step()
                # 7. Target network.
                updates += 1
                if updates % args.target_every == 0:
                    soft_update(theta_target, theta, args.tau)
                q_values = in_numpy(q_net)  # again: for a GPU it holds a copy of the weights
                losses.append((td_loss.item(), q.mean().item()))

            if run.step % LOG_EVERY == 0 or run.step == args.total_timesteps:
                scalars = {"epsilon": epsilon}
                scalars |= zip(("loss", "q_mean"), np.mean(losses, 0)) if losses else {}
                scalars |= zip(("start_value", "start_return"), np.mean(pairs, 0)) if pairs else {}
                # 8. Statistics of the observations.
                if not image:
                    q_net[0].include(np.stack(seen))
                losses, seen = [], []
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
