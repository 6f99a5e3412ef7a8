"""The engine: frozen weights, or a trainer's, that answer token by token out of an in-place key-value cache.

session      ONNX Runtime sessions, over an exported model or over tensors that someone else owns
kv_cache     the cache of all slots, and the bindings of a step to it
adapters     LoRA adapters beside the weights, one a sequence
runner       prefill, decode and scoring over the slots; one forward pass each
sampling     how the next token is chosen, and what a constraint on an answer is
grammar      constraints: answers that follow a JSON Schema
prefixes     what slots hold of earlier prompts, for new ones that begin alike
slots        the sequences in the slots: admission, prefill, decode steps, their ends. Both drivers below use it
drafts       several tokens of an answer from one pass, by a guess at them
engine       many prompts at once, for rollouts and evaluation
scheduler    many callers at once, for serving; `stream` is what each of them gets
"""

from twinloop.serving.engine.engine import Completion, Engine

__all__ = ["Completion", "Engine"]
