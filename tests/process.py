"""Runs Python in other processes."""

import functools
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path(__file__).parents[1]


class Interpreter:
    """Has imported some modules already: what it runs is spared that, and shares nothing else."""

    def __init__(self, *modules: str):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", *modules],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, *programs: Sequence[str], environment: dict[str, str]
    ) -> list[subprocess.CompletedProcess]:
        """Run programs at the same time: each is a script and its arguments."""
        with tempfile.TemporaryDirectory() as folder:
            outputs = [str(Path(folder, str(number))) for number in range(len(programs))]
            job = [
                {"script": script, "arguments": args, "environment": environment, "output": output}
                for (script, *args), output in zip(programs, outputs, strict=True)
            ]
            assert self._process.stdin is not None and self._process.stdout is not None
            print(json.dumps(job), file=self._process.stdin, flush=True)
            codes = json.loads(self._process.stdout.readline())
            return [
                subprocess.CompletedProcess(
                    program,
                    code,
                    Path(f"{output}.stdout").read_text(),
                    Path(f"{output}.stderr").read_text(),
                )
                for program, output, code in zip(programs, outputs, codes, strict=True)
            ]


@functools.cache
def interpreter(*modules: str) -> Interpreter:
    """The one interpreter with these modules; it ends with this process, as its input does."""
    return Interpreter(*modules)


def run_python(
    code: str, *, is_fresh: bool = False, **environment: str | None
) -> subprocess.CompletedProcess:
    """Run ``code`` and return its output; an environment variable of None is taken away.

    It starts with torch imported, but nothing that compiles, or of this package; a fresh process,
    without even torch. It may import what tests share.
    """
    given = {**os.environ, "PYTHONPATH": str(_ROOT), **environment}
    env = {n: v for n, v in given.items() if v is not None}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")  # a file, so that tracebacks have lines to show
        script.write_text(textwrap.dedent(code))
        if not is_fresh:
            (done,) = interpreter("torch").run([str(script)], environment=env)
            return done
        return subprocess.run(
            [sys.executable, str(script)],
            env=env,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )


def output_of(code: str, *, is_fresh: bool = False, **environment: str | None) -> str:
    """What ``code`` prints; it must not fail."""
    done = run_python(code, is_fresh=is_fresh, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
