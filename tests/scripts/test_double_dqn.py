"""double_dqn.py: its target, alone and in the loop. All else is dqn.py's: test_dqn.py."""

import double_dqn
import dqn
import pytest
import torch
from test_dqn import COMMON, finite_mdp


def test_one_estimate_selects_and_the_other_evaluates():
    q_a = torch.tensor([[1.0, 5.0, 3.0], [2.0, 0.0, 1.0]])
    q_b = torch.tensor([[9.0, 4.0, 7.0], [6.0, 8.0, 3.0]])
    reward, discount = torch.tensor([1.0, -1.0]), torch.tensor([0.9, 0.0])
    y = double_dqn.double_dqn_target(reward, discount, q_a, q_b)
    assert y.tolist() == pytest.approx([1 + 0.9 * 4, -1])
    y = double_dqn.double_dqn_target(reward, discount, q_b, q_a)  # the document's other half
    assert y.tolist() == pytest.approx([1 + 0.9 * 1, -1])
    same = double_dqn.double_dqn_target(reward, discount, q_b, q_b)
    torch.testing.assert_close(same, dqn.dqn_target(reward, discount, q_b))


def test_the_max_overestimates_and_the_double_target_does_not():
    """All true values are 0; two estimates with independent unit noise."""
    torch.manual_seed(0)
    q_a, q_b = torch.randn(2, 100_000, 5)
    zero, one = torch.zeros(100_000), torch.ones(100_000)
    single = dqn.dqn_target(zero, one, q_b).mean().item()
    assert single == pytest.approx(1.163, abs=0.02)  # the mean maximum of five normal numbers
    double = double_dqn.double_dqn_target(zero, one, q_a, q_b).mean().item()
    assert double == pytest.approx(0, abs=0.02)


def test_the_update_finds_the_optimal_values():
    """A table as the network, all transitions of a finite MDP in a batch, a copy every 20."""
    successor, reward, q_star = finite_mdp()
    table = torch.zeros(6, 3)
    factor = torch.full((18,), 0.9)
    for update in range(2_000):
        if update % 20 == 0:
            frozen = table.clone()
        q_next = table[successor.view(-1)], frozen[successor.view(-1)]
        y = double_dqn.double_dqn_target(reward.view(-1), factor, *q_next)
        table += 0.2 * (y.view(6, 3) - table)
    torch.testing.assert_close(table, q_star.float(), atol=1e-3, rtol=0)


def trained(tmp_path, env_id, steps, **options):
    """Evaluation returns of a short run."""
    options = {**COMMON, "run_dir": str(tmp_path), **options}
    return double_dqn.train(double_dqn.Args(env_id=env_id, total_timesteps=steps, **options))


def test_the_online_network_selects_and_the_target_network_evaluates(tmp_path, monkeypatch):
    """The target network, never updated here, gives the same values again and again."""
    seen, target = [], double_dqn.double_dqn_target

    def spy(reward, discount, q_select, q_evaluate):
        y = target(reward, discount, q_select, q_evaluate)
        seen.append((q_select[0].tolist(), q_evaluate[0].tolist(), y.requires_grad))
        return y

    monkeypatch.setattr(double_dqn, "double_dqn_target", spy)
    options = dict(target_every=10**6, utd=1.0, gamma=0.5)
    trained(tmp_path, "Constant-v0", 300, **options)
    select, evaluate, gradient = zip(*seen, strict=True)
    assert len(seen) == 100 and not any(gradient), "the target is held fixed"
    assert all(q == pytest.approx(evaluate[0], abs=1e-6) for q in evaluate)
    assert select[0] == pytest.approx(evaluate[0], abs=1e-6), "they begin as one"
    assert select[-1] != pytest.approx(evaluate[-1], abs=1e-2)


@pytest.mark.parametrize("env_id", ["Matched-v0", "TwoStep-v0"])
def test_the_action_that_pays_is_found(tmp_path, env_id):
    assert trained(tmp_path, env_id, 3_000, n_step=2).mean() == 1
