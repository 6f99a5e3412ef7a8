"""A Hugging Face directory as a base: as transformers writes it, in one file or shards, in any float type."""

from __future__ import annotations

import json
import shutil
import struct
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from gguf_files import SIZES, TOKENIZER
from safetensors.numpy import load_file, save_file

from twinloop.common.errors import UserError
from twinloop.models.adapter import Adapter, read_adapter, save_adapter
from twinloop.models.directory import load_config, load_tensors, save_adapted, save_model
from twinloop.models.new_tokenizer import CHAT_TEMPLATE
from twinloop.models.source import open_source
from twinloop.training.weights import load_decoder

EMBEDDING = "model.embed_tokens.weight"
"""In the first shard."""
TOKENS = torch.tensor([[1, 7, 40, 200, 7, 255, 12]])


def make(folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "1GB", family: str = "Llama", **fields: Any):
    """A directory as transformers writes it, and the logits that it has in float32 there."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | {"tie_word_embeddings": True} | fields)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    TOKENIZER.save(folder)
    with torch.no_grad():
        return type(model).from_pretrained(folder, dtype=torch.float32)(TOKENS).logits


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("huggingface") / "small"
    make(folder, shard="100KB")
    return folder


@pytest.fixture
def small(written: Path, tmp_path: Path) -> Path:
    """One to break."""
    return Path(shutil.copytree(written, tmp_path / "small"))


@pytest.mark.parametrize(
    ("dtype", "shard", "family", "fields"),
    [
        ("float32", "100KB", "Llama", {}),
        ("bfloat16", "60KB", "Qwen2", {"tie_word_embeddings": False}),
        ("float16", "1GB", "Qwen3", {}),
    ],
)
def test_logits_and_float_type_are_the_sources(
    tmp_path: Path, dtype: str, shard: str, family: str, fields: dict[str, Any]
) -> None:
    expected = make(tmp_path / "in", dtype=getattr(torch, dtype), shard=shard, family=family, **fields)
    source = open_source(tmp_path / "in")
    assert source.form == {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]
    assert (tmp_path / "in" / "model.safetensors.index.json").exists() == (shard != "1GB")
    save_model(tmp_path / "out", source.config, source.load_weights(), source.load_tokenizer())
    assert {str(array.dtype) for array in load_tensors(tmp_path / "out").values()} == {dtype}
    ours = load_decoder(tmp_path / "out")
    with torch.no_grad():
        found = ours.logits(ours.hidden(TOKENS, torch.arange(TOKENS.shape[1])[None]))
    assert (found - expected).abs().max() < 1e-5


def test_special_tokens_are_the_tokenizers_and_the_rest_of_the_shape_is_config_jsons(small: Path) -> None:
    found = open_source(small).config
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, TOKENIZER.stop_id, TOKENIZER.pad_id)
    same = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    assert found.model_copy(update=same) == load_config(small).model_copy(update=same)


def test_the_digest_follows_the_models_bytes_and_nothing_else(small: Path) -> None:
    before = open_source(small).digest()
    (small / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nlicense: none\n")
    assert open_source(small).digest() == before
    assert open_source(small).license == "apache-2.0"
    for name in ("config.json", "tokenizer_config.json", "model-00001-of-00004.safetensors"):
        path = small / name
        kept = path.read_bytes()
        path.write_bytes(kept[:-1] + (b"\x00" if name.endswith("tensors") else b" \n"))
        assert open_source(small).digest() != before, name
        path.write_bytes(kept)
    assert open_source(small).digest() == before


def test_one_file_of_weights_comes_before_shards_that_were_left_beside_it(small: Path) -> None:
    from transformers import AutoModelForCausalLM

    tensors = open_source(small).load_weights()
    save_file({name: array + 1 for name, array in tensors.items()}, small / "model.safetensors", {"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(small).state_dict()[EMBEDDING].numpy()
    assert (open_source(small).load_weights()[EMBEDDING] == theirs).all()
    assert (theirs == tensors[EMBEDDING] + 1).all()


def test_what_transformers_wrote_beside_the_weights_is_left_out(tmp_path: Path) -> None:
    make(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    wanted = set(tensors)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert set(open_source(tmp_path).load_weights()) == wanted


def test_the_digest_follows_what_older_and_newer_exporters_keep_beside_the_settings(small: Path) -> None:
    before = open_source(small).digest()
    (small / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|end|>"}))
    named = open_source(small).digest()
    (small / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    default = open_source(small).digest()
    (small / "additional_chat_templates").mkdir()
    (small / "additional_chat_templates" / "tool_use.jinja").write_text(CHAT_TEMPLATE)
    assert len({before, named, default, open_source(small).digest()}) == 4
    rewrite(small, "tokenizer_config.json", added_tokens_decoder={})
    without = open_source(small).digest()  # the map of an old exporter is not read any more
    (small / "special_tokens_map.json").unlink()
    assert open_source(small).digest() == without


def add_token(folder: Path, token: str, **settings: Any) -> int:
    """A special token behind the embedding's last row, as the text-only models of Gemma 3 have one for images."""
    shorten_embedding(folder, TOKENIZER.vocab_size)
    content = json.loads((folder / "tokenizer.json").read_text())
    entry = content["added_tokens"][0] | {"id": TOKENIZER.vocab_size, "content": token}
    rewrite(folder, "tokenizer.json", added_tokens=[*content["added_tokens"], entry])
    listed = {str(entry["id"]): {"content": token, "special": True}}
    rewrite(folder, "tokenizer_config.json", added_tokens_decoder=listed, **settings)
    return int(entry["id"])


def test_a_special_token_that_no_row_and_no_chat_has_is_left_out(small: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    add_token(small, "<image>", image_token="<image>", additional_special_tokens=["<image>", "<|user|>"])
    source = open_source(small)
    save_model(tmp_path / "out", source.config, source.load_weights(), source.load_tokenizer())
    assert open_source(tmp_path / "out").config == source.config
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(theirs) == TOKENIZER.vocab_size
    assert source.load_tokenizer().encode("a <image> <|user|>") == TOKENIZER.encode("a <image> <|user|>")


@pytest.mark.parametrize(
    "settings", [{"eos_token": "<image>"}, {"chat_template": CHAT_TEMPLATE + "{% if images %}<image>{% endif %}"}]
)
def test_one_that_a_chat_may_hold_needs_its_row(small: Path, settings: dict[str, Any]) -> None:
    id = add_token(small, "<image>", **settings)
    with pytest.raises(UserError, match=f"the tokenizer has ids up to {id}, but the embedding has {id} rows"):
        open_source(small)


def changing(name: str) -> Adapter:
    """An adapter of rank 2 of one layer of the small model."""
    a, b = np.full((2, 64), 0.5, np.float32), np.full((64, 2), 0.25, np.float32)
    return Adapter({name: (a, b)}, alpha=4.0)


def test_an_adapter_is_merged_and_counts_in_the_digest(small: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    save_adapter(tmp_path / "adapter", changing(name), base=str(small))
    alone, source = open_source(small), open_source(small, tmp_path / "adapter")
    assert source.form == f"{alone.form} with an adapter of rank 2"
    weights, before = source.load_weights(), alone.load_weights()
    assert {each for each in weights if (weights[each] != before[each]).any()} == {f"{name}.weight"}
    np.testing.assert_allclose(weights[f"{name}.weight"] - before[f"{name}.weight"], 0.5, rtol=1e-5)
    digest = source.digest()
    assert digest != alone.digest()
    save_adapter(tmp_path / "adapter", changing("model.layers.1.self_attn.q_proj"), base=str(small))
    assert open_source(small, tmp_path / "adapter").digest() != digest


def test_an_adapted_model_directory_is_a_base(tmp_path: Path, small: Path) -> None:
    source = open_source(small)
    save_model(tmp_path / "whole", source.config, source.load_weights(), source.load_tokenizer())
    adapter = changing("model.layers.0.self_attn.o_proj")
    save_adapted(tmp_path / "adapted", tmp_path / "whole", adapter, skip="manifest.json")
    found = open_source(tmp_path / "adapted")
    expected = load_tensors(tmp_path / "adapted")
    assert all((array == expected[name]).all() for name, array in found.load_weights().items())
    assert found.load_tokenizer().encode("the order") == TOKENIZER.encode("the order")
    assert read_adapter(tmp_path / "adapted" / "adapter", found.config).ranks == adapter.ranks


def test_an_adapter_of_another_base_is_refused(small: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", changing("model.layers.9.self_attn.q_proj"), base="org/other")
    with pytest.raises(UserError, match=r"layers\.9\.self_attn\.q_proj is no linear layer of the base; .* another one"):
        open_source(small, tmp_path / "adapter")
    with pytest.raises(UserError, match="no such file; an adapter holds"):
        open_source(small, tmp_path / "gone")


def test_an_adapter_that_we_trained_on_other_weights_is_refused(small: Path, tmp_path: Path) -> None:
    source = open_source(small)
    weights, tokenizer = source.load_weights(), source.load_tokenizer()
    name = "model.layers.0.self_attn.q_proj"
    save_model(tmp_path / "base", source.config, weights, tokenizer)
    save_adapted(tmp_path / "adapted", tmp_path / "base", changing(name), skip="manifest.json")
    adapter = tmp_path / "adapted" / "adapter"

    def merged(changed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        save_model(tmp_path / "another", source.config, changed, tokenizer)
        return open_source(tmp_path / "another", adapter).load_weights()

    assert all((merged(weights)[each] == array).all() for each, array in load_tensors(tmp_path / "adapted").items())
    merged({each: array.astype(np.float16) for each, array in weights.items()})  # the same base, rounded
    with pytest.raises(UserError, match="adapter was trained on another base, of the same shapes and other weights"):
        merged(weights | {f"{name}.weight": weights[f"{name}.weight"] * 2})
    save_adapter(adapter, changing(name), base="org/base")  # as `peft`, which writes no more than a name
    merged(weights | {f"{name}.weight": weights[f"{name}.weight"] * 2})


def rewrite(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))


def change_tensors(folder: Path, change) -> None:
    path = folder / "model-00001-of-00004.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def shorten_embedding(folder: Path, rows: int = 200) -> None:
    change_tensors(folder, lambda t: t.update({EMBEDDING: t[EMBEDDING][:rows]}))
    rewrite(folder, "config.json", vocab_size=rows)


def cut(folder: Path) -> None:
    path = folder / "model-00002-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def pickle_only(folder: Path) -> None:
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK")


def adapter(folder: Path) -> None:
    pickle_only(folder)
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base-1B"}')
    save_file({"a": np.ones(2, np.float32)}, folder / "adapter_model.safetensors")


def write_header(header: str, folder: Path) -> None:
    """A file of weights of nothing but its header."""
    content = header.encode()
    (folder / "model-00001-of-00004.safetensors").write_bytes(struct.pack("<Q", len(content)) + content)


def entry(dtype: str = '"F32"', shape: str = "[1]", data_offsets: str = "[0, 4]") -> str:
    return f'{{"a": {{"dtype": {dtype}, "shape": {shape}, "data_offsets": {data_offsets}}}}}'


def spoil_tokenizer(where: str, field: str, value: Any, folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    {"added": data["added_tokens"][0], "model": data["model"], "vocab": data["model"]["vocab"]}[where][field] = value
    (folder / "tokenizer.json").write_text(json.dumps(data))


BROKEN = {
    "a shard cut off": (cut, "model-00002-of-00004.safetensors: cut off: 10 bytes are missing; fetch it again"),
    "a shard of nothing": (
        lambda at: (at / "model-00001-of-00004.safetensors").write_bytes(b""), "not a safetensors file, or cut off",
    ),
    "a shard with no header": (
        lambda at: (at / "model-00001-of-00004.safetensors").write_bytes(b"\xff" * 99), "longer than the file",
    ),
    "a shard with a header of other things": (
        lambda at: (at / "model-00001-of-00004.safetensors").write_bytes(
            b"\x3a" + bytes(7) + b'{"a": {"dtype": [], "shape": 3, "data_offsets": [0, "x"]}}'
        ), "not a safetensors file, or cut off",
    ),
    **{
        f"a shard with {what}": (partial(write_header, header), f"not a safetensors file, or cut off ({said}")
        for what, header, said in [
            ("a header nested deep", "[" * 100_000, "maximum recursion depth exceeded"),
            ("a tensor that ends at infinity", entry(data_offsets="[0, 1e999]"), "'F32', [1] and bytes 0 to inf"),
            ("a tensor that ends before its start", entry(data_offsets="[0, -4]"), "'F32', [1] and bytes 0 to -4"),
            ("a tensor that starts before the file", entry(data_offsets="[-4, 0]"), "'F32', [1] and bytes -4 to 0"),
            ("a tensor of half a byte", entry(data_offsets="[0, 0.5]"), "'F32', [1] and bytes 0 to 0.5"),
            ("a shape of half a row", entry(shape="[0.5]"), "'F32', [0.5] and"),
            ("a shape below nothing", entry(shape="[-1]"), "'F32', [-1] and"),
            ("a type that is no text", entry(dtype="[]"), "[], [1] and"),
        ]
    },
    "a shard missing": (lambda at: (at / "model-00003-of-00004.safetensors").unlink(), "no weights to read here"),
    "a tensor missing": (
        lambda at: change_tensors(at, lambda t: t.pop(max(t))), "has shape none, config.json wants (",
    ),
    "a tensor of another shape": (
        lambda at: change_tensors(at, lambda t: t.update({max(t): np.ones((3, 3), np.float32)})),
        "has shape (3, 3), config.json wants (",
    ),
    "a tensor too many": (
        lambda at: change_tensors(at, lambda t: t.update(extra=np.ones(2, np.float32))),
        "extra has shape (2,), config.json wants none",
    ),
    "float8 weights": (
        lambda at: change_tensors(at, lambda t: t.update({max(t): t[max(t)].astype(ml_dtypes.float8_e4m3fn)})),
        "weights of type F8_E4M3 are not read; convert them to bf16",
    ),
    "pickled weights": (pickle_only, "pytorch_model.bin is pickled, which can run any code when it is read"),
    "an adapter": (adapter, "an adapter, not a model; name its base (org/base-1B) here, and beside it `adapter: "),
    "quantised weights": (
        lambda at: rewrite(at, "config.json", quantization_config={"quant_method": "gptq"}), "a quantised checkpoint",
    ),
    "an unknown architecture": (
        lambda at: rewrite(at, "config.json", model_type="mamba"), "config.json: model_type 'mamba' is not one of",
    ),
    "too many layers": (
        lambda at: rewrite(at, "config.json", num_hidden_layers=10**12), "num_hidden_layers: Input should be less than",
    ),
    "no config": (lambda at: (at / "config.json").unlink(), "config.json: no such file"),
    "a config that is none": (lambda at: (at / "config.json").write_text("[]"), "config.json: it holds a list"),
    "a tokenizer of another model": (
        shorten_embedding, "the tokenizer has ids up to 269, but the embedding has 200 rows",
    ),
    "no tokenizer": (lambda at: (at / "tokenizer.json").unlink(), "tokenizer.json: no tokenizer to read here"),
    **{
        f"settings with {name} of {value!r}": (
            lambda at, name=name, value=value: rewrite(at, "tokenizer_config.json", **{name: value}),
            f"{name} is no {of}",
        )
        for name, value, of in [
            ("extra_special_tokens", 3, "list of tokens"),
            ("additional_special_tokens", True, "list of tokens"),
            ("eos_token", ["a"], "token"),
            ("pad_token", {"content": 1}, "token"),
        ]
    },
    **{
        f"a tokenizer with {where} {field} of {value!r}": (partial(spoil_tokenizer, where, field, value), said)
        for where, field, value, said in [
            ("added", "id", "x", "its added_tokens are none"),
            ("added", "content", 3, "its added_tokens are none"),
            ("added", "special", 1, "its added_tokens are none"),
            ("model", "unk_token", [], "its unk_token is no text"),
            ("vocab", "new", {}, "its vocabulary has ids that are no whole numbers"),
            ("model", "continuing_subword_prefix", "#" * 99, "not a tokenizer ("),
        ]
    },
    "no chat template": (
        lambda at: rewrite(at, "tokenizer_config.json", chat_template=None), "tokenizer_config.json: no chat_template",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_a_base_is_refused_in_one_line(small: Path, what: str) -> None:
    spoil, said = BROKEN[what]
    spoil(small)
    with pytest.raises(UserError) as raised:
        open_source(small)
    assert str(raised.value).startswith(str(small))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_field_for_quantisation_that_is_null_says_nothing(small: Path) -> None:
    fields = json.loads((small / "config.json").read_text()) | {"quantization_config": None}
    (small / "config.json").write_text(json.dumps(fields))
    assert open_source(small).form == "fp32"


def test_other_paths_are_refused_in_one_line(tmp_path: Path, small: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "b.gguf").write_bytes(b"GGUF")
    (tmp_path / "text.txt").write_text("hello")
    for name, said in {
        "none": "no such directory or file",
        "empty": "config.json: no such file",
        "files": "a directory of GGUF files; name one, such as b.gguf",
        "text.txt": "not a GGUF file",
        "small/model-00001-of-00004.safetensors": "weights alone are no model; name the directory",
    }.items():
        with pytest.raises(UserError) as raised:
            open_source(tmp_path / name)
        assert said in str(raised.value)
        assert "\n" not in str(raised.value)
