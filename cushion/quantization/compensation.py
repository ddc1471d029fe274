r"""Low-rank compensation of the error of rounded weights: LQER, L2QER and ASER, one method in three norms.

## Low-rank compensation

Beside each rounded weight Q(W) (out x in) stands a branch of rank r in full precision,

    Y = X Q(W)^T + X (L_A L_B)^T

For E = W - Q(W), L_A L_B is the minimum of ||(E - L_A L_B) S|| (Frobenius) over all matrices of rank r. With U,
Sigma, V = SVD(E S) that is L_A = U_r and L_B = U_r^T E, which equals Sigma_r V_r^T S^-1 without an inverse. The
methods differ in S:

| method | S | what is smallest |
|---|---|---|
| `lqer` (LQER, arXiv [2402.02446](https://arxiv.org/abs/2402.02446)) | I | the error of the weight |
| `l2qer` (the same paper) | diag(a), a_j the largest mean of \|X_j\| of any calibration text, as in its public code | between the two |
| `aser` (ASER, arXiv [2411.07762](https://arxiv.org/abs/2411.07762)) | the Cholesky factor of X^T X | the error of the linear's outputs on the calibration texts |

X is what the linear reads behind the row's own prefix where the blocks before are quantized (their weights alone with
`weights.fitted_with=weights`); rows with other prefixes
have other branches. The weights may be rounded in any way (`rtn`, `gptq`, groups, any format), behind smoothing and
rotations. Without its smoothing `aser` is QERA's exact solution (arXiv
[2410.06040](https://arxiv.org/abs/2410.06040)) too.

**ASER's smoothing**, `outliers: f`. The f channels of a linear's input with the largest mean|X_j| mean|W_j| are
divided by m_j = mean|X_j| / min mean|X| of them, and their columns of W multiplied. Q sees zeros there: these columns
are left to the branch, which so needs a rank of at least f. It belongs to each linear, where ASER folds what it can
into the norm before; the function is the same.

- ASER has no public code. Ours: the score and m as above, the damping (`damping` times the mean of the diagonal),
  float64 for all of it, and that the linear's own input is not yet rounded where X is taken.
- The branch reads the same rounded input as Q(W), as in LQER's code. LQER also rounds L_A and L_B to 8 bits; here
  they are exact.
- It is simulated by adding L_A L_B to the dequantized weight, which is the same function up to the rounding of the
  model's own precision; what two more products would cost is in no figure of speed.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cushion.errors import CalibrationError
from cushion.float64 import in_float64
from cushion.quantization.effect import Effect, Site, Turn, Work
from cushion.quantization.gram import gram_matrices, whole
from cushion.quantization.numerics import QuantizedWeight
from cushion.quantization.parts.compensation import CompensationConfig
from cushion.quantization.weights import WEIGHTS

PART = "compensation"


def low_rank(error: Tensor, weighting: Tensor, rank: int | None, share: float | None, least: int = 1) -> Tensor:
    """L_A and L_B, the minimum of `||(E - L_A L_B) S||` (Frobenius) over the matrices of a rank.

    Args:
        error: E, (out_features, in_features), float64.
        weighting: S, (in_features, in_features), float64.
        rank: the largest; None for no bound.
        share: the rank is the smallest whose singular values hold this share of the sum of all; None: it is `rank`.
        least: the smallest rank, whatever the share.

    Returns:
        (rank, out_features + in_features): `L_A^T` and `L_B` side by side.

    """
    left, singular, _ = torch.linalg.svd(error @ weighting, full_matrices=False)
    found = len(singular)
    if share is not None:
        held = singular.cumsum(0)
        found = max(least, int((held < share * held[-1]).sum()) + 1)
    found = min(found, len(singular), len(singular) if rank is None else rank)
    left = left[:, :found]
    return torch.cat([left.T, left.T @ error], dim=1)


def product(factors: Tensor, outputs: int) -> Tensor:
    """`L_A L_B`, (out_features, in_features), of what `low_rank` gave for so many outputs."""
    return factors[:, :outputs].T @ factors[:, outputs:]


def cholesky_factor(gram: Tensor, damping: float) -> Tensor:
    """The lower S with `S S^T = X^T X`, to whose diagonal `damping` times its mean is added.

    Raises:
        CalibrationError: the sum is not positive definite.

    """
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise CalibrationError(
            f"the Gram matrix of a linear's inputs is not positive definite with quantizer.compensation.damping="
            f"{damping:g}: raise the damping, calibrate on more text (quantizer.calibration.samples), or use l2qer"
        )
    return lower


def outlier_scales(magnitudes: Tensor, weight: Tensor, channels: int) -> Tensor:
    """ASER's m: for each chosen channel what its input is divided by, and 0 for the others, (in_features,).

    Args:
        magnitudes: mean |X_j|, (in_features,).
        weight: W, (out_features, in_features).
        channels: how many are chosen at most, those where mean |X_j| mean |W_j| is largest; never one that is 0.

    """
    score = magnitudes * weight.abs().mean(0)
    chosen = score.topk(min(channels, len(score))).indices
    chosen = chosen[score[chosen] > 0]
    scales = torch.zeros_like(magnitudes)
    if len(chosen):
        scales[chosen] = magnitudes[chosen] / magnitudes[chosen].min()
    return scales


@dataclass(frozen=True)
class _Magnitudes:
    """Of what linears read, in float64.

    Args:
        sums: of |X_j| over all tokens, (in_features,).
        largest: the largest mean of |X_j| of any text, (in_features,).
        tokens: how many there are.

    """

    sums: Tensor
    largest: Tensor
    tokens: int

    @classmethod
    def of(cls, values: Tensor) -> _Magnitudes:
        """Of one text, (..., in_features)."""
        sizes = in_float64(values.flatten(0, -2)).abs()
        return cls(sizes.sum(0), sizes.mean(0), len(sizes))

    def with_text(self, other: _Magnitudes) -> _Magnitudes:
        """Of the texts so far and one more."""
        largest = torch.maximum(self.largest, other.largest)
        return _Magnitudes(self.sums + other.sums, largest, self.tokens + other.tokens)


def _not_needed(values: Tensor) -> Tensor:
    """In place of the Gram matrix of a text."""
    return values.new_zeros(0)


def _weighting(config: CompensationConfig, inputs: _Magnitudes, gram: Tensor, divisor: Tensor) -> Tensor:
    """S of a method, for the inputs divided by `divisor`, (in_features,); `gram` is their Gram matrix before that."""
    if config.method == "lqer":
        return torch.eye(len(divisor), dtype=divisor.dtype, device=divisor.device)
    if config.method == "l2qer":
        return torch.diag(inputs.largest / divisor)
    return cholesky_factor(gram / (divisor[:, None] * divisor), config.damping)


def _name_of_scales(name: str) -> str:
    """Under which name the scales of the outliers of a linear stand among what was found."""
    return f"{name}:outliers"


def _divisor(scales: Tensor) -> Tensor:
    """M: m of the chosen channels, 1 of the others."""
    return torch.where(scales > 0, scales, 1)


def _rounded(work: Work, site: Site, scales: Tensor | None) -> QuantizedWeight:
    """Q(W), or, with scales, Q of W M with its chosen columns zeroed."""
    if scales is None:
        assert isinstance(site.weight, QuantizedWeight)
        return site.weight
    weight = site.linear.weight.detach()
    scales = scales.to(weight.device)
    kept = torch.where(scales > 0, 0, weight)
    own = replace(site, weight=kept)
    WEIGHTS.at(work, own)
    assert isinstance(own.weight, QuantizedWeight)
    return own.weight


class _Compensation(Effect):
    def fit(self, turn: Turn) -> dict[str, Tensor]:
        """The factors of the block's linears, by full name, and scales of outliers. An expert without tokens has none.

        Factors are float32, (rank, out_features + in_features), as `low_rank` gives them; scales (in_features,).
        """
        config, seen = turn.work.config.compensation, dict[tuple[str, ...], _Magnitudes]()

        def measured() -> Iterator[tuple[tuple[str, ...], Tensor]]:
            for readers, values in turn.shared_inputs():
                text = _Magnitudes.of(values)
                seen[readers] = seen[readers].with_text(text) if readers in seen else text
                yield readers, values

        grams = gram_matrices(measured(), whole if config.method == "aser" else _not_needed)
        found = {}
        for readers, inputs in seen.items():
            for name in readers:
                site, scales = turn.sites[name], None
                weight = in_float64(site.linear.weight.detach())
                divisor = torch.ones_like(inputs.sums)
                if config.outliers:
                    scales = outlier_scales(inputs.sums / inputs.tokens, weight, config.outliers).float()
                    divisor = _divisor(scales).double()
                    found[_name_of_scales(name)] = scales
                rounded = in_float64(_rounded(turn.work, site, scales).dequantize())
                weighting = _weighting(config, inputs, grams[readers], divisor)
                factors = low_rank(
                    weight * divisor - rounded, weighting, config.rank, config.share, config.outliers or 1
                )
                assert name not in found
                found[name] = factors.float()
        return found

    def at(self, work: Work, site: Site) -> None:
        """The branch added to the rounded weight, and outliers of the input divided."""
        scales, device = None, site.linear.weight.device
        if work.config.compensation.outliers:
            scales = work.fit_of(PART, _name_of_scales(site.name)).to(device)
            site.divisor = _divisor(scales)
        rounded = _rounded(work, site, scales)
        branch = product(work.fit_of(PART, site.name).to(device), rounded.shape[0])
        site.weight = (rounded.dequantize().float() + branch).to(rounded.dtype)


COMPENSATION = _Compensation()
"""What it does to a model: `quantizer.compensation`."""
