"""Subcommands and their flags."""

from __future__ import annotations

import argparse
import os

from headway.cli import ask, calibrate, model, replay, show, simulate, up

DEFAULT_ADDRESS = "127.0.0.1:50051"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="headway", description="Disaggregated serving of large language models.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_up(commands)
    _add_ask(commands)
    _add_show(commands)
    _add_model(commands)
    _add_simulate(commands)
    return parser


def _add_up(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("up", help="keep a local fleet running until Ctrl-C")
    command.set_defaults(run=up.run)
    command.add_argument("--prefill", type=int, metavar="N", help="prefill workers (default: 1)")
    command.add_argument("--decode", type=int, metavar="M", help="decode workers (default: 1)")
    command.add_argument("--mixed", type=int, metavar="K", help="workers that do both; alone: no others")
    command.add_argument("--model", default="smollm2", help="an added model, or a folder (default: %(default)s)")
    command.add_argument("--engine", default="auto", choices=("auto", "sim"), help="sim: no model, made-up tokens")
    command.add_argument("--port", type=int, default=50051, help="of the router; 0: any (default: %(default)s)")
    command.add_argument("--slab-bytes", type=int, metavar="BYTES", help="KV memory (default: 1 GiB)")
    command.add_argument("--threads", type=int, metavar="N", help="per worker (default: see FleetSpec)")
    command.add_argument("--run-dir", metavar="DIR", help="for logs and sockets (default: a temporary folder)")


def _add_ask(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    generate = commands.add_parser("generate", help="continue a text, streaming")
    generate.set_defaults(run=ask.generate)
    generate.add_argument("prompt", help='the text; "-" reads it from standard input')
    chat = commands.add_parser("chat", help="talk to the model")
    chat.set_defaults(run=ask.chat)
    chat.add_argument("--system", metavar="TEXT", help="a system message")
    for command in (generate, chat):
        _add_address(command)
        command.add_argument("--max-tokens", type=int, metavar="N")
        command.add_argument("--temperature", type=float, metavar="T", help="0, the default, is greedy")
        command.add_argument("--top-p", type=float, metavar="P")
        command.add_argument("--top-k", type=int, metavar="K")
        command.add_argument("--seed", type=int, metavar="SEED")
        command.add_argument("--stop", action="append", metavar="TEXT", help="end there; may be repeated")
        _add_constraint(command)


def _add_constraint(command: argparse.ArgumentParser) -> None:
    group = command.add_mutually_exclusive_group()
    group.add_argument("--json-schema", metavar="FILE", help="answer with JSON that is valid under this schema")
    group.add_argument("--json", action="store_true", help="answer with a JSON object")
    group.add_argument("--regex", metavar="REGEX", help="answer with a text that matches as a whole")
    group.add_argument("--choice", action="append", metavar="TEXT", help="answer with one of these; may be repeated")


def _add_show(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    fleet = commands.add_parser("fleet", help="workers, load and cache")
    fleet.set_defaults(run=show.fleet)
    _add_address(fleet)
    explain = commands.add_parser("explain", help="where a prompt would go and why, without running it")
    explain.set_defaults(run=show.explain)
    explain.add_argument("prompt", help='the text; "-" reads it from standard input')
    _add_address(explain)


def _add_model(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("model", help="add and list models")
    actions = command.add_subparsers(metavar="ACTION", required=True)
    add = actions.add_parser("add", help="fetch, convert and keep a model")
    add.set_defaults(run=model.add)
    add.add_argument("name_or_path", help="smollm2, or a folder in Hugging Face format")
    add.add_argument("--name", metavar="NAME", help="under which it will be known (default: its own)")
    listing = actions.add_parser("list", help="the models that --model knows by name")
    listing.set_defaults(run=model.list_models)


def _add_simulate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("simulate", help="what a fleet would do with a trace, policy by policy")
    command.set_defaults(run=simulate.run)
    simulate.add_arguments(command)
    command = commands.add_parser("replay", help="the same against real services with simulated engines")
    command.set_defaults(run=replay.run)
    replay.add_arguments(command)
    command = commands.add_parser("calibrate", help="measure this machine, as hardware to simulate")
    command.set_defaults(run=calibrate.run)
    calibrate.add_arguments(command)


def _add_address(command: argparse.ArgumentParser) -> None:
    default = os.environ.get("HEADWAY_ADDRESS", DEFAULT_ADDRESS)
    shown = "host:port of the router (default: HEADWAY_ADDRESS, else %(default)s)"
    command.add_argument("--address", default=default, help=shown)
