"""`twinloop export`: a registered version, whole and equal in other tools, or not handed over."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conversions import convert, greedy_tokens, make_adapted, register
from known_tokenizer import CONVERSATION, TEXTS, known_tokenizer, make_model

from twinloop.common.errors import UserError
from twinloop.common.files import folder_beside
from twinloop.domains.examples import GREETING
from twinloop.models import directory, gguf_form
from twinloop.models.directory import load_config, load_tensors, save_model
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.registry.tracking import Mlruns
from twinloop.registry.versions import Registry
from twinloop.tasks import conversion_forms
from twinloop.tasks.conversion import COMPARED_CASES
from twinloop.training.weights import load_decoder

EOS = "tokenizer.ggml.eos_token_id"
OWN, KNOWN = "1", "candidate"
"""Version 1 has a tokenizer of our own, version 2 one that llama.cpp knows."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        registry = Registry(Mlruns(folder / "mlruns"), "small")
        register(folder, registry, lambda out: make_model(out, train_tokenizer(TEXTS, 300)))
        register(folder, registry, lambda out: make_model(out, known_tokenizer()))
        registry.tag(registry.version(1), {"base_license": "mit"})
        yield SimpleNamespace(folder=folder, registry=registry)


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A version whose vocabulary has 7 rows that are no tokens and would often be chosen."""
    folder = tmp_path_factory.mktemp("padded")

    def make(out: Path) -> None:
        make_model(out, known_tokenizer(), padding=7)
        tensors = load_tensors(out)
        tensors["lm_head.weight"][-7:] *= 4
        save_model(out, load_config(out), tensors, ChatTokenizer.load(out))

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        registry = Registry(Mlruns(folder / "mlruns"), "padded")
        register(folder, registry, make)
        yield SimpleNamespace(folder=folder, registry=registry)


def test_rows_that_are_no_tokens_are_never_chosen_in_transformers(padded: SimpleNamespace, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    convert(padded, "1", "huggingface", tmp_path / "out")
    model, tokenizer = (each.from_pretrained(tmp_path / "out") for each in (AutoModelForCausalLM, AutoTokenizer))
    prompt = torch.tensor([ChatTokenizer.load(tmp_path / "out").encode_prompt(GREETING)])
    written = model.generate(prompt, max_new_tokens=30)[0, prompt.shape[1] :].tolist()
    assert max(written) < len(tokenizer) < model.config.vocab_size
    with torch.no_grad():
        assert int(model(prompt).logits[0].argmax(-1).max()) >= len(tokenizer)  # and would be


@pytest.mark.parametrize("to", ["gguf", "genai"])
def test_a_form_that_cannot_say_which_rows_are_no_tokens_is_refused(
    padded: SimpleNamespace, tmp_path: Path, to: str
) -> None:
    if to == "genai":
        pytest.importorskip("onnxruntime_genai")
    with pytest.raises(UserError, match=r"of the vocabulary that are no tokens.*export it --to huggingface"):
        convert(padded, "1", to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [OWN, KNOWN])
def test_a_hugging_face_directory_loads_unmodified(project: SimpleNamespace, tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = convert(project, name, "huggingface", tmp_path / "out")
    ours = ChatTokenizer.load(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, return_dict=False)
    assert list(prompt) == ours.encode_prompt(CONVERSATION)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.float32
    network = load_decoder(project.registry.checkpoints.version(done.version.version).path)
    with torch.no_grad():
        tokens = torch.tensor([prompt])
        expected = network.logits(network.hidden(tokens, torch.arange(tokens.shape[1])[None]))
        torch.testing.assert_close(theirs(tokens).logits, expected, atol=2e-4, rtol=1e-4)
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"} <= set(
        done.files
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\npipeline_tag: text-generation\nlibrary_name: transformers\n")
    assert ("\nlicense: mit\n---" in card) == (name == OWN)
    assert f"# small version {done.version.version}" in card
    assert "`small-checkpoints/" in card
    assert "| recipe | `small.yaml` |" in card  # no folder of the machine
    greedy = greedy_tokens(done.notes)
    assert done.notes[0].startswith(f"{greedy} of {greedy} greedy tokens are the network's (in transformers)")
    assert greedy > 0
    assert done.notes[1] == "text and chat template give the same tokens in transformers"


def test_cases_of_the_data_that_it_was_trained_with_are_compared_too(project: SimpleNamespace, tmp_path: Path) -> None:
    registry = Registry(project.registry.mlruns, "cased")
    register(project.folder, registry, lambda out: make_model(out, known_tokenizer()), [CONVERSATION[:1]] * 9)
    example = convert(project, KNOWN, "gguf", tmp_path / "example", type="f32")
    cased = SimpleNamespace(folder=project.folder, registry=registry)
    done = convert(cased, "1", "gguf", tmp_path / "out", type="f32")
    assert greedy_tokens(done.notes) >= greedy_tokens(example.notes) + COMPARED_CASES
    (cases,) = project.folder.glob("artifacts/validate/*/cases.parquet")
    cases.write_bytes(cases.read_bytes()[:-8])  # what was changed is not read
    done = convert(cased, "1", "gguf", tmp_path / "again", type="f32")
    assert greedy_tokens(done.notes) == greedy_tokens(example.notes)


@pytest.mark.parametrize("labels", [(), ("late", "lost")], ids=["writes text", "classifies"])
@pytest.mark.parametrize(("room", "compared"), [(1, 1), (0, None)])
def test_prompts_that_leave_a_position_are_compared(
    project: SimpleNamespace, tmp_path: Path, labels: tuple[str, ...], room: int, compared: int | None
) -> None:
    tokenizer = known_tokenizer()
    length = len(tokenizer.encode_prompt(GREETING))
    head = {"labels": labels, "tie_word_embeddings": True} if labels else {}
    registry = Registry(project.registry.mlruns, f"short-{len(labels)}-{room}")
    sizes = head | {"max_position_embeddings": length + room}
    register(project.folder, registry, lambda out: make_model(out, tokenizer, **sizes), max_length=length + room)
    short = SimpleNamespace(folder=project.folder, registry=registry)
    if compared is None:
        with pytest.raises(UserError, match="the example of its domain has more tokens than it reads"):
            convert(short, "1", "huggingface", tmp_path / "out")
    else:
        assert greedy_tokens(convert(short, "1", "huggingface", tmp_path / "out").notes) == compared


def test_a_tokenizer_that_transformers_reads_as_another_one_is_not_handed_over(
    project: SimpleNamespace, tmp_path: Path
) -> None:
    """transformers builds that of Qwen2 itself, and normalises text, whatever tokenizer.json says."""
    registry = Registry(project.registry.mlruns, "qwen")
    for splitting in ("gpt-2", "qwen2"):
        tokenizer = known_tokenizer(splitting)
        register(project.folder, registry, lambda out, own=tokenizer: make_model(out, own, attention_bias=True))
    qwen = SimpleNamespace(folder=project.folder, registry=registry)
    said = "transformers reads the tokenizer as Qwen2Tokenizer, which makes other tokens of text than"
    with pytest.raises(UserError, match=f"qwen version 1: not handed over: {said}"):
        convert(qwen, "1", "huggingface", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = convert(qwen, "2", "huggingface", tmp_path / "out")
    assert done.notes[1].endswith("in transformers, but for text that is not in Unicode's form NFC")


def test_a_tool_that_does_not_normalise_text_gets_the_form_and_the_user_a_note(
    project: SimpleNamespace, tmp_path: Path
) -> None:
    """As with all models of Qwen."""
    pytest.importorskip("onnxruntime_genai")

    def make(out: Path) -> None:
        make_model(out, known_tokenizer())
        content = json.loads((out / "tokenizer.json").read_text())
        (out / "tokenizer.json").write_text(json.dumps(content | {"normalizer": {"type": "NFC"}}))

    registry = Registry(project.registry.mlruns, "normalising")
    register(project.folder, registry, make)
    done = convert(SimpleNamespace(folder=project.folder, registry=registry), "1", "genai", tmp_path / "out")
    assert done.notes[1].endswith("in onnxruntime_genai.Tokenizer, but for text that is not in Unicode's form NFC")


def test_weights_may_have_sixteen_bits(project: SimpleNamespace, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    convert(project, OWN, "huggingface", tmp_path / "out", type="bf16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_gguf_file_is_written_of_a_tokenizer_that_llama_cpp_knows(project: SimpleNamespace, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    done = convert(project, KNOWN, "gguf", tmp_path / "out", type="f32")
    assert list(done.files) == ["small-2-f32.gguf"]
    assert done.notes[1] == "text becomes tokens as by llama.cpp's gpt2, smollm"
    network = load_decoder(project.registry.checkpoints.version(2).path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="small-2-f32.gguf", dtype=torch.float32)
    weights = dict(theirs.state_dict())
    assert all(torch.equal(weights[name], tensor) for name, tensor in network.state_dict().items())
    with pytest.raises(UserError, match=r"llama\.cpp cannot split text as this tokenizer does"):
        convert(project, OWN, "gguf", tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_genai_answers_with_its_own_tokenizer_or_it_is_said_why_not(project: SimpleNamespace, tmp_path: Path) -> None:
    onnxruntime_genai = pytest.importorskip("onnxruntime_genai")
    done = convert(project, KNOWN, "genai", tmp_path / "known")
    assert done.notes[1] == "text and chat template give the same tokens in onnxruntime_genai.Tokenizer"
    own = convert(project, OWN, "genai", tmp_path / "own")
    assert own.notes[1].startswith("onnxruntime_genai.Tokenizer does not read this tokenizer (Invalid regex")
    assert "\n" not in own.notes[1]
    model = onnxruntime_genai.Model(str(tmp_path / "own"))  # its weights answer all the same
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=40)
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens(np.array(ChatTokenizer.load(tmp_path / "own").encode_prompt([]), np.int32))
    generator.generate_next_token()


def test_an_adapter_is_given_with_its_base(project: SimpleNamespace, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    registry = Registry(project.registry.mlruns, "adapted")
    register(project.folder, registry, make_adapted)
    done = convert(SimpleNamespace(folder=project.folder, registry=registry), "1", "peft", tmp_path / "out")
    assert {"adapter_config.json", "adapter_model.safetensors", "base/model.safetensors"} <= set(done.files)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    theirs = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    network = load_decoder(registry.checkpoints.version(1).path)
    tokens = torch.tensor([known_tokenizer().encode_prompt(CONVERSATION)])
    with torch.no_grad():
        expected = network.logits(network.hidden(tokens, torch.arange(tokens.shape[1])[None]))
        torch.testing.assert_close(theirs(tokens).logits, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "form", "options", "message"),
    [
        (KNOWN, "onnx", {}, "'onnx' is not one of huggingface, gguf, genai, peft"),
        (KNOWN, "gguf", {"type": "int4"}, "--type int4 does not fit gguf; it is one of f16, f32, bf16, q8_0, q4_0"),
        (KNOWN, "genai", {"type": "f16"}, "--type f16 does not fit genai; it is not chosen here"),
        (KNOWN, "peft", {}, "small version 2 has no adapter; --to huggingface gives all of its weights"),
        ("7", "huggingface", {}, r"small: no version 7 in the registry \(there are: 1 to 2\)"),
        ("champion", "huggingface", {}, "small: no champion in the registry"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    project: SimpleNamespace, tmp_path: Path, name: str, form: str, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        convert(project, name, form, tmp_path / "new" / "out", **options)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_left_alone(project: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "note.txt"):
        with pytest.raises(UserError, match="is not an empty directory; remove it or choose another one"):
            convert(project, KNOWN, "gguf", out)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
    (tmp_path / "empty").mkdir()
    convert(project, KNOWN, "gguf", tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "note.txt"]


def test_what_a_killed_export_left_is_removed_and_one_that_runs_is_left_alone(
    project: SimpleNamespace, tmp_path: Path
) -> None:
    (tmp_path / ".out.twinloop-new" / "made").mkdir(parents=True)
    (tmp_path / ".out.twinloop-new" / "made" / "half.gguf").touch()
    convert(project, KNOWN, "gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with folder_beside(tmp_path / "next"), pytest.raises(UserError, match=r"another process writes .*next; wait"):
        convert(project, KNOWN, "gguf", tmp_path / "next")


@pytest.mark.parametrize("before", ["open", "flock"])
def test_two_exports_into_one_folder_at_the_end_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """The first removes what both use when the second has made it, or opened it."""
    module = {"open": os, "flock": fcntl}[before]
    call, left = getattr(module, before), [tmp_path / ".out.twinloop-new"]

    def late(*arguments: Any, **named: Any) -> Any:
        for each in left[:]:
            left.remove(each)
            each.rmdir()
        return call(*arguments, **named)

    monkeypatch.setattr(module, before, late)
    with folder_beside(tmp_path / "out") as folder:
        (folder / "made").mkdir()
        with pytest.raises(BlockingIOError), folder_beside(tmp_path / "out"):
            pass
    assert not left
    assert not folder.exists()


def test_a_form_that_answers_differently_is_not_handed_over(
    project: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_form.GGUFLayout, "to_gguf", lambda tensor, values: values)  # rows in the wrong order
    with pytest.raises(UserError, match=r"small version 2: not handed over: only \d+ of \d+ greedy tokens"):
        convert(project, KNOWN, "gguf", tmp_path / "out", type="f32")
    assert list(tmp_path.iterdir()) == []


def test_a_gguf_file_that_ends_answers_otherwise_is_not_handed_over(
    project: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf.GGUFWriter, "add_eos_token_id", lambda writer, id: writer.add_uint32(EOS, id - 1))
    with pytest.raises(UserError, match="small version 2: not handed over: the file's tokenizer has other tokens"):
        convert(project, KNOWN, "gguf", tmp_path / "out", type="f32")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_ends_answers_otherwise_is_not_handed_over(
    project: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(out: Path, config: Any, tensors: Any, tokenizer: Any) -> None:
        save_model(out, config, tensors, tokenizer)
        settings = out / "generation_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": 3}))

    monkeypatch.setattr(directory, "save_model", other)
    with pytest.raises(UserError, match="small version 2: not handed over: transformers ends answers at token 3, not"):
        convert(project, KNOWN, "huggingface", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_a_type_cannot_hold_are_not_handed_over(project: SimpleNamespace, tmp_path: Path) -> None:
    def large(out: Path) -> None:
        make_model(out, known_tokenizer())
        tensors = load_tensors(out)
        tensors["model.embed_tokens.weight"][-1, 0] = 1e6  # of a token that no answer has
        save_model(out, load_config(out), tensors)

    registry = Registry(project.registry.mlruns, "large")
    register(project.folder, registry, large)
    with pytest.raises(UserError, match=r"embed_tokens\.weight has values that float16 cannot hold; use --type bf16"):
        convert(SimpleNamespace(folder=project.folder, registry=registry), "1", "huggingface", tmp_path, type="f16")


def test_without_transformers_a_directory_is_read_back_and_other_forms_are_not_written(
    project: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion_forms, "find_spec", lambda name: None)
    done = convert(project, KNOWN, "huggingface", tmp_path / "out")
    assert "are the network's (read back here; transformers is not installed)" in done.notes[0]
    with pytest.raises(UserError, match=r"is compared in onnxruntime-genai before .* install onnxruntime-genai"):
        convert(project, KNOWN, "genai", tmp_path / "genai")


def test_what_another_library_raises_is_one_line(
    project: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(conversion_forms, "_transformers_model", broken)
    with pytest.raises(UserError, match=r"not handed over: transformers does not run it: .*first") as e:
        convert(project, KNOWN, "huggingface", tmp_path / "out")
    assert "\n" not in str(e.value)


def test_a_version_whose_checkpoint_is_gone_is_refused(project: SimpleNamespace, tmp_path: Path) -> None:
    registry = Registry(project.registry.mlruns, "orphan")
    register(project.folder, registry, lambda out: make_model(out, known_tokenizer()))
    registry.mlruns.client.delete_model_version("orphan-checkpoints", "1")
    with pytest.raises(UserError, match=r"orphan version 1: the checkpoint that it was made from is not in MLflow"):
        convert(SimpleNamespace(folder=project.folder, registry=registry), "1", "huggingface", tmp_path / "out")


def test_a_checkpoint_is_given_by_its_own_name_a_changed_one_is_not(project: SimpleNamespace, tmp_path: Path) -> None:
    checkpoints = SimpleNamespace(folder=project.folder, registry=project.registry.checkpoints)
    done = convert(checkpoints, "2", "gguf", tmp_path / "out", type="q8_0")
    assert list(done.files) == ["small-checkpoints-2-q8_0.gguf"]
    with pytest.raises(UserError, match="is a checkpoint; name a version that was exported, such as champion"):
        convert(checkpoints, "2", "genai", tmp_path / "genai")
    config = checkpoints.registry.version(2).path / "config.json"
    before = config.read_bytes()
    config.unlink()  # hard-linked with the artifact: only this name of it changes
    config.write_text(json.dumps({}))
    try:
        with pytest.raises(UserError, match=r"small-checkpoints version 2: config\.json differs"):
            convert(project, KNOWN, "huggingface", tmp_path / "changed")
    finally:
        config.write_bytes(before)
    assert not (tmp_path / "changed").exists()
