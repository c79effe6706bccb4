"""One seed, one result; and who draws from which generator: agent, environment, evaluation."""

import envs
import numpy as np
import pytest
from conftest import module
from runs import args, env_id, every_script, learned, load, logged, same, train


@every_script
def test_one_seed_one_result(name, tmp_path):
    """Also where the environment draws from numpy's and Python's global generators."""
    runs = []
    for seed, folder in ((1, "a"), (1, "b"), (2, "c")):
        returns = train(name, tmp_path / folder, seed=seed, env_id=env_id(name, "Draws"))
        runs.append((learned(load(tmp_path / folder)), returns.tolist()))
    assert same(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]
    assert not same(runs[0][0], runs[2][0])


@every_script
@pytest.mark.parametrize("seed", [0, 2**40])
def test_any_whole_number_is_a_seed(name, seed, tmp_path):
    train(name, tmp_path, seed=seed, total_timesteps=100)


@every_script
def test_evaluating_and_saving_on_the_way_change_nothing(name, tmp_path, monkeypatch):
    draws = dict(env_id=env_id(name, "Draws"), total_timesteps=800)
    train(name, tmp_path / "a", **draws)
    run = module(name).Run
    log = run.log

    def log_and_save(self, **scalars):
        self.next_save = 0
        log(self, **scalars)

    monkeypatch.setattr(run, "log", log_and_save)
    train(name, tmp_path / "b", **draws, eval_every=200)
    assert same(learned(load(tmp_path / "a")), learned(load(tmp_path / "b")))
    assert len(logged(tmp_path / "b")["charts/eval_return"]) >= 4


@every_script
def test_agent_and_environment_draw_apart(name, tmp_path, monkeypatch):
    """No generator of the agent's is on the stream of an environment's, at any position of it."""

    def stream(generator):
        return generator.bit_generator.state["state"]["inc"]  # of PCG64, as the key decides it

    default_rng, agent = np.random.default_rng, []

    def noted(*key):
        agent.append(default_rng(*key))
        return agent[-1]

    monkeypatch.setattr(np.random, "default_rng", noted)
    envs.Draws.seeds.clear()
    train(name, tmp_path, env_id=env_id(name, "Draws"), total_timesteps=1_000)
    seeds = [s for s in envs.Draws.seeds if s is not None]
    keyed = {stream(default_rng(np.random.SeedSequence(s))) for s in seeds}
    assert len(agent) > 3 and keyed and not keyed & set(map(stream, agent))


@every_script
def test_evaluation_is_on_seeds_that_training_never_sees(name, tmp_path):
    used = {}
    for seed in (1, 2):
        envs.Draws.seeds.clear()
        train(name, tmp_path / str(seed), env_id=env_id(name, "Draws"), seed=seed)
        used[seed] = [s for s in envs.Draws.seeds if s is not None]
        training, evaluation = used[seed][:-3], used[seed][-3:]
        assert training and max(training) < 2**29 + 100 < 2**30 <= min(evaluation)
        assert len(set(evaluation)) == 3
        assert len(set(training)) == len(training), "no episode is played twice"
    assert not set(used[1]) & set(used[2])


@every_script
def test_a_resume_does_not_play_the_same_episodes_again(name, tmp_path):
    options = dict(env_id=env_id(name, "Draws"))
    envs.Draws.seeds.clear()
    train(name, tmp_path, **options)
    before = set(envs.Draws.seeds[:-3])
    envs.Draws.seeds.clear()
    resume = str(tmp_path / "checkpoint.pt")
    train(name, tmp_path, resume=resume, total_timesteps=1_000, **options)
    after = set(envs.Draws.seeds[:-3])
    assert before & after <= {None} and after - {None}


@pytest.mark.parametrize("seed", [7, 8])
def test_generators_of_steps_and_processes_differ(seed, tmp_path):
    """The key is (seed, step, rank + 1), which never ends in 0: a 0 at its end does not count."""
    run = module("ppo").Run
    drawn = []
    for rank, step in ((0, 0), (1, 0), (0, 1), (0, 7)):
        with run(args("ppo", tmp_path / f"{rank} {step}", seed=seed), rank) as now:
            now.step = step
            now.seed()
            drawn.append(now.rng.random())
    assert len(set(drawn) | {np.random.default_rng(seed).random()}) == 5
