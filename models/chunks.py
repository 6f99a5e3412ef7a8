"""Pieces in which the packages above compute, and by which `twinloop.models.memory` counts their buffers."""

PREFILL_CHUNK = 256
"""Tokens of a long prompt that go through the network at once."""

LOGIT_CHUNK = 8192
"""Scored positions whose logits exist at once in training, at most."""

LOGIT_VALUES = 2**24
"""Logits that exist at once in training: a large vocabulary has fewer positions at once. 64 MiB of them, since from
32 MiB on glibc gives a block back whole; smaller ones leave holes between the activations."""


def logit_chunk(vocab_size: int) -> int:
    """Scored positions whose logits exist at once."""
    return max(1, min(LOGIT_CHUNK, LOGIT_VALUES // vocab_size))
