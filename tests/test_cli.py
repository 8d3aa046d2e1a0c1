"""The headway command against a scripted router: what it prints, and one line for what is wrong."""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from headway.cli import main
from headway.cli.up import spec_of
from headway.client import Finished, Started, TextDelta, Timings, Token, Usage
from headway.client.pace import Pace, nearest_rank
from tests.fake_router import FakeRouter, serve

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRouter]:
    router = FakeRouter()
    with serve(router) as address:
        monkeypatch.setenv("HEADWAY_ADDRESS", address)
        yield router


def test_generate_streams_the_answer_and_says_how_it_went(router: FakeRouter, capsys: Capture) -> None:
    assert main(["generate", "hi", "--max-tokens", "5", "--temperature", "0.5", "--seed", "3", "--stop", "END"]) == 0
    out = capsys.readouterr()
    assert out.out == "Hello, wörld!\n"
    assert "prompt 16 cached + 4 computed · p0 → d0 · handoff 0 bytes" in out.err
    request = router.requests[0]
    assert (request.text, request.max_tokens, request.sampling.temperature) == (b"hi", 5, 0.5)
    assert (request.sampling.seed, list(request.stop_strings)) == (3, ["END"])


def test_constraints_arrive(router: FakeRouter, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    flags = [["--json-schema", str(tmp_path / "schema.json")], ["--json"], ["--regex", "a+"]]
    flags += [["--choice", "yes", "--choice", "no"]]
    for some in flags:
        assert main(["generate", "hi", *some]) == 0
    schema, any_object, regex, choices = (request.sampling.constraint for request in router.requests)
    assert schema.json_schema == '{"type": "object"}'
    assert any_object.HasField("json_object")
    assert regex.regex == "a+"
    assert list(choices.choices.texts) == ["yes", "no"]
    capsys.readouterr()
    assert main(["generate", "hi", "--json-schema", str(tmp_path / "none.json")]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_generate_reads_standard_input(router: FakeRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    assert main(["generate", "-"]) == 0
    assert router.requests[0].text == b"from a pipe"


def script(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    """What the user types; then the end of input."""
    rest = iter(lines)

    def typed(_prompt: str) -> str:
        for line in rest:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", typed)


def test_chat_keeps_the_conversation(router: FakeRouter, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    script(monkeypatch, ["hi", "", "why?"])
    assert main(["chat", "--system", "be brief"]) == 0
    second = [(message.role, message.content) for message in router.requests[1].chat.messages]
    assert second == [("system", "be brief"), ("user", "hi"), ("assistant", "Hello, wörld!"), ("user", "why?")]
    assert capsys.readouterr().out.count("Hello, wörld!") == 2


def test_chat_survives_a_failed_turn(router: FakeRouter, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    script(monkeypatch, ["hi", "again"])
    router.fail = grpc.StatusCode.UNAVAILABLE
    assert main(["chat"]) == 0
    assert [len(request.chat.messages) for request in router.requests] == [1, 1]
    assert capsys.readouterr().err.count("the queue is full") == 2


def test_fleet(router: FakeRouter, capsys: Capture) -> None:
    assert main(["fleet"]) == 0
    out = capsys.readouterr().out
    assert "tiny, context 512 tokens, 2 requests in flight" in out
    assert "d0      n0    decode  ready" in out
    assert "10 of 40" in out
    assert out.splitlines()[-1].split() == ["n0", "h:2", "watching", "5", "80"]


def test_explain(router: FakeRouter, capsys: Capture) -> None:
    assert main(["explain", "hi"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("a prompt of 20 tokens")
    assert lines[3].replace(" ms", "").split() == ["p0", "d0", "16", "1.0", "0.0", "2.0", "0.0", "3.0"]
    assert lines[4].endswith("draining")


def test_errors_are_one_line(router: FakeRouter, capsys: Capture) -> None:
    router.fail = grpc.StatusCode.RESOURCE_EXHAUSTED
    assert main(["generate", "hi"]) == 1
    assert capsys.readouterr().err == "headway: the queue is full; try again later [RESOURCE_EXHAUSTED]\n"
    assert main(["generate", "hi", "--max-tokens", "-1"]) == 1
    assert "the request is not valid" in capsys.readouterr().err
    assert main(["fleet", "--address", "127.0.0.1:1"]) == 1
    assert "no router answers at 127.0.0.1:1; is it running there?" in capsys.readouterr().err
    assert main(["up", "--prefill", "-1"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("HEADWAY_HOME", str(tmp_path))
    assert main(["model", "list"]) == 0
    assert capsys.readouterr().out == "smollm2\tnot here yet: headway model add smollm2\n"
    for command in (["up"], ["up", "--model", "nothing"], ["model", "add", "nothing"]):
        assert main(command) == 1
        assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    assert main(["model", "add", str(tmp_path / "broken")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("asked", "counts"),
    [((None, None, None), (1, 1, 0)), ((None, None, 2), (0, 0, 2)), ((2, None, 1), (2, 1, 1)), ((3, 2, 0), (3, 2, 0))],
)
def test_numbers_of_workers(asked: tuple[int | None, ...], counts: tuple[int, ...]) -> None:
    flags = dict(zip(("prefill", "decode", "mixed"), asked, strict=True))
    rest = {"model": "m", "engine": "sim", "port": 0, "slab_bytes": None, "threads": None}
    spec = spec_of(argparse.Namespace(**flags, **rest))
    assert (spec.prefill, spec.decode, spec.mixed) == counts


def test_pace() -> None:
    clock = iter([0.0, 1.0, 1.5, 2.5])
    pace = Pace(lambda: next(clock))
    token = Token(1, 0, None, ())
    pace.push(Started(0, "r", 3, "m"))
    for count in (1, 1, 2):
        pace.push(TextDelta(0, "x", (token,) * count))
    pace.push(TextDelta(0, "no token", ()))
    assert (pace.ttft_s, pace.gaps_s) == (1.0, [0.5, 0.5, 0.5])
    assert pace.summary() == "unfinished"
    pace.push(
        Finished(0, "stop", Usage(3, 1, 2, 4, 0, 0, 0, 0), Timings(0, 0, 0, 0, 0, 0, 0, 0), "m0", "m0", 1, "", None)
    )
    assert "TTFT 1000.0 ms · ITL p50 500.0 ms p99 500.0 ms · prompt 1 cached + 2 computed · m0 ·" in pace.summary()
    assert pace.summary().endswith("1 replays")


def test_nearest_rank() -> None:
    assert [nearest_rank([3.0, 1.0, 2.0], q) for q in (0.0, 0.5, 0.99)] == [1.0, 2.0, 3.0]
