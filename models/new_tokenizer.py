"""The tokenizer of a new model: learned from its corpus, with the roles of a chat as special tokens."""

from __future__ import annotations

import random
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from twinloop.common.errors import UserError
from twinloop.models.tokenizer import ChatTokenizer, valid_unicode

PAD, BOS, SYSTEM, USER, ASSISTANT, END = (
    "<|pad|>", "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
)  # fmt: skip
SPECIAL_TOKENS = (PAD, BOS, SYSTEM, USER, ASSISTANT, END)
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256

# The space is attached to the end of a word, so "damaged" is one token in every position; each digit is its own token,
# because comparison of numbers generalises over digits and not over whole numbers. So is each space beyond the first
# before a number: right-aligned numbers then have as many tokens each.
PRE_TOKENS = r"[A-Za-z_]+ ?|\d|(?<= ) (?= *\d)|[^A-Za-z_\d]+? (?= +\d)|[^A-Za-z_\d]+"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role ' + message['role'] | string + ' is not one of system, user, assistant') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Merges of a small vocabulary no longer change long before this; of a larger corpus a sample is taken.
TRAINING_CHARACTERS = 16_000_000


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> ChatTokenizer:
    """Learn merges from `texts`; the same texts give the same tokenizer, byte for byte.

    A corpus that has too little repetition gives fewer than `vocab_size` tokens: read the result's own `vocab_size`.
    Raises UserError when there is no text, or a vocabulary too small for the 256 bytes and the special tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"tokenizer: vocab_size {vocab_size} is too small; the 256 bytes alone need {MIN_VOCAB_SIZE}")
    sample = _sample([clean for text in texts if (clean := valid_unicode(text))])
    if not sample:
        raise UserError("tokenizer: the corpus holds no text to train on; give at least one non-empty record")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    return ChatTokenizer(tokenizer, settings)


def _sample(texts: list[str]) -> list[str]:
    """About TRAINING_CHARACTERS of the corpus, from all over it and the same ones each time."""
    share = TRAINING_CHARACTERS / max(1, sum(map(len, texts)))
    return texts if share >= 1 else random.Random(0).sample(texts, max(1, round(share * len(texts))))
