"""Servers that tests of the HTTP interface share: one on a real engine, one whose model answers a script."""

import numpy as np
import onnxruntime as ort
import pytest
from served import ScriptedScheduler, make_app, running, small_tokenizer
from stored import THREE

from twinloop.models.config import DecoderConfig
from twinloop.models.shapes import weight_shapes
from twinloop.serving.engine import Engine
from twinloop.serving.engine.scheduler import Scheduler
from twinloop.serving.knowledge.documents import DocumentStore


@pytest.fixture
def store(tmp_path):
    store = DocumentStore(tmp_path / "state" / "documents.db")
    store.seed(THREE)
    return store


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def engine_scheduler(tokenizer):
    """A real engine with a small network's random weights: it says nothing sensible, through all the real parts."""
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
    )  # fmt: skip
    random = np.random.default_rng(7)
    weights = {
        name: np.ones(shape, np.float32) if "norm" in name else random.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in weight_shapes(config).items()
    }
    initializers = {name: ort.OrtValue.ortvalue_from_numpy(weight) for name, weight in weights.items()}
    scheduler = Scheduler(Engine.from_weights(config, initializers, max_length=384, slots=4, threads=1), queue_size=8)
    yield scheduler
    scheduler.close(drain=False, timeout_s=20)


@pytest.fixture(scope="module")
def client(tmp_path_factory, engine_scheduler, tokenizer):
    """A server on the real engine."""
    with running(make_app(tmp_path_factory.mktemp("served"), engine_scheduler, tokenizer)) as client:
        yield client


@pytest.fixture
def script(tokenizer):
    return ScriptedScheduler(tokenizer)


@pytest.fixture
def scripted(tmp_path, script, tokenizer):
    """A server whose model answers `script`."""
    with running(make_app(tmp_path, script, tokenizer)) as client:
        yield client
