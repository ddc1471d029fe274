"""The model card of an exported checkpoint: what it is, how it was made, its figures, and how to check it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from cushion.export.card import figures, made_with, texts_of
from cushion.export.finished import FinishedRun
from cushion.export.schemes import Scheme

PREFIX_FOLDER = "prefix"
"""Where the adapter lies inside a checkpoint."""


@dataclass(frozen=True)
class Agreement:
    """How a loaded checkpoint compares with the simulation, both behind the prefix, on the same blocks.

    Args:
        corpus: the text of the blocks.
        blocks, length: their number, and their length in tokens.
        difference: the largest difference between two logits, in magnitude.
        simulated, exported: the perplexity of either.
        measured: that of the row in the run, on these blocks; None where its result does not tell.

    """

    corpus: str
    blocks: int
    length: int
    difference: float
    simulated: float
    exported: float
    measured: float | None = None


def checkpoint_card(run: FinishedRun, name: str, scheme: Scheme, kept: list[str], agreement: Agreement) -> str:
    """The card as Markdown, with the front matter that the hub reads.

    Args:
        run: the run that was exported.
        name: what the folder of the checkpoint is called.
        scheme: of its linears.
        kept: the linears whose input stays in floating point, where QFeM keeps any.
        agreement: what was seen of the checkpoint after it was written.

    """
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front |= {"tags": ["cushion", "compressed-tensors"]}
    if run.has_base_model:
        front = {"base_model": run.base_model()[0], "base_model_relation": "quantized", **front}
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    own = run.record["rows"][-1]["label"]
    parts = [f"---\n{head}\n---", f"# {name}", *_what(run, scheme, kept), "## How it was made", made_with(run)]
    parts += [*figures(run, f"This checkpoint is the model of the row {own!r}."), *_check(run, scheme, agreement)]
    return "\n\n".join([*parts, *_use(run, name, scheme)]) + "\n"


def _what(run: FinishedRun, scheme: Scheme, kept: list[str]) -> list[str]:
    model = run.record["model"]
    base = run.base_model()[0] if run.has_base_model else run.config["model"]["path"]
    inputs = "inputs in floating point" if scheme.inputs is None else f"inputs {_arguments(scheme.inputs)}"
    found = [
        f"`{base}` ({model['architecture']}) with the linears of its decoder blocks quantized, in the format of "
        f"compressed-tensors: weights {_arguments(scheme.weights)}, {inputs}. Norms, embeddings and lm_head are in "
        "float32. Software without kernels for it runs it as fake quantization, in floating point: that gives its "
        "numbers, not its speed."
    ]
    if scheme.cache is not None:
        scales = {"tensor": "one for the keys of a layer and one for its values", "attn_head": "one for each head"}
        beside = " Those of the prefix are not, here; a server may round them too." if run.record["prefix"] else ""
        found.append(
            f"Cached keys and values are in FP8 with static scales, {scales[scheme.cache['strategy']]}.{beside} The "
            "simulation computes attention as the eager one of transformers does; other kernels sum in another order."
        )
    quantizer = run.config["quantizer"]
    folded = [
        words
        for words, is_on in (
            (f"smoothing (alpha {quantizer['smoothing_alpha']})", quantizer["smoothing_alpha"] is not None),
            (
                f"smoothing whose scales were searched ({quantizer['smoothing_search']})",
                quantizer["smoothing_search"] != "none",
            ),
            (f"a rotation of the residual stream ({quantizer['rotation']})", quantizer["rotation"] != "none"),
        )
        if is_on
    ]
    if folded:
        found.append(f"Folded into the weights: {' and '.join(folded)}.")
    if kept:
        listed = ", ".join(f"`{name}`" for name in kept)
        found.append(f"The inputs of these linears stay in floating point (QFeM, arXiv 2405.14428): {listed}.")
    prefix = run.record["prefix"]
    if prefix:
        kind = "tuned keys and values" if prefix["tuned"] else "keys and values"
        positions = f"{prefix['length']} position{'' if prefix['length'] == 1 else 's'}"
        found.append(
            f"The scales hold behind a prefix of {positions} of key-value cache ({kind}, tokens "
            f"{prefix['token_ids']}), which lies in `{PREFIX_FOLDER}/` as a PEFT adapter (`PREFIX_TUNING`). Its own "
            "positions never run through a quantized linear. Feeding its tokens in front of a text instead is "
            "another model, and may be a much worse one."
        )
    return found


def _arguments(own: dict[str, Any]) -> str:
    """Such as `int8, one scale per channel`."""
    numbers = f"{own['type']}{own['num_bits']}"
    strategy = f"{own['group_size']} inputs" if "group_size" in own else own["strategy"]
    kind = "" if own["symmetric"] else ", with a zero point"
    if own["strategy"] == "tensor_group":
        kind = f" and one {'static ' if own['dynamic'] else ''}scale per tensor"
    return f"{numbers}, one {'dynamic ' if own['dynamic'] else ''}scale per {strategy}{kind}"


def _check(run: FinishedRun, scheme: Scheme, agreement: Agreement) -> list[str]:
    where = " behind the prefix" if run.record["prefix"] else ""
    said = (
        f"Loaded by transformers in {scheme.dtype}{where}, on the first {agreement.blocks} blocks of "
        f"{agreement.length} tokens of {agreement.corpus!r}: the largest difference of a logit from Cushion's "
        f"simulation is {agreement.difference:.3g}; perplexity {agreement.exported:.4f}, in the simulation "
        f"{agreement.simulated:.4f}."
    )
    if agreement.measured is not None:
        said += f" The run measured {agreement.measured:.4f} on these blocks."
    return ["## Agreement", said if scheme.differs is None else f"{said} {scheme.differs}"]


def _use(run: FinishedRun, name: str, scheme: Scheme) -> list[str]:
    place = run.published_as or name
    prefix = run.record["prefix"]
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    options = "".join(f', {key}="{value}"' for key, value in scheme.attention.items())
    lines += [f'model = AutoModelForCausalLM.from_pretrained("{place}", dtype="{scheme.dtype}"{options})']
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{place}")']
    arguments = f"pretrained={place},dtype={scheme.dtype},add_bos_token={run.record['evaluation']['bos']}"
    arguments += "".join(f",{key}={value}" for key, value in scheme.attention.items())
    needed = "transformers and compressed-tensors"
    if prefix:
        lines = ["from peft import PeftModel", *lines]
        lines.append(
            f'model = PeftModel.from_pretrained(model, "{place}", subfolder="{PREFIX_FOLDER}")'
            if run.published_as
            else f'model = PeftModel.from_pretrained(model, "{name}/{PREFIX_FOLDER}")'
        )
        arguments += f",peft={name}/{PREFIX_FOLDER}"
        needed = "transformers, compressed-tensors and PEFT"
    code = "\n".join(lines)
    local = arguments.replace(f"pretrained={place}", f"pretrained={name}")
    notes = [
        "- Load it in float32: in half precision the scales are rounded, and codes differ."
        if scheme.dtype == "float32"
        else f"- Load it in {scheme.dtype}: transformers takes the weights out of the file in it.",
        "- Scales and agreement hold for transformers; other software may compute scales of its own.",
    ]
    if prefix:
        notes.append(f"- {texts_of(run)}")
        notes.append("- Every row of a batch has the same prefix. The output has no positions for it.")
    return [
        "## Use",
        f"With {needed}:",
        f"```python\n{code}\n```",
        "The command that checks it, with lm-eval as it is, beside a copy of this folder:",
        f"```bash\nlm_eval --model hf --model_args {local} --tasks wikitext\n```",
        "\n".join(notes),
    ]
