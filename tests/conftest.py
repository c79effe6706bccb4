"""What every test file uses: scripts as modules, their sources, a command in this process."""

import contextlib
import importlib
import inspect
import io
import os
import pathlib
import re
import runpy
import signal
import sys
from unittest import mock

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("XDG_RUNTIME_DIR", "/tmp")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # with a GPU, a3c's workers cannot fork after a training

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import envs  # noqa: E402, F401  registers the tiny environments
import pytest  # noqa: E402
import torch  # noqa: E402
from tensorboard.summary.writer import event_file_writer  # noqa: E402

torch.set_num_threads(1)  # two test runs side by side share two cores

TABLE = (ROOT / "tests/equations.tsv").read_text(encoding="utf-8").splitlines()
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
SOURCES = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in SCRIPTS}


def module(name):
    """The script as an imported module."""
    return importlib.import_module(name)


def command(script, *options):
    """Run `python script.py options` in this process: exit status, standard output and error."""
    out, err = io.StringIO(), io.StringIO()
    argv = [f"{script}.py", *map(str, options)]
    handlers = {number: signal.getsignal(number) for number in (2, 15, 1)}
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(autouse=True)
def logs_in_order(monkeypatch):
    """TensorBoard reads the files of a second in the order of their names: the 10th before the 9th.

    Only many short runs of one process, as here, get that far.
    """
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def pytest_runtest_makereport(item, call):
    """Beside a failure, the equations that the test verifies or whose functions it calls."""
    if not call.excinfo or not hasattr(item, "function"):
        return
    used = set(re.findall(r"\w+", inspect.getsource(item.function))) - {"train"}
    rows = []
    for section, n, _, where, *_ in (line.split("\t") for line in TABLE[1:]):
        names = {place.split(":")[-1] for place in where.split()}
        if names & used:
            rows.append(f"[{section}, eq. {n}] {where}")
    if rows:
        item.add_report_section(call.when, "equations", "\n".join(rows))
