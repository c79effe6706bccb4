"""The command: alone in a folder, its help, its refusals in one line, where it writes."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, command, module
from runs import args, each_plumbing, env_id, every_script, flags, load, refused, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@each_plumbing
def test_a_copied_file_runs_alone(name, tmp_path):
    """In an empty folder. That the others import nothing else either: test_rules.py."""
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    line = [sys.executable, f"{name}.py", "--total-timesteps", "1", "--eval-episodes", "2"]
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env=environ)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 1 and " eval_episodes=2 " in run.stdout
    [path] = tmp_path.glob("runs/*/checkpoint.pt")
    # The bar names the run directory before training, also where it is not a terminal.
    assert run.stderr.strip().startswith(f"{path.parent.relative_to(tmp_path)}:   0%")


@every_script
def test_the_first_command(name, tmp_path, monkeypatch):
    """On its default task; nothing but the evaluation on standard output."""
    monkeypatch.chdir(tmp_path)
    status, out, err = command(name, "--total-timesteps", 1, "--eval-episodes", 1, *flags(name))
    assert status == 0 and len(out.splitlines()) == 1 and "Traceback" not in err
    task = module(name).Args().env_id
    assert len(list(tmp_path.glob(f"runs/{task}__{name}__1__*/checkpoint.pt"))) == 1


@every_script
def test_help_names_every_option_the_algorithms_first(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = command(name, "--help")
    assert status == 0
    options = list(module(name).Args.__dataclass_fields__)
    told = re.findall(r"^. --(\w[\w-]*)", out, re.M)
    assert told == [option.replace("_", "-") for option in options]
    assert options.index("env_id") > 5
    assert " ".join(module(name).__doc__.splitlines()[0].split()) in " ".join(out.split())


# Bad input


BAD = [
    (["--env-id", "NoSuchThing-v0"], ["NoSuchThing"]),
    (["--env-id", "no_such_module:Thing-v0"], ["no_such_module"]),
    (["--env-id", ""], [".py: "]),
    (["--env-id", "HalfCheetah-v2"], ["HalfCheetah-v2"]),
    (["--env-kwargs", '{"map_name": "9x9"}', "--env-id", "FrozenLake-v1"], ["9x9"]),
    (["--env-kwargs", "{nonsense"], ["{nonsense"]),
    (["--env-kwargs", "3"], ["mapping"]),
    (["--env-kwargs", '{"no_such": 1}'], ["no_such"]),
    (["--env-kwargs", '{"gravity": 5}', "--env-id", "LunarLander-v3"], ["gravity"]),
    (["--env-kwargs", '{"xml_file": "/no.xml"}', "--env-id", "Ant-v5"], ["/no.xml"]),
    (["--total-timesteps", "0"], ["--total-timesteps 0"]),
    (["--total-timesteps", "-5"], ["--total-timesteps -5"]),
    (["--seed", "-1"], ["--seed -1"]),
    (["--eval-episodes", "0"], ["--eval-episodes 0"]),
    (["--eval-every", "-1"], ["--eval-every -1"]),
    (["--hidden", "0"], ["--hidden 0"]),
    (["--device", "cuda"], ["--device cuda"]),
    (["--run-dir", "/dev/null/here"], ["/dev/null/here"]),
    (["--resume", "/no/such/file.pt"], ["/no/such/file.pt", "No such file"]),
]
OF_SOME = [  # where a script has the option
    (["--gamma", "1.5"], ["--gamma 1.5"]),
    (["--gamma", "nan"], ["--gamma nan"]),
    (["--learning-rate", "nan"], ["--learning-rate nan"]),
    (["--learning-rate", "-1"], ["--learning-rate -1"]),
    (["--init-std", "0"], ["--init-std 0.0"]),
    (["--num-envs", "0"], ["--num-envs 0"]),
    (["--num-steps", "0"], ["--num-steps 0"]),
    (["--candidates", "0"], ["--candidates 0"]),
    (["--workers", "0"], ["--workers 0"]),
    (["--batch-size", "0"], ["--batch-size 0"]),
    (["--burn-in", "0"], ["--burn-in 0"]),
    (["--tau", "1.5"], ["--tau 1.5"]),
    (["--utd", "-1"], ["--utd -1"]),
    (["--buffer-size", str(10**13)], ["--buffer-size"]),
]


@every_script
def test_bad_input_gets_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [f"--{x.replace('_', '-')}" for x in module(name).Args.__dataclass_fields__]
    for given, words in [*BAD, *(case for case in OF_SOME if case[0][0] in options)]:
        if given[-1] == "cuda" and (name == "a3c" or torch.cuda.is_available()):
            continue  # to a3c it is no choice at all
        status, out, err = result = command(name, *given)
        refused(result, *words)
        assert not out and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir()), "and nothing is written"


@each_plumbing
def test_words_and_unknown_options_are_refused(name):
    for options in (["--seed", "one"], ["--no-such-option", "1"]):
        status, _, err = command(name, *options)
        assert status == 2 and options[0] in err


@each_plumbing
def test_nothing_is_decided_by_what_python_can_leave_out(name, tmp_path):
    """With -OO, assertions and docstrings."""
    line = [sys.executable, "-OO", ROOT / f"{name}.py", "--capture-video", "--run-dir", tmp_path]
    line += ["--env-id", f"envs:{env_id(name)}"]  # which cannot be drawn
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    run = subprocess.run(line, capture_output=True, text=True, env=environ)
    refused((run.returncode, run.stdout, run.stderr), env_id(name))
    assert not list(tmp_path.iterdir())


# Where a run writes


@every_script
def test_a_directory_that_holds_a_checkpoint_is_not_overwritten(name, tmp_path):
    train(name, tmp_path, total_timesteps=100)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(module(name).Refusal, match="holds a checkpoint"):
        train(name, tmp_path, total_timesteps=100)
    train(name, tmp_path / "other", total_timesteps=100)
    resume = str(tmp_path / "other/checkpoint.pt")
    with pytest.raises(module(name).Refusal, match="holds a checkpoint"):
        train(name, tmp_path, total_timesteps=200, resume=resume)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@every_script
def test_runs_without_a_directory_get_one_each(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train(name, "", total_timesteps=100)
    assert len(list(tmp_path.glob(f"runs/{env_id(name)}__{name}__1__*/checkpoint.pt"))) == 2
    monkeypatch.setattr(module(name).time, "time", lambda: 1.5)
    train(name, "", total_timesteps=100)
    with pytest.raises(module(name).Refusal, match="holds a checkpoint|File exists"):
        train(name, "", total_timesteps=100)


def test_a_directory_of_another_kind_of_name(tmp_path):
    """Spaces, other letters, an environment named with its module."""
    folder = tmp_path / "Läufe von heute" / "a=1, b"
    train("ppo", folder, env_id="envs:Both-v0", total_timesteps=100)
    assert load(folder)["args"]["env_id"] == "envs:Both-v0"


@every_script
def test_the_options_are_in_the_log(name, tmp_path):
    train(name, tmp_path, seed=3)
    log = EventAccumulator(str(tmp_path)).Reload()
    text = log.Tensors("options/text_summary")[0].tensor_proto.string_val[0].decode()
    for option, value in vars(args(name, tmp_path, seed=3)).items():
        assert re.search(rf"^    {option}: {re.escape(str(value))}$", text, re.M)
    scalars = log.Tags()["scalars"]
    assert {"charts/SPS", "charts/eval_return", "charts/episodic_return"} <= set(scalars)
    assert all(re.match("(charts|losses)/[a-z]", tag) or tag == "charts/SPS" for tag in scalars)
