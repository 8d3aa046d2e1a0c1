"""The router's settings as the core's rules of placement."""

from __future__ import annotations

import math
import random

from headway.core.baselines import BASELINES
from headway.core.filters import Rules
from headway.core.index import PrefixIndex
from headway.core.links import Links
from headway.core.model import ModelCard
from headway.core.place import Placer
from headway.core.policy import LeastDelay, Planner, Policy
from services.router.config import OURS, RouterConfig


def make_placer(config: RouterConfig, card: ModelCard, index: PrefixIndex, links: Links) -> Placer:
    """For a model."""
    token_bytes = card.kv_format.bytes_per_token if config.link_bytes_per_s else 0
    planner = Planner(links, token_bytes, card.kv_format.block_size)
    ours = config.policy == OURS
    policy: Policy = LeastDelay(planner) if ours else BASELINES[config.policy](planner, random.random)
    rules = Rules(
        card.kv_format.block_size,
        local_prefill_tokens=config.local_prefill_tokens,
        itl_objective_s=config.itl_objective_s or math.inf,
        max_queued=config.max_queued,
        max_wait_s=config.max_wait_s or math.inf,
    )
    return Placer(rules, policy, planner, index)
