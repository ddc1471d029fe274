"""A run's quantized model as a checkpoint of compressed-tensors, which transformers loads as it is.

The library has the format: names, packing, config.json. Here the run's scales are copied into it, and the loaded
checkpoint is compared with the simulation before the folder appears.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.initialize import is_cached_attention_module
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from cushion.errors import ArtifactError, ConfigError
from cushion.evaluation.perplexity import BlockLoss, chunks, perplexity, predicting_states, summed_loss
from cushion.execution.base import Execution
from cushion.export.checkpoint_card import PREFIX_FOLDER, Agreement, checkpoint_card
from cushion.export.finished import FinishedRun
from cushion.export.peft_adapter import write_adapter
from cushion.export.prefix_tokens import TOLERANCE
from cushion.export.refit import Refitted, refit
from cushion.export.schemes import TARGET, Scheme, scheme_of
from cushion.models import LanguageModel
from cushion.quantization.attention import static_cache_scales
from cushion.quantization.cache_ranges import keys_of, values_of
from cushion.quantization.fitted import FittedQuantizer, rounded
from cushion.quantization.formats.floats import E4M3, round_to_float
from cushion.quantization.formats.nvfp4 import tensor_scale
from cushion.quantization.linear import ActivationQuantizer
from cushion.quantization.numerics import QuantizedWeight


def write(run: FinishedRun, folder: Path) -> None:
    """Write checkpoint, adapter and model card into an empty folder.

    Raises:
        ConfigError: the format does not express this model.
        ArtifactError: the run cannot be fitted again as it was, or what was written does not give its logits.

    """
    again = refit(run)
    check_architecture(again.lm, again.fitted)
    if len(again.prefix):
        (folder / PREFIX_FOLDER).mkdir()
        write_adapter(again.prefix, folder / PREFIX_FOLDER, run.published_as or folder.name, None)
    scheme = scheme_of(again.fitted.config)
    kept = save(again.lm, again.fitted, scheme, folder)
    agreement = compare(again, folder, scheme)
    if scheme.differs is None and agreement.difference != 0:
        raise ArtifactError(
            f"the checkpoint gives other logits than the simulation, by up to {agreement.difference:.2g}, where it "
            "should give the same: this is a mistake of Cushion or of the installed compressed-tensors, so nothing "
            "is written; try its version in requirements/constraints.txt"
        )
    check_measured(again, agreement)
    excess = agreement.exported / agreement.simulated - 1
    if not excess <= TOLERANCE:
        raise ArtifactError(
            f"the checkpoint as transformers runs it has a perplexity of {agreement.exported:.2f}, {excess:.1%} above "
            f"{agreement.simulated:.2f} of the simulation: it is broken so, and nothing is written ({scheme.differs})"
        )
    (folder / "README.md").write_text(checkpoint_card(run, folder.name, scheme, kept, agreement), encoding="utf-8")


def check_measured(again: Refitted, agreement: Agreement) -> None:
    """Raise `ArtifactError` where the model that was fitted again is far from the one that the run measured."""
    if agreement.measured is None:
        return
    ratio = agreement.simulated / agreement.measured
    if not 1 / (1 + TOLERANCE) <= ratio <= 1 + TOLERANCE:
        raise ArtifactError(
            f"fitted again, the run's row has a perplexity of {agreement.simulated:.2f} on the first "
            f"{agreement.blocks} blocks of {agreement.corpus!r}, and the run measured {agreement.measured:.2f}: code, "
            "cached steps, processor or execution are not those of the run, so nothing is written; run it again here, "
            "with execution=simulated, and export that"
        )


def check_architecture(lm: LanguageModel, fitted: FittedQuantizer) -> None:
    """Raise `ConfigError` where the quantized model is not one that transformers builds from its configuration."""
    kind, stream = lm.architecture.model_type, lm.architecture.residual
    if lm.architecture.experts is not None:
        raise ConfigError(
            f"--to={TARGET} does not express experts as {lm.label} has them ({kind!r}): transformers keeps their "
            "weights in fused tensors, which have no linears to quantize; export a model without experts"
        )
    if fitted.config.kv_cache.bits is not None:
        settings = lm.model.config.get_text_config()
        if getattr(settings, "num_key_value_heads", None) is None:
            raise ConfigError(
                f"--to={TARGET} does not express quantizer.kv_cache on {lm.label}: its configuration does not say "
                "num_key_value_heads, which compressed-tensors reads; run with quantizer.kv_cache.bits=null, then "
                "export that run"
            )
    if fitted.config.rotation == "none":
        return
    assert stream is not None
    norm = lm.model.get_submodule(stream.final_norm)
    if isinstance(norm, nn.LayerNorm) or stream.embedding_norm is not None or stream.post_norms:
        raise ConfigError(
            f"--to={TARGET} does not express quantizer.rotation={fitted.config.rotation} on {lm.label}: the "
            f"architecture {kind!r} has norms that do not commute with it, and what stands for them is not in "
            "transformers; run with quantizer.rotation=none, then export that run"
        )


class Gathering(Execution):
    """Plain linears with the dequantized weights, and beside them what compressed-tensors has to know of each."""

    def __init__(self) -> None:
        self.weights: dict[nn.Module, QuantizedWeight] = {}  # without their codes
        self.inputs: dict[nn.Module, ActivationQuantizer | None] = {}

    def linear(
        self, weight: QuantizedWeight | Tensor, bias: Tensor | None, activation: ActivationQuantizer | None
    ) -> nn.Module:
        """A linear of torch, whose class is what the targets of a checkpoint name; arguments as in `Execution`."""
        assert isinstance(weight, QuantizedWeight) and weight.offset is None
        outputs, inputs = weight.shape
        placed = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
        placed.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
        if bias is not None:
            placed.bias = nn.Parameter(bias, requires_grad=False)
        self.weights[placed], self.inputs[placed] = replace(weight, codes=torch.empty(0)), activation
        return placed


@torch.no_grad()
def save(lm: LanguageModel, fitted: FittedQuantizer, scheme: Scheme, folder: Path) -> list[str]:
    """Save the model under a quantizer, with its tokenizer; afterwards it is as it was before.

    Returns:
        The quantized linears whose input stays in floating point while that of others does not.

    """
    gathering = Gathering()
    with (
        fitted.surroundings(lm) as work,
        rounded(work, gathering) as placed,
        _untied_where_they_differ(lm),
        _attention_as_it_was(lm.model),
    ):
        kept = [name for name, linear in placed.items() if scheme.inputs and gathering.inputs[linear] is None]
        _apply(lm.model, scheme, list(placed), kept)
        if scheme.cache is not None:
            _copy_cache_scales(lm)
        for linear in placed.values():
            _copy_scales(cast(nn.Linear, linear), gathering.weights[linear], gathering.inputs[linear])
        compressor = ModelCompressor.from_pretrained_model(lm.model)
        compressor.compress_model(lm.model)
        compressor.remove_decompression_hook(lm.model)
        lm.model.save_pretrained(folder, save_original_format=False)  # a text part alone has names of its own
        compressor.update_config(str(folder))
    lm.tokenizer.save_pretrained(folder)
    return kept


def _apply(model: nn.Module, scheme: Scheme, quantized: list[str], kept: list[str]) -> None:
    """Give every quantized linear its scheme, and parameters for its scales."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    groups = {}
    if len(kept) < len(quantized):
        groups["group_0"] = _group(["Linear"], scheme.weights, scheme.inputs, scheme.format)
    if kept:
        groups["group_1"] = _group(kept, scheme.kept_weights, None, scheme.kept_format)
    if scheme.inputs is None:
        groups = {"group_0": _group(["Linear"], scheme.kept_weights, None, scheme.format)}
    config = QuantizationConfig(
        config_groups=groups,
        quantization_status="frozen",
        ignore=[name for name in linears if name not in set(quantized)],
        kv_cache_scheme=None if scheme.cache is None else QuantizationArgs(**scheme.cache),
    )
    apply_quantization_config(model, config, show_progress=False)


def _group(targets: list[str], weights: dict[str, Any], inputs: dict[str, Any] | None, form: str) -> QuantizationScheme:
    arguments = {"input_activations": None if inputs is None else QuantizationArgs(**inputs), "format": form}
    return QuantizationScheme(targets=targets, **arguments, **{"weights": QuantizationArgs(**weights)})


def _copy_scales(linear: nn.Linear, weight: QuantizedWeight, activation: ActivationQuantizer | None) -> None:
    """The run's scales and zero point in the parameters that compressed-tensors has made for them."""
    own, scale = cast(Tensor, linear.weight_scale), weight.scale
    scales = scale.flatten(1) if scale.dim() == 3 else scale  # (out, groups, 1), (out, 1) or (1, 1)
    if hasattr(linear, "weight_global_scale"):  # NVFP4
        assert weight.whole is not None
        whole = tensor_scale(weight.whole)
        cast(Tensor, linear.weight_global_scale).fill_(1 / whole)
        scales = round_to_float(scales / whole, E4M3.exponent, E4M3.mantissa, E4M3.largest)
    own.copy_(scales.reshape(-1) if own.dim() == 1 else scales.expand(own.shape))
    if activation is None or activation.parameters is None:
        return
    input_scale, offset = activation.parameters
    if hasattr(linear, "input_global_scale"):
        # 1 / t, and t is 1 where all of calibration was zero
        cast(Tensor, linear.input_global_scale).fill_(E4M3.largest / input_scale if bool(input_scale > 0) else 1.0)
        return
    cast(Tensor, linear.input_scale).fill_(input_scale)
    if not activation.grid.symmetric:  # codes from 0 on are stored as signed integers
        zero = torch.round(-offset / input_scale) - 2 ** (activation.grid.bits - 1)
        cast(Tensor, linear.input_zero_point).fill_(zero)


def _copy_cache_scales(lm: LanguageModel) -> None:
    """The scales of keys and values in the parameters that compressed-tensors has made for them in each attention.

    Raises:
        ConfigError: it has not found the attention of every block.

    """
    scales, found = static_cache_scales(lm), 0
    for module in lm.model.modules():
        if is_cached_attention_module(module) and hasattr(module, "k_scale"):
            layer, found = cast(Any, module).layer_idx, found + 1
            for own, name in ((module.k_scale, keys_of(layer)), (module.v_scale, values_of(layer))):
                placed = cast(Tensor, own)
                placed.copy_(scales[name].reshape(placed.shape))
    if found != len(lm.blocks):
        raise ConfigError(
            f"--to={TARGET} does not express quantizer.kv_cache on {lm.label}: compressed-tensors finds the attention "
            f"of {found} of its {len(lm.blocks)} blocks; run with quantizer.kv_cache.bits=null, then export that run"
        )


@contextmanager
def _attention_as_it_was(model: nn.Module) -> Iterator[None]:
    """On leaving, the attention modules have nothing of compressed-tensors any more."""
    before = {
        module: {key: copy(own) if isinstance(own, dict | set) else own for key, own in vars(module).items()}
        for module in model.modules()
        if is_cached_attention_module(module)
    }
    try:
        yield
    finally:
        for module, own in before.items():
            vars(module).clear()
            vars(module).update(own)


@contextmanager
def _untied_where_they_differ(lm: LanguageModel) -> Iterator[None]:
    """Within the block, the configuration says of embeddings and lm_head what they are: a rotation sets them apart."""
    settings, head = lm.model.config, lm.model.get_output_embeddings()
    before = settings.tie_word_embeddings
    try:
        if head is not None and head.weight is not lm.model.get_input_embeddings().weight:
            settings.tie_word_embeddings = False
        yield
    finally:
        settings.tie_word_embeddings = before


@torch.no_grad()
def compare(again: Refitted, folder: Path, scheme: Scheme) -> Agreement:
    """Load a checkpoint as anybody would, and run it beside the simulation, on the first blocks of the row."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, scheme.dtype), **scheme.attention)
    loaded.to(again.lm.device).eval()
    loaded(again.blocks[:1, :1].to(again.lm.device))  # its first pass takes the weights out of their compressed form
    other = replace(again.lm, model=loaded)
    largest, losses = 0.0, list[tuple[BlockLoss, BlockLoss]]()
    with again.fitted.on(again.lm):
        for batch in again.blocks.split(again.batch_size):
            difference, *both = _side_by_side(again, other, batch.to(again.lm.device))
            largest = max(largest, difference)
            losses.append((both[0], both[1]))
    simulated, exported = (perplexity(list(one)) for one in zip(*losses, strict=True))
    count, length = again.blocks.shape
    measured = perplexity(list(again.measured)) if again.measured else None
    return Agreement(again.corpus, count, length, largest, simulated, exported, measured)


def _side_by_side(again: Refitted, other: LanguageModel, batch: Tensor) -> tuple[float, BlockLoss, BlockLoss]:
    """The largest difference of two logits on a batch of blocks, and the loss of either model."""
    models = again.lm, other
    hidden = [predicting_states(lm, again.prefix, batch) for lm in models]
    targets = batch[:, 1:]
    largest, sums = 0.0, [0.0, 0.0]
    for part in chunks(targets.shape[1]):
        ours, theirs = (lm.logits(states[:, part]).float() for lm, states in zip(models, hidden, strict=True))
        largest = max(largest, (ours - theirs).abs().max().item())
        counted = slice(max(0, again.first - 1 - part.start), None)
        for index, logits in enumerate((ours, theirs)):
            sums[index] += summed_loss(logits[:, counted], targets[:, part][:, counted])
    if math.isnan(sums[0]) or math.isnan(sums[1]):
        largest = math.nan
    tokens = targets[:, again.first - 1 :].numel()
    return largest, BlockLoss(sums[0], tokens), BlockLoss(sums[1], tokens)
