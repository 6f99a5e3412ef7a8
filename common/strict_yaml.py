"""YAML as our settings are written: a key that stands twice is a mistake, and 1e-3 is a number, as everywhere else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from twinloop.common.errors import UserError


def read_yaml(path: Path | str, such_as: str) -> Any:
    """The content of a file. Raises UserError: one line with the file and what is wrong. such_as: "recipes are …"."""
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {such_as}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


class _StrictLoader(yaml.SafeLoader):
    """Of two equal keys YAML takes the last, unseen."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key.value, str):
            raise yaml.constructor.ConstructorError(None, None, "a key is one word", key.start_mark)
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _mapping)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.\d+)?[eE][-+]?\d+$"), list("-+0123456789")
)
