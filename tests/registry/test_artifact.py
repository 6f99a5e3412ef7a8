"""The store skips what is there, notices what is corrupt, and survives being killed."""

import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from twinloop.registry import artifact as artifact_module
from twinloop.registry.artifact import ABANDONED_AFTER_S, MANIFEST, Artifact, ArtifactStore, integrity_error
from twinloop.registry.fingerprint import fingerprint


class Counter:
    """A stage that writes two files and counts how often it really ran."""

    def __init__(self) -> None:
        self.built = 0

    def __call__(self, out: Path, work: Path) -> dict[str, float]:
        self.built += 1
        (out / "weights.bin").write_bytes(bytes(range(256)) * 64)
        (out / "deep").mkdir()
        (out / "deep" / "config.json").write_text("{}")
        return {"loss": 0.5}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


def run(store: ArtifactStore, build: object, **changes: object) -> Artifact:
    arguments = {"settings": {"lr": 0.1}, "inputs": {"data": "d1"}, "code": "c1", "build": build} | changes
    return store.run("pretrain", **arguments)  # type: ignore[arg-type]


def test_same_inputs_are_built_once_and_then_verified(store: ArtifactStore) -> None:
    stage = Counter()
    first, second = run(store, stage), run(store, stage)
    assert stage.built == 1
    assert (first.reused, second.reused) == (False, True)
    assert first.manifest == second.manifest
    assert second.metrics == {"loss": 0.5}


@pytest.mark.parametrize("change", [{"settings": {"lr": 0.2}}, {"inputs": {"data": "d2"}}, {"code": "c2"}])
def test_any_changed_input_gives_another_artifact(store: ArtifactStore, change: dict[str, object]) -> None:
    assert run(store, Counter()).key != run(store, Counter(), **change).key


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: _flip(path / "weights.bin"), "weights.bin differs"),
        (lambda path: (path / "weights.bin").unlink(), "weights.bin is missing"),
        (lambda path: (path / "deep" / "extra").touch(), "deep/extra was added"),
        (lambda path: _flip(path / MANIFEST), "manifest.json is missing or changed"),
        (lambda path: (path / MANIFEST).unlink(), "manifest.json is missing or changed"),
    ],
)
def test_corruption_is_reported_in_one_line_and_built_again(
    store: ArtifactStore, caplog: pytest.LogCaptureFixture, change: object, said: str
) -> None:
    stage = Counter()
    sound = run(store, stage)
    change(sound.path)  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        rebuilt = run(store, stage)
    assert stage.built == 2
    assert rebuilt.digest == sound.digest
    assert integrity_error(rebuilt.path, rebuilt.manifest) is None
    assert len(caplog.messages) == 1
    assert said in caplog.messages[0]
    assert run(store, stage).reused


def test_every_single_bit_of_every_file_counts(store: ArtifactStore) -> None:
    artifact = run(store, Counter())
    for name in artifact.manifest.files:
        path = artifact.path / name
        content = path.read_bytes()
        for position in range(0, len(content), max(1, len(content) // 50)):
            changed = bytearray(content)
            changed[position] ^= 0x10
            path.write_bytes(changed)
            assert integrity_error(artifact.path, artifact.manifest) == f"{name} differs from what was written"
        path.write_bytes(content)
    assert integrity_error(artifact.path, artifact.manifest) is None


def test_a_failed_stage_leaves_no_artifact_and_keeps_its_working_directory(store: ArtifactStore) -> None:
    def fail(out: Path, work: Path) -> dict[str, float]:
        (out / "half.bin").write_text("half")
        (work / "checkpoint").write_text("step 7")
        raise RuntimeError("out of memory")

    def resume(out: Path, work: Path) -> dict[str, float]:
        assert list(out.iterdir()) == []
        (out / "whole.bin").write_text((work / "checkpoint").read_text())
        return {}

    with pytest.raises(RuntimeError, match="out of memory"):
        run(store, fail)
    artifact = run(store, resume)
    assert (artifact.path / "whole.bin").read_text() == "step 7"
    assert not (store.root / "pretrain" / ".work" / artifact.key).exists()
    assert not (store.root / "pretrain" / ".new" / artifact.key).exists()


def _build_until_killed(root: Path) -> None:
    def build(out: Path, work: Path) -> dict[str, float]:
        (out / "half.bin").write_text("half")
        (work / "checkpoint").write_text("step 7")
        time.sleep(60)
        return {}

    run(ArtifactStore(root), build)


def _build_and_die_once_it_is_placed(root: Path) -> None:
    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def build(out: Path, work: Path) -> dict[str, float]:
        (out / "whole.bin").write_text("whole")
        (work / "checkpoint").write_bytes(b"weights" * 1000)
        artifact_module.shutil.rmtree = die  # type: ignore[assignment]
        return {}

    run(ArtifactStore(root), build)


def test_what_a_process_killed_just_after_placing_left_behind_is_removed_by_the_next(store: ArtifactStore) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_build_and_die_once_it_is_placed, args=(store.root,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list(store.root.glob("pretrain/.work/*/checkpoint"))
    assert run(store, Counter()).reused
    assert not list(store.root.glob("pretrain/.work/*"))
    assert not list(store.root.glob("pretrain/.new/*"))


def test_killed_with_signal_9_the_next_process_goes_on_from_its_checkpoint(store: ArtifactStore) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_build_until_killed, args=(store.root,))
    process.start()
    while not list(store.root.glob("pretrain/.work/*/checkpoint")):
        time.sleep(0.02)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()

    def resume(out: Path, work: Path) -> dict[str, float]:
        (out / "whole.bin").write_text((work / "checkpoint").read_text())
        return {}

    artifact = run(store, resume)
    assert [path.name for path in artifact.path.iterdir() if path.name != MANIFEST] == ["whole.bin"]
    assert (artifact.path / "whole.bin").read_text() == "step 7"


def test_two_at_once_build_one_key_once(store: ArtifactStore) -> None:
    built, entered = [], threading.Event()

    def build(out: Path, work: Path) -> dict[str, float]:
        built.append(1)
        entered.set()
        time.sleep(0.3)
        (out / "a").write_text("a")
        return {}

    results: list[Artifact] = []
    threads = [threading.Thread(target=lambda: results.append(run(store, build))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert sorted(result.reused for result in results) == [False, True, True]


def test_leftovers_go_when_nobody_holds_them(store: ArtifactStore) -> None:
    def fail(out: Path, work: Path) -> dict[str, float]:
        (work / "checkpoint").write_text("step 7")
        raise RuntimeError

    for code in ("old", "fresh"):
        with pytest.raises(RuntimeError):
            run(store, fail, code=code)
    works = sorted((store.root / "pretrain" / ".work").iterdir(), key=lambda path: path.stat().st_mtime)
    long_ago = time.time() - ABANDONED_AFTER_S - 60
    for path in [*works[0].iterdir(), works[0]]:
        os.utime(path, (long_ago, long_ago))
    run(store, Counter())
    assert not works[0].exists()
    assert works[1].exists()
    assert list((store.root / "pretrain" / ".new").iterdir()) == []


def test_a_working_directory_that_changes_while_it_is_looked_at_is_fresh(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = store.root / "pretrain" / ".work" / "another"
    other.mkdir(parents=True)
    (other / "step-7").write_text("")
    stat = Path.stat

    def vanishing(path: Path, **options: bool) -> os.stat_result:
        if path.name == "step-7":
            raise FileNotFoundError(path)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", vanishing)
    run(store, Counter())
    assert other.exists()


def test_seconds_count_what_dead_processes_put_into_the_work_that_they_left(store: ArtifactStore) -> None:
    def cut_off(out: Path, work: Path) -> dict[str, float]:
        began = time.time()
        (work / "checkpoint").write_text("step 7")
        os.utime(work / "checkpoint", (began + 40, began + 40))  # written 40 s after the start
        raise RuntimeError

    for _ in range(2):
        with pytest.raises(RuntimeError):
            run(store, cut_off)
    assert 80 <= run(store, Counter()).manifest.seconds < 85


def test_fingerprint_follows_imports_and_ignores_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import twinloop.registry.fingerprint as module

    def digest(decoder: str, unrelated: str = "") -> str:
        for name, source in {
            "tasks/__init__.py": "",
            "tasks/train.py": "from twinloop.training import loop\n",
            "training/__init__.py": "",
            "training/loop.py": "def train():\n    from twinloop.models.decoder import Decoder\n    return Decoder\n",
            "models/__init__.py": "",
            "models/decoder.py": decoder,
            "models/unrelated.py": unrelated,
        }.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(source)
        module._tree.cache_clear()
        fingerprint.cache_clear()
        return fingerprint("twinloop.tasks.train")

    monkeypatch.setattr(module, "ROOT", tmp_path)
    first = digest("class Decoder: pass\n")
    assert digest("class Decoder:  # the network\n    pass\n", unrelated="x = 1") == first
    assert digest("class Decoder: size = 1\n") != first
    module._tree.cache_clear()
    fingerprint.cache_clear()


def test_a_family_counts_though_no_import_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import twinloop.registry.fingerprint as module

    def digest() -> str:
        module._tree.cache_clear()
        fingerprint.cache_clear()
        return fingerprint("twinloop.models.directory")

    shutil.copytree(module.ROOT / "models", tmp_path / "models")
    shutil.copytree(module.ROOT / "common", tmp_path / "common")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    first = digest()
    with (tmp_path / "models" / "families" / "mistral.py").open("a") as file:
        file.write("# a comment\n")
    assert digest() == first
    (tmp_path / "models" / "families" / "own.py").write_text('ARCHITECTURE = "OwnForCausalLM"\n')
    assert digest() != first
    module._tree.cache_clear()
    fingerprint.cache_clear()


def test_fingerprint_of_a_module_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ModuleNotFoundError, match="not a module of this project"):
        fingerprint("twinloop.tasks.nothing")
