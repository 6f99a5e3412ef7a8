"""Modules that a recipe names: found, or reported in one line; and every file that they are made of is in their key."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from twinloop.common.errors import UserError
from twinloop.domains.loader import load_domain, ready_made

DOMAIN = "from twinloop.domains.domain import Domain\nclass Own(Domain): pass\ndomain = Own()\n"

FINGERPRINT = """
import sys
from pathlib import Path
from twinloop.domains.loader import load_domain
from twinloop.registry.fingerprint import module_fingerprint
print(module_fingerprint(load_domain(sys.argv[1], Path.cwd()).found))
"""


def write(folder: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source)


def fingerprint_of(name: str, project: Path) -> str:
    """In a process of its own, as each run has one."""
    command = [sys.executable, "-B", "-c", FINGERPRINT, name]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "imports", "part"),
    [
        ("./tickets.py", "import rules", "rules.py"),
        ("./tickets.py", "import twinloop\nfrom judging import rules", "judging/rules.py"),
        ("./tickets.py", "import judging.rules", "judging/__init__.py"),
        ("acme.tasks.tickets", "from ..judging import rules", "acme/judging/rules.py"),
        ("acme.tasks.tickets", "from ..rules import LIMIT", "acme/rules.py"),
        ("acme.tasks.tickets", "from . import rules", "acme/tasks/rules.py"),
        ("acme.tasks.tickets", "", "acme/__init__.py"),
        ("acme", "from acme.rules import LIMIT", "acme/rules.py"),
    ],
)
def test_a_file_that_the_domain_imports_is_part_of_its_fingerprint(
    name: str, imports: str, part: str, tmp_path: Path
) -> None:
    module = name.removeprefix("./").removesuffix(".py").replace(".", "/")
    file = f"{module}.py" if module != "acme" else "acme/__init__.py"
    packages = [f"{parent}/__init__.py" for parent in ("acme", "acme/tasks", "acme/judging", "judging")]
    write(tmp_path, dict.fromkeys(packages, "") | {"unrelated.py": "", "judging/rules.py": ""} | {part: "LIMIT = 1\n"})
    write(tmp_path, {file: f"{imports}\n{DOMAIN}"})
    first = fingerprint_of(name, tmp_path)
    write(tmp_path, {"unrelated.py": "LIMIT = 2\n"})
    assert fingerprint_of(name, tmp_path) == first
    write(tmp_path, {part: "LIMIT = 3\n"})
    assert fingerprint_of(name, tmp_path) != first


def test_an_installed_domain_is_its_own_package_and_not_all_that_is_installed_beside_it(tmp_path: Path) -> None:
    site = tmp_path / "site-packages"
    write(site, {"acme/__init__.py": "", "acme/tickets.py": f"import beside\nfrom acme import rules\n{DOMAIN}"})
    write(site, {"acme/rules.py": "", "beside.py": ""})
    first = fingerprint_of("acme.tickets", site)
    write(site, {"beside.py": "LIMIT = 2\n"})
    assert fingerprint_of("acme.tickets", site) == first
    write(site, {"acme/rules.py": "LIMIT = 2\n"})
    assert fingerprint_of("acme.tickets", site) != first


def test_the_ready_made_domains_are_domains_and_nothing_that_they_are_made_with() -> None:
    assert ready_made() == ["chat", "classification", "reasoning", "returns"]


@pytest.mark.parametrize(
    ("name", "files", "said"),
    [
        ("failing.tickets", {"failing/__init__.py": "1 / 0"}, "failing.tickets: ZeroDivisionError: division by zero"),
        (
            "lacking.tickets",
            {"lacking/__init__.py": "import no_such"},
            "ModuleNotFoundError: No module named 'no_such'",
        ),
        ("only_a_folder", {"only_a_folder/notes.txt": ""}, "no importable module"),
        ("sys", {}, "no importable module"),
        ("missing.tickets", {}, "no importable module"),
        (
            "./few.py",
            {"few.py": "from twinloop.domains.classification import Classification as C\nC([])"},
            "few.py: cl",
        ),
    ],
)
def test_a_module_that_cannot_be_loaded_is_reported_in_one_line(
    name: str, files: dict[str, str], said: str, tmp_path: Path
) -> None:
    write(tmp_path, files)
    with pytest.raises(UserError, match=said) as raised:
        load_domain(name, tmp_path)
    assert str(raised.value).startswith("domain: ")
    assert "\n" not in str(raised.value)


def test_files_of_the_same_name_are_modules_of_their_own_wherever_the_project_lies(tmp_path: Path) -> None:
    for place in ("here", "moved"):
        write(tmp_path / place, {"a/tickets.py": f"KIND = 'a'\n{DOMAIN}", "b/tickets.py": f"KIND = 'b'\n{DOMAIN}"})
    found = [load_domain(f"./{folder}/tickets.py", tmp_path / "here").found for folder in "ab"]
    assert [sys.modules[each.name].KIND for each in found] == ["a", "b"]
    here, moved = (fingerprint_of("./a/tickets.py", tmp_path / place) for place in ("here", "moved"))
    assert here == moved
