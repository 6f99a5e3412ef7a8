"""Documents of one's own: `run` puts what it trained with into the index, and keeps what an administrator put."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_project import make_ready_project, recipe_fields, start, twinloop

from twinloop.flows.answer import answer_over_http


def listed(project: Path) -> dict[str, tuple[int, str]]:
    """Version and text of each document, as the command lists them."""
    output = twinloop(project, "documents", "list", "--model", "small").stdout
    rows = re.findall(r"^(\S+) +v(\d+) +(.+)$", output, re.MULTILINE)
    return {name: (int(version), text) for name, version, text in rows}


def change_data(project: Path, texts: dict[str, str]) -> None:
    """Give documents of data/ new texts, and make what lies there the version, as an owner of data does."""
    file = project / "data" / "documents.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row["text"] = texts.get(row["document_id"], row["text"])
    file.chmod(0o644)
    file.unlink()  # DVC's cache may be linked to it
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "data"], cwd=project, check=True)


def run(project: Path) -> str:
    done = twinloop(project, "run", "recipes/small.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"^documents .*\n(?: .*\n)*", done.stdout, re.MULTILINE)  # its last cell may take several lines
    assert found
    return " ".join(found[0].split())


def warnings(project: Path) -> list[str]:
    found = json.loads(twinloop(project, "status", "--model", "small", "--json").stdout)["warnings"]
    return [warning for warning in found if warning.startswith("the documents are not those")]


@pytest.mark.slow
def test_documents_that_were_trained_with_are_answered_from_and_those_of_an_administrator_are_kept(
    tmp_path: Path,
) -> None:
    project = make_ready_project(tmp_path)
    fields = recipe_fields()
    fields["train"] = fields["train"][:1]  # each change of the documents trains everything anew
    (project / "recipes" / "small.yaml").write_text(json.dumps(fields))
    assert "6 new: P-" in run(project)
    answer = answer_over_http(project, "small").body
    one = answer["passages"][0]["document_id"]
    two = next(name for name in listed(project) if name != one)
    text = re.sub(r"within \d+ days", "within 77 days", listed(project)[one][1])

    change_data(project, {one: text})
    assert f"1 new: {one}" in run(project)
    assert listed(project)[one] == (2, text)
    passages = {each["document_id"]: each for each in answer_over_http(project, "small").body["passages"]}
    assert (passages[one]["version"], passages[one]["text"]) == (2, text)
    assert warnings(project) == []

    administrators = text.replace("77", "66")
    twinloop(project, "documents", "put", one, administrators, "--model", "small")
    assert len(warnings(project)) == 1
    server = start(project, "serve", "--model", "small", "--port", "0")
    try:
        assert "with other documents than it was trained with" in server.stdout.readline()
    finally:
        server.terminate()
        server.communicate(timeout=30)

    other = re.sub(r"within \d+ days", "within 78 days", listed(project)[two][1])
    change_data(project, {one: text.replace("77", "55"), two: other})
    row = run(project)
    assert f"1 new: {two}" in row
    assert f"{one} kept as an administrator put it" in row
    assert (listed(project)[one], listed(project)[two][1]) == ((3, administrators), other)
    assert len(warnings(project)) == 1
