"""Constraints: answers made by walking the masks meet them, whatever was asked before, and errors are one sentence."""

from __future__ import annotations

import contextlib
import json
import random
import re
import sys
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.core.sampling import Constraint, ConstraintError, ConstraintKind
from headway.models import DEFAULT, resolve
from headway.text import constrain
from headway.text.constrain import GrammarMatcher, Grammars, LibraryMissing, sentence_of
from headway.text.tokenizer import load_tokenizer

pytest.importorskip("llguidance", reason="llguidance is not installed (pip install .[constrained])")

REGEX, CHOICES, SCHEMA = ConstraintKind.REGEX, ConstraintKind.CHOICES, ConstraintKind.JSON_SCHEMA
PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars("", 256, ())


def ids(text: str) -> list[int]:
    return list(text.encode())


def walk(matcher: GrammarMatcher, seed: int, most: int = 200) -> list[int]:
    """An answer made of random allowed tokens."""
    pick, outputs = random.Random(seed), list[int]()
    while len(outputs) < most and not matcher.complete(outputs):
        outputs.append(pick.choice(np.flatnonzero(matcher.allowed(outputs)).tolist()))
    return outputs


@pytest.mark.parametrize(
    "regex", ["[0-9]{3}-[0-9]{4}", "(yes|no|may be)!", "[a-c]{2,5}x", "(?i)ok", "caf(é|e) \U0001f600"]
)
def test_what_the_masks_allow_matches_the_regex(grammars: Grammars, regex: str) -> None:
    texts = {bytes(walk(grammars.matcher(Constraint(REGEX, regex)), seed)).decode() for seed in range(20)}
    assert all(re.fullmatch(regex, text) for text in texts), texts
    assert len(texts) > 1


def test_every_choice_can_be_made_and_nothing_else(grammars: Grammars) -> None:
    choices = ["red", "green", 'a "quoted"\nline', "naïve"]
    constraint = Constraint(CHOICES, json.dumps(choices))
    assert {bytes(walk(grammars.matcher(constraint), seed)).decode() for seed in range(60)} == set(choices)


def test_json_is_valid_under_its_schema(grammars: Grammars) -> None:
    matcher_of = Constraint(SCHEMA, json.dumps(PERSON))
    for seed in range(20):
        person = json.loads(bytes(walk(grammars.matcher(matcher_of), seed)))
        assert set(person) == {"name", "age"}
        assert person["name"] in ("Ada", "Bob")
        assert 0 <= person["age"] <= 150


def test_no_more_than_some_space_comes_between_the_parts_of_json(grammars: Grammars) -> None:
    matcher = grammars.matcher(Constraint(SCHEMA, '{"type": "object"}'))
    assert matcher.allowed(ids("{" + " " * 39))[ord(" ")]
    assert not matcher.allowed(ids("{" + " " * 40))[ord(" ")]


def test_any_json_may_be_asked_for(grammars: Grammars) -> None:
    matcher = grammars.matcher(Constraint(SCHEMA, "true"))
    assert all(matcher.allowed([])[ord(character)] for character in '{["-0tfn')


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 1 << 20))
def test_masks_are_a_pure_function_of_the_outputs(grammars: Grammars, order: list[int], seed: int) -> None:
    """Forward, back (as from rejected drafts), elsewhere, and in a matcher that starts in the middle."""
    constraint = Constraint(SCHEMA, json.dumps(PERSON))
    one = grammars.matcher(constraint)
    answers = [walk(grammars.matcher(constraint), seed), walk(grammars.matcher(constraint), seed + 1)]
    for at, step in enumerate(order):
        answer = answers[(seed >> at) & 1]
        outputs = answer[: step * len(answer) // 9]
        fresh = grammars.matcher(constraint, outputs)
        assert one.complete(outputs) == fresh.complete(outputs) == (outputs == answer)
        assert np.array_equal(one.allowed(outputs), fresh.allowed(outputs))


def test_a_token_that_does_not_fit_is_an_error_and_harms_nothing(grammars: Grammars) -> None:
    matcher = grammars.matcher(Constraint(REGEX, "ab*c"))
    with pytest.raises(ConstraintError, match="token 120 of the answer does not fit"):
        matcher.allowed(ids("abx"))
    assert np.flatnonzero(matcher.allowed(ids("ab"))).tolist() == ids("bc")
    with pytest.raises(ConstraintError, match="does not fit"):
        grammars.matcher(Constraint(REGEX, "ab*c"), ids("b"))


@pytest.mark.model
def test_end_tokens_are_allowed_only_where_the_constraint_is_met(real: Grammars) -> None:
    """Id 2 ends the default model's answers; id 0 (<|endoftext|>) is special, and never text."""
    (a,) = load_tokenizer(str(resolve(DEFAULT))).encode("a")
    matcher = real.matcher(Constraint(REGEX, "a{1,2}"), (), {2})
    assert not matcher.allowed([])[2]
    assert matcher.allowed([a])[2]
    assert not matcher.complete([a])
    assert matcher.complete([a, a])
    assert np.flatnonzero(matcher.allowed([a, a])).tolist() == [2]
    assert matcher.complete([a, 2])
    going_on = real.matcher(Constraint(REGEX, "a{1,2}"))
    assert not going_on.allowed([a])[[0, 2]].any()
    assert not going_on.allowed([a, a]).any()


@pytest.mark.parametrize(
    ("kind", "text", "sentence"),
    [
        (REGEX, "[", "unclosed character class"),
        (REGEX, "(?=a)b", "look-around"),
        (REGEX, r"(a)\1", "backreferences are not supported"),
        (SCHEMA, "{", "the JSON schema is not JSON: Expecting property name"),
        (SCHEMA, "[]", "the JSON schema must be an object"),
        (SCHEMA, "false", "the JSON schema must be an object"),
        (SCHEMA, "[" * 100_000, "the JSON schema is not JSON"),
        (SCHEMA, '{"type": "blah"}', "Invalid type: blah"),
        (SCHEMA, '{"not": {}}', "Unimplemented keys"),
        (SCHEMA, '{"$ref": "http://127.0.0.1:1/x"}', "does not fetch resources"),
        (SCHEMA, '{"$ref": "#"}', "no text can meet it"),
        (SCHEMA, '{"type": "integer", "minimum": 5, "maximum": 3}', "Unsatisfiable"),
    ],
)
def test_bad_constraints_are_refused_with_one_line(
    grammars: Grammars, kind: ConstraintKind, text: str, sentence: str
) -> None:
    with pytest.raises(ConstraintError, match=re.escape(sentence)) as caught:
        grammars.matcher(Constraint(kind, text))
    assert "\n" not in str(caught.value)


@pytest.mark.model
def test_a_constraint_that_outgrows_the_librarys_limits_is_refused(real: Grammars) -> None:
    with pytest.raises(ConstraintError, match="lexer error: too many expressions"):
        real.matcher(Constraint(REGEX, "(.{0,1000}){0,1000}b"))


def masks_in_time(matcher: GrammarMatcher, outputs: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many masks a matcher makes, by a clock that says that each took 20 ms."""
    now, done = iter(range(10_000)), 0
    monkeypatch.setattr(constrain.time, "thread_time", lambda: next(now) * 0.02)
    with contextlib.suppress(ConstraintError):
        for count in range(100):
            matcher.allowed(outputs(count))
            done += 1
    with pytest.raises(ConstraintError, match="takes too long"):
        matcher.allowed(outputs(done))
    return done


def test_a_constraint_that_takes_too_long_ends_its_own_answer(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.25 s to spare, of which each token takes 20 ms and gives 5."""
    matcher = grammars.matcher(Constraint(REGEX, "a*"))
    assert masks_in_time(matcher, lambda count: [97] * count, monkeypatch) == 16


def test_drafts_that_come_again_earn_no_time(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    matcher = grammars.matcher(Constraint(REGEX, "a*"))
    assert masks_in_time(matcher, lambda count: [97] * (1 + count % 2), monkeypatch) == 12


class Overgrown:
    """The library's matcher past its limits: it says so, and answers all the same, with the end token."""

    def is_error(self) -> bool:
        return True

    def get_error(self) -> str:
        return "lexer error: too many expressions constructed"

    def compute_bitmask(self) -> bytes:
        return bytes([4, *[0] * 31])

    def is_accepting(self) -> bool:
        return True


def test_masks_of_the_librarys_error_state_are_not_used() -> None:
    with pytest.raises(ConstraintError, match="too complex: lexer error: too many expressions"):
        GrammarMatcher(Overgrown(), 256, [2], [2]).allowed([])


class PanicException(BaseException):
    """As PyO3 raises it where Rust code panics."""


class Panicking:
    """The library's matcher, on a bad day."""

    def is_error(self) -> bool:
        return False

    def compute_bitmask(self) -> bytes:
        raise PanicException("index out of bounds")


def test_a_panic_of_the_library_ends_one_answer_only(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConstraintError, match="broke down"):
        GrammarMatcher(Panicking(), 256, (), ()).allowed([])
    monkeypatch.setattr(Grammars, "_compile", lambda self, constraint: Panicking().compute_bitmask())
    with pytest.raises(ConstraintError, match="broke down"):
        grammars.matcher(Constraint(REGEX, "never seen before"))


def test_only_some_compiled_constraints_are_kept(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Constraint] = []
    compile_one = Grammars._compile

    def counted(self: Grammars, constraint: Constraint) -> object:
        compiled.append(constraint)
        return compile_one(self, constraint)

    monkeypatch.setattr(Grammars, "_compile", counted)
    many = [Constraint(REGEX, f"x{at}") for at in range(constrain.KEPT + 1)]
    for constraint in [*many, many[-1], many[0]]:
        grammars.matcher(constraint)
    assert compiled == [*many, many[0]]
    assert len(grammars._compiled) == constrain.KEPT


def test_without_the_library_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(LibraryMissing, match=re.escape("pip install 'headway[constrained]'")):
        Grammars("", 256, ())


def test_the_line_that_names_the_error_is_taken() -> None:
    assert sentence_of('at 1(8): invalid regex "["\n  [\n  ^\nerror: unclosed class\n') == "unclosed class"
    assert sentence_of("schema too large\nmore") == "schema too large"
    assert sentence_of("") == "no text can meet it ()"


@pytest.fixture(scope="module")
def real() -> Grammars:
    try:
        return Grammars(str(resolve(DEFAULT)), 49152, (2,))
    except LookupError as error:
        pytest.skip(str(error))


@pytest.mark.model
@pytest.mark.parametrize("text", ['{"name": "Ada", "age": 7}', '{"name":"Bob","age":150}'])
def test_the_models_own_tokens_of_a_valid_answer_are_allowed(real: Grammars, text: str) -> None:
    tokens: Sequence[int] = load_tokenizer(str(resolve(DEFAULT))).encode(text)
    matcher = real.matcher(Constraint(SCHEMA, json.dumps(PERSON)), (), {2})
    for at, token in enumerate(tokens):
        assert matcher.allowed(tokens[:at])[token]
        assert not matcher.complete(tokens[:at])
    assert matcher.complete(tokens)
