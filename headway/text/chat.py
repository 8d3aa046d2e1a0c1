"""Chat templates: a model's own Jinja template, in a sandbox, with the helpers that templates expect."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headway.text.errors import TextError


class ChatTemplate:
    """One compiled template; `render` gives the text of a prompt that asks for the assistant's next message."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        self._special_tokens = special_tokens
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise TextError(f"the model's chat template is not valid: {error}") from None

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """Messages are (role, content), oldest first. Raises TextError when the template refuses them."""
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            return self._template.render(
                messages=turns, add_generation_prompt=True, tools=None, documents=None, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise TextError(f"the model's chat template refuses these messages: {error}") from None


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """The template of a model folder: chat_template.jinja, else the one in tokenizer_config.json, else None."""
    config = _read_json(folder / "tokenizer_config.json")
    special_tokens = _special_tokens(_read_json(folder / "special_tokens_map.json") | config)
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else _default(config.get("chat_template"))
    return None if source is None else ChatTemplate(source, special_tokens)


def bos_token(folder: Path) -> str | None:
    """The text of the token that starts every sequence, where the folder names one."""
    merged = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    return _special_tokens(merged).get("bos_token")


def _default(value: Any) -> str | None:
    """Some configs list several named templates instead of one."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """{"bos_token": "<s>", …}; a token is written as its text or as {"content": text}."""
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TextError(f"{path} is not valid JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Jinja's own filter escapes HTML, which a model must not see."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


class _GenerationTag(Extension):
    """{% generation %} … {% endgeneration %} marks the assistant's text for training; here it only passes it on."""

    tags = {"generation"}  # noqa: RUF012 - declared as an instance attribute by jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
