"""make test-gpu: tests in a process that is followed by another where it ends before they do.

    python tests/gpu_session.py [--budget 480] [--json FILE] [--resume] TESTS...

A test that crashes, hangs or loses the GPU is one failure, and hides no other. FILE has after each
test what came of it: so also when the time is up, or the process killed; --resume goes on from it.

This is also the plugin of pytest that writes FILE.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LONGEST = 150.0  # seconds of a test: the slowest compiles 16 variants of a Triton kernel
LOST_THE_GPU = 3  # the status of a process that cannot go on


def read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {"finished": False, "running": None, "passed": [], "failed": {}, "skipped": {}}


def write(path: Path, document: dict, **changes: object) -> None:
    """Whole or not at all."""
    document |= changes
    document["counts"] = {name: len(document[name]) for name in ("passed", "failed", "skipped")}
    document["reasons"] = Counter(document["skipped"].values())
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(document, indent=1) + "\n")
    beside.replace(path)


def gpu_is_lost() -> str:
    """What CUDA says of a GPU that this process cannot use any more; empty where it can."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).split("\n")[0]
    return ""


def in_a_line(report: pytest.TestReport | pytest.CollectReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message[:300] if crash else str(report.longrepr)[-300:]
    return " ".join(text.split())


def machine() -> dict[str, str]:
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {"device": device, "torch": torch.__version__, "python": platform.python_version()}


class Progress:
    """Of pytest: what came of each test, into the file; what is there already is not run again."""

    def __init__(self, path: Path) -> None:
        self.path, self.document = path, read(path)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.document["failed"][report.nodeid] = in_a_line(report)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        known = {name for kind in ("passed", "failed", "skipped") for name in self.document[kind]}
        left = [item for item in items if item.nodeid not in known]
        write(self.path, self.document, **machine())
        # Triton's last: each of their variants is compiled.
        items[:] = sorted(left, key=lambda item: "triton" in item.nodeid)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        write(self.path, self.document, running=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.document["failed"][report.nodeid] = in_a_line(report)
        elif report.skipped:
            reason = report.longrepr[2].removeprefix("Skipped: ")
            self.document["skipped"][report.nodeid] = reason
        elif report.when == "call":
            self.document["passed"].append(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        failed = self.document["failed"]
        lost = gpu_is_lost() if nodeid in failed else ""
        if lost:
            failed[nodeid] += f" (the GPU was lost: {lost})"
        write(self.path, self.document, running=None)
        if lost:
            pytest.exit(f"{nodeid} lost the GPU: {lost}", returncode=LOST_THE_GPU)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        write(self.path, self.document, running=None, finished=exitstatus in (0, 1, 5))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--progress", type=Path, help="the file of gpu_session.py")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Progress(config.getoption("--progress")))


def one_process(tests: list[str], path: Path, deadline: float, longest: float) -> bool:
    """Run what is left of the tests; whether another process should go on."""
    command = [sys.executable, "-m", "pytest", "--continue-on-collection-errors"]
    command += ["-p", "gpu_session", "--progress", str(path), *tests]
    paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    began, before = time.time(), read(path)["counts"]
    why = "the process ended in this test"
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}) as process:
        while process.poll() is None:
            time.sleep(0.2)
            if time.time() > deadline:
                process.kill()
                print("gpu_session: the time is up, and --resume goes on", file=sys.stderr)
                return False
            if time.time() - max(began, path.stat().st_mtime) > longest:
                process.kill()
                why = f"it took more than {longest:.0f} s"
    document = read(path)
    if document["running"]:
        document["failed"][document["running"]] = why
        write(path, document, running=None)
    return not document["finished"] and document["counts"] != before


def main() -> int:
    p = argparse.ArgumentParser()
    p.add_argument("--budget", type=float, default=480.0, help="seconds")
    p.add_argument("--longest", type=float, default=LONGEST, help="seconds of a test")
    p.add_argument("--json", type=Path, required=True)
    p.add_argument("--resume", action="store_true", help="keep what the file has")
    p.add_argument("tests", nargs="+")
    args = p.parse_args()
    if not args.resume:
        args.json.unlink(missing_ok=True)
    write(args.json, read(args.json), finished=False, running=None)
    deadline = time.time() + args.budget
    while one_process(args.tests, args.json, deadline, args.longest):
        pass
    document = read(args.json)
    for name, why in document["failed"].items():
        print(f"FAILED {name}: {why}")
    print(f"{document['counts']}, skipped for {document['reasons']}: {args.json}")
    return bool(document["failed"]) or not document["finished"]


if __name__ == "__main__":
    raise SystemExit(main())
