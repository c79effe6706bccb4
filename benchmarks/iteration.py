"""How many times its matrix products and environment steps alone an iteration of awr.py takes.

    python benchmarks/iteration.py --env LunarLander-v3

One iteration is 2048 samples, 200 critic and 1000 actor steps of 256, on a full buffer of 50,000.
Products: those of the forward and backward passes of all these steps and of the two passes of the
critic over the buffer. Also the time of TD(λ) over the buffer, without the critic's pass. One
thread, the median of seven; run nothing beside it. Nothing is written.
"""

import argparse
import pathlib
import sys
import tempfile
import time

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import awr  # noqa: E402

REPEATS = 7


def median_seconds(task):
    """Median duration of REPEATS calls of task."""
    durations = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        task()
        durations.append(time.perf_counter() - start)
    return np.median(durations)


def iterations(args):
    """Durations of the last iterations of a run, whose buffer is full by then."""
    ends, log = [], awr.Run.log

    def timed(run, **losses):
        log(run, **losses)
        ends.append(time.perf_counter())

    awr.Run.log = timed
    try:
        awr.train(args)
    finally:
        awr.Run.log = log
    return np.diff(ends)[-REPEATS:]


def products(args, obs_dim, outputs, steps):
    """The matrix products of steps minibatches: forward, and backward but for the observations."""
    sizes = [obs_dim, args.hidden, args.hidden, outputs]
    layers = list(zip(sizes, sizes[1:]))
    weights = [torch.randn(a, b) for a, b in layers]
    inputs = [torch.randn(args.batch_size, a) for a in sizes]

    def task():
        for _ in range(steps):
            for weight, x, gradient in zip(weights, inputs, inputs[1:]):
                x @ weight
                x.T @ gradient
            for weight, gradient in zip(weights[1:], inputs[2:]):
                gradient @ weight.T

    return median_seconds(task)


def passes(args, obs_dim, rows):
    """The products of the critic's two passes over the buffer."""
    sizes = [obs_dim, args.hidden, args.hidden, 1]
    weights = [torch.randn(a, b) for a, b in zip(sizes, sizes[1:])]
    inputs = [torch.randn(rows, a) for a in sizes]
    return 2 * median_seconds(lambda: [x @ weight for x, weight in zip(inputs, weights)])


def environment_steps(envs, args):
    """T steps of the N environments with actions drawn beforehand."""
    envs.reset(seed=1)
    envs.action_space.seed(1)
    actions = [envs.action_space.sample() for _ in range(args.num_steps)]
    return median_seconds(lambda: [envs.step(action) for action in actions])


def td_lambda(args):
    """TD(λ) over the whole buffer."""
    columns = args.num_envs * (args.buffer_size // (args.num_envs * args.num_steps))
    rewards, values = torch.randn(args.num_steps, columns), torch.randn(args.num_steps + 1, columns)
    ends = torch.rand(2, args.num_steps, columns) < 0.01
    return median_seconds(lambda: awr.gae(rewards, values, *ends, args.gamma, args.gae_lambda))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", default="LunarLander-v3")
    parser.add_argument("--hidden", type=int, default=awr.Args.hidden)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as run_dir:
        args = awr.Args(env_id=options.env, hidden=options.hidden, run_dir=run_dir)
        args.checkpoint_every, args.eval_episodes = 0, 1
        in_iteration = args.num_envs * args.num_steps
        # Reset steps are not counted, so that this is a little more than a buffer and REPEATS.
        args.total_timesteps = args.buffer_size + REPEATS * in_iteration
        measured = np.median(iterations(args))
    envs = awr.make_envs(args, args.num_envs)
    obs_dim = envs.single_observation_space.shape[0]
    outputs = awr.make_policy(awr.make_env(args), args)[-1].out_features
    parts = {
        "actor's products": products(args, obs_dim, outputs, args.actor_steps),
        "critic's products": products(args, obs_dim, 1, args.critic_steps),
        "critic's passes": passes(args, obs_dim, args.buffer_size),
        "environment steps": environment_steps(envs, args),
    }
    for name, seconds in parts.items():
        print(f"{name:<18} {1000 * seconds:8.1f} ms")
    print(f"{'iteration':<18} {1000 * measured:8.1f} ms", end="  ")
    print(f"{measured / sum(parts.values()):.1f} times their sum; at most 5 wanted")
    print(f"{'TD(λ)':<18} {1000 * td_lambda(args):8.1f} ms  at most 10 wanted")


if __name__ == "__main__":
    main()
