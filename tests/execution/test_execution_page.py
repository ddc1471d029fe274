"""What docs/execution.md says of the options of `quantizer` is what the code refuses."""

from __future__ import annotations

import re
from pathlib import Path

from omegaconf import OmegaConf

from cushion.checks import structured
from cushion.cli import config_folder
from cushion.config import QuantizerConfig
from cushion.execution.int8 import MOST_INPUTS, unsupported

PAGE = Path(__file__).parents[2] / "docs" / "execution.md"


def test_every_option_of_the_quantizer_is_run_or_refused_as_the_page_says() -> None:
    text = PAGE.read_text(encoding="utf-8")
    said = {
        option: verdict
        for options, verdict in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (runs|refused: `.*`) \|$", text, re.MULTILINE)
        for option in re.findall(r"`(\w+)`", options)
    }
    assert said.keys() == {path.stem for path in (config_folder() / "quantizer").glob("*.yaml")}
    for option, verdict in said.items():
        file = config_folder() / "quantizer" / f"{option}.yaml"
        reason = unsupported(structured(QuantizerConfig, OmegaConf.load(file), "quantizer"))
        assert (reason is None) == (verdict == "runs"), option
        assert reason is None or reason.startswith(verdict.removeprefix("refused: ").strip("`")), (option, reason)
    assert f"a linear of more than {MOST_INPUTS:,} inputs" in text
