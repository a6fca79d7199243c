"""What a new user waits for: `make sample` in a clean clone, and how much of it is what.

python benchmarks/fresh_machine.py
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path

import results

ROOT = Path(__file__).resolve().parent.parent
PARTS = {
    "install": ".venv/installed",
    "build": ".venv/built",
    "sample": "sample",
    "again": "sample",
}


def main() -> None:
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "ddpm_fast"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        for name, target in PARTS.items():
            began = time.perf_counter()
            subprocess.run(["make", target], cwd=clone, check=True)
            figures[name] = time.perf_counter() - began
    total = sum(figures[name] for name in ("install", "build", "sample"))
    for name, seconds in figures.items():
        print(f"{name:8} {seconds:7.1f} s {100 * seconds / total:5.0f} %")
    print(results.write("fresh_machine", figures))


if __name__ == "__main__":
    main()
