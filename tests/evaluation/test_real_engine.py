"""Cases and texts through the real engine: an untrained network fails every case."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from engine_memory import held_bytes

from twinloop.domains.returns import domain
from twinloop.domains.returns.generator import golden_records
from twinloop.evaluation.cases import Answering, read_cases, run_cases
from twinloop.evaluation.texts import losses, score_texts
from twinloop.models.config import DecoderConfig
from twinloop.models.decoder import Decoder
from twinloop.models.directory import save_model
from twinloop.models.exported import WEIGHTS_FILE, export_model
from twinloop.models.memory import serving_memory
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.engine import Engine

TEXTS = ["damaged items reported within 30 days are eligible.", "é🙂 12 days", "late orders " * 200]


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def network(tokenizer: ChatTokenizer) -> Decoder:
    torch.manual_seed(0)
    return Decoder(
        DecoderConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=512,
        )
    )


@pytest.fixture(scope="module")
def exported(network: Decoder, tokenizer: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tensors = {name: tensor.detach().numpy() for name, tensor in network.state_dict().items()}
    save_model(folder / "model", network.config, tensors, tokenizer)
    export_model(folder / "model", folder / "exported", precision="fp32", max_length=512)
    return folder / "exported"


def test_an_untrained_network_fails_every_case_the_same_way_twice(exported: Path) -> None:
    engine, tokenizer = Engine.load(exported, slots=4, threads=1), ChatTokenizer.load(exported)
    cases = read_cases(golden_records(), domain)
    report = run_cases(engine, tokenizer, cases, domain, Answering(20))
    assert report.overall.successes == 0
    assert report.unparsed == len(report.failures) == len(cases)
    assert run_cases(engine, tokenizer, cases, domain, Answering(20)) == report


def test_bits_per_byte_is_the_networks_own_loss(exported: Path, network: Decoder, tokenizer: ChatTokenizer) -> None:
    engine = Engine.load(exported, slots=1, threads=1)
    nats = 0.0
    for text in TEXTS:
        document = tokenizer.encode_document(text)
        for start in range(0, len(document) - 1, engine.max_length):
            piece = torch.tensor(document[start : start + engine.max_length + 1])
            positions = torch.arange(len(piece) - 1)[None]
            with torch.no_grad():
                logits = network.logits(network.hidden(piece[None, :-1], positions))[0]
            nats += F.cross_entropy(logits, piece[1:], reduction="sum").item()
    scores = score_texts(engine, tokenizer, TEXTS)
    assert sum(score.nats for score in scores) == pytest.approx(nats, rel=1e-4)
    assert losses(scores)["bits_per_byte"].value == pytest.approx(
        nats / math.log(2) / sum(len(text.encode()) for text in TEXTS), rel=1e-4
    )


@pytest.mark.parametrize(("slots", "max_length"), [(1, 512), (3, 100)])
def test_the_plan_knows_the_engines_memory(exported: Path, network: Decoder, slots: int, max_length: int) -> None:
    engine = Engine.load(exported, slots=slots, max_length=max_length, threads=1)
    plan = serving_memory(network.config, precision="fp32", slots=slots, max_length=max_length)
    rotary_tables = 2 * 4 * 528 * 16  # of the exported model's own length
    # Vectors under 1 KiB are in the graph's own file, and the weights' file is aligned.
    expected = plan.weights_bytes + plan.kv_cache_bytes + rotary_tables
    assert (exported / WEIGHTS_FILE).stat().st_size + held_bytes(engine) == pytest.approx(expected, abs=4096)
