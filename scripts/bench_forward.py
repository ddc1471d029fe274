"""How much slower is a simulated-quantized forward pass than the full-precision one? A ratio, measured in one run.

    .venv/bin/python scripts/bench_forward.py [--model embedded:smollm2-135m] [--length 512] [--repeats 7]
        [--quantizers per_token_dynamic,rotation] [--set quantizer.kv_cache.bits=4]

For every option of conf/quantizer that changes the model, or those named, the two passes alternate, and the ratio of
their median times is printed. What an option does on the way in (rotating, smoothing, quantizing weights) is not timed.
Linears that QFeM would keep in full precision are quantized too, so that its options are timed at their slowest.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from cushion.activations import ChannelRanges
from cushion.cli import config_folder, register_schema, to_run_config
from cushion.config import ModelConfig, PathsConfig, QuantizerConfig
from cushion.models import LanguageModel, load_language_model
from cushion.prefix import Prefix
from cushion.quantization.calibration import calibrate
from cushion.quantization.rotation import rotated
from cushion.quantization.simulate import quantized


@torch.no_grad()
def seconds(lm: LanguageModel, text: torch.Tensor) -> float:
    started = time.perf_counter()
    lm.model(input_ids=text, use_cache=False)
    return time.perf_counter() - started


def ranges_of(lm: LanguageModel, config: QuantizerConfig, text: torch.Tensor) -> ChannelRanges | None:
    """Ranges of the linears' inputs of the model as this quantizer rotates it, where the quantizer needs them."""
    if not config.needs_calibration:
        return None
    ranges = ChannelRanges()
    with rotated(lm, config.rotation, config.rotation_seed):
        for _ in calibrate(lm, Prefix.empty(), text, ranges):
            pass
        ranges.rotation = lm.rotation
    return ranges


def chosen(parser: argparse.ArgumentParser, named: str | None) -> list[str]:
    """The options of conf/quantizer to time."""
    known = sorted(path.stem for path in Path(config_folder(), "quantizer").glob("*.yaml"))
    names = known if named is None else named.split(",")
    for name in names:
        if name not in known:
            parser.error(f"--quantizers names {name!r}: known are {', '.join(known)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded:smollm2-135m", help="hub id, folder, embedded:... or tiny:...")
    parser.add_argument("--length", type=int, default=512, help="tokens per forward pass")
    parser.add_argument("--repeats", type=int, default=7, help="passes per quantizer and side")
    parser.add_argument("--quantizers", help="options of conf/quantizer, separated by commas; all by default")
    parser.add_argument("--set", action="append", default=[], help="key=value for every option; may be repeated")
    options = parser.parse_args()
    names = chosen(parser, options.quantizers)
    lm = load_language_model(ModelConfig(path=options.model, dtype="float32"), PathsConfig())
    text = torch.randint(lm.vocabulary_size, (1, options.length), generator=torch.Generator().manual_seed(0))
    register_schema()
    print(f"{torch.get_num_threads()} threads, {options.length} tokens, median of {options.repeats}, seconds")
    print(f"{'quantizer':<22}{'full precision':>16}{'quantized':>12}{'ratio':>8}")
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        for name in names:
            config = to_run_config(compose("config", [f"quantizer={name}", *options.set])).quantizer
            if config.is_full_precision:
                print(f"{name:<22}left out: it is the full-precision model")
                continue
            ranges = ranges_of(lm, config, text)
            keep = frozenset[str]() if config.uses_qfem else None
            plain, simulated = [], []
            for _ in range(options.repeats):
                plain.append(seconds(lm, text))
                with quantized(lm, config, ranges, keep=keep):
                    simulated.append(seconds(lm, text))
            low, high = statistics.median(plain), statistics.median(simulated)
            print(f"{name:<22}{low:>16.3f}{high:>12.3f}{high / low:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
