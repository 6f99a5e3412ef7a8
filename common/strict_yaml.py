"""YAML 1.2, as DVC reads it: a key that appears twice is a mistake, and 1e-3 is a number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from twinloop.common.errors import UserError


class NotYAMLError(ValueError):
    """Why a text is not one YAML document, in one line."""


def parse_yaml(text: str) -> Any:
    """The content of one document. Raises NotYAMLError."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:  # in full it quotes the file, over several lines
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise NotYAMLError(f"{line}{error.problem}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise NotYAMLError(" ".join(str(error).split())) from None


def read_yaml(path: Path | str, such_as: str) -> Any:
    """The content of a file. Raises UserError: one line with the file and what is wrong. such_as: "recipes are …"."""
    try:
        return parse_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {such_as}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {such_as}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except NotYAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
