"""What a command's start must not pay for."""

from __future__ import annotations

import subprocess
import sys

# Each is a large part of a second, or seconds, and no run needs it.
UNNEEDED = ("torch._dynamo", "torch._inductor", "sympy", "fsspec", "triton")


def test_sampling_imports_nothing_slow(class_model_file, tmp_path):
    code = "import sys; from ddpm_fast import sample; "
    code += "status = sample.main(sys.argv[1:]); "
    code += f"print(status, [m for m in {UNNEEDED} if m in sys.modules])"
    arguments = ["--model", str(class_model_file), "--num-samples", "1", "--steps", "2"]
    arguments += ["--device", "cpu", "--quiet", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0 []"
