r"""Twin Delayed DDPG: DDPG that trusts the lower of two critics and updates its actor less often.

Derivations in the document (tests/document/README.md): "DDPG and TD3: The Full Algorithm",
"DDPG and TD3: Off-Policy Actor-Critic for Continuous Actions",
"The Deterministic Policy Gradient: How Backprop Works Through the Critic",
"Is there a separate policy $\mu$?", "Summary: DDPG vs TD3 vs SAC"; from earlier sections
"Option 2: Off-Policy Actor-Critic with a Learned Q-Function",
"Key Hyperparameters and Design Choices".

    1.  Initialise the actor π_θ, the critics Q_1, Q_2 with weights φ, a target copy of each and an
        empty buffer D.
    2.  Act: uniformly at random during burn-in, then a = clip(π_θ(s) + σ ε, -1, 1), ε ~ N(0, 1).
    3.  Store (s, a, r, s', discount) in D: discount = γ (1 - terminated).
    4.  Sample a batch from D; --utd is the number of batches for an environment step.
    5.  a' = clip(π_target(s') + clip(σ_target ε, -c, c), -1, 1),
        y = r + discount min_i Q_i,target(s', a')
    6.  One Adam step on φ down the gradient of Σ_i E[(Q_i(s, a) - y)²].
    7.  Every d updates of the critics: one Adam step on θ up the gradient of E[Q_1(s, π_θ(s))], and
    8.  targets: φ_target = (1 - τ) φ_target + τ φ, θ_target alike. Repeat from 2.

Notation: s, s' -> obs, next_obs -> (B, obs_dim);  a, a' -> action, next_action -> (B, action_dim),
in [-1, 1], scaled to the environment's bounds by to_env;  r -> reward -> (B,);  Q_i -> q ->
(2, B), a row for each critic;  y -> td_target -> (B,).  Batches sampled from D are b_obs,
b_action, ...

After a time limit (truncated) Q of the last state stands for the rewards that would have followed;
after termination nothing follows.

Beyond the document: a' comes from the target actor, as in the paper; the document takes it from the
current policy. The noise on a' is clipped to [-c, c], as in the paper, and actions to [-1, 1]; the
document clips neither. Adam takes the gradient steps, with torch's defaults but for the learning
rate. τ is the α of the document's soft update.

Unlike the paper's, the actor's last layer starts near 0, as in DDPG's paper. Both hidden layers
have 400 units, since --hidden sets both (400 and 300 in the paper). Burn-in takes 10,000 steps
everywhere; the paper has that for HalfCheetah and Ant, and 1,000 elsewhere.

Logged: start_value is min_i Q_i(s, π_θ(s)) at the first observation of an episode, start_return the
discounted return that followed, exploration included; both are means over the last 100 episodes.

Paper: Fujimoto et al. 2018, Addressing Function Approximation Error in Actor-Critic Methods, arXiv
1802.09477.
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

import copy
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
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import distributed as dist, nn
from torch.func import functional_call
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = "td3"
LOG_EVERY = 200  # environment steps
ACTION_SPACES = (gym.spaces.Box,)
IMAGES = False  # whether observations may be images
LIMITS = {"gamma": (0, 1), "tau": (0, 1)}  # least and most


@dataclasses.dataclass
class Args:
    total_timesteps: int = 20_000  # environment steps
    burn_in: int = 10_000  # steps of random actions before the first update; at least 1
    sigma: float = 0.1  # σ, standard deviation of exploration noise; 1 is half an action's range
    target_sigma: float = 0.2  # σ_target, standard deviation of noise on the target actor's action
    noise_clip: float = 0.5  # c: noise on the target actor's action is clipped to [-c, c]
    actor_every: int = 2  # d: actor and targets are updated at every d-th update of the critics
    gamma: float = 0.99  # γ, the discount factor; after --resume only of new transitions
    buffer_size: int = 1_000_000  # transitions in the replay buffer; new ones replace the oldest
    batch_size: int = 100  # B, transitions in the batch of an update
    utd: float = 1.0  # update-to-data ratio: updates of the critics per environment step
    learning_rate: float = 1e-3  # Adam's step size for all networks
    tau: float = 0.005  # τ: targets become (1 - τ) target + τ network with each actor update
    hidden: int = 400  # units in each of the two hidden layers

    env_id: str = "Pendulum-v1"  # gymnasium id of the environment; module:Name-v0 imports module
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


def explore(action, noise, sigma):
    r"""a = clip(π_θ(s) + σ ε, -1, 1)   [DDPG and TD3: The Full Algorithm, eq. 3]

    The behaviour policy of [Is there a separate policy $\mu$?, eq. 1].
    action π_θ(s), noise ε ~ N(0, 1): (..., action_dim). Returns the same shape.
    """
    return (action + sigma * noise).clip(-1, 1)


def one_step_discount(gamma, terminated):
    """γ (1 - terminated), the weight of the value of s'
    [Option 2: Off-Policy Actor-Critic with a Learned Q-Function, eq. 3]

    The document omits (1 - terminated): no value follows a terminal state. Returns a number.
    """
    return gamma * (1 - terminated)


def smooth(action, noise, target_sigma, noise_clip):
    """a' = clip(π_target(s') + clip(σ_target ε, -c, c), -1, 1)
    [DDPG and TD3: The Full Algorithm, eq. 2]

    The document takes π_θ(s') and has no clips. action π_target(s'), noise ε ~ N(0, 1): (B,
    action_dim). Returns a', of the same shape.
    """
    return (action + (target_sigma * noise).clip(-noise_clip, noise_clip)).clip(-1, 1)


def td3_target(reward, discount, q_next):
    """y = r + discount min_i Q_i,target(s', a')   [DDPG and TD3: The Full Algorithm, eq. 2]

    reward r, discount: (B,); q_next Q_i,target(s', a'): (2, B). Returns (B,), in units of reward.
    """
    return reward + discount * q_next.amin(0)


def critic_loss(q, td_target):
    """L = Σ_i E[(Q_i(s, a) - y)²], summed over the critics i, one or two
    [Option 2: Off-Policy Actor-Critic with a Learned Q-Function, eq. 2]

    For each critic it is [DDPG and TD3: The Full Algorithm, eq. 1]. td_target y: (B,); q: (B,) for
    one critic, (2, B) for two. Returns (), to be minimised, in squared units of reward.
    """
    return (q - td_target).pow(2).mean(-1).sum()


def deterministic_actor_loss(q):
    """L = -E[Q(s, π_θ(s))]
    [DDPG and TD3: Off-Policy Actor-Critic for Continuous Actions, eq. 1]

    Minus the objective of [DDPG and TD3: The Full Algorithm, eq. 4]. q Q(s, π_θ(s)), of the first
    critic if there are two: (B,). Returns (), to be minimised, in units of reward.
    """
    return -q.mean()


def updates_due(steps, burn_in, utd):
    """⌊UTD · steps after burn-in⌋   [Key Hyperparameters and Design Choices]

    Returns the total number of updates due after so many environment steps.
    """
    return math.floor(utd * max(steps - burn_in, 0))


@torch.no_grad()
def soft_update(target, theta, tau):
    """θ_target ← (1 - τ) θ_target + τ θ   [Key Hyperparameters and Design Choices, eq. 1]

    target θ_target, theta θ: lists of tensors; target is changed in place.
    """
    torch._foreach_lerp_(target, theta, tau)


# Networks -----------------------------------------------------------------------------------------


class Actor(nn.Sequential):
    """π_θ(s): two ReLU layers and a tanh one, (B, obs_dim) to (B, action_dim), in [-1, 1]."""

    def __init__(self, env, hidden):
        first = nn.Linear(env.observation_space.shape[0], hidden)
        last = nn.Linear(hidden, env.action_space.low.size)
        relu = nn.ReLU(inplace=True)  # saves time
        super().__init__(first, relu, nn.Linear(hidden, hidden), relu, last, nn.Tanh())
        for x in last.parameters():
            nn.init.uniform_(x, -3e-3, 3e-3)  # so that actions begin near 0, where tanh is steep
        self.to_env = box_actions(env.action_space)

    def act(self, obs):
        """π_θ(s) at obs, (n, obs_dim), as the environment takes actions, (n, *shape)."""
        action = self(torch.as_tensor(obs).to(self[0].weight))
        return self.to_env(action.detach().cpu().numpy())


class QNetworks(nn.Module):
    """Q_φ(s, a) of `count` critics side by side, each two ReLU layers and a linear one."""

    def __init__(self, env, hidden, count):
        super().__init__()
        inputs = env.observation_space.shape[0] + env.action_space.low.size

        def uniform(fan_in, *shape):  # nn.Linear's initialisation
            return nn.Parameter((2 * torch.rand(count, *shape) - 1) / math.sqrt(fan_in))

        self.w_1, self.b_1 = uniform(inputs, inputs, hidden), uniform(inputs, 1, hidden)
        self.w_2, self.b_2 = uniform(hidden, hidden, hidden), uniform(hidden, 1, hidden)
        self.w_3, self.b_3 = uniform(hidden, 1, hidden), uniform(hidden, 1)

    def forward(self, obs, action):
        """(B, obs_dim) and (B, action_dim) to (count, B)."""
        x = torch.cat([obs, action], -1).expand(len(self.w_1), -1, -1)
        x = torch.baddbmm(self.b_1, x, self.w_1).relu_()
        x = torch.baddbmm(self.b_2, x, self.w_2).relu_()
        return (x * self.w_3).sum(-1) + self.b_3


def make_policy(env, args):
    """The policy for the spaces of env, whose actions must have finite bounds."""
    space = env.action_space
    if np.abs(np.float64([space.low, space.high])).max() > 1e9:
        raise Refusal(f"{args.env_id} takes actions of {space}; {SCRIPT}.py needs finite bounds")
    return Actor(env, args.hidden)


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
        action_dim = env.action_space.low.size
        actor = make_policy(env, args).to(device)
        critic = QNetworks(env, args.hidden, 2).to(device)
        target_actor, target_critic = copy.deepcopy(actor), copy.deepcopy(critic)
        parameters = [*actor.parameters(), *critic.parameters()]
        target_parameters = [*target_actor.parameters(), *target_critic.parameters()]
        actor_optimizer = torch.optim.Adam(actor.parameters(), fused=True)
        critic_optimizer = torch.optim.Adam(critic.parameters(), fused=True)
        buffer = ReplayBuffer(args.buffer_size, env.observation_space, np.zeros(action_dim, "f4"))
        learner = {"policy": actor, "critic": critic}
        learner |= {"target_actor": target_actor, "target_critic": target_critic}
        learner |= {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer}
        run = stack.enter_context(Run(args, **learner, buffer=buffer))
        for optimizer in (actor_optimizer, critic_optimizer):
            optimizer.param_groups[0]["lr"] = args.learning_rate  # the option's, if resumed
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        if args.hidden**2 * args.batch_size < 2**23:
            torch.set_num_threads(1)  # for layers this small, threads cost more than they save

        rewards, losses, actor_losses = [], [], []
        pairs = deque(maxlen=100)  # (start_value, start_return) of the latest episodes
        obs, _ = env.reset(seed=random.getrandbits(29))

        while run.step < args.total_timesteps:
            # 2. Act.
            with torch.no_grad():
                s = torch.as_tensor(obs[None]).to(device, torch.float32)  # (1, obs_dim)
                greedy = actor(s)
                if not rewards:  # an episode begins
                    start_value = critic(s, greedy).min().item()
            noise = run.rng.standard_normal((1, action_dim), np.float32)
            action = explore(greedy.cpu().numpy(), noise, args.sigma)
            if run.step < args.burn_in:
                action = run.rng.uniform(-1, 1, (1, action_dim))
            next_obs, reward, terminated, truncated, _ = env.step(actor.to_env(action)[0])
            check_finite("an observation or a reward", next_obs.sum(dtype=float) + reward)

            # 3. Store.
            rewards.append(float(reward))  # a sum of numpy's int8 or float16 would overflow
            buffer.add(obs, action[0], reward, next_obs, one_step_discount(gamma, terminated))
            obs = next_obs
            if terminated or truncated:
                run.episodes.append((sum(rewards), len(rewards)))
                pairs.append((start_value, np.dot(rewards, gamma ** np.arange(len(rewards)))))
                obs, rewards = env.reset()[0], []

            updates = updates_due(run.step, args.burn_in, args.utd)
            for number in range(updates, updates_due(run.step + 1, args.burn_in, args.utd)):
                # 4. Sample.
                batch = buffer.sample(args.batch_size, run.rng, device)
                b_obs, b_action, b_reward, b_next_obs, b_discount = (x.float() for x in batch)
                # 5. Target.
                with torch.no_grad():
                    next_action = target_actor(b_next_obs)
                    noise = torch.randn_like(next_action)
                    next_action = smooth(next_action, noise, args.target_sigma, args.noise_clip)
                    q_next = target_critic(b_next_obs, next_action)
                    td_target = td3_target(b_reward, b_discount, q_next)
                # 6. Critics.
                q = critic(b_obs, b_action)
                q_loss = critic_loss(q, td_target)
                critic.zero_grad()
                q_loss.backward()
                critic_optimizer.step()
                losses.append([x.item() for x in (q_loss, q.mean())])
                if (number + 1) % args.actor_every == 0:
                    # 7. Actor: the gradient flows through Q_1 alone and leaves it as it is.
                    phi_1 = {name: x[:1] for name, x in critic.named_parameters()}  # Q_1's
                    [q_1] = functional_call(critic, phi_1, (b_obs, actor(b_obs)))
                    actor_loss = deterministic_actor_loss(q_1)
                    actor.zero_grad()
                    actor_loss.backward(inputs=[*actor.parameters()])
                    actor_optimizer.step()
                    actor_losses.append(actor_loss.item())
                    # 8. Targets.
                    soft_update(target_parameters, parameters, args.tau)

            run.step += 1
            if run.step % LOG_EVERY == 0 or run.step == args.total_timesteps:
                scalars = dict(zip(("critic_loss", "q_mean"), np.mean(losses, 0))) if losses else {}
                scalars |= {"actor_loss": np.mean(actor_losses)} if actor_losses else {}
                scalars |= zip(("start_value", "start_return"), np.mean(pairs, 0)) if pairs else {}
                losses, actor_losses = [], []
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
