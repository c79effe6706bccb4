r"""REINFORCE: play whole trajectories, then make each action likelier by what came after it.

Derivations: "Rewards and Returns", "Policy-Based RL", "REINFORCE (or Monte Carlo Policy Gradient)",
"REINFORCE (or Monte Carlo Policy Gradient) / Derivation", "Gaussian Policy", "Softmax Policy",
"Limitations", "Baseline", "How do we learn the state-dependent baseline $V^\pi(s)$?".

    1.  Initialise the policy π_θ and, for a baseline that depends on the state, the critic V_φ.
    2.  Sample N trajectories τ ~ P(τ; θ), one in each environment, each from reset to its end.
    3.  Weights: G_t = r_t + γ G_{t+1}, the return from t on, or R(τ) = G_0 at every t.
    4.  Subtract the baseline: 0, the mean b of R(τ), the mean b_t of the weights at t, or V_φ(s_t).
    5.  ∇U(θ) ≈ 1/N Σ_i Σ_t ∇ log π_θ(a_t|s_t) (G_t - b), and one Adam step on θ up it.
    6.  K Adam steps on φ down the gradient of E[(V_φ(s_t) - G_t)²].
    7.  Update the running statistics of the observations; repeat from 2.

Notation: s -> obs -> (T+1, N, obs_dim), T the longest trajectory;  a -> actions -> (T, N) or
(T, N, action_dim);  r_t, G_t -> rewards, returns -> (T, N);  G_t - b -> weights -> (T, N);
valid -> (T, N), whether the trajectory still goes on;  b_...: the steps of all, flat, (B, ...).

The means of step 4 are of the very trajectories that they are subtracted from, which the document
does not say shrinks the expected gradient by (N-1)/N; V_φ is fitted after its use, so it does not.
A discount γ < 1 leaves out the factor γ^t of the exact gradient of E[G_0], as is usual. At a time
limit (truncated) V_φ of the last state stands for what would have followed; without V_φ the return
is used as it is. Beyond the document: Adam, standardised weights, normalised observations. Under
torchrun gradients are averaged over processes; means of step 4 are each process's own, and what is
logged is that of rank 0.

Paper: Williams 1992, Simple Statistical Gradient-Following Algorithms for Connectionist
Reinforcement Learning, Machine Learning 8.
"""

import atexit
import math
import os
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass
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

SCRIPT = "reinforce"
ACTION_SPACES = (gym.spaces.Discrete, gym.spaces.Box)
LIMITS = {"gamma": (0, 1)}  # of options that end at 1


@dataclass
class Args:
    total_timesteps: int = 100_000  # environment steps of whole trajectories
    num_envs: int = 16  # N, trajectories in an update, shared out among torchrun's processes
    max_steps: int = 10_000  # T at most; a longer trajectory is cut there as by a time limit
    weight: Literal["to-go", "trajectory"] = "to-go"  # of each log π: G_t, or R(τ) at every t
    baseline: Literal["none", "constant", "time", "state"] = "state"  # b = 0, b, b_t or V_φ(s_t)
    standardize: bool = False  # shift and scale the weights of a batch to mean 0 and deviation 1
    gamma: float = 0.99  # γ, the discount
    learning_rate: float = 1e-2  # α, Adam's step size on θ
    anneal_lr: bool = True  # linear decay, to 0 at --total-timesteps, also where --resume raises it
    value_learning_rate: float = 1e-2  # Adam's step size on φ
    value_steps: int = 32  # K, Adam steps on φ in an update
    value_batch: int = 256  # steps of the trajectories drawn for each of them
    norm_obs: bool = False  # normalise observations by their running mean and variance
    init_std: float = 0.5  # σ of the Gaussian policy, 1 being half the action's range
    learn_std: bool = False  # σ is learned, beginning there; the document's is fixed
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


def flatten(parameters: list[nn.Parameter]) -> Tensor:
    """parameters as one vector, of which they become views."""
    vector = parameters_to_vector(parameters).detach()
    vector_to_parameters(vector, parameters)
    return vector


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

    [REINFORCE (or Monte Carlo Policy Gradient) / Derivation, eq. 10], [Rewards and Returns, eq. 2]
    with γ = 1. G_0 is R(τ).
    rewards: (T, N), 0 after the end of a trajectory. Returns (T, N), in units of reward.
    """
    returns = [torch.zeros_like(rewards[0])]
    for reward in reversed(rewards.unbind()):
        returns.append(reward + gamma * returns[-1])
    return torch.stack(returns[:0:-1])


def constant_baseline(returns):
    """b = 1/N Σ_i R(τ_i), for the E[R(τ)] of [Baseline, eq. 2]

    returns G: (T, N), of which the first row is R(τ). Returns (), in units of reward.
    """
    return returns[0].mean()


def time_baseline(weights, valid):
    """b_t = 1/n Σ_i w_t(i), over the n trajectories that reach t   [Baseline, eq. 3]

    weights w, G_t or R(τ), and valid: (T, N). Returns (T, 1), in units of reward.
    """
    return (weights * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True)


def reinforce_loss(logp, weights, n):
    """-1/N Σ_i Σ_t log π_θ(a_t|s_t) w_t, whose gradient is minus the estimate of ∇U(θ).

    [REINFORCE (or Monte Carlo Policy Gradient) / Derivation, eq. 9] with R(τ) for w,
    [REINFORCE (or Monte Carlo Policy Gradient) / Derivation, eq. 11] with G_t, and with a baseline
    subtracted [Baseline, eq. 2], [Baseline, eq. 3] and [Baseline, eq. 5].
    logp, weights w: (B,), all steps of the N = n trajectories. Returns (), to be minimised, in
    units of reward; the value itself means nothing.
    """
    return -(logp * weights).sum() / n


def value_loss(values, returns):
    r"""E[(V_φ(s_t) - G_t)²]   [How do we learn the state-dependent baseline $V^\pi(s)$?, eq. 4]

    values V_φ, returns G: (B,). Returns (), to be minimised, in squared units of reward.
    """
    return nn.functional.mse_loss(values, returns)


# Training -----------------------------------------------------------------------------------------


def train(args: Args) -> np.ndarray:
    """Run the algorithm above; return the episode returns of the final evaluation."""
    check(args)
    rank, world = start_processes()
    N, device, gamma = args.num_envs // world, args.device, args.gamma
    fewest = 2 if args.baseline in ("constant", "time") else 1  # one trajectory less its mean is 0
    if N * world != args.num_envs or N < fewest:
        stop(f"--num-envs must be a multiple of {world}, at least {fewest * world}")

    # 1. Initialise, alike in every process.
    if args.hidden < 512:
        torch.set_num_threads(1)  # layers this small lose more to threads than they gain
    torch.manual_seed(args.seed)
    envs = make_envs(args.env_id, N)
    policy = make_policy(envs, args).to(device)
    critic = MLP(policy.norm, envs.single_observation_space.shape[0], args.hidden, 1, gain=1.0)
    learned = [p for name, p in policy.named_parameters() if args.learn_std or name != "log_std"]
    theta, phi = flatten(learned), flatten([*critic.to(device).parameters()])
    optimizer, critic_optimizer = Adam(theta), Adam(phi)
    modules = {"policy": policy, "optimizer": optimizer}
    modules |= {"critic": critic, "critic_optimizer": critic_optimizer}

    def act(obs: np.ndarray) -> np.ndarray:
        return policy.to_env(policy.actor()(obs))

    run = Run(args, modules, act, rank, total=lambda x: world * all_mean(x))

    # Of these rows, memory is taken only by those that a trajectory reaches.
    row = np.zeros(envs.observation_space.shape, np.float32)
    row = row, policy.actor()(row), np.zeros(N, np.float32), *np.zeros((2, N), np.bool_)
    rows = [np.zeros((args.max_steps + 1, *x.shape), x.dtype) for x in row]
    np_obs, np_actions, np_rewards, np_terminated, np_valid = rows

    while run.step < args.total_timesteps and not run.interrupted:
        remaining = 1 - run.step / args.total_timesteps
        decay = remaining if args.anneal_lr else 1

        # 2. Sample trajectories. An environment whose own has ended plays on until the last one
        # does, and valid is False there.
        np_obs[0] = envs.reset(seed=env_seed(args.seed, run.step, rank))[0]
        actor, live, T = policy.actor(), np.ones(N, np.bool_), 0
        while live.any() and T < args.max_steps:
            np_valid[T] = live
            np_actions[T] = actor(np_obs[T], policy.noise(N))
            outcome = envs.step(policy.to_env(np_actions[T]))
            np_obs[T + 1], np_rewards[T], np_terminated[T], truncated, _ = outcome
            live = live & ~(np_terminated[T] | truncated)
            T += 1
        obs, actions, rewards, terminated, valid = (torch.from_numpy(x[:T]) for x in rows)
        rewards[~valid] = 0
        lengths = valid.sum(0)  # (N,)
        run.episodes.extend(zip(rewards.sum(0).tolist(), lengths.tolist(), strict=True))
        b_obs, b_actions = obs[valid].to(device), actions[valid].to(device)

        # 3. Weights.
        if args.baseline == "state":
            with torch.no_grad():
                values = critic(torch.from_numpy(np_obs[: T + 1]).to(device)).squeeze(-1).cpu()
            # obs[lengths] came after the last step; what a time limit cut off is worth its value.
            last, each = lengths - 1, torch.arange(N)
            rewards[last, each] += gamma * ~terminated[last, each] * values[lengths, each]
        returns = returns_to_go(rewards, gamma)
        weights = returns if args.weight == "to-go" else returns[0].expand(T, N)

        # 4. Subtract the baseline.
        if args.baseline == "constant":
            weights = weights - constant_baseline(returns)
        elif args.baseline == "time":
            weights = weights - time_baseline(weights, valid)
        elif args.baseline == "state":
            weights = weights - values[:T]
        b_weights, b_returns = weights[valid].to(device), returns[valid].to(device)
        if args.standardize:
            std, mean = torch.std_mean(b_weights, correction=0)
            b_weights = (b_weights - mean) / (std + 1e-8)

        # 5. Adam step on θ.
        output = policy(b_obs)
        loss = reinforce_loss(policy.log_prob(output, b_actions), b_weights, N)
        gradient = torch.autograd.grad(loss, learned)
        gradient = all_mean(torch.cat([g.flatten() for g in gradient]))
        optimizer.step(gradient, decay * args.learning_rate)
        scalars = {"policy_loss": loss, "entropy": policy.entropy(output).mean()}
        scalars["gradient_norm"] = gradient.norm()

        # 6. Adam steps on φ.
        if args.baseline == "state":
            for _ in range(args.value_steps):
                i = torch.randint(len(b_obs), (args.value_batch,), device=device)
                v_loss = value_loss(critic(b_obs[i]).squeeze(-1), b_returns[i])
                gradient = torch.autograd.grad(v_loss, [*critic.parameters()])
                gradient = all_mean(torch.cat([g.flatten() for g in gradient]))
                critic_optimizer.step(gradient, decay * args.value_learning_rate)
            scalars["value_loss"] = v_loss

        # 7. Statistics of the observations, for the next trajectories.
        if args.norm_obs:
            policy.norm.update(b_obs)

        run.update(len(b_obs), scalars)
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
