import os
import signal
import sys

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says more about what else a machine does than about us. The same examples are drawn every
# time, so that what is red is red for everybody; LOCKSTEP_EXPLORE=1 draws others.
settings.register_profile(
    "untimed",
    deadline=None,
    derandomize="LOCKSTEP_EXPLORE" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("untimed")

# A shell starts what runs in the background (`make test &`) with Ctrl-C ignored, and what is started from here inherits
# that: tests of Ctrl-C would wait for a signal that never comes.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Two files at a time, since half of the time of one is waiting; never more than the cores we may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(2, cores)


@pytest.fixture
def environment(monkeypatch):
    """Set environment variables by name until the test ends; None removes one."""

    def change(**variables):
        for name, value in variables.items():
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, str(value))

    return change


@pytest.fixture
def gpus_are_there(monkeypatch):
    """Let torch say that this machine has GPUs."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)


@pytest.fixture
def command_line(monkeypatch, environment, capsys):
    """The command `lockstep` in this process: give it arguments, get its status, stdout and stderr."""

    def run(*arguments, env=()):
        from lockstep.cli import main

        environment(**dict(env))
        monkeypatch.setattr(sys, "argv", ["lockstep", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return ended.value.code or 0, shown.out, shown.err

    return run
