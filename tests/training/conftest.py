import pytest
from small import TINY, Texts

from twinloop.models.decoder import Decoder
from twinloop.training.runtime import Runtime
from twinloop.training.weights import new_decoder


@pytest.fixture(autouse=True)
def _one_runtime():
    Runtime(seed=0, threads=1).use()


@pytest.fixture
def tiny() -> Decoder:
    return new_decoder(TINY, seed=0)


@pytest.fixture
def texts() -> Texts:
    return Texts()
