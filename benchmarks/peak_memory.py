"""The largest resident memory of this process, MiB; of the sampling command's, run as

python benchmarks/peak_memory.py ARGUMENTS
"""

from __future__ import annotations

import sys
from pathlib import Path


def peak_memory() -> float:
    """Not getrusage's, which is at least what the parent had when it began this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    from ddpm_fast import cli, sample

    failed = cli.run(sample.main, "ddpm_fast.sample")
    print(peak_memory())
    sys.exit(failed)
