"""Cancel, deadline, overload, stop strings, choices, text: what a client may do to a request."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from headway.core.load import WorkerLoad
from headway.runtime.convert import ids_from_bytes
from headway.v1 import common_pb2, router_pb2
from services.router.job import PIECE_TOKENS, token_ids_of
from tests.router.fakes import PROMPT, Fake, Got, Rig, expected, until

STOP = common_pb2.FINISH_REASON_STOP


def never(fake: Fake, sequence: common_pb2.Sequence, index: int) -> bool:
    return True


@pytest.mark.parametrize("tokens_seen", [0, 1, 3])
async def test_cancel_reaches_both_workers(tokens_seen: int) -> None:
    async with Rig() as rig:
        prefill, decode = await rig.add("p0"), await rig.add("d0")

        def script(fake: Fake, sequence: common_pb2.Sequence, index: int) -> bool:
            return index >= tokens_seen

        prefill.script = decode.script = script
        call, got = rig.stub.Generate(rig.request(50)), Got()
        while got.started is None or len(got.tokens.get(0, ())) < tokens_seen:
            got.add(await call.read())
        await until(lambda: decode.held)
        call.cancel()
        await rig.quiet()
        # Once decode has joined the lease, prefill has nothing left to cancel.
        await until(lambda: (len(prefill.cancels), len(decode.cancels)) == (int(tokens_seen < 2), 1))


@pytest.mark.parametrize("by_grpc", [True, False])
async def test_deadline_ends_a_request_that_nobody_answers(by_grpc: bool) -> None:
    async with Rig() as rig:
        prefill, decode = await rig.add("p0"), await rig.add("d0")
        prefill.script = never
        started = time.monotonic()
        if by_grpc:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in rig.stub.Generate(rig.request(5), timeout=0.2):
                    pass
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await rig.quiet()
        else:
            code, sentence = await rig.refused(rig.request(5, deadline_s=0.2))
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "deadline of 0.2 s" in sentence
        assert time.monotonic() - started < 1.5
        await until(lambda: len(prefill.cancels) == len(decode.cancels) == 1)


async def test_deadline_counts_while_waiting_for_a_worker() -> None:
    async with Rig() as rig:
        fake = await rig.add("p0")
        code, _ = await rig.refused(rig.request(5, deadline_s=0.1))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert not fake.starts


async def test_client_that_does_not_read_loses_its_request_only() -> None:
    async with Rig(max_buffered=64) as rig:
        fake = await rig.add("m0")
        burst = 2_000

        def flood(fake: Fake, sequence: common_pb2.Sequence, index: int) -> bool:
            if index < 3 or sequence.max_tokens < 10:
                return False
            for at in range(burst):
                fake.put(sequence, tokens={"tokens": [{"token_id": 97, "output_index": 3 + at}]})
            return True

        fake.script = flood
        code, sentence = await _flooded(rig)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "does not read" in sentence
        got = await rig.run(rig.request(5))
        assert got.tokens[0] == expected(PROMPT, 5)
        await rig.quiet()


async def _flooded(rig: Rig) -> tuple[grpc.StatusCode, str]:
    """Run a request whose client is stuck: its `send` never returns until the request is ended."""
    from headway.runtime.errors import HeadwayError
    from services.router.generate import generate

    async def send(response: router_pb2.GenerateResponse) -> None:
        if response.HasField("delta"):
            await asyncio.sleep(60)

    try:
        await generate(rig.request(50), "x", rig.service.fleet, rig.config, 30.0, send)
    except HeadwayError as error:
        return error.code, error.message
    raise AssertionError("the request was served")


async def test_too_many_in_flight_are_refused_with_a_hint() -> None:
    async with Rig(max_in_flight=1) as rig:
        fake = await rig.add("m0")
        fake.script = never
        running = asyncio.create_task(rig.run(rig.request(5)))
        await until(lambda: fake.held)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.run(rig.request(5))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "grpc-status-details-bin" in dict(caught.value.trailing_metadata() or ())
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await rig.quiet()


def load(rig: Rig, worker_id: str) -> WorkerLoad:
    return rig.service.fleet.workers[worker_id].load


async def test_full_queues_are_refused() -> None:
    async with Rig(max_queued=2) as rig:
        fake = await rig.add("m0")
        fake.status.waiting_sequences = 2
        await until(lambda: load(rig, "m0").queued == 2)
        code, sentence = await rig.refused(rig.request(5))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "queue is full" in sentence


async def test_prompt_larger_than_the_slab_is_refused_at_once() -> None:
    async with Rig() as rig:
        fake = await rig.add("m0")
        fake.status.total_slots = 2
        await until(lambda: load(rig, "m0").total_slots == 2)
        started = time.monotonic()
        code, sentence = await rig.refused(rig.request(5, prompt=[1] * 30))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "needs 8 slots, its node has 2); shorten it" in sentence
        assert time.monotonic() - started < 1.0


async def test_request_id_in_flight_is_refused_and_free_again_later() -> None:
    async with Rig() as rig:
        fake = await rig.add("m0")
        fake.script = never
        running = asyncio.create_task(rig.run(rig.request(5, request_id="one")))
        await until(lambda: fake.held)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.run(rig.request(5, request_id="one"))
        assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await rig.quiet()
        fake.script = lambda fake, sequence, index: False
        await rig.run(rig.request(5, request_id="one"))


@pytest.mark.parametrize("first", range(8))
@pytest.mark.parametrize("length", [1, 2, 3])
async def test_stop_strings_across_token_borders(first: int, length: int) -> None:
    text = "".join(map(chr, expected(PROMPT, 30)))
    stop = text[first : first + length]
    async with Rig() as rig:
        prefill, decode = await rig.add("p0"), await rig.add("d0", step_s=0.001)
        got = await rig.run(rig.request(30, stop_strings=[stop, "ZZ"]))
        assert got.text[0] == text[: text.index(stop)]
        assert got.finished[0].reason == STOP
        assert got.finished[0].stop_string == stop
        assert got.finished[0].usage.output_tokens == text.index(stop) + length == len(got.tokens[0])
        await rig.quiet()
        await until(lambda: decode.cancels and (prefill.cancels or text.index(stop) + length > 1))


async def test_text_held_back_for_a_stop_string_comes_at_the_end() -> None:
    text = "".join(map(chr, expected(PROMPT, 6)))
    async with Rig() as rig:
        await rig.add("m0")
        got = await rig.run(rig.request(6, stop_strings=[text[-2:] + "?"]))
        assert got.text[0] == text
        assert got.finished[0].reason == common_pb2.FINISH_REASON_LENGTH


async def test_stop_token_ends_the_text_before_itself() -> None:
    tokens = expected(PROMPT, 30)
    async with Rig() as rig:
        await rig.add("m0")
        got = await rig.run(rig.request(30, stop_token_ids=[tokens[5]]))
        at = tokens.index(tokens[5])
        assert got.tokens[0] == tokens[: at + 1]
        assert got.text[0] == "".join(map(chr, tokens[:at]))
        assert got.finished[0].stop_token_id == tokens[5]


async def test_choices_share_the_prompt_computed_by_the_first() -> None:
    async with Rig() as rig:
        prefill, _ = await rig.add("p0"), await rig.add("d0")
        seen: list[tuple[int, int]] = []

        def script(fake: Fake, sequence: common_pb2.Sequence, index: int) -> bool:
            seen.append((sequence.choice, len(prefill.starts)))
            return False

        prefill.script = script
        sampling = common_pb2.Sampling(temperature=1.0)
        got = await rig.run(rig.request(6, n=4, sampling=sampling))
        assert seen[0] == (0, 1)
        assert sorted(choice for choice, _ in seen) == [0, 1, 2, 3]
        assert sorted(got.finished) == [0, 1, 2, 3]
        assert all(tokens == expected(PROMPT, 6) for tokens in got.tokens.values())
        seeds = {start.sampling.seed for start in prefill.starts}
        assert len(seeds) == 1
        assert seeds != {0}
        await rig.quiet()


async def test_death_under_several_choices() -> None:
    async with Rig() as rig:
        fakes = [await rig.add("m0", step_s=0.002), await rig.add("m1", step_s=0.002)]
        died = False

        def script(fake: Fake, sequence: common_pb2.Sequence, index: int) -> bool:
            nonlocal died
            if not died and sequence.choice == 2 and index == 3:
                died = True
                fake.die()
                return True
            return False

        for fake in fakes:
            fake.script = script
        got = await rig.run(rig.request(10, n=3))
        assert all(got.tokens[choice] == expected(PROMPT, 10) for choice in range(3))
        await rig.quiet()


async def test_sampling_reaches_workers_and_a_given_seed_stays() -> None:
    async with Rig() as rig:
        fake = await rig.add("m0")
        sampling = common_pb2.Sampling(temperature=0.5, top_k=3, seed=11)
        await rig.run(rig.request(2, sampling=sampling, priority=4, top_logprobs=2, ignore_eos=True))
        (start,) = fake.starts
        assert start.sampling == sampling
        assert (start.priority, start.top_logprobs, list(start.stop_token_ids)) == (4, 2, [])
        await rig.run(rig.request(2))
        assert list(fake.starts[-1].stop_token_ids) == [255]
        assert not fake.starts[-1].sampling.HasField("seed")


async def test_reading_a_long_prompt_lets_others_go_between_its_pieces() -> None:
    prompt = list(range(5 * PIECE_TOKENS - 1))
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(other())
    packed = await token_ids_of(router_pb2.TokenPrompt(token_ids=prompt).token_ids)
    beside.cancel()
    assert packed.tolist() == prompt
    assert turns == 4


async def test_text_and_chat_prompts() -> None:
    async with Rig() as rig:
        fake = await rig.add("m0")
        await rig.run(router_pb2.GenerateRequest(text=b"hi", max_tokens=2))
        assert bytes(ids_from_bytes(fake.starts[-1].tokens).tolist()[:2]) == b"hi"
        chat = router_pb2.ChatPrompt(messages=[router_pb2.ChatMessage(role="user", content="hi")])
        await rig.run(router_pb2.GenerateRequest(chat=chat, max_tokens=2))
        assert bytes(ids_from_bytes(fake.starts[-1].tokens).tolist()).startswith(b"user: hi\nassistant: ")


async def test_answer_is_cut_to_what_the_context_leaves() -> None:
    async with Rig() as rig:
        await rig.add("m0")
        got = await rig.run(rig.request(prompt=[1] * 60, max_tokens=50))
        assert got.finished[0].usage.output_tokens == 4


async def test_long_prompts_come_in_pieces() -> None:
    from dataclasses import replace

    from headway.core.keys import block_keys, join_keys
    from tests.router import fakes

    async with Rig() as rig:
        fake = Fake("m0", common_pb2.WORKER_ROLE_MIXED)
        fake.status.total_slots = 10_000
        fake.card = replace(fakes.CARD, context_tokens=40_000)
        await fake.start(rig.address)
        rig.fakes.append(fake)
        await until(lambda: rig.service.fleet.workers and load(rig, "m0").ready)
        prompt = [at % 200 for at in range(20_000)]
        died = False

        def script(fake: Fake, sequence: common_pb2.Sequence, index: int) -> bool:
            nonlocal died
            if died or index != 5:
                return False
            died = True
            problem = common_pb2.Failure(code=10, message="again", retryable=True)
            fake.put(sequence, failure=problem)
            return True

        fake.script = script
        got = await rig.run(rig.request(10, prompt=prompt))
        assert got.tokens[0] == expected(prompt, 10)
        first, second = fake.starts
        keys = block_keys(first.key_namespace, prompt + got.tokens[0][:5], fakes.BLOCK)
        assert second.block_keys == join_keys(keys)
        assert first.block_keys == join_keys(keys[:5000])
