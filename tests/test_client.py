"""The client library against a scripted router."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import grpc
import pytest

import headway
from headway.client import AsyncClient, Client, Finished, HeadwayClientError, Started, TextDelta
from headway.client.request import build_request
from headway.v1 import common_pb2
from tests.fake_router import FakeRouter, serve


def test_generate_joins_the_stream() -> None:
    with serve(FakeRouter()) as address, Client(address) as client:
        answer = client.generate("hi")
    assert answer.text == "Hello, wörld!"
    assert answer.token_ids == [100, 101, 102, 103, 104]
    assert answer.finished.reason == "stop"
    assert answer.finished.stop_token_id == 2
    assert answer.finished.usage.cached_tokens == 16
    assert (answer.request_id, answer.model, answer.prompt_tokens) == ("r1", "tiny", 20)
    assert answer.choices[0].tokens[1].top_logprobs == ((1, -0.5),)


def test_stream_gives_typed_events_in_order() -> None:
    with serve(FakeRouter()) as address, Client(address) as client:
        events = list(client.stream([("user", "hi")]))
    assert [type(event) for event in events] == [Started, *[TextDelta] * 5, Finished]


def test_choices() -> None:
    with serve(FakeRouter()) as address, Client(address) as client:
        assert [choice.text for choice in client.generate("hi", n=2).choices] == ["Hello, wörld!"] * 2


def test_every_kind_of_prompt_and_option_arrives() -> None:
    router = FakeRouter()
    with serve(router) as address, Client(address) as client:
        client.generate("text", temperature=0.5, seed=7, logit_bias={3: 1.0}, stop_strings=["END"], max_tokens=9)
        client.generate("text", bad_words=[[4, 5], [6]])
        client.generate([1, 2, 3], decode_worker="d0", force_apart=True, deadline_s=5.0)
        client.generate([{"role": "user", "content": "hi"}, ("assistant", "yes")])
        client.generate(b"\xff")
    text, phrases, tokens, chat, raw = router.requests
    assert [list(phrase.token_ids) for phrase in phrases.sampling.bad_words] == [[4, 5], [6]]
    assert (text.text, text.sampling.temperature, text.sampling.seed, text.max_tokens) == (b"text", 0.5, 7, 9)
    assert dict(text.sampling.logit_bias) == {3: 1.0}
    assert list(text.stop_strings) == ["END"]
    assert not text.sampling.HasField("top_p")
    assert list(tokens.tokens.token_ids) == [1, 2, 3]
    assert (tokens.placement.decode_worker, tokens.placement.force_apart, tokens.deadline_s) == ("d0", True, 5.0)
    assert [(m.role, m.content) for m in chat.chat.messages] == [("user", "hi"), ("assistant", "yes")]
    assert raw.text == b"\xff"


@pytest.mark.parametrize(
    ("options", "kind", "value"),
    [
        ({"json_schema": '{"type": "object"}'}, "json_schema", '{"type": "object"}'),
        ({"json_schema": {"type": "array"}}, "json_schema", '{"type": "array"}'),
        ({"json_object": True}, "json_object", common_pb2.JsonObject()),
        ({"regex": "a+"}, "regex", "a+"),
        ({"choices": ["yes", "né"]}, "choices", common_pb2.Choices(texts=["yes", "né"])),
        ({"json_object": False, "regex": "b"}, "regex", "b"),
    ],
)
def test_constraints_arrive(options: Any, kind: str, value: object) -> None:
    constraint = build_request("hi", options).sampling.constraint
    assert constraint.WhichOneof("kind") == kind
    assert getattr(constraint, kind) == value
    assert build_request("hi", {"json_object": False}) == build_request("hi", {})


def test_rich_errors_are_decoded() -> None:
    router = FakeRouter(fail=grpc.StatusCode.RESOURCE_EXHAUSTED)
    full = pytest.raises(HeadwayClientError, match="the queue is full")
    with serve(router) as address, Client(address) as client, full as caught:
        client.generate("hi")
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.retry_after_s == 1.5


def test_nobody_there() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(HeadwayClientError, match=r"no router answers at 127.0.0.1:1"):
        client.fleet()


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("hi", {"max_tokens": -1}),
        ("hi", {"n": "two"}),
        ("hi", {"unknown_option": 1}),
        ("hi", {"regex": "a", "json_object": True}),
        ("hi", {"regex": 5}),
        ("\ud800", {}),
        ([-1], {}),
        ([{"role": "user"}], {}),
        ([{"role": "user", "content": "hi", "name": "x"}], {}),
    ],
)
def test_what_no_request_can_hold_is_refused_here(prompt: Any, options: Any) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(HeadwayClientError, match="not valid") as caught:
        client.stream(prompt, **options)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_closing_the_stream_cancels_the_call() -> None:
    router = FakeRouter(endless=True)
    with serve(router) as address, Client(address) as client:
        with client.stream("hi") as stream:
            assert isinstance(next(stream), Started)
        assert router.ended.wait(10)
        with pytest.raises(HeadwayClientError) as caught:
            list(stream)
    assert caught.value.code is grpc.StatusCode.CANCELLED


def test_explain_and_fleet() -> None:
    with serve(FakeRouter()) as address, Client(address) as client:
        explanation, fleet = client.explain("hi", decode_worker="d0"), client.fleet()
    assert explanation.prompt_tokens == 20
    assert [option.refused for option in explanation.options] == ["", "draining"]
    assert (fleet.model, fleet.block_size, fleet.requests_in_flight) == ("tiny", 16, 2)
    assert (fleet.workers[0].role, fleet.workers[0].ready, fleet.stores[0].watching) == ("decode", True, True)


async def test_async_client() -> None:
    router = FakeRouter()
    with serve(router) as address:
        async with AsyncClient(address) as client:
            assert (await client.generate("hi", n=2)).choices[1].text == "Hello, wörld!"
            async with client.stream("hi") as stream:
                assert [type(event) async for event in stream] == [Started, *[TextDelta] * 5, Finished]
            assert (await client.explain("hi")).prompt_tokens == 20
            assert (await client.fleet()).model == "tiny"


async def test_async_close_cancels_and_errors_are_decoded() -> None:
    router = FakeRouter(endless=True)
    with serve(router) as address:
        async with AsyncClient(address) as client:
            async with client.stream("hi") as stream:
                assert isinstance(await anext(stream), Started)
            assert router.ended.wait(10)
            router.endless, router.fail = False, grpc.StatusCode.UNAVAILABLE
            with pytest.raises(HeadwayClientError) as caught:
                await client.generate("hi")
    assert caught.value.retry_after_s == 1.5


def test_the_package_offers_the_clients() -> None:
    assert headway.Client is Client
    assert headway.AsyncClient is AsyncClient
    with pytest.raises(AttributeError):
        headway.Nothing  # type: ignore[attr-defined] # noqa: B018


class Interrupted(BaseException):
    """As KeyboardInterrupt, but this test's own."""


@contextlib.contextmanager
def interrupted(after_s: float) -> Iterator[None]:
    """Raises Interrupted in the main thread once, if the block is not over by then.

    Without garbage collection: Python loses an interrupt that arrives in a destructor.
    """

    def interrupt(_number: int, _frame: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    gc.disable()
    signal.setitimer(signal.ITIMER_REAL, after_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        gc.enable()
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("action", ["generate", "explain", "cancel", "close"])
def test_an_interrupt_at_any_moment_leaves_a_client_that_can_be_closed(action: str) -> None:
    """Within gRPC, an interrupt would leave a call that `close` waits for without end."""
    interrupts = 0
    with serve(FakeRouter(endless=True)) as address:
        for step in range(1, 101):
            client = Client(address)
            actions: dict[str, Callable[[], object]] = {
                "generate": partial(client.generate, "hi"),
                "explain": partial(client.explain, "hi"),
                "cancel": client.stream("hi").close if action == "cancel" else client.close,
                "close": client.close,
            }
            try:
                with interrupted(10e-6 * step):
                    actions[action]()
            except Interrupted:
                interrupts += 1
            closing = threading.Thread(target=client.close, daemon=True)
            closing.start()
            closing.join(10)
            assert not closing.is_alive(), f"the close hangs; interrupted {10 * step} us after the start"
    assert interrupts > 5
