import pytest
import torch
from small import TINY, Texts

from twinloop.models.decoder import Decoder
from twinloop.training.weights import new_decoder


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def tiny() -> Decoder:
    return new_decoder(TINY, seed=0)


@pytest.fixture
def texts() -> Texts:
    return Texts()
