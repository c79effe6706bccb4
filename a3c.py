"""Asynchronous Advantage Actor-Critic: workers that act and learn alone, on shared parameters.

Derivations: "Asynchronous Deep RL for On-Policy Learning", "The Core Problem",
"The Asynchronous Solution: Parallel Experience Collection",
"Asynchronous Advantage Actor-Critic (A3C)", "Advantage Actor-Critic (A2C)",
"The Core Actor-Critic Framework".

    1.  Initialise the shared parameters θ of the policy π and φ of the critic V.
    Each worker, until all have taken the total of steps together:
    2.  Copy θ, φ to θ', φ'.
    3.  Let π_θ' act for k steps, or up to the end of the episode.
    4.  Advantages A_t = G_t - V_φ'(s_t), G_t all rewards of this rollout from t on, then V_φ'.
    5.  L = Σ_t [log π_θ'(a_t|s_t) A_t + c_H H(π_θ') - c_V (V_φ' - G_t)²] / k
    6.  One RMSprop step on the shared θ, φ up the gradient of L in θ', φ', without waiting.

Notation: s -> obs -> (T+1, obs_dim), T ≤ k steps;  a -> actions -> (T,) or (T, action_dim);
r_t, A_t, G_t -> rewards, advantages, returns -> (T,);  V_φ' -> values -> (T+1,);
log π_θ' -> logp -> (T,);  θ', φ' -> theta -> (d,);  θ, φ -> shared_theta -> (d,).

Nothing is locked but the count of steps: two workers may write at once, and one may learn from what
the other has already outdated, so only one worker alone is reproducible. The optimiser's state is
shared too, as the paper found best. Gradients are taken by torch.autograd.grad, which leaves none
in .grad to be cleared, or shared by accident. A time limit (truncated) ends the rollout but not the
value: only terminated does. Beyond the paper: a clip of the gradient's norm; with one as wide as 40
some runs on Acrobot never meet the goal. Losses and episodes are logged of worker 0, the main
process, and steps of all. Workers are forked, so this runs on Linux and macOS.

Paper: Mnih et al. 2016, Asynchronous Methods for Deep Reinforcement Learning, arXiv 1602.01783,
algorithm S3.
"""

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
import torch.multiprocessing as mp
import tyro
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = "a3c"
LOG_EVERY = 200  # environment steps of worker 0
ACTION_SPACES = (gym.spaces.Discrete, gym.spaces.Box)
LIMITS = {"gamma": (0, 1)}  # of options that end at 1


@dataclass
class Args:
    total_timesteps: int = 200_000  # environment steps, over all workers
    workers: int = 2  # processes, each with an environment of its own
    k_step: int = 16  # k, steps at most of a worker between its updates
    gamma: float = 0.99  # γ, the discount
    learning_rate: float = 7e-3  # RMSprop's step size
    anneal_lr: bool = True  # linear decay, to 0 at --total-timesteps, also where --resume raises it
    entropy_coef: float = 0.0  # c_H, weight of the entropy bonus
    value_coef: float = 0.5  # c_V, weight of the value loss
    max_grad_norm: float = 5.0  # clip of the gradient's global norm
    init_std: float = 1.0  # σ of the Gaussian policy at the start, 1 being half the action's range
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


def policy_for(obs_dim: int, space: gym.Space, args: Args) -> nn.Module:
    """The policy for actions in space."""
    if isinstance(space, gym.spaces.Discrete):
        return SoftmaxPolicy(None, obs_dim, space, args.hidden)
    return GaussianPolicy(None, obs_dim, space, args.hidden, args.init_std)


class RMSprop(nn.Module):
    """torch's RMSprop on one vector θ, changed in place, with v, the mean of g², in a buffer.

    θ ← θ - η g / (√v + ε). ε is large, as is usual for A3C: where V_φ is exact for long, v fades,
    and with a small ε the next failure moves all weights by 10 η. It costs no import; that of
    torch.optim takes a second.
    """

    def __init__(self, theta: Tensor):
        super().__init__()
        self.theta, self.v = theta, nn.Buffer(torch.zeros_like(theta))

    def step(self, gradient: Tensor, learning_rate: float) -> None:
        self.v.mul_(0.99).addcmul_(gradient, gradient, value=0.01)
        self.theta.addcdiv_(gradient, self.v.sqrt().add_(0.1), value=-learning_rate)


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

    n = k, or what is left of the episode or rollout; after termination without V. k = 1 is
    [Advantage Actor-Critic (A2C), eq. 1] and
    [How do we learn the state-dependent baseline $V^\pi(s)$?, eq. 9]; k = ∞ on whole episodes
    [How do we learn the state-dependent baseline $V^\pi(s)$?, eq. 8].
    Computed from G = V, k times: G_t = r_t + γ (1 - terminated_t) (V(s_{t+1}) if truncated_t else
    G_{t+1}). rewards, terminated, truncated: (T, ...); values, V of s_0 to s_T: (T+1, ...). Returns
    (T, ...), in units of reward: those of reset steps are meaningless, and no other reads them.
    """
    returns = values.clone()
    for _ in range(min(k, len(rewards))):
        successor = torch.where(truncated, values[1:], returns[1:])
        returns[:-1] = rewards + gamma * ~terminated * successor
    return (returns - values)[:-1]


def policy_gradient_loss(logp, advantages):
    """-E[log π_θ(a|s) A], whose gradient is -ĝ of [The Core Actor-Critic Framework, eq. 1]

    But for a factor: the mean is over steps, the document's over trajectories.
    logp log π_θ, advantages A, constants: (B,). Returns (), to be minimised, in units of reward.
    """
    return -(logp * advantages).mean()


def value_loss(values, returns):
    r"""E[(V_φ(s_t) - G_t)²]   [How do we learn the state-dependent baseline $V^\pi(s)$?, eq. 4]

    values V_φ, returns G: (B,). Returns (), to be minimised, in squared units of reward.
    """
    return nn.functional.mse_loss(values, returns)


# Training -----------------------------------------------------------------------------------------


def train(args: Args) -> np.ndarray:
    """Run the algorithm above; return the episode returns of the final evaluation."""
    check(args)
    if args.device != "cpu":
        stop(f"--device {args.device}: the workers share the memory of the CPU")
    k, gamma = args.k_step, args.gamma

    # 1. Initialise.
    torch.set_num_threads(1)  # a worker is one thread
    torch.manual_seed(args.seed)
    env = make_envs(args.env_id, 1, vectorization_mode="sync").unwrapped.envs[0]
    env = gym.wrappers.FlattenObservation(env)
    obs_dim, space = env.observation_space.shape[0], env.action_space
    policy = policy_for(obs_dim, space, args)
    critic = MLP(None, obs_dim, args.hidden, 1, gain=1.0)
    parameters = [*policy.parameters(), *critic.parameters()]
    # θ' and φ' as one vector, of which the parameters of the networks become views.
    theta = parameters_to_vector(parameters).detach()
    vector_to_parameters(theta, parameters)
    shared_theta = theta.clone().share_memory_()
    optimizer = RMSprop(shared_theta).share_memory()
    modules = {"policy": policy, "critic": critic, "optimizer": optimizer}

    def act(obs: np.ndarray) -> np.ndarray:
        return policy.to_env(policy.actor()(obs))

    run = Run(args, modules, act)
    shared_theta.copy_(theta)
    total = max(args.total_timesteps, run.step)
    left, lock = mp.Value("q", total - run.step, lock=False), mp.Lock()  # steps not yet taken
    main = os.getpid()

    def take_step() -> bool:
        """Count down by one, unless nothing is left."""
        with lock:
            taken = left.value > 0
            left.value -= taken
        return taken

    def log(scalars: dict[str, Tensor]) -> None:
        """Of the steps of all workers, and the parameters as they are now."""
        theta.copy_(shared_theta)  # what is saved and evaluated
        norm = {"parameter_norm": theta.norm()}  # a worker may have left it not finite
        run.update(total - abs(left.value) - run.step, scalars | norm)

    def work(index: int) -> dict[str, Tensor]:
        """One worker, of which number 0 is the main process; returns the last losses."""
        rank = index + 1
        if rank > 0:  # Ctrl-C is for the main process, whose death comes as the same signal
            signal.signal(signal.SIGINT, lambda *_: os.getppid() == main or os._exit(1))
        torch.manual_seed(env_seed(args.seed, run.step, rank))
        np_obs = np.zeros((k + 1, obs_dim), np.float32)
        np_obs[0] = env.reset(seed=env_seed(args.seed, run.step, rank))[0]
        np_actions = policy.actor()(np_obs[:k])  # (k,) or (k, action_dim)
        np_rewards = np.zeros(k, np.float32)
        np_terminated, np_truncated = np.zeros((2, k), np.bool_)
        episode, scalars, steps = [], {}, 0
        while True:
            # 2. Copy the parameters.
            theta.copy_(shared_theta)
            learning_rate = args.learning_rate * (left.value / total if args.anneal_lr else 1)

            # 3. Act.
            pi, noise, t, ended = policy.actor(), policy.noise(k), 0, False
            while t < k and not ended and take_step():
                np_actions[t] = pi(np_obs[t], noise[t])
                result = env.step(policy.to_env(np_actions[t : t + 1])[0])
                np_obs[t + 1], np_rewards[t], np_terminated[t], np_truncated[t], _ = result
                ended = np_terminated[t] or np_truncated[t]
                t += 1
            if t == 0:
                return scalars
            obs = torch.from_numpy(np_obs[: t + 1])
            rows = np_actions, np_rewards, np_terminated, np_truncated
            actions, rewards, terminated, truncated = (torch.from_numpy(row[:t]) for row in rows)

            # 4. Advantages and returns.
            with torch.no_grad():
                values = critic(obs).squeeze(-1)
                advantages = k_step_advantages(rewards, values, terminated, truncated, gamma, k)
                returns = advantages + values[:-1]

            # 5. Loss.
            output = policy(obs[:-1])
            logp, entropy = policy.log_prob(output, actions), policy.entropy(output).mean()
            pg_loss = policy_gradient_loss(logp, advantages)
            v_loss = value_loss(critic(obs[:-1]).squeeze(-1), returns)
            loss = pg_loss - args.entropy_coef * entropy + args.value_coef * v_loss

            # 6. RMSprop step on the shared parameters.
            gradient = torch.autograd.grad(loss * (t / k), parameters)  # the sum of the steps / k
            gradient = torch.cat([g.flatten() for g in gradient])
            gradient *= (args.max_grad_norm / (gradient.norm() + 1e-8)).clamp(max=1)
            optimizer.step(gradient, learning_rate)

            episode += rewards.tolist()
            np_obs[0] = np_obs[t]
            if ended:
                run.episodes.append((sum(episode), len(episode)))
                np_obs[0], episode = env.reset()[0], []
            scalars = {"policy_loss": pg_loss, "value_loss": v_loss, "entropy": entropy}
            steps += t
            if rank == 0 and steps >= LOG_EVERY and left.value > 0:
                log(scalars)
                workers.join(timeout=0)  # raises what another worker raised
                steps = 0
                if run.interrupted:
                    with lock:
                        left.value *= -1  # nobody takes another

    # A fork starts in 10 ms, a new interpreter in 1.5 s; a fork has its own copy of all that is not
    # shared: environment, networks, buffers. torch, on one thread, has none for it to lose.
    options = {"nprocs": args.workers - 1, "join": False, "daemon": True, "start_method": "fork"}
    workers = mp.start_processes(work, **options)
    try:
        scalars = work(-1)
        while not workers.join():
            pass
        if run.step < total - abs(left.value):
            log(scalars)
    except Exception:
        theta.copy_(shared_theta)
        run.step = total - abs(left.value)
        if theta.isfinite().all():
            run.save()
        raise
    finally:
        for process in workers.processes:
            process.kill()
            process.join()
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
