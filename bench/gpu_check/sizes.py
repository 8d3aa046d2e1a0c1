"""How large everything is: on a GPU, and in a dry run on NumPy that only shows that the check itself works."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Tokens, unless named otherwise. `shape` goes to LlamaConfig; weights are random, nothing is downloaded.

    handoff_slots, handoffs: slots a handoff, and how many are timed. staging_slot, staging_slots: bytes a slot, and
    slots a copy. prompts, new: of the greedy comparison. prefills: lengths. batches: of decode, at `context` each.
    """

    shape: dict[str, int]
    handoff_slots: int
    handoffs: int
    staging_slot: int
    staging_slots: int
    rounds: int
    prompts: tuple[int, ...]
    new: int
    prefills: tuple[int, ...]
    batches: tuple[int, ...]
    context: int
    steps: int
    # Bytes of a plain copy, and rows and columns of a product, against which steps are held.
    copied: int
    matrix: int
    # Two processes against one: prompts and their length, steps and sequences that decode meanwhile.
    together: tuple[int, int, int, int]


FULL = Sizes(
    shape={
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 8192, "vocab_size": 32768, "max_position_embeddings": 16384,
    },
    handoff_slots=64, handoffs=2000,
    staging_slot=512 << 10, staging_slots=512, rounds=7,
    prompts=(1, 15, 16, 17, 100, 333, 700, 1500), new=32,
    prefills=(128, 512, 2048, 8192), batches=(1, 2, 4, 8, 16, 32, 64), context=1024, steps=20,
    copied=1 << 30, matrix=8192,
    together=(16, 1024, 200, 16),
)  # fmt: skip

TINY = Sizes(
    shape={
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96, "vocab_size": 512, "max_position_embeddings": 512,
    },
    handoff_slots=8, handoffs=50,
    staging_slot=100_000, staging_slots=64, rounds=2,
    prompts=(1, 15, 16, 17, 60), new=6,
    prefills=(16, 64), batches=(1, 4), context=64, steps=2,
    copied=1 << 20, matrix=128,
    together=(2, 32, 4, 2),
)  # fmt: skip
