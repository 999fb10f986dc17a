"""The package's folders import one way only, and each other by what they export."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import lmhead_pass

# Each may import from those before it.
CHAIN = (
    *("graph", "logits", "sums", "plan", "rowwise", "rewrite", "outside", "explanation"),
    "command_line",
)
# These know nothing of matching. Beside each: who may import from it.
APART = {
    "op": ("returned", "plan", "rowwise", "rewrite", "command_line"),
    "returned": ("plan", "rewrite", "outside"),
}
# What all may import, module by module. It imports none of the other folders.
FOR_ALL = ("config", "compat", "log")
# What everybody imports with the package: it may wait for no more than these, outside functions.
LIGHT = ("__init__", "registration", "graph_pass")
WITH_THE_PACKAGE = (*FOR_ALL, *LIGHT, *APART)

Module = tuple[str, ...]
"""Where a module is in the package: ("graph", "tensors"), or ("graph", "__init__")."""


@dataclass(frozen=True)
class Import:
    """``from target import name``, by their places in the package."""

    line: int
    source: Module
    target: Module
    name: str
    is_lazy: bool
    """Whether it stands in a function, or is for type checkers alone."""

    def __str__(self) -> str:
        return f"{'/'.join(self.source)}.py:{self.line} imports {self.name} of {self.target}"


class Package:
    """A package's modules and what they import of each other."""

    def __init__(self, root: Path):
        files = {file.relative_to(root).with_suffix("").parts: file for file in root.rglob("*.py")}
        trees = {module: ast.parse(file.read_text()) for module, file in files.items()}
        self.name, self.modules = root.name, set(trees)
        self.exported = {module: set(_exported(tree)) for module, tree in trees.items()}
        self.imports = [
            found for module, tree in trees.items() for found in self._imports(module, tree)
        ]

    def _imports(self, source: Module, tree: ast.Module) -> Iterator[Import]:
        lazy = {
            inner
            for outer in ast.walk(tree)
            if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
            or (isinstance(outer, ast.If) and ast.unparse(outer.test) == "TYPE_CHECKING")
            for inner in ast.walk(outer)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                path = (node.module or "").split(".") if node.module else []
                if node.level:
                    base = source[: len(source) - node.level] + tuple(path)
                elif path[:1] == [self.name]:
                    base = tuple(path[1:])
                else:
                    continue
                for alias in node.names:
                    target = self._module((*base, alias.name)) or self._module(base)
                    assert target is not None, (source, base)
                    yield Import(node.lineno, source, target, alias.name, node in lazy)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    path = alias.name.split(".")
                    if path[0] == self.name and (target := self._module(tuple(path[1:]))):
                        yield Import(node.lineno, source, target, path[-1], node in lazy)

    def _module(self, path: Module) -> Module | None:
        places = (path, (*path, "__init__"))
        return next((place for place in places if place in self.modules), None)

    def faults(self) -> list[str]:
        """Each import that runs the wrong way, and each circle."""
        found = [f"{item}: {why}" for item in self.imports if (why := self._fault(item))]
        return found + [f"imported in a circle: {circle}" for circle in self._circles()]

    def _fault(self, item: Import) -> str | None:
        source, target = _folder(item.source), _folder(item.target)
        if source == target != "" or item.target[0] in FOR_ALL:
            return None
        if source in FOR_ALL:
            return "all may import this, so it imports nothing of theirs"
        if source == "":
            is_light = item.source[0] in LIGHT
            if item.is_lazy or target in WITH_THE_PACKAGE or item.target[0] in WITH_THE_PACKAGE:
                return None
            return "this is imported with the package" if is_light else "this is below the folders"
        if target == "":
            return "this is above the folders"
        if target in APART:
            if source not in APART[target]:
                return f"only {APART[target]} may"
        elif source in APART or CHAIN.index(target) > CHAIN.index(source):
            return "this is backward"
        is_exported = item.name in self.exported[target, "__init__"]
        return None if is_exported else f"{target}/__init__.py does not export this"

    def _circles(self) -> Iterator[list[str]]:
        """Of modules in one folder; what is imported in functions counts as well."""
        further: dict[Module, set[Module]] = {module: set() for module in self.modules}
        for item in self.imports:
            is_package = item.target[-1] == "__init__" and item.source == item.target
            if _folder(item.source) == _folder(item.target) != "" and not is_package:
                further[item.source].add(item.target)
        left = dict(further)
        while free := [m for m, targets in left.items() if not targets & left.keys()]:
            for module in free:
                del left[module]
        if left:
            yield sorted("/".join(module) for module in left)


def _folder(module: Module) -> str:
    return module[0] if len(module) > 1 else ""


def _exported(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            yield from ast.literal_eval(node.value)


def test_imports_run_one_way():
    package = Package(Path(lmhead_pass.__file__).parent)
    folders = {_folder(module) for module in package.modules}
    assert folders == {"", "compat", *CHAIN, *APART}
    assert len(package.imports) > 100
    assert package.faults() == []


TREE = {
    "__init__.py": "from . import op\n\ndef explain():\n    from .explanation import e",
    "config.py": "",
    "compat/__init__.py": "",
    "compat/graphs.py": "from . import x",
    "registration.py": "from . import compat",
    "graph/__init__.py": "from .tensors import same\n__all__ = ['same', 'tensors']",
    "graph/tensors.py": "from ..compat.graphs import x\nfrom .. import config",
    "logits/__init__.py": "from .rows import follow\n__all__ = ['follow']",
    "logits/rows.py": "from ..graph import same, tensors\nfrom .types import Logits",
    "logits/types.py": "import torch",
    "op/__init__.py": "from .kernels import aten\n__all__ = ['aten', 'plan_rows']",
    "op/kernels/__init__.py": "",
    "op/kernels/aten.py": "from ..problem import Problem",
    "op/problem.py": "from .. import config",
    "plan/__init__.py": "from ..op import plan_rows\n__all__ = ['find']",
    "returned/__init__.py": "__all__ = ['lazy']",
    "explanation/__init__.py": "from ..plan import find\n__all__ = ['e']",
}
WRONG = {
    "backward": ({"graph/tensors.py": "from ..logits import follow"}, "this is backward"),
    "backward in a function": (
        {"logits/types.py": "def f():\n    from ..plan import find"},
        "this is backward",
    ),
    "backward by the package's name": (
        {"graph/tensors.py": "from made.logits import follow"},
        "this is backward",
    ),
    "a module of another folder": (
        {"plan/matcher.py": "from ..logits.types import Logits"},
        "logits/__init__.py does not export this",
    ),
    "a module of another folder, as an attribute": (
        {"plan/matcher.py": "from ..logits import types"},
        "logits/__init__.py does not export this",
    ),
    "matching in the op": ({"op/problem.py": "from ..graph import same"}, "this is backward"),
    "the op in the analysis": ({"logits/types.py": "from ..op import plan_rows"}, "only"),
    "one apart in another": ({"op/problem.py": "from ..returned import lazy"}, "only"),
    "the package itself": ({"plan/matcher.py": "from .. import explain"}, "above the folders"),
    "registration": ({"plan/matcher.py": "from ..registration import f"}, "above the folders"),
    "not lazily": ({"registration.py": "from .plan import find"}, "imported with the package"),
    "settings that need a folder": ({"config.py": "from .graph import same"}, "below the folders"),
    "a circle": (
        {"logits/types.py": "from .rows import follow"},
        "imported in a circle: ['logits/__init__', 'logits/rows', 'logits/types']",
    ),
    "a circle through a folder in a folder": (
        {"op/problem.py": "from .kernels import aten"},
        "imported in a circle: ['op/__init__', 'op/kernels/aten', 'op/problem']",
    ),
    "a circle through the folder itself": (
        {"logits/rows.py": "from . import follow"},
        "imported in a circle: ['logits/__init__', 'logits/rows']",
    ),
}


def faults(root: Path, tree: dict[str, str]) -> list[str]:
    for name, text in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return Package(root).faults()


def test_a_tree_without_faults(tmp_path):
    assert faults(tmp_path / "made", TREE) == []


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_import_is_found(name, tmp_path):
    change, why = WRONG[name]
    (fault,) = faults(tmp_path / "made", TREE | change)
    assert why in fault
