"""Runs Python in a fresh process."""

import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path


def run_python(code: str, **environment: str | None) -> subprocess.CompletedProcess:
    """Run ``code`` and return its output; an environment variable of None is taken away."""
    env = {**os.environ, **environment}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")  # a file, so that tracebacks have lines to show
        script.write_text(textwrap.dedent(code))
        return subprocess.run(
            [sys.executable, str(script)],
            env={name: value for name, value in env.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )


def output_of(code: str, **environment: str | None) -> str:
    """What ``code`` prints; it must not fail."""
    done = run_python(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
