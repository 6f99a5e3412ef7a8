"""Every family computes what `transformers` computes: the network, and the engine past its windows."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from family_cases import POSITIONS, VOCABULARY, build, random_config

import twinloop.models.families
from twinloop.common.errors import UserError
from twinloop.common.modules import modules_in
from twinloop.models.config import DecoderConfig
from twinloop.models.directory import load_config, save_model
from twinloop.models.exported import export_model
from twinloop.models.family import read_config, write_config
from twinloop.models.rope import RopeScaling
from twinloop.serving.engine import Engine
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.training.tree import collate, document, scored_logprobs
from twinloop.training.weights import get_weights, load_decoder

FAMILIES = modules_in(twinloop.models.families)
LENGTH, ANSWER = 40, 24


@torch.no_grad()
def compare(config: transformers.PreTrainedConfig, seed: int, folder: Path) -> None:
    theirs = build(config, seed)
    theirs.save_pretrained(folder / "theirs")
    tokens = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    expected = theirs(tokens).logits
    assert expected.std() > 0.1

    ours = load_decoder(folder / "theirs")
    assert ours.config.num_parameters == sum(parameter.numel() for parameter in theirs.parameters())
    hidden = ours.hidden(tokens, torch.arange(LENGTH).expand(2, -1))
    torch.testing.assert_close(ours.logits(hidden), expected, atol=1e-4, rtol=0)

    save_model(folder / "ours", ours.config, get_weights(ours))
    assert load_config(folder / "ours") == ours.config
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "ours", output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert type(again) is type(theirs)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(again(tokens).logits, expected, atol=1e-5, rtol=0)

    export_model(folder / "ours", folder / "fp32", precision="fp32", max_length=LENGTH + ANSWER)
    engine = Engine.load(folder / "fp32", slots=2, threads=1)
    for chunk in (LENGTH, 7):
        scored = engine.score(tokens[0].numpy(), chunk=chunk)
        np.testing.assert_allclose(scored, expected[0].numpy(), atol=1e-4)
    prompts = [tokens[0].tolist(), tokens[1, :5].tolist()]
    answers = engine.generate(prompts, SamplingParams(max_tokens=ANSWER))
    for prompt, answer in zip(prompts, answers, strict=True):
        chosen = theirs.generate(torch.tensor([prompt]), max_new_tokens=ANSWER, do_sample=False)
        assert answer.tokens == chosen[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_what_transformers_computes(family, tmp_path):
    compare(random_config(family, seed=0), 0, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 25))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_computes_what_transformers_computes(family, seed, tmp_path):
    compare(random_config(family, seed), seed, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_documents_gradients_are_those_of_transformers(family, tmp_path):
    theirs = build(random_config(family, seed=1), seed=1)
    theirs.save_pretrained(tmp_path)
    ours = load_decoder(tmp_path)
    tokens = torch.randint(3, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    theirs(tokens, labels=tokens).loss.backward()
    other = document(tokens[0, :7].tolist())  # beside it in the row
    batch = collate([(other, document(tokens[0].tolist()))], 64)
    (-scored_logprobs(ours, batch)[-(LENGTH - 1) :].mean()).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.fixture
def gemma2(monkeypatch):
    """A family that does not come with Twinloop: its file lies in a folder of its own."""
    path = [*twinloop.models.families.__path__, str(Path(__file__).parent / "dropped_in")]
    monkeypatch.setattr(twinloop.models.families, "__path__", path)
    yield
    sys.modules.pop("twinloop.models.families.gemma2", None)


def test_one_file_adds_a_family(gemma2, tmp_path):
    """This one also has what none of ours has: scores that are capped inside of attention."""
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=POSITIONS,
        sliding_window=9,
        query_pre_attn_scalar=12,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=4.0,
    )
    compare(config, 0, tmp_path)
    assert load_config(tmp_path / "ours").attention_softcap == 1.5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_file_is_short(family):
    file = Path(next(iter(twinloop.models.families.__path__)), f"{family}.py")
    assert len(file.read_text().splitlines()) <= 150


def test_without_the_file_the_family_is_unknown():
    with pytest.raises(UserError, match=r"model_type 'gemma2' is not one of gemma3_text, llama, mistral, qwen2, qwen3"):
        read_config({"model_type": "gemma2"})


SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
}


SCALINGS = (
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not one of"),
        ({"model_type": "../llama"}, "model_type '../llama' is not one of"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"model_type": "gemma3_text", "hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "factor: Input should be a valid number"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3 needs low_freq_factor"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta: Input should be greater than 0"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters: .* is not an object with the angles"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"mlp_bias": "yes"}, "mlp_bias: 'yes' is not true or false"),
        ({"model_type": "mistral", "sliding_window": "9"}, "sliding_window: '9' is not a number of positions"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window: 0 is not a number of positions"),
        ({"model_type": "qwen2", "use_sliding_window": 1}, "use_sliding_window: 1 is not true or false"),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["full_attention"]},
            "layer_types does not",
        ),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["chunked"] * 3}, "layer_types does not"),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": [["a"]] * 3}, "layer_types does not"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": -1}, "max_window_layers: -1 is not"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "no_rope_layers does not say 0 or 1 for each of the 3"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0, "1"]}, "no_rope_layers does not say 0 or 1"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0, {}]}, "no_rope_layers does not say 0 or 1"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval: 0 is not a number of layers"),
        ({"model_type": "gemma3_text", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar: 0 is not a number above 0"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping is applied by no"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "earlier tokens only"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "sliding_window_pattern: 0 is not a number of"),
        ({"model_type": "gemma3_text", "rope_parameters": []}, r"rope_parameters: \[\] is not an object"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"full_attention": 1}},
            "rope_parameters: 1 is not an object",
        ),
    ],
)
def test_what_the_network_cannot_do_is_refused_in_one_line(change, message):
    with pytest.raises(UserError, match=rf"^config\.json: .*{message}") as error:
        read_config({"model_type": "llama", **SIZES, **change})
    assert "\n" not in str(error.value)


HEAD = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"], **SIZES}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_labels": "3"}, "num_labels: '3' is not a number from 1 to 10,000"),
        ({"num_labels": 2.0}, "num_labels: 2.0 is not a number"),
        ({"num_labels": [1]}, r"num_labels: \[1\] is not a number"),
        ({"num_labels": True}, "num_labels: True is not a number"),
        ({"num_labels": 0}, "num_labels: 0 is not a number"),
        ({"num_labels": 10**10}, "num_labels: 10000000000 is not a number"),
        ({"id2label": ["late"]}, "id2label does not name each label"),
        ({"id2label": {"1": "late"}}, "id2label does not name each label"),
        ({"problem_type": "multi_label_classification"}, "a text may have several labels there"),
        (
            {"problem_type": "multi_label_classification", "id2label": {"0": "late", "1": "lost", "2": "torn"}},
            "a text may have several labels there",
        ),
        ({"problem_type": "regression"}, "problem_type 'regression' with 2 numbers for a text is not supported"),
    ],
)
def test_a_head_that_gives_something_else_than_a_label_or_a_score_is_refused_in_one_line(change, message):
    with pytest.raises(UserError, match=rf"^config\.json: .*{message}") as error:
        read_config(HEAD | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "labels"),
    [
        ({}, ("LABEL_0", "LABEL_1")),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, ("LABEL_0", "LABEL_1", "LABEL_2")),
        ({"num_labels": 1, "problem_type": "regression"}, ("LABEL_0",)),
    ],
)
def test_a_head_of_labels_or_of_one_score_is_read(change, labels):
    assert read_config(HEAD | change).labels == labels


@pytest.mark.parametrize("family", FAMILIES)
def test_nonsense_in_any_field_is_refused_in_one_line_or_has_no_effect(family):
    fields = random_config(family, seed=3).to_dict()
    nonsense = [None, "x", "9", True, -1, 0, 1.5, 10**400, float("nan"), float("inf"), [], [1], [[]], {}, {"a": {}}]
    refused = []
    for name in [*fields, "rope_theta", "rope_scaling", "sliding_window_pattern", "rope_local_base_freq"]:
        for value in nonsense:
            try:
                config = read_config({**fields, name: value})
            except UserError as error:
                refused.append(str(error))
            else:
                assert read_config(write_config(config)) == config
    assert len(refused) > 100
    assert not any("\n" in line for line in refused)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk_norm": True, "mlp_bias": True}, "a qwen3 network cannot have mlp_bias True"),
        ({"windows": (8, None, 8)}, r"a llama network cannot have windows \(8, None, 8\)"),
        ({"family": "mistral", "windows": (8, None, 8)}, r"a mistral network cannot have windows \(8, None, 8\)"),
        ({"attention_bias": True, "rotary_layers": (True, False, True)}, "a qwen2 network cannot have rotary_layers"),
    ],
)
def test_a_network_that_its_family_has_no_words_for_is_not_written(change, message):
    sizes = {name: value for name, value in SIZES.items() if name != "hidden_act"}
    with pytest.raises(UserError, match=message):
        write_config(DecoderConfig(**sizes, **change))


def test_llama_3_of_before_transformers_5_reads_alike():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    old = {"rope_theta": 500000.0, "rope_scaling": {**scaling, "rope_type": "llama3"}}
    new = {"rope_parameters": {**scaling, "rope_type": "llama3", "rope_theta": 500000.0}}
    shared = {"model_type": "llama", **SIZES, "eos_token_id": [128001, 128008]}
    config = read_config({**shared, **old})
    assert config == read_config({**shared, **new})
    assert config.rope_scaling == RopeScaling(kind="llama3", **scaling)
    assert (config.rope_theta, config.eos_token_id, config.pad_token_id) == (500000.0, 128001, None)


def test_gemma_3_of_before_transformers_5_reads_alike():
    old = {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window_pattern": 2,
    }
    new = {
        "rope_parameters": {
            "full_attention": {"factor": 8.0, "rope_type": "linear", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    shared = {"model_type": "gemma3_text", **SIZES, "sliding_window": 512}
    assert read_config({**shared, **old}) == read_config({**shared, **new})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"])
def test_a_scaling_is_written_for_readers_of_before_and_after_transformers_5(family, scaling, tmp_path):
    """Those of before have no rope_parameters: they take rope_scaling, rope_theta and rope_local_base_freq."""
    rope = {"rope_theta": 500.0, **scaling}
    local = {"rope_type": "default", "rope_theta": 100.0}
    config = random_config(family, seed=0)
    config.rope_parameters = {"full_attention": rope, "sliding_attention": local} if family == "gemma3_text" else rope
    build(config, seed=0).save_pretrained(tmp_path / "theirs")
    ours = load_decoder(tmp_path / "theirs")
    save_model(tmp_path / "both", ours.config, get_weights(ours))
    both = json.loads((tmp_path / "both" / "config.json").read_text())
    tokens = torch.arange(3, POSITIONS)[None]
    with torch.no_grad():
        expected = ours.logits(ours.hidden(tokens, torch.arange(tokens.shape[1])[None]))
    for left_out in (None, "rope_parameters", "rope_scaling"):
        fields = {name: value for name, value in both.items() if name != left_out}
        (tmp_path / "both" / "config.json").write_text(json.dumps(fields))
        assert load_config(tmp_path / "both") == ours.config
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "both", dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            torch.testing.assert_close(theirs(tokens).logits, expected, atol=1e-4, rtol=0, msg=left_out)


def test_where_nothing_is_scaled_there_is_no_scaling_to_read():
    config = read_config({"model_type": "llama", **SIZES})
    assert "rope_scaling" not in write_config(config)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_scaling_that_was_added_to_a_file_of_today_counts_as_in_transformers(family):
    """As Qwen's model cards advise, whose files have rope_parameters by now."""
    plain = {"rope_type": "default", "rope_theta": 5e5}
    kinds = {"full_attention": plain, "sliding_attention": plain}
    added = {"rope_type": "linear", "factor": 4.0}
    fields = {
        **SIZES,
        "model_type": family,
        "rope_parameters": kinds if family == "gemma3_text" else plain,
        "rope_scaling": added,
    }
    theirs = transformers.AutoConfig.for_model(**copy.deepcopy(fields)).rope_parameters
    theirs = theirs["full_attention"] if family == "gemma3_text" else theirs
    ours = read_config(fields)
    assert ours.rope_scaling == RopeScaling(kind="linear", factor=theirs["factor"])
    assert ours.rope_theta == theirs["rope_theta"]
