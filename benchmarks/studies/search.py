"""The search distributions of cem.py and cmaes.py on functions: a picture, a table of evaluations.

    python benchmarks/studies/search.py     half a minute; writes search.png, search.csv, README.md

The loops are those of the scripts' train, with a function in the place of episodes.
"""

import math
import pathlib
import statistics
import sys

import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

import cem  # noqa: E402
import cmaes  # noqa: E402
from runner import read, write, write_between  # noqa: E402

RESULTS, SEEDS = HERE / "search.csv", 20


def cross_entropy(function, mu, sigma, n, rho, noise, generator):
    """Minimise function by cem.py's update: each generation's theta, then mu and Sigma."""
    var = sigma**2 * torch.ones_like(mu)
    while True:
        epsilon = torch.randn(n, len(mu), generator=generator, dtype=torch.float64)
        theta = cem.sample(mu, var, epsilon)
        mu, var = cem.cem_update(cem.select(theta, -function(theta), rho), noise)
        yield theta, mu, var.diag()


def document(function, mu, sigma, n, rho, noise, draw):
    """Minimise function by the document's update: each generation's theta, then mu and Sigma.

    draw() returns epsilon, (n, d).
    """
    d, k = len(mu), math.floor(rho * n)
    Sigma, weights = sigma**2 * torch.eye(d, dtype=torch.float64), cmaes.rank_weights(k, k)
    while True:
        theta = cmaes.sample_correlated(mu, cmaes.square_root(Sigma), draw())
        elites = theta[function(theta).argsort()[:k]]
        mu = cmaes.update_mean(mu, elites, weights, 1.0)
        Sigma = cmaes.elite_covariance(elites, mu, noise)
        yield theta, mu, Sigma


def hansen(function, mu, sigma, n, draw):
    """Minimise function by the complete update: each generation's theta, then the state after it.

    draw() returns epsilon, (n, d).
    """
    d = len(mu)
    C, p_sigma, p_c = torch.eye(d).to(mu), torch.zeros_like(mu), torch.zeros_like(mu)
    generation, k = torch.zeros((), dtype=torch.float64), n // 2
    weights, mu_eff, c_sigma, d_sigma, c_c, c_1, c_mu = cmaes.strategy_parameters(n, d)
    while True:
        root = cmaes.square_root(C)
        epsilon = draw()
        theta = cmaes.sample_correlated(mu, sigma * root, epsilon)
        order = function(theta).argsort()
        epsilon = epsilon[order]
        mu = cmaes.update_mean(mu, theta[order[:k]], weights[:k], 1.0)
        generation += 1
        steps = epsilon @ root
        p_sigma = cmaes.cumulate(p_sigma, weights[:k] @ epsilon[:k], c_sigma, mu_eff)
        length = cmaes.relative_length(p_sigma)
        h = cmaes.h_sigma(length, generation, c_sigma, d)
        p_c = cmaes.cumulate(p_c, h * (weights[:k] @ steps[:k]), c_c, mu_eff)
        sigma = cmaes.update_step_size(sigma, length, c_sigma, d_sigma)
        C = cmaes.update_covariance(C, p_c, steps, epsilon, weights, h, c_c, c_1, c_mu)
        yield theta, mu, sigma, C, p_sigma, p_c, h


def normal(n, d, seed):
    """draw for document and hansen."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(n, d, generator=generator, dtype=torch.float64)


def sphere(x):
    return x.pow(2).sum(1)


def ellipsoid(x):
    """Condition 1e6."""
    return (torch.logspace(0, 6, x.shape[1], dtype=x.dtype) * x.pow(2)).sum(1)


def rosenbrock(x):
    return (100 * (x[:, :-1].pow(2) - x[:, 1:]).pow(2) + (x[:, :-1] - 1).pow(2)).sum(1)


def evaluations(function, seed, d=10, n=10, most=10_000):
    """Evaluations until one is at most 1e-8, from x0 uniform in [-2, 2], sigma0 = 1, or inf."""
    start = torch.rand(d, generator=torch.Generator().manual_seed(1000 + seed)).double() * 4 - 2
    search = hansen(function, start, torch.ones((), dtype=torch.float64), n, normal(n, d, seed))
    for generation, (theta, *_) in zip(range(1, most // n + 1), search):
        if function(theta).min() <= 1e-8:
            return n * generation
    return math.inf


def valley(x):
    """Narrow across, long and gently falling along the diagonal; the least at (3, 3)."""
    along, across = (x[:, 0] + x[:, 1]) / math.sqrt(2), (x[:, 0] - x[:, 1]) / math.sqrt(2)
    return (along - math.sqrt(18)).pow(2) + 30 * across.pow(2)


def picture(path):
    """Candidates and two standard deviations of both searches, generation by generation."""
    import matplotlib

    matplotlib.use("agg")
    import numpy as np
    from matplotlib import pyplot as plt

    start, n, shown = torch.tensor([-3.0, -1.0], dtype=torch.float64), 20, (1, 3, 6, 10, 15)
    generator, one = torch.Generator().manual_seed(0), torch.ones((), dtype=torch.float64)
    searches = {
        "CEM": cross_entropy(valley, start, one, n, 0.4, 0.02, generator),
        "CMA-ES, the document's": document(valley, start, one, n, 0.4, 0.02, normal(n, 2, 0)),
        "CMA-ES, Hansen's": (
            (theta, mu, sigma**2 * C)
            for theta, mu, sigma, C, *_ in hansen(valley, start, one, n, normal(n, 2, 0))
        ),
    }
    axis = torch.linspace(-6, 6, 200, dtype=torch.float64)
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    z = valley(torch.stack([x, y], -1).reshape(-1, 2)).reshape(x.shape)
    turn = torch.linspace(0, 2 * math.pi, 100, dtype=torch.float64)
    circle = torch.stack([turn.cos(), turn.sin()], 1)
    figure, rows = plt.subplots(3, len(shown), figsize=(12, 7.6), sharex=True, sharey=True)
    for (name, search), row in zip(searches.items(), rows, strict=True):
        generations = [(None, start, torch.eye(2).double())]
        generations += [state for state, _ in zip(search, range(shown[-1]))]
        row[0].set_ylabel(name)
        for generation, axes in zip(shown, row, strict=True):
            _, mu, Sigma = generations[generation - 1]
            theta, *_ = generations[generation]
            ellipse = mu + 2 * circle @ cmaes.square_root(Sigma)
            axes.contour(x, y, z, levels=np.geomspace(0.5, 1500, 9), colors="0.8", linewidths=0.8)
            axes.plot(*theta.T, ".", markersize=4, color="tab:blue")
            axes.plot(*ellipse.T, color="tab:red", linewidth=1.2)
            axes.plot(3, 3, "+", color="black")
            axes.set(aspect="equal", xlim=(-6, 6), ylim=(-6, 6))
            axes.set_title(f"generation {generation}", fontsize=9)
            axes.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def pycma(function, seed, d=10, n=10, most=10_000):
    """The same count by pycma with its defaults."""
    import cma

    start = torch.rand(d, generator=torch.Generator().manual_seed(1000 + seed)).double() * 4 - 2
    options = {"popsize": n, "ftarget": 1e-8, "maxfevals": most, "verbose": -9, "seed": seed + 1}
    search = cma.CMAEvolutionStrategy(start.numpy(), 1.0, options)
    search.optimize(lambda x: function(torch.from_numpy(x)[None]).item())
    return search.result.evaluations if search.result.fbest <= 1e-8 else math.inf


FUNCTIONS = {"sphere": sphere, "ellipsoid": ellipsoid, "Rosenbrock": rosenbrock}


def kept(name, whose):
    """The evaluations of a search in search.csv, of all seeds."""
    lines = [line for line in read(RESULTS) if line["function"] == name]
    return [float(line[whose]) for line in lines]


def texts():
    """What README.md says between its markers: path, name of the markers, lines."""
    lines = [
        "| 10 dimensions | ours, evaluations | generations | failed | pycma | failed | ratio |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for name in FUNCTIONS:
        counts = [kept(name, whose) for whose in ("ours", "pycma")]
        a, b = map(statistics.median, counts)
        failed = [sum(map(math.isinf, values)) for values in counts]
        cells = f"{a:,.0f} | {a / 10:.0f} | {failed[0]} | {b:,.0f} | {failed[1]} | {a / b:.2f}"
        lines.append(f"| {name} | {cells} |")
    return HERE / "README.md", "search", lines


def main():
    picture(HERE / "search.png")
    lines = [
        {
            "function": name,
            "seed": seed,
            "ours": evaluations(function, seed),
            "pycma": pycma(function, seed),
        }
        for name, function in FUNCTIONS.items()
        for seed in range(SEEDS)
    ]
    write(RESULTS, lines)
    write_between(*texts())


if __name__ == "__main__":
    main()
