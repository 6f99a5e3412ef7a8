"""Finds the domain that a recipe names, and says which code it is made of.

`returns` is a ready-made one, `my_package.tickets` an importable module, `./tickets.py` a file, from the project's
folder. The module defines `domain`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import twinloop.domains
from twinloop.common.errors import UserError, one_line
from twinloop.domains.domain import Domain

NOT_READY_MADE = frozenset({"domain", "generate", "loader", "owners", "record_types"})
FILE_MODULES = "twinloop_domain_"
"""Modules of files go by this prefix and their stem in `sys.modules`."""


@dataclass(frozen=True)
class LoadedDomain:
    """A domain and where it is defined: what fingerprints are made from."""

    name: str
    """As the recipe names it: what loads it again."""
    domain: Domain
    module: str
    """Importable name, of ready-made domains and modules; for a file, the name that it is loaded under."""
    file: Path
    """The module's source."""


def ready_made() -> list[str]:
    """The names of the domains that come with Twinloop."""
    return sorted({module.name for module in pkgutil.iter_modules(twinloop.domains.__path__)} - NOT_READY_MADE)


def load_domain(name: str, project: Path) -> LoadedDomain:
    """The domain of this name. A module is also looked for in the project's folder.

    Raises UserError where there is none, where its code fails, or where it defines no `domain`.
    """
    if name.endswith(".py"):
        return _of_file(name, (project / name).resolve())
    if name in ready_made():
        return _of(name, importlib.import_module(f"twinloop.domains.{name}"))
    if str(project) not in sys.path:
        sys.path.append(str(project))
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None:
        near = difflib.get_close_matches(name, ready_made(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"ready-made: {', '.join(ready_made())}"
        raise UserError(
            f"domain: {name!r} is no ready-made domain and no importable module; {hint} A file is named with its "
            "ending, such as ./tickets.py"
        )
    return _of(name, _imported(name))


@cache
def _of_file(name: str, path: Path) -> LoadedDomain:
    if not path.is_file():
        raise UserError(f"domain: {path}: no such file; name it from the project's folder, such as ./tickets.py")
    module_name = FILE_MODULES + path.stem
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
        raise UserError(f"domain: {name}: {type(error).__name__}: {one_line(error)}") from error
    return _of(name, module)


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever its code raises
        raise UserError(f"domain: {name}: {type(error).__name__}: {one_line(error)}") from error


def _of(name: str, module: ModuleType) -> LoadedDomain:
    domain = getattr(module, "domain", None)
    if not isinstance(domain, Domain):
        raise UserError(f"domain: {name} defines no `domain`; end the module with `domain = MyDomain()`")
    assert module.__file__ is not None
    return LoadedDomain(name, domain, module.__name__, Path(module.__file__))
