"""Natural Evolution Strategy: move the mean of a search Gaussian towards fitter candidates.

Derivations in the document (tests/document/README.md): "Natural Evolutionary Strategies (NES)",
"Natural Evolutionary Strategies (NES) / Derivation".

    1.  Initialise the mean μ of the search distribution N(μ, σ²I) over the parameters θ.
    2.  Sample n candidates θ_i = μ + σ ε_i with ε_i ~ N(0, I), in pairs ±ε.
    3.  Fitness F(θ_i): the mean return of L episodes of π_θ_i.
    4.  Shape the fitnesses: keep them, standardise them, or replace them by their centred ranks.
    5.  g = 1/(nσ) Σ_i F(θ_i) ε_i - λμ, F shaped, estimates the gradient of E[F(θ)] - ½ λ|μ|².
    6.  μ ← μ + αg, or a step of Adam along g.
    7.  Update the statistics that normalise the observations; repeat from 2.

Notation: θ_i, ε_i -> theta, epsilon -> (n, d), d parameters each;  μ -> mu -> (d,);
F -> fitness -> (n,);  g -> gradient -> (d,);  λ -> weight_decay;  the document's N is n here.

All candidates act at once: each layer of their policies is one batched matrix product, in numpy on
the CPU (--device is for the search distribution). Returns are not discounted. There is no
value function, so the return of a truncated episode (cut by a time limit) is used as it is. Where
gymnasium has its own vectorised version of the environment (CartPole), an environment whose episode
has ended plays further ones until the last candidate has ended its episode. These steps count
towards --total-timesteps, but not towards any fitness.

Beyond the document, from Salimans et al.: pairs ±ε, ranks, Adam, weight decay, normalised
observations. Their Humanoid has 10,000 episodes a generation, σ = 0.02, α = 0.01 and λ = 0.25 (in
their code 0.005, beside a gradient that is not divided by σ). The defaults here are for small tasks
and few candidates: larger σ and α, λ = 0, no normaliser. Adam's eps is 1e-5 (theirs and torch's:
1e-8). Evaluation plays the policy of the mean μ.

As in the document, and unlike Wierstra et al., the gradient is the plain one and σ is fixed. The
natural gradient would be σ² times the plain one.

Under torchrun every process draws the same noise and plays its share of the candidates. Processes
exchange only fitnesses, step counts and sums of observations. The log has the episodes of the first
process.

Logged: mean and best fitness of the latest generation.

Papers: Wierstra et al. 2014, Natural Evolution Strategies; Salimans et al. 2017, Evolution
Strategies as a Scalable Alternative to Reinforcement Learning, arXiv 1703.03864.
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
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import distributed as dist, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = "nes"
ACTION_SPACES = gym.spaces.Discrete, gym.spaces.Box
IMAGES = False  # whether observations may be images
LIMITS = {"candidates": (2, 1e9), "sigma": (1e-9, 1e9), "layers": (0, 2)}  # least and most


@dataclasses.dataclass
class Args:
    total_timesteps: int = 1_000_000  # environment steps in total; the last generation is finished
    candidates: int = 24  # n, policies sampled in each generation, shared by torchrun's processes
    sigma: float = 0.3  # σ, standard deviation of the candidates in each parameter
    learning_rate: float = 0.1  # α, step size
    optimizer: Literal["sgd", "adam"] = "adam"  # rule that turns the gradient into a step of μ
    shaping: Literal["raw", "standardized", "ranks"] = "ranks"  # how fitness enters the gradient
    antithetic: bool = True  # sample candidates in pairs μ + σε, μ - σε
    weight_decay: float = 0.0  # λ, weight decay: pulls μ towards 0
    episodes: int = 1  # L, episodes that each candidate plays
    common_seeds: bool = False  # start the episodes of all candidates from the same states
    norm_obs: bool = False  # normalise observations by their running mean and standard deviation
    layers: int = 1  # number of hidden layers: 0 (a linear policy), 1 or 2
    hidden: int = 32  # units in each hidden layer

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


def sample_around(mu, sigma, epsilon):
    """θ_i = μ + σ ε_i ~ N(μ, σ²I)   [Natural Evolutionary Strategies (NES), eq. 1]

    mu: (d,); sigma σ > 0; epsilon ε_i ~ N(0, I): (n, d). Returns (n, d).
    """
    return mu + sigma * epsilon


def shape_fitness(fitness, shaping):
    """The shaped F(θ_i) of [Natural Evolutionary Strategies (NES) / Derivation, eq. 10]

    raw: F; standardized: (F - mean) / std; ranks: the share of the other candidates that one beats,
    minus ½, so from -½ to ½; a tie counts half. fitness F: (n,). Returns (n,).
    """
    if shaping == "standardized":
        return (fitness - fitness.mean()) / (fitness.std(correction=0) + 1e-8)
    if shaping == "ranks":
        return (fitness.unsqueeze(1) - fitness).sign().sum(1) / (2 * (len(fitness) - 1))
    return fitness


def nes_gradient(fitness, epsilon, sigma):
    """∇_μ E[F(θ)] ≈ 1/(nσ) Σ_i F(θ_i) ε_i   [Natural Evolutionary Strategies (NES) / Derivation,
    eq. 10]

    fitness F, shaped, of θ_i = μ + σ ε_i: (n,); epsilon ε_i: (n, d); sigma σ > 0. Returns (d,), in
    units of fitness per unit of μ; ascend it.
    """
    return fitness @ epsilon / (len(fitness) * sigma)


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


class Policies(nn.Module):
    """Deterministic policies π_θ of one shape: tanh layers, then a linear one. mu is one θ, (d,).

    Policies act on normalised observations once norm has statistics.
    A row of θ holds the weights and biases of one policy. Over a Discrete space it takes the argmax
    of its outputs; over a Box its outputs, where -1 and 1 are the bounds if there are any.
    """

    def __init__(self, env, args):
        super().__init__()
        space, hidden = env.action_space, [args.hidden] * args.layers
        box = isinstance(space, gym.spaces.Box)
        self.to_env = (
            box_actions(space) if box else lambda x: x.argmax(-1).astype(space.dtype) + space.start
        )
        self.sizes = [*env.observation_space.shape, *hidden, gym.spaces.flatdim(space)]
        self.norm = RunningNorm(*env.observation_space.shape) if args.norm_obs else None
        self.mu = nn.Buffer(torch.zeros(sum((i + 1) * o for i, o in pairwise(self.sizes))))

    def unpack(self, theta):
        """θ, (n, d), as the weights, (n, outputs, inputs), and biases, (n, outputs), of layers."""
        layers, first = [], 0
        for i, o in pairwise(self.sizes):
            layer = theta[:, first : first + (i + 1) * o].reshape(-1, o, i + 1)
            layers.append((layer[..., :i].copy(), layer[..., i].copy()))  # contiguous
            first += (i + 1) * o
        return layers

    def actions(self, layers, obs):
        """The action of each policy at its row of obs, (n, obs_dim), as environments take it."""
        if self.norm and self.norm.count:
            obs = self.norm(torch.as_tensor(obs).to(self.mu)).cpu().numpy()
        for i, (weights, bias) in enumerate(layers):
            obs = np.matvec(weights, np.tanh(obs) if i else obs) + bias
        return self.to_env(obs)

    def act(self, obs):
        """Actions of the policy of mu at obs, (n, obs_dim), as the environment takes them."""
        return self.actions(self.unpack(self.mu.float().cpu().numpy()[None]), obs)


def make_policy(env, args):
    """The policies for the spaces of env; mu is the one that is evaluated."""
    return Policies(env, args)


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


# Training -----------------------------------------------------------------------------------------


def make_candidates(stack, env, args, n):
    """n environments: gymnasium's own vectorised version if there is one, else a list.

    A vectorised version cannot start all episodes from one state, and may read --env-kwargs in
    another way: with --common-seeds or --env-kwargs it is a list.
    """
    if env.spec.vector_entry_point and not args.common_seeds and args.env_kwargs == "{}":
        return stack.enter_context(closing(make_envs(args, n)))
    args = dataclasses.replace(args, capture_video=False)
    return [stack.enter_context(make_env(args)) for _ in range(n)]


def play(envs, policies, theta, seeds):
    """Play one whole episode with each policy, cut after 100,000 steps if nothing ends it.

    theta: (n, d); seeds, of the environments: n integers. Returns the undiscounted returns and the
    lengths, (n,) each; the observations acted on, (sum of lengths, obs_dim); and the number of
    simulated steps. A vector environment steps all episodes until the last one has ended; in a list
    an ended episode takes no further step.
    """
    n, layers, vector = len(theta), policies.unpack(theta), isinstance(envs, gym.vector.VectorEnv)
    running, ended = np.ones(n, bool), np.zeros(n, bool)
    seen, rewards, real, steps = [], [], [], 0
    if vector:
        obs, _ = envs.reset(seed=seeds[0])
    else:
        obs = np.float32([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds)])
    while np.count_nonzero(running) and len(real) < 100_000:
        seen.append(obs.copy())
        actions = policies.actions(layers, obs)
        steps += n - np.count_nonzero(ended)  # an ended episode simulates nothing here
        if vector:
            obs, reward, terminated, truncated, _ = envs.step(actions)
            ended = terminated | truncated
        else:
            reward = np.zeros(n)
            for i in np.flatnonzero(running):
                obs[i], reward[i], terminated, truncated, _ = envs[i].step(actions[i])
                ended[i] = terminated or truncated
        rewards.append(reward * running)
        real.append(running)
        running = running & ~ended
    seen, real = np.array([*seen, obs], np.float32), np.array(real)  # (T+1, n, obs_dim), (T, n)
    returns = np.sum(rewards, 0)
    check_finite("an observation or a reward", (seen, returns))
    return returns, real.sum(0), seen[:-1][real], steps


def train(args: Args) -> np.ndarray:
    """Run the algorithm above; return the episode returns of the final evaluation."""
    n, pair = args.candidates, 2 if args.antithetic else 1
    with ExitStack() as stack:
        rank, world, device = start_processes(stack, args.device)
        if n % math.lcm(pair, world):
            raise Refusal(f"--candidates {n} is not a multiple of {math.lcm(pair, world)}")
        own = slice(rank * n // world, (rank + 1) * n // world)

        # 1. Initialise, with the same weights in every process.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # for layers this small, threads cost more than they save
        env = stack.enter_context(make_env(args))
        envs = make_candidates(stack, env, args, n // world)
        policies = make_policy(env, args).to(device)
        mu = policies.mu
        adam = args.optimizer == "adam"
        optimizer = torch.optim.Adam([mu], eps=1e-5) if adam else torch.optim.SGD([mu])
        run = stack.enter_context(Run(args, rank, policy=policies, **{args.optimizer: optimizer}))
        optimizer.param_groups[0]["lr"] = args.learning_rate  # the option's, if resumed

        while run.step < args.total_timesteps:
            # 2. Sample candidates. Every process uses the seed of rank 0, so all draw the same.
            rng = np.random.default_rng([args.seed, run.step, 1])
            epsilon = torch.from_numpy(rng.standard_normal((n // pair, len(mu)), np.float32)).to(mu)
            if args.antithetic:
                epsilon = torch.cat([epsilon, -epsilon])
            theta = sample_around(mu, args.sigma, epsilon)

            # 3. Fitness; each process plays its share.
            seeds = rng.integers(2**29, size=(args.episodes, 1 if args.common_seeds else n))
            seeds = np.broadcast_to(seeds, (args.episodes, n))[:, own].tolist()
            episodes = [play(envs, policies, theta[own].cpu().numpy(), row) for row in seeds]
            returns, lengths, seen, steps = zip(*episodes)
            fitness = torch.zeros(n, dtype=torch.float64)  # all_sum adds those of other processes
            fitness[own] = torch.from_numpy(np.mean(returns, 0))
            simulated = torch.tensor(sum(steps), dtype=torch.float64)
            all_sum(fitness, simulated)

            # 4. Shape the fitnesses.
            weights = shape_fitness(fitness, args.shaping).to(mu)

            # 5. Estimate the gradient.
            gradient = nes_gradient(weights, epsilon, args.sigma) - args.weight_decay * mu

            # 6. Step along the gradient. The optimizer descends, hence the minus.
            mu.grad = -gradient
            optimizer.step()

            # 7. Statistics of the observations, for the next generation.
            if args.norm_obs:
                policies.norm.include(np.concatenate(seen))

            run.step += int(simulated)
            run.episodes.extend(zip(np.ravel(returns), np.ravel(lengths)))
            run.log(fitness=fitness.mean(), best_fitness=fitness.max())
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
