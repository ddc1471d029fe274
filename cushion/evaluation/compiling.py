"""The decoder as `torch.compile` makes it, for as long as it is timed.

Compilation fuses what lies around the products: norms, rotary embeddings, activation functions, and the rounding of the
inputs of quantized linears. Sums are then taken in another order, so that no number of a table but seconds is computed
this way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cushion.errors import ConfigError
from cushion.models import LanguageModel

MOST_GRAPHS = 64
"""Versions of one decoder: for every pair of a variant and a kind of input (a prompt, one token, cached or not)."""


@contextmanager
def compiled(lm: LanguageModel) -> Iterator[None]:
    """Within the context the decoder runs compiled; each kind of input is compiled when it comes for the first time.

    Raises:
        torch._dynamo.exc.FailOnRecompileLimitHit: from the decoder, after more than `MOST_GRAPHS` versions of it, where
            torch would go on without compiling.

    """
    body: nn.Module = lm.model.base_model
    earlier = body._compiled_call_impl
    with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS, fail_on_recompile_limit_hit=True):
        body.compile()
        try:
            yield
        finally:
            body._compiled_call_impl = earlier


def check_compiler(device: torch.device) -> None:
    """Compile two operations and raise `ConfigError` where this machine cannot: on a CPU it needs a C++ compiler."""

    def tried(values: Tensor) -> Tensor:
        return values.mul(2).add(1)

    try:
        torch.compile(tried, fullgraph=True)(torch.ones(8, device=device))
    except Exception as error:  # whatever a compiler's absence raises, which differs between systems and releases
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"eval.latency.compile=true needs what torch.compile needs, and on {device} it fails: {reason}; install a "
            "C++ compiler (on a GPU, Triton), or set eval.latency.compile=false"
        ) from error
