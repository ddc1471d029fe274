"""What a reader of a result should know of what a run found, as texts; `config_warnings` are those of its options."""

from __future__ import annotations

from typing import Any

from cushion.config import RunConfig
from cushion.evaluation.chat import chat_warnings, writes_bos
from cushion.execution.registry import load_execution
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.preparation import Prepared, begins_with_bos


def preparation_warnings(config: RunConfig, prepared: Prepared) -> list[str]:
    """What a reader should know of the texts, the tasks and the execution, before anything is measured."""
    found = [*data_warnings(prepared), *task_warnings(config, prepared)]
    if config.quantizer.is_full_precision:
        return found
    return found + load_execution(config.execution).warnings(prepared.lm, config.quantizer)


def found_warnings(config: RunConfig, lm: LanguageModel, prefix: Prefix | None) -> list[str]:
    """What a reader should know of the prefix that was found: whether a BOS in it stands twice."""
    if prefix is None or lm.bos_token_id not in prefix.token_ids:
        return []
    if begins_with_bos(lm, config.bos):
        return [
            "the prefix holds BOS and every text begins with BOS, so it stands twice: with bos=never it stands once"
        ]
    if config.eval.tasks and writes_bos(lm, config.eval):
        return ["the prefix holds BOS and the chat template begins with BOS, so it stands twice in every task"]
    return []


def qfem_warnings(record: dict[str, Any], title: str) -> list[str]:
    """What a user should know of one entry of `result.qfem`: nothing kept, a target missed, a doubtful bisection."""
    search, largest = record["alpha_search"], max(record["ratios"].values(), default=1.0)
    if search is None:
        if record["kept"]:
            return []
        return [
            f"quantizer.qfem.alpha={record['alpha']} keeps no linear in full precision ({title}): the largest ratio is "
            f"{largest:.6g}"
        ]
    found, warnings = search["points"][search["found"]], []
    reference, limit = search["reference_perplexity"], search["target"] * search["reference_perplexity"]
    if not search["reached"]:
        warnings.append(
            f"quantizer.qfem.target={search['target']} is not reached ({title}): with the inputs of all linears in "
            f"full precision the perplexity on calibration text is {found['perplexity']}, and {limit:.6g} was wanted "
            f"({reference:.6g} with per-token scales); the run goes on with all of them kept, raise the target"
        )
    if search["contradictions"]:
        counts = ", ".join(str(search["points"][index]["kept_modules"]) for index in search["contradictions"])
        warnings.append(
            f"the search for quantizer.qfem.alpha assumes that the perplexity falls with every linear that is kept, "
            f"and it does not ({title}): {found['kept_modules']} were taken to be needed, which what was measured with "
            f"{counts} kept contradicts"
        )
    return warnings


def data_warnings(prepared: Prepared) -> list[str]:
    """What a reader should know of the texts."""
    tuning = prepared.corpora.get("tuning")
    held_out = None if tuning is None else tuning.provenance.get("held_out")
    if held_out is None or held_out.get("split") != "position":
        return []
    return [
        "data.tuning has too few documents to hold any out: the held-out texts are the end of the text that training "
        "reads the rest of; name a source of more documents, or lower tuning.sequences"
    ]


def task_warnings(config: RunConfig, prepared: Prepared) -> list[str]:
    """What a reader of the accuracies should know."""
    tasks = prepared.tasks
    if not tasks.asked:
        return []
    found = chat_warnings(prepared.lm, config.eval, tasks, config.bos)
    left_out = [name for name in tasks.asked if name not in tasks.in_mean]
    if left_out:
        found.append(
            f"{', '.join(left_out)} of eval.tasks is part of another entry and does not count twice in the mean"
        )
    taken = [name for name, task in tasks.tasks.items() if task.prepared]
    if taken:
        found.append(
            f"the records of {', '.join(taken)} are taken as they are, prepared already: the prompts are those of "
            "lm-eval's task only if they were prepared as it does"
        )
    return found


def truncation_warning(truncated: dict[str, int], label: str, length: int, shots: int | None) -> str:
    """What was cut in a row: requests by entry of `eval.tasks`, behind a prefix of `length` tokens."""
    counts = " and ".join(f"{count} requests of {task}" for task, count in truncated.items() if count)
    room = f"the model's context leaves behind a prefix of {length} tokens" if length else "the model's context holds"
    ways_out = [*(["shorten the prefix"] if length else []), *(["lower eval.shots"] if shots != 0 else [])]
    way_out = f"; {' or '.join(ways_out)}" if ways_out else ""
    return (
        f"{counts} of eval.tasks lost the start of their context ({label}): with the answer they are longer "
        f"than {room}{way_out}"
    )
