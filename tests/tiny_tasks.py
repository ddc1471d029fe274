"""What the tests of tasks share: made-up records, tasks of a user's own, and the kinds of quantizer they run under."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from helpers import calibrated, random_texts

from cushion.activations import ChannelRanges
from cushion.config import ActivationConfig, PathsConfig, QuantizerConfig
from cushion.models import LanguageModel
from cushion.prefix import Prefix

# ---- made-up records in the fields of the official sets -------------------------------------------------------------


def _choices(*texts: str, labels: str = "ABCDE") -> dict[str, list[str]]:
    return {"text": list(texts), "label": list(labels[: len(texts)])}


RECORDS: dict[str, list[dict[str, Any]]] = {
    "lambada_openai": [
        {"text": "The keeper lit the lamp and climbed the stair to see the lamp"},
        {"text": 'She said "no"\u2028and then, after a while, she said\nyes'},
        {"text": "One two three four five six"},
        {"text": "Caf\u00e9 after caf\u00e9 they walked, until there was no caf\u00e9"},
    ],
    "hellaswag": [
        {
            "ind": 3,
            "activity_label": "Roof repair",
            "ctx_a": "A man is sitting on a roof.",
            "ctx_b": "he",
            "ctx": "A man is sitting on a roof. he",
            "endings": ["sings [step] a  song.", "pulls up tiles.", "is a cube.", "[title] Sleeps there."],
            "label": "1",
        },
        {
            "ind": 5,
            "activity_label": "Home and Garden",
            "ctx_a": "[header] How to plant a tree [title] Dig a hole.  [step] Use a spade.",
            "ctx_b": "",
            "ctx": "[header] How to plant a tree [title] Dig a hole.  [step] Use a spade.",
            "endings": ["Put it in.", "Leave it out.", "Eat the spade.", "Paint the hole."],
            "label": "0",
        },
        {
            "ind": 8,
            "activity_label": "Canoeing",
            "ctx_a": "Two women are in a canoe.",
            "ctx_b": "THEY paddle",
            "ctx": "Two women are in a canoe. THEY paddle",
            "endings": ["home.", "in the air.", "the piano.", "on foot."],
            "label": "0",
        },
    ],
    "piqa": [
        {"goal": "open a jar", "sol1": "turn the lid", "sol2": "turn the table", "label": 0},
        {"goal": "dry a shirt ", "sol1": " put it in water", "sol2": "hang it up", "label": 1},
        {"goal": "boil an egg", "sol1": "put it in hot water", "sol2": "put it in a drawer", "label": 0},
    ],
    "winogrande": [
        {"sentence": "Ann beat Eve because _ was fast.", "option1": "Ann", "option2": "Eve", "answer": "1"},
        {"sentence": "The cup fell off the shelf, so _ broke.", "option1": "shelf", "option2": "cup", "answer": "2"},
        {"sentence": "Bo asked Al, and _ answered.", "option1": "Bo", "option2": "Al", "answer": "2"},
    ],
    "openbookqa": [
        {"question_stem": "Ice melts when it is", "choices": _choices("hot", "cold", "blue", "old"), "answerKey": "A"},
        {"question_stem": "A plant needs", "choices": _choices("a hat", "light", "tea", "a car"), "answerKey": " B"},
        {"question_stem": "The sun is", "choices": _choices("a dog", "a lamp", "a cup", "a star"), "answerKey": "D"},
    ],
    "rte": [
        {"sentence1": "All dogs bark.", "sentence2": "A dog barks.", "label": 0},
        {"sentence1": "It rained.", "sentence2": "It was dry.", "label": 1},
        {"sentence1": "Ann sings well.", "sentence2": "Ann sings.", "label": 0},
    ],
    "copa": [
        {"premise": "The cup broke.", "choice1": "It fell.", "choice2": "It flew.", "question": "cause", "label": 0},
        {"premise": "It rained.", "choice1": "I sang.", "choice2": "I got wet.", "question": "effect", "label": 1},
        {"premise": "He ran. ", "choice1": "A bus left.", "choice2": "He sat.", "question": "cause", "label": 0},
    ],
    "arc_challenge": [
        {"question": "What is water?", "choices": _choices("a gas", "a liquid", "a metal"), "answerKey": "B"},
        {
            "question": "Which is hot?",
            "choices": _choices("ice", "fire", "snow", "fog", labels="1234"),
            "answerKey": "2",
        },
        {"question": "Which is red?", "choices": _choices("a leaf", "a rose", "the sea", "ink"), "answerKey": "B"},
    ],
}
FILES = {
    "lambada_openai": "lambada_openai/lambada_test.jsonl",
    "openbookqa": "openbookqa/test.jsonl",
    "arc_challenge": "arc_challenge/test.jsonl",
    **{name: f"{name}/validation.jsonl" for name in ("hellaswag", "piqa", "winogrande", "rte", "copa")},
}
MMLU: dict[str, list[dict[str, Any]]] = {
    "test": [
        {"subject": "abstract_algebra", "question": "1 + 1? ", "choices": ["1", "2", "3", "4"], "answer": 1},
        {"subject": "anatomy", "question": "Bones are", "choices": ["hard", "soft", "gas", "air"], "answer": 0},
        {"subject": "abstract_algebra", "question": "2 + 2?", "choices": ["1", "2", "3", "4"], "answer": 3},
        {"subject": "anatomy", "question": "The heart", "choices": ["sees", "sings", "beats", "eats"], "answer": 2},
        {"subject": "anatomy", "question": "The eye", "choices": ["sees", "sings", "beats", "eats"], "answer": 0},
    ],
    "dev": [
        {"subject": "anatomy", "question": "Ears", "choices": ["see", "hear", "taste", "walk"], "answer": 1},
        {"subject": "abstract_algebra", "question": "0 + 0?", "choices": ["0", "1", "2", "3"], "answer": 0},
        {"subject": "abstract_algebra", "question": "0 + 1?", "choices": ["0", "1", "2", "3"], "answer": 1},
        {"subject": "abstract_algebra", "question": "0 + 2?", "choices": ["0", "1", "2", "3"], "answer": 2},
        {"subject": "anatomy", "question": "Feet", "choices": ["see", "hear", "taste", "walk"], "answer": 3},
    ],
}


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def write_sets(root: Path, *names: str) -> PathsConfig:
    """Lay the made-up records of some tasks out below a data folder, as `paths.data_dir` wants them."""
    for name in names:
        if name == "mmlu":
            for split, records in MMLU.items():
                write_lines(root / "mmlu" / f"{split}.jsonl", records)
        else:
            write_lines(root / FILES[name], RECORDS[name])
    return PathsConfig(data_dir=str(root))


GENERATION = """
task: tiny_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/generation.jsonl}}, cache_dir: {folder}_cache}}
output_type: generate_until
test_split: test
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 8, do_sample: false}}
filter_list:
  - {{name: strict-match, filter: [{{function: regex, regex_pattern: "([a-z])"}}, {{function: take_first}}]}}
  - {{name: whole, filter: [{{function: take_first}}]}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 3}}
"""
EXAMPLES = """
task: tiny_examples
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/test.jsonl, train: {folder}/train.jsonl}}, cache_dir: {folder}_cache}}
output_type: multiple_choice
test_split: test
fewshot_split: train
doc_to_text: "{{{{question}}}} ->"
doc_to_choice: ["yes", "no"]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""


def own_tasks(folder: Path) -> str:
    """Lay out a folder for `eval.include_path` with two tasks and their records; returns its path."""
    questions = ["one", "a rather longer question than that", "zwei", "three little words", "q" * 70]
    write_lines(folder / "generation.jsonl", [{"question": question, "answer": question[0]} for question in questions])
    for name, count in (("train", 9), ("test", 4)):
        records = [{"question": f"{name} {number}", "answer": number % 2} for number in range(count)]
        write_lines(folder / f"{name}.jsonl", records)
    (folder / "generation.yaml").write_text(GENERATION.format(folder=folder), encoding="utf-8")
    (folder / "examples.yaml").write_text(EXAMPLES.format(folder=folder), encoding="utf-8")
    return str(folder)


STOCK = ("arc", "glue/rte", "hellaswag", "lambada", "mmlu/default", "openbookqa", "piqa", "super_glue/copa", "wikitext",
         "winogrande")  # fmt: skip
"""The folders of lm-eval that define what the tests ask for."""


@lru_cache
def few_tasks(include_path: str | None) -> Any:
    """Stand in for lm-eval's index of all tasks, whose 26,000 files take 17 seconds: that of the folders `STOCK`."""
    from lm_eval import tasks

    root = Path(tasks.__file__).parent
    own = [] if include_path is None else [include_path]
    return tasks.TaskManager(include_defaults=False, include_path=[*(str(root / name) for name in STOCK), *own])


# ---- quantizers ------------------------------------------------------------------------------------------------------

STATIC = QuantizerConfig()
DYNAMIC = QuantizerConfig(name="per_tensor_dynamic", activations=ActivationConfig(range="dynamic"))
PER_TOKEN = QuantizerConfig(
    name="per_token_dynamic", activations=ActivationConfig(granularity="per_token", range="dynamic")
)


def ranges_of(lm: LanguageModel, behind: Prefix) -> ChannelRanges:
    return calibrated(lm, random_texts(2, 24, seed=5), behind)
