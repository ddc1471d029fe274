"""The cached timings of a row, in turns with full precision without a prefix."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cushion.artifacts import Workspace, read_json, write_json
from cushion.config.latency import LatencyConfig
from cushion.evaluation.compiling import forget_graphs
from cushion.evaluation.latency import Timing, Variant, peak_bytes, prompts, rounds, weight_bytes
from cushion.metrics.columns import RowContext, Values
from cushion.metrics.latency import latency_values, memory_values, size_name
from cushion.prefix import Prefix
from cushion.processor import processor_name
from cushion.quantization.lazily import QuantizedLazily
from cushion.quantization.parts.registry import transforms
from cushion.step import Context, Step, compute

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """Of every pair of batch size and prompt length: the timings of each round, and the bytes at the worst moment."""

    own: dict[str, list[Timing]]
    full: dict[str, list[Timing]]
    peaks: dict[str, int | None]
    weights: int
    full_weights: int


@dataclass(frozen=True, eq=False)
class LatencyStep(Step[Measured]):
    """Timings of a model behind its prefix, and of the full-precision model without one: in the same rounds, or before.

    Args:
        model: with its prefix and quantizer.
        config: what is timed, and how often.

    """

    name = "latency"
    """Files: `latency.json`, the timings of all rounds
    Key: `prefix`, `quantizer`, `config.batch_sizes`, `config.prompt_lengths`, `config.compile`,
        `config.new_tokens`, `config.repeats`, `config.warmup`, `machine`
    Of that: the name of the machine, its processor or GPU, the number of threads, and the version of torch
    """
    model: QuantizedLazily
    config: LatencyConfig

    def key(self, context: Context) -> dict[str, Any]:
        """Prefix, quantizer, sizes, numbers of rounds, and the machine."""
        return {**self.model.identity(), "config": asdict(self.config), "machine": machine(context.lm.device)}

    def make(self, context: Context, workspace: Workspace) -> None:
        """Time every size, round by round."""
        lm, model, config = context.lm, self.model, self.config
        model.take_off()  # the steps before have left it on
        full_weights, sizes = weight_bytes(lm), {}
        if config.compile:
            forget_graphs()
        full, own = Variant(Prefix.empty(), model.suspended), Variant(model.behind, nullcontext)
        turns = [{"full": full, "own": own}]
        if model.quantizer is not None and transforms(model.quantizer):
            # rotations and other norms stay with what `suspended` gives back, which is then not full precision
            turns = [{"full": Variant(Prefix.empty(), nullcontext)}, {"own": own}]
        number, done = len(turns) * len(config.sizes) * (config.warmup + config.repeats), 0
        for batch, length in config.sizes:
            texts, times = prompts(lm, batch, length), dict[str, list[dict[str, Any]]](full=[], own=[])
            for variants in turns:
                if "own" in variants:
                    model.put_on()
                else:
                    model.take_off()
                for found in rounds(lm, list(variants.values()), texts, config):
                    if found is not None:
                        for side, timing in zip(variants, found, strict=True):
                            times[side].append(asdict(timing))
                    done += 1
                    context.progress("latency", done, number, "round")
            peak = peak_bytes(lm, model.behind, texts, config.new_tokens)
            sizes[size_name(batch, length)] = {**times, "peak": peak}
        record = {"sizes": sizes, "weights": weight_bytes(lm), "full_weights": full_weights}
        write_json(workspace.folder / "latency.json", record)

    def read(self, context: Context, folder: Path) -> Measured:
        """All timings."""
        record = read_json(folder / "latency.json")
        sizes = record["sizes"]
        own, full = (
            {size: [Timing(**one) for one in found[side]] for size, found in sizes.items()} for side in ("own", "full")
        )
        peaks = {size: found["peak"] for size, found in sizes.items()}
        return Measured(own, full, peaks, record["weights"], record["full_weights"])


def machine(device: torch.device) -> dict[str, Any]:
    """What a timing depends on beside the work: the machine, its processor or GPU, and the number of threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {
        "host": platform.node(),
        "name": name,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def warn_of_another_machine(environment: Mapping[str, Any]) -> None:
    """Warn where the latency of a finished result was measured on another machine than this one.

    Args:
        environment: that of the result; without `machine` nothing was timed, or by an older version.

    """
    there = environment.get("machine")
    if there is None:
        return
    here = machine(torch.device(str(environment["device"])))
    other = [f"{key} {there.get(key)!r}, here {value!r}" for key, value in here.items() if there.get(key) != value]
    if other:
        logger.warning(
            "the latency of this finished run was measured on another machine (%s): to measure it on this one, give "
            "another paths.output_dir",
            "; ".join(other),
        )


def measure(row: RowContext) -> Values:
    """The latency of a row, where `eval.latency` asks for it."""
    config = row.config.latency
    if not config.is_on:
        return {}
    found = compute(LatencyStep(row.model, config), row.cached)
    values = memory_values(found.weights, found.full_weights)
    for batch, length in config.sizes:
        size = size_name(batch, length)
        own, full = ([(one.first, one.following) for one in side[size]] for side in (found.own, found.full))
        values |= latency_values(batch, length, own, full, found.peaks[size])
    return values
