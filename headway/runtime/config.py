"""Config of a service: a frozen dataclass filled from defaults, TOML, environment and flags, in rising precedence.

A field's help text and choices come from `option(...)`. An unknown key or a bad value ends the start with one line.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")

BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
ACCEPTED: dict[type, tuple[type, ...]] = {int: (int, str), float: (int, float, str), str: (str,)}


class ConfigError(Exception):
    """One line that says which setting is wrong and what it may be."""


def option(default: Any, help: str, *, choices: Sequence[str] = ()) -> Any:
    """A dataclass field with its help text."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": tuple(choices)})


def load_config(cls: type[Config], program: str, argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """Fill `cls` for `program` ("headway-router" reads HEADWAY_ROUTER_PORT and --port). Raises ConfigError."""
    flags = vars(_parser(cls, program).parse_args(argv))
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    prefix = program.upper().replace("-", "_") + "_"
    file = flags.pop("config") or environ.get(prefix + "CONFIG")
    values: dict[str, Any] = _from_toml(Path(file), fields) if file else {}
    for key, text in environ.items():
        name = key.removeprefix(prefix).lower()
        if key.startswith(prefix) and name != "config":
            if name not in fields:
                raise ConfigError(f"environment variable {key} names no setting of {program}; see {program} --help")
            values[name] = text
    values.update({name: text for name, text in flags.items() if text is not None})
    types = typing.get_type_hints(cls)
    try:
        return cls(**{name: _convert(name, value, types[name], fields[name]) for name, value in values.items()})
    except ValueError as error:
        raise ConfigError(str(error)) from None


def load_or_exit(cls: type[Config], program: str) -> Config:
    """load_config from the process's own arguments; prints the one line and exits with 2 when it fails."""
    try:
        return load_config(cls, program, sys.argv[1:], os.environ)
    except ConfigError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)


def _parser(cls: type[Any], program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description=(cls.__doc__ or "").strip(), allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of these settings")
    for field in dataclasses.fields(cls):
        text = field.metadata.get("help", "")
        shown = f"{text} (default: {field.default!r})"
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, dest=field.name, metavar="VALUE", help=shown.replace("%", "%%"))
    return parser


def _from_toml(path: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not valid TOML: {error}") from None
    for name in values:
        if name not in fields:
            known = ", ".join(sorted(fields))
            raise ConfigError(f"config file {path}: unknown key {name!r}; known keys are {known}")
    return values


def _convert(name: str, value: Any, kind: Any, field: Any) -> Any:
    try:
        converted = _to_type(value, kind)
    except (ValueError, TypeError, KeyError):
        raise ConfigError(f"setting {name} is {value!r}; it must be {_kind_name(kind)}") from None
    choices = field.metadata.get("choices", ())
    if choices and converted not in choices:
        raise ConfigError(f"setting {name} is {value!r}; it must be one of {', '.join(choices)}")
    return converted


def _kind_name(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"a list, each {_kind_name(typing.get_args(kind)[0])}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]


def _to_type(value: Any, kind: Any) -> Any:
    """Raises ValueError, TypeError or KeyError when `value`, from TOML or as text, is none of that kind."""
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, list) else [item for item in str(value).split(",") if item]
        return tuple(_to_type(item, typing.get_args(kind)[0]) for item in items)
    if kind is bool:
        return BOOLEANS[str(value).lower()]
    if isinstance(value, bool) or not isinstance(value, ACCEPTED[kind]):
        raise TypeError(value)
    return kind(value)
