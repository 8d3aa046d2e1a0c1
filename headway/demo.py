"""`python -m headway.demo`: four processes on loopback, real prompts, and how each of them went.

Starts kvstore, prefill, decode and router, and stops them again, whatever happens.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from headway import models
from headway.client import Client, HeadwayClientError, Message, TextDelta
from headway.client.pace import Pace
from headway.fleet import Fleet, FleetError, FleetSpec

LINE = 100
FOUR = [
    "Name three planets.",
    "Write one sentence about the sea.",
    "What is two plus two?",
    "Give me a word that rhymes with light.",
]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m headway.demo", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="an added model, or a folder (default: %(default)s)")
    parser.add_argument("--engine", default="auto", choices=("auto", "sim"), help="sim: no model, made-up tokens")
    parser.add_argument("--max-tokens", type=int, default=64, help="of each answer (default: %(default)s)")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if arguments.engine != "sim":
            models.resolve(arguments.model)
        run(FleetSpec(model=arguments.model, engine=arguments.engine), arguments.max_tokens)
    except (FleetError, HeadwayClientError, LookupError) as error:
        print(f"headway demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


def run(spec: FleetSpec, max_tokens: int) -> None:
    """The whole demo against a fleet of its own."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="headway-demo-") as folder, Fleet(spec, folder) as fleet:
        view = fleet.wait_ready()
        print(f"{view.model} is served at {fleet.address} after {time.monotonic() - started:.1f} s by")
        for name in fleet.names:
            print(f"  {name:<10} process {fleet.process(name)} at {fleet.address_of(name)}")
        with Client(fleet.address) as client:
            _prompts(client, max_tokens)
        _title("done; stopping everything")


def station_log(days: int = 75) -> str:
    """A made-up document of about 1,500 tokens."""
    weather = ["calm", "windy", "rainy", "foggy", "clear"]
    work = ["cleaned the lamp", "counted the ships", "mended the stairs", "wrote letters", "painted the door"]
    lines = [
        f"Day {day}: the weather was {weather[day * 3 % 5]}, the keeper {work[day * 7 % 5]}."
        for day in range(1, days + 1)
    ]
    lines[days // 2] = f"Day {days // 2 + 1}: a whale came close to the rocks and the keeper named it Clementine."
    return "The log of the lighthouse.\n" + "\n".join(lines)


def _prompts(client: Client, max_tokens: int) -> None:
    question = "What is the capital of France? Answer in one sentence."
    chat: list[Message] = [("user", question)]
    _title("a short chat")
    first = _answer(client, chat, max_tokens, question)
    _title("a second turn of that chat: the first one is in the cache")
    question = "And what is it famous for?"
    _answer(client, [*chat, ("assistant", first), ("user", question)], max_tokens, question)
    _title("a long document with a question")
    question = "What was the name of the whale?"
    _answer(client, [("user", f"{station_log()}\n\n{question}")], max_tokens, f"(the log of 75 days) {question}")
    _title("four at once")
    lock = threading.Lock()
    with ThreadPoolExecutor(len(FOUR)) as threads:
        jobs = [threads.submit(_labelled, client, at, prompt, max_tokens, lock) for at, prompt in enumerate(FOUR, 1)]
        try:
            summaries = [job.result() for job in jobs]
        except BaseException:
            client.close()
            raise
    for at, summary in enumerate(summaries, 1):
        print(f"  [{at}] {summary}")


def _answer(client: Client, chat: Sequence[Message], max_tokens: int, shown: str) -> str:
    """Prints `shown` for the prompt, and the answer as it comes."""
    print(f"  > {shown}\n  ", end="", flush=True)
    text, pace = _stream(client, chat, max_tokens, lambda piece: print(piece, end="", flush=True))
    print(f"\n  {pace.summary()}")
    return text


def _labelled(client: Client, at: int, prompt: str, max_tokens: int, lock: threading.Lock) -> str:
    """One of several that run at once: prints labelled lines as they fill up, gives the figures."""
    pending = ""

    def show(piece: str) -> None:
        nonlocal pending
        pending += piece
        if len(pending) > LINE or "\n" in pending:
            flush()

    def flush() -> None:
        nonlocal pending
        with lock:
            for line in filter(str.strip, pending.splitlines()):
                print(f"  [{at}] {line}", flush=True)
        pending = ""

    show(f"> {prompt}\n")
    _, pace = _stream(client, [("user", prompt)], max_tokens, show)
    flush()
    return pace.summary()


def _stream(client: Client, chat: Sequence[Message], max_tokens: int, show: Callable[[str], None]) -> tuple[str, Pace]:
    pace, pieces = Pace(), []
    with client.stream(chat, max_tokens=max_tokens) as stream:
        for event in stream:
            pace.push(event)
            if isinstance(event, TextDelta):
                pieces.append(event.text)
                show(event.text)
    return "".join(pieces), pace


def _title(text: str) -> None:
    print(f"\n— {text}", flush=True)


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
