"""A context of stages that nobody watches."""

from __future__ import annotations

from pathlib import Path

from silent import Silent

from twinloop.domains.loader import load_domain
from twinloop.registry.tracking import CodeVersion
from twinloop.tasks.context import Context


def silent_context(
    project: Path,
    recipe: str,
    *,
    domain: str = "returns",
    recipe_path: Path | None = None,
    dataset_digest: str | None = "d41d8.dir",
) -> Context:
    return Context(
        project=project,
        recipe=recipe,
        recipe_path=recipe_path,
        loaded_domain=load_domain(domain, project),
        dataset_digest=dataset_digest,
        progress=Silent(),
        code=CodeVersion("a" * 40),
        checkpoint_every_s=1.0,
    )
