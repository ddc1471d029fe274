"""Measure what a range estimator costs: a calibration pass that gathers its statistic, as a ratio to the plain pass.

    .venv/bin/python scripts/bench_estimators.py [--model embedded:smollm2-135m] [--texts 5] [--length 512]

Texts of random tokens go through the model in turn without anything gathered, with the ranges of channels (the plain
calibration pass), and with the statistic of each estimator. Seconds are those of the processor, the median of texts;
the ratio is to the plain pass of the same run. Then each estimator's ranges of all linears are computed, on a symmetric
and an asymmetric grid of 8 bits; milliseconds are those of one linear, on average.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from statistics import median

import torch
from torch import Tensor

from cushion.activations import ChannelRanges, observe_inputs
from cushion.config import ModelConfig, PathsConfig
from cushion.models import LanguageModel, load_language_model
from cushion.quantization.estimators.registry import ESTIMATORS
from cushion.quantization.numerics import Grid
from cushion.quantization.statistics.gathered import GatheredStatistics

Observer = Callable[[str, Tensor], None]


@torch.no_grad()
def seconds(lm: LanguageModel, text: Tensor, observer: Observer | None) -> float:
    """Of one forward pass, on all threads together."""
    started = time.process_time()
    with nullcontext() if observer is None else observe_inputs(lm.linears(), observer):
        lm.body(text, use_cache=True)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded:smollm2-135m", help="hub id, folder, embedded:... or tiny:...")
    parser.add_argument("--texts", type=int, default=5, help="beside one that warms up")
    parser.add_argument("--length", type=int, default=512, help="tokens of a text")
    options = parser.parse_args()
    lm = load_language_model(ModelConfig(path=options.model, dtype="float32"), PathsConfig())
    tokens = torch.randint(
        lm.vocabulary_size, (options.texts + 1, 1, options.length), generator=torch.Generator().manual_seed(0)
    )

    gathering = {name: estimator for name, estimator in ESTIMATORS.items() if estimator.statistic is not None}
    values = {name: estimator.values({}, "options") for name, estimator in gathering.items()}
    gathered: dict[str, GatheredStatistics] = {}
    for name, estimator in gathering.items():  # estimators that share a statistic share its pass
        if estimator.statistic not in gathered:
            gathered[str(estimator.statistic)] = GatheredStatistics(partial(estimator.new_statistic, values[name]))
    observers: dict[str, Observer | None] = {"nothing": None, "ranges of channels": ChannelRanges()}
    observers |= {place.partition(":")[2]: found for place, found in gathered.items()}

    passes: dict[str, list[float]] = defaultdict(list)
    for text in tokens:
        for name, observer in observers.items():
            passes[name].append(seconds(lm, text, observer))
    typical = {name: median(times[1:]) for name, times in passes.items()}
    print(f"{options.model}, {len(lm.linears())} linears, {options.texts} texts of {options.length} tokens")
    print(f"{'gathered':<22}{'seconds':>12}{'ratio':>8}")
    for name, time_of_pass in typical.items():
        print(f"{name:<22}{time_of_pass:>12.3f}{time_of_pass / typical['ranges of channels']:>8.2f}")

    print(f"\n{'range of a linear':<22}{'symmetric':>12}{'asymmetric':>12}  ms")
    for name, estimator in gathering.items():
        observed = gathered[str(estimator.statistic)].by_linear
        spent = []
        for grid in (Grid(8, True), Grid(8, False)):
            started = time.process_time()
            for statistic in observed.values():
                estimator.range_of(statistic, grid, values[name])
            spent.append(1000 * (time.process_time() - started) / len(observed))
        print(f"{name:<22}{spent[0]:>12.1f}{spent[1]:>12.1f}", flush=True)


if __name__ == "__main__":
    main()
