"""Which spaces of observations and actions a script learns in, and which it refuses in one line."""

import gymnasium as gym
import numpy as np
import pytest
from conftest import SCRIPTS, command, module
from gymnasium import spaces
from runs import env_id, every_script, refused, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

OBSERVATIONS = [
    spaces.Box(-1, 1, (3,)),
    spaces.Box(-1, 1, ()),
    spaces.Box(-5, 5, (2, 3), np.float64),
    spaces.Box(0, 255, (3,), np.uint8),
    spaces.Box(-1_000, 1_000, (2,), np.int64),
    spaces.Discrete(5, start=2),
    spaces.MultiDiscrete([3, 4]),
    spaces.MultiDiscrete([[3, 4], [2, 2]]),
    spaces.MultiBinary(3),
    spaces.Tuple([spaces.Discrete(3), spaces.Box(0, 1, (2,))]),
    spaces.Dict(a=spaces.Discrete(3), b=spaces.Dict(c=spaces.MultiBinary(2))),
]
ACTIONS = [
    spaces.Discrete(3, start=-1),
    spaces.Discrete(1),
    spaces.Discrete(3, start=250, dtype=np.uint8),
    spaces.Box(-2, 2, (2, 2)),
    spaces.Box(-3, 5, (1,), np.float16),
    spaces.Box(-100, 100, (1,), np.int8),
    spaces.Box(0, 255, (2,), np.uint8),
    spaces.Box(-1e-3, 1e3, (1,), np.float64),
]
WITHOUT_BOUNDS = [
    spaces.Box(np.array([-1.0, 0.0, -np.inf]), np.array([1.0, 10.0, np.inf]), dtype=np.float64),
    spaces.Box(-1e30, 1e30, (1,)),
    spaces.Box(-np.inf, np.inf, (1,), np.float16),
    spaces.Box(np.iinfo(np.int32).min, 0, (1,), np.int32),
]
NEEDS_BOUNDS = "ddpg", "td3", "sac"


def spaced(obs, action):
    """The environment Spaces-v0 with these spaces."""
    gym.registry["Spaces-v0"].kwargs = {"observation_space": obs, "action_space": action}
    return "Spaces-v0"


@every_script
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_spaces(name, tmp_path):
    """Every action is one of the space's, which the environment checks; without a warning."""
    actions = ACTIONS + WITHOUT_BOUNDS * (name not in NEEDS_BOUNDS)
    actions = [space for space in actions if isinstance(space, module(name).ACTION_SPACES)]
    cases = [(obs, actions[0]) for obs in OBSERVATIONS]
    cases += [(OBSERVATIONS[0], action) for action in actions[1:]]
    for i, (obs, action) in enumerate(cases):
        returns = train(name, tmp_path / str(i), env_id=spaced(obs, action), total_timesteps=100)
        assert (returns == 0).all()


@every_script
@pytest.mark.parametrize(
    ("obs", "action"),
    [
        (spaces.Box(-1, 1, (3,)), spaces.MultiDiscrete([2, 2])),
        (spaces.Box(-1, 1, (3,)), spaces.MultiBinary(2)),
        (spaces.Box(-1, 1, (3,)), spaces.Tuple([spaces.Discrete(2), spaces.Box(-1, 1, (1,))])),
        (spaces.Sequence(spaces.Discrete(2)), spaces.Discrete(2)),
        (spaces.Dict(a=spaces.Graph(spaces.Discrete(2), None)), spaces.Discrete(2)),
    ],
    ids=["MultiDiscrete", "MultiBinary", "Tuple", "Sequence", "Graph"],
)
def test_unsupported_spaces_are_refused(name, tmp_path, obs, action):
    wrong = obs if isinstance(action, spaces.Discrete) else action
    options = ["--env-id", spaced(obs, action), "--run-dir", tmp_path, "--total-timesteps", 1]
    refused(command(name, *options), wrong)


@pytest.mark.parametrize("space", WITHOUT_BOUNDS, ids=["infinite", "huge", "short", "integer"])
@pytest.mark.parametrize("name", NEEDS_BOUNDS)
def test_actions_without_bounds_are_refused_where_they_are_scaled(name, space, tmp_path):
    task = spaced(OBSERVATIONS[0], space)
    options = ["--env-id", task, "--run-dir", tmp_path, "--total-timesteps", 1]
    refused(command(name, *options), "finite bounds")


@pytest.mark.parametrize("name", SCRIPTS)
def test_actions_of_the_other_kind_are_refused_by_name(name, tmp_path):
    """Those that learn in one kind of space only say so of the other's best known environment."""
    kinds = module(name).ACTION_SPACES
    if len(kinds) == 1:
        other = "Pendulum-v1" if kinds[0] is spaces.Discrete else "CartPole-v1"
        refused(command(name, "--env-id", other, "--run-dir", tmp_path), other)


class Loose(gym.Env):
    """Rewards and ends of numpy's and Python's kinds, observations not of the space's dtype.

    Its bounds are finite and say nothing.
    """

    observation_space = spaces.Box(-1e30, 1e30, (2,), np.float32)
    rewards = np.int8(100), np.int8(100), True, np.float64(0.5), np.int64(2), np.float32(1.5)

    def __init__(self, action_space):
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2), {"why": "reset"}

    def step(self, action):
        self.t += 1
        ended = self.t == 6
        return np.zeros(2), self.rewards[self.t - 1], np.bool_(ended), int(ended), {"t": self.t}


@every_script
def test_an_environment_that_is_loose_with_types(name, tmp_path):
    action_space = gym.make(env_id(name)).action_space
    gym.registry.pop("Loose-v0", None)
    gym.register("Loose-v0", lambda: Loose(action_space), disable_env_checker=True)
    returns = train(name, tmp_path, env_id="Loose-v0", total_timesteps=200)
    assert returns.tolist() == [205] * 3
    log = EventAccumulator(str(tmp_path)).Reload()
    assert {event.value for event in log.Scalars("charts/episodic_return")} == {205}
