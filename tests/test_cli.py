"""Signals and errors of a command: one sentence, one status, and time to finish."""

from __future__ import annotations

import io
import signal
import sys
import threading

import pytest

from ddpm_fast import cli


def test_a_second_signal_does_not_disturb_the_end(capsys):
    finished = []

    def main() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            finished.append(True)

    before = [signal.getsignal(n) for n in cli.SIGNALS]
    assert cli.run(main, "name") == 143 and finished == [True]
    assert capsys.readouterr().err == "name: stopped\n"
    assert before == [signal.getsignal(n) for n in cli.SIGNALS]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_two_signals_at_the_same_moment():
    """As of a terminal's interrupt under a launcher that passes it on as SIGTERM."""

    def main() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, cli.SIGNALS)
        for number in cli.SIGNALS:
            signal.raise_signal(number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, cli.SIGNALS)

    assert cli.run(main, "name") == 130


@pytest.mark.parametrize(
    "error, status, words",
    [
        (ValueError("asked\n wrongly"), 2, "name: asked wrongly\n"),
        (OSError(28, "No space left"), 1, "name: [Errno 28] No space left\n"),
        (MemoryError(), 1, "name: out of memory (a smaller --batch-size may fit)\n"),
        (cli.Stopped(signal.SIGINT, ""), 130, ""),
    ],
    ids=lambda v: type(v).__name__,
)
def test_an_error_is_one_line(capsys, error, status, words):
    def main() -> None:
        raise error

    assert cli.run(main, "name") == status and capsys.readouterr().err == words


def test_a_name_that_cannot_be_printed_is_no_failure(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii", write_through=True))
    assert cli.run(lambda: print("ünï"), "name") == 0
    assert written.getvalue() == b"\\xfcn\\xef\n"


def test_a_command_in_a_thread_of_a_host(capsys):
    """Where there are no signals to wait for."""
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(cli.run(lambda: 0, "name")))
    thread.start()
    thread.join()
    assert statuses == [0] and capsys.readouterr().err == ""
