"""How much slower is a simulated-quantized forward pass than the full-precision one? A ratio, measured in one run.

    .venv/bin/python scripts/bench_forward.py [--model embedded:smollm2-135m] [--length 512] [--repeats 7]

For every quantizer in conf/quantizer the two passes alternate, and the ratio of their median times is printed.
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
from cushion.config import ModelConfig, PathsConfig
from cushion.models import LanguageModel, load_language_model
from cushion.prefix import Prefix
from cushion.quantization.calibration import calibrate
from cushion.quantization.simulate import quantized


@torch.no_grad()
def seconds(lm: LanguageModel, text: torch.Tensor) -> float:
    started = time.perf_counter()
    lm.model(input_ids=text, use_cache=False)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded:smollm2-135m", help="hub id, folder, embedded:... or tiny:...")
    parser.add_argument("--length", type=int, default=512, help="tokens per forward pass")
    parser.add_argument("--repeats", type=int, default=7, help="passes per quantizer and side")
    options = parser.parse_args()
    lm = load_language_model(ModelConfig(path=options.model, dtype="float32"), PathsConfig())
    text = torch.randint(lm.vocabulary_size, (1, options.length), generator=torch.Generator().manual_seed(0))
    ranges = ChannelRanges()
    for _ in calibrate(lm, Prefix.empty(), text, ranges):
        pass
    register_schema()
    print(
        f"{'quantizer':<22}{'full precision':>16}{'quantized':>12}{'ratio':>8}   (median of {options.repeats}, seconds)"
    )
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        for path in sorted(Path(config_folder(), "quantizer").glob("*.yaml")):
            config = to_run_config(compose("config", [f"quantizer={path.stem}"])).quantizer
            if config.is_full_precision:
                continue
            plain, simulated = [], []
            for _ in range(options.repeats):
                plain.append(seconds(lm, text))
                with quantized(lm, config, ranges):
                    simulated.append(seconds(lm, text))
            low, high = statistics.median(plain), statistics.median(simulated)
            print(f"{config.name:<22}{low:>16.3f}{high:>12.3f}{high / low:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
