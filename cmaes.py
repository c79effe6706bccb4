"""Covariance Matrix Adaptation Evolution Strategy: a search Gaussian that learns its own shape.

Derivations in the document (tests/document/README.md): "Black-Box Policy Optimization",
"Covariance Matrix Adaptation Evolution Strategy (CMA-ES)".

    1.  Initialise the search distribution N(μ, Σ), Σ = σ² C, over the parameters θ of the policy.
    2.  Sample n candidates θ_i = μ + σ C^½ ε_i, ε_i ~ N(0, I).
    3.  Fitness F(θ_i): the mean return of L episodes of π_θ_i.
    4.  Rank the candidates by fitness; the elites are the k best.
    5.  Mean: μ ← μ + α Σ_i w_i (θ_i - μ), over the elites.
    6.  --update document: covariance Σ = Cov(elites) + η I. Continue with 10.
    7.  --update hansen: the paths p_σ and p_c add up the steps of the mean; older steps fade.
    8.  Step size: σ grows if p_σ is longer than random steps would make it, else it shrinks.
    9.  Covariance: C grows along p_c and towards the elites, and shrinks towards the others.
    10. Update the statistics that normalise the observations; repeat from 2.

Notation: θ_i -> theta -> (n, d), d parameters each;  F -> fitness -> (n,);  μ -> mu -> (d,);
σ -> sigma -> ();  C, C^½ -> C, root -> (d, d);  w_i -> weights -> (k,) or (n,);  p_σ, p_c ->
p_sigma, p_c -> (d,);  ε_i, y_i = C^½ ε_i -> epsilon, y -> (n, d);  α, η -> alpha, noise -> float.

--update chooses between the document's update and the complete one of Hansen's tutorial. Equation
numbers in the right column are the tutorial's:

                document                        hansen
    elites      the best ⌊ρn⌋                   the better half; the others have w_i ≤ 0 in C
    mean        eq. 3                           42, the same
    covariance  eq. 4: of these elites alone,   47: the old C, partly replaced by the y_i, steps
                around the new mean             from the old mean (weights: 46), and by p_c (45)
    scale       that of Cov(elites)             σ, which follows the length of p_σ (43, 44)

On a slope the elites lie close together in the direction of progress. Around the new mean, which
lies among them with the default α and ρ, their spread in that direction is small, so the document's
search shrinks along the slope. Hansen's grows along it, through y_i, p_c and σ. Both updates use
only the ranks of the fitness. Hansen's also behaves the same if θ and the initial search
distribution are rotated or scaled.

All candidates act at once: each layer of their policies is one batched matrix product, in numpy on
the CPU (--device is for the search distribution). Returns are not discounted. There is no
value function, so the return of a truncated episode (cut by a time limit) is used as it is. Where
gymnasium has its own vectorised version of the environment (CartPole), an environment whose episode
has ended plays further ones until the last candidate has ended its episode. These steps count
towards --total-timesteps, but not towards any fitness.

Beyond the document: it leaves the weights w_i open; they are Hansen's. Its ε in eq. 4 is called η,
as in cem.py. Observations are normalised by their running mean and standard deviation and clipped
to [-10, 10]. Evaluation plays the policy of the mean μ.

Beyond the tutorial: fitness is maximised. In C^½ eigenvalues below 1e-14 of the largest are raised
to that. Only --total-timesteps ends the search. n = 24 is more than the tutorial's 4 + ⌊3 ln d⌋ (up
to d = 785), because the return of one episode is a noisy fitness. σ starts at 3, which did better
than 0.3 and 1 on MountainCarContinuous.

Logged: mean and best fitness of the latest generation; sigma, the mean over the parameters of the
standard deviation of θ.

Paper: Hansen 2016, The CMA Evolution Strategy: A Tutorial, arXiv 1604.00772.
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
from contextlib import AbstractContextManager, ExitStack, closing
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

SCRIPT = "cmaes"
ACTION_SPACES = gym.spaces.Discrete, gym.spaces.Box
IMAGES = False  # whether observations may be images
LIMITS = {"candidates": (2, 1e9), "rho": (0, 1), "layers": (0, 2)}
LIMITS |= {"init_sigma": (1e-9, 1e9), "hidden": (1, 5_000)}


@dataclasses.dataclass
class Args:
    total_timesteps: int = 300_000  # environment steps in total; the last generation is finished
    candidates: int = 24  # n, policies sampled in each generation (the candidates)
    update: Literal["hansen", "document"] = "hansen"  # Hansen's complete update or the derivation's
    alpha: float = 1.0  # α, step size of the mean μ; 1 moves it to the elites' weighted mean
    rho: float = 0.5  # ρ, share of the candidates kept as elites (only --update document)
    noise: float = 0.01  # η, added to the variance of each parameter (only --update document)
    episodes: int = 1  # L, episodes that each candidate plays
    init_sigma: float = 3.0  # initial standard deviation σ of every parameter
    common_seeds: bool = False  # start the episodes of all candidates from the same states
    norm_obs: bool = True  # normalise observations by their running mean and standard deviation
    layers: int = 0  # number of hidden layers: 0 (a linear policy), 1 or 2
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
        if dist.is_torchelastic_launched():
            raise Refusal(f"{SCRIPT}.py does not run under torchrun")


# Equations ----------------------------------------------------------------------------------------


def square_root(C):
    """C^½ = B D Bᵀ, where C = B D² Bᵀ   [Covariance Matrix Adaptation Evolution Strategy (CMA-ES)]

    B holds the eigenvectors, D² the eigenvalues, raised to at least 1e-14 of the largest one. The
    root is symmetric, so C^-½ y_i = ε_i and no inverse is needed. C: (d, d), of which the lower
    triangle is read. Returns (d, d).
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

    Tutorial, eq. 49; [Covariance Matrix Adaptation Evolution Strategy (CMA-ES)] leaves them open.
    k: number of elites; n: number of ranks. Returns (n,).
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
    μ_eff: how many elites with equal weights would count as much; c_σ, c_c: rates at which p_σ and
    p_c forget; d_σ: damping of σ; c_1, c_μ: learning rates of C from p_c and from the y_i.
    n candidates, d parameters. The w_i ≥ 0 add up to 1; the negative ones are scaled so that C
    stays positive definite.
    """
    weights = rank_weights(n / 2, n)
    positive, negative = weights.clamp(min=0), weights.clamp(max=0)
    mu_eff = 1 / positive.pow(2).sum().item()
    mu_eff_negative = negative.sum() ** 2 / negative.pow(2).sum()
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
    step: Σ_i w_i ε_i for p_σ, h Σ_i w_i y_i for p_c, (d,). c, mu_eff: see strategy_parameters. If
    ranks are random, p_σ tends to N(0, I). Returns (d,).
    """
    return (1 - c) * path + math.sqrt(c * (2 - c) * mu_eff) * step


def relative_length(path):
    """‖p_σ‖ / E‖N(0, I)‖, with E‖N(0, I)‖ ≈ √d (1 - 1/(4d) + 1/(21d²)).

    In eq. 44 of the tutorial, of [Covariance Matrix Adaptation Evolution Strategy (CMA-ES)].
    About 1 on average if ranks are random. path p_σ: (d,). Returns ().
    """
    d = len(path)
    return path.norm() / (d**0.5 * (1 - 1 / (4 * d) + 1 / (21 * d**2)))


def h_sigma(length, generation, c_sigma, d):
    """h: 0 while p_σ is unusually long, else 1. At 0, p_c takes no step, so that σ grows first.

    Below eq. 47 of the tutorial, of [Covariance Matrix Adaptation Evolution Strategy (CMA-ES)].
    length: from relative_length; generation: 1 for the first; both (). Returns ().
    """
    usual = (1 - (1 - c_sigma) ** (2 * generation)).sqrt()  # of paths that began at 0
    return (length < (1.4 + 2 / (d + 1)) * usual).to(length)


def update_step_size(sigma, length, c_sigma, d_sigma):
    """σ ← σ exp(c_σ/d_σ (length - 1))

    Tutorial, eq. 44, of [Covariance Matrix Adaptation Evolution Strategy (CMA-ES)].
    sigma: σ; length: from relative_length; both (). Returns ().
    """
    return sigma * (c_sigma / d_sigma * (length - 1)).exp()


def update_covariance(C, p_c, y, epsilon, weights, h, c_c, c_1, c_mu):
    """C ← (1 + c_1 δ - c_1 - c_μ Σ_i w_i) C + c_1 p_c p_cᵀ + c_μ Σ_i w°_i y_i y_iᵀ

    Tutorial, eq. 46 and 47, of [Covariance Matrix Adaptation Evolution Strategy (CMA-ES)].
    w°_i = w_i where w_i ≥ 0, else w_i d/‖ε_i‖²;  δ = (1 - h) c_c (2 - c_c) keeps a little more of C
    while h = 0, to make up for the step that p_c does not take.
    C: (d, d); p_c: (d,); y y_i, epsilon ε_i: (n, d), best first; weights w_i: (n,); h: ().
    """
    bounded = weights.where(weights >= 0, weights * len(C) / epsilon.pow(2).sum(1))
    keep = 1 + c_1 * (1 - h) * c_c * (2 - c_c) - c_1 - c_mu * weights.sum()
    return keep * C + c_1 * torch.outer(p_c, p_c) + c_mu * (bounded * y.T) @ y


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


class Policies(nn.Module):
    """Deterministic policies π_θ of one shape: tanh layers, then a linear one. mu is one θ, (d,).

    Policies act on normalised observations, of float32, once norm has statistics.
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
            obs = self.norm(torch.as_tensor(np.float32(obs)).to(self.mu)).cpu().numpy()
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
    n, document = args.candidates, args.update == "document"
    with ExitStack() as stack:
        # 1. Initialise.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # for layers this small, threads cost more than they save
        env = stack.enter_context(make_env(args))
        policies = make_policy(env, args).double().to(args.device)
        mu = policies.mu
        d = len(mu)
        if d > 5_000:
            raise Refusal(f"--layers, --hidden: {d} parameters are too many for C; 5,000 fit")
        envs = make_candidates(stack, env, args, n)
        search = nn.Module()  # the rest of the search distribution, for checkpoints
        search.sigma = nn.Buffer(torch.full_like(mu[0], args.init_sigma))
        search.C = nn.Buffer(torch.eye(d).to(mu))
        search.p_sigma = nn.Buffer(torch.zeros_like(mu))
        search.p_c = nn.Buffer(torch.zeros_like(mu))
        search.generation = nn.Buffer(torch.zeros_like(search.sigma))
        weights, mu_eff, c_sigma, d_sigma, *rates = strategy_parameters(n, d)  # c_c, c_1, c_μ
        k = max(1, math.floor(args.rho * n + 1e-9)) if document else n // 2  # elites
        weights = (rank_weights(k, k) if document else weights).to(mu)
        w = weights[:k]  # of the elites
        run = stack.enter_context(Run(args, policy=policies, search=search))

        while run.step < args.total_timesteps:
            # 2. Sample candidates.
            root = square_root(search.C)
            epsilon = torch.from_numpy(run.rng.standard_normal((n, d))).to(mu)
            theta = sample_correlated(mu, search.sigma * root, epsilon)

            # 3. Fitness, an estimate of U(θ_i) in [Black-Box Policy Optimization, eq. 1].
            seeds = run.rng.integers(2**29, size=(args.episodes, 1 if args.common_seeds else n))
            seeds = np.broadcast_to(seeds, (args.episodes, n)).tolist()
            episodes = [play(envs, policies, theta.float().cpu().numpy(), row) for row in seeds]
            returns, lengths, seen, steps = zip(*episodes)
            fitness = torch.from_numpy(np.mean(returns, 0)).to(mu)

            # 4. Rank.
            order = fitness.argsort(descending=True)
            elites, epsilon = theta[order[:k]], epsilon[order]

            # 5. Move the mean.
            mu.copy_(update_mean(mu, elites, w, args.alpha))

            search.generation += 1
            if document:
                # 6. Covariance of the elites; σ does not change.
                search.C = elite_covariance(elites, mu, args.noise) / search.sigma**2
            else:
                # 7. Paths.
                y = epsilon @ root
                search.p_sigma = cumulate(search.p_sigma, w @ epsilon[:k], c_sigma, mu_eff)
                length = relative_length(search.p_sigma)
                h = h_sigma(length, search.generation, c_sigma, d)
                search.p_c = cumulate(search.p_c, h * (w @ y[:k]), rates[0], mu_eff)
                # 8. Step size.
                search.sigma = update_step_size(search.sigma, length, c_sigma, d_sigma)
                # 9. Covariance.
                search.C = update_covariance(search.C, search.p_c, y, epsilon, weights, h, *rates)

            # 10. Statistics of the observations.
            if args.norm_obs:
                policies.norm.include(np.concatenate(seen))

            run.step += int(sum(steps))
            run.episodes.extend(zip(np.ravel(returns), np.ravel(lengths)))
            sigma = search.sigma * search.C.diagonal().sqrt().mean()
            run.log(fitness=fitness.mean(), best_fitness=fitness.max(), sigma=sigma)
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
