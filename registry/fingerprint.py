"""What code made an artifact: a digest over a module and everything of this project that it imports.

Read from the syntax tree, so that nothing is imported, and a comment or a line break changes nothing. Libraries count
by their version where it can change a result.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from twinloop.common.modules import FoundModule

PACKAGE = "twinloop"
ROOT = Path(__file__).resolve().parent.parent
"""The folder of the package `twinloop`."""
# Their release decides what comes out of a stage. One import name may come from one of several distributions.
LIBRARIES = {
    "numpy": ("numpy",),
    "onnx": ("onnx",),
    "onnx_ir": ("onnx-ir",),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "pandera": ("pandera",),
    "polars": ("polars",),
    "tokenizers": ("tokenizers",),
    "torch": ("torch",),
}
# Modules that carry results and don't shape them. Settings reach the key as settings, what is derived from them too.
UNHASHED = frozenset(
    {
        "twinloop.common.modules",
        "twinloop.registry.artifact",
        "twinloop.registry.fingerprint",
        "twinloop.registry.tracking",
        "twinloop.tasks.context",
        "twinloop.tasks.recipe",
        "twinloop.training.method",
        "twinloop.training.runtime",
        "twinloop.training.settings",
    }
)


@cache
def fingerprint(*modules: str, ignore: frozenset[str] = UNHASHED) -> str:
    """sha256 over `modules` and their transitive imports within the project, `ignore` and below left out.

    Raises ModuleNotFoundError for a module that is not the project's.
    """
    seen: set[str] = set()
    libraries: set[str] = set()
    pending = list(modules)
    while pending:
        module = pending.pop()
        if module in seen or (module in ignore and module not in modules):
            continue
        seen.add(module)
        for imported in _imports(module):
            top = imported.partition(".")[0]
            if top == PACKAGE:
                pending.append(imported)
            elif top in LIBRARIES:
                libraries.add(top)
    digest = hashlib.sha256()
    for module in sorted(seen):
        digest.update(f"{module}\n{ast.dump(_tree(_source(module)))}\n".encode())
    for library in sorted(libraries):
        digest.update(f"{library} {_version(library)}\n".encode())
    return digest.hexdigest()


def module_fingerprint(found: FoundModule) -> str:
    """sha256 over a module that a recipe names and what it imports: of Twinloop, and of what lies beside it."""
    if found.name.partition(".")[0] == PACKAGE:
        return fingerprint(found.name)
    digest, seen, pending = hashlib.sha256(), set[Path](), [found.file]
    ours: set[str] = set()
    while pending:
        path = pending.pop()
        if path in seen:
            continue
        seen.add(path)
        for imported in _named(_tree(path), _exists):
            if imported.partition(".")[0] == PACKAGE:
                ours.add(imported)
            else:
                pending += _beside(found, path, imported)
    for path in sorted(seen):
        digest.update(f"{path.name}\n{ast.dump(_tree(path))}\n".encode())
    digest.update(fingerprint(*sorted(ours)).encode())
    return digest.hexdigest()


def _beside(found: FoundModule, path: Path, imported: str) -> list[Path]:
    """The files of a module that a user's module imports, where they lie beside it or in its package."""
    parts = imported.lstrip(".").split(".")
    folders = [path.parent, found.file.parent]
    if "." in found.name:  # a module of a package: its imports may start at the package's own name
        folders.append(found.file.parents[found.name.count(".")])
    for folder in folders:
        for end in range(len(parts), 0, -1):
            base = folder.joinpath(*parts[:end])
            files = [each for each in (base.with_suffix(".py"), base / "__init__.py") if each.is_file()]
            if files:
                return files
    return []


def _imports(module: str) -> Iterator[str]:
    """Every module that a project's module names in an import, wherever in the file; its packages' own too."""
    parts = module.split(".")
    yield from (".".join(parts[:end]) for end in range(2, len(parts)))
    yield from _named(_tree(_source(module)), _exists)


def _named(tree: ast.Module, exists: Callable[[str], bool]) -> Iterator[str]:
    """The modules that a file's imports name. exists: whether a name of this package is a module of its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield from (f"{node.module or alias.name}" for alias in node.names)
            elif node.module:
                yield node.module
                for alias in node.names:  # `from twinloop.models import config` names a module, `import f` does not
                    if node.module.partition(".")[0] != PACKAGE or exists(f"{node.module}.{alias.name}"):
                        yield f"{node.module}.{alias.name}"


def _source(module: str) -> Path:
    base = ROOT.joinpath(*module.split(".")[1:])
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    raise ModuleNotFoundError(f"{module} is not a module of this project", name=module)


def _exists(module: str) -> bool:
    try:
        _source(module)
    except ModuleNotFoundError:
        return False
    return True


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes(), filename=str(path))


def _version(library: str) -> str:
    for distribution in LIBRARIES[library]:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "absent"
