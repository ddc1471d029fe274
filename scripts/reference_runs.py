"""A tree of small results that covers every quantizer and search, to be made before and after a change.

    OMP_NUM_THREADS=1 python scripts/reference_runs.py before          # all of it: three minutes of one core
    python scripts/reference_runs.py after --like before               # the runs of that tree, and no more
    python scripts/reference_runs.py some --only llama/rotation        # those that have this in their name
    python scripts/compare_results.py before after                     # exactly, all numbers

Random models of three families, texts and records of tasks made on the spot, no network. A run that is refused stands
with the message in `refused.json`. The same command goes on from here after an interruption. Nothing is used of Cushion
but its YAML files and the way from them to `pipeline.run`, so that older and newer code can be compared.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402

from cushion import pipeline  # noqa: E402
from cushion.cli import config_folder, register_schema, to_run_config  # noqa: E402
from cushion.errors import CushionError  # noqa: E402

FAMILIES = ("llama", "opt", "gpt_neox")
CASES_FILE, REFUSED_FILE = "cases.json", "refused.json"

SMALL = [
    "data=file", "tracking=none", "search.text_length=16", "eval.block_length=32", "eval.blocks=3",
    "eval.activation_blocks=2", "quantizer.calibration.samples=2", "quantizer.calibration.length=16",
]  # fmt: skip
"""What every run starts from."""

SEARCHES = {
    "none": ["search=none"],
    "tokens": ["search=tokens", "search.token_ids=[256,10]"],
    "greedy_sampled": ["search=greedy_sampled", "search.candidates=24", "search.frequent=8", "search.max_length=2",
                       "search.tau=1.0", "search.batch_size=8"],
    "qfep": ["search=qfep", "search.texts=4", "search.contexts=6"],
    "prefixquant": ["search=prefixquant", "search.texts=4", "search.eta=1.05", "search.max_length=3"],
}  # fmt: skip
"""The searches of the matrix, small, and finding a prefix on a model without outliers, too."""

TUNING = [
    "tuning=short", "tuning.steps=4", "tuning.sequences=6", "tuning.sequence_length=16", "tuning.batch_size=2",
    "tuning.warmup_steps=1", "tuning.evaluate_every=2", "tuning.held_out_sequences=2",
]  # fmt: skip
TUNED = ("per_tensor_static", "smoothquant_o3", "rotation", "qfem")
TASKS = ["eval.tasks=[piqa,lambada_openai,tiny_generation]", "eval.samples=true"]
STATIC = "quantizer=per_tensor_static"
ALPHA = ["quantizer.qfem.search=false", "quantizer.qfem.alpha=1.3"]

ON_EVERY_FAMILY: dict[str, list[str]] = {
    "w4a4kv4": ["quantizer=w4a4", "quantizer.kv_cache.bits=4", *SEARCHES["prefixquant"]],
    "w4a4kv4 rotated": [
        "quantizer=w4a4", "quantizer.rotation=hadamard", "quantizer.kv_cache.bits=4", *SEARCHES["tokens"],
    ],
    "attention 8": ["quantizer=w6a6", "quantizer.attention.bits=8", *SEARCHES["tokens"]],
    "attention shares": [STATIC, "eval.attention_texts=2", "eval.attention_first=2", *SEARCHES["tokens"]],
    "qfem curve": ["quantizer=qfem", "quantizer.qfem.curve=3", *SEARCHES["qfep"]],
    "tasks": [STATIC, *TASKS, *SEARCHES["tokens"]],
}  # fmt: skip
"""Beside the matrix and tuning."""

ON_LLAMA: dict[str, list[str]] = {
    "asymmetric": [STATIC, "quantizer.activations.symmetric=false", *SEARCHES["tokens"]],
    "integer zero point": [
        STATIC, "quantizer.activations.symmetric=false", "quantizer.zero_point=integer", *SEARCHES["tokens"],
    ],
    "paper levels": [STATIC, "quantizer.levels=paper", "search.levels=paper", *SEARCHES["greedy_sampled"]],
    "some targets": [STATIC, "quantizer.targets=[down_proj]", *SEARCHES["none"]],
    "weights alone": ["quantizer=w4a8", "quantizer.activations.bits=null", *SEARCHES["none"]],
    "activations alone": ["quantizer=per_token_dynamic", "quantizer.weights.bits=null", *SEARCHES["tokens"]],
    "kv cache per tensor": [
        STATIC, "quantizer.kv_cache.bits=8", "quantizer.kv_cache.granularity=per_tensor",
        "quantizer.kv_cache.symmetric=true", *SEARCHES["tokens"],
    ],
    "attention per token": [
        STATIC, "quantizer.attention.bits=6", "quantizer.attention.granularity=per_token",
        "quantizer.attention.symmetric=false", *SEARCHES["none"],
    ],
    "smoothed and rotated": ["quantizer=rotation", "quantizer.smoothing_alpha=0.5", "quantizer.rotation_seed=3",
                             *SEARCHES["tokens"]],
    "qfem alpha": ["quantizer=qfem_static", *ALPHA, *SEARCHES["tokens"]],
    "qfem smoothed": ["quantizer=qfem", "quantizer.smoothing_alpha=0.8", *SEARCHES["tokens"]],
    "qfem out of reach": ["quantizer=qfem", "quantizer.qfem.target=0.5", *SEARCHES["none"]],
    "groups of 24": ["quantizer=w8a8_group", "quantizer.weights.group_size=24", *SEARCHES["none"]],
    "bos": [STATIC, "search=bos"],
    "newline": [STATIC, "search=newline"],
    "random": [STATIC, "search=random", "search.length=3", "seed=5"],
    "exact": [STATIC, "search=greedy_exact", "search.max_length=2", "search.tau=1.0"],
    "pruned": [STATIC, "search=greedy_pruned", "search.max_length=2", "search.tau=1.0"],
    "exhaustive": [STATIC, "search=greedy_exhaustive", "search.max_length=1", "search.tau=1.0"],
    "no prefix found": [STATIC, *SEARCHES["greedy_sampled"], "search.tau=0.01"],
    "budget": [STATIC, "search=greedy_pruned", "search.tau=1.0", "search.budget_token_forwards=9000"],
    "maximum activation": [STATIC, *SEARCHES["greedy_sampled"], "search.objective=maximum_activation"],
    "proposal frequent": [STATIC, *SEARCHES["greedy_sampled"], "search.proposal=frequent", "search.start=bos"],
    "proposal outlier": [STATIC, *SEARCHES["greedy_sampled"], "search.proposal=outlier", "search.start=newline"],
    "proposal user": [STATIC, *SEARCHES["greedy_sampled"], "search.proposal=user", "search.user_tokens=[10,32,101]"],
    "no outlier token": [STATIC, "search=prefixquant", "search.texts=4", "search.eta=1000"],
    "tuned straight through": [STATIC, *SEARCHES["tokens"], *TUNING, "tuning.gradient=straight_through",
                               "tuning.schedule=linear"],
    "tuned to the nearest": [STATIC, *SEARCHES["tokens"], *TUNING, "tuning.gradient=nearest_grid_point",
                             "tuning.error_site=linear_inputs", "tuning.reduction=sum"],
    "tuned in full precision": [STATIC, *SEARCHES["tokens"], *TUNING, "tuning.prediction_model=full_precision",
                                "tuning.schedule=constant", "tuning.gradient_clip=null"],
    "tuned without error": ["quantizer=w4a4", "quantizer.kv_cache.bits=4", *SEARCHES["tokens"], *TUNING,
                            "tuning.lambda_q=0"],
    "tuned for nothing": ["quantizer=none", *SEARCHES["tokens"], *TUNING],
    "tuning none": [STATIC, "search=none", *TUNING],
    "bos before blocks": [STATIC, "bos=always", "eval.predict_first=true", *SEARCHES["tokens"]],
    "prefix in block": [STATIC, "eval.prefix_in_block=true", "eval.batch_size=2", *SEARCHES["tokens"]],
    "more corpora": [STATIC, "+data.further={other: {source: file, path: '@/texts/other.txt'}}", *SEARCHES["tokens"]],
    "no controls": [STATIC, "eval.controls=false", *SEARCHES["tokens"]],
    "tasks alone": ["quantizer=qfem", *TASKS, "eval.perplexity=false", "eval.accuracy=acc_norm", *SEARCHES["tokens"]],
    "tasks w4a4": ["quantizer=w4a4", "quantizer.kv_cache.bits=4", *TASKS, "eval.limit=2", "bos=always",
                   *SEARCHES["none"]],
    "bfloat16": [STATIC, "model.dtype=bfloat16", *SEARCHES["greedy_sampled"]],
    "float16": ["quantizer=smoothquant_o1", "model.dtype=float16", *SEARCHES["tokens"]],
}  # fmt: skip
"""The other options, on one family. `@` is the folder of the tree."""


def cases() -> dict[str, list[str]]:
    """The overrides of every run by its name, `<family>/<quantizer>/<search>` and what else there is."""
    quantizers = sorted(path.stem for path in config_folder().glob("quantizer/*.yaml"))
    found: dict[str, list[str]] = {}
    for family in FAMILIES:
        these = {f"{quantizer}/{name}": [f"quantizer={quantizer}", *search]
                 for quantizer in quantizers for name, search in SEARCHES.items()}  # fmt: skip
        these |= {f"{quantizer}/tuned": [f"quantizer={quantizer}", *SEARCHES["greedy_sampled"], *TUNING]
                  for quantizer in TUNED}  # fmt: skip
        these |= ON_EVERY_FAMILY | (ON_LLAMA if family == "llama" else {})
        found |= {f"{family}/{name}": [f"model.path=tiny:{family}", *fitted(overrides)]
                  for name, overrides in these.items()}  # fmt: skip
    return found


def fitted(overrides: list[str]) -> list[str]:
    """The overrides, and behind the quantizer what makes its options fit the tiny models and texts."""
    quantizer = overrides[0].removeprefix("quantizer=")
    more = {"w8a8_group": ["quantizer.weights.group_size=16"]}.get(quantizer, [])
    if quantizer.startswith("qfem"):
        more = ["quantizer.qfem.texts=2"]
    return [overrides[0], *more, *overrides[1:]]


def make_inputs(output: Path) -> None:
    """The texts, the records of two tasks, and a task of its own; only what is not there yet."""
    sentence = "the a prefix of keys and values takes the sink so that no token after it has an outlier in any block"
    words = sentence.split()
    for name, count, shift in (("text.txt", 60, 0), ("other.txt", 8, 5)):
        documents = [
            f"Document {index + shift}. "
            + " ".join(words[(index * 7 + shift + step * (index % 5 + 3)) % len(words)] for step in range(120))
            for index in range(count)
        ]
        write(output / "texts" / name, "\n\n".join(documents))
    piqa = [
        {"goal": "open a jar", "sol1": "turn the lid", "sol2": "turn the table", "label": 0},
        {"goal": "dry a shirt", "sol1": "put it in water", "sol2": "hang it up", "label": 1},
        {"goal": "boil an egg", "sol1": "put it in hot water", "sol2": "put it in a drawer", "label": 0},
    ]
    lambada = [
        {"text": "The keeper lit the lamp and climbed the stair to see the lamp"},
        {"text": "One two three four"},
    ]
    questions = [{"question": question, "answer": question[0]} for question in ("one", "a longer question", "zwei")]
    for place, records in (("data/piqa/validation.jsonl", piqa), ("data/lambada_openai/lambada_test.jsonl", lambada),
                           ("tasks/generation.jsonl", questions)):  # fmt: skip
        write(output / place, "".join(json.dumps(record) + "\n" for record in records))
    task: dict[str, Any] = {
        "task": "tiny_generation", "dataset_path": "json", "output_type": "generate_until", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(output / "tasks" / "generation.jsonl")},
                           "cache_dir": str(output / "datasets")},
        "doc_to_text": "Q: {{question}}\nA:", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }  # fmt: skip
    write(output / "tasks" / "generation.yaml", json.dumps(task))  # JSON is YAML


def write(path: Path, text: str) -> None:
    """Write a file where there is none: a run's folder is told by the time of the files that it reads, too."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def arguments(output: Path, overrides: list[str]) -> list[str]:
    """All overrides of a run in the tree `output`."""
    places = [
        f"data.path={output}/texts/text.txt",
        f"paths.output_dir={output}/runs",
        f"paths.cache_dir={output}/cache",
    ]
    if any(word.startswith("eval.tasks=") for word in overrides):
        places += [f"paths.data_dir={output}/data", f"eval.include_path={output}/tasks"]
    chosen = [
        word for word in overrides if "." not in word.partition("=")[0]
    ]  # options, before the keys that change them
    keys = [word.replace("@", str(output)) for word in overrides if word not in chosen]
    return ["model=tiny", *SMALL, *places, *chosen, *keys]


def make(output: Path, wanted: dict[str, list[str]]) -> dict[str, str]:
    """Do the runs; the messages of those that are refused, by name."""
    refused: dict[str, str] = {}
    register_schema()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        for number, (name, overrides) in enumerate(wanted.items(), start=1):
            started = time.perf_counter()
            try:
                pipeline.run(to_run_config(compose("config", arguments(output, overrides))))
            except CushionError as error:
                refused[name] = f"{type(error).__name__}: {error}".replace(str(output), "@")
            said = "refused" if name in refused else "done"
            print(f"{number}/{len(wanted)} {name}: {said}, {time.perf_counter() - started:.1f} s", flush=True)
    return refused


def main() -> None:
    """Make the tree."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="the folder of the tree")
    parser.add_argument(
        "--only", action="append", metavar="SUBSTRING", help="the runs with this in their name; may be given again"
    )
    parser.add_argument(
        "--like", type=Path, metavar="TREE", help="the runs of that tree, by the overrides it was made of"
    )
    given = parser.parse_args()
    output: Path = given.output.resolve()
    known = json.loads((given.like / CASES_FILE).read_text(encoding="utf-8")) if given.like else cases()
    parts = given.only or [""]
    wanted = {name: overrides for name, overrides in known.items() if any(part in name for part in parts)}
    if not wanted:
        parser.error(f"--only {' '.join(parts)}: no run has this in its name, which is like {next(iter(known))}")
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # they are in the results
    make_inputs(output)
    started = time.perf_counter()
    refused = make(output, wanted)
    for name, record in ((CASES_FILE, wanted), (REFUSED_FILE, refused)):
        path = output / name
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        others = {case: said for case, said in before.items() if case not in wanted}
        path.write_text(json.dumps(others | record, indent=1) + "\n", encoding="utf-8")
    print(f"{len(wanted)} runs, {len(refused)} refused, in {time.perf_counter() - started:.0f} s: {output}")


if __name__ == "__main__":
    main()
