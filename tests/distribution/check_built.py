"""Looks into what ``python -m build`` has built: ``check_built.py dist`` (``tox run -e dist``)."""

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Of the files that git knows, these are no part of a release.
NOT_SHIPPED = {".gitignore"}


def tracked() -> set[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()) - NOT_SHIPPED


def check_sdist(path: Path) -> None:
    """It has every file of the repository, and its tests are found where it is unpacked."""
    with tarfile.open(path) as archive, tempfile.TemporaryDirectory() as folder:
        archive.extractall(folder, filter="data")
        (root,) = Path(folder).iterdir()
        files = {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}
        assert not (lacking := tracked() - files), f"{path.name} lacks {sorted(lacking)}"
        collected = subprocess.run(
            [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
        assert collected.returncode == 0, collected.stdout[-4000:] + collected.stderr[-4000:]
        print(path.name, len(files), "files;", collected.stdout.strip().splitlines()[-1])


def check_wheel(path: Path) -> None:
    """It has every file of the package, and nothing else but metadata."""
    package = {name for name in tracked() if name.startswith("lmhead_pass/")}
    names = {name for name in zipfile.ZipFile(path).namelist() if ".dist-info/" not in name}
    assert names == package, names ^ package
    print(path.name, len(names), "files")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    check_sdist(sdist)
    check_wheel(wheel)
