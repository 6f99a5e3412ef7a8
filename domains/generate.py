"""Writes the data files of a domain that generates its data: the command of the stage `generate` in dvc.yaml.

    python -m twinloop.domains.generate returns --params params.yaml --out raw

The domain is named as in a recipe: a ready-made one, an importable module, or a file such as ./tickets.py.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from twinloop.common.errors import UserError
from twinloop.common.strict_yaml import read_yaml
from twinloop.domains.domain import Domain
from twinloop.domains.loader import load_domain

MODULE = "twinloop.domains.generate"
SECTION = "generate"


class Arguments(NamedTuple):
    domain: str
    params: Path
    out: Path


def arguments_of(command: str) -> Arguments | None:
    """The arguments of a stage's command, or None where it does not run this module."""
    try:
        words = shlex.split(command)
        given, _ = _parser().parse_known_args(words[words.index(MODULE) + 1 :])
    except (ValueError, SystemExit):
        return None
    return Arguments(**vars(given))


def read_params(domain: Domain, path: Path) -> Any:
    """The section `generate` of params.yaml as the domain's `params`; the section itself where it has none.

    Raises UserError: one line with the file, the key, and what is allowed there.
    """
    content = read_yaml(path, "it holds the settings of the data set")
    section = content.get(SECTION) if isinstance(content, dict) else None
    if domain.params is None:
        return section
    if not isinstance(section, dict):
        raise UserError(f"{path}: not a mapping with a section `{SECTION}`; it holds the settings of the data set")
    try:
        return domain.params.model_validate(section)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join([SECTION, *map(str, problem["loc"])])
        raise UserError(f"{path}: {key}: {problem['msg'][0].lower()}{problem['msg'][1:]}") from None


def check(arguments: Arguments, project: Path) -> tuple[Domain, Any]:
    """The domain, which generates data, and its settings. Raises UserError where one of the two is wrong."""
    domain = load_domain(arguments.domain, project).domain
    if not domain.has("generate"):
        raise UserError(
            f"domain: {arguments.domain} has no `generate`; define it, or take the stage out of dvc.yaml, put the "
            "files into data/ and run `dvc add data`"
        )
    return domain, read_params(domain, project / arguments.params)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain", help="as in a recipe, such as returns or ./tickets.py")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--out", type=Path, default=Path("raw"))
    return parser


def main() -> None:
    arguments, project = Arguments(**vars(_parser().parse_args())), Path.cwd()
    try:
        domain, params = check(arguments, project)
        out = project / arguments.out
        out.mkdir(parents=True, exist_ok=True)
        counts = domain.generate(params, out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for name, count in counts.items():
        print(f"{name}.jsonl: {count} records")


if __name__ == "__main__":
    main()
