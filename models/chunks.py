"""Pieces in which the packages above compute, and by which `twinloop.models.memory` counts their buffers."""

PREFILL_CHUNK = 256
"""Tokens of a long prompt that go through the network at once."""

LOGIT_CHUNK = 8192
"""Scored positions whose logits exist at once in training."""
