"""In CI, tests without the compiled extension are red."""

import os
import subprocess
import sys

WITHOUT_EXTENSION = (
    "import sys, pytest; sys.modules['ddpm_fast._C'] = None;"
    "sys.exit(pytest.main(['--collect-only', sys.argv[1]]))"
)


def test_a_missing_extension_fails_the_run_in_ci():
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTENSION, __file__],
        env=os.environ | {"CI": "true"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "the compiled extension is missing" in run.stdout + run.stderr
