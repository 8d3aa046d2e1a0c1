"""Constraints at the router: tried once, in a child that may hang, die or be missing without harm to anything else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from headway.core.sampling import Constraint, ConstraintKind
from headway.runtime.errors import HeadwayError
from headway.v1 import common_pb2
from services.router import constraints
from services.router.constraints import ConstraintCheck
from tests.router.fakes import Fake, Rig

pytest.importorskip("llguidance", reason="llguidance is not installed (pip install .[constrained])")

INVALID, UNABLE = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
# Twenty patterns that a text has to match at once: their product takes for ever.
ENDLESS = json.dumps({"allOf": [{"type": "string", "pattern": f".*{chr(97 + at)}.*"} for at in range(20)]})


@pytest.fixture
async def check() -> AsyncIterator[ConstraintCheck]:
    check = ConstraintCheck()
    yield check
    child = check._child
    check.close()
    if child is not None:
        await child.wait()


def regex(text: str) -> Constraint:
    return Constraint(ConstraintKind.REGEX, text)


async def refusal(check: ConstraintCheck, constraint: Constraint) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(HeadwayError) as caught:
        await check.check(constraint)
    return caught.value.code, caught.value.message


async def test_good_and_bad_constraints(check: ConstraintCheck) -> None:
    await check.check(regex("a+"))
    await check.check(Constraint(ConstraintKind.CHOICES, '["é", "b"]'))
    assert await refusal(check, regex("[")) == (INVALID, "constraint: unclosed character class")
    code, sentence = await refusal(check, Constraint(ConstraintKind.JSON_SCHEMA, '{"type": "blah"}'))
    assert (code, sentence) == (INVALID, "constraint: Invalid type: blah")


async def test_a_verdict_is_remembered(check: ConstraintCheck) -> None:
    await check.check(regex("a+"))
    await refusal(check, regex("["))
    child = check._child
    assert child is not None
    child.kill()
    await child.wait()
    await check.check(regex("a+"))
    assert await refusal(check, regex("[")) == (INVALID, "constraint: unclosed character class")


async def test_a_known_constraint_waits_for_no_trial(check: ConstraintCheck) -> None:
    await check.check(regex("a+"))
    endless = asyncio.create_task(check.check(Constraint(ConstraintKind.JSON_SCHEMA, ENDLESS)))
    await asyncio.sleep(0.05)
    await check.check(regex("a+"))
    assert not endless.done()
    child = check._child
    endless.cancel()
    await asyncio.gather(endless, return_exceptions=True)
    assert child is not None
    await child.wait()


async def test_a_child_that_was_killed_is_replaced(check: ConstraintCheck) -> None:
    await check.check(regex("a+"))
    first = check._child
    assert first is not None
    first.kill()
    await first.wait()
    code, sentence = await refusal(check, regex("b+"))
    assert code is INVALID
    assert "breaks the library" in sentence
    await check.check(regex("c+"))
    assert check._child is not first


async def test_one_that_would_compile_for_ever_is_refused(
    check: ConstraintCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constraints, "TRIAL_S", 0.5)
    code, sentence = await refusal(check, Constraint(ConstraintKind.JSON_SCHEMA, ENDLESS))
    assert code is INVALID
    assert "more than 0.5 s of computing" in sentence
    await check.check(regex("a+"))


async def test_a_request_that_is_cancelled_takes_its_trial_along(check: ConstraintCheck) -> None:
    """Else the next request would get its answer."""
    await check.check(regex("a+"))
    endless = asyncio.create_task(check.check(Constraint(ConstraintKind.JSON_SCHEMA, ENDLESS)))
    await asyncio.sleep(0.05)
    child = check._child
    endless.cancel()
    await asyncio.gather(endless, return_exceptions=True)
    assert check._child is None
    assert child is not None
    await child.wait()
    assert (await refusal(check, regex("[")))[0] is INVALID
    await check.check(regex("b+"))


async def test_without_the_library_the_router_says_what_to_install(
    check: ConstraintCheck, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "llguidance.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    for _ in range(2):
        code, sentence = await refusal(check, regex("a+"))
        assert code is UNABLE
        assert "the router" in sentence
        assert "pip install 'headway[constrained]'" in sentence
    assert check._child is None


def constrained(**kind: object) -> common_pb2.Sampling:
    return common_pb2.Sampling(constraint=common_pb2.Constraint(**kind))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sampling", "sentence"),
    [
        (constrained(), "the constraint is empty; set one of"),
        (constrained(regex="["), "constraint: unclosed character class"),
        (constrained(regex="a" * 8193), "the length of regex in bytes is 8193"),
        (constrained(json_schema='"' + "é" * 32768 + '"'), "the length of json_schema in bytes is 65538"),
        (constrained(choices=common_pb2.Choices()), "the constraint has no choices"),
        (constrained(choices=common_pb2.Choices(texts=["a", ""])), "or one without text"),
        (constrained(choices=common_pb2.Choices(texts=["a"] * 1025)), "the number of choices is 1025"),
        (constrained(choices=common_pb2.Choices(texts=["a" * 16385])), "the length of all choices in bytes is 16385"),
    ],
)
async def test_a_bad_constraint_reaches_no_worker(sampling: common_pb2.Sampling, sentence: str) -> None:
    async with Rig() as rig:
        fake = await rig.add("m0")
        code, details = await rig.refused(rig.request(4, sampling=sampling))
        assert code is INVALID
        assert sentence in details
        assert not fake.starts
        await ended(rig)


async def test_a_good_one_does_and_ends_the_answer_without_a_stop_token() -> None:
    """The last token belongs to the text, other than a stop token."""
    async with Rig() as rig:
        fake = await rig.add("m0")

        def complete_at_3(fake: Fake, sequence: common_pb2.Sequence, index: int) -> bool:
            if index == 2:
                stop = common_pb2.FINISH_REASON_STOP
                fake.put(sequence, tokens={"tokens": [{"token_id": 65, "output_index": 2}], "finish_reason": stop})
                fake.held.pop((sequence.sequence_id, sequence.attempt))
                return True
            return False

        fake.script = complete_at_3
        got = await rig.run(rig.request(9, sampling=constrained(regex="[a-zA-Z]{3}")))
        assert fake.starts[0].sampling.constraint.regex == "[a-zA-Z]{3}"
        assert got.text[0][2:] == "A"
        assert got.finished[0].reason == common_pb2.FINISH_REASON_STOP
        assert not got.finished[0].HasField("stop_token_id")
        await ended(rig)


async def ended(rig: Rig) -> None:
    """The child of its router."""
    child = rig.service.fleet.constraints._child
    rig.service.fleet.constraints.close()
    if child is not None:
        await child.wait()
