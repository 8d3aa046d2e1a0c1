"""What every engine is: chunks of sequences in, drawn tokens out, K and V in the slab.

An engine needs no state of sequences: whatever it must know comes with each chunk, and K and V live in the slab. So a
sequence can go on in any worker that maps the slab. What it keeps beside (a copy of K and V) it makes from the slab.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from headway.core.model import ModelCard
from headway.core.sampling import ConstraintError, Sampling


class Matcher(Protocol):
    """Holds one sequence to its constraint: pure functions of its outputs, whatever was asked before. For one thread.

    Going on from the outputs of the last call costs the new ones; going back (from drafts) or elsewhere is allowed.
    Both raise ConstraintError where the outputs do not fit, or the constraint takes too long.
    """

    def allowed(self, outputs: Sequence[int]) -> npt.NDArray[np.bool_]:
        """bool [vocabulary], not to be written to: what may follow; end tokens only where the constraint is met."""

    def complete(self, outputs: Sequence[int]) -> bool:
        """Whether nothing but an end token may follow, or one came."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How to draw the token that follows a chunk.

    context: prompt proper and outputs so far, including the chunk's tokens (only read where the sampling needs it).
    prompt_tokens: how many of `context` are the prompt proper (presence and frequency penalties count outputs only;
        the repetition penalty counts all, as transformers does).
    top_logprobs: None for no log probabilities, else how many of the most likely tokens to name.
    matcher: of the sequence; there must be one where the sampling has a constraint.
    """

    sampling: Sampling
    output_index: int
    choice: int = 0
    context: Sequence[int] = ()
    prompt_tokens: int = 0
    top_logprobs: int | None = None
    matcher: Matcher | None = None

    @property
    def outputs(self) -> Sequence[int]:
        """Those in `context`."""
        return self.context[self.prompt_tokens :]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [position, position + len(tokens)) of one sequence, whose earlier K and V are in the slab.

    slots: the sequence's block table, int32 [blocks]; token t lives in slots[t // block_size] at t % block_size.
    draw: None when more of the prompt follows. drafts: so many of the last tokens are guesses of what is to be drawn; a
        draw is of what follows the token before them, and after it with each draft that was right the next one.
    sequence: names it for as long as it decodes here, until `forget`; the
        engine may keep a copy of its K and V meanwhile. None: it has no name, and there is no copy.
    """

    tokens: Sequence[int]
    position: int
    slots: npt.NDArray[np.int32]
    draw: Draw | None
    sequence: Hashable | None = None
    drafts: int = 0

    @property
    def draws(self) -> list[Draw]:
        """How to draw after each of the last 1 + drafts tokens, if those before it are right."""
        draw = self.draw
        if draw is None or not self.drafts:
            return [] if draw is None else [draw]
        guessed = self.tokens[len(self.tokens) - self.drafts :]
        return [
            replace(
                draw,
                output_index=draw.output_index + right,
                context=[*draw.context, *guessed[:right]] if draw.context else (),
            )
            for right in range(self.drafts + 1)
        ]

    def kept(self, drawn: Sequence[Drawn | ConstraintError]) -> Drawn | ConstraintError:
        """What was drawn, of one for each of `draws`: the last is the first that differs from its draft. Where the
        constraint leaves nothing after drafts that were right, they are kept, and the next step says so.
        """
        first, guessed = drawn[0], self.tokens[len(self.tokens) - self.drafts :]
        if isinstance(first, ConstraintError) or not self.drafts:
            return first
        kept = [first]
        for draft, following in zip(guessed, drawn[1:], strict=True):
            if kept[-1].token_id != draft or isinstance(following, ConstraintError):
                break
            kept.append(following)
        return replace(first, drafted=self.drafts, then=tuple(kept[1:]))


@dataclass(frozen=True, slots=True)
class Drawn:
    """A drawn token; log probabilities are of the distribution before temperature, truncation and constraint.

    copied_bytes: K and V that were copied for this step, so that attention reads them in one piece.
    complete: the constraint allows nothing more. drafted: drafts that its chunk had. then: what was drawn after it in
        the same forward, one token for each draft that was right.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    copied_bytes: int = 0
    complete: bool = False
    drafted: int = 0
    then: tuple[Drawn, ...] = ()


class SlabArray(Protocol):
    """An array of any library that is exported by DLPack without a copy: numpy.ndarray, cupy.ndarray, torch.Tensor."""

    def __dlpack__(self, *, stream: Any = None) -> Any: ...

    def __dlpack_device__(self) -> tuple[Any, Any]: ...


class DeviceLost(Exception):
    """The device does not work any more, for no sequence: this process has to end. One sentence."""


class Engine(Protocol):
    """Safe to call from one thread at a time.

    After forward() returns, K and V of all chunks are in the slab, also for other processes: where the slab lies on a
    device, the host has waited for it. So blocks are sealed and slots released without an event between processes.
    """

    card: ModelCard
    # Whether forward() lets others in between its layers.
    interruptible: bool

    def bind(self, slab: SlabArray) -> None:
        """Use this slab from now on: uint8 [slots, slot_stride], writable, of card.kv_format, on the model's device."""

    def unbind(self) -> None:
        """Let go of the slab (its owner is gone)."""

    def scratch(self, slots: int, stride: int) -> SlabArray:
        """Memory like a slab's, uint8 [slots, stride], to measure forwards in before there is a slab."""

    def use_threads(self, count: int) -> None:
        """Compute with so many threads from now on; called by the thread that calls forward."""

    def forget(self, sequence: Hashable) -> None:
        """The sequence of this name goes on elsewhere, from its start, or nowhere. From any thread; an unknown one is
        ignored.
        """

    def forward(
        self, chunks: Sequence[Chunk], between: Callable[[], None] | None = None
    ) -> list[Drawn | ConstraintError | None]:
        """Compute all chunks in one pass, write their K and V, and draw where asked; one entry a chunk, in order: an
        error where the constraint of that sequence leaves nothing to draw.

        K and V of drafts that were wrong are left in the slab; those of the tokens drawn instead take their place.

        between: called by an interruptible engine between any two layers, where no chunk is a step of a sequence that
        has a name; never after the last layer. It may call forward() for other chunks, without a `between`.

        Raises DeviceLost when no later forward can succeed either; then nothing more may be launched. An engine that
        may raise it is not interruptible.
        """
