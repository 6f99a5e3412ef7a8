"""The files that say which of a tokenizer's tokens have a meaning of their own: settings, templates, stop tokens."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from twinloop.common.errors import UserError
from twinloop.models.vocabulary import parsed, read_source

SETTINGS = "tokenizer_config.json"
_OLD_NAMES = "special_tokens_map.json"
_LISTED = ("additional_special_tokens", "extra_special_tokens")
_NAMED = frozenset(f"{name}_token" for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask"))
_TEMPLATE, _MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"


def read_settings(directory: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json, with what older and newer exporters keep beside it.

    Raises UserError where a file is missing or broken.
    """
    settings = _read_json(directory / SETTINGS)
    _check_tokens(settings, directory / SETTINGS)
    if _has_old_names(directory, settings):
        named = _read_json(directory / _OLD_NAMES).items()
        settings |= {name: text for name, value in named if isinstance(text := token_text(value), str)}
    return settings | _templates(directory)


def _check_tokens(settings: Mapping[str, Any], file: Path) -> None:
    """Raise UserError for names of tokens that are none."""
    for name, value in settings.items():
        if name in _NAMED and not isinstance(token_text(value), str | None):
            raise UserError(f"{file}: {name} is no token, which is a text or an object with content")
        if name in _LISTED and not isinstance(value, list | Mapping | None):
            raise UserError(f"{file}: {name} is no list of tokens")


def limited(settings: Mapping[str, Any], max_length: int) -> dict[str, Any]:
    """Settings whose `model_max_length`, which clients cut their texts at, is no more than the model takes."""
    stated = settings.get("model_max_length")
    if isinstance(stated, (int, float)) and not isinstance(stated, bool) and 0 < stated < max_length:
        max_length = int(stated)
    limit = {"model_max_length": max_length}
    return limit | dict(settings) | limit


def settings_files(directory: Path) -> list[Path]:
    """The files that `read_settings` reads there. Raises UserError where tokenizer_config.json is missing or broken."""
    settings = _read_json(directory / SETTINGS)
    old_names = [directory / _OLD_NAMES] if _has_old_names(directory, settings) else []
    return [directory / SETTINGS, *old_names, *_template_files(directory).values()]


def read_stop_ids(directory: Path) -> tuple[int, ...]:
    """With which a model ends its answers. Generation settings come before those of the network."""
    return next(iter(stop_ids_by_file(directory).values()), ())


def stop_ids_by_file(directory: Path) -> dict[str, tuple[int, ...]]:
    """What each file that names stop tokens says, by its name. Raises UserError where one is broken."""
    found = {}
    for name in ("generation_config.json", "config.json"):
        if (directory / name).exists():
            ids = _read_json(directory / name).get("eos_token_id")
            ids = ids if isinstance(ids, list) else [ids]
            if ids := [id for id in ids if type(id) is int]:
                found[name] = tuple(ids)
    return found


def without_unused_tokens(
    source: str, settings: Mapping[str, Any], rows: int, stop_ids: Collection[int], *, where: str
) -> tuple[str, dict[str, Any]]:
    """tokenizer.json and its settings without special tokens beyond an embedding of so many rows that no chat holds.

    The text-only models of Gemma 3 have one, for the images that the others see. It is left in where the template, the
    stop tokens or a name such as `eos_token` need it: then the tokenizer does not fit the embedding.
    """
    data = parsed(source, where)
    named = {token_text(settings.get(f"{name}_token")) for name in ("bos", "eos", "pad", "unk")}
    written = json.dumps(settings.get("chat_template"), ensure_ascii=False)
    unused = [
        text
        for each in data["added_tokens"]
        if each["id"] >= rows
        and each["special"]
        and each["id"] not in stop_ids
        and (text := each["content"]) not in named
        and text not in data["model"]["vocab"]
        and json.dumps(text, ensure_ascii=False)[1:-1] not in written
    ]
    if not unused:
        return source, dict(settings)
    kept = [each for each in data["added_tokens"] if each["content"] not in unused]
    return json.dumps(data | {"added_tokens": kept}, indent=2, ensure_ascii=False), _without(settings, unused)


def named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """`eos_token` and so on, as a template may use them."""
    texts = {name: token_text(value) for name, value in settings.items() if name.endswith("_token")}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def extra_special_tokens(settings: Mapping[str, Any]) -> list[str]:
    values = [settings.get(name) or () for name in _LISTED]
    lists = [value.values() if isinstance(value, Mapping) else value for value in values]
    return [text for each in lists for value in each if isinstance(text := token_text(value), str)]


def token_text(value: Any) -> Any:
    """A token in tokenizer_config.json is text, or an object with `content`."""
    return value.get("content") if isinstance(value, Mapping) else value


def _without(value: Any, tokens: list[str]) -> Any:
    """Settings without these tokens, however deep they lie."""
    if isinstance(value, list):
        return [_without(each, tokens) for each in value if token_text(each) not in tokens]
    if isinstance(value, Mapping):
        return {name: _without(each, tokens) for name, each in value.items() if token_text(each) not in tokens}
    return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{error.filename}: no tokenizer to read here ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: it holds a {type(content).__name__}, not an object with settings")
    return content


def _has_old_names(directory: Path, settings: Mapping[str, Any]) -> bool:
    """Whether an old exporter wrote a file that is read in the place of what the settings say."""
    return "added_tokens_decoder" not in settings and (directory / _OLD_NAMES).exists()


def _template_files(directory: Path) -> dict[str, Path]:
    """The chat templates that are files of their own, by name."""
    files = {path.stem: path for path in sorted((directory / _MORE_TEMPLATES).glob("*.jinja"))}
    if (directory / _TEMPLATE).exists():
        files["default"] = directory / _TEMPLATE
    return files


def _templates(directory: Path) -> dict[str, Any]:
    """`chat_template` as files say it, which come before the settings."""
    sources = {name: read_source(path) for name, path in _template_files(directory).items()}
    return {"chat_template": settings_template(sources)} if sources else {}


def settings_template(sources: Mapping[str, str]) -> str | list[dict[str, str]]:
    """`chat_template` of tokenizer_config.json. sources: templates by name."""
    if sources.keys() == {"default"}:
        return sources["default"]
    return [{"name": name, "template": source} for name, source in sources.items()]
