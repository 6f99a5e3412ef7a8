"""The data set of this project, and of a project of a user's own, under a real DVC."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import polars as pl
import pytest
from projects import PROJECT, clone, contents, dvc, git, set_params

from twinloop.common.errors import UserError
from twinloop.common.strict_yaml import parse_yaml
from twinloop.domains.domain import Domain
from twinloop.records.dataset import DataVersion, build_data, check_data, current_version, staleness
from twinloop.records.validation import validate
from twinloop.tasks.recipe import ValidateSettings


def test_a_fresh_clone_rebuilds_the_committed_data_bit_for_bit_and_leaves_git_clean(tmp_path: Path) -> None:
    fresh = clone(tmp_path)
    version = build_data(fresh)
    assert git(fresh, "status", "--porcelain") == ""
    assert version.md5 == parse_yaml((PROJECT / "data.dvc").read_text())["outs"][0]["md5"]


def test_dvc_repro_alone_does_the_same(project: Path) -> None:
    before = contents(project)
    for name in ("data", "raw", ".dvc/cache"):
        shutil.rmtree(project / name)
    dvc(project, "repro", "-q")
    assert contents(project) == before
    assert git(project, "status", "--porcelain") == ""
    assert current_version(project)


def test_data_that_is_current_is_recognised_at_once_and_without_dvc(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twinloop.records.dataset._dvc", lambda *_: pytest.fail("DVC was started"))
    started = time.perf_counter()
    version = build_data(project)
    assert time.perf_counter() - started < 1
    assert version == check_data(project)
    assert version.path == project / "data"


def test_a_changed_setting_makes_a_new_version(project: Path) -> None:
    before = check_data(project)
    set_params(project, seed=2)
    assert staleness(project) == "older than `generate` in params.yaml"
    after = build_data(project)
    assert after.md5 != before.md5
    assert "data.dvc" in git(project, "status", "--porcelain")


def test_changed_code_of_the_generator_is_noticed_and_equal_data_stay_the_same_version(project: Path) -> None:
    before = check_data(project)
    with (project / "words.py").open("a") as file:
        file.write("# a remark\n")
    assert staleness(project) == "older than words.py"
    assert build_data(project).md5 == before.md5
    assert current_version(project)


def flip_a_byte(path: Path) -> None:
    """As a failing disk does it: the times of the file stay what they were."""
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: flip_a_byte(p / "data/corpus.jsonl"), "changed since it was made"),
        (lambda p: (p / "data/corpus_heldout.jsonl").unlink(), "changed since it was made"),
        (lambda p: (p / "data/more.jsonl").write_text("{}\n"), "changed since it was made"),
        (lambda p: shutil.rmtree(p / "data"), "missing"),
        (lambda p: (p / "counts.json").unlink(), "without its counts.json"),
        (lambda p: (p / "dvc.lock").unlink(), "without dvc.lock"),
    ],
    ids=["flipped byte", "file gone", "file too many", "folder gone", "summary gone", "lock gone"],
)
def test_a_change_is_noticed_and_repaired(project: Path, change, message: str) -> None:
    before = contents(project)
    change(project)
    assert staleness(project) == message
    with pytest.raises(UserError, match=f"{message}; `twinloop data build`"):
        check_data(project)
    build_data(project)
    assert contents(project) == before
    assert git(project, "status", "--porcelain") == ""


def test_what_only_lay_in_generated_data_is_moved_away_and_not_lost(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = contents(project)
    for name in ("corpus.jsonl", "more/notes.txt"):
        (project / "data" / name).parent.mkdir(exist_ok=True)
        (project / "data" / name).write_text("a week of somebody's work\n")
    build_data(project)
    assert contents(project) == before
    [kept] = (project / "data.aside").iterdir()
    for name in ("corpus.jsonl", "more/notes.txt"):
        assert (kept / name).read_text() == "a week of somebody's work\n"
    [warning] = caplog.messages
    assert "corpus.jsonl, more/notes.txt" in warning
    assert str(kept.relative_to(project)) in warning
    assert "dvc add data" in warning
    assert git(project, "status", "--porcelain") == ""


def test_generated_data_of_another_version_is_replaced_without_a_word(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = contents(project)
    set_params(project, seed=2)
    build_data(project)
    git(project, "checkout", "-q", "--", ".")  # data/ is still the other version's; DVC's cache has it
    build_data(project)
    assert contents(project) == before
    assert not (project / "data.aside").exists()
    assert caplog.messages == []


def to_parquet(project: Path) -> None:
    for path in (project / "data").glob("*.jsonl"):
        pl.read_ndjson(path, infer_schema_length=None).write_parquet(path.with_suffix(".parquet"))
        path.unlink()


def as_the_users_own(project: Path, *, fresh: bool) -> DataVersion:
    """Make what lies in data/ the version; `fresh`: with a data.dvc that never was an import."""
    if fresh:
        (project / "data.dvc").unlink()
    dvc(project, "add", "-q", "data")
    return build_data(project)


@pytest.mark.parametrize("fresh", [False, True], ids=["over the import", "instead of it"])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_users_own_data_is_the_version_and_is_never_built_over(project: Path, form: str, fresh: bool) -> None:
    generated = check_data(project)
    (project / "data" / "corpus.jsonl").write_text('{"text": "our own words."}\n')
    if form == "parquet":
        to_parquet(project)
    mine = contents(project)
    version = as_the_users_own(project, fresh=fresh)
    assert version.md5 != generated.md5
    report = validate(version.path, project / "validated", ValidateSettings(), Domain(), {"corpus"})
    assert report.files["corpus"].kept == 1

    set_params(project, seed=2)  # the generator's, which makes this data no longer
    assert build_data(project) == check_data(project) == version

    flip_a_byte(project / "data" / f"corpus.{form}")
    changed = contents(project)
    for refuse in (build_data, check_data):
        with pytest.raises(
            UserError, match=r"data: changed.*`dvc add data`.*`rm -r data && dvc checkout data`"
        ) as raised:
            refuse(project)
        assert "\n" not in str(raised.value)
    assert contents(project) == changed
    shutil.rmtree(project / "data")
    dvc(project, "checkout", "-q", "data")
    assert contents(project) == mine
    assert build_data(project) == version

    shutil.rmtree(project / "data")
    with pytest.raises(UserError, match=r"data: missing.*`dvc pull data`"):
        build_data(project)


def test_without_data_dvc_nothing_is_built_over_what_lies_there(project: Path) -> None:
    (project / "data.dvc").unlink()
    before = contents(project)
    with pytest.raises(UserError, match=r"data\.dvc: no such file.*`dvc add data`.*`git checkout data\.dvc`"):
        build_data(project)
    assert contents(project) == before


def test_a_spoilt_cache_is_not_believed(project: Path) -> None:
    """DVC alone would restore the spoilt files, and call them up to date."""
    before = contents(project)
    for path in (project / ".dvc/cache/files/md5").rglob("*"):
        if path.is_file() and path.suffix != ".dir":
            flip_a_byte(path)
    for name in ("data", "raw"):
        shutil.rmtree(project / name)
    build_data(project)
    assert contents(project) == before
