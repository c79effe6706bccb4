"""Twin Delayed DDPG: two critics, of which the lower is believed, and an actor that waits for them.

Derivations: "Option 2: Off-Policy Actor-Critic with a Learned Q-Function",
"DDPG and TD3: Off-Policy Actor-Critic for Continuous Actions",
"DDPG and TD3: The Full Algorithm", "Summary: DDPG vs TD3 vs SAC"; all else as in ddpg.py.

    1.  Initialise the actor π_θ, critics Q_1, Q_2 of weights φ, targets equal to them and an empty
        buffer D.
    2.  Act: uniformly at random during burn-in, else a = π_θ(s) + σ ε, clipped; ε ~ N(0, 1).
    3.  Store (s, a, r, s', f) in D: f = γ (1 - terminated), the factor of the value of s'.
    4.  Sample a batch of D, as often as the update-to-data ratio says.
    5.  a' = π_target(s') + clip(σ_target ε, -c, c), clipped;   y = r + f min_i Q_i,target(s', a')
    6.  One Adam step on φ down the gradient of Σ_i E[(Q_i(s, a) - y)²].
    7.  Every d updates: one Adam step on θ up the gradient of E[Q_1(s, π_θ(s))]
    8.  and targets: φ_target = (1 - τ) φ_target + τ φ, θ_target alike; repeat from 2.

Notation: s, s' -> obs, next_obs -> (B, obs_dim);  a -> action -> (B, action_dim), in [-1, 1], which
the environment's low to high are scaled to;  r, f -> reward, bootstrap -> (B,);  Q_i -> q ->
(2, B), a row a critic;  θ, φ -> theta, phi;  y -> td_target -> (B,).

A time limit (truncated) does not end the value: only terminated does. The document takes a' from
the current policy; here, as in the paper, it is the target actor's. Weights begin as torch's, but
those of the actor's last layer as in ddpg.py.

Paper: Fujimoto et al. 2018, Addressing Function Approximation Error in Actor-Critic, 1802.09477.
"""

import copy
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
import tyro
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.adam import adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = "td3"
LOG_EVERY = 200  # environment steps
ACTION_SPACES = (gym.spaces.Box,)
LIMITS = {"gamma": (0, 1), "tau": (0, 1)}


@dataclass
class Args:
    total_timesteps: int = 20_000  # environment steps
    burn_in: int = 1_000  # steps of random actions before the first update
    sigma: float = 0.1  # σ, deviation of the exploration noise, 1 being half the action's range
    target_sigma: float = 0.2  # σ_target, deviation of the noise on the target's action
    noise_clip: float = 0.5  # c, where that noise is clipped
    actor_every: int = 2  # d, critic updates per update of actor and targets
    gamma: float = 0.99  # γ, the discount
    buffer_size: int = 1_000_000  # transitions kept, the oldest is overwritten
    batch_size: int = 256  # transitions in an update
    utd: float = 1.0  # updates per environment step: 0.25 is one in four steps, 4 four a step
    learning_rate: float = 1e-3  # Adam's step size, of all networks
    tau: float = 0.005  # τ, share of the learned weights in an update of the targets
    hidden: int = 256  # units in each of the two hidden layers

    env_id: str = "Pendulum-v1"  # gymnasium id; module:Name-v0 imports module first
    seed: int = 1  # same seed, same machine: same weights, bit for bit
    device: Literal["cpu", "cuda"] = "cpu"  # where networks and rollouts are kept
    run_dir: str = ""  # default: runs/<env-id>__<script>__<seed>__<time>
    eval_episodes: int = 20  # episodes in each evaluation, greedy or mean action
    eval_every: int = 0  # also evaluate every so many steps; 0: only at the end
    capture_video: bool = False  # record the evaluation episodes to <run-dir>/videos
    checkpoint_every: int = 50_000  # steps between checkpoints; 0: only at the end
    resume: str = ""  # checkpoint to continue from, its options being the defaults


# Networks -----------------------------------------------------------------------------------------


class Actor(nn.Module):
    """h_θ(s), of which the policy π_θ is made: two ReLU layers and a linear one."""

    def __init__(self, obs_dim: int, space: gym.spaces.Box, hidden: int, outputs: int):
        super().__init__()
        layers = nn.Linear(obs_dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, outputs)
        self.layers, self.space = nn.ModuleList(layers), space
        self.scale, self.shift = (space.high - space.low) / 2, (space.high + space.low) / 2

    def forward(self, obs: Tensor) -> Tensor:
        """(B, obs_dim) to (B, outputs)."""
        first, second, last = self.layers
        return last(second(first(obs).relu_()).relu_())

    def in_numpy(self):
        """forward, with the present weights, of arrays: for few rows a quarter of torch's time."""
        arrays = (x.detach().cpu().numpy().T for x in self.layers.parameters())
        w_1, b_1, w_2, b_2, w_3, b_3 = arrays
        return lambda x: np.maximum(np.maximum(x @ w_1 + b_1, 0) @ w_2 + b_2, 0) @ w_3 + b_3

    def to_env(self, action: np.ndarray) -> np.ndarray:
        """Actions in [-1, 1] in the environment's units, (N, *shape)."""
        action = action.reshape(-1, *self.space.shape) * self.scale + self.shift
        return action.clip(self.space.low, self.space.high).astype(self.space.dtype)


class QNetworks(nn.Module):
    """Q_φ(s, a) of `count` critics side by side, each two ReLU layers and a linear one."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int, count: int):
        super().__init__()
        inputs = obs_dim + action_dim

        def uniform(fan_in: int, *shape: int) -> nn.Parameter:  # as nn.Linear does
            return nn.Parameter((2 * torch.rand(count, *shape) - 1) / math.sqrt(fan_in))

        self.w_1, self.b_1 = uniform(inputs, inputs, hidden), uniform(inputs, 1, hidden)
        self.w_2, self.b_2 = uniform(hidden, hidden, hidden), uniform(hidden, 1, hidden)
        self.w_3, self.b_3 = uniform(hidden, 1, hidden), uniform(hidden, 1)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """(B, obs_dim) and (B, action_dim) to (count, B)."""
        x = torch.cat([obs, action], -1).expand(len(self.w_1), -1, -1)
        x = torch.baddbmm(self.b_1, x, self.w_1).relu_()
        x = torch.baddbmm(self.b_2, x, self.w_2).relu_()
        return (x * self.w_3).sum(-1) + self.b_3


def as_vector(net: nn.Module) -> Tensor:
    """The parameters of net as one vector, of which they become views."""
    parameters = list(net.parameters())
    theta = parameters_to_vector(parameters).detach()
    vector_to_parameters(theta, parameters)
    return theta


def gradient_of(loss: Tensor, net: nn.Module) -> Tensor:
    """∇ loss in the parameters of net, as one vector; that of other networks is not computed."""
    gradient = torch.autograd.grad(loss, [*net.parameters()])
    return torch.cat([g.flatten() for g in gradient])


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


# Buffer -------------------------------------------------------------------------------------------


class ReplayBuffer:
    """The last `size` transitions (s, a, R, s', f), in numpy, whose rows are cheap to write."""

    def __init__(self, size: int, obs: np.ndarray, action: np.ndarray):
        like = obs, action, np.float32(0), obs, np.float32(0)
        needed = size * sum(x.nbytes for x in like) / 2**30
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        if needed > 0.8 * memory:
            stop(f"--buffer-size {size} needs {needed:.1f} GiB of the {memory:.1f} there are")
        if needed > 1:
            print(f"{SCRIPT}.py: the replay buffer grows to {needed:.1f} GiB", file=sys.stderr)
        self.added, self.data = 0, [np.zeros((size, *x.shape), x.dtype) for x in like]

    def add(self, *transition) -> None:
        """Write one transition, over the oldest one when full."""
        for rows, value in zip(self.data, transition, strict=True):
            rows[self.added % len(rows)] = value
        self.added += 1

    def sample(self, batch_size: int, rng: np.random.Generator, device: str) -> list[Tensor]:
        """Transitions drawn uniformly, with replacement, (B, ...) each."""
        i = rng.integers(min(self.added, len(self.data[0])), size=batch_size)
        return [torch.from_numpy(rows[i]).to(device) for rows in self.data]

    def state_dict(self) -> dict:
        """What a checkpoint holds: the rows written so far."""
        data = [torch.from_numpy(rows[: self.added]).clone() for rows in self.data]
        return {"added": self.added, "data": data}

    def load_state_dict(self, state: dict) -> None:
        """Take the rows of a checkpoint; ValueError where they do not fit."""
        self.added = state["added"]
        for rows, saved in zip(self.data, state["data"], strict=True):
            if len(saved) != min(self.added, len(rows)):
                raise ValueError(f"its buffer holds {len(saved)} transitions: --buffer-size")
            rows[: len(saved)] = saved


# Equations ----------------------------------------------------------------------------------------


def explore(action, noise, sigma):
    r"""a = clip(π_θ(s) + σ ε, -1, 1)   [DDPG and TD3: The Full Algorithm, eq. 3]

    The behaviour policy of [Is there a separate policy $\mu$?, eq. 1].
    action π_θ(s), noise ε ~ N(0, 1): (..., action_dim). Returns the same, 1 being half the range.
    """
    return (action + sigma * noise).clip(-1, 1)


def smooth(action, noise, target_sigma, noise_clip):
    """a' = clip(π(s') + clip(σ_target ε, -c, c), -1, 1)   [DDPG and TD3: The Full Algorithm, eq. 2]

    action π_target(s'), noise ε ~ N(0, 1): (B, action_dim). Returns the same, in [-1, 1].
    """
    return (action + (target_sigma * noise).clip(-noise_clip, noise_clip)).clip(-1, 1)


def td3_target(reward, bootstrap, q_next):
    """y = r + f min_i Q_i,target(s', a')   [DDPG and TD3: The Full Algorithm, eq. 2]

    reward r, bootstrap f: (B,); q_next Q_i,target(s', a'): (2, B). Returns (B,), units of reward.
    """
    return reward + bootstrap * q_next.amin(0)


def critic_loss(q, td_target):
    """L = Σ_i E[(Q_i(s, a) - y)²]
    [Option 2: Off-Policy Actor-Critic with a Learned Q-Function, eq. 2]

    Of each critic i as in [DDPG and TD3: The Full Algorithm, eq. 1].
    q: (count, B); td_target y: (B,). Returns (), to be minimised, in squared units of reward.
    """
    return (q - td_target).pow(2).mean(-1).sum()


def actor_loss(q):
    """L = -E[Q_φ(s, π_θ(s))]
    [DDPG and TD3: Off-Policy Actor-Critic for Continuous Actions, eq. 1]

    The negative of what [DDPG and TD3: The Full Algorithm, eq. 4] climbs.
    q Q_φ(s, π_θ(s)): (1, B). Returns (), to be minimised, in units of reward.
    """
    return -q.mean()


# Training -----------------------------------------------------------------------------------------


def initialise(args: Args, obs_dim: int, space: gym.spaces.Box) -> tuple:
    """Networks, their parameters as vectors of which they are views, and optimisers."""
    action_dim = space.low.size
    actor = Actor(obs_dim, space, args.hidden, action_dim).to(args.device)
    for x in actor.layers[-1].parameters():
        nn.init.uniform_(x, -3e-3, 3e-3)  # as in DDPG's paper: actions near 0, where tanh is steep
    critic = QNetworks(obs_dim, action_dim, args.hidden, 2).to(args.device)
    networks = {"actor": actor, "critic": critic}
    networks |= {"target_actor": copy.deepcopy(actor), "target_critic": copy.deepcopy(critic)}
    vectors = [as_vector(net) for net in networks.values()]
    return networks, vectors, nn.ModuleList([Adam(theta) for theta in vectors[:2]])


def train(args: Args) -> np.ndarray:
    """Run the algorithm above; return the episode returns of the final evaluation."""
    check(args)
    gamma, utd, burn_in, device = args.gamma, args.utd, args.burn_in, args.device

    # 1. Initialise.
    if args.hidden * args.hidden * args.batch_size < 2**23:
        torch.set_num_threads(1)  # layers this small lose more to threads than they gain
    torch.manual_seed(args.seed)
    env = make_envs(args.env_id, 1, vectorization_mode="sync").unwrapped.envs[0]
    env = gym.wrappers.FlattenObservation(env)
    obs_dim, space = env.observation_space.shape[0], env.action_space
    if np.abs([space.low, space.high]).max() > 1e9:
        stop(f"{args.env_id} takes actions of {space}; supported: finite bounds")
    networks, vectors, optimizers = initialise(args, obs_dim, space)
    actor, critic = networks["actor"], networks["critic"]
    example = np.zeros(obs_dim, np.float32), np.zeros(space.low.size, np.float32)
    buffer = ReplayBuffer(args.buffer_size, *example)
    modules = networks | {"optimizers": optimizers, "buffer": buffer}

    def act(obs: np.ndarray) -> np.ndarray:
        return actor.to_env(np.tanh(actor.in_numpy()(obs)))

    @torch.no_grad()
    def value(obs: np.ndarray) -> float:
        obs = torch.from_numpy(obs).unsqueeze(0).to(device)
        return critic(obs, actor(obs).tanh()).min().item()

    run = Run(args, modules, act)
    rng = np.random.default_rng(env_seed(args.seed, run.step, 0))
    policy, ended = actor.in_numpy(), True
    starts, scalars = deque(maxlen=100), {}

    while run.step < args.total_timesteps and not run.interrupted:
        steps = min(LOG_EVERY, args.total_timesteps - run.step)
        for step in range(run.step, run.step + steps):
            if ended:
                seed = env_seed(args.seed, run.step, 0) if step == run.first_step else None
                obs, rewards = np.float32(env.reset(seed=seed)[0]), []
                start_value = value(obs)

            # 2. Act.
            if step < burn_in:
                action = rng.uniform(-1, 1, space.low.size)
            else:
                noise = rng.normal(size=space.low.size)
                action = explore(np.tanh(policy(obs)), noise, args.sigma)
            outcome = env.step(actor.to_env(action)[0])
            next_obs, reward, terminated, truncated, _ = outcome
            next_obs, ended = np.float32(next_obs), terminated or truncated

            # 3. Store.
            rewards.append(reward)
            buffer.add(obs, action, reward, next_obs, gamma * (not terminated))
            obs = next_obs
            if ended:
                run.episodes.append((sum(rewards), len(rewards)))
                starts.append((start_value, np.dot(rewards, gamma ** np.arange(len(rewards)))))

            first = math.floor(utd * max(step - burn_in, 0))
            for number in range(first, math.floor(utd * max(step + 1 - burn_in, 0))):
                # 4. Sample.
                batch = buffer.sample(args.batch_size, rng, device)
                scalars |= update(args, networks, vectors, optimizers, batch, number)
                policy = actor.in_numpy()

        if starts:
            scalars["start_value"], scalars["start_return"] = np.mean(starts, 0)
        run.update(steps, scalars)
    return run.finish()


def update(args: Args, networks, vectors, optimizers, batch, number: int) -> dict[str, Tensor]:
    """The steps on one batch: tensors only and no waiting for the device.

    torch.compile takes it whole if torch._dynamo.config.trace_autograd_ops is True.
    """
    actor, critic, target_actor, target_critic = networks.values()
    theta, phi, target_theta, target_phi = vectors
    actor_optimizer, critic_optimizer = optimizers
    obs, action, reward, next_obs, bootstrap = batch

    # 5. Target.
    with torch.no_grad():
        next_action = target_actor(next_obs).tanh()
        noise = torch.randn_like(next_action)
        next_action = smooth(next_action, noise, args.target_sigma, args.noise_clip)
        td_target = td3_target(reward, bootstrap, target_critic(next_obs, next_action))
    # 6. Critics.
    q = critic(obs, action)
    q_loss = critic_loss(q, td_target)
    critic_optimizer.step(gradient_of(q_loss, critic), args.learning_rate)
    scalars = {"critic_loss": q_loss.detach(), "q_mean": q.detach().mean()}
    if (number + 1) % args.actor_every == 0:
        # 7. Actor: its gradient flows through the first critic and leaves it as it is.
        first = {name: x[:1].detach() for name, x in critic.named_parameters()}
        loss = actor_loss(functional_call(critic, first, (obs, actor(obs).tanh())))
        actor_optimizer.step(gradient_of(loss, actor), args.learning_rate)
        scalars["actor_loss"] = loss.detach()
        # 8. Targets.
        target_phi.lerp_(phi, args.tau)
        target_theta.lerp_(theta, args.tau)
    return scalars


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
