"""What the tests share: tiny random models made on the spot, small texts, and no network."""

from __future__ import annotations

import base64
import copy
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, for the processes that tests start too
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a test that reaches for the hub fails at once
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import pytest

if TYPE_CHECKING:  # torch is imported by the tests: the process that only hands them to workers goes without it
    from cushion.models import LanguageModel

FAMILIES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gpt_oss", "granite", "olmo2",
    "starcoder2", "gemma", "gemma2", "gemma3_text", "phi3", "opt", "bloom", "gpt_neox", "falcon",
)  # fmt: skip
POST_NORM = ("olmo2", "opt_post_norm")
"""Their norms stand behind the linears: neither SmoothQuant nor a rotation has a norm to fold into."""

EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
"""The mixtures of experts; their tiny models have four in every block."""

VARIANTS = (
    *FAMILIES, "gpt_neox_sequential", "falcon_new_decoder", "falcon_new_decoder_one_norm", "falcon_alibi",
    "opt_post_norm",
)  # fmt: skip
"""Everything that the table has an entry for."""

SMOOTHABLE = tuple(name for name in VARIANTS if name not in POST_NORM)
"""Those that SmoothQuant and the rotation work on."""

FEW = ("llama", "opt", "gpt_neox")
"""They stand for all where nothing depends on the family: rotary and learned positions, RMSNorm and LayerNorm,
attention and MLP in turn and side by side, projections apart and fused."""

UNLIKE = (*FEW, "bloom", "mixtral", "gemma2")
"""Those, and what is unlike them: positions without a limit, experts, norms with an offset and sliding windows."""

SLIDING = ("gpt_oss", "mistral", "starcoder2", "gemma2", "gemma3_text", "phi3")
"""The families whose tiny model has layers with a sliding window of 8 positions."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """The workers of `-n auto`: one for each core that may be used; behind eight, start-up outweighs the gain."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


def pytest_collection_finish() -> None:
    """Tiny models gain nothing from more threads than one, and tests side by side lose nothing.

    What is imported by now stays: the collector of garbage need not look through it again and again, nor as often.
    """
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk() -> Iterator[None]:
    """What a run writes need not outlive a power cut here: waiting until the disk has it is a third of a small run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_hydra() -> Iterator[None]:
    """Hydra reads the text of every file and override once: composing is a fifth of the suite."""
    from quick_hydra import install

    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        yield


_LOADED: dict[str, LanguageModel] = {}


@pytest.fixture
def tiny() -> Callable[..., LanguageModel]:
    """`tiny("llama")`: a fresh tiny model of a family, with grouped-query attention where the family has it.

    It is loaded once, and copied from then on, which takes half the time.
    """
    from cushion.config import ModelConfig, PathsConfig
    from cushion.models import load_language_model
    from cushion.models.architectures import find_architecture

    def load(family: str) -> LanguageModel:
        return load_language_model(ModelConfig(path=f"tiny:{family}"), PathsConfig())

    def make(family: str = "llama") -> LanguageModel:
        if family not in VARIANTS:  # of a plugin: what it brings may change
            return load(family)
        if family not in _LOADED:
            _LOADED[family] = load(family)
        kept = _LOADED[family]
        entry = kept.architecture
        if find_architecture(kept.model.config, family) is not entry:  # the test has another one in the table
            return load(family)
        return copy.deepcopy(kept, {id(entry): entry})

    return make


def write_documents(path: Path) -> Path:
    """60 different English-looking documents, separated by blank lines: enough for every purpose of a tiny run."""
    sentence = "the a prefix of keys and values takes the sink so that no token after it has an outlier in any block"
    words = sentence.split()
    documents = []
    for index in range(60):
        picked = [words[(index * 7 + step * (index % 5 + 3)) % len(words)] for step in range(120)]
        documents.append(f"Document {index}. " + " ".join(picked) + ".")
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """The documents of `write_documents`, for one test."""
    return write_documents(tmp_path / "text.txt")


PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg==")
"""A PNG file of one pixel."""


@pytest.fixture
def blank_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are laid out, and their files are one pixel: drawing them takes most of the time."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **__: path.write_bytes(PIXEL))


@pytest.fixture(scope="session")
def include_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A folder for `eval.include_path`, the same one for all tests: its tasks and `STOCK` are indexed but once."""
    from tiny_tasks import few_tasks, own_tasks

    from cushion.evaluation import tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "_task_manager", few_tasks)
        yield own_tasks(tmp_path_factory.mktemp("own_tasks"))
