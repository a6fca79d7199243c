"""make test-gpu: tests in processes that are followed by others where they end before the tests do.

    python tests/gpu_session.py [--budget 480] [--processes N] --json FILE [--resume] TESTS...

A test that crashes, hangs or loses the GPU is one failure, and hides no other. FILE says, seconds
after each test, what came of it: so also when the time is up, or all is killed; --resume goes on
from it. Several processes share the tests, most of whose time goes to compiling Triton's kernels.

This is also the plugin of pytest that writes a process's part.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LONGEST = 150.0  # seconds of a test: the slowest compiles 16 variants of a Triton kernel
LOST_THE_GPU = 3  # the status of a process that cannot go on


def read(path: Path) -> dict:
    if path.exists():
        return json.loads(path.read_text())
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


def merge(path: Path, parts: list[Path]) -> None:
    """The processes' parts as one document."""
    documents = [read(part) for part in parts]
    whole = {name: value for document in documents for name, value in document.items()}
    whole["finished"] = all(document["finished"] for document in documents)
    whole["running"] = [document["running"] for document in documents if document["running"]]
    whole["passed"] = sorted({name for document in documents for name in document["passed"]})
    for kind in ("failed", "skipped"):
        whole[kind] = {n: why for document in documents for n, why in document[kind].items()}
    write(path, whole)


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
    """Of pytest: what came of each test, into the file; what is there already is not run again.

    share: "k/n" of the tests are taken.
    """

    def __init__(self, path: Path, share: str) -> None:
        self.path, self.document = path, read(path)
        self.number, self.shares = map(int, share.split("/"))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.document["failed"][report.nodeid] = in_a_line(report)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        known = {name for kind in ("passed", "failed", "skipped") for name in self.document[kind]}
        mine = [i for i in items if zlib.crc32(i.nodeid.encode()) % self.shares == self.number]
        left = [item for item in mine if item.nodeid not in known]
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
    parser.addoption("--progress", type=Path, help="the file of a process")
    parser.addoption("--share", help="which of the tests, as 0/4")


def pytest_configure(config: pytest.Config) -> None:
    progress = Progress(config.getoption("--progress"), config.getoption("--share"))
    config.pluginmanager.register(progress)


def one_process(tests: list[str], path: Path, share: str, deadline: float, longest: float) -> bool:
    """Run what is left of the tests; whether another process should go on."""
    command = [sys.executable, "-m", "pytest", "--continue-on-collection-errors"]
    command += ["-p", "gpu_session", "--progress", str(path), "--share", share, *tests]
    paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    began, before = time.time(), read(path)["counts"]
    why = "the process ended in this test"
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}) as process:
        while process.poll() is None:
            time.sleep(0.2)
            if time.time() > deadline:
                process.kill()
                return False
            if time.time() - max(began, path.stat().st_mtime) > longest:
                process.kill()
                why = f"it took more than {longest:.0f} s"
    document = read(path)
    if document["running"]:
        document["failed"][document["running"]] = why
        write(path, document, running=None)
    return not document["finished"] and document["counts"] != before


def run(args: argparse.Namespace) -> dict:
    """The document at the end."""
    if not args.resume:
        args.json.unlink(missing_ok=True)
    known, n = read(args.json), args.processes
    parts = [args.json.with_suffix(f".{k}.json") for k in range(n)]
    for part in parts:
        write(part, known, finished=False, running=None)
    deadline = time.time() + args.budget

    def go_on(k: int) -> None:
        while one_process(args.tests, parts[k], f"{k}/{n}", deadline, args.longest):
            pass

    with ThreadPoolExecutor(n) as pool:
        working = [pool.submit(go_on, k) for k in range(n)]
        while not all(one.done() for one in working):
            time.sleep(1)
            merge(args.json, parts)
    for part in parts:
        part.unlink()
    return read(args.json)


def main() -> int:
    p = argparse.ArgumentParser()
    p.add_argument("--budget", type=float, default=480.0, help="seconds")
    p.add_argument("--longest", type=float, default=LONGEST, help="seconds of a test")
    cores = os.cpu_count() or 1
    p.add_argument("--processes", type=int, default=max(1, min(8, cores // 2)))
    p.add_argument("--json", type=Path, required=True)
    p.add_argument("--resume", action="store_true", help="keep what the file has")
    p.add_argument("tests", nargs="+")
    args = p.parse_args()
    document = run(args)
    for name, why in document["failed"].items():
        print(f"FAILED {name}: {why}")
    if not document["finished"]:
        print("the time was up: --resume goes on")
    print(f"{document['counts']}, skipped for {document['reasons']}: {args.json}")
    return bool(document["failed"]) or not document["finished"] or not document["passed"]


if __name__ == "__main__":
    raise SystemExit(main())
