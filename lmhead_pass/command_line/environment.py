"""What a bug report needs to know: versions, devices, compilers, settings, and known conflicts."""

import importlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import config
from ..compat.lookup import all_missing
from ..compat.settings import cache_folder, caches_come_first, registered_passes, settings_of
from .tables import Table

_VARIABLES = ("LMHEAD_PASS_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "TORCH_COMPILE", "TORCH_LOGS")

WhyNotRun = Callable[[Callable[..., Any]], str]


def environment(why_not_run: WhyNotRun) -> dict[str, Table]:
    """Tables for a bug report, of this process and of the thread that asks.

    ``why_not_run`` tells what keeps the pass from a function.
    """
    return {
        "Versions": _versions(),
        "Device": _devices(),
        "Compilers": _compilers(),
        "Pass": _registration(why_not_run),
        "Settings that differ from their defaults": _settings() or [("none", "")],
        "Caches": _caches(),
        "Known conflicts": _conflicts(why_not_run) or [("none", "")],
    }


def _versions() -> Table:
    folder = Path(__file__).parents[1]
    packages = ("lmhead_pass", "torch", "triton", "transformers", "accelerate", "lightning")
    return [
        ("python", f"{platform.python_version()}, {platform.platform()}"),
        *((name, _version(name)) for name in packages),
        ("lmhead_pass is in", str(folder)),
        ("torch was built for", _built_for()),
    ]


def _version(name: str) -> str:
    if name == "torch":
        return torch.__version__
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _built_for() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs"


def _devices() -> Table:
    cpu = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    rows = [("cpu", f"{cpu}, {torch.backends.cpu.get_cpu_capability()}")]
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        capability = ".".join(map(str, torch.cuda.get_device_capability(number)))
        size = f"{about.total_memory / 1e9:.1f} GB"
        rows.append((f"cuda:{number}", f"{about.name}, capability {capability}, {size}"))
    if len(rows) == 1:
        rows.append(("GPU", "none that torch can use"))
    return rows


def _compilers() -> Table:
    return [("C++", _cpp_compiler() or "none"), ("triton", _triton())]


def _cpp_compiler() -> str | None:
    found = shutil.which(os.environ.get("CXX") or "g++")
    if found is None:
        return None
    done = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    return f"{found}: {(done.stdout or done.stderr).partition(chr(10))[0]}"


def _triton() -> str:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"cannot be imported: {error}"
    return "can be imported"


def _registration(why_not_run: WhyNotRun) -> Table:
    lacking = [
        (f"torch lacks {names}", f"so that {without}") for without, names in all_missing().items()
    ]
    why = why_not_run(_function)
    passes = ", ".join(map(_name, registered_passes(_inductor_config())))
    return [
        ("registered", f"no: {why}" if why else "yes"),
        ("pre-grad passes", passes or "none"),
        *lacking,
    ]


def _function() -> None:
    """Stands for what a user compiles without options."""


def _name(graph_pass: Any) -> str:
    kind = graph_pass if hasattr(graph_pass, "__qualname__") else type(graph_pass)
    return f"{kind.__module__}.{kind.__qualname__}"


def _inductor_config() -> Any:
    return importlib.import_module("torch._inductor.config")


def _settings() -> Table:
    usual = config.defaults()
    ours = [
        (f"lmhead_pass.config.{name}", repr(value))
        for name, value in settings_of(config).items()
        if value != usual[name]
    ]
    variables = [
        (name, value) for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)
    ]
    return ours + variables


def _caches() -> Table:
    folder = cache_folder() or "unknown"
    parts = [path for path in Path(folder).glob("*") if path.is_dir()]
    entries = {
        part: len(list(Path(folder, part).glob("*/*"))) for part in ("aotautograd", "fxgraph")
    }
    held = ", ".join(f"{number} graphs in {part}" for part, number in entries.items())
    told = (
        "the pass is not called for a graph in it: what is rewritten there is told when it first "
        "runs, and what is left alone by lmhead_pass.explain alone"
    )
    return [
        ("folder", folder if parts else f"{folder}, which is empty"),
        ("graphs", held),
        ("asked before the pass", f"yes: {told}" if caches_come_first() else "no"),
    ]


def _conflicts(why_not_run: WhyNotRun) -> Table:
    rows = []
    if why := why_not_run(_function):
        rows.append(("the pass does not run", why))
    others = [item for item in registered_passes(_inductor_config()) if not _is_ours(item)]
    if others:
        names = ", ".join(map(_name, others))
        rows.append(("other pre-grad passes", f"{names}: graphs may reach lmhead_pass changed"))
    with ThreadPoolExecutor(1) as elsewhere:
        in_a_new_thread = elsewhere.submit(lambda: (why_not_run(_function), settings_of(config)))
        why_there, settings_there = in_a_new_thread.result()
    if bool(why) != bool(why_there):
        which = "in this thread alone" if why else "in other threads"
        rows.append(("threads", f"the pass does not run {which}. Call lmhead_pass.register()"))
    if settings_there != settings_of(config):
        text = (
            "lmhead_pass.config differs from that of a new thread: what is assigned or patched "
            "counts in that thread alone. Set LMHEAD_PASS_<NAME> in the environment for all"
        )
        rows.append(("threads", text))
    if _cpp_compiler() is None and not torch.cuda.is_available():
        rows.append(("no C++ compiler", "torch.compile needs one on a CPU. Install g++ or set CXX"))
    if sys.platform != "linux":
        rows.append((sys.platform, "lmhead_pass is tested on Linux alone"))
    return rows


def _is_ours(graph_pass: Any) -> bool:
    return _name(graph_pass).partition(".")[0] == "lmhead_pass"
