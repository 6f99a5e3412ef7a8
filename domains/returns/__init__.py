"""The ready-made domain of the running example: return decisions under a policy."""

from twinloop.domains.returns.domain import domain

__all__ = ["domain"]
