"""What the commands share: a size as an option, and how errors and signals become one sentence."""

from __future__ import annotations

import argparse
import io
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from .checkpoint import CheckpointError
from .data import DataError
from .device import keep_freed_memory

FAILURES = (CheckpointError, DataError, OSError, RuntimeError)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """An interrupt, or the end of the job (SIGTERM). An empty message is not printed."""

    def __init__(self, number: int, message: str = "stopped") -> None:
        super().__init__(message)
        self.number = number


@contextmanager
def _stopping() -> Iterator[None]:
    """Let the first signal raise Stopped, and none disturb what is then brought to its end."""

    def stop(number: int, frame: object) -> None:
        for other in SIGNALS:  # not SIG_IGN, of which Python complains if one has just arrived
            signal.signal(other, lambda *_: None)
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():  # which alone has signals
        yield
        return
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def size(text: str) -> tuple[int, int]:
    """Height and width of "HxW" or of one number, as the type of an option."""
    match = re.fullmatch(r"([1-9]\d{0,5})(?:x([1-9]\d{0,5}))?", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"wanted HxW or one number, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def run(main: Callable[[], int | None], name: str) -> int:
    """Call `main`; its status, 2 for what was asked wrongly, 1 for what failed.

    128 + the number of a signal that stopped it: 130 or 143. An error becomes one line on stderr,
    after `name`.
    """
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that cannot be printed is no failure
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _stopping():
            return main() or 0
    except Stopped as stop:
        status, message = 128 + stop.number, str(stop)
    except torch.OutOfMemoryError as error:
        status, message = 1, f"out of device memory (a smaller --batch-size may fit): {error}"
    except MemoryError:
        status, message = 1, "out of memory (a smaller --batch-size may fit)"
    except FAILURES as error:
        status, message = 1, str(error)
    except ValueError as error:
        status, message = 2, str(error)
    if message:
        print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return status
