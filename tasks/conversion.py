"""A registered version in the forms that other tools load. A form that would answer differently is not handed over.

    huggingface   a model directory, for `transformers`
    gguf          one file, for llama.cpp
    genai         the exported model that is served, for onnxruntime-genai
    peft          the adapter and the base that it was trained on, for `peft`

Every byte of the version is verified first. The form is made beside its place, read back, and compared with the trained
network along greedy answers to the domain's example and some cases of its data; then it is renamed into its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from twinloop.common.errors import UserError
from twinloop.common.files import folder_beside, fsync
from twinloop.domains.domain import Domain, Message
from twinloop.domains.examples import example_messages, example_request
from twinloop.models.directory import is_adapted
from twinloop.registry.artifact import MANIFEST, Manifest
from twinloop.registry.cards import model_card
from twinloop.registry.champion import load_served_domain
from twinloop.registry.snapshot import Version
from twinloop.registry.version_files import version_error
from twinloop.registry.versions import Registry
from twinloop.tasks.conversion_forms import FORMATS, Original

COMPARED_CASES = 7
"""Beside the domain's example."""
COMPARED_TOKENS = 32
"""Of an answer, at most."""


@dataclass(frozen=True)
class Converted:
    """files: their sizes in bytes, by their names in the directory. notes: what was compared, and what to know."""

    version: Version
    files: Mapping[str, int]
    notes: Sequence[str]
    load: str


def convert_version(
    project: Path, registry: Registry, name: str, form_name: str, out: Path, *, type: str | None = None
) -> Converted:
    """Write a version into `out`, which appears whole or not at all.

    name: a number, or an alias such as champion. type: of the weights. Raises UserError where the form, its type or the
    version is not known, `out` is in use, or the form would answer differently.
    """
    form, place = FORMATS.get(form_name), out.resolve()
    if form is None:
        raise UserError(f"export: {form_name!r} is not one of {', '.join(FORMATS)}")
    if type is not None and type not in form.types:
        choice = f"one of {', '.join(form.types)}" if form.types else "not chosen here: its weights stay as they are"
        raise UserError(f"export: --type {type} does not fit {form_name}; it is {choice}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"export: {out} is not an empty directory; remove it or choose another one")
    version = registry.named(name)
    checkpoint = find_checkpoint(registry, version)
    if form_name == "peft" and not is_adapted(checkpoint.path):
        raise UserError(f"{version} has no adapter; --to huggingface gives all of its weights")
    source = _open(project, registry, version, checkpoint)
    if source.config.labels and form_name in ("gguf", "genai"):
        gives = " or ".join(source.config.labels)
        raise UserError(
            f"export: {version} gives {gives} and no text: {form_name} has no form of it, huggingface has one"
        )
    try:
        with folder_beside(place) as beside:
            made = beside / "made"
            made.mkdir()
            notes = form.make(source, made, type or next(iter(form.types), ""))
            paths = sorted(made.rglob("*"))
            files = {str(path.relative_to(made)): path.stat().st_size for path in paths if path.is_file()}
            for path in [*paths, made]:
                fsync(path)
            made.replace(place)
    except BlockingIOError:
        raise UserError(f"export: another process writes {out}; wait for its end, or choose another folder") from None
    fsync(place.parent)
    return Converted(version, files, notes, form.load(out))


def find_checkpoint(registry: Registry, version: Version) -> Version:
    """The trained network that a version was exported from, or the version itself where it is a checkpoint.

    Every byte is verified. Raises UserError where it is not there, or was changed.
    """
    verified = registry.verify(version)
    if not version.exported:
        return verified
    if checkpoint := registry.checkpoint_of(version):
        return registry.verify(checkpoint)
    raise UserError(f"{version}: the checkpoint that it was made from is not in MLflow any more; run its recipe again")


def _open(project: Path, registry: Registry, version: Version, checkpoint: Version) -> Original:
    from twinloop.evaluation.parity import greedy_exchanges
    from twinloop.tasks.forms import NetworkForm
    from twinloop.training.weights import load_decoder

    network = load_decoder(checkpoint.path)
    reference = NetworkForm("network", checkpoint.path, checkpoint.digest, network, threads=1)
    domain = load_served_domain(version, project).domain
    prompts = _prompts(project, registry.lineage(version), domain)
    # The answers are cut where the positions end; a prompt that leaves one of them has a token to compare.
    positions = network.config.max_position_embeddings
    prompts = [prompt for prompt in prompts if len(reference.tokenizer.encode_prompt(prompt)) < positions]
    if not prompts:
        raise UserError(f"{version}: the example of its domain has more tokens than it reads: nothing can be compared")

    return Original(
        version=version,
        checkpoint=checkpoint.path,
        exported=version.path if version.exported else None,
        config=network.config,
        reference=reference,
        exchanges=greedy_exchanges(reference, prompts, COMPARED_TOKENS),
        card=partial(model_card, registry, version),
    )


def _prompts(project: Path, chain: Sequence[Version], domain: Domain) -> list[list[Message]]:
    """The domain's example, and cases of the data that the version was trained with, where they are there as they were.

    chain: the version and what it was made from.
    """
    from twinloop.records.validated import has_records, read_records

    prompts = [_example(domain)]
    inputs = [Manifest.read(path).inputs for each in chain if (path := each.path / MANIFEST).is_file()]
    data = next((each["data"] for each in inputs if "data" in each), None)
    if data is not None and data.stage is not None and data.key is not None:
        folder = project / "artifacts" / data.stage / data.key
        if has_records(folder, "cases") and version_error(folder, data.digest) is None:
            prompts += [case["prompt"] for case in read_records(folder, "cases")[:COMPARED_CASES]]
    return prompts


def _example(domain: Domain) -> list[Message]:
    if domain.request is None:
        return example_messages(domain)
    request = domain.request.model_validate_json(json.dumps(example_request(domain)))
    return domain.build_prompt(request, domain.example_documents[: domain.passages])
