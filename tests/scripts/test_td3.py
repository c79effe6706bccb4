"""td3.py: what it adds to ddpg.py. The rest is in test_ddpg.py, for both at once."""

import pytest
import td3
import torch
from test_ddpg import arguments, networks, trained


def test_smoothing_is_clipped_twice():
    action, noise = torch.tensor([0.0, 0.0, 0.9, -0.9]), torch.tensor([1.0, 9.0, 9.0, -1.0])
    smoothed = td3.smooth(action, noise, 0.2, 0.5)
    assert smoothed.tolist() == pytest.approx([0.2, 0.5, 1.0, -1.0])


def test_target_takes_the_lower_critic():
    reward, discount = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.9, 0.9, 0.0])
    q_next = torch.tensor([[10.0, 30.0, 5.0], [20.0, 20.0, 5.0]])
    assert td3.td3_target(reward, discount, q_next).tolist() == pytest.approx([10, 20, 3])


def test_the_lower_critic_does_not_overestimate():
    """All true values are 0: the best of five noisy actions is overrated by one critic, not by two.

    The five are chosen by the first critic, as an actor that climbs it would.
    """
    torch.manual_seed(0)
    q = torch.randn(2, 100_000, 5)
    best = q[0].argmax(-1, keepdim=True)
    q_next = torch.stack([q[i].gather(-1, best).squeeze(-1) for i in (0, 1)])
    zero, one = torch.zeros(100_000), torch.ones(100_000)
    assert q_next[0].mean().item() == pytest.approx(1.163, abs=0.02)  # maximum of five normals
    assert td3.td3_target(zero, one, q_next).mean() < 0


@pytest.mark.parametrize("actor_every", [1, 2, 3])
def test_actor_and_targets_wait_for_the_critics(tmp_path, monkeypatch, actor_every):
    """Counted from the beginning of training, not from that of the process."""
    seen, step, update = [], torch.optim.Adam.step, td3.soft_update

    def spy(self, *a):
        of_critics = self.param_groups[0]["params"][0].ndim == 3
        seen.append("critics" if of_critics else "actor")
        return step(self, *a)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    monkeypatch.setattr(td3, "soft_update", lambda *a: seen.append("targets") or update(*a))
    trained(td3, tmp_path, 205, actor_every=actor_every)
    trained(td3, tmp_path, 212, actor_every=actor_every, resume=str(tmp_path / "checkpoint.pt"))
    exact = []
    for number in range(1, 13):
        exact += ["critics"] + ["actor", "targets"] * (number % actor_every == 0)
    assert seen == exact


def test_the_targets_noise_is_torchs_and_of_every_transition(tmp_path, monkeypatch):
    shapes, smooth = [], td3.smooth

    def spy(action, noise, target_sigma, noise_clip):
        assert (target_sigma, noise_clip) == (0.2, 0.5)
        shapes.append((action.shape, noise.shape, noise.unique().numel()))
        return smooth(action, noise, target_sigma, noise_clip)

    monkeypatch.setattr(td3, "smooth", spy)
    trained(td3, tmp_path, 203)
    assert shapes == [((64, 1), (64, 1), 64)] * 3


def test_critics_begin_apart():
    _, critic = networks(td3, arguments(td3))
    q = critic(torch.randn(5, 2), torch.rand(5, 1))
    assert q.shape == (2, 5) and not torch.equal(q[0], q[1])
