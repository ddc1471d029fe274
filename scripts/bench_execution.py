"""What do linears on 8-bit codes gain over floating point? Ratios to float32, measured in turns in one run.

    .venv/bin/python scripts/bench_execution.py [--shapes smollm2,7b] [--rows 1,512] [--repeats 15]
        [--model embedded:smollm2-135m] [--length 512] [--new-tokens 32] [--decoder-repeats 5] [--compile]
        [--decoder-sides "float32,bfloat16,int8 static"]

First one linear at a time, for every shape and number of rows: float32, bfloat16, the simulation, execution=int8 with a
static scale and with one for each token, the product of codes alone, and torchao's dynamic int8 where it is installed.
Then the whole decoder: the time to first token of a prompt and the time per output token. With --compile linears and
decoder once more as torch.compile makes them, which takes minutes for every decoder before it is timed. Milliseconds
are medians, the ratio is the median over the rounds of float32's time over the side's, so that above 1 is faster than
float32. A round times every side once, in an order that turns around. Every linear reads an input of its own: nothing
is shared.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product
from typing import TypeVar

import torch
from torch import nn

from cushion.activations import ChannelRanges
from cushion.config import ActivationConfig, ModelConfig, PathsConfig, QuantizerConfig, WeightConfig
from cushion.evaluation.compiling import check_compiler, compiled, forget_graphs
from cushion.evaluation.latency import Timing, prompts, timed
from cushion.execution.int8 import Int8Linear
from cushion.execution.int8_matmul import check_int8_matmul, slowdown
from cushion.execution.simulated import Simulated
from cushion.models import LanguageModel, load_language_model
from cushion.prefix import Prefix
from cushion.quantization.calibration import calibrate
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.linear import ActivationQuantizer
from cushion.quantization.numerics import Grid, quantize_weight

SHAPES = {
    "smollm2": ((576, 576), (576, 192), (576, 1536), (1536, 576)),
    "7b": ((4096, 4096), (4096, 11008), (11008, 4096)),
    "tiny": ((16, 24),),
}
"""Inputs and outputs of the linears of SmolLM2-135M, of LLaMA-2-7B, and of none."""
DECODER_SIDES = ("float32", "bfloat16", "simulated", "int8 static", "int8 token")
WARMUP = 2
STATIC = Grid(8, True, narrow_range=False)
Side = Callable[[], object]
T = TypeVar("T")


def turn(sides: dict[str, T], number: int) -> list[tuple[str, T]]:
    """The sides of a round, every other one from the last to the first."""
    return list(sides.items())[:: 1 if number % 2 == 0 else -1]


def in_turns(sides: dict[str, Side], repeats: int) -> dict[str, list[float]]:
    """Seconds of every side in each round, those of the first rounds left out."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(WARMUP + repeats):
        for name, side in turn(sides, number):
            started = time.perf_counter()
            side()
            if number >= WARMUP:
                found[name].append(time.perf_counter() - started)
    return found


def linears_of(inputs: int, outputs: int, rows: int, compiles: bool = False) -> dict[str, Side]:
    """The sides of one shape, float32 first; some of them compiled too where asked."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, inputs, generator=generator)
    plain = nn.Linear(inputs, outputs, bias=False)
    weight = plain.weight.detach()
    codes = quantize_weight(weight, Grid(8, True), "per_channel")
    ends = values.min(), values.max()
    static = Int8Linear(codes, None, ActivationQuantizer(STATIC, "per_tensor", ends))
    token = Int8Linear(codes, None, ActivationQuantizer(Grid(8, True), "per_token"))
    simulated = Simulated().linear(codes, None, ActivationQuantizer(STATIC, "per_tensor", ends))
    half, half_values = nn.Linear(inputs, outputs, bias=False).bfloat16(), values.bfloat16()
    whole = (values / values.abs().max() * 127).round().to(torch.int8)
    sides: dict[str, Side] = {
        "float32": lambda: plain(values),
        "bfloat16": lambda: half(half_values),
        "simulated": lambda: simulated(values),
        "int8 static": lambda: static(values),
        "int8 token": lambda: token(values),
        "codes alone": lambda: torch._int_mm(whole, static.codes),
    }
    other = torchao_linear(inputs, outputs)
    if other is not None:
        sides["torchao token"] = partial(other, values)
    if compiles:
        forget_graphs()
        modules = {"float32": plain, "int8 static": static, "int8 token": token, "torchao token": other}
        for name, module in modules.items():
            if module is not None:
                sides[f"{name} compiled"] = partial(torch.compile(module), values)
    return sides


def torchao_linear(inputs: int, outputs: int) -> nn.Module | None:
    """Torchao's linear with int8 weights and dynamic int8 inputs; None where torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        return None
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(nn.Linear(inputs, outputs, bias=False))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def rows_of(seconds: dict[str, list[float]]) -> list[tuple[str, float, float]]:
    """Of every side its name, milliseconds, and float32's time over its own."""
    base = next(iter(seconds.values()))
    return [
        (name, 1e3 * statistics.median(own), statistics.median(b / o for b, o in zip(base, own, strict=True)))
        for name, own in seconds.items()
    ]


def show(heading: str, seconds: dict[str, list[float]]) -> None:
    print(heading)
    for name, milliseconds, ratio in rows_of(seconds):
        print(f"  {name:<24}{milliseconds:>12.3f} ms{ratio:>9.2f}", flush=True)


def decoder(path: str, length: int, new_tokens: int, repeats: int, compiles: bool, chosen: list[str]) -> None:
    """The whole model, compiled too where asked: prompts of one text, and tokens one after another."""
    lm, half = (
        load_language_model(ModelConfig(path=path, dtype=dtype), PathsConfig()) for dtype in ("float32", "bfloat16")
    )
    text, ranges = prompts(lm, 1, length), ChannelRanges()
    for _ in calibrate(lm, Prefix.empty(), text, ranges):
        pass
    weights = WeightConfig(granularity="per_channel")
    static = FittedQuantizer(QuantizerConfig("static", weights, ActivationConfig(narrow_range=False)), ranges)
    dynamic = ActivationConfig(granularity="per_token", range="dynamic")
    token = FittedQuantizer(QuantizerConfig("token", weights, dynamic))
    sides: dict[str, tuple[LanguageModel, FittedQuantizer | None, str]] = {
        "float32": (lm, None, ""),
        "bfloat16": (half, None, ""),
        "simulated": (lm, static, "simulated"),
        "int8 static": (lm, static, "int8"),
        "int8 token": (lm, token, "int8"),
    }
    sides = {name: side for name, side in sides.items() if name in chosen}
    ways = {
        f"{name} compiled" if compiles else name: (*side, compiles)
        for compiles, (name, side) in product((False, True) if compiles else (False,), sides.items())
    }
    found: dict[str, list[Timing]] = {name: [] for name in ways}
    for number in range(WARMUP + repeats):
        for name, (model, fitted, execution, is_compiled) in turn(ways, number):
            with ExitStack() as stack:
                if fitted is not None:
                    stack.enter_context(fitted.on(model, execution=execution))
                if is_compiled:
                    stack.enter_context(compiled(model))
                timing = timed(model, Prefix.empty(), text, new_tokens)
            if number >= WARMUP:
                found[name].append(timing)
    show(f"decoder, first token, prompt of {length}", {name: [one.first for one in own] for name, own in found.items()})
    show("decoder, further tokens, batch 1", {name: [one.following for one in own] for name, own in found.items()})


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="smollm2,7b", help=f"of {', '.join(SHAPES)}, separated by commas")
    parser.add_argument("--rows", type=numbers, default=[1, 512], help="tokens that a linear gets at once")
    parser.add_argument("--repeats", type=int, default=15, help="rounds for every linear")
    parser.add_argument("--model", default="embedded:smollm2-135m", help="hub id, folder, embedded:... or tiny:...")
    parser.add_argument("--length", type=int, default=512, help="tokens of the decoder's prompt")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens that follow it")
    parser.add_argument("--decoder-repeats", type=int, default=5, help="rounds for the decoder; 0 leaves it out")
    sides = ",".join(DECODER_SIDES)
    parser.add_argument("--decoder-sides", default=sides, help="of the decoder, separated by commas, float32 first")
    parser.add_argument("--compile", action="store_true", help="linears and decoder compiled as well")
    options = parser.parse_args(arguments)
    names = options.shapes.split(",") if options.shapes else []
    for name in names:
        if name not in SHAPES:
            parser.error(f"--shapes names {name!r}: known are {', '.join(SHAPES)}")
    chosen = options.decoder_sides.split(",")
    for name in chosen:
        if name not in DECODER_SIDES:
            parser.error(f"--decoder-sides names {name!r}: known are {', '.join(DECODER_SIDES)}")
    device = torch.device("cpu")
    check_int8_matmul(device)
    if options.compile:
        check_compiler(device)
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")
    print(f"the product of codes takes {slowdown(device):.2f} times as long as that in float32")
    for name in names:
        for inputs, outputs in SHAPES[name]:
            for rows in options.rows:
                sides_of_it = linears_of(inputs, outputs, rows, options.compile)
                show(f"{rows} x {inputs} x {outputs}", in_turns(sides_of_it, options.repeats))
    if options.decoder_repeats:
        decoder(options.model, options.length, options.new_tokens, options.decoder_repeats, options.compile, chosen)


if __name__ == "__main__":
    main()
