"""Answers held to a JSON schema, a regex or a list of texts, by llguidance (the extra "constrained"; MIT).

Whoever takes constraints from clients has them tried first in a process that may die of them (`headway.text.trial`): a
small regex or schema can keep the library busy for minutes, and nothing but the end of its process stops it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headway.core.sampling import Constraint, ConstraintError, ConstraintKind
from headway.text.errors import TextError

Bools = npt.NDArray[np.bool_]

EXTRA = "answers cannot be constrained here; install the extra: pip install 'headway[constrained]'"
# Compiled constraints that are kept, those used last.
KEPT = 16
# CPU seconds that one sequence's matcher may use for each token on average, and beyond that in all.
TOKEN_S = 0.005
SPARE_S = 0.25
# Of the library. Lexer states take one or two kilobytes each; ten thousand of lexer fuel are about a millisecond.
LIMITS = {
    "max_lexer_states": 10_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}
# Between the parts of JSON: a small model left alone with spaces and line breaks may write nothing else.
JSON_OPTIONS = {"whitespace_pattern": r"[ \n]{0,40}"}


class LibraryMissing(TextError):
    """llguidance is not installed."""


class Grammars:
    """Makes matchers for one model. `matcher` may be called from one thread at a time, and takes milliseconds.

    The tokenizer of the model folder `path` is read at once (0.5 s, in which no other thread runs; 30 MB for 49,152
    tokens); "" is the byte tokenizer. Raises LibraryMissing, and TextError where the tokenizer is of a kind that the
    library does not know.
    """

    def __init__(self, path: str, vocabulary: int, eos_token_ids: Sequence[int]) -> None:
        library = _library()
        self._vocabulary = vocabulary
        self._eos = tuple(eos_token_ids)
        self._limits = library.LLParserLimits(**LIMITS)
        try:
            self._tokenizer: Any = _tokenizer(library, path, vocabulary, self._eos)
        except Exception as error:  # of whatever the library meets in the file
            raise TextError(f"answers of this model cannot be constrained: {_first_line(error)}") from None
        self._compiled: OrderedDict[Constraint, Any] = OrderedDict()

    def matcher(
        self, constraint: Constraint, outputs: Sequence[int] = (), stop_token_ids: Iterable[int] = ()
    ) -> GrammarMatcher:
        """After `outputs`. Those of the model's end tokens that are among stop_token_ids may end the answer.

        Raises ConstraintError.
        """
        compiled = self._compiled.get(constraint)
        if compiled is None:
            with _panics():
                compiled = self._compile(constraint)
            self._compiled[constraint] = compiled
        self._compiled.move_to_end(constraint)
        if len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)
        stops = frozenset(stop_token_ids)
        ends = [token for token in self._eos if token in stops]
        matcher = GrammarMatcher(compiled.deep_copy(), self._vocabulary, self._tokenizer.eos_tokens, ends)
        matcher.prepare(outputs)
        return matcher

    def _compile(self, constraint: Constraint) -> Any:
        compiled = _library().LLMatcher(self._tokenizer, grammar_of(constraint), log_level=0, limits=self._limits)
        # The first mask is the dearest: most of the lexer's tables are made for it.
        compiled.compute_bitmask()
        if compiled.is_error():
            raise ConstraintError(sentence_of(compiled.get_error()))
        return compiled


class GrammarMatcher:
    """A Matcher (see headway.engine.contract) around the library's. `end_tokens` are all that it takes for ends, `ends`
    those that may be drawn.
    """

    def __init__(self, matcher: Any, vocabulary: int, end_tokens: Iterable[int], ends: Sequence[int]) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._end_tokens = np.array([token for token in end_tokens if token < vocabulary], np.int64)
        self._ends = np.array(ends, np.int64)
        # What the library has been fed, and what may follow that, once known.
        self._fed: list[int] = []
        self._allowed: Bools | None = None
        self._complete = False
        self._left_s = SPARE_S
        self._most_fed = 0

    def prepare(self, outputs: Sequence[int]) -> None:
        """As `allowed`, without counting the time. Raises ConstraintError."""
        self._go_to(outputs)
        self._most_fed = len(outputs)

    def allowed(self, outputs: Sequence[int]) -> Bools:
        """See Matcher."""
        started = time.thread_time()
        allowed = self._go_to(outputs)
        self._count(time.thread_time() - started)
        return allowed

    def complete(self, outputs: Sequence[int]) -> bool:
        """See Matcher."""
        if outputs and outputs[-1] in self._end_tokens:
            return True
        self.allowed(outputs)
        return self._complete

    def _go_to(self, outputs: Sequence[int]) -> Bools:
        with _panics():
            self._feed(outputs)
            if self._allowed is None:
                self._allowed = self._compute()
            return self._allowed

    def _feed(self, outputs: Sequence[int]) -> None:
        outputs = list(outputs)
        keep = len(self._fed)
        if outputs[:keep] != self._fed:
            keep = next((at for at, (a, b) in enumerate(zip(self._fed, outputs, strict=False)) if a != b), len(outputs))
        if keep < len(self._fed):
            self._matcher.rollback(len(self._fed) - keep)
            self._fed, self._allowed = self._fed[:keep], None
        if new := outputs[keep:]:
            self._allowed = None
            self._fed += new[: self._matcher.try_consume_tokens(new)]
        self._check()
        if len(self._fed) < len(outputs):
            raise ConstraintError(f"token {outputs[len(self._fed)]} of the answer does not fit the constraint")

    def _compute(self) -> Bools:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=self._vocabulary, bitorder="little").view(np.bool_)
        met = self._matcher.is_accepting()
        allowed[self._end_tokens] = False
        self._complete = not allowed.any()
        if self._complete and not met:
            raise ConstraintError("the constraint cannot be met: no token may come next")
        allowed[self._ends] = met
        return allowed

    def _check(self) -> None:
        """In its error state the library answers too, but wrongly."""
        if self._matcher.is_error():
            raise ConstraintError(f"the constraint is too complex: {sentence_of(self._matcher.get_error())}")

    def _count(self, seconds: float) -> None:
        new = max(0, len(self._fed) - self._most_fed)
        self._most_fed += new
        self._left_s = min(SPARE_S, self._left_s + TOKEN_S * new) - seconds
        if self._left_s < 0:
            raise ConstraintError("the constraint takes too long for each token; simplify it")


@contextlib.contextmanager
def _panics() -> Iterator[None]:
    """A panic of the library is no Exception, and would end the worker."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ConstraintError(
            "the library that holds answers to constraints broke down; change the constraint"
        ) from None


def compile_alone(constraint: Constraint) -> None:
    """All that can go wrong without a model. Raises ConstraintError, LibraryMissing; it may take for ever."""
    Grammars("", 256, ()).matcher(constraint)


def grammar_of(constraint: Constraint) -> str:
    """In the library's own form. Raises ConstraintError."""
    library = _library()
    if constraint.kind is ConstraintKind.REGEX:
        return str(library.LLMatcher.grammar_from_regex(constraint.text))
    if constraint.kind is ConstraintKind.CHOICES:
        return str(library.grammar_from("choice", constraint.text))
    try:
        schema = json.loads(constraint.text)
    except (ValueError, RecursionError) as error:
        raise ConstraintError(f"the JSON schema is not JSON: {_first_line(error)}") from None
    if schema is not True and not isinstance(schema, dict):
        raise ConstraintError("the JSON schema must be an object, or true for any JSON")
    text = "{}" if schema is True else constraint.text
    return str(library.LLMatcher.grammar_from_json_schema(text, defaults=JSON_OPTIONS))


def sentence_of(message: str) -> str:
    """One line of the library's message: in several, that which names the error, else the first."""
    lines = [line.strip() for line in message.splitlines()] or [message]
    named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    sentence = (named or lines)[0][:300]
    return sentence if " " in sentence else f"no text can meet it ({sentence})"


def _tokenizer(library: Any, path: str, vocabulary: int, eos: Sequence[int]) -> Any:
    if path:
        text = (Path(path) / "tokenizer.json").read_text(encoding="utf-8")
        return library.LLTokenizer(text, n_vocab=vocabulary, eos_token=list(eos) or None)
    return library.LLTokenizer(library.TokenizerWrapper(_Bytes()), n_vocab=257, eos_token=[256], slices=[])


class _Bytes:
    """The byte tokenizer, with the end token that the library wants."""

    eos_token_id = 256
    bos_token_id = None
    special_token_ids = (256,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise LibraryMissing(EXTRA) from None
    return llguidance


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
