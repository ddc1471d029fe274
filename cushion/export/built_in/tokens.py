"""The target `tokens`: an untuned prefix for servers, and the linears that must keep their input for it.

## `tokens`: the prefix for servers

The tokens of a prefix that was not tuned, for software that can only put tokens before a text, and what the run's
quantizer needs for that: the linears whose input it must leave in full precision
([method.md](method.md#the-prefix-as-tokens) says how they are found).

```bash
cushion-export outputs/default/.../0123456789ab --to tokens my_prefix --base-model HuggingFaceTB/SmolLM2-135M-Instruct
```

| file | |
|---|---|
| `prefix_tokens.json` | `token_ids`, `text`, whether the text gives these ids, also right before the evaluated texts (`text_gives_token_ids`), whether BOS stands behind them (`bos_behind`), `base_model` and `revision`, the `quantizer` of the run's last row, `full_precision_inputs` (the linears that run as W8A16, those of QFeM among them) and `beyond_range` (those that are there for the prefix, with how far its tokens go beyond their range); `measured`, see below |
| `README.md` | model card with all of it |

`measured` has for each corpus the perplexity of the run's row (`run`) and with the prefix as tokens (`as_tokens`). It
is measured when the target is written, on the run's blocks. What is more than 10 % above the run's figure on any
corpus is refused, with the figures: it is broken, and never written. A tuned prefix is refused as well, for its keys
and values are not those of tokens: `--to peft` has them.

The files hold no weights and no scales. Both must be those of the run, whose scales leave the prefix out. Where it
expresses the quantizer, `--to compressed-tensors` writes them, but there the inputs of `beyond_range` are quantized
too, and a server must leave these in full precision. No server was tried.
"""  # noqa: E501

from __future__ import annotations

from cushion.errors import ConfigError
from cushion.export.finished import FinishedRun
from cushion.export.targets import ExportTarget, register


def _check(run: FinishedRun) -> None:
    """Tokens say nothing of keys and values that were tuned, and what was not measured cannot be compared."""
    if run.require_prefix()["tuned"]:
        tuning = run.config["tuning"]["name"]
        raise ConfigError(f"tuning={tuning} changed what the tokens stand for: export with --to=peft")
    if not run.record["rows"][-1]["quantized"]:
        raise ConfigError(
            f"quantizer={run.config['quantizer']['name']} quantizes nothing, and --to=tokens is for a quantized model: "
            "any prefix that was not tuned may be used as tokens there"
        )
    if not run.config["eval"]["perplexity"]:
        raise ConfigError(
            "eval.perplexity=false: --to=tokens compares with the run's own perplexity, so run again with "
            "eval.perplexity=true"
        )
    run.base_model()  # refuses a model that others cannot load


register(
    ExportTarget(
        name="tokens",
        title="the tokens of a prefix that was not tuned, for servers, with the linears that keep their input for it",
        check=_check,
        write="cushion.export.prefix_tokens:write",
    )
)
