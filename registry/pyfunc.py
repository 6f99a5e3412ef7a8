"""A registered exported model as MLflow's `python_function`: `mlflow.pyfunc.load_model("models:/returns@champion")`.

The engine that serves runs in the caller's process. A domain that makes decisions takes requests, as a DataFrame or a
list of dicts in its own form, and gives a DataFrame with the columns decision, escalated and reasons; any other takes
conversations (`messages`) and gives texts. A reward model takes conversations with an answer, and gives scores.

Every byte is verified before it is loaded: by the digest that the project's MLflow database holds, where the files lie
in a project's `mlruns/`, else by the one in the MLmodel. A domain that is a file, and the documents that decisions are
based on, are the project's: found where the files lie in it, else named by `model_config={"project": "/path"}`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json

from twinloop.common.errors import UserError
from twinloop.domains.domain import Domain, Message
from twinloop.domains.loader import load_domain
from twinloop.models.label_tokenizer import load_answering
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.records import DATA_FILE
from twinloop.registry.documents import open_documents
from twinloop.registry.flavours import MAX_TOKENS
from twinloop.registry.logged_models import MODEL_FOLDER
from twinloop.registry.snapshot import Version, read_snapshot
from twinloop.registry.tracking import Mlruns
from twinloop.registry.version_files import version_error
from twinloop.serving.decisions import DecisionResponse, DecisionService, ModelInfo, PendingDecision
from twinloop.serving.engine import Engine
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.serving.engine.scheduler import Scheduler
from twinloop.serving.errors import describe_validation, field_descriptions
from twinloop.serving.generation import TextStream
from twinloop.serving.knowledge.documents import DocumentStore

SLOTS = 8
"""How many requests are answered at once."""


class DecisionModel:
    """Requests in, decisions out."""

    def __init__(self, service: DecisionService, request: type[BaseModel]):
        self._service = service
        self._request = request

    def predict(self, model_input: pd.DataFrame | list[dict[str, Any]], params: object = None) -> pd.DataFrame:
        """A row for each request. Raises UserError for one that has not the domain's form, before any is answered."""
        requests = [self._validated(number, fields) for number, fields in enumerate(_rows(model_input))]
        responses: list[DecisionResponse] = []
        for start in range(0, len(requests), SLOTS):
            pending: list[PendingDecision] = [self._service.begin(each) for each in requests[start : start + SLOTS]]
            responses += [each.finish() for each in pending]
        return pd.DataFrame(
            {
                "decision": [response.decision for response in responses],
                "escalated": [response.escalated for response in responses],
                "reasons": [[reason.model_dump() for reason in response.reasons] for response in responses],
            }
        )

    def _validated(self, number: int, fields: Mapping[str, Any]) -> BaseModel:
        try:
            return self._request.model_validate_json(to_json(fields))
        except ValidationError as error:
            problem, _ = describe_validation(error.errors(), field_descriptions(self._request))
            raise UserError(f"row {number}: {problem}") from None


class ChatModel:
    """Conversations in, texts out."""

    def __init__(self, scheduler: Scheduler, tokenizer: ChatTokenizer, max_tokens: int):
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens

    def predict(
        self, model_input: pd.DataFrame | list[dict[str, Any]], params: Mapping[str, Any] | None = None
    ) -> list[str]:
        """The greedy answer to each conversation. Raises UserError for one without messages or of too many tokens."""
        max_tokens = int((params or {}).get(MAX_TOKENS, self._max_tokens))
        prompts = [self._prompt(number, fields) for number, fields in enumerate(_rows(model_input))]
        texts: list[str] = []
        for start in range(0, len(prompts), SLOTS):
            streams = [self._ask(prompt, max_tokens) for prompt in prompts[start : start + SLOTS]]
            texts += ["".join(stream) for stream in streams]
        return texts

    def _prompt(self, number: int, fields: Mapping[str, Any]) -> list[int]:
        messages: list[Message] = fields.get("messages") or []
        if not messages:
            raise UserError(f"row {number}: messages: is required: a list of {{role, content}}")
        prompt = self._tokenizer.encode_prompt(messages)
        if len(prompt) >= self._scheduler.max_length:
            limit = self._scheduler.max_length - 1
            raise UserError(f"row {number}: messages: {len(prompt)} tokens, this model reads at most {limit}")
        return prompt

    def _ask(self, prompt: list[int], max_tokens: int) -> TextStream:
        available = min(max_tokens, self._scheduler.max_length - len(prompt))
        params = SamplingParams(max_tokens=available, stop=self._tokenizer.stop_ids)
        return TextStream(self._scheduler.submit(prompt, params), self._tokenizer, started=0.0)


class RewardModel:
    """Conversations in, the scores of their last answers out."""

    def __init__(self, scheduler: Scheduler, tokenizer: ChatTokenizer):
        self._scheduler = scheduler
        self._tokenizer = tokenizer

    def predict(self, model_input: pd.DataFrame | list[dict[str, Any]], params: object = None) -> list[float]:
        """Raises UserError for a conversation that does not end with an answer, or of too many tokens."""
        texts = [self._text(number, fields) for number, fields in enumerate(_rows(model_input))]
        scores: list[float] = []
        for start in range(0, len(texts), SLOTS):
            streams = [
                self._scheduler.submit(text, SamplingParams(max_tokens=1)) for text in texts[start : start + SLOTS]
            ]
            scores += [float(stream.prompt_logits()[0]) for stream in streams]
        return scores

    def _text(self, number: int, fields: Mapping[str, Any]) -> list[int]:
        try:
            tokens = self._tokenizer.encode_answered(fields.get("messages") or [])
        except UserError as error:
            raise UserError(f"row {number}: {error}") from None
        if len(tokens) >= self._scheduler.max_length:
            limit = self._scheduler.max_length - 1
            raise UserError(f"row {number}: messages: {len(tokens)} tokens, this model reads at most {limit}")
        return tokens


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> DecisionModel | ChatModel | RewardModel:
    """What MLflow calls. path: the folder with the MLmodel. Raises UserError where it cannot be verified or loaded."""
    from mlflow.models import Model

    folder = Path(path).resolve()
    flavour = Model.load(str(folder)).flavors["python_function"]
    name, model = flavour["model_name"], folder / MODEL_FOLDER
    home = _home(folder)
    version = _version(home, name, model) if home else None
    digest = version.digest if version else flavour["manifest_digest"]
    if problem := version_error(model, digest):
        raise UserError(f"{version or folder}: {problem} in {model}; it is not used")
    named = (model_config or {}).get("project")
    project = Path(named) if named else home
    domain = _domain(flavour["domain"], project, about=str(version or folder))
    scheduler = Scheduler(Engine.load(model, slots=SLOTS))
    tokenizer = load_answering(model)
    if tokenizer.kind == "reward":
        return RewardModel(scheduler, tokenizer)
    if domain.request is None:
        return ChatModel(scheduler, tokenizer, domain.max_answer_tokens)
    about = ModelInfo(name=name, version=str(version.version) if version else "", digest=digest)
    documents = _documents(project, folder, name, domain, version.dataset if version else DATA_FILE)
    return DecisionModel(DecisionService(scheduler, tokenizer, documents, about, domain), domain.request)


def _home(folder: Path) -> Path | None:
    """The project in whose mlruns/artifacts/<recipe>/models/<id>/artifacts this is."""
    if len(folder.parents) < 6 or (folder.parents[3].name, folder.parents[4].name) != ("artifacts", "mlruns"):
        return None
    return folder.parents[5]


def _version(project: Path, name: str, model: Path) -> Version | None:
    """As the project's registry has it; None where it has none there."""
    mlruns = Mlruns(project / "mlruns")
    found = read_snapshot(mlruns, name).versions.values()
    return next((version for version in found if version.path.resolve() == model), None)


def _domain(name: str, project: Path | None, *, about: str) -> Domain:
    try:
        return load_domain(name, project or Path.cwd()).domain
    except UserError as error:
        hint = "" if project else '; name its project: load_model(…, model_config={"project": "/path/to/it"})'
        raise UserError(f"{about}: its domain {name} cannot be loaded ({error}){hint}") from None


def _documents(project: Path | None, folder: Path, name: str, domain: Domain, dataset: str) -> DocumentStore:
    """The project's, as the server has them; none for a domain that retrieves none."""
    if project is not None:
        return open_documents(project, name, domain, dataset)
    if domain.passages:
        raise UserError(
            f"{name}: its decisions are based on documents of its project, and these files are not in one; "
            'name it: load_model(…, model_config={"project": "/path/to/it"})'
        )
    return DocumentStore(folder / "no documents", domain.check_document)  # a missing file is an empty store


def _rows(model_input: pd.DataFrame | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The requests as JSON; a cell without a value is a field that was left out."""
    if isinstance(model_input, pd.DataFrame):
        model_input = [
            {name: value for name, value in row.items() if not _is_missing(value)}
            for row in model_input.to_dict("records")
        ]
    return [{name: _plain(value) for name, value in row.items()} for row in model_input]


def _is_missing(value: object) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def _plain(value: Any) -> Any:
    """Without numpy's types, which MLflow and pandas put into what they check."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(each) for each in value]
    return value
