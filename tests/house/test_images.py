"""Images: Atari as gymnasium's wrappers give it, and every other Box of bytes or bools."""

import json
import sys

import envs
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import SCRIPTS, command, module
from gymnasium import spaces
from runs import args, load, logged, refused, same, train

IMAGES = [name for name in SCRIPTS if module(name).IMAGES]
VECTOR = "ppo", "a2c"
PONG = "ALE/Pong-v5"

# Chosen before the first run: seed 1, and steps and step size of each algorithm.
LEARN = {
    "ppo": dict(total_timesteps=6_000, num_envs=8, num_steps=64, epochs=4, minibatches=8),
    "a2c": dict(total_timesteps=8_000, num_envs=8, num_steps=16, learning_rate=3e-3),
    "a3c": dict(total_timesteps=8_000, workers=1, k_step=16, learning_rate=3e-3),
    "dqn": dict(total_timesteps=4_000, burn_in=200, batch_size=64, epsilon_steps=2_000),
}
LEARN["double_dqn"] = LEARN["dqn"]


def learn(name, run_dir, **options):
    options = {"env_id": "Pixel-v0", "eval_episodes": 50} | LEARN[name] | options
    return module(name).train(module(name).Args(run_dir=str(run_dir), **options))


def test_the_five():
    assert IMAGES == ["a2c", "a3c", "double_dqn", "dqn", "ppo"]


@pytest.mark.parametrize("name", IMAGES)
def test_what_a_pixel_says_is_learned(name, tmp_path):
    """Returns are the environment's, though rewards are clipped where they are learned from."""
    assert learn(name, tmp_path).mean() == 5
    returns = logged(tmp_path)["charts/episodic_return"]
    assert min(returns) < 4 and max(returns) > 3, "5 or -5 in each episode, random at first"


@pytest.mark.parametrize("name", IMAGES)
def test_an_environment_may_overwrite_its_observation(name, tmp_path):
    """The run is the same whether each image is an array of its own or one that is reused."""
    saved = []
    for reuse in ("false", "true"):
        learn(name, tmp_path / reuse, total_timesteps=600, env_kwargs=f'{{"reuse": {reuse}}}')
        saved.append(load(tmp_path / reuse)["policy"])
    assert same(*saved)


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_may_be_a_view_that_runs_backwards(name, tmp_path):
    """As where colours are turned from BGR to RGB."""
    learn(name, tmp_path, total_timesteps=600, eval_episodes=2, env_kwargs='{"backwards": true}')


@pytest.mark.parametrize(("shape", "kind"), [((3, 40, 40), "uint8"), ((10, 10, 10), "bool")])
@pytest.mark.parametrize("name", ["ppo", "dqn"])
def test_channels_first_and_bools_are_learned(name, shape, kind, tmp_path):
    kwargs = json.dumps({"shape": shape, "kind": kind})
    assert learn(name, tmp_path, env_kwargs=kwargs).mean() > 4


@pytest.mark.parametrize(
    ("shape", "channels"),
    [
        ((4, 84, 84), 0),
        ((3, 40, 50), 0),
        ((96, 96, 3), 2),
        ((10, 10, 4), 2),
        ((10, 10, 10), 2),
        ((16, 64, 1), 2),  # wide and low: too low for the strides of large images
        ((3, 40, 10), 0),
        ((64, 12, 50), 2),  # more channels than columns
    ],
)
def test_the_torso_convolves_rows_and_columns_whatever_the_order_of_axes(shape, channels):
    space = spaces.Box(0, 255, shape, np.uint8)
    torso, image = module("ppo").Torso(space), space.sample()
    conv = torso[0]
    (k, _), (stride, _) = conv.kernel_size, conv.stride
    chw = np.moveaxis(image, channels, 0) / 255
    assert conv.in_channels == len(chw)
    for row, column in (0, 0), (1, 2), (2, 0):
        patch = chw[:, row * stride :, column * stride :][:, :k, :k]
        weight, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
        naive = np.einsum("oihw,ihw->o", weight, patch) + bias
        seen = []
        hook = conv.register_forward_hook(lambda *x, seen=seen: seen.append(x[2]))
        torso(torch.from_numpy(image))
        hook.remove()
        np.testing.assert_allclose(seen[0][0, :, row, column].detach(), naive, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_the_torso_takes_any_number_of_leading_axes(lead):
    space = spaces.Box(0, 1, (10, 10, 4), bool)
    torso = module("dqn").Torso(space)
    images = torch.rand(*lead, 10, 10, 4) < 0.5
    features = torso(images)
    assert features.shape == (*lead, 256)
    flat = torch.stack([torso(x) for x in images.reshape(-1, 10, 10, 4)])
    torch.testing.assert_close(features.reshape(-1, 256), flat)


@pytest.mark.parametrize("name", ["ppo", "a2c", "a3c"])
def test_policy_and_critic_share_the_torso(name, tmp_path, monkeypatch):
    """The critic is a layer of its features, and an update passes a batch through it once."""
    script, batches = module(name), []
    forward = script.Torso.forward

    def counted(torso, x):
        if torch.is_grad_enabled() and x.dtype == torch.uint8:  # not to act
            batches.append(len(x))
        return forward(torso, x)

    monkeypatch.setattr(script.Torso, "forward", counted)
    options = dict(num_envs=4, num_steps=64, epochs=2, minibatches=1) if name == "ppo" else {}
    steps = {"ppo": 100, "a2c": 100, "a3c": 3}[name]
    learn(name, tmp_path, total_timesteps=steps, **options)
    critic = load(tmp_path)["critic"]
    assert [tuple(x.shape) for x in critic.values()] == [(1, 256), (1,)]
    assert len(batches) == {"ppo": 2, "a2c": 2, "a3c": 3}[name], batches


@pytest.mark.parametrize("name", ["dqn", "double_dqn"])
def test_rewards_are_clipped_in_the_buffer_and_not_in_returns(name, tmp_path):
    for clip, stored in (True, {-1.0, 1.0}), (False, {-5.0, 5.0}):
        returns = learn(name, tmp_path / str(clip), total_timesteps=300, clip_rewards=clip)
        checkpoint = load(tmp_path / str(clip))
        assert set(checkpoint["buffer"]["data"][2].unique().tolist()) == stored
        assert set(np.abs(returns)) == {5}
        assert checkpoint["buffer"]["data"][0].dtype == torch.uint8


@pytest.mark.parametrize("name", ["ppo", "a2c", "a3c"])
def test_rewards_are_clipped_before_they_are_learned_from(name, tmp_path):
    """A critic of rewards of 5 or -5 ends within 1, or without the clip beyond it."""
    script, seen = module(name), {}
    options = {"norm_rewards": False} if name == "ppo" else {}
    options |= {"total_timesteps": 4_000} if name == "a3c" else {}
    for clip in True, False:
        learn(name, tmp_path / str(clip), clip_rewards=clip, **options)
        task = script.Args(env_id="Pixel-v0")
        with script.make_env(task) as env:
            policy = script.make_policy(env, task)
            critic = torch.nn.Sequential(*script.mlp(env, task, 1, 1.0))
            script.load(tmp_path / str(clip) / "checkpoint.pt", dict(policy=policy, critic=critic))
            images = np.stack([env.reset(seed=seed)[0] for seed in range(50)])
        seen[clip] = critic(policy[0](torch.from_numpy(images))).mean().item()
    assert 0.5 < seen[True] < 1.5 and seen[False] > 2


def test_flat_observations_keep_their_rewards(tmp_path):
    """--clip-rewards is of images alone: Wander pays 1 or 2."""
    train("dqn", tmp_path, env_id="Wander-v0", n_step=1)
    assert set(load(tmp_path)["buffer"]["data"][2].unique().tolist()) == {1, 2}


@pytest.mark.parametrize("name", ["dqn", "double_dqn"])
def test_the_target_network_has_a_torso_of_its_own(name, tmp_path):
    """A target that is never updated is what the network began as, every layer of it."""
    script = module(name)
    learn(name, tmp_path, total_timesteps=300, target_every=10**6)
    task = script.Args(env_id="Pixel-v0")
    torch.manual_seed(task.seed)
    with script.make_env(task) as env:
        first = script.make_policy(env, task).state_dict()
    checkpoint = load(tmp_path)
    assert same(dict(checkpoint["target_net"]), dict(first))
    assert not any(torch.equal(checkpoint["policy"][key], first[key]) for key in first)


def frames(n):
    """The first n stacks of Pong, put together here from single frames."""
    raw = gym.wrappers.AtariPreprocessing(gym.make(f"ale_py:{PONG}", frameskip=1))
    frame, _ = raw.reset(seed=7)
    history = [frame] * 4
    yield np.stack(history)
    for t in range(n):
        history = [*history[1:], raw.step(t % 6)[0]]
        yield np.stack(history)


@pytest.mark.parametrize("name", IMAGES)
def test_atari_is_four_grey_frames_the_newest_last(name):
    with module(name).make_env(module(name).Args(env_id=PONG)) as env:
        space = env.observation_space
        assert space.shape == (4, 84, 84) and space.dtype == np.uint8
        obs, _ = env.reset(seed=7)
        for t, expected in enumerate(frames(12)):
            np.testing.assert_array_equal(obs, expected)
            obs = env.step(t % 6)[0]


@pytest.mark.parametrize("env_id", [f"ale_py:{PONG}", "ale_py:PongNoFrameskip-v4"])
def test_atari_is_prepared_whatever_its_name(env_id):
    for name in IMAGES:
        with module(name).make_env(module(name).Args(env_id=env_id)) as env:
            assert env.observation_space.shape == (4, 84, 84)


@pytest.mark.parametrize("name", VECTOR)
def test_training_sees_the_pixels_that_evaluation_sees(name, tmp_path, monkeypatch):
    """And the checks of what is drawn: no environment of training is vectorised natively."""
    made, make = [], gym.make_vec
    monkeypatch.setattr(gym, "make_vec", lambda *a: made.append(make(*a)) or made[-1])
    script = module(name)
    script.train(args(name, tmp_path, env_id=PONG, total_timesteps=60, eval_episodes=1))
    (vector,) = made
    assert isinstance(vector, gym.vector.SyncVectorEnv) and vector.num_envs == 4
    again = make(vector.envs[0].spec, 2, "sync")
    with script.make_env(script.Args(env_id=PONG)) as env:
        obs, _ = again.reset(seed=[7, 8])
        alone, _ = env.reset(seed=7)
        for t in range(8):
            np.testing.assert_array_equal(obs[0], alone)
            obs, alone = again.step(np.array([t % 6, 0]))[0], env.step(t % 6)[0]
    again.close()


@pytest.mark.parametrize("name", IMAGES)
def test_an_update_on_pong_moves_every_weight(name, tmp_path):
    script = module(name)
    options = {"a3c": dict(k_step=30), "dqn": {}, "double_dqn": {}}.get(name, dict(num_envs=2))
    options |= {"burn_in": 30, "total_timesteps": 90} if "dqn" in name else {"total_timesteps": 60}
    task = args(name, tmp_path, env_id=PONG, eval_episodes=1, **options)
    returns = script.train(task)
    assert returns.shape == (1,) and -21 <= returns[0] <= 21
    torch.manual_seed(task.seed)
    with script.make_env(task) as env:
        before = script.make_policy(env, task).state_dict()
    after = load(tmp_path)["policy"]
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ["ppo", "dqn"])
def test_a_run_on_images_resumes(name, tmp_path):
    script, checkpoint = module(name), tmp_path / "half/checkpoint.pt"
    learn(name, tmp_path / "half", total_timesteps=1_024)
    saved = load(tmp_path / "half")
    assert learn(name, tmp_path / "whole", total_timesteps=2_048, resume=str(checkpoint)).mean() > 4
    assert load(tmp_path / "whole")["env_steps"] == 2_048
    task = script.Args(env_id="Pixel-v0")
    with script.make_env(task) as env:
        policy = script.make_policy(env, task)
    script.load(checkpoint, {"policy": policy})
    assert same(dict(policy.state_dict()), dict(saved["policy"]))


@pytest.mark.parametrize("name", SCRIPTS)
def test_images_are_refused_in_one_line_by_the_others_and_inside_a_dict_by_all(name, tmp_path):
    options = ["--run-dir", tmp_path, "--total-timesteps", 1, "--env-id"]
    if name not in IMAGES:
        refused(command(name, *options, "Pixel-v0"), "cannot learn Pixel-v0", "uint8")
    inner = spaces.Dict(a=spaces.Box(0, 255, (8, 8, 3), np.uint8), b=spaces.Discrete(2))
    for i, space in enumerate((inner, spaces.Tuple([inner]))):
        actions = module(name).ACTION_SPACES[0]
        action = spaces.Discrete(2) if actions is spaces.Discrete else spaces.Box(-1, 1, (1,))
        kwargs = {"observation_space": space, "action_space": action}
        gym.register(f"{name}Nested{i}-v0", envs.Spaces, kwargs=kwargs)
        refused(command(name, *options, f"{name}Nested{i}-v0"), "cannot learn", "uint8")


def test_small_boxes_of_bytes_are_flattened_as_before(tmp_path):
    space = spaces.Box(0, 255, (3, 3), np.uint8)
    kwargs = {"observation_space": space, "action_space": spaces.Discrete(2)}
    gym.register("Board-v0", envs.Spaces, kwargs=kwargs)
    with module("dqn").make_env(module("dqn").Args(env_id="Board-v0")) as env:
        assert env.observation_space.shape == (9,)


@pytest.mark.parametrize("missing", ["ale_py", "cv2"])
def test_what_atari_needs_is_named_where_it_is_missing(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    name = {"ale_py": "ale_py", "cv2": "opencv-python"}[missing]
    refused(command("ppo", "--env-id", PONG, "--run-dir", tmp_path), name)


@pytest.mark.parametrize(
    ("env_id", "kwargs", "word"),
    [
        ("ALE/Pongg-v5", "{}", "Pong"),
        (PONG, '{"frameskip": 4}', "frame"),
        (PONG, '{"colour": 1}', "colour"),
    ],
)
def test_a_mistake_about_atari_is_one_line(env_id, kwargs, word, tmp_path):
    options = ["--env-id", env_id, "--env-kwargs", kwargs, "--run-dir", tmp_path]
    refused(command("dqn", *options), word)


def test_a_video_of_atari_is_recorded(tmp_path):
    options = dict(env_id=PONG, total_timesteps=60, eval_episodes=1, num_envs=2)
    train("ppo", tmp_path, capture_video=True, **options)
    assert list(tmp_path.glob("videos/*/*.mp4"))


@pytest.mark.parametrize("name", ["dqn", "double_dqn", "ddpg", "td3", "sac"])
def test_a_buffer_beyond_the_machines_memory_is_refused_before_it_fills(name, tmp_path):
    options = ["--buffer-size", 10**12, "--run-dir", tmp_path]
    refused(command(name, *options), "--buffer-size 1000000000000", "GiB")


def test_the_width_of_hidden_layers_holds_no_convolution_to_one_thread(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    for name in "ppo", "a2c", "dqn", "double_dqn":
        learn(name, tmp_path / name, total_timesteps=300, eval_episodes=1)
    assert asked == [7] * 4, "each puts back what it found, and asks for nothing else"
