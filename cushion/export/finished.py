"""A finished run as export targets read it: its result, its prefix, and what others call its model.

Light to import: the prefix's tensors are read when they are asked for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cushion.errors import ArtifactError, ConfigError
from cushion.integrity import OF_A_RUN, SAMPLES, changed_files
from cushion.schema import FILE_NAME, PREFIX, current

if TYPE_CHECKING:
    from cushion.prefix import Prefix


@dataclass(frozen=True)
class FinishedRun:
    """A run whose result is complete.

    Args:
        folder: the run's folder.
        record: the content of its result.json, as docs/results.md describes it.
        named_base_model: what `--base-model` says the model is called; None where it says nothing.
        published_as: id of the repository that the export is uploaded to; None where it is not.

    """

    folder: Path
    record: dict[str, Any]
    named_base_model: str | None = None
    published_as: str | None = None

    @classmethod
    def read(cls, folder: Path, named_base_model: str | None = None, published_as: str | None = None) -> FinishedRun:
        """Read a run's folder.

        Raises:
            ArtifactError: it holds no result, a damaged one, that of a run that failed, or other files than it left.
            ConfigError: `--base-model` names neither a model of the hub nor a folder, or `--push` no repository.

        """
        path = folder / FILE_NAME
        if not path.is_file():
            raise ArtifactError(f"RUN={str(folder)!r} holds no {FILE_NAME}: name the folder of a finished run")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            record = current(content, path)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{path} is damaged ({error}): delete the folder {folder} and run again") from error
        if record["status"] != "completed":
            raise ArtifactError(f"RUN={str(folder)!r} has status={record['status']}: run it again, then export it")
        if reason := changed_files(content, folder, [name for name in OF_A_RUN if name != SAMPLES]):
            raise ArtifactError(f"{path} {reason}: run it again, which computes anew what does not fit")
        if named_base_model is not None and not (_is_hub_id(named_base_model) or Path(named_base_model).is_dir()):
            raise ConfigError(
                f"--base-model={named_base_model!r} is neither the id of a model on the hub nor a folder: "
                "write it as owner/name"
            )
        if published_as is not None and not ("/" in published_as and _is_hub_id(published_as)):
            raise ConfigError(f"--push={published_as!r} is not the id of a repository: write it as owner/name")
        return cls(folder, record, named_base_model, published_as)

    @property
    def config(self) -> dict[str, Any]:
        """The run's configuration, by group."""
        found: dict[str, Any] = self.record["config"]
        return found

    def require_prefix(self) -> dict[str, Any]:
        """What result.json says of the prefix.

        Raises:
            ConfigError: the run has none.

        """
        found: dict[str, Any] | None = self.record["prefix"]
        if not found:
            search = self.config["search"]["name"]
            raise ConfigError(
                f"search={search} left this run without a prefix, and there is nothing else to export: "
                "name a run that has one"
            )
        return found

    def prefix(self) -> Prefix:
        """The run's final prefix: tuned, if there was a tuning.

        Raises:
            ConfigError: the run has none.
            ArtifactError: its files are missing or damaged, or they are not those of this result.

        """
        from cushion.prefix import Prefix  # imports torch: only here

        wanted = self.require_prefix()["fingerprint"]
        prefix = Prefix.load(self.folder / PREFIX)
        if prefix.fingerprint != wanted:
            raise ArtifactError(
                f"{self.folder / PREFIX}.safetensors is not the prefix of the {FILE_NAME} beside it: run again"
            )
        return prefix

    def base_model(self) -> tuple[str, str | None]:
        """What others load the run's model by, the id and the revision (None: the newest).

        Raises:
            ConfigError: others cannot load `model.path`, and `--base-model` does not name what they can.

        """
        if self.named_base_model is not None:
            return self.named_base_model, None
        model = self.config["model"]
        if self._not_on_the_hub is not None:
            raise ConfigError(f"{self._not_on_the_hub}: {_WAY_OUT}")
        return model["path"], model.get("revision")

    @property
    def has_base_model(self) -> bool:
        """Whether it is known what others load the run's model by."""
        return self.named_base_model is not None or self._not_on_the_hub is None

    @property
    def _not_on_the_hub(self) -> str | None:
        """Why `model.path` is not what others load the model by; None where it is."""
        path, gguf = self.config["model"]["path"], self.config["model"].get("gguf_file")
        if gguf is not None:
            return f"model.gguf_file={gguf!r} is not what transformers loads by an id"
        if not _is_hub_id(path) or Path(path).expanduser().exists():
            return f"model.path={path!r} is not the id of a model on the hub"
        return None


_WAY_OUT = "name the model that has the same weights there with --base-model owner/name"


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
