"""`twinloop compare` of real versions in a real project: by the verifier, and by a person who is interrupted."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_project import environment, make_ready_project, recipe_fields, twinloop

from twinloop.evaluation.cases import Case
from twinloop.evaluation.comparison import Comparison, Contestant, Judging
from twinloop.evaluation.judgements import Judgements
from twinloop.flows.compare import judge_in_terminal, lines, ratings, show
from twinloop.flows.display import make_console

CASES = [
    Case(f"{n}", "held_out", ({"role": "user", "content": f"[may] I {n}?"},), None, None, {}, "") for n in range(6)
]


def said(answer: str) -> dict[str, str]:
    return {case.case_id: f"{answer} {case.case_id}" for case in CASES}


COMPARISON = Comparison(CASES, [Contestant("one", "1", said("[yes]")), Contestant("two", "2", said("no"))])


def test_a_person_judges_in_the_terminal_and_names_are_only_in_the_ratings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console = make_console()
    with Judgements.opened(tmp_path / "kept.jsonl", "ada") as kept:
        judging = Judging(COMPARISON, kept)
        first = judging.question
        assert first is not None
        monkeypatch.setattr("sys.stdin", io.StringIO("what\ns\n1\nu\n1\n2\nT\nq\n"))
        judge_in_terminal(judging, console)
        shown = capsys.readouterr().out
        assert judging.left == 3
        assert "one" not in shown.replace("better one", "").replace("last one", "")
        assert "[may] I" in shown
        assert "[yes]" in shown
        monkeypatch.setattr("sys.stdin", io.StringIO("1\n"))
        judge_in_terminal(judging, console)
        assert judging.left == 2, "the end of the input stops as q does"
        tally = judging.tally()
    show(COMPARISON, tally, console)
    shown = capsys.readouterr().out
    assert "one" in shown
    assert "2 are left to make" in shown


def test_an_answer_does_not_steer_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = said("\x1b[2J\x9b2J\r\tüäß 日本 👍\nno")
    comparison = Comparison(CASES, [Contestant("one", "1", answers), Contestant("two", "2", said("yes"))])
    monkeypatch.setattr("sys.stdin", io.StringIO("q\n"))
    with Judgements.opened(tmp_path / "kept.jsonl", "ada") as kept:
        judge_in_terminal(Judging(comparison, kept), make_console())
    shown = capsys.readouterr().out
    assert r"\x1b[2J\x9b2J\r" in shown
    assert "üäß 日本 👍\nno" in shown
    assert not {"\x1b", "\x9b", "\r"} & set(shown)


def test_the_ratings_say_how_many_judgements_are_needed() -> None:
    def found(good: int, bad: int) -> dict[str, Any]:
        choices = iter(["left"] * good + ["right"] * bad)
        return ratings(COMPARISON, COMPARISON.tally(lambda q: q.choice(side(q, next(choices)))))

    def side(question: Any, for_one: str) -> Any:
        mine = "left" if "[yes]" in question.left else "right"
        return mine if for_one == "left" else {"left": "right", "right": "left"}[mine]

    sure = found(6, 0)
    assert [each["name"] for each in sure["models"]] == ["one", "two"]
    assert sure["models"][0]["rating"] == pytest.approx(-sure["models"][1]["rating"])
    assert sure["models"][0]["interval"][0] < sure["models"][0]["rating"] < sure["models"][0]["interval"][1]
    open_ = found(2, 4)
    assert [each["name"] for each in open_["models"]] == ["two", "one"]
    assert open_["judgements_needed"] > 0
    assert f"about {open_['judgements_needed']} more judgements" in lines(open_)[-1]
    assert lines(open_)[-1].endswith("; add cases")
    none = ratings(COMPARISON, COMPARISON.tally(lambda question: None))
    assert "nothing was judged yet" in lines(none)[-1]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two versions: SFT at two learning rates."""
    project = make_ready_project(tmp_path_factory.mktemp("compared"))
    for rate in (0.001, 0.003):
        fields = recipe_fields(sft={"learning_rate": rate})
        fields["train"] = fields["train"][:2]  # type: ignore[index]
        (project / "recipes" / "small.yaml").write_text(json.dumps(fields))
        run = twinloop(project, "run", "recipes/small.yaml")
        assert "gate: SHIP" in run.stdout, run.stderr
    return project


@pytest.mark.slow
def test_versions_and_directories_are_rated_by_the_verifier(project: Path) -> None:
    (pretrained,) = project.glob("artifacts/pretrain/[0-9a-f]*")
    pretrained = pretrained.relative_to(project)
    done = twinloop(project, "compare", "1", "champion", str(pretrained), "--judge", "verifier", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {each["name"] for each in found["models"]} == {
        "small version 1", "small version 2 (champion)", str(pretrained)
    }  # fmt: skip
    for each in found["models"]:
        counts = [each[name] for name in ("preferred", "ties", "not_preferred", "same_answer")]
        assert sum(counts) == 2 * found["cases"]
    assert found["left"] == 0
    shown = twinloop(project, "compare", "1", "champion", str(pretrained), "--judge", "verifier")
    assert "already done" in shown.stdout, "the answers are not made again"
    assert "rating (95% CI)" in shown.stdout


@pytest.mark.slow
def test_what_a_person_judged_outlives_a_kill(project: Path) -> None:
    kept = project / "state" / "judgements" / "small.jsonl"
    killed = by_hand(project, "compare", "1", "2", "--cases", "20")
    assert killed.stdin is not None
    killed.stdin.write("1\n2\nt\n")
    killed.stdin.flush()
    while not kept.exists() or kept.read_text().count("\n") < 3:
        assert killed.poll() is None
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    first = int(killed.communicate()[0].partition(" left")[0].rpartition("\n")[2])
    again = by_hand(project, "compare", "2", "1", "--cases", "20")
    stdout, stderr = again.communicate("q\n", timeout=500)
    assert again.returncode == 0, stderr
    assert f"\n{first - 3} left\n" in stdout
    assert f"{first - 3} are left to make" in stdout
    assert kept.read_text().count("\n") == 3


def by_hand(project: Path, *arguments: str) -> subprocess.Popen[str]:
    """`twinloop` with somebody who types."""
    return subprocess.Popen(
        [sys.executable, "-m", "twinloop.flows.cli", *arguments],
        cwd=project,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["1"], "name two models or more"),
        (["2", "champion"], "are the same model; name others"),
        (["1", "artifacts/none"], "artifacts/none: no such directory"),
        (["1", "9"], "small: no version 9 in the registry"),
        (["1", "2", "--judge", "jury"], "--judge jury: choose one of person, page, verifier"),
    ],
)
def test_a_mistake_is_one_line(project: Path, arguments: list[str], said: str) -> None:
    done = twinloop(project, "compare", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
