"""The places that a run reads and those that it writes lie apart."""

from __future__ import annotations

import os
from pathlib import Path

from cushion.config import RunConfig
from cushion.errors import ConfigError


def check_apart(config: RunConfig) -> None:
    """Refuse a folder that is read with everything in it, and that the run itself writes to.

    Its texts or tasks would be others at the end of the run than at its start, and the run would have another folder.

    Raises:
        ConfigError: it names the key that is read, and the one that is written.

    """
    paths = config.paths
    read = {f"data.{name}.path": one.path for name, one in config.data.purposes().items() if one.source == "file"}
    if config.data.path is not None and config.data.path in read.values():
        read = {key: path for key, path in read.items() if path != config.data.path} | {"data.path": config.data.path}
    writes = {"paths.output_dir": paths.output_dir, "paths.cache_dir": str(paths.cache)}
    if config.model.path.startswith("embedded:"):
        writes["paths.model_dir"] = paths.model_dir
    for key, path in {**read, "eval.include_path": config.eval.include_path}.items():
        folder = None if path is None else Path(os.path.realpath(Path(path).expanduser()))
        for place, written in writes.items():
            below = Path(os.path.realpath(Path(written).expanduser()))
            if folder is None or not folder.is_dir() or not below.is_relative_to(folder):
                continue
            is_hidden = any(part.startswith(".") for part in below.relative_to(folder).parts)
            if is_hidden and key != "eval.include_path":  # of texts, hidden files are not read
                continue
            raise ConfigError(
                f"{key}={path!r} is read with everything in it, and the run writes to {written} ({place}), which is "
                f"in it: name a folder that holds nothing else, or another {place}"
            )
