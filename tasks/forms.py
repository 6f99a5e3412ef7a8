"""The forms that a release has: the trained network in torch, its exported models in the engine that serves them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from twinloop.evaluation.parity import Form
from twinloop.models.adapter import read_adapter
from twinloop.models.decoder import Decoder
from twinloop.models.directory import ADAPTER, BASE, load_config, load_tensors, save_model
from twinloop.models.source import Source, open_source
from twinloop.serving.engine import Engine
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.training.adapters import bind_adapter
from twinloop.training.sampler import BoundSampler
from twinloop.training.weights import set_weights


class NetworkForm(Form):
    """A network in torch: with its adapter beside it where it has one."""

    def __init__(
        self,
        name: str,
        directory: Path,
        digest: str,
        network: Decoder,
        *,
        threads: int,
        proposer: Decoder | None = None,
    ):
        """directory: of its tokenizer. network: in evaluation mode, on CPU. proposer: a network without an adapter that
        answers nearly alike, where this one has one."""
        super().__init__(name, directory, digest)
        self._network, self._threads = network, threads
        self._proposer = proposer or network

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        return network_logits(self._network, tokens)

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """The engine over the proposer's tensors proposes, and the network decides about every token: torch alone would
        read a whole answer again for each of its tokens."""
        most = self._network.config.max_position_embeddings
        max_length = min(most, max(map(len, prompts)) + max_tokens)
        sampler = BoundSampler(
            self._proposer,
            max_length=max_length,
            prompts=len(prompts),
            group=1,
            threads=self._threads,
            vocab_size=self.tokenizer.vocab_size,
        )
        if self._network.config.labels:
            max_tokens = 1  # a label is a whole answer
        available = [min(max_tokens, max_length - len(prompt)) for prompt in prompts]
        answers: list[list[int]] = [[] for _ in prompts]
        unfinished = list(range(len(prompts)))
        while unfinished:
            longest = max(available[index] - len(answers[index]) for index in unfinished)
            greedy = SamplingParams(max_tokens=longest, stop=self.tokenizer.stop_ids)
            texts = [[*prompts[index], *answers[index]] for index in unfinished]
            for index, text, proposed in zip(unfinished, texts, sampler.generate(texts, greedy, group=1), strict=True):
                answers[index] += self._decided(text, proposed.tokens[: available[index] - len(answers[index])])
            unfinished = [
                index
                for index in unfinished
                if answers[index][-1] not in self.tokenizer.stop_ids and len(answers[index]) < available[index]
            ]
        return answers

    def _decided(self, text: Sequence[int], proposed: Sequence[int]) -> list[int]:
        """The proposed tokens up to the first that the network would not choose, and what it chooses there."""
        scores_TV = self.logits([*text, *proposed])[len(text) - 1 : -1, : self.tokenizer.vocab_size]
        chosen = scores_TV.argmax(axis=-1)
        differs = np.flatnonzero(chosen != np.array(proposed))
        return list(chosen[: differs[0] + 1].tolist() if len(differs) else proposed)


@torch.no_grad()
def network_logits(network: Decoder, tokens: Sequence[int]) -> np.ndarray:
    """float32 [L, V] of tokens [L], all at once."""
    hidden = network.hidden(torch.tensor([list(tokens)]), torch.arange(len(tokens))[None])
    logits_LV: np.ndarray = network.logits(hidden)[0].float().numpy()
    return logits_LV


def adapted_network(directory: Path) -> Decoder:
    """The base of an adapted model with the adapter beside it, as it was trained: nothing is merged."""
    network = Decoder(load_config(directory)).eval()
    set_weights(network, load_tensors(directory / BASE), where=str(directory / BASE))
    bind_adapter(network, read_adapter(directory / ADAPTER, network.config))
    return network


def describe_gguf(path: Path, directory: Path) -> Source:
    """A GGUF file, whose configuration, tokenizer and template are written to `directory`, as a model directory has
    them. Raises UserError where one of them cannot be read."""
    source = open_source(path)
    save_model(directory, source.config, {}, source.load_tokenizer())
    return source


def gguf_network(source: Source) -> Decoder:
    network = Decoder(source.config).eval()
    set_weights(network, source.load_weights(), where=str(source.path))
    return network


class ExportedForm(Form):
    """An exported model (ONNX), in the engine that serves it."""

    SLOTS = 8

    def __init__(self, name: str, directory: Path, digest: str, *, threads: int):
        """Raises UserError where its integrity check fails, or its precision does not run on this machine."""
        super().__init__(name, directory, digest)
        self._engine = Engine.load(directory, slots=self.SLOTS, threads=threads)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        return self._engine.score(tokens)

    def stepped_logits(self, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
        active = np.array([True])
        steps = [self._engine.prefill(0, prompt).copy()]
        steps += [self._engine.decode(0, np.array([token]), active)[0].copy() for token in answer[:-1]]
        return np.stack(steps)

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        greedy = SamplingParams(max_tokens=max_tokens, stop=self.tokenizer.stop_ids)
        return [completion.tokens for completion in self._engine.generate(prompts, greedy)]
