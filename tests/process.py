"""Runs Python in a fresh process."""

import os
import subprocess
import sys
import textwrap


def run_python(code: str, **environment: str | None) -> subprocess.CompletedProcess:
    """Run ``code`` and return its output; an environment variable of None is taken away."""
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={name: value for name, value in env.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def output_of(code: str, **environment: str | None) -> str:
    """What ``code`` prints; it must not fail."""
    done = run_python(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
