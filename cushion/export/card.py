"""The model card of an exported prefix: what it is, how it was made, its figures, and the command that checks it."""

from __future__ import annotations

import json

from cushion.export.finished import FinishedRun
from cushion.metrics.columns import Place, columns
from cushion.reporting.grid import NONE, Cell, Table, markdown
from cushion.reporting.tables import cell_text

_GROUPS = ("data", "quantizer", "search", "tuning", "reconstruction", "eval")


def model_card(run: FinishedRun, name: str) -> str:
    """The card as Markdown, with the front matter that the hub reads.

    Args:
        run: the run that was exported.
        name: what the folder of the adapter is called.

    """
    base, revision = run.base_model()
    front = {"base_model": base, "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["cushion"]}
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    return (
        "\n\n".join([f"---\n{head}\n---", f"# {name}", *_what(run, base), *_how(run), *_use(run, name, base, revision)])
        + "\n"
    )


def _what(run: FinishedRun, base: str) -> list[str]:
    prefix, model = run.require_prefix(), run.record["model"]
    made = "tuned keys and values, which started from" if prefix["tuned"] else "the keys and values of"
    positions = f"{prefix['length']} position{'' if prefix['length'] == 1 else 's'}"
    text = [
        f"A prefix of {positions} of key-value cache for `{base}`, as a PEFT adapter "
        f"(`PREFIX_TUNING`): {made} the tokens {prefix['token_ids']}, in JSON {_code(json.dumps(prefix['text']))}. It "
        "stands before every text and takes over the outliers of the activations, so that the model can be quantized "
        "with one scale per tensor. The adapter holds the prefix alone: it does not quantize the model."
    ]
    if run.named_base_model is not None:
        text.append(
            f"It was made on `{run.config['model']['path']}` ({model['architecture']}, {model['dtype']}). That "
            f"`{base}` has the same weights is what whoever exported it says."
        )
    return text


def _how(run: FinishedRun) -> list[str]:
    return ["## How it was made", made_with(run, f", prefix {run.require_prefix()['fingerprint']}"), *figures(run)]


def made_with(run: FinishedRun, further: str = "") -> str:
    """The choices of a run by name, its model's fingerprint and the versions, in a sentence."""
    record = run.record
    groups = ", ".join(f"`{group}={run.config[group]['name']}`" for group in _GROUPS if group in run.config)
    packages = record["environment"].get("packages", {})
    versions = {
        "cushion": record["environment"]["cushion"],
        **{key: packages.get(key) for key in ("torch", "transformers")},
    }
    listed = ", ".join(f"{key} {value}" for key, value in versions.items())
    return (
        f"Made by Cushion with {groups}, seed {run.config['seed']}, model "
        f"{record['model'].get('fingerprint', NONE)}{further}; versions: {listed}."
    )


def figures(run: FinishedRun, own: str | None = None) -> list[str]:
    """A heading, and the rows of the run in the columns of a report.

    Args:
        own: what to say of the row that the export gives; None for what an adapter alone gives.

    """
    rows = run.record["rows"]
    shown = columns(rows, Place.REPORT)
    head = [Cell("row"), *(Cell(column.named(Place.REPORT)) for column in shown)]
    body = []
    for row in rows:
        body.append([Cell(row["label"]), *(Cell(cell_text(column, row, Place.REPORT)) for column in shown)])
    asked = ", ".join(f"{key}={value}" for key, value in run.record["evaluation"].items() if key in _ASKED)
    note = f"As the run measured them{f' ({asked})' if asked else ''}; quantized rows are Cushion's. "
    table = Table("figures", "Rows of the run", [head], body, 1, [note + (own or _of_adapter(run))])
    return ["## Figures", markdown(table).rstrip()]


def _of_adapter(run: FinishedRun) -> str:
    stage = "tuned" if run.require_prefix()["tuned"] else "found"
    own = [row["label"] for row in run.record["rows"] if row["stage"] == stage and not row["quantized"]]
    if own:
        return f"This adapter on the model as it is gives the row {own[0]!r}."
    return "No row is this adapter on the model as it is."


_ASKED = ("block_length", "bos", "limit")


def texts_of(run: FinishedRun) -> str:
    """How texts begin behind the prefix, as a sentence."""
    if run.record["evaluation"]["bos"]:
        return "Texts begin with BOS behind the prefix, as they did in the run."
    return "Texts have no BOS behind the prefix, as in the run: tokenize with `add_special_tokens=False`."


def _use(run: FinishedRun, name: str, base: str, revision: str | None) -> list[str]:
    model = run.config["model"]
    dtype = run.record["model"]["dtype"]
    remote = bool(model.get("trust_remote_code"))
    options = [f'"{base}"', *([f'revision="{revision}"'] if revision else []), f'dtype="{dtype}"']
    arguments = [f"pretrained={base}", *([f"revision={revision}"] if revision else []), f"dtype={dtype}"]
    arguments.append(f"add_bos_token={run.record['evaluation']['bos']}")
    if remote:
        options, arguments = [*options, "trust_remote_code=True"], [*arguments, "trust_remote_code=True"]
    return [
        "## Use",
        f"```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({', '.join(options)})\n"
        f'model = PeftModel.from_pretrained(model, "{name}")\n```',
        "The command that checks it, with lm-eval as it is:",
        f"```bash\nlm_eval --model hf --model_args {','.join([*arguments, f'peft={name}'])} --tasks wikitext\n```",
        f"- {texts_of(run)}\n- The output has no positions for the prefix; labels need no shift.\n"
        "- In a plain forward pass of a batch padded on the left, give `position_ids` that start behind the prefix; "
        "`generate` does so by itself.\n"
        "- Every row of a batch has the same prefix.\n"
        "- Layers with a sliding window, where the model has them, see the prefix only from as far as their window "
        "reaches: later tokens are without it there, as they were in the run.",
    ]


def _code(text: str) -> str:
    """A code span of any text: fenced by more backticks than stand together in it."""
    fence = "`"
    while fence in text:
        fence += "`"
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"
