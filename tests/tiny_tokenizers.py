"""Small tokenizers in the styles of published models, and model directories with their chat templates."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEMPLATES = Path(__file__).parent / "models" / "templates"

CORPUS = [
    f"P-{n % 7}: damaged items reported within {n % 30} days are eligible.\nThe order was damaged, {n} days old.\n\n"
    'user assistant system model {"eligible": true} [INST] think é 🙂'
    for n in range(60)
]
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HEADERS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
QWEN = tuple(f"<{slash}{name}>" for name in ("tool_call", "tool_response", "think") for slash in ("", "/"))
PHI = ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>")
SENTENCEPIECE = ("<unk>", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>")

# Of each style: how text is split, its special tokens, and added tokens that are plain.
BYTE_LEVEL: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "gpt2": ((GPT2,), CHATML, ()),
    "smollm2": ((r"\p{N}", GPT2), CHATML, ()),
    "qwen": ((LLAMA3.replace("{1,3}", ""),), CHATML, QWEN),
    "llama3": ((LLAMA3,), HEADERS, ()),
    "deepseek": ((LLAMA3,), DEEPSEEK, ("<think>", "</think>")),
    "phi": ((GPT2,), PHI, ()),
}


@cache
def byte_level(style: str) -> Tokenizer:
    patterns, special, plain = BYTE_LEVEL[style]
    tokenizer = Tokenizer(models.BPE(ignore_merges=style == "llama3"))
    tokenizer.normalizer = normalizers.NFC() if style == "qwen" else None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    in_vocabulary = [] if style in ("qwen", "llama3") else list(special)
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=in_vocabulary, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    strips = style == "phi"  # Phi-3's swallow the white space after them
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, rstrip=strips) for token in special]
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    if style == "llama3":
        begin = special[0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    return tokenizer


@cache
def sentencepiece(style: str) -> Tokenizer:
    """style: llama2 (a prefix before every text), metaspace (before the first), gemma (none)."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(split=style != "gemma")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    tokens = [*SENTENCEPIECE, *bytes_, *pieces]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: id for id, token in enumerate(tokens)},
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    end = [decoders.Strip(" ", 1, 0)]
    if style == "llama2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif style == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        end = []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *end])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SENTENCEPIECE])
    if style == "gemma":
        tokenizer.add_tokens([AddedToken(each, special=False, normalized=False) for each in ("\n\n", "▁▁", "<b>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def tokenizer_of(style: str) -> Tokenizer:
    return byte_level(style) if style in BYTE_LEVEL else sentencepiece(style)


def write_model(folder: Path, style: str, template: str, stop_tokens: tuple[str, ...] = (), **settings: Any) -> Path:
    """A directory as published: tokenizer.json, its settings, the template in a file, the tokens that end answers."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_of(style)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(template)
    if stop_tokens:
        ids = [tokenizer.token_to_id(token) for token in stop_tokens]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return folder


PUBLISHED: dict[str, tuple[str, str, tuple[str, ...], dict[str, str]]] = {
    # template: (tokenizer, its file, what ends answers, tokens by name)
    "smollm2": ("smollm2", "smollm2", (), {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}),
    "qwen2.5": ("qwen", "qwen2.5", ("<|im_end|>", "<|endoftext|>"), {"eos_token": "<|im_end|>"}),
    "qwen3": ("qwen", "qwen3", ("<|im_end|>", "<|endoftext|>"), {"eos_token": "<|im_end|>"}),
    "llama3": (
        "llama3", "llama3", ("<|end_of_text|>", "<|eot_id|>"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    ),
    "gemma3": ("gemma", "gemma3", ("</s>", "<end_of_turn>"), {"bos_token": "<s>", "eos_token": "</s>"}),
    "mistral": ("metaspace", "mistral", (), {"bos_token": "<s>", "eos_token": "</s>"}),
    "llama2": ("llama2", "llama2", (), {"bos_token": "<s>", "eos_token": "</s>"}),
    "phi": ("phi", "generation", ("<|end|>", "<|endoftext|>"), {"eos_token": "<|endoftext|>"}),
}  # fmt: skip


def published(name: str, folder: Path) -> Path:
    style, file, stops, tokens = PUBLISHED[name]
    return write_model(folder, style, (TEMPLATES / f"{file}.jinja").read_text(), stops, **tokens)
