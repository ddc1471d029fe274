"""An export target in one file: the tokens of an untuned prefix as JSON, for software that puts them before a text."""

from __future__ import annotations

import json
from pathlib import Path

from cushion.errors import ConfigError
from cushion.export.finished import FinishedRun
from cushion.export.targets import ExportTarget, register


def check(run: FinishedRun) -> None:
    """Tokens say nothing of keys and values that were tuned."""
    if run.require_prefix()["tuned"]:
        tuning = run.config["tuning"]["name"]
        raise ConfigError(f"tuning={tuning} changed what the tokens stand for: export with --to=peft")


def write(run: FinishedRun, folder: Path) -> None:
    """One file: the tokens, their text, and the model they belong to."""
    prefix = run.require_prefix()
    content = {"model": run.config["model"]["path"], "token_ids": prefix["token_ids"], "text": prefix["text"]}
    (folder / "prefix_tokens.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


register(
    ExportTarget(
        name="token_ids",
        title="the tokens of an untuned prefix as JSON",
        check=check,
        write=f"{__name__}:write",
    )
)
