"""An interpreter that imports modules once, and forks for each script that it is told to run.

    python -m tests.fork_server MODULE ...

Each line that it reads is a job: programs that run at the same time, in JSON. It answers with their
exit codes. See ``process.Interpreter``.
"""

import atexit
import faulthandler
import importlib
import json
import os
import runpy
import signal
import sys
import traceback
from typing import Any, NoReturn

SECONDS = 300


def main() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        children = [_start(program) for program in json.loads(line)]
        states = [os.waitpid(child, 0)[1] for child in children]
        print(json.dumps([os.waitstatus_to_exitcode(state) for state in states]), flush=True)


def _start(program: dict[str, Any]) -> int:
    child = os.fork()
    if not child:
        _run(**program)
    return child


def _run(script: str, arguments: list[str], environment: dict[str, str], output: str) -> NoReturn:
    """Be the child: as if the interpreter had been started with ``script``."""
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, f"{output}.stdout", os.O_WRONLY | os.O_CREAT),
        (2, f"{output}.stderr", os.O_WRONLY | os.O_CREAT),
    ):
        os.dup2(os.open(path, flags), number)
    faulthandler.dump_traceback_later(SECONDS)  # where it hangs, to stderr
    signal.alarm(SECONDS + 10)  # which ends it
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(script)
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
