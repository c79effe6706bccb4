"""Bias and variance of policy gradients: by weight and baseline, and by the k of k-step advantages.

    python benchmarks/studies/variance.py     seconds; writes variance.csv and variance.png

The MDP is so small that all its trajectories can be listed with their probabilities and scores: the
exact gradient of U(θ), and mean and variance of an estimate from one trajectory, are finite sums.
Baselines that are means over a batch have no such sum: batches of N trajectories are drawn from the
list for them. Returns, baselines and loss are those of reinforce.py.

Everything is in units of the exact gradient g. ratio: E[ĝ]·g / |g|², 1 without bias, (N-1)/N under
a mean of the batch. bias: |E[ĝ] - g| / |g|. variance: of one trajectory, N tr Cov[ĝ] / |g|².
The critic of k-step advantages is V^π itself, or V^π/2 as a critic that is on its way from 0.
"""

import csv
import itertools
import pathlib
import sys

import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import reinforce  # noqa: E402

N, BATCHES = 8, 100_000
COLUMNS = "part setting choice trajectories ratio bias variance".split()


class MDP:
    """S states, A actions, H steps, and a softmax policy with a logit for each state and action.

    reward is r(s, a), part of which belongs to the state alone. γ = 1.
    """

    def __init__(self, S=3, A=2, H=5, seed=1):
        g = torch.Generator().manual_seed(seed)
        options = {"generator": g, "dtype": torch.float64}
        self.S, self.A, self.H = S, A, H
        self.start = torch.full((S,), 1 / S, dtype=torch.float64)
        self.transition = torch.randn(S, A, S, **options).mul(1.5).softmax(-1)  # p(s'|s, a)
        self.reward = torch.rand(S, 1, **options) + torch.rand(S, A, **options)
        self.theta = 0.5 * torch.randn(S, A, **options)
        steps = torch.tensor([*itertools.product(range(S * A), repeat=H)])
        self.states, self.actions = (steps // A).T, (steps % A).T  # (H, M), of all M trajectories
        self.rewards = self.reward[self.states, self.actions]

    def log_probability(self, theta):
        """log P(τ; θ) of all trajectories, (M,)."""
        s, a = self.states, self.actions
        dynamics = self.transition[s[:-1], a[:-1], s[1:]].log().sum(0) + self.start[s[0]].log()
        return dynamics + reinforce.softmax_log_prob(theta[s], a).sum(0)

    def objective(self, theta):
        """U(θ) = Σ_τ P(τ; θ) R(τ), ()."""
        return (self.log_probability(theta).exp() * self.rewards.sum(0)).sum()

    def gradient(self):
        """The exact gradient of U(θ), (S * A,)."""
        return torch.func.grad(self.objective)(self.theta).flatten()

    def values(self):
        """V^π of the state at t, by backward induction, (H + 1, S)."""
        policy, values = self.theta.softmax(-1), [torch.zeros(self.S, dtype=torch.float64)]
        for _ in range(self.H):
            values.append((policy * (self.reward + self.transition @ values[-1])).sum(-1))
        return torch.stack(values[::-1])

    def along(self, table):
        """table, (H + 1, S), at the states of all trajectories and 0 after the last, (H + 1, M)."""
        rows = [row[states] for row, states in zip(table[:-1], self.states, strict=True)]
        return torch.stack([*rows, torch.zeros_like(rows[0])])

    def estimates(self, weights):
        """ĝ of each trajectory with the given weights of its steps, (M, S * A)."""

        def estimate(states, actions, weights):
            def loss(theta):
                logp = reinforce.softmax_log_prob(theta[states], actions)
                return reinforce.reinforce_loss(logp, weights, 1)

            return -torch.func.grad(loss)(self.theta).flatten()

        return torch.func.vmap(estimate, 1)(self.states, self.actions, weights)


def k_step_advantages(rewards, values, k):
    """A_t = Σ_{j<k} r_{t+j} + V(s_{t+k}) - V(s_t), γ = 1; from k = H on the Monte Carlo advantage.

    rewards: (H, M); values: (H+1, M), its last row 0. Returns (H, M).
    """
    H = len(rewards)
    sums = torch.cat([torch.zeros_like(rewards[:1]), rewards.cumsum(0)])
    after = (torch.arange(H) + k).clamp(max=H)
    return sums[after] - sums[:H] + values[after] - values[:H]


def summary(mean, variance, gradient):
    """ratio, bias and variance in units of the exact gradient."""
    ratio, bias = mean @ gradient / gradient.norm() ** 2, (mean - gradient).norm() / gradient.norm()
    return ratio, bias, variance / gradient.norm() ** 2


def exact(mdp, weights):
    """ratio, bias and variance of the estimate from one trajectory, by summing over all of them."""
    estimates, p = mdp.estimates(weights), mdp.log_probability(mdp.theta).exp()
    mean = p @ estimates
    return summary(mean, p @ (estimates - mean).pow(2).sum(1), mdp.gradient())


def batch_weights(rewards, values, weight, baseline, gamma=1.0):
    """The weights of reinforce.py for a batch; rewards and values of its states: (H, N)."""
    returns = reinforce.returns_to_go(rewards, gamma)
    weights = returns if weight == "to-go" else returns[0].expand_as(returns)
    if baseline == "constant":
        return weights - reinforce.constant_baseline(returns)
    if baseline == "time":
        return weights - reinforce.time_baseline(weights)
    return weights - values if baseline == "state" else weights


def in_batches(mdp, i, weight, baseline):
    """ĝ of batches of n trajectories, (batches, S * A); i: (batches, n), places in the list."""
    rewards, values = (x[:, i].movedim(1, 0) for x in (mdp.rewards, mdp.along(mdp.values())[:-1]))
    weigh = torch.func.vmap(lambda r, v: batch_weights(r, v, weight, baseline))
    weights = weigh(rewards, values)  # (batches, H, n)
    estimates = torch.zeros(len(i), mdp.S * mdp.A, dtype=torch.float64)
    for t in range(mdp.H):  # ĝ is linear in the weights, so the score of each step is enough
        one = torch.zeros_like(mdp.rewards)
        one[t] = 1
        score = mdp.estimates(one)[i]  # (batches, n, S * A)
        estimates += (score * weights[:, t, :, None]).mean(1)
    return estimates


def sampled(mdp, weight, baseline, batches):
    """ratio, bias and variance of the estimate from N trajectories, by drawing batches of them."""
    g = torch.Generator().manual_seed(1)
    p = mdp.log_probability(mdp.theta).exp()
    i = torch.multinomial(p, batches * N, replacement=True, generator=g).reshape(batches, N)
    estimates = in_batches(mdp, i, weight, baseline)
    mean = estimates.mean(0)
    return summary(mean, N * (estimates - mean).pow(2).sum(1).mean(), mdp.gradient())


def table(mdp, batches=BATCHES):
    """The rows of variance.csv."""
    rows = []
    for weight, baseline in itertools.product(
        ("trajectory", "to-go"), ("none", "constant", "time", "state")
    ):
        if baseline in ("constant", "time"):
            measured, n = sampled(mdp, weight, baseline, batches), N
        else:
            values = mdp.along(mdp.values())[:-1]
            measured, n = exact(mdp, batch_weights(mdp.rewards, values, weight, baseline)), 1
        rows.append(["baseline", weight, baseline, n, *measured])
    for critic, share in ("V", 1.0), ("V/2", 0.5):
        values = mdp.along(share * mdp.values())
        for k in range(1, mdp.H + 1):
            measured = exact(mdp, k_step_advantages(mdp.rewards, values, k))
            rows.append(["k-step", critic, k, 1, *measured])
    return [[f"{x:.3f}" if isinstance(x, torch.Tensor) else str(x) for x in row] for row in rows]


def plot(rows, path):
    """Left: variance by baseline. Right: variance and bias by k, whose mean squared error from 100
    trajectories is a hundredth of the sum of variance and 100 bias².
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for shift, weight in (-0.2, "trajectory"), (0.2, "to-go"):
        chosen = [row for row in rows if row["setting"] == weight]
        heights = [float(row["variance"]) for row in chosen]
        places = [x + shift for x in range(len(chosen))]
        label = "R(τ)" if weight == "trajectory" else "G_t"
        left.bar(places, heights, 0.4, label=f"weight {label}")
    left.set_xticks(range(len(chosen)), [row["choice"] for row in chosen])
    left.set(title="by baseline", ylabel="variance / |g|², one trajectory", yscale="log")
    left.legend()
    for critic, style in ("V", "--"), ("V/2", "-"):
        chosen = [row for row in rows if row["setting"] == critic]
        k = [int(row["choice"]) for row in chosen]
        variance = [float(row["variance"]) for row in chosen]
        right.plot(k, variance, f"C0{style}", label=f"variance, critic {critic}")
        bias = [100 * float(row["bias"]) ** 2 for row in chosen]
        right.plot(k, bias, f"C1{style}", label=f"100 bias², critic {critic}")
    right.set(title="k-step advantages, k = H is Monte Carlo", xlabel="k", xticks=k)
    right.legend()
    figure.savefig(path, dpi=120)


def main():
    rows = table(MDP())
    with open(HERE / "variance.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    for row in [COLUMNS, *rows]:
        print("  ".join(f"{x:>12}" for x in row))
    plot(rows, HERE / "variance.png")


if __name__ == "__main__":
    main()
