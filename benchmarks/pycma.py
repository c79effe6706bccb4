"""Steps per second of pycma on a task of cem.py, for speed.py: python benchmarks/pycma.py JSON.

Its CMA-ES with a diagonal covariance, which like cem.py keeps a mean and a variance per parameter.
One candidate at a time plays an episode with a policy of one hidden layer, in numpy.
"""

import json
import sys
import time

import cma
import gymnasium
import numpy as np


def speed(env, steps, seed, population, hidden):
    """Steps per second of a search of so many candidates a generation."""
    env, taken = gymnasium.make(env), 0
    env.reset(seed=seed)
    i, o = env.observation_space.shape[0], int(env.action_space.n)

    def episode_return(theta):
        nonlocal taken
        first, second = np.split(theta, [(i + 1) * hidden])
        first, second = first.reshape(i + 1, hidden), second.reshape(hidden + 1, o)
        (obs, _), total, ends = env.reset(), 0.0, [False]
        while not any(ends):
            inner = np.tanh(obs @ first[:i] + first[i])
            obs, reward, *ends, _ = env.step((inner @ second[:hidden] + second[hidden]).argmax())
            total, taken = total + reward, taken + 1
        return total

    parameters = (i + 1) * hidden + (hidden + 1) * o
    options = {"popsize": population, "CMA_diagonal": True, "verbose": -9, "seed": seed}
    search = cma.CMAEvolutionStrategy(np.zeros(parameters), 1.0, options)
    start = time.time()
    while taken < steps:
        candidates = search.ask()
        search.tell(candidates, [-episode_return(theta) for theta in candidates])
    return taken / (time.time() - start)


if __name__ == "__main__":
    print(json.dumps([speed(**json.loads(sys.argv[1])), 0]))
