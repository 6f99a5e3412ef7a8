"""What counts as the project's version of its data is what DVC counts: asked of both, over projects of many forms."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from projects import commit, contents, dvc, git, set_params, tickets

from twinloop.common.errors import UserError
from twinloop.common.strict_yaml import parse_yaml
from twinloop.records.dataset import build_data, check_data, current_version, staleness
from twinloop.records.dvc_project import open_project


def dvc_is_content(project: Path) -> bool:
    """Whether `dvc status` has nothing to say."""
    command = [sys.executable, "-m", "dvc", "status", "--json"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1]) == {}


def with_stages(project: Path, **changes: dict[str, object] | None) -> None:
    """Add to the stages of dvc.yaml, or replace them."""
    path = project / "dvc.yaml"
    content = parse_yaml(path.read_text())
    content["stages"] |= changes
    path.write_text(json.dumps(content))


def param_by_dotted_key(project: Path) -> None:
    generate = parse_yaml((project / "dvc.yaml").read_text())["stages"]["generate"]
    with_stages(project, generate=generate | {"params": ["generate.documents"]})


def params_of_a_file(project: Path) -> None:
    (project / "more.yaml").write_text("words: {least: 1}\nother: 2\n")
    with_stages(project, note={"cmd": "true", "params": [{"more.yaml": ["words.least"]}], "deps": ["count.py"]})


def all_params_of_a_file(project: Path) -> None:
    (project / "more.json").write_text('{"words": {"least": 1}, "other": 2}')
    with_stages(project, note={"cmd": "true", "params": [{"more.json": None}]})


def stage_without_outputs(project: Path) -> None:
    with_stages(project, look={"cmd": "true", "deps": ["data"]})


def foreach(project: Path) -> None:
    part = {"cmd": "echo ${item} > ${item}.txt", "deps": ["count.py"], "outs": ["${item}.txt"]}
    with_stages(project, parts={"foreach": ["a", "b"], "do": part})


def matrix(project: Path) -> None:
    part = {"cmd": "echo ${item.x} > ${item.x}.txt", "deps": ["count.py"], "outs": ["${item.x}.txt"]}
    with_stages(project, parts={"matrix": {"x": ["a", "b"]}} | part)


def templated_command_list(project: Path) -> None:
    part = {"cmd": ["true", "echo ${generate.documents} > n.txt"], "outs": [{"n.txt": {"persist": True}}]}
    with_stages(project, parts=part)


def stage_in_a_folder(project: Path) -> None:
    (project / "sub").mkdir()
    (project / "sub" / "in.txt").write_text("1")
    with_stages(project, sub={"cmd": "cp in.txt out.txt", "wdir": "sub", "deps": ["in.txt"], "outs": ["out.txt"]})


FORMS = [
    param_by_dotted_key,
    params_of_a_file,
    all_params_of_a_file,
    stage_without_outputs,
    foreach,
    matrix,
    templated_command_list,
    stage_in_a_folder,
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_generated_data_is_current_exactly_while_dvc_status_is_clean(
    form: Callable[[Path], None], project: Path
) -> None:
    form(project)
    assert not current_version(project)
    build_data(project)
    assert dvc_is_content(project)
    assert staleness(project) is None
    with (project / "count.py").open("a") as file:
        file.write("# a remark\n")
    assert not dvc_is_content(project)
    assert staleness(project) == "older than count.py"


def test_a_parameter_counts_by_its_dotted_key_alone(project: Path) -> None:
    param_by_dotted_key(project)
    build_data(project)
    set_params(project, seed=2)  # which the stage does not name
    assert dvc_is_content(project)
    assert current_version(project)
    set_params(project, documents=31)
    assert not dvc_is_content(project)
    assert staleness(project) == "older than `generate.documents` in params.yaml"


@pytest.mark.parametrize(
    ("form", "file", "problem"),
    [
        (params_of_a_file, "more.yaml", "older than `words.least` in more.yaml"),
        (all_params_of_a_file, "more.json", "older than `words` in more.json"),
    ],
)
def test_a_parameter_of_another_file_counts(
    form: Callable[[Path], None], file: str, problem: str, project: Path
) -> None:
    form(project)
    build_data(project)
    (project / file).write_text((project / file).read_text().replace("1", "3"))
    assert not dvc_is_content(project)
    assert staleness(project) == problem


def test_a_dependency_taken_out_of_a_stage_makes_nothing_older(project: Path) -> None:
    stages = parse_yaml((project / "dvc.yaml").read_text())["stages"]
    with_stages(project, generate=stages["generate"] | {"deps": ["tickets.py"]})
    assert dvc_is_content(project)
    assert current_version(project)


def test_a_frozen_stage_is_left_as_it_is(project: Path) -> None:
    (project / "in.txt").write_text("1")
    with_stages(project, cold={"cmd": "cp in.txt out.txt", "deps": ["in.txt"], "outs": ["out.txt"]})
    build_data(project)
    dvc(project, "freeze", "cold")
    (project / "in.txt").write_text("2")
    assert dvc_is_content(project)
    assert current_version(project)


def test_data_that_a_stage_makes_itself_needs_no_data_dvc(project: Path) -> None:
    (project / "data.dvc").unlink()
    (project / "dvc.lock").unlink()
    shutil.rmtree(project / "data")
    stages = parse_yaml((project / "dvc.yaml").read_text())["stages"]
    command = "python -m twinloop.domains.generate ./tickets.py --out data"
    with_stages(project, generate=stages["generate"] | {"cmd": command, "outs": ["data"]})
    version = build_data(project)
    assert check_data(project) == version
    assert dvc_is_content(project)
    (project / "data" / "corpus.jsonl").unlink()
    assert build_data(project) == version


# --- data of one's own ------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A project with data of its own, not added yet."""
    project = tickets(tmp_path / "own", "dvc.yaml")
    git(project, "init", "-q")
    dvc(project, "init", "-q")
    (project / "data").mkdir()
    (project / "data" / "corpus.jsonl").write_text('{"text": "our own words."}\n')
    return project


def test_what_dvcignore_names_is_no_part_of_the_version(own: Path) -> None:
    (own / ".dvcignore").write_text(".DS_Store\n__pycache__\n")
    for name in (".DS_Store", "__pycache__/x.pyc"):
        (own / "data" / name).parent.mkdir(exist_ok=True)
        (own / "data" / name).write_text("noise")
    version = build_data(own)
    assert dvc_is_content(own)
    assert check_data(own) == version
    (own / "data" / ".DS_Store").write_text("other noise")
    assert check_data(own) == version
    (own / "data" / "more.jsonl").write_text("{}\n")
    assert not dvc_is_content(own)
    assert staleness(own) == "changed since it was made"


def test_what_dvc_refuses_is_one_line_with_its_reason(own: Path) -> None:
    build_data(own)
    (own / "data" / ".dvcignore").write_text("notes.txt\n")
    for ask in (check_data, build_data):
        with pytest.raises(UserError, match=r"\.dvcignore file should not be in collected dir path"):
            ask(own)


def rewrite(project: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Change the only output in data.dvc."""
    content = parse_yaml((project / "data.dvc").read_text())
    change(content["outs"][0])
    (project / "data.dvc").write_text(json.dumps(content))


def test_a_data_dvc_that_lists_its_files_is_read(own: Path) -> None:
    """As a remote with versions of its own makes it (`dvc push` to one with `version_aware`)."""
    version = build_data(own)
    with open_project(own) as found:
        assert found.data
        files = found.data.get_obj().as_list(with_meta=True)  # type: ignore[union-attr]

    def list_files(out: dict[str, object]) -> None:
        for name in ("md5", "size", "nfiles"):
            del out[name]
        out["files"] = [
            each | {"cloud": {"s3": {"etag": "d41d8cd98f00b204e9800998ecf8427e", "version_id": "v1"}}} for each in files
        ]

    rewrite(own, list_files)
    assert dvc_is_content(own)
    assert check_data(own) == version
    (own / "data" / "corpus.jsonl").write_text("{}\n")
    assert staleness(own) == "changed since it was made"


def test_a_digest_of_an_older_dvc_is_checked_by_its_own_rule(own: Path) -> None:
    """DVC 2 hashed texts with their line ends made plain; its data.dvc names no `hash`."""
    (own / "data" / "corpus.jsonl").write_bytes(b'{"text": "our own words."}\r\n')
    build_data(own)
    assert current_version(own)
    with open_project(own) as found:
        assert found.data
        found.data.hash_name = "md5-dos2unix"
        older = found.data.get_hash().value

    def as_before(out: dict[str, object]) -> None:
        del out["hash"]
        out["md5"] = older

    newer = check_data(own).md5
    rewrite(own, as_before)
    assert check_data(own).md5 == older != newer


def test_a_frozen_import_is_data_of_ones_own(project: Path) -> None:
    shutil.rmtree(project / "data")
    (project / "data.dvc").unlink()
    dvc(project, "import-url", "-q", "raw", "data")  # frozen by default
    (project / "data" / "corpus.jsonl").unlink()
    with pytest.raises(UserError, match="it is your own"):
        build_data(project)


@pytest.mark.parametrize("name", ["dvc.yaml", "dvc.lock", "data.dvc"])
def test_a_file_that_dvc_cannot_read_is_named_with_dvcs_reason(name: str, project: Path) -> None:
    (project / name).write_text("<<<<<<< HEAD\n")
    for refuse in (build_data, check_data):
        with pytest.raises(UserError, match=name.replace(".", r"\.")) as raised:
            refuse(project)
        assert "\n" not in str(raised.value)
    assert name in str(staleness(project))


# --- links into the cache ---------------------------------------------------------------------------------------------


def linked(project: Path, kind: str) -> Path:
    """The project with links into DVC's cache in data/."""
    dvc(project, "config", "cache.type", kind)
    commit(project)
    shutil.rmtree(project / "data")
    dvc(project, "checkout", "-q", "data.dvc", "--relink")
    return project


def edit_through(link: Path) -> None:
    kept = link.resolve()
    kept.chmod(0o644)
    with kept.open("a") as file:
        file.write('{"text": "a week of work"}\n')


@pytest.mark.parametrize("kind", ["symlink", "hardlink"])
def test_an_edit_through_a_link_is_kept_and_its_cached_file_made_anew(
    kind: str, project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = contents(project)
    linked(project, kind)
    assert current_version(project)
    edit_through(project / "data" / "corpus.jsonl")
    edited = (project / "data" / "corpus.jsonl").read_bytes()
    build_data(project)
    assert contents(project) == before
    [kept] = (project / "data.aside").rglob("corpus.jsonl")
    assert not kept.is_symlink()
    assert kept.stat().st_nlink == 1
    assert kept.read_bytes() == edited
    assert any("corpus.jsonl was edited through a link, and so in DVC's cache too" in said for said in caplog.messages)


@pytest.mark.parametrize("kind", ["symlink", "hardlink"])
def test_own_data_edited_through_a_link_is_not_said_to_be_in_the_cache(kind: str, own: Path) -> None:
    build_data(own)
    linked(own, kind)
    edit_through(own / "data" / "corpus.jsonl")
    with pytest.raises(UserError, match=r"corpus\.jsonl was edited through a link into DVC's cache") as raised:
        check_data(own)
    assert "dvc checkout" not in str(raised.value)
    dvc(own, "add", "-q", "data")
    assert check_data(own) == build_data(own)
