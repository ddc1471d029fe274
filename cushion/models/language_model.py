"""A loaded language model together with its tokenizer and its entry in the architecture table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cushion.config import ModelConfig, PathsConfig
from cushion.errors import ConfigError, ModelNotFoundError, UnsupportedModelError, did_you_mean
from cushion.hashing import digest, tensor_digest
from cushion.models.architectures import Architecture, expand, find_architecture, plugin_identity
from cushion.models.embedded import embedded_model
from cushion.models.experts import with_linear_experts
from cushion.models.gguf_files import as_dequantized, read_once
from cushion.models.multimodal import text_part_options, without_report
from cushion.models.tiny import byte_tokenizer, tiny_model


@dataclass
class LanguageModel:
    """A causal language model in evaluation mode, frozen, with what the rest of Cushion needs to know of it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    architecture: Architecture
    label: str
    fingerprint: str
    """Changes whenever the weights, the dtype or the source do: the model's part in every cache key."""
    rotation: tuple[str, int] = ("none", 0)
    """The rotation of the residual stream that is on the model, and its seed (`quantization.rotation.rotated`)."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, in order."""
        blocks = self.model.get_submodule(self.architecture.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @property
    def named_blocks(self) -> dict[str, nn.Module]:
        """The decoder blocks by their number, as the hooks of `cushion.activations` take them."""
        return dict(self.blocks.named_children())

    @property
    def embeddings(self) -> Tensor:
        """The table of input embeddings, (vocabulary, features)."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.embeddings.device

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens that have an embedding and that the tokenizer knows; candidates lie below it."""
        return min(len(self.tokenizer), self.embeddings.shape[0])

    @property
    def context_length(self) -> int | None:
        """Largest number of positions the model was made for, or None where the configuration names none."""
        value = getattr(self.model.config, "max_position_embeddings", None)
        return None if value is None else int(value)

    @property
    def bos_token_id(self) -> int | None:
        """The token that stands for the beginning of a text: the tokenizer's BOS, else its EOS, else None."""
        bos = self.tokenizer.bos_token_id
        return cast("int | None", bos if bos is not None else self.tokenizer.eos_token_id)

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts BOS in front of a text where it adds special tokens, which is its default."""
        alone = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return bool(self.tokenizer("a")["input_ids"][: 1 + len(alone)] == [self.bos_token_id, *alone])

    @property
    def tokenizer_fingerprint(self) -> str:
        """Hash of the tokenizer and of the special tokens that it adds by itself: part of the keys of tasks."""
        backend: Any = getattr(self.tokenizer, "backend_tokenizer", None)
        state = backend.to_str() if backend is not None else sorted(self.tokenizer.get_vocab().items())
        return digest([state, self.tokenizer("a")["input_ids"], type(self.tokenizer).__name__])

    def linears(self, targets: list[str] | None = None) -> dict[str, nn.Linear]:
        """The linear layers of the decoder blocks by full name, in order; lm_head and routers are none of them.

        Args:
            targets: last parts of the names to keep (`["down_proj"]`), `["all"]` or None for all of them.

        Raises:
            ConfigError: a target that no linear of this model is called.

        """
        found = {
            f"{self.architecture.blocks}.{index}.{name}": module
            for index, block in enumerate(self.blocks)
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear) and name not in self.architecture.full_precision
        }
        if targets is None or targets == ["all"]:
            return found
        known = sorted({name.rsplit(".", 1)[-1] for name in found})
        for target in targets:
            if target not in known:
                raise ConfigError(
                    f"quantizer.targets names {target!r}, but the linears of {self.label} are called "
                    f"{', '.join(known)}{did_you_mean(target, known)}"
                )
        return {name: module for name, module in found.items() if name.rsplit(".", 1)[-1] in targets}

    def down_projections(self) -> dict[str, list[str]]:
        """The full names of the linears that are a block's down projection: one, or one for each of its experts.

        By the name that the architecture table gives them, in the order of the blocks; empty where it gives none, or
        the model has none of that name.
        """
        named, found = self.architecture.down_projection, dict[str, list[str]]()
        paths = [path.split(".") for path in ((named,) if isinstance(named, str) else named)]
        for name in self.linears():
            index, *own = name.removeprefix(f"{self.architecture.blocks}.").split(".")
            for path in paths:
                if len(own) == len(path) and all(part in ("*", mine) for part, mine in zip(path, own, strict=True)):
                    layer = ".".join([self.architecture.blocks, index, *path])
                    found.setdefault(layer, []).append(name)
        return found

    def gated_pairs(self) -> list[tuple[str, str]]:
        """The full names of every up projection and of the down projection behind it, where there are such pairs."""
        named = self.architecture.up_projection, self.architecture.down_projection
        ups, downs = ((path,) if isinstance(path, str) else path for path in named)
        return [
            (f"{self.architecture.blocks}.{index}.{up}", f"{self.architecture.blocks}.{index}.{down}")
            for index, block in enumerate(self.blocks)
            for ups_path, downs_path in zip(ups, downs, strict=bool(ups[0]))
            if ups_path
            for up, down in zip(expand(block, ups_path), expand(block, downs_path), strict=True)
        ]

    def norm_readers(self, index: int) -> list[tuple[str, dict[str, nn.Module]]]:
        """For each norm of block `index` that linears read, its full name and all that read it, by full name.

        Readers that stay in full precision (`Architecture.full_precision`) are among them.
        """
        block, path = self.blocks[index], f"{self.architecture.blocks}.{index}."
        return [
            (
                path + norm,
                {path + name: block.get_submodule(name) for paths in readers for name in expand(block, paths)},
            )
            for norm, readers in self.architecture.smoothing
        ]

    def is_quantized(self, name: str) -> bool:
        """Whether the module of this full name is a linear that quantizers quantize, and no router."""
        inside = name.removeprefix(f"{self.architecture.blocks}.").partition(".")[2]
        return inside not in self.architecture.full_precision

    def encode(self, text: str) -> Tensor:
        """Token ids of `text` without special tokens: a vector of shape (number of tokens,)."""
        ids = self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        self.check_embedded(ids)
        return torch.tensor(ids, dtype=torch.long)

    def check_embedded(self, token_ids: Iterable[int]) -> None:
        """Refuse tokens that the table of embeddings has no row for: those added to a tokenizer, and not to the model.

        Raises:
            UnsupportedModelError: naming the token with the largest id, where that is too large.

        """
        rows, last = self.embeddings.shape[0], max(token_ids, default=-1)
        if last >= rows:
            raise UnsupportedModelError(
                f"the tokenizer of {self.label} has the token {self.tokenizer.convert_ids_to_tokens(int(last))!r} with "
                f"the id {last}, and the model's table of embeddings has {rows} rows (ids 0 to {rows - 1}): enlarge it "
                "with `model.resize_token_embeddings(len(tokenizer))` and save the model, or leave the token out"
            )

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return cast(str, self.tokenizer.decode(list(token_ids)))

    def with_bos(self, tokens: Tensor) -> Tensor:
        """`tokens`, (texts, tokens), with BOS in front of every text; the caller has checked that there is one."""
        assert self.bos_token_id is not None
        self.check_embedded([self.bos_token_id])
        return torch.cat([torch.full_like(tokens[:, :1], self.bos_token_id), tokens], dim=1)

    def check_token_ids(self, token_ids: list[int], key: str) -> None:
        """Raise `ConfigError` for a token id outside the vocabulary."""
        for token in token_ids:
            if not 0 <= token < self.vocabulary_size:
                raise ConfigError(
                    f"{key}={token} is outside the vocabulary of {self.label}: 0 to {self.vocabulary_size - 1}"
                )

    def body(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """Run the decoder without lm_head. `input_ids`: (batch, tokens)."""
        body = cast(Any, self.model.base_model)
        return body(input_ids=input_ids.to(self.device), **kwargs)

    def logits(self, hidden: Tensor) -> Tensor:
        """Predictions from the decoder's output, as in the model's own pass: (..., features) -> (..., vocabulary).

        What families do behind lm_head is done as they do it: Granite divides by `logits_scaling`, Gemma 2 caps.
        """
        settings = self.model.config.get_text_config()
        logits = cast(nn.Module, self.model.get_output_embeddings())(hidden)
        divisor = getattr(settings, "logits_scaling", None)
        if divisor is not None:
            logits = logits / divisor
        cap = getattr(settings, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap


def load_language_model(config: ModelConfig, paths: PathsConfig, device: str = "cpu", seed: int = 0) -> LanguageModel:
    """Load a model and its tokenizer, frozen and in evaluation mode.

    Weights come from safetensors, from GGUF (dequantized), or from torch files read in the weights-only mode.

    Raises:
        ModelNotFoundError: no such model, no access to it, or damaged files.
        UnsupportedModelError: its architecture is not in the table.

    """
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    scheme, _, name = config.path.partition(":")
    if scheme == "tiny":
        model, tokenizer = tiny_model(name, seed=seed), byte_tokenizer()
        if config.dtype != "auto":
            cast(Any, model).to(dtype=getattr(torch, config.dtype))
    else:
        folder = config.path
        if scheme == "embedded":
            folder = str(embedded_model(name, Path(paths.model_dir).expanduser()))
        with read_once(config.gguf_file):
            if scheme != "embedded":
                check_model(config)
            model, tokenizer = _from_pretrained(folder, config)
    architecture = find_architecture(model.config, config.path)
    _refuse_offloading(model, config)
    if architecture.experts is not None:
        for block in cast(nn.ModuleList, model.get_submodule(architecture.blocks)):
            fused = block.get_submodule(architecture.experts)
            block.set_submodule(architecture.experts, with_linear_experts(fused, config.path))
    if config.device_map is None or scheme == "tiny":
        cast(Any, model).to(device)
    model.eval().requires_grad_(False)
    fingerprint = _fingerprint(model, tokenizer, config)
    own = plugin_identity(architecture)
    if own is not None:
        fingerprint = digest([fingerprint, own])
    return LanguageModel(model, tokenizer, architecture, config.label, fingerprint)


def _refuse_offloading(model: PreTrainedModel, config: ModelConfig) -> None:
    """Weights that accelerate moves to a GPU only while they are used cannot be quantized where they are."""
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    idle = places & {"disk"} | (places & {"cpu"} if len(places - {"cpu", "disk"}) else set())
    if idle:
        raise ConfigError(
            f"model.device_map={config.device_map!r} offloads part of {config.label} to {' and '.join(sorted(idle))}, "
            "which is not supported: use more GPUs, a smaller model or dtype, or device=cpu"
        )


def check_model(config: ModelConfig) -> None:
    """Refuse a model that is not there or whose architecture is not supported, before any weight or text is read.

    Raises:
        ModelNotFoundError: no such model, or no access to it.
        UnsupportedModelError: its architecture is not in the table, or its weights are quantized already.
    """
    if config.path.partition(":")[0] in ("tiny", "embedded"):
        return  # these tell at once when they are loaded
    if _looks_like_a_folder(config.path) and not Path(config.path).expanduser().is_dir():
        raise ModelNotFoundError(f"model.path={config.path!r} is not a folder: check the path")
    try:
        settings = AutoConfig.from_pretrained(str(Path(config.path).expanduser()), **_loading_options(config))
    except Exception as error:
        raise _cannot_load(config, error) from error
    find_architecture(settings, config.path)
    if getattr(settings, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"model.path={config.path!r} holds weights that are quantized already: name a checkpoint in float32, "
            "bfloat16 or float16"
        )


def _loading_options(config: ModelConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    return options if config.gguf_file is None else {**options, "gguf_file": config.gguf_file}


def _looks_like_a_folder(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1


_LOG_IN = "`hf auth login` with an account that may read it (or set HF_TOKEN)"
_HUB_ERRORS: tuple[tuple[type[Exception], str], ...] = (
    (GatedRepoError, f"it is gated: accept its licence at https://huggingface.co/{{path}}, then {_LOG_IN}"),
    (RepositoryNotFoundError, f"the hub has no such model, or it is private: check the id, or {_LOG_IN}"),
    (RevisionNotFoundError, "the hub has the model, but not model.revision={revision}: check the revision"),
    (
        LocalEntryNotFoundError,
        "the hub cannot be reached, and the files are not in the local cache: check the id or folder, or the network",
    ),
    (
        OfflineModeIsEnabled,
        "HF_HUB_OFFLINE keeps the hub away, and the files are not in the local cache: check the id or folder",
    ),
)
"""What went wrong between the hub and us, and the way out; the first that fits is told."""


def _cannot_load(config: ModelConfig, error: Exception) -> ModelNotFoundError:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:  # transformers wraps the hub's errors in errors of its own
        chain.append(link)
        link = link.__cause__ or link.__context__
    for kind, advice in _HUB_ERRORS:
        if any(isinstance(item, kind) for item in chain):
            told = advice.format(path=config.path, revision=config.revision)
            return ModelNotFoundError(f"model.path={config.path!r} cannot be loaded: {told}")
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return ModelNotFoundError(
        f"model.path={config.path!r} cannot be loaded: {reason} -- check the id or folder; a gated model needs its "
        "licence accepted on the hub and `hf auth login`; code in a repository runs only with "
        "model.trust_remote_code=true"
    )


def _from_pretrained(folder: str, config: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    shared = _loading_options(config)
    folder = str(Path(folder).expanduser()) if _looks_like_a_folder(folder) else folder
    try:
        dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
        part = text_part_options(AutoConfig.from_pretrained(folder, **shared))
        with without_report() if part else nullcontext():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                device_map=config.device_map,
                weights_only=True,
                output_loading_info=True,
                **part,
                **shared,
            )
        model, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(folder, **shared)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever transformers, tokenizers and torch raise over files they cannot read
        raise _cannot_load(config, error) from error
    if info["missing_keys"]:  # transformers fills them with random numbers and goes on
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ModelNotFoundError(
            f"model.path={config.path!r} cannot be loaded: its files lack {len(info['missing_keys'])} of the model's "
            f"tensors ({missing}, ...): download it again"
        )
    if config.gguf_file is not None:
        as_dequantized(model)
    return model, tokenizer


def _fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> str:
    """Hash of source and weights. A hub commit stands for its weights; anything else is hashed tensor by tensor."""
    commit = getattr(model.config, "_commit_hash", None)
    tensors = {} if commit else dict(model.named_parameters())
    settings = json.loads(model.config.to_json_string(use_diff=False))
    for key in ("transformers_version", "_name_or_path", "name_or_path"):
        settings.pop(key, None)
    label = {
        "source": [config.path, commit, config.gguf_file, str(model.dtype)],
        "tokenizer": [len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id],
        "config": settings,
        "tensors": list(tensors),
    }
    return tensor_digest(tensors.values(), label=label)
