"""Covariance Matrix Adaptation Evolution Strategy: a search Gaussian that learns its own shape.

Derivations: "Black-Box Policy Optimization",
"Covariance Matrix Adaptation Evolution Strategy (CMA-ES)".

    1.  Initialise the search distribution N(μ, Σ), Σ = σ² C, over the parameters θ of the policy.
    2.  Sample n candidates θ_i = μ + σ C^½ ε_i, ε_i ~ N(0, I).
    3.  Fitness F(θ_i): the mean return of L episodes of π_θ_i.
    4.  Rank the candidates by fitness; the elites are the k best.
    5.  Mean: μ ← μ + α Σ_i w_i (θ_i - μ), over the elites.
    6.  The document's covariance: Σ = Cov(elites) + η I; repeat from 2.
    7.  Or Hansen's paths p_σ, p_c: what the steps of the mean add up to, the old ones fading.
    8.  Step size: σ grows where p_σ is longer than random steps would make it, else it shrinks.
    9.  Covariance: C turns towards p_c and the elites, away from the other candidates; from 2.

Notation: θ_i -> theta -> (n, d), d parameters a policy;  F -> fitness -> (n,);  μ -> mu -> (d,);
σ -> sigma -> ();  C, C^½ -> C, root -> (d, d);  w_i -> weights -> (k,) or (n,);  p_σ, p_c ->
p_sigma, p_c -> (d,);  ε_i, y_i = C^½ ε_i -> epsilon, steps -> (n, d).

The document's update, and the complete one of Hansen's tutorial with its equation numbers:

                document                        hansen
    elites      the best ⌊ρn⌋                   the better half; in C the others count negatively
    mean        eq. 3                           42, the same
    covariance  eq. 4: of these elites alone,   47: the last one, a little of it replaced by the
                around the new mean             y_i, around the old mean (46), and by p_c (45)
    scale       that of Cov(elites)             σ, by the length of p_σ (43, 44)

On a slope the elites lie side by side: around the new mean their spread is narrow along the
progress, so the document's search shrinks there, while y_i, p_c and σ make Hansen's grow.
Of Hansen's update only the ranks of the fitness matter, and neither rotations of θ nor its scale.

All candidates act at once, in one batched product. The return of an episode is undiscounted and, as
there is no value function, that of a truncated one is used as it is. The document leaves w_i open:
they are Hansen's here; its ε is η. The policy that is evaluated is that of the mean μ.

Paper: Hansen 2016, The CMA Evolution Strategy: A Tutorial, arXiv 1604.00772.
"""

import bisect
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
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = "cmaes"
ACTION_SPACES = (gym.spaces.Discrete, gym.spaces.Box)
LIMITS = {"candidates": (2, 1e18), "rho": (0, 1), "layers": (0, 2), "init_mean": (-1e18, 1e18)}


@dataclass
class Args:
    total_timesteps: int = 100_000  # environment steps of all candidates; generations are not cut
    candidates: int = 24  # n, candidates in a generation
    update: Literal["hansen", "document"] = "hansen"  # of the search distribution
    alpha: float = 1.0  # α, step of the mean towards that of the elites
    rho: float = 0.5  # ρ, share of the candidates that are elites; in the document's update
    noise: float = 0.01  # η, added to the variance of each coordinate; in the document's update
    episodes: int = 1  # L, episodes of each candidate
    init_mean: float = 0.0  # μ at the start, in each coordinate
    init_sigma: float = 1.0  # σ at the start, where C = I
    common_seeds: bool = False  # the candidates of a generation start from the same states
    layers: int = 0  # hidden layers: 0 (a linear policy), 1 or 2
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


# Equations ----------------------------------------------------------------------------------------


def square_root(C):
    """C^½ = B D Bᵀ, where C = B D² Bᵀ   [Covariance Matrix Adaptation Evolution Strategy (CMA-ES)]

    With this root, the symmetric one, C^-½ y_i is ε_i itself: there is nothing to invert. Of C,
    (d, d), the lower triangle is read; eigenvalues below 1e-14 of the largest are raised to that.
    """
    values, vectors = torch.linalg.eigh(C)
    return vectors * values.clamp(min=1e-14 * values[-1]).sqrt() @ vectors.T


def sample_correlated(mu, root, epsilon):
    """θ_i = μ + Σ^½ ε_i ~ N(μ, Σ)

    [Covariance Matrix Adaptation Evolution Strategy (CMA-ES), eq. 2]
    mu: (d,); root Σ^½: (d, d), symmetric; epsilon ε_i ~ N(0, I): (n, d). Returns (n, d).
    """
    return mu + epsilon @ root


def rank_weights(k, n):
    """w_i ∝ ln(k + ½) - ln i for the ranks i = 1 to n; the positive ones, i ≤ k, add up to 1.

    [Covariance Matrix Adaptation Evolution Strategy (CMA-ES)] leaves them open: tutorial, eq. 49.
    """
    weights = math.log(k + 0.5) - torch.arange(1, n + 1, dtype=torch.float64).log()
    return weights / weights.clamp(min=0).sum()


def update_mean(mu, elites, weights, alpha):
    """μ + α Σ_i w_i (θ_i - μ)   [Covariance Matrix Adaptation Evolution Strategy (CMA-ES), eq. 3]

    mu: (d,); elites θ_i: (k, d), the best one first; weights w_i: (k,). Returns (d,).
    """
    return mu + alpha * (weights @ (elites - mu))


def elite_covariance(elites, mu, noise):
    """Σ = 1/k Σ_i (θ_i - μ)(θ_i - μ)ᵀ + η I

    [Covariance Matrix Adaptation Evolution Strategy (CMA-ES), eq. 4]
    elites θ_i: (k, d); mu, the new mean: (d,); noise η ≥ 0. Returns (d, d).
    """
    deviations = elites - mu
    return deviations.T @ deviations / len(elites) + noise * torch.eye(len(mu)).to(mu)


def strategy_parameters(n, d):
    """w_i, (n,), and the numbers μ_eff, c_σ, d_σ, c_c, c_1, c_μ of Hansen's update.

    Tutorial, eq. 49 to 58, of [Covariance Matrix Adaptation Evolution Strategy (CMA-ES)].
    n candidates, d parameters. The w_i ≥ 0 add up to 1; the others leave C positive definite.
    """
    weights = rank_weights(n / 2, n)
    positive, negative = weights.clamp(min=0), weights.clamp(max=0)
    mu_eff = 1 / positive.pow(2).sum().item()
    mu_eff_negative = (negative.sum().pow(2) / negative.pow(2).sum()).item()
    c_sigma = (mu_eff + 2) / (d + mu_eff + 5)
    d_sigma = 1 + 2 * max(0, math.sqrt((mu_eff - 1) / (d + 1)) - 1) + c_sigma
    c_c = (4 + mu_eff / d) / (d + 4 + 2 * mu_eff / d)
    c_1 = 2 / ((d + 1.3) ** 2 + mu_eff)
    c_mu = min(1 - c_1, 2 * (0.25 + mu_eff + 1 / mu_eff - 2) / ((d + 2) ** 2 + mu_eff))
    bounds = 1 + c_1 / c_mu, 1 + 2 * mu_eff_negative / (mu_eff + 2), (1 - c_1 - c_mu) / (d * c_mu)
    weights = positive - min(bounds) * negative / negative.sum()
    return weights, mu_eff, c_sigma, d_sigma, c_c, c_1, c_mu


def cumulate(path, step, c, mu_eff):
    """p ← (1 - c) p + √(c (2 - c) μ_eff) step

    Tutorial, eq. 43 and 45, of [Covariance Matrix Adaptation Evolution Strategy (CMA-ES)].
    step: Σ_i w_i ε_i for p_σ, h Σ_i w_i y_i for p_c, (d,). Of random ranks, p_σ ~ N(0, I).
    """
    return (1 - c) * path + math.sqrt(c * (2 - c) * mu_eff) * step


def relative_length(path):
    """‖p_σ‖ / E‖N(0, I)‖, which is 1 on average where the ranks are random.

    In eq. 44 of the tutorial, of [Covariance Matrix Adaptation Evolution Strategy (CMA-ES)].
    path p_σ: (d,). Returns ().
    """
    d = len(path)
    return path.norm() / (math.sqrt(d) * (1 - 1 / (4 * d) + 1 / (21 * d**2)))


def h_sigma(length, generation, c_sigma, d):
    """h: 0 while p_σ is so long that σ lags behind and p_c should wait, else 1.

    Below eq. 47 of the tutorial, of [Covariance Matrix Adaptation Evolution Strategy (CMA-ES)].
    length, relative, and generation, the first being 1: (). Returns ().
    """
    usual = (1 - (1 - c_sigma) ** (2 * generation)).sqrt()  # of paths that began at 0
    return (length < (1.4 + 2 / (d + 1)) * usual).to(length)


def update_step_size(sigma, length, c_sigma, d_sigma):
    """σ ← σ exp(c_σ/d_σ (length - 1))

    Tutorial, eq. 44, of [Covariance Matrix Adaptation Evolution Strategy (CMA-ES)].
    sigma, length, the relative one of p_σ: (). Returns ().
    """
    return sigma * (c_sigma / d_sigma * (length - 1)).exp()


def update_covariance(C, p_c, steps, epsilon, weights, h, c_c, c_1, c_mu):
    """C ← (1 + c_1 δ - c_1 - c_μ Σ_i w_i) C + c_1 p_c p_cᵀ + c_μ Σ_i w°_i y_i y_iᵀ

    Tutorial, eq. 46 and 47, of [Covariance Matrix Adaptation Evolution Strategy (CMA-ES)].
    w°_i = w_i where w_i ≥ 0, else w_i d/‖ε_i‖²;  δ = (1 - h) c_c (2 - c_c) while p_c waits.
    C: (d, d); p_c: (d,); steps y_i, epsilon ε_i: (n, d), best first; weights w_i: (n,); h: ().
    """
    bounded = weights.where(weights >= 0, weights * len(C) / epsilon.pow(2).sum(1))
    keep = 1 + c_1 * (1 - h) * c_c * (2 - c_c) - c_1 - c_mu * weights.sum()
    return keep * C + c_1 * torch.outer(p_c, p_c) + c_mu * (bounded * steps.T) @ steps


# Training -----------------------------------------------------------------------------------------


def play(envs: gym.vector.VectorEnv, policies: Policies, theta: np.ndarray, seeds: np.ndarray):
    """Undiscounted return and length of one whole episode of each policy, (n,) each.

    A native vector environment steps all until the last one ends, which costs it little more; of
    other environments only those whose episode goes on are stepped.
    """
    n, layers = len(theta), policies.unpack(theta)
    returns, lengths = np.zeros((2, n))
    running, live = np.ones(n, np.bool_), np.arange(n)
    single = getattr(envs.unwrapped, "envs", None)  # those of a SyncVectorEnv
    if single:
        flatten, space = gym.spaces.flatten, envs.unwrapped.single_observation_space
        starts = [env.reset(seed=int(seed))[0] for env, seed in zip(single, seeds, strict=True)]
        obs = np.stack([flatten(space, start) for start in starts]).astype(np.float32)
    else:
        obs, _ = envs.reset(seed=int(seeds[0]))
    for _ in range(100_000):  # there may be no time limit
        if single:
            reward, ended = np.zeros(n), np.zeros(n, np.bool_)
            for i, action in zip(live, policies.act(layers, obs[live]), strict=True):
                next_obs, reward[i], terminated, truncated, _ = single[i].step(action)
                obs[i] = flatten(space, next_obs)
                ended[i] = terminated or truncated
        else:
            obs, reward, terminated, truncated, _ = envs.step(policies.act(layers, obs))
            ended = terminated | truncated
        returns += reward * running
        lengths += running
        running &= ~ended
        if not running.any():
            break
        if single and ended.any():
            live = np.flatnonzero(running)
            layers = policies.unpack(theta[live])
    return returns, lengths


def train(args: Args) -> np.ndarray:
    """Run the algorithm above; return the episode returns of the final evaluation."""
    check(args)
    n, L, device, document = args.candidates, args.episodes, args.device, args.update == "document"

    # 1. Initialise.
    torch.set_num_threads(1)
    mode = "sync" if args.common_seeds else None  # a native vector environment has one seed for all
    envs = make_envs(args.env_id, n, vectorization_mode=mode)
    check_memory(envs, args)
    policies = Policies(envs, args.hidden, args.layers)
    d, kind = policies.dim, {"dtype": torch.float64, "device": device}
    search = nn.Module()  # what a checkpoint holds of the search distribution
    search.mu = nn.Buffer(torch.full((d,), args.init_mean, **kind))
    search.sigma = nn.Buffer(torch.full((), args.init_sigma, **kind))
    search.C, search.root = nn.Buffer(torch.eye(d, **kind)), nn.Buffer(torch.eye(d, **kind))
    search.p_sigma = nn.Buffer(torch.zeros(d, **kind))
    search.p_c = nn.Buffer(torch.zeros(d, **kind))
    search.generation = nn.Buffer(torch.zeros((), **kind))
    weights, mu_eff, c_sigma, d_sigma, c_c, c_1, c_mu = strategy_parameters(n, d)
    k, gap = n // 2, max(1, math.floor(1 / (10 * d * (c_1 + c_mu))))  # elites; generations a root
    if document:
        k, gap = max(1, math.floor(args.rho * n + 1e-9)), 1
        weights = rank_weights(k, k)
    weights = weights.to(device)

    def act(obs: np.ndarray) -> np.ndarray:
        return policies.act(policies.unpack(search.mu.float().cpu().numpy()[None]), obs)

    run = Run(args, {"search": search}, act)
    while run.step < args.total_timesteps and not run.interrupted:
        # 2. Sample candidates.
        if search.generation % gap == 0:
            search.root = square_root(search.C)
        epsilon = torch.randn(n, d, **kind)
        theta = sample_correlated(search.mu, search.sigma * search.root, epsilon)

        # 3. Fitness.
        starts = 1 if args.common_seeds else n
        seeds = np.random.SeedSequence([args.seed, run.step]).generate_state(L * starts) >> 3
        seeds = seeds.reshape(L, starts).repeat(n // starts, 1)  # (L, n)
        episodes = [play(envs, policies, theta.float().cpu().numpy(), seeds[i]) for i in range(L)]
        returns, lengths = np.stack(episodes, 1)  # (L, n) each
        fitness = torch.from_numpy(returns.mean(0)).to(device)

        # 4. Rank.
        order = fitness.argsort(descending=True)
        elites, epsilon = theta[order[:k]], epsilon[order]

        # 5. Move the mean.
        search.mu = update_mean(search.mu, elites, weights[:k], args.alpha)

        search.generation += 1
        if document:
            # 6. Covariance of the elites; σ stays as it began.
            search.C = elite_covariance(elites, search.mu, args.noise) / search.sigma**2
        else:
            # 7. Paths.
            steps = epsilon @ search.root
            search.p_sigma = cumulate(search.p_sigma, weights[:k] @ epsilon[:k], c_sigma, mu_eff)
            length = relative_length(search.p_sigma)
            h = h_sigma(length, search.generation, c_sigma, d)
            search.p_c = cumulate(search.p_c, h * (weights[:k] @ steps[:k]), c_c, mu_eff)
            # 8. Step size.
            search.sigma = update_step_size(search.sigma, length, c_sigma, d_sigma)
            # 9. Covariance.
            rates = c_c, c_1, c_mu
            search.C = update_covariance(search.C, search.p_c, steps, epsilon, weights, h, *rates)

        run.episodes.extend(zip(returns.flat, lengths.flat, strict=True))
        scalars = {"fitness": fitness.mean(), "best_fitness": fitness.max()}
        sigma = search.sigma * search.C.diagonal().sqrt()
        run.update(int(lengths.sum()), scalars | {"sigma": sigma.mean()})
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


def check_memory(envs: gym.vector.VectorEnv, args: Args) -> None:
    """Stop where the d x d matrices, of which six are alive at most, do not fit in memory."""

    def needed(hidden: int) -> int:
        return 6 * 8 * Policies(envs, hidden, args.layers).dim ** 2  # bytes

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed(args.hidden) > memory:
        d = Policies(envs, args.hidden, args.layers).dim
        fits = bisect.bisect(range(1, args.hidden), memory, key=needed)  # that many do
        hint = f"the largest --hidden that fits is {fits}" if fits else "no --hidden fits"
        sizes = f"{needed(args.hidden) / 1e9:.1f} GB of {memory / 1e9:.1f}"
        stop(f"a covariance of {d} x {d} takes {sizes}; {hint}")


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
