"""A small chat model whose tokenizer splits text as one that llama.cpp knows."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from twinloop.models.config import DecoderConfig
from twinloop.models.decoder import Decoder
from twinloop.models.directory import save_model
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.training.weights import get_weights, new_decoder

QWEN_2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA_3 = QWEN_2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLITTING = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "qwen2": [pre_tokenizers.Split(Regex(QWEN_2), "isolated"), BYTES],
    "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), BYTES],
}
TEXTS = [
    "Order A10234 arrived damaged 12 days ago (policy P-7).",
    "It's the customer's order; she doesn't want it.\n\tReturn: 30 days",
    "Größe 你好 😀",
] * 4
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONVERSATION = [{"role": "user", "content": "Is order A10234 eligible?  It's 12 days."}]


def known_tokenizer(splitting: str = "smollm") -> ChatTokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=splitting == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(SPLITTING[splitting])
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in ("<|im_start|>", "<|im_end|>")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    }
    return ChatTokenizer(tokenizer, settings)


def make_model(folder: Path, tokenizer: ChatTokenizer, *, padding: int = 0, **changes: object) -> Decoder:
    """Write a model directory of random weights, norms and biases; answers vary. padding: rows of no token."""
    sizes = {
        "vocab_size": tokenizer.vocab_size + padding,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.stop_id,
        "pad_token_id": tokenizer.pad_id,
        "tie_word_embeddings": False,
    }
    config = DecoderConfig.model_validate(sizes | changes)
    network = new_decoder(config, seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            elif "embed" in name and not config.tie_word_embeddings:  # tied, it would only repeat its input
                parameter *= 20
    save_model(folder, config, get_weights(network), tokenizer)
    return network
