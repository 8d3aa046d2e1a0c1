"""A request's life on scripted workers."""

from __future__ import annotations

import pytest

from headway.v1 import common_pb2
from tests.router.fakes import PROMPT, Rig, expected, until

LENGTH = common_pb2.FINISH_REASON_LENGTH


async def test_answer_comes_from_both_workers() -> None:
    async with Rig() as rig:
        prefill, decode = await rig.add("p0"), await rig.add("d0")
        got = await rig.run(rig.request(8, request_id="mine"))
        assert got.tokens[0] == expected(PROMPT, 8)
        assert got.text[0] == "".join(map(chr, expected(PROMPT, 8)))
        finished = got.finished[0]
        assert (finished.reason, finished.prefill_worker, finished.decode_worker) == (LENGTH, "p0", "d0")
        assert (finished.usage.prompt_tokens, finished.usage.output_tokens) == (5, 8)
        assert (finished.usage.cached_tokens, finished.usage.computed_tokens) == (0, 5)
        assert 0 < finished.timings.route_s < finished.timings.ttft_s < finished.timings.total_s
        assert got.started is not None
        assert (got.started.request_id, got.started.model) == ("mine", "toy")
        await rig.quiet()
        assert not prefill.cancels
        assert not decode.cancels
        # Start in one message; Expect and Begin in one, or two if prefill takes long.
        assert (prefill.messages, decode.begins) == (1, 1)
        assert decode.messages <= 2


async def test_one_token_needs_no_decode() -> None:
    async with Rig() as rig:
        _, decode = await rig.add("p0"), await rig.add("d0")
        got = await rig.run(rig.request(1))
        assert got.tokens[0] == expected(PROMPT, 1)
        await rig.quiet()
        await until(lambda: len(decode.cancels) == 1)


@pytest.mark.parametrize("name", ["m0", "d0"])
async def test_worker_without_prefill_workers_computes_by_itself(name: str) -> None:
    async with Rig() as rig:
        await rig.add(name)
        got = await rig.run(rig.request(8))
        assert got.tokens[0] == expected(PROMPT, 8)
        assert (got.finished[0].prefill_worker, got.finished[0].decode_worker) == ("", name)
        assert got.finished[0].usage.computed_tokens == 5
        await rig.quiet()
