"""The target `tokens`: an untuned prefix for servers, and the linears that must keep their input for it."""

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
