"""The decoder as `torch.compile` makes it, for as long as it is timed.

Compilation fuses what lies around the products: norms, rotary embeddings, activation functions, and the rounding of the
inputs of quantized linears. Sums are then taken in another order, so that no number of a table but seconds is computed
this way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit

from cushion.errors import ConfigError
from cushion.models import LanguageModel

MOST_GRAPHS = 64
"""Versions of one decoder: for every pair of a variant and a kind of input (a prompt, one token, cached or not)."""
SETTINGS: dict[str, Any] = {
    "recompile_limit": MOST_GRAPHS,
    "fail_on_recompile_limit_hit": True,
    "skip_nnmodule_hook_guards": False,  # a rotation of inputs is a hook, which a graph made without it would leave out
}


@contextmanager
def compiled(lm: LanguageModel) -> Iterator[None]:
    """Within the context the decoder runs compiled; each kind of input is compiled when it comes for the first time.

    Raises:
        ConfigError: more than `MOST_GRAPHS` versions of the decoder, where torch would go on without compiling.

    """
    body: nn.Module = lm.model.base_model
    earlier = body._compiled_call_impl
    with torch._dynamo.config.patch(**SETTINGS):
        body.compile()
        try:
            yield
        except FailOnRecompileLimitHit as error:
            raise ConfigError(
                f"eval.latency.compile=true would make more than {MOST_GRAPHS} versions of the decoder: name fewer "
                "eval.latency.batch_sizes and eval.latency.prompt_lengths, or set it to false"
            ) from error
        finally:
            body._compiled_call_impl = earlier


def forget_graphs() -> None:
    """Drop all that was compiled so far: versions of the decoder count for what is timed next alone."""
    torch._dynamo.reset()


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
