"""The loss of prefix tuning, `L = L_pred + lambda * L_q` (CushionCache, section 4.2), on whatever model is there.

L_pred is the next-token cross entropy behind the prefix, or the divergence from full precision behind the found prefix
(`loss`): behind the one that learns, full precision could come down to the quantized model instead. L_q is the
quantization error of the following tokens, summed over sites. What the paper leaves open is a key:

- `gradient`: with scale and offset held constant, a straight-through round makes the gradient of L_q exactly zero
  (`straight_through`), and no straight-through only pulls X to the nearest grid point (`nearest_grid_point`). The
  default (`range`) lets the gradient through the scale instead: L_q = s^2 * sum(e^2) with the rounding error e in units
  of s held constant, so that lowering L_q means lowering the range, which is what outliers decide.
- `reduction`: what a site's sum of squares is divided by: nothing (`sum`), its tokens (`token`), its elements (`mean`);
  or all of L_q by what it was before tuning (`relative`), the only one without the unit of X squared.
- `error_site`: X is the output of every block (as in the search, default) or the input of every linear.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cushion.activations import observe_inputs, observe_outputs
from cushion.config import SearchConfig, TuningConfig
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.numerics import Grid, fake_quantize
from cushion.quantization.text_errors import error_grid, on_scales

_IGNORED = -100


def differentiable_error(values: Tensor, grid: Grid, gradient: str) -> Tensor:
    """`||X - q(X)||^2` of each text as the search measures it, with one of three gradients towards X.

    Args:
        values: X, shape (texts, tokens, features).
        gradient: `range`, `nearest_grid_point` or `straight_through`, as explained at the head of this file.

    Returns:
        float32, shape (texts,). The value does not depend on `gradient`.

    """
    shaped, scale, offset = on_scales(values.float(), grid)
    constant, fixed_scale = shaped.detach(), scale.detach()
    rounded = fake_quantize(constant, fixed_scale, offset.detach(), grid)
    if gradient == "range":
        unit_error = (rounded - constant).div_(fixed_scale).square_().sum(-1)
        return (scale[..., 0].square() * unit_error).flatten(1).sum(1)
    if gradient == "nearest_grid_point":
        return (shaped - rounded).square().flatten(1).sum(1)
    assert gradient == "straight_through"
    return (shaped - (shaped + (rounded - constant))).square().flatten(1).sum(1)


class TuningLoss:
    """`L_pred + lambda * L_q` of a batch of texts behind a prefix.

    Args:
        lm: the model, in full precision while this is made; the quantizer is put on it afterwards.
        objective: gives the grid of q, the same as in the search.
        found: the prefix before tuning, behind which full precision says what is to be matched, with `loss: kl`.
        without_quantizer: the model in full precision for the length of a `with` block, where the loss needs it.

    Attributes:
        error_unit: what L_q is divided by, with `reduction: relative`.

    """

    def __init__(
        self,
        lm: LanguageModel,
        config: TuningConfig,
        objective: SearchConfig,
        found: Prefix,
        without_quantizer: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._lm, self._config, self._found, self._without_quantizer = lm, config, found, without_quantizer
        self._grid = error_grid(objective)
        self._linear_names = list(lm.linears())  # taken while they are still plain linears
        self.error_unit = 1.0

    def __call__(self, prefix: Prefix, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, its prediction part and its error part, each a scalar. `texts`: token ids (texts, tokens)."""
        errors: list[Tensor] = []
        texts = texts.to(self._lm.device)

        def observe(_name: str, values: Tensor) -> None:
            # an expert sees the tokens that are routed to it, which no longer lie text by text
            groups = len(texts) if values.shape[:-1].numel() == texts.numel() else 1
            error = differentiable_error(values.reshape(groups, -1, values.shape[-1]), self._grid, config.gradient)
            parts = {"mean": values.numel(), "token": texts.numel()}.get(config.reduction, len(texts))
            errors.append((error / (parts / groups)).mean())

        config = self._config
        expected = self._full_precision(texts) if config.loss == "kl" else None
        with self._observed(observe):
            logits = self._logits(prefix, texts)
        prediction = _next_token(logits, texts) if expected is None else _divergence(logits, expected)
        on_one_device = [error.to(logits.device) for error in errors]
        error = torch.stack(on_one_device).sum() if errors else prediction.new_zeros(())
        if config.reduction == "relative":
            error = error / self.error_unit
        return prediction + config.lambda_q * error, prediction, error

    def _logits(self, prefix: Prefix, texts: Tensor) -> Tensor:
        cache = prefix.cache(self._lm.model, len(texts))
        logits: Tensor = self._lm.model(input_ids=texts, past_key_values=cache, use_cache=True).logits
        return logits

    @torch.no_grad()
    def _full_precision(self, texts: Tensor) -> Tensor:
        with self._without_quantizer():
            return self._logits(self._found, texts)

    def _observed(self, observe: Any) -> AbstractContextManager[None]:
        if self._config.lambda_q == 0:
            return nullcontext()
        if self._config.error_site == "block_outputs":
            return observe_outputs(self._lm.named_blocks, observe)
        modules = {name: self._lm.model.get_submodule(name) for name in self._linear_names}
        return observe_inputs(modules, observe)


def _next_token(logits: Tensor, texts: Tensor) -> Tensor:
    """Mean cross entropy over all tokens but the first of each text, in nats."""
    # the last position predicts nothing: an ignored target, where slicing would copy logits and their gradient
    targets = functional.pad(texts[:, 1:], (0, 1), value=_IGNORED).flatten().to(logits.device)
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=_IGNORED)


def _divergence(logits: Tensor, expected: Tensor) -> Tensor:
    """KL(p || q) of the distributions over the vocabulary, `p` from `expected`, mean over all positions, in nats."""
    q, p = (functional.log_softmax(one.flatten(0, 1).float(), dim=-1) for one in (logits, expected))
    return functional.kl_div(q, p, reduction="batchmean", log_target=True)
