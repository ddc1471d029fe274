"""Which tokens a search step tries: the whole vocabulary, or some of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cushion.artifacts import Workspace, read_json, write_json
from cushion.config import SearchConfig
from cushion.hashing import tensor_digest
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.text_errors import error_identity
from cushion.search.objective import Objective
from cushion.search.rounds import spike_sizes
from cushion.step import Context, Step


@dataclass(frozen=True)
class Proposal:
    """The candidates of a search, as distinct token ids, and what it cost to name them."""

    token_ids: list[int]
    token_forwards: int = 0
    seconds: float = 0.0


def propose(
    lm: LanguageModel, config: SearchConfig, count_tokens: Callable[[], Tensor], texts: Tensor, seed: int
) -> Proposal:
    """The candidates of a search: ascending, but for the user's own order. Only `outlier` runs the model.

    `vocabulary` is all of them, as in Algorithm 1. The others have at most `config.candidates` tokens: `frequent` the
    most frequent ones of the search text; `outlier` those that spike most in the search texts; `sampled` all special
    tokens, the `config.frequent` most frequent ones, and a seeded draw of the others. `user` is `config.user_tokens`.

    Args:
        count_tokens: called where it is needed, gives the occurrences of each token in the search text, shape
            (vocabulary,).
        texts: the texts of the search steps, shape (steps, tokens).

    Raises:
        ConfigError: a token of the user's is outside the vocabulary.

    """
    if config.proposal == "outlier":
        return _propose_outliers(lm, config, texts)
    return Proposal(_name_tokens(lm, config, count_tokens, seed))


def _name_tokens(lm: LanguageModel, config: SearchConfig, count_tokens: Callable[[], Tensor], seed: int) -> list[int]:
    size = lm.vocabulary_size
    if config.proposal == "user":
        tokens = list(dict.fromkeys(config.user_tokens or []))
        lm.check_token_ids(tokens, "search.user_tokens")
        return tokens
    if config.proposal == "vocabulary" or (config.proposal == "sampled" and config.candidates >= size):
        return list(range(size))
    token_counts = count_tokens()
    wanted = config.candidates if config.proposal == "frequent" else config.frequent
    ranked = torch.argsort(token_counts, descending=True, stable=True)[:wanted]
    frequent = ranked[token_counts[ranked] > 0].tolist()
    if config.proposal == "frequent":
        return sorted(frequent)
    special = [token for token in sorted(set(lm.tokenizer.all_special_ids)) if token < size]
    chosen = list(dict.fromkeys(special + frequent))[: config.candidates]
    generator = torch.Generator().manual_seed(seed)
    known = set(chosen)
    others = (token for token in torch.randperm(size, generator=generator).tolist() if token not in known)
    while len(chosen) < config.candidates:
        chosen.append(next(others))
    return sorted(chosen)


def _propose_outliers(lm: LanguageModel, config: SearchConfig, texts: Tensor) -> Proposal:
    """The tokens of the search texts by their largest spike behind one token from the middle of the vocabulary.

    Something has to stand in front: a text's first token spikes whatever it is.
    """
    started = time.perf_counter()
    objective = Objective(config)
    largest: dict[int, float] = {}
    for text in texts:
        spikes, _ = spike_sizes(objective, lm, Prefix.empty(), text, [lm.vocabulary_size // 2])
        for token, spike in zip(text.tolist(), spikes.tolist(), strict=True):
            if token < lm.vocabulary_size:
                largest[token] = max(spike, largest.get(token, 0.0))
    ranked = sorted(largest, key=lambda token: (-largest[token], token))
    tokens = sorted(ranked[: config.candidates])
    return Proposal(tokens, texts.numel() + len(texts), time.perf_counter() - started)


@dataclass(frozen=True, eq=False)
class OutlierProposal(Step[Proposal]):
    """The candidates of `search.proposal=outlier` as a cached step, since the model is run to name them.

    Args:
        config: the search.
        texts: the texts of the search steps, (steps, tokens).

    """

    name = "proposal"
    """Files: `proposal.json`, with `search.proposal=outlier`
    Key: `candidates`, `objective`, `texts`
    Of that: `search.candidates`; the objective with its grid
    """
    config: SearchConfig
    texts: Tensor

    def key(self, context: Context) -> dict[str, Any]:
        """How many candidates, what they are ranked by, and the texts."""
        return {
            "candidates": self.config.candidates,
            "objective": [self.config.objective, error_identity(self.config)],
            "texts": tensor_digest([self.texts]),
        }

    def make(self, context: Context, workspace: Workspace) -> None:
        """Rank the tokens of the texts."""
        context.progress("outlier tokens", 0, 1, "pass")
        proposal = _propose_outliers(context.lm, self.config, self.texts)
        write_json(workspace.folder / "proposal.json", asdict(proposal))
        context.progress("outlier tokens", 1, 1, "pass")

    def read(self, context: Context, folder: Path) -> Proposal:
        """The candidates."""
        return Proposal(**read_json(folder / "proposal.json"))
