"""Rotation of the residual stream, folded into the weights for the length of a `with` block.

## Rotation

After QuaRot (arXiv [2404.00456](https://arxiv.org/abs/2404.00456)), its rotation of the residual stream alone. With
an orthogonal Q, every row x of the stream becomes x Q, and the function stays as it was:

- Embeddings (and learned positions) E become E Q; linears that write the stream, y = W h + b, become Q^T W, Q^T b.
- The weight g of an RMSNorm moves into the linears that read it, W diag(g) Q, and the norm keeps a weight of one.
  lm_head reads the last norm in the same way, apart from the embeddings where it is tied to them.
- LayerNorm subtracts the mean, which a rotation does not commute with. What writes the stream is centred, x C Q with
  C = I - 1 1^T / n, the norm's weight and bias move into its readers, and an RMSNorm takes its place.
- Behind a norm whose output goes to the stream as it is (behind BLOOM's embeddings, say) stands a multiplication with
  the matrix. Where a variant's norms stand in the stream itself (OPT-350m), the rotation is refused.

Q = diag(signs) H / sqrt(n), with random signs (`quantizer.rotation_seed`) and a Hadamard matrix H. For n that is no
power of two, H is the largest that Paley's constructions over a prime give, doubled as often as needed (576 = 8 x 72,
2304 = 2 x 1152). Where no divisor of n has one, Q is the Kronecker product of a Hadamard matrix for the power of two
in n and a seeded random orthogonal matrix. Folding computes in float64.

SpinQuant (arXiv [2405.16406](https://arxiv.org/abs/2405.16406)) names four places: the stream is R1, the values of a
head R2, its queries and keys R3, the input of the down projection R4. `quantizer=quarot` rotates all of them. R1 and
R4 leave keys and values alone, so a prefix found or tuned without them fits the rotated model as it is.

Order: rotate, then smooth, then quantize. Ranges and smoothing statistics are those of the rotated model. Tuning with
`prediction_model=quantized` runs on the rotated model, so its L_q is the error of the rotated stream (at the site
`block_outputs`) and of the rotated inputs (`linear_inputs`): what is left after the rotation. Search and activation
curves, and tuning with `prediction_model=full_precision`, see the plain model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from accelerate.hooks import add_hook_to_module
from torch import Tensor, nn

from cushion.errors import ConfigError
from cushion.float64 import in_float64, place_of_float64
from cushion.models import LanguageModel
from cushion.models.architectures import expand
from cushion.quantization.effect import Effect, Work
from cushion.quantization.hadamard import randomized_hadamard
from cushion.quantization.quantizer import QuantizerConfig
from cushion.quantization.replacements import Replacements

ROWS_AT_ONCE = 8192
"""Rows of a weight that are multiplied in float64 at once, to bound the memory for large vocabularies."""


class Rotation(nn.Module):
    """Multiply the last dimension with a fixed matrix: for a norm whose output is written to the stream as it is.

    Args:
        matrix: (features, features); applied in float32.

    """

    matrix: Tensor

    def __init__(self, matrix: Tensor, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix.to(device=device, dtype=torch.float32), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """`values`: (..., features) -> the same shape and dtype."""
        return (values.float() @ self.matrix).to(values.dtype)


@contextmanager
@torch.no_grad()
def rotated(lm: LanguageModel, rotation: str = "hadamard", seed: int = 0) -> Iterator[LanguageModel]:
    """The model with its residual stream rotated; on leaving, every weight and module is the very object it was before.

    Args:
        rotation: `hadamard`, or `none` to leave the model alone.
        seed: of the random signs (and of the random part where the size has no Hadamard matrix).

    Raises:
        ConfigError: the stream of this model cannot be rotated.

    """
    check_rotation(lm, rotation)
    replacements, before = Replacements(), lm.rotation
    try:
        if rotation != "none":
            _fold(lm, seed, replacements)
            lm.rotation = (rotation, seed)
        yield lm
    finally:
        lm.rotation = before
        replacements.undo()


def check_rotation(lm: LanguageModel, rotation: str) -> None:
    """Raise `ConfigError` where `quantizer.rotation` does not fit this model, without computing."""
    if rotation == "none":
        return
    stream, settings = lm.architecture.residual, lm.model.config
    key = f"quantizer.rotation={rotation} cannot be used with {lm.label}"
    way_out = "use quantizer.rotation=none"
    if not lm.architecture.smoothing:
        raise ConfigError(
            f"{key}: the architecture {lm.architecture.model_type!r} names no norms that stand before the linears that "
            f"read its residual stream, and those are what a rotation passes through; {way_out}"
        )
    if stream is None:
        raise ConfigError(
            f"{key}: the architecture {lm.architecture.model_type!r} does not name where its residual stream is "
            f"written; {way_out}"
        )
    for name, needed in stream.requires:
        if getattr(settings, name) != needed:
            raise ConfigError(
                f"{key}: its configuration has {name}={getattr(settings, name)}, with which a norm stands where the "
                f"rotation would have to pass through; {way_out}"
            )
    width = settings.get_text_config().hidden_size
    for path in stream.embeddings:
        own = cast(nn.Embedding, lm.model.get_submodule(path)).weight.shape[1]
        if own != width:
            raise ConfigError(
                f"{key}: {path} has {own} features and the residual stream {width}, so that a projection stands "
                f"between them; {way_out}"
            )
    head = lm.model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ConfigError(f"{key}: it has no linear lm_head into which the last norm could be folded; {way_out}")


def _fold(lm: LanguageModel, seed: int, replacements: Replacements) -> None:
    stream, offset = lm.architecture.residual, lm.architecture.norm_offset
    assert stream is not None
    final_norm = lm.model.get_submodule(stream.final_norm)
    back = randomized_hadamard(lm.model.config.get_text_config().hidden_size, seed)
    into = back - back.mean(0, keepdim=True) if isinstance(final_norm, nn.LayerNorm) else back  # C Q, or Q
    if stream.embedding_norm is not None:
        _append(lm.model, stream.embedding_norm, into, replacements)
    else:
        for path in stream.embeddings:
            embedding = lm.model.get_submodule(path)
            _put(embedding, "weight", times(cast(Tensor, embedding.weight), into), replacements)
    for block in lm.blocks:
        for norm_path, reader_paths in lm.architecture.smoothing:
            readers = _weights_of(block, reader_paths)
            _fold_norm(block, norm_path, readers, offset, back, replacements)
        for owner, name in _weights_of(block, stream.writers):
            _fold_writer(owner, name, into, replacements)
        for path in stream.post_norms:
            _append(block, path, into, replacements)
    head = lm.model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    _fold_norm(lm.model, stream.final_norm, [(head, "weight")], offset, back, replacements)


def _weights_of(block: nn.Module, paths: Sequence[str]) -> list[tuple[nn.Module, str]]:
    """Owner and name of the weights at `paths`, each of a linear or, as in fused experts, a parameter itself."""
    found: list[tuple[nn.Module, str]] = []
    for path in (expanded for named in paths for expanded in expand(block, named)):
        owner_path, _, leaf = path.rpartition(".")
        owner = block.get_submodule(owner_path)
        value = getattr(owner, leaf)
        found.append((owner, leaf) if isinstance(value, nn.Parameter) else (value, "weight"))
    return found


def _fold_norm(
    root: nn.Module,
    path: str,
    readers: list[tuple[nn.Module, str]],
    offset: float,
    back: Tensor,
    replacements: Replacements,
) -> None:
    """Move a norm's weight and bias into its readers, rotate their inputs back, and leave a norm without either.

    `offset` is what the norm adds to its weight before it multiplies with it.
    """
    norm: Any = root.get_submodule(path)
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    for owner, name in readers:
        old = cast(Tensor, getattr(owner, name))
        if bias is not None:
            shift = times(old, in_float64(bias.detach())[:, None]).squeeze(-1)
            own = getattr(owner, "bias", None)
            replacements.put(
                owner, "bias", _parameter(shift if own is None else in_float64(own) + in_float64(shift), old)
            )
        gain = 1.0 if weight is None else in_float64(weight.detach()) + offset
        _put(owner, name, times(old, back, gain), replacements)
    if isinstance(norm, nn.LayerNorm):
        like = readers[0][0].weight if weight is None else weight
        plain = nn.RMSNorm(norm.normalized_shape, norm.eps, device=like.device, dtype=like.dtype)
        placed = getattr(norm, "_hf_hook", None)  # of a model that is spread over devices
        if placed is not None:
            add_hook_to_module(plain, placed)
        parent, _, leaf = path.rpartition(".")
        replacements.put(root.get_submodule(parent), leaf, plain.requires_grad_(False).eval())
    elif weight is not None:
        _put(norm, "weight", torch.full_like(weight, 1 - offset), replacements)


def _fold_writer(owner: nn.Module, name: str, into: Tensor, replacements: Replacements) -> None:
    """Rotate what a linear writes: weight (..., out_features, in_features) and bias (out_features,)."""
    weight = cast(Tensor, getattr(owner, name))
    bias = cast("Tensor | None", getattr(owner, "bias", None)) if name == "weight" else None
    _put(owner, name, times(weight.mT, into).mT.contiguous(), replacements)
    if bias is not None:
        _put(owner, "bias", times(bias[None], into)[0], replacements)


def _append(root: nn.Module, path: str, into: Tensor, replacements: Replacements) -> None:
    """Let the output of a norm pass through the rotation, which cannot be folded beyond its weight."""
    norm = root.get_submodule(path)
    parent, _, leaf = path.rpartition(".")
    appended = nn.Sequential(norm, Rotation(into, cast(Tensor, norm.weight).device)).eval()
    replacements.put(root.get_submodule(parent), leaf, appended)


def times(weight: Tensor, matrix: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    """`(weight * gain) matrix` along the last dimension: computed in float64, some rows at a time, for any dtype."""
    place = place_of_float64(weight.device)
    matrix, gain = matrix.to(place), gain.to(place) if isinstance(gain, Tensor) else gain
    rows = weight.detach().reshape(-1, weight.shape[-1])
    kept = torch.promote_types(weight.dtype, torch.float32)
    parts = [((in_float64(part) * gain) @ matrix).to(kept) for part in rows.split(ROWS_AT_ONCE)]
    return torch.cat(parts).reshape(*weight.shape[:-1], matrix.shape[1]).to(weight.device)


def _parameter(values: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(dtype=like.dtype, device=like.device), requires_grad=False)


def _put(owner: nn.Module, name: str, values: Tensor, replacements: Replacements) -> None:
    replacements.put(owner, name, _parameter(values, cast(Tensor, getattr(owner, name))))


class _RotatedStream(Effect):
    def check(self, lm: LanguageModel, config: QuantizerConfig) -> None:
        """The stream can be rotated."""
        check_rotation(lm, config.rotation)

    def around(self, work: Work) -> AbstractContextManager[LanguageModel]:
        """The rotation folded into the weights."""
        return rotated(work.lm, work.config.rotation, work.config.rotation_seed)


ROTATION = _RotatedStream()
