"""Natural Evolution Strategy: move the mean of the search by every candidate, weighed by fitness.

Derivations: "Natural Evolutionary Strategies (NES)",
"Natural Evolutionary Strategies (NES) / Derivation".

    1.  Initialise the mean μ of the search distribution N(μ, σ²I) over the parameters θ.
    2.  Sample n candidates θ_i = μ + σ ε_i with ε_i ~ N(0, I), in pairs ±ε.
    3.  Fitness F(θ_i): the mean return of L episodes of π_θ_i.
    4.  Shape the fitnesses: as they are, standardised, or their centred ranks.
    5.  g = 1/(nσ) Σ_i F(θ_i) ε_i - λμ, which estimates the gradient of E[F(θ)] - ½ λ|μ|².
    6.  μ ← μ + αg, or an Adam step up g.
    7.  Update the statistics that normalise the observations; repeat from 2.

Notation: θ_i, ε_i -> theta, epsilon -> (n, d), d parameters a policy;  μ -> mu -> (d,);
F -> fitness -> (n,);  g -> gradient -> (d,);  λ -> weight_decay;  N of the document is n here.

All candidates act at once, in one batched product. The return of an episode is undiscounted and, as
there is no value function, that of a truncated one is used as it is. Beyond the document, from
Salimans et al.: pairs ±ε, ranks, Adam, weight decay, normalised observations. The policy that is
evaluated is that of the mean μ. Under torchrun every process draws the same noise and plays its
slice of the candidates; only returns, lengths and sums of observations travel.

Papers: Wierstra et al. 2014, Natural Evolution Strategies; Salimans et al. 2017, Evolution
Strategies as a Scalable Alternative to Reinforcement Learning, arXiv 1703.03864.
"""

import atexit
import math
import os
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = "nes"
ACTION_SPACES = (gym.spaces.Discrete, gym.spaces.Box)
LIMITS = {"candidates": (2, 1e9), "sigma": (1e-9, 1e9), "layers": (0, 2)}  # not those check assumes


@dataclass
class Args:
    total_timesteps: int = 500_000  # environment steps of all candidates; generations are not cut
    candidates: int = 24  # n, candidates in a generation, shared out among torchrun's processes
    sigma: float = 0.3  # σ, deviation of the candidates from the mean in each coordinate
    learning_rate: float = 0.1  # α, step size
    optimizer: Literal["sgd", "adam"] = "adam"  # what makes a step of a gradient
    shaping: Literal["raw", "standardized", "ranks"] = "ranks"  # of fitness; ranks from -½ to ½
    antithetic: bool = True  # candidates come in pairs μ ± σε
    weight_decay: float = 0.0  # λ, pull of μ towards 0
    episodes: int = 1  # L, episodes of each candidate
    common_seeds: bool = False  # the candidates of a generation start from the same states
    norm_obs: bool = False  # normalise observations by their running mean and variance
    layers: int = 1  # hidden layers: 0 (a linear policy), 1 or 2
    hidden: int = 32  # units in each of them

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


class Policies:
    """Deterministic policies π_θ of one shape; a row of θ holds the weights and biases of one.

    Over a Discrete space they take the argmax of their outputs; over a Box the outputs themselves,
    1 being the upper bound and -1 the lower where there are any, clipped to them.
    """

    def __init__(self, envs: gym.vector.VectorEnv, hidden: int, layers: int):
        self.space = space = envs.single_action_space
        self.discrete = isinstance(space, gym.spaces.Discrete)
        if not self.discrete:
            bounded = np.maximum(np.abs(space.low), np.abs(space.high)) < 1e9
            low, high = np.where(bounded, space.low, -1), np.where(bounded, space.high, 1)
            self.scale, self.shift = (high - low) / 2, (high + low) / 2
        outputs = int(space.n) if self.discrete else math.prod(space.shape)
        self.sizes = [envs.single_observation_space.shape[0], *[hidden] * layers, outputs]
        self.dim = sum((i + 1) * o for i, o in pairwise(self.sizes))

    def unpack(self, theta: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """θ, (n, d), as the weights, (n, outputs, inputs), and biases, (n, outputs), of layers."""
        layers, first = [], 0
        for i, o in pairwise(self.sizes):
            layer = theta[:, first : first + (i + 1) * o].reshape(-1, o, i + 1)
            layers.append((layer[..., :i].copy(), layer[..., i].copy()))  # contiguous
            first += (i + 1) * o
        return layers

    def act(self, layers: list, obs: np.ndarray) -> np.ndarray:
        """What each policy does in its row of obs, (n, obs_dim), as environments take it."""
        for weights, bias in layers[:-1]:
            obs = np.tanh(np.matvec(weights, obs) + bias)
        weights, bias = layers[-1]
        output = np.matvec(weights, obs) + bias
        if self.discrete:
            return output.argmax(-1) + self.space.start
        action = output.reshape(-1, *self.space.shape) * self.scale + self.shift
        return action.clip(self.space.low, self.space.high).astype(self.space.dtype)


def normaliser(count: Tensor, sums: Tensor):
    """Standardise observations, as a function of arrays, and clip to [-10, 10]; at first nothing.

    count of the observations so far, (); sums of them and of their squares, (2, obs_dim).
    """
    if count == 0:
        return np.asarray
    mean, square = (sums / count).numpy()
    std = np.sqrt((square - mean**2).clip(1e-8))
    return lambda x: ((x - mean) / std).clip(-10, 10).astype(np.float32)


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


# Equations ----------------------------------------------------------------------------------------


def sample_around(mu, sigma, epsilon):
    """θ_i = μ + σ ε_i ~ N(μ, σ²I)   [Natural Evolutionary Strategies (NES), eq. 1]

    mu: (d,); sigma σ > 0; epsilon ε_i ~ N(0, I): (n, d). Returns (n, d).
    """
    return mu + sigma * epsilon


def shape_fitness(fitness, shaping):
    """What stands for F(θ_i) in [Natural Evolutionary Strategies (NES) / Derivation, eq. 10]

    Itself, (F - mean) / std, or the centred rank, the share of the others that it exceeds minus ½,
    those equal to it counting half. fitness F: (n,). Returns (n,).
    """
    if shaping == "standardized":
        return (fitness - fitness.mean()) / (fitness.std(correction=0) + 1e-8)
    if shaping == "ranks":
        return (fitness.unsqueeze(1) - fitness).sign().sum(1) / (2 * (len(fitness) - 1))
    return fitness


def nes_gradient(fitness, epsilon, sigma):
    """∇_μ E[F(θ)] ≈ 1/(Nσ) Σ_i F(θ_i) ε_i   [Natural Evolutionary Strategies (NES) / Derivation,
    eq. 10]

    fitness F: (N,), of θ_i = μ + σ ε_i; epsilon ε_i: (N, d); sigma σ > 0. Returns (d,), in units of
    fitness per unit of μ; to be followed upwards.
    """
    return fitness @ epsilon / (len(fitness) * sigma)


# Training -----------------------------------------------------------------------------------------


def play_and_sum(
    envs: gym.vector.VectorEnv, policies: Policies, theta: np.ndarray, seeds: np.ndarray, norm
):
    """Undiscounted return and length of one whole episode of each policy, (n,) each, and the sums
    of the observations it acted on and of their squares, not yet normalised, (n, 2, obs_dim).

    A native vector environment steps all until the last one ends, which costs it little more; of
    other environments only those whose episode goes on are stepped.
    """
    n, layers = len(theta), policies.unpack(theta)
    returns, lengths = np.zeros((2, n))
    running, live = np.ones(n, np.bool_), np.arange(n)
    sums = np.zeros((n, 2, policies.sizes[0]))
    single = getattr(envs.unwrapped, "envs", None)  # those of a SyncVectorEnv
    if single:
        flatten, space = gym.spaces.flatten, envs.unwrapped.single_observation_space
        starts = [env.reset(seed=int(seed))[0] for env, seed in zip(single, seeds, strict=True)]
        obs = np.stack([flatten(space, start) for start in starts]).astype(np.float32)
    else:
        obs, _ = envs.reset(seed=int(seeds[0]))
    for _ in range(100_000):  # there may be no time limit
        seen = obs.astype(np.float64)
        sums += np.stack([seen, seen**2], 1) * running[:, None, None]
        if single:
            reward, ended = np.zeros(n), np.zeros(n, np.bool_)
            for i, action in zip(live, policies.act(layers, norm(obs[live])), strict=True):
                next_obs, reward[i], terminated, truncated, _ = single[i].step(action)
                obs[i] = flatten(space, next_obs)
                ended[i] = terminated or truncated
        else:
            obs, reward, terminated, truncated, _ = envs.step(policies.act(layers, norm(obs)))
            ended = terminated | truncated
        returns += reward * running
        lengths += running
        running &= ~ended
        if not running.any():
            break
        if single and ended.any():
            live = np.flatnonzero(running)
            layers = policies.unpack(theta[live])
    return returns, lengths, sums


def train(args: Args) -> np.ndarray:
    """Run the algorithm above; return the episode returns of the final evaluation."""
    check(args)
    rank, world = start_processes()
    n, L, sigma, device = args.candidates, args.episodes, args.sigma, args.device
    pair = 2 if args.antithetic else 1
    if n % math.lcm(pair, world):
        stop(f"--candidates {n} is not a multiple of {math.lcm(pair, world)}")
    own = slice(rank * n // world, (rank + 1) * n // world)

    # 1. Initialise, alike in every process.
    torch.set_num_threads(1)
    mode = "sync" if args.common_seeds else None  # a native vector environment has one seed for all
    envs = make_envs(args.env_id, n // world, vectorization_mode=mode)
    policies = Policies(envs, args.hidden, args.layers)
    search = nn.Module()  # what a checkpoint holds of the search distribution
    search.mu = nn.Buffer(torch.zeros(policies.dim, device=device))
    search.count = nn.Buffer(torch.zeros((), dtype=torch.float64))  # of observations
    search.sums = nn.Buffer(torch.zeros(2, policies.sizes[0], dtype=torch.float64))
    optimizer = Adam(search.mu)

    def act(obs: np.ndarray) -> np.ndarray:
        norm = normaliser(search.count, search.sums)
        return policies.act(policies.unpack(search.mu.cpu().numpy()[None]), norm(obs))

    modules = {"search": search, "optimizer": optimizer}
    # Every process counts the steps of all, so these have a mean where others have a sum.
    run = Run(args, modules, act, rank, total=lambda x: all_gather(x[None]).mean(0))
    while run.step < args.total_timesteps and not run.interrupted:
        # 2. Sample candidates, the same in every process.
        generator = torch.Generator(device).manual_seed(env_seed(args.seed, run.step, 0))
        epsilon = torch.randn(n // pair, policies.dim, generator=generator, device=device)
        if args.antithetic:
            epsilon = torch.cat([epsilon, -epsilon])
        theta = sample_around(search.mu, sigma, epsilon)

        # 3. Fitness; each process plays its share.
        starts = 1 if args.common_seeds else n
        seeds = np.random.SeedSequence([args.seed, run.step]).generate_state(L * starts) >> 3
        seeds = seeds.reshape(L, starts).repeat(n // starts, 1)  # (L, n)
        share, norm = theta[own].cpu().numpy(), normaliser(search.count, search.sums)
        episodes = [play_and_sum(envs, policies, share, seeds[i, own], norm) for i in range(L)]
        arrays = (torch.from_numpy(np.stack(x, 1)) for x in zip(*episodes, strict=True))
        returns, lengths, sums = map(all_gather, arrays)  # (n, L), (n, L), (n, L, 2, obs_dim)
        fitness = returns.mean(1)

        # 4. Shape it.
        weights = shape_fitness(fitness, args.shaping).float().to(device)

        # 5. Estimate the gradient.
        gradient = nes_gradient(weights, epsilon, sigma) - args.weight_decay * search.mu

        # 6. Step along it.
        if args.optimizer == "adam":
            optimizer.step(-gradient, args.learning_rate)
        else:
            search.mu += args.learning_rate * gradient

        # 7. Statistics of the observations, for the next generation.
        if args.norm_obs:
            search.count += lengths.sum()
            search.sums += sums.sum((0, 1))

        run.episodes.extend(torch.stack([returns, lengths], -1).flatten(0, 1).tolist())
        scalars = {"fitness": fitness.mean(), "best_fitness": fitness.max()}
        scalars |= {"gradient_norm": gradient.norm(), "mu_norm": search.mu.norm()}
        run.update(int(lengths.sum()), scalars)
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


def start_processes() -> tuple[int, int]:
    """Rank and number of the processes that torchrun started; (0, 1) without it."""
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group()
        atexit.register(dist.destroy_process_group)  # its threads, or they abort the exit
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def all_gather(x: Tensor) -> Tensor:
    """The rows of x of torchrun's processes, as many in each, in the order of their ranks."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


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
