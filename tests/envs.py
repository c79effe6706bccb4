"""Tiny environments whose values and best actions are known, each a second or two to learn.

`import envs` registers them; on a command line, with tests/ on PYTHONPATH, they are
`envs:Constant-v0` and so on. The discount that the values below speak of is gamma.
"""

import random

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Tiny(gym.Env):
    """Observation (2,); subclasses say what a step does."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2)
    steps = 0  # taken by all tiny environments of this process

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.sign = 0, self.np_random.choice([-1.0, 1.0])
        return self.obs(), {}

    def obs(self):
        return np.zeros(2, np.float32)

    def step(self, action):
        self.t += 1
        Tiny.steps += 1
        reward, terminated, truncated = self.outcome(action)
        return self.obs(), float(reward), bool(terminated), bool(truncated), {}


class Constant(Tiny):
    """Reward 1 and the end. V = 1."""

    def outcome(self, action):
        return 1, True, False


class TwoStep(Tiny):
    """Reward 1 for the second step if the first action was 1. V(first) = gamma, V(second) = 1."""

    def obs(self):
        return np.array([self.t, self.sign], np.float32)

    def outcome(self, action):
        if self.t == 1:
            self.right = action == 1
        return self.t == 2 and self.right, self.t == 2, False


class Observed(Tiny):
    """The reward is the sign observed. V(s) = s."""

    def obs(self):
        return np.array([self.sign, 0], np.float32)

    def outcome(self, action):
        return self.sign, True, False


class Matched(Observed):
    """1 for the action that matches the sign observed, else -1. V(s) = 1 in the end."""

    def outcome(self, action):
        return 1 if (action == 1) == (self.sign > 0) else -1, True, False


class MatchedBox(Observed):
    """-(a - target)², the target 3 or 7 by the sign observed, in a Box from 0 to 10."""

    action_space = spaces.Box(0, 10, (1,), np.float32)

    def outcome(self, action):
        assert self.action_space.contains(action), action
        return -((action[0] - 5 - 2 * self.sign) ** 2), True, False


class Truncates(Tiny):
    """Reward 1 for ever, cut every 5 steps by a time limit. V = 1 / (1 - gamma) everywhere."""

    def outcome(self, action):
        return 1, False, self.t == 5


class Terminates(Tiny):
    """Reward 1 for each of 5 steps, the time observed. V(t) = (1 - gamma^(5 - t)) / (1 - gamma)."""

    def obs(self):
        return np.array([self.t - 2.5, 0], np.float32)

    def outcome(self, action):
        return 1, self.t == 5, False


class Both(Tiny):
    """Reward 1, ended with probability 0.2 a step and cut at 5. V = 1 / (1 - 0.8 gamma)."""

    def outcome(self, action):
        terminated = self.np_random.random() < 0.2
        return 1, terminated, self.t == 5


class Stays(Observed):
    """The sign observed is the reward, and stays; a time limit cuts every second step.

    V(s) = s / (1 - gamma), as the final observation has the sign. The next episode's first one has
    any: a value taken from it would be 0 on average, and V(s) about s.
    """

    def outcome(self, action):
        return self.sign, False, self.t == 2


class Bandit(Tiny):
    """-4 (a - 0.3)² for one action: under max-entropy a Gaussian of variance alpha / 8 is best."""

    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def outcome(self, action):
        return -4 * (action[0] - 0.3) ** 2, True, False


class Dimmer(Tiny):
    """Levels from 100 to 200 in a byte, of which 180 pays 1 and every other less."""

    action_space = spaces.Box(100, 200, (1,), np.uint8)

    def outcome(self, action):
        assert self.action_space.contains(action), action
        return 1 - abs(int(action[0]) - 180) / 100, True, False


class Draws(Tiny):
    """Observes draws of the global generators and of its own; notes seeds and actions."""

    seeds, log = [], []

    def reset(self, *, seed=None, options=None):
        Draws.seeds.append(seed)
        self.own = 0.0
        return super().reset(seed=seed)

    def obs(self):
        self.own = float(self.np_random.uniform(-1, 1))
        return np.array([self.own + random.random(), np.random.random()], np.float32)

    def step(self, action):
        Draws.log.append((self.own, float(np.asarray(action).flat[0])))
        return super().step(action)

    def outcome(self, action):
        return 0, False, self.t == 5


class Faulty(Tiny):
    """After `good` steps of all such environments something fails: see `fault`.

    reward, infinite: the reward is not a number, or infinite. observation, reset: the observation
    is not a number, always or only at the beginning of an episode. step: the step raises.
    """

    steps, good = 0, 10**9

    def __init__(self, fault="reward"):
        self.fault = fault

    def fails(self, *faults):
        return self.fault in faults and Faulty.steps > Faulty.good

    def obs(self):
        bad = self.fails("observation") or self.fails("reset") and self.t == 0
        return np.full(2, np.nan if bad else 0, np.float32)

    def outcome(self, action):
        Faulty.steps += 1
        if self.fails("step"):
            raise OSError("the simulator went away")
        reward = np.nan if self.fails("reward") else np.inf if self.fails("infinite") else 1
        return reward, self.t == 5, False


class Spaces(Tiny):
    """Any spaces at all: random observations, every action checked, reward 0, 7 steps."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def obs(self):
        return self.observation_space.sample()

    def outcome(self, action):
        assert self.action_space.contains(action), (action, self.action_space)
        return 0, False, self.t == 7


class TruncatesBox(Truncates):
    """The same where any action of a Box will do."""

    action_space = spaces.Box(-1, 1, (1,), np.float32)


class TerminatesBox(Terminates):
    """The same where any action of a Box will do."""

    action_space = spaces.Box(-1, 1, (1,), np.float32)


class BothBox(Both):
    """The same where any action of a Box will do."""

    action_space = spaces.Box(-1, 1, (1,), np.float32)


class Limits(Tiny):
    """The discount 0.5, three kinds of episode, each observed from its first to its last step.

    Where a sign is observed it is the reward for ever, and a time limit cuts every second step:
    V = 2 sign. Where (0, 1) is observed, the first step pays 1, ends, and meets the time limit too:
    V = 1. Values from the next episode, or from beyond an end, are others.
    """

    def reset(self, *, seed=None, options=None):
        first, info = super().reset(seed=seed)
        self.single = self.np_random.random() < 1 / 3
        return self.obs(), info

    def obs(self):
        seen = [0, 1] if getattr(self, "single", False) else [self.sign, 0]
        return np.array(seen, np.float32)

    def outcome(self, action):
        return 1 if self.single else self.sign, self.single, self.single or self.t == 2


class Shifted(Matched):
    """Matched, observed as 1000 ± 1: only who centres observations can tell the signs apart."""

    def obs(self):
        return np.array([1000 + self.sign, 0], np.float32)


class Pixel(Tiny):
    """An image of noise; one byte of it, bright or dark, says which action pays 5, the other -5.

    Images differ in the order of axes: (8, 8, 3), (3, 40, 40), bools (10, 10, 10). With reuse all
    are the same array, overwritten; backwards they are views.
    """

    def __init__(self, shape=(8, 8, 3), kind="uint8", reuse=False, backwards=False):
        self.backwards = backwards
        self.reused = np.zeros(shape, kind) if reuse else None
        high = 255 if kind == "uint8" else 1
        self.observation_space = spaces.Box(0, high, tuple(shape), np.dtype(kind).type)

    def obs(self):
        space = self.observation_space
        image = self.np_random.integers(0, space.high.max(), space.shape, endpoint=True)
        image[2:4, 2:4] = space.high.max() * (self.sign > 0)
        if self.reused is None:
            return image.astype(space.dtype)[..., :: -1 if self.backwards else 1]
        self.reused[:] = image
        return self.reused

    def outcome(self, action):
        return 5 if (action == 1) == (self.sign > 0) else -5, True, False


class Wander(Tiny):
    """Random observations, a reward of 1 or 2 by the action, both kinds of end, 5 steps at most."""

    def obs(self):
        return self.np_random.uniform(-1, 3, 2).astype(np.float32)

    def outcome(self, action):
        return 1 + np.sum(action), self.np_random.random() < 0.2, self.t == 5


def boxed(kind):
    """The same where any action of a Box from -1 to 1 will do."""
    return type(f"{kind.__name__}Box", (kind,), {"action_space": TruncatesBox.action_space})


StaysBox, DrawsBox, FaultyBox = map(boxed, (Stays, Draws, Faulty))
ConstantBox, LimitsBox, WanderBox = map(boxed, (Constant, Limits, Wander))
DISCRETE = Constant, TwoStep, Observed, Matched, Truncates, Terminates, Both, Stays, Draws, Faulty
DISCRETE += Limits, Shifted, Wander
BOXES = (
    MatchedBox,
    TruncatesBox,
    TerminatesBox,
    BothBox,
    StaysBox,
    DrawsBox,
    FaultyBox,
    ConstantBox,
    LimitsBox,
    WanderBox,
    Bandit,
    Dimmer,
)
for env in (*DISCRETE, *BOXES, Spaces, Pixel):
    gym.register(f"{env.__name__}-v0", env, disable_env_checker=True, order_enforce=False)
