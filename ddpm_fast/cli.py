"""What the commands share: a size as an option, and how an error becomes one sentence."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable

import torch

from .checkpoint import CheckpointError
from .data import DataError

FAILURES = (CheckpointError, DataError, OSError, RuntimeError)


def size(text: str) -> tuple[int, int]:
    """Height and width of "HxW" or of one number, as the type of an option."""
    match = re.fullmatch(r"([1-9]\d{0,5})(?:x([1-9]\d{0,5}))?", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"wanted HxW or one number, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def run(main: Callable[[], int | None], name: str) -> int:
    """Call `main`; its status, 2 for what was asked wrongly, 1 for what failed, 130 if stopped.

    An error becomes one line on stderr, after `name`.
    """
    try:
        return main() or 0
    except KeyboardInterrupt:
        status, message = 130, "stopped"
    except torch.OutOfMemoryError as error:
        status, message = 1, f"out of device memory (a smaller --batch-size may fit): {error}"
    except MemoryError:
        status, message = 1, "out of memory (a smaller --batch-size may fit)"
    except FAILURES as error:
        status, message = 1, str(error)
    except ValueError as error:
        status, message = 2, str(error)
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return status
