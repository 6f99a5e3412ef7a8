"""Finds a module that a recipe names: one that comes with Twinloop, an importable one, or a file.

Domains and training methods are such modules: `returns` or `sft` comes with Twinloop, `my_package.tickets` is
importable, `./tickets.py` is a file, from the project's folder.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from twinloop.common.errors import UserError, one_line


@dataclass(frozen=True)
class FoundModule:
    """A module, and where it is defined: what fingerprints are made from."""

    module: ModuleType
    file: Path
    """The module's source."""

    @property
    def name(self) -> str:
        """Importable name, of ready-made and other modules; for a file, the name that it is loaded under."""
        return self.module.__name__

    @property
    def short_name(self) -> str:
        """The last part of the name; of a file, its name without the ending."""
        return self.file.parent.name if self.file.name == "__init__.py" else self.file.stem


def modules_in(package: ModuleType) -> list[str]:
    """The names of the modules of a package."""
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def find_module(
    name: str, project: Path, *, kind: str, package: ModuleType, ready_made: Collection[str]
) -> FoundModule:
    """The module of this name. kind: what it is, for messages; package: what the `ready_made` ones are modules of.

    A module is also looked for in the project's folder. Raises UserError where there is none, or where its code fails.
    """
    if name.endswith(".py"):
        path = (project / name).resolve()
        return _of_file(name, path, kind, _module_name(path, project.resolve(), kind))
    if name in ready_made:
        return _found(importlib.import_module(f"{package.__name__}.{name}"))
    if str(project) not in sys.path:
        sys.path.append(str(project))
    try:
        spec = importlib.util.find_spec(name)  # imports the packages that the module is in
    except (ModuleNotFoundError, ValueError) as error:
        if isinstance(error, ModuleNotFoundError) and not _is_in(error.name, name):
            raise _failed(name, kind, error) from error  # there is one, and it imports what there is not
        spec = None
    except Exception as error:
        raise _failed(name, kind, error) from error
    if spec is None or not spec.has_location:
        near = difflib.get_close_matches(name, ready_made, n=1)
        hint = f"did you mean {near[0]}?" if near else f"ready-made: {', '.join(sorted(ready_made))}."
        raise UserError(
            f"{kind}: {name!r} is no ready-made {kind} and no importable module; {hint} A file is named with its "
            f"ending, such as ./my_{kind}.py"
        )
    try:
        return _found(importlib.import_module(name))
    except Exception as error:  # whatever its code raises
        raise _failed(name, kind, error) from error


def _module_name(path: Path, project: Path, kind: str) -> str:
    """Another one for each file, also for files of the same name in different folders. Since fingerprints contain it,
    it is made from the file's place in the project, wherever the project lies."""
    place = os.path.relpath(path, project)
    return f"twinloop_{kind}_{path.stem}_{hashlib.sha256(place.encode()).hexdigest()[:8]}"


@cache
def _of_file(name: str, path: Path, kind: str, module_name: str) -> FoundModule:
    if not path.is_file():
        raise UserError(f"{kind}: {path}: no such file; name it from the project's folder, such as ./my_{kind}.py")
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None, "a .py file always has a loader"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pydantic look their module up
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # what lies beside it can be imported
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _failed(name, kind, error) from error
    return _found(module)


def _is_in(missing: str | None, name: str) -> bool:
    """Whether the module that was not found is the one of this name, or a package that it would be in."""
    return missing is None or f"{name}.".startswith(f"{missing}.")


def _failed(name: str, kind: str, error: Exception) -> UserError:
    """What the module's own code raised, in one line."""
    said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
    return UserError(f"{kind}: {name}: {said}")


def _found(module: ModuleType) -> FoundModule:
    assert module.__file__ is not None
    return FoundModule(module, Path(module.__file__))
