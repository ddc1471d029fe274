"""What does each way of searching cost, and what does it find? On one model and one text, in one run.

    .venv/bin/python scripts/bench_search.py [--length 128] [--sample 500] [--output FOLDER] [OVERRIDE ...]
    .venv/bin/python scripts/bench_search.py --shapes          # needs a GPU

Every OVERRIDE is one of the `cushion` command's, for example `model=llama2_7b data=wikitext2 eval.blocks=16`. A greedy
search ends after one token (`--tokens`), whatever tau is. Exhaustive and exact scoring run over a sample of the
vocabulary that holds the first tokens that the other searches found, and others at random; the table says so. What
exhaustive scoring costs over the whole vocabulary is counted. Each row is printed, and kept in `bench_search.json`, as
soon as it is measured; the table of all of them and `bench_search.png` come at the end.

`--shapes` times an exhaustive and a pruned step on randomly initialised models of the shapes of LLaMA-2-7B and
LLaMA-3-8B in bfloat16: what these cost does not depend on the weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from hydra import compose, initialize_config_dir
from matplotlib import pyplot
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from cushion import pipeline
from cushion.cli import config_folder, register_schema, to_run_config
from cushion.config import RunConfig, SearchConfig
from cushion.models import LanguageModel
from cushion.models.architectures import find_architecture
from cushion.models.tiny import byte_tokenizer
from cushion.prefix import Prefix
from cushion.preparation import choose_device, prepare
from cushion.search.greedy import greedy_search
from cushion.search.greedy_state import SearchState
from cushion.search.objective import Objective
from cushion.search.rounds import rows_of

_7B = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32}
SHAPES = {
    "LLaMA-2-7B": {**_7B, "intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000},
    "LLaMA-3-8B": {**_7B, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
}
PUBLISHED_HOURS = {"LLaMA-2-7B": 2.68, "LLaMA-3-8B": 12.09}
"""Hours of the greedy search on four A6000 (CushionCache, Table 6)."""
ROW_TOKENS = {"cpu": 2048, "cuda": 65536}
"""Tokens of the batch whose operations per second are measured, by device type."""


LARGE = {"cuda": 8192, "cpu": 2048}
"""Rows and columns of a large matrix, by the kind of device."""


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square matrix product: the most that a model can reach."""
    size = LARGE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        best = min(best, timed(lambda: left @ right, device))
    return 2 * size**3 / best


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `work` takes, with the device idle before and after."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def utilisation(lm: LanguageModel, text: torch.Tensor, rows: int) -> dict[str, float]:
    """Operations per token, how many a second exhaustive scoring reaches, and the share of the measured ceiling."""
    batch = rows_of(list(range(rows)), text)
    objective = Objective(SearchConfig())
    counter = FlopCounterMode(display=False)
    with counter:
        objective(lm, Prefix.empty(), batch[:1], 1)
    per_token = counter.get_total_flops() / batch.shape[1]
    seconds = min(timed(lambda: objective(lm, Prefix.empty(), batch, 1), lm.device) for _ in range(3))
    achieved, most = per_token * batch.numel() / seconds, ceiling(lm.device, lm.model.dtype)
    return {
        "flops_per_token": per_token,
        "achieved_flops": achieved,
        "ceiling_flops": most,
        "share_of_ceiling": achieved / most,
        "token_forwards_per_second": batch.numel() / seconds,
    }


def configured(overrides: list[str]) -> RunConfig:
    return to_run_config(compose("config", overrides))


def only_value(record: dict[str, float | None]) -> float | None:
    """Perplexity on the one corpus that is evaluated."""
    (value,) = record.values()
    return value


def bench(options: argparse.Namespace) -> None:
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    common = [
        "search.verify_texts=0",  # every search judges by the same text; an override goes for all of them
        *options.overrides, "tracking=none", "tuning=none", f"paths.output_dir={output}",
        f"search.text_length={options.length}", "eval.controls=false",
    ]  # fmt: skip
    greedy = [f"search.max_length={options.tokens}", "search.tau=1"]
    base = configured([*common, "search=greedy_pruned", *greedy])
    prepared = prepare(base, choose_device(base))
    lm, texts = prepared.lm, prepared.texts.search
    assert texts is not None
    size = lm.vocabulary_size
    objective = Objective(replace(base.search, objective="quantization_error"))
    length = texts.shape[1]  # with BOS where the run has it
    whole = options.tokens * (length + size * (length + 1))  # with L_q(t | p), once a step
    record: dict[str, Any] = {"model": lm.label, "vocabulary": size, "length": options.length, "exhaustive": whole}
    rows: list[dict[str, Any]] = []
    print(HEADER, flush=True)

    def measure(name: str, overrides: list[str], sample_size: int | None = None) -> None:
        result = pipeline.run(configured([*common, *overrides]))
        search = result.search or {"token_forwards": 0, "seconds": 0.0}
        found = (result.prefix or {}).get("token_ids", [])
        row = {
            "search": name,
            "sample": sample_size,
            "prefix": lm.decode(found),
            "token_ids": found,
            "token_forwards": search["token_forwards"],
            "share_of_exhaustive": search["token_forwards"] / whole,
            "seconds": search["seconds"],
            "quantization_error": objective(lm, Prefix.from_tokens(lm.model, found), texts[:1], 0).item(),
            "perplexity": only_value(result.rows[-1].under("perplexity")),
        }
        rows.append(row)
        print(line(row), flush=True)
        (output / "bench_search.json").write_text(json.dumps({**record, "rows": rows}, indent=2), encoding="utf-8")

    measure("none", ["search=none"])
    measure("pruned", ["search=greedy_pruned", *greedy])
    measure("sampled", ["search=greedy_sampled", *greedy])
    measure("qfep", ["search=qfep"])
    measure("prefixquant", ["search=prefixquant"])
    generator = torch.Generator().manual_seed(base.seed)
    drawn = torch.randperm(size, generator=generator).tolist()
    known = list(dict.fromkeys(token for row in rows for token in row["token_ids"][:1]))
    sample = sorted(list(dict.fromkeys([*known, *drawn]))[: options.sample])
    own = f"search.user_tokens={json.dumps(sample).replace(' ', '')}"
    of = None if len(sample) == size else len(sample)
    for name in ("exhaustive", "exact"):
        measure(name, [f"search=greedy_{name}", "search.proposal=user", own, *greedy], of)

    best = min(row["quantization_error"] for row in rows)
    for row in rows:
        row["ratio_to_best"] = row["quantization_error"] / best
    use = utilisation(lm, texts[0], max(1, ROW_TOKENS[lm.device.type] // (options.length + 1)))
    print("\n" + table(rows) + "\n\n" + whole_line(rows, size, whole) + "\n" + utilisation_line(use))
    record |= {"rows": rows, "utilisation": use}
    (output / "bench_search.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    figure(rows, whole, output / "bench_search.png")
    print(output / "bench_search.png")


def whole_line(rows: list[dict[str, Any]], size: int, whole: int) -> str:
    """What exhaustive scoring costs over the whole vocabulary: tokens by counting, seconds from those of the sample."""
    measured = next(row for row in rows if row["search"] == "exhaustive")
    seconds = measured["seconds"] / measured["share_of_exhaustive"]
    return f"exhaustive, all {size} tokens: {whole} token-forwards (counted), about {seconds:.0f} s (from the sample's)"


def utilisation_line(use: dict[str, float]) -> str:
    return (
        f"exhaustive scoring: {use['token_forwards_per_second']:.0f} token-forwards/s, "
        f"{use['achieved_flops']:.3g} FLOP/s of {use['ceiling_flops']:.3g} "
        f"in a large matrix product: {use['share_of_ceiling']:.2f}"
    )


HEADER = (
    f"{'search':<34}{'token-forwards':>15}{'share':>9}{'seconds':>9}{'L_q':>11}{'L_q/best':>10}{'perplexity':>12}"
    "  prefix"
)


def named(row: dict[str, Any]) -> str:
    return row["search"] if row["sample"] is None else f"{row['search']} (of {row['sample']} tokens)"


def line(row: dict[str, Any]) -> str:
    """A row as plain text; what ran over a sample is marked, and what cannot be known yet is left open."""
    ratio = row.get("ratio_to_best")
    return (
        f"{named(row):<34}{row['token_forwards']:>15.0f}{row['share_of_exhaustive']:>9.4f}{row['seconds']:>9.0f}"
        f"{row['quantization_error']:>11.4g}{'' if ratio is None else f'{ratio:.3f}':>10}{row['perplexity']:>12.2f}"
        f"  {row['prefix']!r}"
    )


def table(rows: list[dict[str, Any]]) -> str:
    return "\n".join([HEADER, *(line(row) for row in rows)])


def figure(rows: list[dict[str, Any]], whole: int, path: Path) -> None:
    """L_q against token-forwards; `whole`: those of an exhaustive search of the whole vocabulary."""
    shown = [row for row in rows if row["token_forwards"]]
    _, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for row, marker in zip(shown, itertools.cycle("osD^vPX*"), strict=False):
        axes.scatter(row["token_forwards"], row["ratio_to_best"], s=70, alpha=0.7, marker=marker, label=named(row))
    axes.axvline(whole, linestyle="--", color="grey", label="exhaustive (all tokens, counted)")
    axes.set(xscale="log", xlabel="token-forwards (log)", ylabel="L_q over the lowest found")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    pyplot.savefig(path, dpi=150)
    pyplot.close()


def bench_shapes(options: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("--shapes needs a GPU: torch sees none here")
    for name, shape in SHAPES.items():
        bench_shape(name, shape, options, torch.device("cuda"), torch.bfloat16)
        torch.cuda.empty_cache()


def bench_shape(
    name: str, shape: dict[str, int], options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> None:
    """Time an exhaustive and a pruned step on a random LLaMA of a shape, given as fields of its configuration."""
    with device:
        model = AutoModelForCausalLM.from_config(LlamaConfig(max_position_embeddings=4096, **shape), dtype=dtype)
    model.eval().requires_grad_(False)
    lm = LanguageModel(model, byte_tokenizer(), find_architecture(model.config, name), name, name)
    size, generator = shape["vocab_size"], torch.Generator().manual_seed(0)
    texts = torch.randint(0, size, (1, options.length), generator=generator)
    sample = torch.randperm(size, generator=generator)[: options.sample].tolist()

    def step(scoring: str, pool: list[int], show: bool = True) -> None:
        search = SearchConfig(method="greedy", scoring=scoring, max_length=1, text_length=options.length)
        state = SearchState([])
        seconds = timed(lambda: list(greedy_search(lm, search, texts, pool, state)), device)
        scale = size / len(pool)
        note = "" if scale == 1 else f" (extrapolated from {len(pool)} candidates)"
        of_text = options.length  # L_q(t | p), which does not grow with the candidates
        cost = of_text + (state.steps[0].token_forwards - of_text) * scale
        if not show:
            return
        print(f"  {scoring:<8}{seconds * scale:>10.1f} s a step{cost:>14.0f} token-forwards{note}", flush=True)

    published = f"; published: {PUBLISHED_HOURS[name]} hours for the whole search" if name in PUBLISHED_HOURS else ""
    print(f"{name}, n = {options.length}, {str(dtype).removeprefix('torch.')}{published}", flush=True)
    step("full", sample[: len(sample) // 4], show=False)  # kernels are chosen and memory is reserved
    step("full", sample)
    step("pruned", list(range(size)))
    print(f"  {utilisation_line(utilisation(lm, texts[0], max(1, ROW_TOKENS[device.type] // (options.length + 1))))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=None, help="tokens of the search text: 128, with --shapes 512")
    parser.add_argument("--sample", type=int, default=500, help="candidates of the exhaustive and the exact search")
    parser.add_argument("--tokens", type=int, default=1, help="longest prefix of the greedy searches")
    parser.add_argument("--output", default="outputs/bench_search", help="folder of the table's data and the figure")
    parser.add_argument("--shapes", action="store_true", help="time steps on the shapes of 7B and 8B models")
    parser.add_argument("overrides", nargs="*", help="overrides of the cushion command")
    options = parser.parse_args()
    options.length = options.length or (512 if options.shapes else 128)
    if options.shapes:
        bench_shapes(options)
        return
    register_schema()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        bench(options)


if __name__ == "__main__":
    main()
