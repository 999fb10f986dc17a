"""Runs every command in README and docs as it is printed, in a fresh copy of the repository.

    tox run -e docs-commands                 runs them
    tox run -e docs-commands -- --list       lists them, and why some are not run
    tox run -e docs-commands -- TEXT         runs those with TEXT in them

A command is a line in a fenced or indented block, or a code span, that begins with a program (and
variables before it). What is not run here is in ``NOT_RUN``, with the reason.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SECONDS = 900

# Beginnings of commands that this does not run, and why. Each has to be in a page.
NOT_RUN = {
    "pip install git+": "the address is that of the published repository",
    "pip install -e": "it changes the environment that runs this",
    "pip install pillow": "an error message of transformers says so",
    "pip install tox && tox run -e tests": "CI runs it",
    "tox run -e docs-commands": "runs this",
    "tox run -e codegen": "takes an hour",
    "tox run -e slow": "takes an hour",
    "tox run -e fuzz": "runs until it is told to stop",
    "python -m tests.programs.fuzz": "runs until it is told to stop",
    "tox run -e models": "takes half an hour",
    "tox run -e dist,wheel": "the release workflow runs it",
    "python -m tests.models.record": "takes half an hour",
    "python -m benchmarks.precision": "takes 16 minutes",
    "python benchmarks/cpu.py": "takes minutes, and counts only on a quiet machine",
    "python benchmarks/sizes.py": "takes 15 minutes, and counts only on a quiet machine",
    "python benchmarks/outside.py": "takes minutes",
    "python benchmarks/row_wise.py": "takes 15 minutes, and counts only on a quiet machine",
    "python benchmarks/overheads.py": "counts only on a quiet machine",
    "python benchmarks/gpu_steps.py": "needs a GPU",
    "python benchmarks/gpu.py": "needs a GPU",
    "python benchmarks/gpu_parts.py": "needs a GPU",
    "python -m pytest -m gpu": "needs a GPU",
    "python -m pytest tests": "CI runs these tests",
}

_PROGRAM = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:python|pip|tox run|torchrun|accelerate launch|mkdocs) \S"
)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")


def commands() -> dict[str, list[str]]:
    """Every command, with the pages that print it."""
    found: dict[str, list[str]] = {}
    for page in PAGES:
        for command in commands_in(page.read_text()):
            pages = found.setdefault(command, [])
            if (name := str(page.relative_to(ROOT))) not in pages:
                pages.append(name)
    return found


def commands_in(text: str) -> list[str]:
    """The commands that a page prints, in order."""
    found, prose, is_code = [], [], False
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    for line in lines:
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif (is_code or line.startswith("    ")) and _PROGRAM.match(line.strip().lstrip("$ ")):
            found.append(line.strip().lstrip("$ "))
        elif not is_code:
            prose.append(line)
    for paragraph in re.split(r"\n\s*\n|\n(?=\|)", "\n".join(prose)):
        spans = (" ".join(span.split()) for span in _SPAN.findall(paragraph))
        found += filter(_PROGRAM.match, spans)
    return found


def why_not_run(command: str) -> str | None:
    """The reason in ``NOT_RUN``; None if the command is run."""
    without_variables = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", command)
    starts = (start for start in NOT_RUN if without_variables.startswith(start))
    return next((NOT_RUN[start] for start in starts), None)


def run(command: str, folder: Path) -> str | None:
    """Run ``command`` in ``folder``; what it printed if it failed."""
    try:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"took more than {SECONDS} seconds"
    return done.stdout[-4000:] if done.returncode else None


def fresh_copy(folder: Path) -> Path:
    """The files that git knows, as they are now, and the reader's own ``train.py``."""
    copy = folder / "lmhead_pass"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    shutil.copy(Path(__file__).with_name("train.py"), copy)
    subprocess.run(["git", "init", "--quiet"], cwd=copy, check=True)
    subprocess.run(["git", "add", "--all"], cwd=copy, check=True)
    return copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("text", nargs="*", help="only commands with this in them")
    given = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = fresh_copy(Path(folder))
        for command, pages in commands().items():
            if not all(text in command for text in given.text):
                continue
            why = why_not_run(command)
            print(f"{command}\n    in {', '.join(pages)}: ", end="", flush=True)
            if why or given.list:
                print(f"not run: {why}" if why else "run")
                continue
            start = time.monotonic()
            output = run(command, copy)
            failed += output is not None
            print(f"{'ok' if output is None else 'FAILED'}, {time.monotonic() - start:.0f} s")
            if output is not None:
                print(output)
    sys.exit(f"{failed} failed" if failed else 0)


if __name__ == "__main__":
    main()
