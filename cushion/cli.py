"""The one runner: Hydra composes the configuration, `pipeline.run` does the work, the path of result.json comes last.

`cushion model=... quantizer=... search=... tuning=...` does one run, `cushion -m ...` sweeps. A user's mistake ends
with one line on standard error and exit status 1; only a bug shows a traceback.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cushion.config import RunConfig
from cushion.errors import CushionError, did_you_mean

_PACKAGE = Path(__file__).resolve().parent


def config_folder() -> Path:
    """The folder of the shipped YAML files: inside the package when installed, beside it in a checkout."""
    inside = _PACKAGE / "conf"
    return inside if inside.is_dir() else _PACKAGE.parent / "conf"


def register_schema() -> None:
    """Make the typed schema known to Hydra; `conf/config.yaml` starts from it."""
    ConfigStore.instance().store(name="run_schema", node=RunConfig)


def to_run_config(config: DictConfig) -> RunConfig:
    """The typed configuration; every check of every group runs here.

    Raises:
        ConfigError: a value is out of range, or two keys contradict each other.

    """
    run_config = OmegaConf.to_object(config)
    assert isinstance(run_config, RunConfig)
    return run_config


def execute(config: RunConfig) -> Path:
    """Do one run with progress bars and the configured tracker, print its table, return the path of result.json."""
    from cushion import pipeline  # imports torch and transformers: not needed for --help or a refused configuration
    from cushion.artifacts import read_json, write_json
    from cushion.progress import ProgressBars
    from cushion.reporting.tables import comparison_table
    from cushion.results import FILE_NAME
    from cushion.tracking import WandbTracker

    folder = pipeline.run_folder(config)
    place = folder / "tracking.json"
    tracker = WandbTracker(config.tracking) if config.tracking.backend == "wandb" else None
    with ProgressBars() as bars:
        try:
            result = pipeline.run(config, [bars] if tracker is None else [bars, tracker])
        finally:
            if tracker is not None:
                tracker.close(exit_code=0 if sys.exc_info()[0] is None else 1)
    if tracker is not None and tracker.location is not None:
        write_json(place, {"location": tracker.location})
    print(comparison_table(asdict(result)))
    print()
    if result.prefix is not None:
        print(f"prefix   {result.prefix['text']!r}, token ids {result.prefix['token_ids']}, in {folder / 'prefix'}.*")
    print(f"figure   {folder / 'figures' / 'activation_curves.png'}")
    print(f"W&B run  {read_json(place)['location'] if place.is_file() else 'none'}")
    print("results")
    path = (folder / FILE_NAME).resolve()
    print(path, flush=True)
    return path


@hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")
def _hydra_main(config: DictConfig) -> str:
    return str(execute(to_run_config(config)))


def main() -> None:
    """Entry point of the command `cushion`."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on instead of printing them; they are printed below
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    register_schema()
    try:
        _hydra_main()
    except (CushionError, HydraException, OmegaConfBaseException) as error:
        print(f"cushion: error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("cushion: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def one_line(error: BaseException) -> str:
    """The message of an error in one line, with the nearest key where a key is misspelt."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("reference_type=", "object_type=", "Config search path"))]
    hint = ""
    if cause := _misspelt(error):
        hint = did_you_mean(*cause)
    return " ".join(kept) + hint


def _misspelt(error: BaseException) -> tuple[str, list[str]] | None:
    """The unknown key of a configuration error and the keys there are, if that is what the error is about."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OmegaConfBaseException) and chain.key is not None and chain.parent_node is not None:
            parent: Any = chain.parent_node
            if OmegaConf.is_dict(parent):
                return str(chain.key), [str(key) for key in parent]
        chain = chain.__cause__
    return None


if __name__ == "__main__":
    main()
