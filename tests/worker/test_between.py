"""A guest between two layers of a chunk: told at once, timed and charged by itself, and each of the two by itself when
it fails, is stopped, or loses its slots.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest

from headway.core.fit import ForwardWork, Timing
from headway.core.step import StepLimits
from headway.engine.contract import Chunk, Drawn
from headway.v1 import common_pb2
from headway.v1 import kvstore_pb2 as pb
from headway.worker.active import Active
from headway.worker.config import WorkerConfig
from headway.worker.main import limits_of
from tests.worker.rig import Bench, Heard, LayeredEngine, expected, sequence, until_over

# Chunks of 400 tokens at a millisecond each.
LIMITS = StepLimits(8, 400, layers=3, chunk_s=10.0)
TIMING = (0.0, 1e-3, 0.0)
LONG, SHORT = [1] * 600, [2] * 40


class Between:
    """A loop whose engine stands before the second layer of a long prompt's first chunk."""

    def __init__(self, limits: StepLimits = LIMITS) -> None:
        self.engine = LayeredEngine()
        self.timing = Observed()
        self.bench = Bench(limits, engine=self.engine, timing=self.timing, slots=200)
        self.loop = self.bench.loop
        self.long = Heard()
        self.host: Active

    async def begin(self, joiner: str = "decode-0", tenant: str = "") -> None:
        prompt = replace(sequence(LONG), tenant=tenant)
        self.host = self.loop.start(prompt, self.long, joiner=joiner)
        await self.at_pause()

    async def at_pause(self) -> None:
        """The engine stands between two layers."""
        assert await asyncio.to_thread(self.engine.paused.acquire, timeout=10)

    async def next_layer(self) -> None:
        self.engine.pauses.release()
        await self.at_pause()

    async def guest(self, prompt: Sequence[int] = SHORT, joiner: str = "decode-0", **fields: object) -> Heard:
        """A prompt that is there, and runnable or planned, before the engine goes on."""
        heard = Heard()
        active = self.loop.start(replace(sequence(prompt), **fields), heard, joiner=joiner)  # type: ignore[arg-type]
        while not (active.runnable or active.stepping or heard.over.is_set()):
            await asyncio.sleep(0.001)
        return heard

    def go_on(self) -> None:
        self.engine.pauses.release(1000)

    @property
    def computed(self) -> list[list[int]]:
        return self.engine.batches


class Observed(Timing):
    """Keeps what was observed, and learns nothing."""

    def __init__(self) -> None:
        super().__init__(TIMING)
        self.seen: list[tuple[ForwardWork, float]] = []

    def observe(self, work: ForwardWork, seconds: float) -> None:
        self.seen.append((work, seconds))


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its one number is what the clock of steps and forwards says: no time passes, however slow the machine is."""
    now = [time.monotonic()]
    fake = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("headway.worker.forwards.time", fake)
    monkeypatch.setattr("headway.worker.steps.time", fake)
    return now


@pytest.fixture
async def between() -> AsyncIterator[Between]:
    made = Between()
    async with made.bench.running():
        yield made


async def test_a_short_prompt_is_computed_and_told_between_two_layers_of_a_long_one(between: Between) -> None:
    await between.begin()
    short = await between.guest()
    assert between.computed == []
    await between.next_layer()
    await until_over(short)
    assert between.computed == [[40]], "the long prompt's chunk is still computed"
    between.go_on()
    await until_over(between.long)
    assert between.computed == [[40], [400], [200]]
    assert short.tokens == expected(SHORT, 1)
    assert between.long.tokens == expected(LONG, 1)
    assert not between.engine.known


async def test_one_that_comes_after_the_last_layer_waits_for_the_end(between: Between) -> None:
    await between.begin()
    between.engine.gate = type(between.engine.gate)(0)
    between.engine.pauses.release(2)
    assert await asyncio.to_thread(between.engine.entered.acquire, timeout=10), "of the host, all layers done"
    between.engine.entered.release()
    short = await between.guest()
    forwards: list[list[int]] = []
    run = between.loop._forwards.run
    between.loop._forwards.run = lambda step, on_guest: (  # type: ignore[method-assign]
        forwards.append([item.count for item in step.work]) or run(step, on_guest)  # type: ignore[func-returns-value]
    )
    between.engine.gate.release(1000)
    between.go_on()
    await until_over(short)
    await until_over(between.long)
    assert between.computed == [[400], [40], [200]]
    assert forwards == [[40], [200]], "planned anew, as a forward of its own"
    assert short.tokens == expected(SHORT, 1)
    assert between.long.tokens == expected(LONG, 1)


async def test_the_next_guest_comes_after_the_first(between: Between) -> None:
    await between.begin()
    first = await between.guest([3] * 30)
    second, third = await between.guest([4] * 50), await between.guest([5] * 40)
    await between.next_layer()
    await until_over(first)
    assert between.computed == [[30]]
    between.engine.pauses.release()
    await until_over(third)
    assert between.computed[:2] == [[30], [40]], "one between two layers, and the shorter of both"
    between.go_on()
    await until_over(second)
    await until_over(between.long)
    for heard, prompt in ((first, [3] * 30), (second, [4] * 50), (third, [5] * 40), (between.long, LONG)):
        assert heard.tokens == expected(prompt, 1)


async def test_one_that_does_not_go_first_or_is_too_long_waits(between: Between) -> None:
    await between.begin()
    for late in (await between.guest([3] * 40, arrival_s=1e6), await between.guest([4] * 500)):
        assert not late.tokens
    await between.next_layer()
    between.engine.pauses.release()
    while not between.computed:
        await asyncio.sleep(0.001)
    assert between.computed == [[400]]


async def test_each_has_its_own_time_and_tenants_pay_for_their_own(between: Between, clock: list[float]) -> None:
    forward = between.engine.forward

    def taking(chunks: Sequence[Chunk], between: Callable[[], None] | None = None) -> list[Drawn | None]:
        """A millisecond a token, at the end."""
        drawn = forward(chunks, between)
        clock[0] += 1e-3 * sum(len(chunk.tokens) for chunk in chunks)
        return drawn

    between.engine.forward = taking  # type: ignore[method-assign]
    charged: dict[str, float] = {}
    between.loop.steps.fairness.charge = charged.__setitem__  # type: ignore[method-assign]
    await between.begin(tenant="long")
    await between.guest(tenant="short")
    await between.next_layer()
    between.engine.pauses.release()
    while len(between.timing.seen) < 2:
        await asyncio.sleep(0.001)
    assert [work.prompts for work, _ in between.timing.seen] == [[(40, 0)], [(400, 0)]]
    assert [seconds for _, seconds in between.timing.seen] == [pytest.approx(0.04), pytest.approx(0.4)]
    while len(charged) < 2:
        await asyncio.sleep(0.001)
    assert charged == {"short": pytest.approx(0.04), "long": pytest.approx(0.4)}


async def test_what_a_guest_took_is_still_left_of_the_host(between: Between, clock: list[float]) -> None:
    """A second one, of 0.3 s, fits into a host of 0.4 s, of which a tenth is over: the first one's time was not its."""
    forward = between.engine.forward

    def taking(chunks: Sequence[Chunk], between: Callable[[], None] | None = None) -> list[Drawn | None]:
        clock[0] += 0.0 if between else 5.0
        return forward(chunks, between)

    between.engine.forward = taking  # type: ignore[method-assign]
    await between.begin()
    clock[0] += 0.04
    first = await between.guest()
    await between.next_layer()
    await until_over(first)
    second = await between.guest([3] * 300)
    between.engine.pauses.release()
    await until_over(second)
    assert between.computed[:2] == [[40], [300]]


async def test_a_tenant_in_debt_is_no_guest_of_another(between: Between) -> None:
    between.loop.steps.fairness.debts({"flood", "other"})
    between.loop.steps.fairness.charge("flood", 10.0)
    await between.begin(tenant="other")
    flood, other = await between.guest(tenant="flood"), await between.guest([3] * 60, tenant="other")
    between.go_on()
    await until_over(flood)
    await until_over(other)
    await until_over(between.long)
    assert between.computed == [[60], [400], [200], [40]]


@pytest.mark.parametrize(("itl_s", "goes"), [(1e6, True), (1e-3, False)])
@pytest.mark.parametrize("who", ["a handoff", "itself"])
async def test_nobody_who_decodes_waits_longer_for_a_guest_than_the_objective(
    itl_s: float, goes: bool, who: str
) -> None:
    between = Between(replace(LIMITS, itl_s=itl_s))
    async with between.bench.running():
        await between.begin()
        if who == "a handoff":
            joined = sequence([7] * 20)
            joined.tokens.append(1)
            between.bench.store.leases[99] = [between.bench.store.free.pop() for _ in range(3)]
            active = between.loop.join(joined, Heard(), lease_id=99, epoch=1)
            while not active.runnable:
                await asyncio.sleep(0.001)
        short = await between.guest(joiner="decode-0" if who == "a handoff" else "", max_tokens=3)
        between.go_on()
        await until_over(short)
        assert (between.computed[0] == [40]) == goes
        assert short.tokens == expected(SHORT, 3)[: len(short.tokens)]


async def test_a_forward_in_which_sequences_decode_takes_no_guest(between: Between) -> None:
    answer = Heard()
    between.loop.start(sequence([7] * 20, max_tokens=1000), answer)
    between.go_on()
    while len(answer.tokens) < 3:
        await asyncio.sleep(0.001)
    between.loop.start(sequence(LONG), between.long, joiner="decode-0")
    short = await between.guest()
    await until_over(short)
    await until_over(between.long)
    assert [40] not in between.computed
    assert [400] not in between.computed


async def test_an_error_in_a_guest_is_the_guests_alone(between: Between) -> None:
    between.engine.fails_on = 2
    await between.begin()
    short = await between.guest()
    between.go_on()
    await until_over(short)
    await until_over(between.long)
    assert short.failure is not None
    assert "cannot compute this" in short.failure.message
    assert between.long.tokens == expected(LONG, 1)
    assert between.computed == [[400], [200]]
    undisturbed = [work.prompts for work, _ in between.timing.seen]
    assert undisturbed == [[(400, 0)], [(200, 400)]], "the host's forward was one, and no retry of it"


async def test_an_error_in_the_host_is_the_hosts_alone(between: Between) -> None:
    between.engine.fails_on = 1
    await between.begin()
    short = await between.guest()
    between.go_on()
    await until_over(between.long)
    assert between.long.failure is not None
    assert "cannot compute this" in between.long.failure.message
    assert short.tokens == expected(SHORT, 1)
    assert short.failure is None
    later = await between.guest([3] * 30)
    await until_over(later)
    assert later.tokens == expected([3] * 30, 1)


@pytest.mark.parametrize("how", ["cancel", "reclaim"])
async def test_the_hosts_slots_are_given_up_only_after_its_own_end(between: Between, how: str) -> None:
    await between.begin()
    lease, slots = between.host.lease_id, between.host.slots.copy()
    if how == "cancel":
        between.loop.cancel(between.host)
    else:
        between.loop.leases.reclaim(lease)
    between.host.change_slots([pb.SlotChange(block=0, slot=between.bench.store.free[0])])
    short = await between.guest()
    await between.next_layer()
    await until_over(short)
    await asyncio.sleep(0.02)
    assert lease in between.bench.store.leases, "the host's forward still writes there"
    assert list(between.host.slots) == list(slots)
    between.go_on()
    while lease in between.bench.store.leases:
        await asyncio.sleep(0.001)
    assert between.computed == [[40], [400]] if how == "cancel" else between.computed[:2] == [[40], [400]]


@pytest.mark.parametrize("how", ["cancel", "reclaim"])
@pytest.mark.parametrize("late", [False, True])
async def test_a_guests_slots_are_given_up_only_when_no_forward_will_use_them(
    between: Between, how: str, late: bool
) -> None:
    """Planned as a guest, and then either computed or, where it is too late, withdrawn."""
    await between.begin()
    if late:
        between.engine.gate = type(between.engine.gate)(0)
        between.engine.pauses.release(2)
        assert await asyncio.to_thread(between.engine.entered.acquire, timeout=10)
    heard = await between.guest()
    (active,) = (active for active in between.loop.actives if active.sink is heard)
    assert active.stepping
    lease = active.lease_id
    if how == "cancel":
        between.loop.cancel(active)
    else:
        between.loop.leases.reclaim(lease)
    await asyncio.sleep(0.02)
    assert lease in between.bench.store.leases
    if late:
        between.engine.gate.release(1000)
    between.go_on()
    await until_over(between.long)
    while lease in between.bench.store.leases:
        await asyncio.sleep(0.001)
    if how == "reclaim":
        await until_over(heard)
        assert heard.tokens == expected(SHORT, 1)
    else:
        assert heard.tokens == []
    assert between.long.tokens == expected(LONG, 1)


async def test_what_is_read_while_the_kvstore_goes_is_told_to_nobody(between: Between) -> None:
    await between.begin()
    short = await between.guest()
    lost = asyncio.create_task(between.loop.lost())
    await asyncio.sleep(0.01)
    assert not lost.done()
    between.go_on()
    await asyncio.wait_for(lost, 10)
    assert between.computed == [[400]], "nothing is begun without a slab"
    for heard in (short, between.long):
        assert heard.tokens == []
        assert heard.failure is not None
        assert heard.failure.retryable


async def test_a_joiner_gets_no_table_of_a_guest_that_may_still_change(between: Between) -> None:
    await between.begin()
    await between.guest()
    await asyncio.sleep(0.02)
    assert "offer" not in between.bench.store.operations


def test_prefill_on_an_interruptible_engine_takes_guests_and_so_computes_longer_chunks() -> None:
    engine, config = LayeredEngine(), WorkerConfig()
    layers = tuple(replace(group, layers=30) for group in engine.card.kv_format.groups)
    engine.card = replace(engine.card, kv_format=replace(engine.card.kv_format, groups=layers))

    def chosen(role: common_pb2.WorkerRole.ValueType, config: WorkerConfig = config) -> tuple[float, int]:
        limits = limits_of(config, role, engine)
        return limits.chunk_s, limits.layers

    prefill, mixed = common_pb2.WORKER_ROLE_PREFILL, common_pb2.WORKER_ROLE_MIXED
    assert chosen(prefill) == (0.5, 30)
    assert chosen(mixed) == chosen(common_pb2.WORKER_ROLE_DECODE) == (0.15, 1)
    assert chosen(prefill, WorkerConfig(chunk_s=0.2)) == (0.2, 30)
    engine.interruptible = False
    assert chosen(prefill) == (0.15, 1)
