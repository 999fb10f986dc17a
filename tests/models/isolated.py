"""Runs each model in a process of its own: none of them can end the sweep."""

import multiprocessing
import os
import resource
import warnings
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

from . import table

_TIMEOUT_SECONDS = 1200 if table.WITH_INDUCTOR else 120
_MEMORY = 16 << 30
_PRELOADED = ["torch._inductor.custom_graph_pass", "tests.models.running"]
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    # One thread: the server that models are forked from must not have started others.
    "OMP_NUM_THREADS": "1",
}


def run_isolated(class_name: str, kind: str) -> dict[str, Any]:
    """What ``running.run`` finds, or how the process ended instead."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, class_name, kind), daemon=True)
    with mock.patch.dict(os.environ, _ENVIRONMENT):
        process.start()
    sender.close()
    try:
        if receiver.poll(_TIMEOUT_SECONDS):
            return receiver.recv()
        return {"not built": f"it takes more than {_TIMEOUT_SECONDS} seconds"}
    except EOFError:
        process.join(10)
        return {"not built": f"its process ended with code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _child(sender: Connection, class_name: str, kind: str) -> None:
    from .running import run

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    warnings.simplefilter("ignore")
    sender.send(run(class_name, kind))
