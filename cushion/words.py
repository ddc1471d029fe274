"""Words of the command line that Hydra takes and that do not do here what they say: refused before it sees them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, QuotedString, Sweep
from hydra.errors import HydraException

from cushion.checks import written
from cushion.errors import ConfigError

_RERUN = "--experimental-rerun"
_NOT_HERE = {
    "hydra.run.dir": "it would make an empty folder: a run has a folder of its own below paths.output_dir, named by "
    "what it depends on; use paths.output_dir=<folder>",
    "hydra.job.chdir": "relative paths of a run, that of its results too, are those of the folder where the command "
    "was given; go there first",
    "hydra.output_subdir": "every run's folder has its overrides.yaml, config.yaml and run.log",
}
"""Keys of Hydra, and why nothing comes of setting them."""


_LONGEST_KEY = 255
"""Bytes. Hydra looks for a folder of a key's name, and file systems take no longer ones; no key comes near."""


def quoted(text: str) -> str:
    """Text as an override can have any of it: in double quotes."""
    escaped = re.sub(r'(\\*)("|\$\{|$)', lambda found: found[1] * 2 + ("\\" + found[2] if found[2] else ""), text)
    return f'"{escaped}"'


def in_quotes(override: str) -> str | None:
    """An override that Hydra does not read, as `key=value` for a shell, its texts in quotes where they need them.

    None where that does not help.
    """
    key, _, value = override.partition("=")
    opened = re.match(r"[\[{(]|\w+\(", value)
    between = "," + ("" if opened is None else "[]{}" + ":" * ("{" in value) + "()" * opened[0].endswith("("))
    parts = re.split(rf"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[{re.escape(between)}])""", value)
    for at in range(0, len(parts), 2):  # what stands between two separators or quoted texts
        text = parts[at].strip()
        if text and not _is_read(f"key={text}"):
            parts[at] = _interpolating(text)
    for found in ("".join(parts), value if value[:1] in ("[", "{", "(", "") else _interpolating(value)):
        if found != value and _is_read(f"{key}={found}"):
            return f"{key}={shlex.quote(found)}"
    return None


def _interpolating(text: str) -> str:
    """Text in quotes, in which `${key}` stands for the value of a key, as it does without quotes."""
    return quoted(text).replace("\\${", "${")


def _is_read(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def check_words(words: list[str], folder: Path) -> None:
    """Refuse what would do something else than it says.

    Args:
        words: of the command line.
        folder: of the configuration, in which every group is a folder.

    Raises:
        ConfigError: such as `experiment=123`, `hydra.run.dir=x` or `--experimental-rerun=x`.

    """
    for word in words:
        key, _, value = word.partition("=")
        if key.startswith("--e") and _RERUN.startswith(key):  # argparse takes the beginning of an option for it
            raise ConfigError(
                f"{_RERUN} needs a file that Hydra's own callback pickles, and no run here writes one: use "
                "cushion rerun RESULT_OR_FOLDER [overrides]"
            )
        key = key.lstrip("+~")
        size = len(key.encode(errors="surrogatepass"))
        if size > _LONGEST_KEY and not word.startswith("-") and ("=" in word or word.startswith("~")):
            raise ConfigError(
                f"{key} is not a key of the configuration: it has {size} bytes, and none has more than "
                f"{_LONGEST_KEY} (cushion --cfg job prints every key there is)"
            )
        if key in _NOT_HERE:
            raise ConfigError(f"{key}={value} is not supported: {_NOT_HERE[key]}")
    _check_choices(words, folder)


def _check_choices(words: list[str], folder: Path) -> None:
    """Refuse an option of a group that is not named by text, such as `search=null`: Hydra ends with a traceback."""
    for word in words:
        key = word.partition("=")[0].partition("@")[0].lstrip("+~")
        if word.startswith("-") or "=" not in word or not key or not (folder / key).is_dir():
            continue
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException:
            continue  # not a value at all: Hydra says so itself
        value = override.value()
        chosen = value.list if isinstance(value, ChoiceSweep) else [value]
        for option in chosen:
            if not isinstance(option, str | list | dict | QuotedString | Sweep):
                text = written(option)
                raise ConfigError(
                    f"{key}={text} is not allowed: {key} chooses a file by its name, and {text} is not read as text; "
                    f"for a file of that name write {key}='\"{text}\"', for the default leave {key} out"
                )
