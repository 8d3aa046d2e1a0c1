"""Small fleets for tests of placement, in which a token takes a millisecond."""

from __future__ import annotations

from typing import Any

from headway.core.ask import Ask, Option, Refusal
from headway.core.backlog import Prompt
from headway.core.filters import Rules
from headway.core.index import PrefixIndex
from headway.core.links import Links
from headway.core.load import Role, Share, WorkerLoad
from headway.core.place import Placer
from headway.core.policy import LeastDelay, Planner
from headway.core.predict import Predictor

SLOW = Predictor((0.0, 1e-3, 0.0), (0.01, 0.001, 0.0))
KEYS = [bytes([at]) * 16 for at in range(64)]


def worker(worker_id: str, *, queued_s: float = 0.0, running: int = 0, **fields: Any) -> WorkerLoad:
    """ "p…" prefill, "d…" decode, "m…" mixed, ready on node "n"; `queued_s`: of one prompt that it computes."""
    role = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}[worker_id[0]]
    known = {"node": "n", "role": role, "ready": True, "total_slots": 100, "predictor": SLOW}
    load = WorkerLoad(worker_id, **{**known, **fields})
    load.others_are(Share(running))
    if queued_s:
        load.backlog.add(Prompt("before", (0, 0.0), queued_s, 1), 0.0)
    return load


def placer(*workers: WorkerLoad, latency_s: float = 0.0, token_s: float = 0.0, **rules: Any) -> Placer:
    """A KV token is one byte, so that `token_s` is what a link takes for it."""
    links = Links(latency_s, 1 / token_s if token_s else 1e12)
    planner = Planner(links, token_bytes=1, block_size=16)
    made = Placer(
        Rules(**{"block_size": 16, "local_prefill_tokens": 20, "max_queued": 10, **rules}),
        LeastDelay(planner),
        planner,
        PrefixIndex(1000),
    )
    for load in workers:
        made.add(load)
    return made


def ask(**fields: Any) -> Ask:
    return Ask(**{"prompt_tokens": 100, **fields})


def picked(made: Placer, **fields: Any) -> tuple[str | None, str]:
    option = made.place(ask(**fields), 0.0)
    assert option is not None, weighed(made, ask(**fields))
    return option.prefill_worker, option.decode_worker


def weighed(made: Placer, wanted: Ask) -> list[Option]:
    return made.options(wanted, 0.0, made.place(wanted, 0.0))


def reasons(options: list[Option]) -> dict[str, str]:
    return {option.worker: option.refused.sentence if option.refused else "" for option in options}


def why_not(made: Placer, worker_id: str, **fields: Any) -> Refusal | None:
    return next(option.refused for option in weighed(made, ask(**fields)) if option.worker == worker_id)
