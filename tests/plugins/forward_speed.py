"""A metric in one file: tokens per second of the forward pass, of a row's model behind its prefix."""

from __future__ import annotations

import time

from cushion.metrics.columns import Column, Metric, RowContext, Values, register

SPEED = Column("tokens_per_second", "forward pass", "tokens/s", lambda value: f"{value:.0f}", lower_is_better=False)


def measure(row: RowContext) -> Values:
    """The speed on the first block of the first corpus, after one pass to warm up."""
    import torch  # only here: a configuration is checked without it

    if not row.blocks:  # with eval.perplexity=false
        return {SPEED.key: None}
    lm, block = row.cached.lm, next(iter(row.blocks.values()))[0]
    row.model.put_on()
    with torch.no_grad():
        for _ in range(2):
            started = time.perf_counter()
            lm.body(block[None].to(lm.device), past_key_values=row.model.behind.cache(lm.model), use_cache=True)
            seconds = time.perf_counter() - started
    return {SPEED.key: len(block) / seconds}


register(Metric("forward_speed", lambda rows: [SPEED], measure=f"{__name__}:measure"))
