"""The layers that may own a failure, and what their owner does first: one list for gate, router and server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Owner:
    """Who looks at a failure, and what they do first."""

    name: str
    next_action: str


RETRIEVAL = Owner("retrieval index", "refresh retrieval document and rerun policy evals")
FORMAT = Owner("prompt contract or SFT data", "tighten output contract and rerun format evals")
SIDE_EFFECT = Owner("preference data and safety eval", "add preference pairs and rerun safety evals")
LATENCY = Owner("inference serving", "profile queueing and KV-cache pressure")
RELEASE = Owner("evaluation gate and rollback", "block or roll back the release")
TRAINING = Owner("training data and verifiable rewards", "add data of this kind, or train longer, and rerun")
EXPORT = Owner("ONNX export", "compare the exported model with the network, layer by layer")
UNKNOWN = Owner("investigate with a labeled trace", "label the trace")
