"""A model's own modules as the forward of the engine: any family, at about 10 ms more a forward on a CPU."""

from __future__ import annotations

from typing import Any

import torch

from headway.engine.pages import Plan


class StockModel:
    """Around a transformers causal language model whose attention is `paged_attention`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, last: torch.Tensor, plan: Plan) -> torch.Tensor:
        """See engine.steps_device.Forward."""
        output = self._model(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=last, headway_plan=plan
        )
        logits: torch.Tensor = output.logits[0]
        return logits
