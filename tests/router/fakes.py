"""In-process workers and a kvstore with scripted behaviour, and a router to put them behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from headway.core.model import KvFormat, LayerGroup, ModelCard
from headway.runtime.convert import card_to_proto, ids_from_bytes, ids_to_bytes
from headway.runtime.server import OPTIONS
from headway.v1 import (
    common_pb2,
    decode_pb2,
    decode_pb2_grpc,
    kvstore_pb2,
    kvstore_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
)
from services.router.config import RouterConfig
from services.router.service import RouterService

BLOCK = 4
CARD = ModelCard("toy", b"f", 64, 256, (255,), KvFormat(BLOCK, "uint64", "token", (LayerGroup(1, 1, 1, 8),)))
PROMPT = [5, 6, 7, 8, 9]


def next_token(context: list[int]) -> int:
    """A pure function of the whole context: printable ASCII, never the end token."""
    value = 7
    for token in context:
        value = (value * 31 + token + 1) % 1_000_003
    return 97 + value % 26


def expected(prompt: list[int], count: int) -> list[int]:
    context = list(prompt)
    for _ in range(count):
        context.append(next_token(context))
    return context[len(prompt) :]


async def until(condition: Callable[[], Any], seconds: float = 5.0) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


class Fake:
    """A worker. `script(fake, sequence, index)` may act before output `index` is drawn; True: do not draw it.

    `held` are the (sequence, attempt) pairs that it would hold slots for; `limits`: of its forwards, as in its hello.
    """

    def __init__(self, name: str, role: int, *, node: str = "127.0.0.1:1", step_s: float = 0.0, **limits: Any) -> None:
        self.name = name
        self.role = role
        self.node = node
        self.step_s = step_s
        self.limits = {"max_batch": 8, **limits}
        self.card = CARD
        self.script: Callable[[Fake, common_pb2.Sequence, int], Any] = lambda fake, sequence, index: False
        self.held: dict[tuple[str, int], common_pb2.Sequence] = {}
        self.cancels: list[tuple[str, int]] = []
        self.starts: list[common_pb2.Sequence] = []
        # Token ids as they came with each of `starts`.
        self.given: list[list[int]] = []
        self.messages = 0
        self.begins = 0
        self.status = router_pb2.WorkerStatus(ready=True, free_slots=1000, total_slots=1000)
        self.status_every_s = 0.1
        self.order = ""
        self.silent = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._streams: list[asyncio.Queue[Any]] = []
        self._server: Any = None
        self._announcing: asyncio.Task[None] | None = None

    async def start(self, router: str) -> Fake:
        self._server = grpc.aio.server(options=OPTIONS)
        if self.role == common_pb2.WORKER_ROLE_PREFILL:
            prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self, self._server)  # type: ignore[arg-type]
        else:
            decode_pb2_grpc.add_DecodeServiceServicer_to_server(self, self._server)  # type: ignore[arg-type]
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self._announcing = asyncio.create_task(self._announce(router))
        return self

    def die(self) -> None:
        """As after kill -9: all streams break at once."""
        if self._announcing is None:
            return
        self._announcing.cancel()
        self._announcing = None
        for task in self._tasks:
            task.cancel()
        self._stopping = asyncio.create_task(self._server.stop(None))

    async def stop(self) -> None:
        announcing = self._announcing
        self.die()
        await asyncio.gather(self._stopping, *([announcing] if announcing else []), return_exceptions=True)

    # ---------------------------------------------------------------- announcement

    async def _announce(self, router: str) -> None:
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                async with grpc.aio.insecure_channel(router) as channel:
                    stub: Any = router_pb2_grpc.RouterServiceStub(channel)
                    async for _ in stub.Announce(self._announcements()):
                        pass
            await asyncio.sleep(0.05)

    async def _announcements(self) -> AsyncIterator[router_pb2.AnnounceRequest]:
        hello = router_pb2.WorkerHello(
            worker_id=self.name,
            node_id="node",
            role=self.role,  # type: ignore[arg-type]
            address=f"127.0.0.1:{self.port}",
            kvstore_address=self.node,
            model=card_to_proto(self.card),
            order=self.order,
            **self.limits,
        )
        yield router_pb2.AnnounceRequest(hello=hello)
        while True:
            if not self.silent:
                yield router_pb2.AnnounceRequest(status=self.status)
            await asyncio.sleep(self.status_every_s)

    # ---------------------------------------------------------------- Run

    async def Run(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        events: asyncio.Queue[Any] = asyncio.Queue()
        reader = asyncio.create_task(self._read(requests, events))
        response = (
            prefill_pb2.PrefillServiceRunResponse
            if self.role == common_pb2.WORKER_ROLE_PREFILL
            else decode_pb2.DecodeServiceRunResponse
        )
        try:
            while (event := await events.get()) is not None:
                yield response(events=[event])
        finally:
            reader.cancel()
            self.held.clear()

    async def _read(self, requests: AsyncIterator[Any], events: asyncio.Queue[Any]) -> None:
        pieces: dict[str, common_pb2.Sequence] = {}
        async for request in requests:
            self.messages += 1
            for command in request.commands:
                kind = command.WhichOneof("command")
                body = getattr(command, kind)
                if kind == "cancel":
                    self.cancels.append((body.sequence_id, body.attempt))
                    self.held.pop((body.sequence_id, body.attempt), None)
                    continue
                if kind == "begin":
                    self.begins += 1
                    sequence = self.held.get((body.sequence_id, body.attempt))
                    if sequence is not None:
                        sequence.tokens += ids_to_bytes([body.first_token.token_id])
                        self._go(sequence, events)
                    continue
                sequence = pieces.pop(body.sequence.sequence_id, None)
                if sequence is None:
                    sequence = body.sequence
                else:
                    sequence.tokens += body.sequence.tokens
                if body.sequence.more:
                    pieces[sequence.sequence_id] = sequence
                    continue
                self.starts.append(sequence)
                self.given.append(list(ids_from_bytes(sequence.tokens)))
                self.held[sequence.sequence_id, sequence.attempt] = sequence
                if kind == "start":
                    self._go(sequence, events)

    def _go(self, sequence: common_pb2.Sequence, events: asyncio.Queue[Any]) -> None:
        task = asyncio.create_task(self._serve(sequence, events))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, sequence: common_pb2.Sequence, events: asyncio.Queue[Any]) -> None:
        key = (sequence.sequence_id, sequence.attempt)
        given = len(sequence.tokens) // 4
        while key in self.held:
            tokens = list(ids_from_bytes(sequence.tokens))
            index = len(tokens) - sequence.prompt_tokens
            self.events = events
            if self.script(self, sequence, index):
                return
            token = common_pb2.Token(token_id=next_token(tokens), output_index=index)
            sequence.tokens += ids_to_bytes([token.token_id])
            last = index + 1 >= sequence.max_tokens
            stop = token.token_id in sequence.stop_token_ids
            reason = common_pb2.FINISH_REASON_STOP if stop else int(last) * common_pb2.FINISH_REASON_LENGTH
            if self.role == common_pb2.WORKER_ROLE_PREFILL:
                first = prefill_pb2.FirstToken(
                    token=token, lease_id=9, epoch=1, cached_tokens=0, computed_tokens=given, finish_reason=reason
                )
                events.put_nowait(prefill_pb2.PrefillEvent(sequence_id=key[0], attempt=key[1], first_token=first))
                self.held.pop(key)
                return
            drawn = decode_pb2.DecodeTokens(tokens=[token], finish_reason=reason)  # type: ignore[arg-type]
            if len(tokens) == given and index == 0:
                drawn.cached_tokens, drawn.computed_tokens = 0, given
            events.put_nowait(decode_pb2.DecodeEvent(sequence_id=key[0], attempt=key[1], tokens=drawn))
            if reason:
                self.held.pop(key)
            await asyncio.sleep(self.step_s)

    def put(self, sequence: common_pb2.Sequence, **event: Any) -> None:
        """Send any event about the sequence."""
        prefill = self.role == common_pb2.WORKER_ROLE_PREFILL
        kind = prefill_pb2.PrefillEvent if prefill else decode_pb2.DecodeEvent
        self.events.put_nowait(kind(**{"sequence_id": sequence.sequence_id, "attempt": sequence.attempt, **event}))


class FakeStore(kvstore_pb2_grpc.KvStoreServiceServicer):
    """WatchBlocks from a script: each connection gets the next list of responses, then stays open."""

    def __init__(self) -> None:
        self.requests: list[kvstore_pb2.WatchBlocksRequest] = []
        self.sessions: list[list[kvstore_pb2.WatchBlocksResponse]] = []
        self.hang_up = asyncio.Event()

    async def start(self) -> str:
        self._server = grpc.aio.server(options=OPTIONS)
        kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"127.0.0.1:{port}"

    async def stop(self) -> None:
        await self._server.stop(None)

    async def WatchBlocks(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        self.hang_up.clear()
        for response in self.sessions.pop(0) if self.sessions else []:
            yield response
        await self.hang_up.wait()

    async def Attach(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        raise AssertionError("a router attaches to no store")
        yield

    async def Stats(self, request: Any, context: Any) -> Any:
        return kvstore_pb2.StatsResponse()


class Rig:
    """A router with its fakes."""

    def __init__(self, **config: Any) -> None:
        self.config = RouterConfig(**{"local_prefill_tokens": 0, **config})
        self.fakes: list[Fake] = []
        self.service = RouterService(self.config)

    async def __aenter__(self) -> Rig:
        self._server = grpc.aio.server(options=OPTIONS)
        router_pb2_grpc.add_RouterServiceServicer_to_server(self.service, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        self.channel = grpc.aio.insecure_channel(self.address)
        self.stub: Any = router_pb2_grpc.RouterServiceStub(self.channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        for fake in self.fakes:
            await fake.stop()
        self.service.fleet.close()
        await self._server.stop(None)

    async def add(self, name: str, **options: Any) -> Fake:
        """A fake that the router knows as ready: "p…" prefill, "d…" decode, "m…" mixed."""
        role = {
            "p": common_pb2.WORKER_ROLE_PREFILL,
            "d": common_pb2.WORKER_ROLE_DECODE,
            "m": common_pb2.WORKER_ROLE_MIXED,
        }[name[0]]
        fake = await Fake(name, role, **options).start(self.address)
        self.fakes.append(fake)
        await until(lambda: name in self.service.fleet.workers and self.service.fleet.workers[name].load.ready)
        return fake

    def request(self, max_tokens: int = 8, prompt: list[int] = PROMPT, **fields: Any) -> router_pb2.GenerateRequest:
        tokens = router_pb2.TokenPrompt(token_ids=prompt)
        return router_pb2.GenerateRequest(**{"tokens": tokens, "max_tokens": max_tokens, **fields})

    async def run(self, request: router_pb2.GenerateRequest) -> Got:
        got = Got()
        async for response in self.stub.Generate(request):
            got.add(response)
        return got

    async def refused(self, request: router_pb2.GenerateRequest) -> tuple[grpc.StatusCode, str]:
        """Code and sentence with which the request ends; afterwards nothing of it is left anywhere."""
        try:
            await self.run(request)
        except grpc.aio.AioRpcError as error:
            await self.quiet()
            return error.code(), error.details() or ""
        raise AssertionError("the request was served")

    async def quiet(self) -> None:
        """Until nothing is in flight: no sequence at a worker, no route, no waiter."""
        fleet = self.service.fleet
        await until(lambda: not self.service.in_flight and not any(fake.held for fake in self.fakes))
        assert not fleet.waiting
        assert not any(worker.link.routes for worker in fleet.workers.values())
        assert not any(worker.load.running for worker in fleet.workers.values())


class Got:
    """What a client received."""

    def __init__(self) -> None:
        self.started: router_pb2.Started | None = None
        self.tokens: dict[int, list[int]] = {}
        self.text: dict[int, str] = {}
        self.finished: dict[int, router_pb2.Finished] = {}

    def add(self, response: router_pb2.GenerateResponse) -> None:
        choice = response.choice
        if response.HasField("started"):
            self.started = response.started
        if response.HasField("delta"):
            tokens = self.tokens.setdefault(choice, [])
            for token in response.delta.tokens:
                assert token.output_index == len(tokens), "a token was lost, repeated or reordered"
                tokens.append(token.token_id)
            self.text[choice] = self.text.get(choice, "") + response.delta.text
        if response.HasField("finished"):
            self.finished[choice] = response.finished
