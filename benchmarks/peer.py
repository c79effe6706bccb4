"""Train stable-baselines3 on a row of returns.toml, with rl-zoo's settings and our evaluations.

python benchmarks/peer.py ppo CartPole-v1 100000 201
"""

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


def train(algorithm, env_id, steps, seed, normalize=False, n_envs=1, noise_std=0.0, **settings):
    """Final return and deviation of 100 episodes, steps, seconds, curve of 20 evaluations of ten."""
    torch.set_num_threads(1)
    env = make_vec_env(env_id, n_envs, seed=seed)
    test = make_vec_env(env_id, 1, seed=2**30 + seed)
    if normalize:
        env = VecNormalize(env, gamma=settings.get("gamma", 0.99))
        test = VecNormalize(test, training=False, norm_reward=False)
    if noise_std:
        zeros = np.zeros(env.action_space.shape)
        settings["action_noise"] = NormalActionNoise(zeros, zeros + noise_std)
    for name, value in settings.items():  # rl-zoo's notation for linear decay
        if isinstance(value, str) and value.startswith("lin_"):
            settings[name] = lambda left, first=float(value[4:]): left * first
    if settings.get("policy_kwargs", {}).get("activation_fn") == "ReLU":
        settings["policy_kwargs"]["activation_fn"] = torch.nn.ReLU
    kind = getattr(stable_baselines3, algorithm)
    began = time.time()
    model = kind("MlpPolicy", env, seed=seed, device="cpu", **settings)
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


if __name__ == "__main__":
    script, env_id, steps, seed = sys.argv[1:]
    names = script, env_id, int(steps)
    row = next(row for row in TABLE["row"] if (row["script"], row["env"], row["steps"]) == names)
    print(train(env_id=env_id, steps=int(steps), seed=int(seed), **row["peer"]))
