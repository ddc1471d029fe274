"""Whether a quantizer fits a model: refused before anything is computed."""

from __future__ import annotations

from cushion.errors import ConfigError
from cushion.models import LanguageModel
from cushion.models.architectures import unmet
from cushion.quantization.attention import check_attention
from cushion.quantization.quantizer import QuantizerConfig
from cushion.quantization.rotation import check_rotation


def check_quantizer(lm: LanguageModel, config: QuantizerConfig) -> None:
    """Raise `ConfigError` when targets, group size, rotation or smoothing do not fit this model, without computing."""
    check_rotation(lm, config.rotation)
    check_attention(lm, config)
    required = lm.architecture.smoothing_requires if config.smoothing_alpha is not None else ()
    for key, value in unmet(required, lm.model.config):
        raise ConfigError(
            f"quantizer.smoothing_alpha={config.smoothing_alpha} cannot be used with {lm.label}: its configuration "
            f"has {key}={value}, so its norms do not stand before the linears or have no weights; use "
            "quantizer.smoothing_alpha=null"
        )
    if config.smoothing_alpha is not None and not lm.architecture.smoothing:
        raise ConfigError(
            f"quantizer.smoothing_alpha={config.smoothing_alpha} has nothing to smooth in {lm.label}: its architecture "
            "names no norms that stand before linears; use quantizer.smoothing_alpha=null"
        )
    if not config.is_full_precision and not lm.linears(config.targets):
        raise ConfigError(f"quantizer={config.name} finds no linear layer in the decoder blocks of {lm.label}")
    size = config.weights.group_size
    in_groups = config.weights.bits is not None and config.weights.granularity == "per_group"
    for name, linear in lm.linears(config.targets).items():
        if in_groups and linear.in_features % size:
            raise ConfigError(
                f"quantizer.weights.group_size={size} does not divide the {linear.in_features} inputs of {name}: "
                "choose a divisor"
            )
