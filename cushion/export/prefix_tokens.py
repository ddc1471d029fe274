"""An untuned prefix as tokens for servers: measured as they run it, then written as JSON with a model card.

What is broken so is refused, with the figures.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cushion.artifacts import ArtifactStore
from cushion.errors import ConfigError
from cushion.evaluation.prefix_as_tokens import measure_as_tokens
from cushion.export.finished import FinishedRun
from cushion.metrics.perplexity import key_of
from cushion.models import LanguageModel
from cushion.progress import ProgressBars
from cushion.remade import RemadeRun
from cushion.step import Context

FORMAT = "cushion-prefix-tokens-1"
TOLERANCE = 0.10
"""How much worse than the run's own row, as a share of its perplexity, the prefix may be as tokens.

Rounding alone moves the perplexity of a quantized model by some per cent; what is broken lies at a multiple.
"""


@dataclass(frozen=True)
class Compared:
    """A perplexity of the run's own row, and of the same with the prefix as tokens."""

    run: float
    as_tokens: float

    @property
    def excess(self) -> float:
        """How much worse it is as tokens, as a share of the run's; negative where it is better."""
        return self.as_tokens / self.run - 1


def write(run: FinishedRun, folder: Path) -> None:
    """Measure the prefix as a server runs it, and write what it needs.

    Raises:
        ConfigError: it is broken so; the message has the figures.
        CushionError: the run's model cannot be made again.

    """
    row = run.record["rows"][-1]
    with ProgressBars() as bars:
        remade = RemadeRun(run.folder, run.record, run.prefix(), bars)
        prepared, config = remade.prepared, remade.config
        context = Context(prepared.lm, ArtifactStore(config.paths.cache), bars)
        model = remade.model(row)
        blocks = prepared.blocks_behind(config.eval, len(model.behind))
        found = measure_as_tokens(context, model, config.eval, blocks, prepared.bos)
    compared = {corpus: Compared(row["values"][key_of(corpus)], one.value) for corpus, one in found.perplexity.items()}
    refuse_broken(compared, config.quantizer.name, len(found.keep))
    base, revision = run.base_model()
    ids = list(model.behind.token_ids)
    text = prepared.lm.decode(ids)
    record = {
        "format": FORMAT,
        "base_model": base,
        "revision": revision,
        "token_ids": ids,
        "text": text,
        "text_gives_token_ids": _stands_as_text(prepared.lm, ids, [] if prepared.bos else blocks.values()),
        "bos_behind": prepared.bos,
        "quantizer": config.quantizer.scheme + (" + reconstruction" if row.get("reconstructed", False) else ""),
        "full_precision_inputs": sorted(model.keep | found.keep.keys()),
        "beyond_range": found.keep,
        "measured": {corpus: {"run": one.run, "as_tokens": one.as_tokens} for corpus, one in compared.items()},
    }
    (folder / "prefix_tokens.json").write_text(
        json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (folder / "README.md").write_text(card(run, record, folder.name), encoding="utf-8")


STARTS = 16
"""Texts before which the prefix is tried as text, of each corpus, and how many of their tokens."""


def _stands_as_text(lm: LanguageModel, ids: list[int], corpora: Iterable[Tensor]) -> bool:
    """Whether the prefix's text gives its tokens, alone and right before the texts of some blocks, (blocks, tokens).

    The last of its tokens may become one with the first of a text.
    """
    text = lm.decode(ids)
    starts = ["", *(lm.decode(block[:STARTS].tolist()) for blocks in corpora for block in blocks[:STARTS])]
    return all(lm.encode(text + start).tolist() == ids + lm.encode(start).tolist() for start in starts)


def refuse_broken(compared: dict[str, Compared], quantizer: str, kept: int) -> None:
    """Raise `ConfigError`, with the figures, where the prefix is worse as tokens than `TOLERANCE` allows."""
    broken = {corpus: one for corpus, one in compared.items() if not one.excess <= TOLERANCE}
    if broken:
        figures = ", ".join(
            f"{one.as_tokens:.2f} on {corpus}, {one.excess:.1%} above the run's {one.run:.2f}"
            for corpus, one in broken.items()
        )
        raise ConfigError(
            f"quantizer={quantizer} with the prefix as tokens and {kept} linears kept has a perplexity of {figures}, "
            f"and at most {TOLERANCE:.0%} more is allowed: use --to=peft, whose prefix no quantized linear reads, or a "
            "quantizer with weights of 8 bits and with static ranges or a range per token"
        )


def card(run: FinishedRun, record: dict[str, Any], name: str) -> str:
    """The model card as Markdown.

    Args:
        run: the run that was exported.
        record: the content of prefix_tokens.json.
        name: what the folder is called.

    """
    base, ids = record["base_model"], record["token_ids"]
    front = {"base_model": base, "tags": ["cushion", "prefix-tokens"]}
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    figures = "\n".join(
        f"| {corpus} | {one['run']:.2f} | {one['as_tokens']:.2f} |" for corpus, one in record["measured"].items()
    )
    kept = "\n".join(
        f"- `{linear}`" + (f": {beyond:.2f} times" if (beyond := record["beyond_range"].get(linear)) else "")
        for linear in record["full_precision_inputs"]
    )
    behind = ", BOS, the text" if record["bos_behind"] else ", the text"
    same = "gives these tokens" if record["text_gives_token_ids"] else "does not give these tokens: send the ids"
    ask = f"[{', '.join(map(str, ids))}, *{'[bos], *' if record['bos_behind'] else ''}text_ids]"
    parts = [
        f"---\n{head}\n---",
        f"# {name}",
        f"A prefix of {len(ids)} token{'' if len(ids) == 1 else 's'} for `{base}` under `{record['quantizer']}`: the "
        f"ids {ids}. It stands before every text ({ids}{behind}) and takes over the outliers of the activations. "
        f"Tokenizing its text, in JSON `{json.dumps(record['text'])}`, {same}.",
        "## What the quantizer must leave alone",
        (
            "The scales are those of the run, which leave the prefix out. These linears keep their input in full "
            "precision, their weights are quantized all the same (of 8 bits: W8A16). Behind the name stands how far "
            f"the prefix's tokens go beyond the range that the linear would have.\n\n{kept}"
        )
        if kept
        else "Nothing: the prefix's tokens fit the ranges of all linears.",
        "## Figures",
        "Perplexity of the run's own row, whose prefix is keys and values in full precision, and with the prefix as "
        "tokens that run through the quantized linears, over the same tokens:\n\n"
        f"| text | run | as tokens |\n|---|---|---|\n{figures}",
        "## How it was made",
        f"Made by Cushion {run.record['environment']['cushion']} with `search={run.config['search']['name']}`, "
        f"`quantizer={run.config['quantizer']['name']}`, seed {run.config['seed']}, model "
        f"{run.record['model']['fingerprint']}.",
        "## Use",
        f"```python\nfrom vllm import TokensPrompt\n\nprompt = TokensPrompt(prompt_token_ids={ask})\n```",
    ]
    return "\n\n".join(parts) + "\n"
