"""MLflow's own clients load what is registered: decisions of the champion, texts of a chat, checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from reward_scores import reward_scores

from twinloop.common.errors import UserError
from twinloop.domains.loader import load_domain
from twinloop.models.adapter_form import AdapterForm
from twinloop.models.config import DecoderConfig
from twinloop.models.decoder import Decoder
from twinloop.models.directory import save_adapted, save_model
from twinloop.models.exported import export_model
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.registry.artifact import ArtifactStore
from twinloop.registry.pyfunc import _load_pyfunc
from twinloop.registry.snapshot import Version
from twinloop.registry.versions import CHAMPION, Lineage, Registry
from twinloop.serving.knowledge.documents import DocumentStore
from twinloop.training.adapters import adapter_of, attach_adapter, trained_tensors
from twinloop.training.weights import load_decoder

POLICY = "damaged items reported within 30 days are eligible."
ORDER = {"order_id": "A10234", "reason": "damaged", "damage_confirmed": True, "days_since_delivery": 12}
Make = Callable[..., Version]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "params.yaml").write_text("{}")
    (tmp_path / "recipes").mkdir()
    DocumentStore(tmp_path / "state" / "documents" / "returns.db").put("P-7", POLICY)
    return tmp_path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A model directory with random weights."""
    tokenizer = train_tokenizer([POLICY, "order: A10234"] * 4, 300)
    torch.manual_seed(1)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=512,
    )  # fmt: skip
    tensors = {name: tensor.detach().numpy() for name, tensor in Decoder(config).state_dict().items()}
    save_model(tmp_path / "checkpoint", config, tensors, tokenizer)
    return tmp_path / "checkpoint"


@pytest.fixture
def champion(project: Path, registry: Registry, lineage: Lineage, checkpoint: Path) -> Make:
    """Registers a real exported model for a domain, and makes it the champion."""

    def make(domain: str = "returns") -> Version:
        def write(out: Path, work: Path) -> dict[str, Any]:
            export_model(checkpoint, out, precision="fp32", max_length=512)
            return {}

        store = ArtifactStore(project / "artifacts")
        exported = store.run("export", settings={}, inputs={}, code="code", build=write)
        loaded = load_domain(domain, project).domain
        about = replace(lineage, domain=domain)
        version = registry.register(exported.path, about, servable=True, domain=loaded)
        registry.move({CHAMPION: version.version})
        return version

    return make


def elsewhere(tmp_path: Path, registry: Registry, code: str) -> Any:
    """What a fresh process prints as JSON, in another folder, which knows only where MLflow's database is."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"MLFLOW_TRACKING_URI": registry.mlruns.uri},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_champion_is_loaded_by_mlflow_in_a_fresh_process_and_decides(
    tmp_path: Path, registry: Registry, champion: Make
) -> None:
    champion()
    code = f"""
import json, os
import mlflow, pandas

model = mlflow.pyfunc.load_model("models:/returns@champion")
requests = [{{"order": {ORDER!r}, "message": "hello"}}, {{"order": {ORDER!r}}}]
listed, framed = model.predict(requests), model.predict(pandas.DataFrame(requests))
print(json.dumps({{
    "columns": list(listed.columns), "rows": len(listed), "reasons": listed["reasons"][0],
    "same": listed.to_json() == framed.to_json(), "telemetry": os.environ["ORT_DISABLE_TELEMETRY"],
    "inputs": model.metadata.signature.inputs.input_names(),
    "own example": len(model.predict(model.input_example)),
}}))
"""
    seen = elsewhere(tmp_path, registry, code)
    assert seen["columns"] == ["decision", "escalated", "reasons"]
    assert seen["rows"] == 2
    assert seen["reasons"][0].keys() == {"predicate", "reason", "owner"}
    assert seen["reasons"][0]["predicate"] != "retrieval"  # the project's own documents were found
    assert seen["same"]
    assert seen["telemetry"] == "1"
    assert seen["inputs"] == ["order", "message"]
    assert seen["own example"] == 1


def test_a_request_of_another_form_is_one_clear_line(champion: Make) -> None:
    model = _load_pyfunc(str(champion().path.parent))
    with pytest.raises(UserError, match=r"^row 1: order.days_since_delivery: "):
        model.predict([{"order": ORDER}, {"order": ORDER | {"days_since_delivery": "twelve"}}])


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json"])
def test_changed_bytes_are_not_loaded(champion: Make, name: str) -> None:
    version = champion()
    with (version.path / name).open("r+b") as file:
        file.seek(20)
        file.write(b"X")
    with pytest.raises(UserError, match=r"returns version 1: .* it is not used"):
        _load_pyfunc(str(version.path.parent))


def test_files_beside_the_artifact_do_not_change_its_digest(registry: Registry, champion: Make) -> None:
    version = champion()
    assert {path.name for path in version.path.parent.iterdir()} >= {"MLmodel", "input_example.json", "model"}
    (version.path.parent / "notes.txt").write_text("mine")
    assert registry.resolve(CHAMPION).digest == version.digest


TICKETS = """
from twinloop.domains.classification import Classification

domain = Classification(labels=["billing", "technical"])
"""
CHAT = """
from twinloop.domains.domain import Domain


class Talk(Domain):
    \"\"\"Conversations.\"\"\"

    name = "talk"


domain = Talk()
"""


def test_a_domain_that_is_a_file_is_found_in_the_project_that_holds_the_version(
    tmp_path: Path, project: Path, registry: Registry, champion: Make
) -> None:
    (project / "tickets.py").write_text(TICKETS)
    champion("./tickets.py")
    code = """
import json
import mlflow

model = mlflow.pyfunc.load_model("models:/returns@champion")
print(json.dumps(model.predict([{"text": "I cannot log in"}])["escalated"].tolist()))
"""
    assert elsewhere(tmp_path, registry, code) in ([True], [False])


def test_files_that_lie_in_no_project_name_it_or_say_that_it_is_missing(
    tmp_path: Path, project: Path, champion: Make
) -> None:
    (project / "tickets.py").write_text(TICKETS)
    copied = shutil.copytree(champion("./tickets.py").path.parent, tmp_path / "copy")
    with pytest.raises(UserError, match=r"its domain ./tickets.py cannot be loaded .*model_config=\{\"project\""):
        _load_pyfunc(str(copied))
    model = _load_pyfunc(str(copied), {"project": str(project)})
    assert len(model.predict([{"text": "hello"}])) == 1


def test_documents_that_are_missing_are_said(tmp_path: Path, champion: Make) -> None:
    copied = shutil.copytree(champion().path.parent, tmp_path / "copy")
    with pytest.raises(UserError, match="its decisions are based on documents of its project"):
        _load_pyfunc(str(copied))


def test_a_chat_takes_messages_and_gives_text(project: Path, registry: Registry, champion: Make) -> None:
    import mlflow.pyfunc

    (project / "talk.py").write_text(CHAT)
    version = champion("./talk.py")
    model = mlflow.pyfunc.load_model(str(version.path.parent))
    conversation = {"messages": [{"role": "user", "content": "order: A10234"}]}
    one, two = model.predict([conversation, conversation], params={"max_tokens": 4})
    assert one == two
    assert isinstance(one, str)
    assert model.predict(pd.DataFrame([conversation]), params={"max_tokens": 4}) == [one]
    assert model.metadata.signature.params.to_dict()[0]["name"] == "max_tokens"


def test_a_project_that_was_moved_is_loaded_from_its_folder(
    tmp_path: Path, project: Path, registry: Registry, champion: Make
) -> None:
    from twinloop.registry.status import status
    from twinloop.registry.tracking import Mlruns

    version = champion()
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("mlruns", "state"):
        (project / name).rename(moved / name)
    here = Registry(Mlruns(moved / "mlruns"), "returns")
    (warning,) = [each for each in status(here).warnings if "moved" in each and "clients" in each]
    folder = here.version(version.version).path.parent
    assert f"load_model` takes {folder}" in warning
    assert len(_load_pyfunc(str(folder)).predict([{"order": ORDER}])) == 1


@pytest.mark.parametrize("adapted", [False, True])
def test_a_checkpoint_is_loaded_by_mlflows_transformers_flavour_with_our_logits(
    registry: Registry,
    lineage: Lineage,
    checkpoint: Path,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    adapted: bool,
) -> None:
    """Also where it is an adapter beside its base."""
    import mlflow

    store = ArtifactStore(project / "artifacts")

    def make(out: Path, work: Path) -> dict[str, Any]:
        if not adapted:
            shutil.copytree(checkpoint, out, dirs_exist_ok=True)
            return {}
        network = load_decoder(checkpoint)
        attach_adapter(network, AdapterForm(2, 4.0), seed=0)
        with torch.no_grad():
            for tensor in trained_tensors(network).values():
                tensor += 0.05
        adapter = adapter_of(network)
        assert adapter is not None
        save_adapted(out, checkpoint, adapter, skip="manifest.json")
        return {}

    made = store.run("sft", settings={}, inputs={}, code="code", build=make)
    version = registry.checkpoints.register(made.path, lineage)
    assert str(version) == "returns-checkpoints version 1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.mlruns.uri)
    mlflow.set_tracking_uri(registry.mlruns.uri)
    try:
        pipeline = mlflow.transformers.load_model("models:/returns-checkpoints/1")
    finally:
        mlflow.set_tracking_uri(None)
    tokens = ChatTokenizer.load(made.path).encode(POLICY)
    assert pipeline.tokenizer.encode(POLICY, add_special_tokens=False) == list(tokens)
    network, batch = load_decoder(made.path), torch.tensor([tokens])
    with torch.no_grad():
        theirs = pipeline.model(batch).logits
        ours = network.logits(network.hidden(batch, torch.arange(len(tokens))[None]))
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def test_a_reward_model_scores_conversations(champion: Make, checkpoint: Path) -> None:
    from twinloop.training.heads import attach_head
    from twinloop.training.weights import get_weights

    model, tokenizer = load_decoder(checkpoint), ChatTokenizer.load(checkpoint)
    attach_head(model, ("reward",), tokenizer, tokenizer.stop_ids)
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(1))
    save_model(checkpoint, model.config, get_weights(model), tokenizer)
    version = champion()
    loaded = _load_pyfunc(str(version.path.parent))
    question = {"role": "user", "content": "order: A10234"}
    chats = [[question, {"role": "assistant", "content": text}] for text in (POLICY, "no", "maybe")]
    expected = reward_scores(checkpoint, [tokenizer.encode_answered(chat) for chat in chats])
    assert loaded.predict([{"messages": chat} for chat in chats]) == pytest.approx(expected.tolist(), abs=1e-4)
    with pytest.raises(UserError, match="row 0: messages: the last one must be the assistant's answer"):
        loaded.predict([{"messages": [question]}])
