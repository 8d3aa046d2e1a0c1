"""`headway generate` and `headway chat`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from headway.client import Client, HeadwayClientError, Message, Options, Prompt, TextDelta
from headway.client.pace import Pace


def generate(arguments: argparse.Namespace) -> int:
    """The answer on stdout as it comes; one line of figures on stderr."""
    with Client(arguments.address) as client:
        _stream(client, read_prompt(arguments.prompt), options_of(arguments))
    return 0


def chat(arguments: argparse.Namespace) -> int:
    """Turns until the end of input. Ctrl-C stops an answer; what had come of it stays in the conversation.

    A turn that fails is forgotten, so that it can be asked again.
    """
    messages: list[Message] = [("system", arguments.system)] if arguments.system else []
    with Client(arguments.address) as client:
        while (line := _ask()) is not None:
            if line:
                messages += _turn(client, [*messages, ("user", line)], options_of(arguments))
    return 0


def read_prompt(argument: str) -> str:
    return sys.stdin.read() if argument == "-" else argument


def options_of(arguments: argparse.Namespace) -> Options:
    """What the flags say; the router's defaults for the rest."""
    options = Options()
    if arguments.max_tokens is not None:
        options["max_tokens"] = arguments.max_tokens
    if arguments.temperature is not None:
        options["temperature"] = arguments.temperature
    if arguments.top_p is not None:
        options["top_p"] = arguments.top_p
    if arguments.top_k is not None:
        options["top_k"] = arguments.top_k
    if arguments.seed is not None:
        options["seed"] = arguments.seed
    if arguments.stop:
        options["stop_strings"] = arguments.stop
    if arguments.json_schema is not None:
        options["json_schema"] = Path(arguments.json_schema).read_text(encoding="utf-8")
    if arguments.json:
        options["json_object"] = True
    if arguments.regex is not None:
        options["regex"] = arguments.regex
    if arguments.choice:
        options["choices"] = arguments.choice
    return options


def _turn(client: Client, messages: list[Message], options: Options) -> list[Message]:
    """What the conversation grows by: question and answer, or nothing."""
    try:
        text = _stream(client, messages, options)
    except HeadwayClientError as error:
        print(f"headway: {error}", file=sys.stderr)
        return []
    return [messages[-1], ("assistant", text)] if text else []


def _ask() -> str | None:
    try:
        return input("you> ").strip()
    except EOFError:
        print()
        return None


def _stream(client: Client, prompt: Prompt, options: Options) -> str:
    """Prints the answer and its figures; gives its text."""
    pieces: list[str] = []
    pace = Pace()
    with client.stream(prompt, **options) as stream:
        try:
            for event in stream:
                pace.push(event)
                if isinstance(event, TextDelta):
                    pieces.append(event.text)
                    print(event.text, end="", flush=True)
        except KeyboardInterrupt:
            if isinstance(prompt, str):
                raise
        finally:
            if pieces:
                print()
    print(f"[{pace.summary()}]", file=sys.stderr)
    return "".join(pieces)
