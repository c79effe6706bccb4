"""Double Deep Q-Network: one network selects the next action, the other evaluates it.

Derivations: "Challenge 1: Overestimation Bias in Q-Values"; all else as in dqn.py.

    1.  Initialise Q_θ, the target network θ_target = θ and an empty buffer D.
    2.  Act: at random with probability ε or during burn-in, else argmax_a Q_θ(s, a).
    3.  Store (s, a, R, s', f) in D: R the N-step reward, s' the state after it, and
        f = γ^N (1 - terminated) the factor of its value; N is less where the episode ends.
    4.  Sample a batch of D, as often as the update-to-data ratio says.
    5.  y = R + f Q_target(s', argmax_a Q_θ(s', a))
    6.  One Adam step on θ down the gradient of the loss of x = Q_θ(s, a) - y.
    7.  θ_target = θ every K updates, or (1 - τ) θ_target + τ θ at each; repeat from 2.

Notation: s, s' -> obs, next_obs -> (B, obs_dim);  a -> action -> (B,);  R, f -> reward,
bootstrap -> (B,);  Q_θ, Q_target -> q_net, target_net -> (B, A);  y -> td_target -> (B,).

The document's two networks A and B are double_dqn_target called with Q_A(s') to select and Q_B(s')
to evaluate. Here, as in the paper, A is the network that learns and B its target network.

Paper: van Hasselt et al. 2016, Deep Reinforcement Learning with Double Q-learning, 1509.06461.
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
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.adam import adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = "double_dqn"
LOG_EVERY = 200  # environment steps
ACTION_SPACES = (gym.spaces.Discrete,)
LIMITS = {"gamma": (0, 1), "epsilon": (0, 1), "tau": (0, 1), "target_every": (0, 1e18)}


@dataclass
class Args:
    total_timesteps: int = 100_000  # environment steps; some seeds need more than 50_000
    burn_in: int = 1_000  # steps of random actions before the first update
    epsilon: float = 0.05  # ε in the end; it falls linearly from 1
    epsilon_steps: int = 10_000  # steps after burn-in until it is there
    gamma: float = 0.99  # γ, the discount
    n_step: int = 20  # N, rewards in a target before the value of the state after them
    buffer_size: int = 15_000  # transitions kept: older rewards are those of a policy long gone
    batch_size: int = 128  # transitions in an update
    utd: float = 0.3  # updates per environment step: 0.25 is one in four steps, 4 four a step
    update_every: int = 1  # steps between rounds of updates, in which the policy stays as it is
    learning_rate: float = 1e-3  # Adam's step size
    anneal_lr: bool = True  # linear decay, to 0 at --total-timesteps, also where --resume raises it
    target_every: int = 0  # K, updates between hard copies to the target network; 0 without τ: 100
    tau: float = 0.0  # τ, the document's α, share of θ in a soft update at each; 0: hard copies
    loss: Literal["huber", "squared"] = "huber"  # of the TD error; LunarLander wants squared
    delta: float = 10.0  # δ, where the Huber loss turns linear: a small one fits medians, not means
    max_grad_norm: float = 10.0  # clip of the gradient's global norm
    hidden: int = 64  # units in the first hidden layer
    hidden_2: int = 64  # units in the second

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


class QNetwork(nn.Module):
    """Q_θ(s, ·): two ReLU layers and a linear one. Another kind of observation begins here."""

    def __init__(self, obs_dim: int, hidden: int, hidden_2: int, outputs: int):
        super().__init__()
        layers = nn.Linear(obs_dim, hidden), nn.Linear(hidden, hidden_2)
        self.layers = nn.ModuleList([*layers, nn.Linear(hidden_2, outputs)])

    def forward(self, obs: Tensor) -> Tensor:
        """(B, obs_dim) to (B, A)."""
        first, second, last = self.layers
        return last(second(first(obs).relu()).relu())

    def in_numpy(self):
        """forward, with the present weights, of arrays: for few rows a quarter of torch's time."""
        arrays = (x.detach().cpu().numpy().T for x in self.layers.parameters())
        w_1, b_1, w_2, b_2, w_3, b_3 = arrays
        return lambda x: np.maximum(np.maximum(x @ w_1 + b_1, 0) @ w_2 + b_2, 0) @ w_3 + b_3


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


def n_step_return(rewards, gamma):
    """R = Σ_k γ^k r_k   [Challenge 2: Reducing Error Compounding with N-Step Returns, eq. 2]

    The rewards of that target, before the value. rewards: N numbers. Returns one, in their units.
    """
    return sum(gamma**k * reward for k, reward in enumerate(rewards))


def double_dqn_target(reward, bootstrap, q_select, q_evaluate):
    """y = R + f Q_B(s', a*),  a* = argmax_a Q_A(s', a)

    [Challenge 1: Overestimation Bias in Q-Values, eq. 2] and [Challenge 1: Overestimation Bias in
    Q-Values, eq. 3]; with A = θ and B = θ_target [Challenge 1: Overestimation Bias in Q-Values,
    eq. 4] and [Challenge 1: Overestimation Bias in Q-Values, eq. 5]. reward R, bootstrap f: (B,);
    q_select Q_A(s', ·), q_evaluate Q_B(s', ·): (B, A). Returns (B,), in units of reward.
    """
    action = q_select.argmax(-1, keepdim=True)
    return reward + bootstrap * q_evaluate.gather(-1, action).squeeze(-1)


def squared_loss(x):
    """L = E[x²]   [Fitted Q-Iteration: Neural Networks for Value Functions, eq. 2]

    x = Q_θ(s, a) - y: (B,). Returns (), to be minimised, in squared units of reward.
    """
    return x.pow(2).mean()


def huber_loss(x, delta):
    """L = E[x²/2 if |x| ≤ δ else δ|x| - δ²/2]   [Practical Training Details for DQN, eq. 1]

    x = Q_θ(s, a) - y, [Practical Training Details for DQN, eq. 2]: (B,); delta δ > 0. Returns (),
    to be minimised.
    """
    return torch.where(x.abs() <= delta, x.pow(2) / 2, delta * x.abs() - delta**2 / 2).mean()


# Training -----------------------------------------------------------------------------------------


def train(args: Args) -> np.ndarray:
    """Run the algorithm above; return the episode returns of the final evaluation."""
    check(args)
    if args.tau > 0 and args.target_every > 0:
        stop("--tau and --target-every exclude each other: soft updates or hard copies")
    target_every, tau = (1, args.tau) if args.tau > 0 else (args.target_every or 100, 1.0)
    gamma, utd, update_every = args.gamma, args.utd, args.update_every
    burn_in, device = args.burn_in, args.device

    # 1. Initialise.
    if args.hidden * args.hidden_2 * args.batch_size < 2**23:
        torch.set_num_threads(1)  # layers this small lose more to threads than they gain
    torch.manual_seed(args.seed)
    env = make_envs(args.env_id, 1, vectorization_mode="sync").unwrapped.envs[0]
    env = gym.wrappers.FlattenObservation(env)
    obs_dim, space = env.observation_space.shape[0], env.action_space
    q_net = QNetwork(obs_dim, args.hidden, args.hidden_2, int(space.n)).to(device)
    target_net = copy.deepcopy(q_net).requires_grad_(False)
    theta, target_theta = as_vector(q_net), as_vector(target_net)
    optimizer = Adam(theta)
    buffer = ReplayBuffer(args.buffer_size, np.zeros(obs_dim, np.float32), np.int64(0))
    modules = {"q_net": q_net, "target_net": target_net, "optimizer": optimizer, "buffer": buffer}

    def act(obs: np.ndarray) -> np.ndarray:
        return q_net.in_numpy()(obs).argmax(-1) + space.start

    run = Run(args, modules, act)
    rng = np.random.default_rng(env_seed(args.seed, run.step, 0))
    q_values, ended = q_net.in_numpy(), True
    window, starts = deque(), deque(maxlen=100)
    scalars = {}

    while run.step < args.total_timesteps and not run.interrupted:
        remaining = 1 - run.step / args.total_timesteps
        learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)
        steps = min(LOG_EVERY, args.total_timesteps - run.step)
        for step in range(run.step, run.step + steps):
            if ended:
                seed = env_seed(args.seed, run.step, 0) if step == run.first_step else None
                obs, rewards = np.float32(env.reset(seed=seed)[0]), []
                start_value = q_values(obs).max()

            # 2. Act.
            decay = np.clip((step - burn_in) / args.epsilon_steps, 0, 1)
            epsilon = 1 + (args.epsilon - 1) * decay
            explore = step < burn_in or rng.random() < epsilon
            action = rng.integers(space.n) if explore else q_values(obs).argmax()
            next_obs, reward, terminated, truncated, _ = env.step(action + space.start)
            next_obs, ended = np.float32(next_obs), terminated or truncated

            # 3. Store the transition that N steps make, or as many as there were.
            rewards.append(reward)
            window.append((obs, action))
            while window and (ended or len(window) == args.n_step):
                n_step_reward = n_step_return(rewards[-len(window) :], gamma)
                bootstrap = gamma ** len(window) * (not terminated)
                buffer.add(*window.popleft(), n_step_reward, next_obs, bootstrap)
            obs = next_obs
            if ended:
                run.episodes.append((sum(rewards), len(rewards)))
                starts.append((start_value, n_step_return(rewards, gamma)))

            begin = step + 1 - (update_every if (step + 1) % update_every == 0 else 0)
            first, due = (math.floor(utd * max(s - burn_in, 0)) for s in (begin, step + 1))
            for update in range(first, due):
                # 4. Sample.
                batch = buffer.sample(args.batch_size, rng, device)
                b_obs, b_action, b_reward, b_next_obs, b_bootstrap = batch
                # 5. Target.
                with torch.no_grad():
                    q_next = q_net(b_next_obs), target_net(b_next_obs)
                    td_target = double_dqn_target(b_reward, b_bootstrap, *q_next)
                # 6. Adam step.
                q = q_net(b_obs).gather(-1, b_action.unsqueeze(-1)).squeeze(-1)
                x = q - td_target
                loss = huber_loss(x, args.delta) if args.loss == "huber" else squared_loss(x)
                gradient = torch.autograd.grad(loss, [*q_net.parameters()])
                gradient = torch.cat([g.flatten() for g in gradient])
                gradient *= (args.max_grad_norm / (gradient.norm() + 1e-8)).clamp(max=1)
                optimizer.step(gradient, learning_rate)
                # 7. Target network.
                if (update + 1) % target_every == 0:
                    target_theta.lerp_(theta, tau)
                q_values = q_net.in_numpy()
                scalars = {"loss": loss, "q_mean": q.mean(), "td_error": x.abs().mean()}

        if starts:
            start_value, start_return = np.mean(starts, 0)
            scalars |= {"start_value": start_value, "start_return": start_return}
        run.update(steps, scalars | {"epsilon": np.float64(epsilon)})
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
