"""Train stable-baselines3: for returns.py with our evaluations, for speed.py by the clock.

python benchmarks/peer.py ppo CartPole-v1 100000 201   a row of returns.toml, and a seed
python benchmarks/peer.py '{"algorithm": "PPO", ...}'  the arguments of speed
"""

import json
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import numpy as np
import stable_baselines3
import torch
from runner import curve
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import VecNormalize, sync_envs_normalization

TABLE = tomllib.loads(Path(__file__).with_name("returns.toml").read_text(encoding="utf-8"))


def build(algorithm, env, seed, noise_std=0.0, **settings):
    """The model, from settings in rl-zoo's notation."""
    if noise_std:
        zeros = np.zeros(env.action_space.shape)
        settings["action_noise"] = NormalActionNoise(zeros, zeros + noise_std)
    for name, value in settings.items():  # lin_0.1 falls linearly from 0.1 to 0
        if isinstance(value, str) and value.startswith("lin_"):
            settings[name] = lambda left, first=float(value[4:]): left * first
    if settings.get("policy_kwargs", {}).get("activation_fn") == "ReLU":
        settings["policy_kwargs"]["activation_fn"] = torch.nn.ReLU
    kind = getattr(stable_baselines3, algorithm)
    return kind("MlpPolicy", env, seed=seed, device="cpu", **settings)


def train(algorithm, env_id, steps, seed, normalize=False, n_envs=1, **settings):
    """Final return and deviation of 100 episodes, steps, seconds, curve of 20 evaluations of ten."""
    torch.set_num_threads(1)
    env = make_vec_env(env_id, n_envs, seed=seed)
    test = make_vec_env(env_id, 1, seed=2**30 + seed)
    if normalize:
        env = VecNormalize(env, gamma=settings.get("gamma", 0.99))
        test = VecNormalize(test, training=False, norm_reward=False)
    began = time.time()
    model = build(algorithm, env, seed, **settings)
    with tempfile.TemporaryDirectory() as logs:
        evaluations = EvalCallback(
            test,
            n_eval_episodes=10,
            eval_freq=max(1, steps // 20 // n_envs),
            log_path=logs,
            verbose=0,
        )
        model.learn(steps, callback=evaluations)
        found = np.load(f"{logs}/evaluations.npz")
        text = curve(found["timesteps"], found["results"].mean(1))
    if normalize:
        sync_envs_normalization(env, test)
    returns, _ = evaluate_policy(model, test, 100, return_episode_rewards=True)
    mean, std = np.mean(returns), np.std(returns)
    return f"{mean:.2f}|{std:.2f}|{model.num_timesteps}|{time.time() - began:.1f}|{text}"


def speed(env, steps, seed, threads, episodes, n_envs=1, **settings):
    """Steps per second of learn(), with a log; then the mean return of so many episodes."""
    torch.set_num_threads(threads)
    env = make_vec_env(env, n_envs, seed=seed)
    with tempfile.TemporaryDirectory() as logs:
        model = build(env=env, seed=seed, tensorboard_log=logs, **settings)
        start = time.time()
        model.learn(steps)
        seconds = time.time() - start
    return model.num_timesteps / seconds, evaluate_policy(model, env, episodes)[0]


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(speed(**json.loads(sys.argv[1]))))
    else:
        script, env_id, steps, seed = sys.argv[1:]
        names = script, env_id, int(steps)
        [row] = [r for r in TABLE["row"] if (r["script"], r["env"], r["steps"]) == names]
        print(train(env_id=env_id, steps=int(steps), seed=int(seed), **row["peer"]))
