"""What code made an artifact: a digest over a module and everything of this project that it imports.

Read from the syntax tree, so that nothing is imported, and a comment or a line break changes nothing. Libraries count
by their version where it can change a result.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

from twinloop.common.modules import FoundModule

PACKAGE = "twinloop"
ROOT = Path(__file__).resolve().parent.parent
"""The folder of the package `twinloop`."""
# Their release decides what comes out of a stage. One import name may come from one of several distributions.
LIBRARIES = {
    "gguf": ("gguf",),
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
        "twinloop.tasks.base_settings",
        "twinloop.tasks.base_source",
        "twinloop.tasks.context",
        "twinloop.tasks.recipe",
        "twinloop.training.method",
        "twinloop.training.runtime",
        "twinloop.training.settings",
    }
)

FOUND_BY_NAME = frozenset({"twinloop.models.families"})
"""Packages whose modules are imported by a name that a file states: all of them count."""


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
        if module in FOUND_BY_NAME:
            files = _source(module).parent.glob("*.py")
            pending += [f"{module}.{file.stem}" for file in files if file.stem != "__init__"]
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


@cache
def module_fingerprint(found: FoundModule) -> str:
    """sha256 over a module that a recipe names and everything that it imports: of Twinloop, of the user's own files,
    the packages around them included, and the versions of libraries.

    Read once a process, as the module itself is: a file that is changed while its code runs counts from the next one.
    """
    if found.name.partition(".")[0] == PACKAGE:
        return fingerprint(found.name)
    own = found.name.partition(".")[0]
    files = _files_of(found.name, own) | {found.name: found.file}
    ours: set[str] = set()
    libraries: set[str] = set()
    pending = [*files]
    trees: dict[str, ast.Module] = {}
    while pending:
        module = pending.pop()
        if module in trees:
            continue
        trees[module] = _tree(files[module])
        is_package = files[module].name == "__init__.py"
        for imported in _named(trees[module], module if is_package else module.rpartition(".")[0]):
            top = imported.partition(".")[0]
            if top == PACKAGE:
                ours.add(imported)
            elif more := _files_of(imported, own):
                files |= more
                pending += more
            elif top not in sys.stdlib_module_names:
                libraries.add(top)
    digest = hashlib.sha256()
    for module, tree in sorted(trees.items()):
        digest.update(f"{module}\n{ast.dump(tree)}\n".encode())
    for library in sorted(libraries):
        digest.update(f"{library} {_version(library)}\n".encode())
    digest.update(fingerprint(*sorted(ours - {PACKAGE})).encode())
    return digest.hexdigest()


def _files_of(module: str, own: str) -> dict[str, Path]:
    """The files of a user's module and of the packages that it is in, by name, as Python finds them.

    Nothing for a library. own: the package whose files count wherever they are, since it may be installed.
    """
    top, *below = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return {}
    if spec is None:
        return {}
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    origin = Path(spec.origin) if spec.has_location and spec.origin else None
    place = origin or (folders[0] if folders else None)
    if place is None or (top != own and _is_library(place)):
        return {}
    files = {top: origin} if origin and origin.suffix == ".py" else {}
    for end, part in enumerate(below, 2):
        tried = [path for folder in folders for path in (folder / part / "__init__.py", folder / f"{part}.py")]
        if path := next((path for path in tried if path.is_file()), None):
            files[".".join([top, *below][:end])] = path
        folders = [folder / part for folder in folders]
    return files


def _is_library(place: Path) -> bool:
    """Whether a file came with Python or was installed."""
    standard = any(place.is_relative_to(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))
    return standard or bool({"site-packages", "dist-packages"} & set(place.parts))


def _imports(module: str) -> Iterator[str]:
    """Every module that a project's module names in an import, wherever in the file; its packages' own too."""
    parts = module.split(".")
    yield from (".".join(parts[:end]) for end in range(2, len(parts)))
    yield from _named(_tree(_source(module)), module.rpartition(".")[0])


def _named(tree: ast.Module, package: str) -> Iterator[str]:
    """The modules that a file's imports name. package: the one that the file is in.

    `from twinloop.models import config` names a module, `import f` does not: of this project, what exists is named; of
    others both.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            for alias in node.names:
                if base.partition(".")[0] != PACKAGE or _exists(f"{base}.{alias.name}"):
                    yield f"{base}.{alias.name}"


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
    names = LIBRARIES.get(library) or packages_distributions().get(library, [])
    for distribution in names:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "absent"
