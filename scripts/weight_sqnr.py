"""What does SmoothQuant's smoothing do to the weights that it makes harder to quantize? Per tensor, channel and group.

    .venv/bin/python scripts/weight_sqnr.py [OVERRIDE ...]

Every OVERRIDE is one of the `cushion` command's; by default the paper's calibration text and alpha are taken
(`data=cushioncache quantizer=smoothquant_o1`). For all linears that smoothing scales, plain and smoothed, the table has
the signal-to-quantization-noise ratio of their symmetric weights,

    SQNR = 10 log10( sum W^2 / sum (W - q(W))^2 )  in dB, as the mean over the linears.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from cushion.activations import ChannelRanges
from cushion.cli import config_folder, register_schema, to_run_config
from cushion.config import QuantizerConfig
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.preparation import choose_device, prepare
from cushion.quantization.calibration import calibrate
from cushion.quantization.numerics import Grid, quantize_weight
from cushion.quantization.parts.registry import without_rounding
from cushion.quantization.simulate import quantized

GRANULARITIES = ("per_tensor", "per_channel", "per_group")
DEFAULTS = ["data=cushioncache", "quantizer=smoothquant_o1", "search=none", "tuning=none"]


def sqnr(weight: Tensor, bits: int, granularity: str, group_size: int) -> float:
    """Signal-to-quantization-noise ratio in dB of a weight, (out_features, in_features), on a symmetric grid."""
    rounded = quantize_weight(weight, Grid(bits, symmetric=True), granularity, group_size).dequantize()
    signal, noise = weight.double().square().sum(), (weight.double() - rounded.double()).square().sum()
    return 10 * math.log10(float(signal / noise))


def smoothed_linears(lm: LanguageModel) -> list[str]:
    """The linears that a norm feeds directly, so that smoothing scales their weights."""
    readers = (reader for index in range(len(lm.blocks)) for _, found in lm.norm_readers(index) for reader in found)
    return [name for name in readers if lm.is_quantized(name)]


@torch.no_grad()
def ratios(lm: LanguageModel, config: QuantizerConfig, ranges: ChannelRanges) -> dict[str, tuple[float, float]]:
    """By granularity the mean SQNR in dB of the weights, plain and smoothed as the quantizer says."""
    names = smoothed_linears(lm)
    bits, size = config.weights.bits, config.weights.group_size
    assert bits is not None

    def means() -> list[float]:
        weights = [lm.linears()[name].weight for name in names]
        found = [[sqnr(weight, bits, granularity, size) for weight in weights] for granularity in GRANULARITIES]
        return [sum(values) / len(values) for values in found]

    plain = means()
    with quantized(lm, without_rounding(config), ranges):
        smoothed = means()
    return dict(zip(GRANULARITIES, zip(plain, smoothed, strict=True), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="overrides of the cushion command")
    parser.add_argument("--group-size", type=int, default=64, help="neighbouring inputs that share a scale per group")
    options = parser.parse_args()
    register_schema()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = to_run_config(compose("config", [*DEFAULTS, *options.overrides]))
    prepared = prepare(config, choose_device(config))
    texts = prepared.texts.calibration
    if texts is None or config.quantizer.smoothing_alpha is None:
        raise SystemExit(f"quantizer={config.quantizer.name} smooths nothing: set quantizer.smoothing_alpha")
    ranges = ChannelRanges()
    for _ in calibrate(prepared.lm, Prefix.empty(), texts, ranges):
        pass
    weights = replace(config.quantizer.weights, group_size=options.group_size)
    found = ratios(prepared.lm, replace(config.quantizer, weights=weights), ranges)
    alpha = config.quantizer.smoothing_alpha
    print(f"{prepared.lm.label}, alpha {alpha}, {weights.bits} bits, groups of {weights.group_size}")
    print(f"{'SQNR of weights, dB':<22}{'plain':>8}{'smoothed':>10}{'loss':>8}")
    for granularity, (plain, smoothed) in found.items():
        print(f"{granularity:<22}{plain:>8.1f}{smoothed:>10.1f}{plain - smoothed:>8.1f}")


if __name__ == "__main__":
    main()
