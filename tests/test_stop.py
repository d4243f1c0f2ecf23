"""When a signal is kept for the next step, and when it acts at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from fastmoco.train.stop import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_kept_once_there_is_something_to_save(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert signal.getsignal(number) is before
        stop.begin()
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.signal == number
        # srun's own, which follows where another process ended first.
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("tell", [False, True])
def test_the_first_signal_is_answered_where_asked_for(tell: bool, capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        stop.begin(tell=tell)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err.count("the step under way is ended and saved") == tell


def test_a_second_ctrl_c_interrupts() -> None:
    with StopRequest() as stop:
        stop.begin()
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.signal == signal.SIGUSR1


def test_a_process_that_only_has_to_end_is_not_ended_otherwise() -> None:
    program = (
        "import os, signal, sys; from fastmoco.train.stop import end_undisturbed; end_undisturbed()\n"
        "os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGUSR1); sys.exit(7)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 7
