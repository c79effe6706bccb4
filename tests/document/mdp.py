"""Finite MDPs on which everything is exact: values, visitation, and the law of whole trajectories.

A policy is a table π(a|s), (S, A); the letters in einsum are s, a, t = s', b = a'. In float64.
"""

import math

import torch

F64 = torch.float64
STEPS = 3  # of a trajectory, H + 1


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random_policy(seed, states, actions):
    return torch.randn(states, actions, generator=generator(seed), dtype=F64).softmax(-1)


def place(table, t, steps):
    """A table over (s, a) as a function of (s_0, a_0, s_1, ...): on the axes of s_t and a_t."""
    before, after = [1, 1] * t, [1, 1] * (steps - t - 1)
    return table.reshape([*before, *table.shape[:2], *after, *table.shape[2:]])


def jacobian(function, theta):
    """∇_θ of every entry of function(θ), flat in θ: (..., |θ|)."""
    gradients = torch.autograd.functional.jacobian(function, theta)
    return gradients.reshape(*gradients.shape[: gradients.dim() - theta.dim()], -1)


class MDP:
    """p(s'|s, a): (S, A, S), what is missing to 1 being the end; r(s, a): (S, A); p(s_0): (S,)."""

    def __init__(self, p, r, start, gamma):
        self.p, self.r, self.start, self.gamma = p, r, start, gamma

    @classmethod
    def endless(cls, seed, gamma, states=4, actions=3):
        """Every state follows every state."""
        g = generator(seed)
        p = torch.rand(states, actions, states, generator=g, dtype=F64) ** 2
        r = torch.randn(states, actions, generator=g, dtype=F64)
        start = torch.rand(states, generator=g, dtype=F64)
        return cls(p / p.sum(-1, keepdim=True), r, start / start.sum(), gamma)

    @classmethod
    def layered(cls, seed, gamma, steps=3, width=2, actions=2):
        """Two states for each time, the end after 3 steps: 3-step trajectories are everything."""
        g, states = generator(seed), steps * width
        p, start = torch.zeros(states, actions, states, dtype=F64), torch.zeros(states, dtype=F64)
        for s in range(states - width):
            after = (s // width + 1) * width
            p[s, :, after : after + width] = torch.rand(actions, width, generator=g, dtype=F64)
        p = p / p.sum(-1, keepdim=True).clamp(min=1e-300)
        start[:width] = torch.tensor([0.3, 0.7])
        return cls(p, torch.randn(states, actions, generator=g, dtype=F64), start, gamma)

    def chain(self, pi):
        """p_π(s'|s): (S, S)."""
        return torch.einsum("sa,sat->st", pi, self.p)

    def value(self, pi, r=None):
        """V^π = (I - γ p_π)⁻¹ r_π: (S,)."""
        system = torch.eye(len(pi), dtype=F64) - self.gamma * self.chain(pi)
        return torch.linalg.solve(system, (pi * (self.r if r is None else r)).sum(-1))

    def q(self, pi):
        """Q^π by a system of its own, over pairs: Q = r + γ E_{s', a'}[Q(s', a')]: (S, A)."""
        pairs = torch.einsum("sat,tb->satb", self.p, pi).reshape(pi.numel(), -1)
        system = torch.eye(pi.numel(), dtype=F64) - self.gamma * pairs
        return torch.linalg.solve(system, self.r.flatten()).reshape(pi.shape)

    def advantage(self, pi):
        """A^π(s, a): (S, A)."""
        return self.q(pi) - self.value(pi)[:, None]

    def objective(self, pi):
        """J(π) = E_{s_0}[V^π(s_0)]: ()."""
        return self.start @ self.value(pi)

    def episode_value(self, pi, steps):
        """E[Σ_{t < steps} γ^t r(s_t, a_t)], backwards from the last step: ()."""
        value = torch.zeros(len(pi), dtype=F64)
        for _ in range(steps):
            value = (pi * (self.r + self.gamma * self.p @ value)).sum(-1)
        return self.start @ value

    def expect(self, pi, f):
        """E_{a ~ π, s' ~ p}[f(s, a, s')] for every s, where nothing ends. f: up to (S, A, S)."""
        return torch.einsum("sa,sat,sat->s", pi, self.p, f.expand(self.p.shape))

    def marginals(self, pi, steps, start=None):
        """p_π(s_t = s), step by step: (steps, S)."""
        p_t, chain, found = self.start if start is None else start, self.chain(pi), []
        for _ in range(steps):
            found.append(p_t)
            p_t = p_t @ chain
        return torch.stack(found)

    def discounts(self, steps):
        """γ^t: (steps,)."""
        return self.gamma ** torch.arange(steps, dtype=F64)

    def visitation(self, pi):
        """d^π as the solution of d = (1 - γ) p(s_0) + γ d p_π: (S,)."""
        system = torch.eye(len(pi), dtype=F64) - self.gamma * self.chain(pi)
        return torch.linalg.solve(system.T, (1 - self.gamma) * self.start)

    def law(self, pi, steps, start=None):
        """P(τ) of every trajectory (s_0, a_0, ..., a_{steps-1}): (S, A, S, A, ...)."""
        law = (self.start if start is None else start)[:, None] * pi
        for _ in range(steps - 1):
            law = torch.einsum("...sa,sat,tb->...satb", law, self.p, pi)
        return law

    def to_go(self, t, steps, r=None):
        """G_t = Σ_{k ≥ t} γ^{k-t} r(s_k, a_k) of every trajectory."""
        r = self.r if r is None else r
        return sum(self.gamma ** (k - t) * place(r, k, steps) for k in range(t, steps))

    def sample(self, pi, steps, n, seed=0):
        """States and actions of n trajectories, played one step after another: (n, steps) each."""
        g, states, actions = generator(seed), [], []
        s = torch.multinomial(self.start, n, True, generator=g)
        for t in range(steps):
            a = torch.multinomial(pi[s], 1, generator=g).squeeze(-1)
            states.append(s), actions.append(a)
            if t < steps - 1:
                s = torch.multinomial(self.p[s, a], 1, generator=g).squeeze(-1)
        return torch.stack(states, 1), torch.stack(actions, 1)


def scores(theta):
    """∇_θ log π_θ(a|s) of every pair: (S, A, |θ|)."""
    return jacobian(lambda x: x.log_softmax(-1), theta)


def expectation(law, f):
    """E_τ[f(τ)], f with trailing axes of its own."""
    return (law[(...,) + (None,) * (f.dim() - law.dim())] * f).flatten(0, law.dim() - 1).sum(0)


def estimator(mdp, theta, weight, steps=STEPS):
    """E_τ[Σ_t ∇ log π(a_t|s_t) weight(t)] over all trajectories."""
    law, score = mdp.law(theta.softmax(-1), steps), scores(theta)
    total = sum(place(score, t, steps) * weight(t)[..., None] for t in range(steps))
    return expectation(law, total)


def variance(mdp, theta, weight, steps=STEPS):
    """Of the same sum, E|g|² - |E g|², by which baselines differ."""
    law, score = mdp.law(theta.softmax(-1), steps), scores(theta)
    total = sum(place(score, t, steps) * weight(t)[..., None] for t in range(steps))
    return (expectation(law, total**2) - expectation(law, total) ** 2).sum().item()


def within_noise(samples, exact, most=5):
    """The mean of samples, (n, ...), is exact but for five of its standard errors."""
    error = (samples.mean(0) - exact).abs()
    assert (error < most * samples.std(0) / math.sqrt(len(samples)) + 1e-12).all()
