"""`twinloop init`: a project of one's own that runs as it is, from the templates beside this module.

A template's folder holds the domain file, recipe, gate rules and data settings; `common` what all projects have. What
is also in Twinloop's own repository is a link to it there, so that there is one of it. DVC's files have other names
here: DVC would read them as this repository's.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from string import Template

from twinloop.common.errors import UserError

TEMPLATES = Path(__file__).with_name("templates")
DEPS = """\
    # Every file of yours whose change may change the data: where the domain imports modules beside it, add each, such
    # as `- rules.py`. When a file that is not here changes, the data is not generated again.
    deps:
"""

NATURAL_SPLIT_KEYS = ("text", "order_id")
"""Where a template's recipe sets them: what data of one's own can keep disjoint too. That held-out cases cite policies
which no training row does, as in generated data, no shop's records can."""


@dataclass(frozen=True)
class _Kind:
    """what: the example task, in a sentence. file: where it is defined; None: it is ready-made."""

    what: str
    file: str | None = None


KINDS = {
    "classification": _Kind("It sorts e-mails by the department that answers them.", "tickets.py"),
    "chat": _Kind("It answers questions of a museum's visitors.", "assistant.py"),
    "reasoning": _Kind("It works out small word problems, step by step.", "sums.py"),
    "returns": _Kind("It decides whether an order may be sent back under the policy that applies."),
}


def init_project(folder: Path, domain: str) -> str:
    """Write a project into `folder`, which must be new or empty; returns its name, which is the model's too.

    Raises UserError for a folder that holds something, cannot be made or gives no name, and for an unknown domain.
    """
    if domain not in KINDS:
        raise UserError(f"--domain {domain}: there is no such template; choose one of {', '.join(KINDS)}")
    folder = folder.resolve()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder}: not an empty folder; name a new one, so that nothing is overwritten")
    plain = re.sub(r"[\u0300-\u036f]", "", unicodedata.normalize("NFKD", folder.name.lower()))  # ü: u
    name = re.sub(r"[^a-z0-9_-]+", "-", plain).strip("-_")
    if not name:
        raise UserError(f"{folder}: its name gives no name for the model; take one with letters or digits")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); name another folder") from None
    for path, text in _files(name, domain).items():
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
    _make_git_repository(folder)
    return name


def _files(name: str, domain: str) -> dict[str, str]:
    """Content by path in the project."""
    kind, own, common = KINDS[domain], TEMPLATES / domain, TEMPLATES / "common"
    recipe, rules = f"recipes/{name}.yaml", f"recipes/{name}-gate.yaml"
    sources = {
        recipe: own / "recipe.yaml",
        rules: own / "gate.yaml",
        "params.yaml": own / "params.yaml",
        "prefect.yaml": common / "prefect.yaml",
        ".gitignore": common / "gitignore",
        ".dvcignore": common / "dvcignore",
        ".dvc/config": common / "dvc_config",
        ".dvc/.gitignore": common / "dvc_gitignore",
    }
    if kind.file:
        sources[kind.file] = own / kind.file
    files = {path: source.read_text(encoding="utf-8") for path, source in sources.items()}
    named = (
        *((recipe, "name", name), (recipe, "gate", f"{{rules: {rules}}}")),
        (recipe, "validate", f"{{split_keys: [{', '.join(NATURAL_SPLIT_KEYS)}]}}"),
        *(("prefect.yaml", "name", name), ("params.yaml", "recipe", recipe)),
    )
    for path, key, value in named:
        files[path] = re.sub(rf"(?m)^{key}: .*$", f"{key}: {value}", files[path], count=1)
    values = {
        "name": name,
        "what": kind.what,
        "domain": f"./{kind.file}" if kind.file else domain,
        "source": f"`{kind.file}` (the task)" if kind.file else "`params.yaml` (the example data)",
        "deps": f"{DEPS}      - {kind.file}\n" if kind.file else "",
    }
    for path, template in (("README.md", "README.md"), ("dvc.yaml", "dvc_yaml")):
        files[path] = Template((common / template).read_text(encoding="utf-8")).substitute(values)
    return files


def _make_git_repository(folder: Path) -> None:
    """Where there is none above and git is installed: data and code of a version belong together."""
    git = shutil.which("git")
    if git and subprocess.run([git, "rev-parse"], cwd=folder, capture_output=True, check=False).returncode:
        subprocess.run([git, "init", "-q"], cwd=folder, capture_output=True, check=False)
