"""What a version is written as for other tools, and the comparison of each with the trained network.

transformers, peft and onnxruntime-genai are not needed to run Twinloop. Where one is installed, its form is compared in
it. Without it a Hugging Face directory is read back by our own reader; the other two are not written.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

from twinloop.common.errors import UserError, one_line
from twinloop.domains.domain import Message
from twinloop.models.directory import ADAPTER, BASE
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.registry.snapshot import Version

if TYPE_CHECKING:
    from twinloop.evaluation.parity import Exchange, Logits
    from twinloop.models.config import DecoderConfig
    from twinloop.models.gguf_writer import GGUFType
    from twinloop.tasks.forms import NetworkForm

AWKWARD = "  Größe 你好 😀 don't\tIT'S\n\n 10234  7.5% (a_b) e\u0301 "
"""Text that tokenizers are apt to split differently."""

ROUNDED_ALIKE = 0.97
"""Share of greedy tokens that weights of fewer bits must keep. Of SmolLM2-135M, Q8_0 keeps 99% and Q4_0 78%."""


@dataclass(frozen=True)
class Original:
    """What a form is made from. exported: what serves it, None for a checkpoint. reference: the trained network.
    card: for people, in Markdown."""

    version: Version
    checkpoint: Path
    exported: Path | None
    config: DecoderConfig
    reference: NetworkForm
    exchanges: Sequence[Exchange]
    card: Callable[..., str]

    @property
    def tokenizer(self) -> ChatTokenizer:
        return self.reference.tokenizer


@dataclass(frozen=True)
class Format:
    """make(source, out, type): fill the directory `out`, read it back and compare; returns what to tell the user.

    types: of its weights, the default first; none where it has no choice. load(out): how it is loaded.
    """

    make: Callable[[Original, Path, Any], list[str]]
    load: Callable[[Path], str]
    types: tuple[str, ...] = ()


def _huggingface(source: Original, out: Path, type: str) -> list[str]:
    import ml_dtypes
    import numpy as np

    from twinloop.models.directory import CONFIG, check_float16, load_tensors, save_model
    from twinloop.tasks.forms import network_logits
    from twinloop.training.weights import load_decoder

    dtypes = {"f32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16)}
    dtype = dtypes[type]
    tensors = load_tensors(source.checkpoint)
    if type == "f16":
        for name, array in tensors.items():
            check_float16(name, array, str(source.version))
    tokenizer = ChatTokenizer.load(source.checkpoint)
    save_model(out, source.config, {name: array.astype(dtype) for name, array in tensors.items()}, tokenizer)
    _change_json(out / CONFIG, torch_dtype=str(dtype))
    _suppress_padding(source, out)
    loads = _auto_class(source.config)
    task = "text-classification" if source.config.labels else "text-generation"
    (out / "README.md").write_text(source.card(_CODE.replace(_WRITES, loads), task=task), encoding="utf-8")
    alike = 1.0 if type == "f32" else ROUNDED_ALIKE
    if find_spec("transformers") is None:
        how = "read back here; transformers is not installed"
        logits = partial(network_logits, load_decoder(out))
        return [_agrees(source, logits, how, at_least=alike, suppresses_padding=True)]
    with _run_by("transformers", source):
        model = _transformers_model(out, loads)
        if not source.config.labels:
            _check_stop_ids(source, model)
        note = _agrees(source, _logits_of(model), "in transformers", at_least=alike, suppresses_padding=True)
        return [note, _same_ids(source, out)]


def _gguf(source: Original, out: Path, type: GGUFType) -> list[str]:
    from twinloop.models.gguf_vocabulary import read_vocabulary
    from twinloop.models.gguf_writer import write_gguf
    from twinloop.models.source import open_source
    from twinloop.tasks.forms import gguf_network, network_logits

    vocabulary = read_vocabulary(source.checkpoint, source.config.vocab_size)
    path = out / f"{source.version.name}-{source.version.version}-{type}.gguf"
    name = f"{source.version.name} {source.version.version}"
    write_gguf(source.checkpoint, path, vocabulary, type=type, name=name)
    read = open_source(path)
    alike = 1.0 if type == "f32" else ROUNDED_ALIKE
    note = _agrees(source, partial(network_logits, gguf_network(read)), f"read back from {type}", at_least=alike)
    # llama.cpp normalises nothing, and our reader as the model's tokenizer does.
    text, messages = normalize("NFC", AWKWARD), [{"role": "user", "content": "question"}]
    tokenizer, ours = read.load_tokenizer(), source.tokenizer
    if (
        tokenizer.encode(text) != ours.encode(text)
        or tokenizer.encode_prompt(messages) != ours.encode_prompt(messages)
        or tokenizer.stop_ids != ours.stop_ids
    ):
        raise UserError(f"{source.version}: not handed over: the file's tokenizer has other tokens; report this")
    splitting = f"text becomes tokens as by llama.cpp's {vocabulary.reading.model}, {vocabulary.reading.pre}"
    return [note, splitting, *([vocabulary.note] if vocabulary.note else [])]


def _genai(source: Original, out: Path, type: str) -> list[str]:
    from twinloop.models.genai import write_genai

    if source.exported is None:
        raise UserError(f"{source.version} is a checkpoint; name a version that was exported, such as champion")
    _need("onnxruntime_genai", "onnxruntime-genai")
    write_genai(source.exported, out)
    prompts = [exchange.prompt for exchange in source.exchanges]
    with _run_by("onnxruntime-genai", source):
        return [_same_answers(source, source.exported, out, prompts), _genai_tokenizer(source, out)]


def _peft(source: Original, out: Path, type: str) -> list[str]:
    _need("transformers", "transformers")
    _need("peft", "peft")
    shutil.copytree(source.checkpoint / ADAPTER, out, dirs_exist_ok=True)
    shutil.copytree(source.checkpoint / BASE, out / BASE)
    _suppress_padding(source, out / BASE)
    _change_json(out / "adapter_config.json", base_model_name_or_path=BASE)
    source.tokenizer.save(out, max_length=source.config.max_position_embeddings)
    (out / "README.md").write_text(source.card(_PEFT_CODE, library="peft"), encoding="utf-8")
    with _run_by("peft", source):
        base = _transformers_model(out / BASE, _WRITES)
        _check_stop_ids(source, base)
        logits = _logits_of(_with_adapter(base, out))
        return [_agrees(source, logits, "in peft", suppresses_padding=True), _same_ids(source, out)]


_WRITES, _CLASSIFIES = "AutoModelForCausalLM", "AutoModelForSequenceClassification"


def _auto_class(config: DecoderConfig) -> str:
    """The class of `transformers` that loads such a network."""
    return _CLASSIFIES if config.labels else _WRITES


_CODE = """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file is
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)"""
_PEFT_CODE = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file is
tokenizer = AutoTokenizer.from_pretrained(folder)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder + "/base"), folder)"""


def _load_huggingface(out: Path) -> str:
    from twinloop.models.directory import load_config

    return f'{_auto_class(load_config(out))}.from_pretrained("{out}"), AutoTokenizer.from_pretrained("{out}")'


def _load_peft(out: Path) -> str:
    return f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{out / BASE}"), "{out}")'


FORMATS: Mapping[str, Format] = {
    "huggingface": Format(_huggingface, _load_huggingface, ("f32", "bf16", "f16")),
    "gguf": Format(_gguf, lambda out: f"llama-server --jinja -m {out}/*.gguf", ("f16", "f32", "bf16", "q8_0", "q4_0")),
    "genai": Format(_genai, lambda out: f'onnxruntime_genai.Model("{out}")'),
    "peft": Format(_peft, _load_peft),
}


# --- compared -----------------------------------------------------------------------------------------------------


def _suppress_padding(source: Original, folder: Path) -> None:
    """Let `transformers` never choose what is no token: rows of the vocabulary that many models have beyond theirs."""
    from twinloop.models.directory import GENERATION_CONFIG

    if padding := range(source.tokenizer.vocab_size, source.config.vocab_size):
        _change_json(folder / GENERATION_CONFIG, suppress_tokens=list(padding))


def _change_json(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | fields
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _agrees(
    source: Original, logits: Logits, how: str, *, at_least: float = 1.0, suppresses_padding: bool = False
) -> str:
    """What was compared, in words. Raises UserError where a smaller share of greedy tokens is the network's.

    suppresses_padding: whether the form itself says which rows of the vocabulary are no tokens. Of one that does not,
    none may be chosen.
    """
    from twinloop.evaluation.parity import compare_exchanges

    size = source.tokenizer.vocab_size
    found = compare_exchanges(source.reference.logits, logits, source.exchanges, vocab_size=size, name=how)
    words = f"{found.alike} of {found.tokens} greedy tokens are the network's ({how})"
    if found.logit_gap == math.inf:
        raise UserError(f"{source.version}: not handed over: some of its logits are no numbers ({how}); report this")
    if found.padding and not suppresses_padding:
        raise UserError(
            f"{source.version}: not handed over: {found.padding} of {found.tokens} greedy tokens are rows of the "
            f"vocabulary that are no tokens ({how}); export it --to huggingface, which says so"
        )
    if found.alike < at_least * found.tokens:
        advice = "choose a --type with more bits" if at_least < 1 else "report this"
        raise UserError(f"{source.version}: not handed over: only {words}; {advice}")
    return f"{words}, largest logit gap {found.logit_gap:.2g}"


@contextmanager
def _run_by(library: str, source: Original) -> Iterator[None]:
    """Whatever a library raises that we do not install is that it does not run this form."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{source.version}: not handed over: {library} does not run it: {one_line(error)}") from error


def _same_ids(source: Original, out: Path) -> str:
    """Whether `transformers` reads the texts and prompts as the same ids. Raises UserError where it does not."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(out)

    def encode(text: str) -> list[int]:
        return list(theirs.encode(text, add_special_tokens=False))

    def encode_prompt(messages: list[Message]) -> list[int]:
        return list(theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False))

    # Of some families, such as Qwen2, transformers (5.23) builds the splitting itself, whatever tokenizer.json says.
    reader = f"transformers reads the tokenizer as {type(theirs).__name__}, which"
    return _ids_note(source, encode, encode_prompt, "transformers", reader)


def _ids_note(
    source: Original,
    encode: Callable[[str], list[int]],
    encode_prompt: Callable[[list[Message]], list[int]],
    tool: str,
    reader: str,
) -> str:
    """How a tool's ids are like ours, for people. reader: what makes them, as the start of a sentence.

    Raises UserError where they are others, unless only for text that is not in Unicode's form NFC: Qwen's models were
    trained with such text normalised, which some tools do without being asked, and others never.
    """

    def differing(text: str) -> str | None:
        messages: list[Message] = [{"role": "user", "content": text.strip()}]
        if encode(text) != source.tokenizer.encode(text):  # first: where it differs, so does every chat
            return "text"
        return "its chat template" if encode_prompt(messages) != source.tokenizer.encode_prompt(messages) else None

    if what := differing(normalize("NFC", AWKWARD)):
        raise UserError(
            f"{source.version}: not handed over: {reader} makes other tokens of {what} than tokenizer.json says; "
            "another --to may fit it"
        )
    note = f"text and chat template give the same tokens in {tool}"
    return f"{note}, but for text that is not in Unicode's form NFC" if differing(AWKWARD) else note


def _need(module: str, package: str) -> None:
    if find_spec(module) is None:
        raise UserError(f"export: this form is compared in {package} before it is handed over; install {package}")


def _same_answers(source: Original, exported: Path, out: Path, prompts: Sequence[list[int]]) -> str:
    """Raises UserError where genai's greedy tokens are not those of our engine with the same weights."""
    import numpy as np
    import onnxruntime_genai

    from twinloop.serving.engine import Engine
    from twinloop.serving.engine.sampling import SamplingParams

    engine = Engine.load(exported, slots=1)
    prompts = [prompt for prompt in prompts if len(prompt) < engine.max_length]
    longest = max(len(exchange.answer) for exchange in source.exchanges)
    stops = source.tokenizer.stop_ids
    expected = engine.generate(prompts, SamplingParams(max_tokens=longest, stop=stops))
    model = onnxruntime_genai.Model(str(out))
    compared = 0
    for prompt, answer in zip(prompts, expected, strict=True):
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(max_length=min(len(prompt) + longest, engine.max_length))
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(np.array(prompt, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        found = generator.get_sequence(0)[len(prompt) :].tolist()
        if any(token >= source.tokenizer.vocab_size for token in found):
            raise UserError(
                f"{source.version}: not handed over: onnxruntime-genai writes rows of the vocabulary that are no "
                "tokens; export it --to huggingface, which says so"
            )
        if found != [token for token in answer.tokens if token not in stops]:  # genai (0.18) keeps no stop token
            raise UserError(
                f"{source.version}: not handed over: onnxruntime-genai chooses other tokens than our engine"
            )
        compared += len(found)
    return f"{compared} of {compared} greedy tokens are those of our engine (in onnxruntime-genai)"


def _genai_tokenizer(source: Original, out: Path) -> str:
    """What to tell of genai's own tokenizer. Raises UserError where it makes other tokens."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(out))
    try:
        theirs = onnxruntime_genai.Tokenizer(model)
    except Exception as error:  # of its C++ code: a regular expression that it cannot compile
        reason = one_line(error).splitlines()[0]
        return (
            f"onnxruntime_genai.Tokenizer does not read this tokenizer ({reason}); "
            "make the tokens with `tokenizers` or transformers.AutoTokenizer and give them to append_tokens"
        )

    def encode(text: str) -> list[int]:
        return list(theirs.encode(text).tolist())

    def encode_prompt(messages: list[Message]) -> list[int]:
        return encode(theirs.apply_chat_template(json.dumps(messages), add_generation_prompt=True))

    return _ids_note(source, encode, encode_prompt, "onnxruntime_genai.Tokenizer", "onnxruntime_genai.Tokenizer")


def _transformers_model(out: Path, auto_class: str) -> Any:
    import torch
    import transformers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with _without_deprecations():
        return getattr(transformers, auto_class).from_pretrained(out, dtype=torch.float32)


def _with_adapter(base: Any, out: Path) -> Any:
    from peft import PeftModel

    with _without_deprecations():  # PEFT 0.21 and transformers 5.23 warn of each other
        return PeftModel.from_pretrained(base, out)


def _check_stop_ids(source: Original, model: Any) -> None:
    """Raises UserError where `generate` of transformers would end an answer at other tokens than our engine."""
    found = model.generation_config.eos_token_id
    ids = set(found) if isinstance(found, list) else {found}
    if ids != set(source.tokenizer.stop_ids):
        named = " and ".join(map(str, sorted(ids, key=str)))
        wanted = " and ".join(map(str, sorted(source.tokenizer.stop_ids)))
        raise UserError(
            f"{source.version}: not handed over: transformers ends answers at token {named}, not at {wanted}; "
            "report this"
        )


@contextmanager
def _without_deprecations() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _logits_of(model: Any) -> Logits:
    import torch

    model.eval()

    def logits(tokens: Sequence[int]) -> Any:
        ids = torch.tensor([list(tokens)])
        with torch.no_grad():
            # By itself, a head is asked for the last token alone.
            found = model.score(model.model(ids).last_hidden_state) if hasattr(model, "score") else model(ids).logits
            return found[0].float().numpy()

    return logits
