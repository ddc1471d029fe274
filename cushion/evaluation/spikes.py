"""Spike tokens behind the norm: whether they have become one constant vector there.

## Spike tokens behind the norm

With `eval.spike_texts`. InsertQuant (arXiv 2606.02288) says that a spike is the scalar intermediate of a vector bias:
normalised, spike tokens are one constant vector. For each block, a token spikes where its largest magnitude at the
input of the norm before attention is above `eval.spike_ratio` times the median over the tokens of its text
(PrefixQuant's criterion, at another place). The mean cosine between the outputs of the norm, over all pairs of spike
tokens of all texts, should then be near 1, and that between all other tokens well below it; identical tokens at the
start of every text, such as BOS, are the same vector in any case. The paper's thresholds are not known to us; the
criterion is ours. A prefix that takes the spikes over leaves fewer of them in the texts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cushion.activations import observe_inputs, observe_outputs
from cushion.artifacts import Workspace, read_json, write_json
from cushion.errors import ConfigError
from cushion.hashing import tensor_digest
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.step import Context, Step


@dataclass(frozen=True)
class Spikes:
    """By block, at the norm that reads its input; lists of one number per block.

    Args:
        counts: spike tokens per text, mean over the texts.
        cosines: mean cosine between the normalised spike tokens of all texts, over all pairs; None where fewer than two
            tokens spike.
        others: the same between all tokens that do not spike.

    """

    counts: list[float]
    cosines: list[float | None]
    others: list[float | None]


def input_norms(lm: LanguageModel) -> dict[str, str]:
    """By number of the block, the full name of the norm that reads its input.

    Raises:
        ConfigError: the model's blocks have no norm before their linears.

    """
    if not lm.architecture.smoothing:
        raise ConfigError(
            f"eval.spike_texts: the blocks of {lm.label} have no norm before their linears, behind which spike tokens "
            "could be compared: set eval.spike_texts=0"
        )
    norm = lm.architecture.smoothing[0][0]
    return {block: f"{lm.architecture.blocks}.{block}.{norm}" for block in lm.named_blocks}


class _Cosines:
    """The mean cosine over all pairs of vectors: with their unit vectors u_i, (||sum u_i||^2 - n) / (n (n - 1))."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | float = 0.0

    def add(self, vectors: Tensor) -> None:
        """More vectors, (vectors, features)."""
        units = functional.normalize(vectors.detach().float(), dim=-1).cpu().double()
        self.count += len(units)
        self._sum = self._sum + units.sum(0)

    @property
    def mean(self) -> float | None:
        """None for fewer than two vectors."""
        if self.count < 2:
            return None
        return (float(torch.as_tensor(self._sum).square().sum()) - self.count) / (self.count * (self.count - 1))


@torch.no_grad()
def spike_cosines(lm: LanguageModel, prefix: Prefix, texts: Tensor, ratio: float) -> Spikes:
    """Find the spike tokens at every block's input, and compare them behind its norm, on the model as it stands.

    A token spikes where its largest magnitude is above `ratio` times the median over the tokens of its text: the
    criterion of PrefixQuant (arXiv 2410.05265, section 4), here at the block's input. The prefix is not among the
    tokens.

    Args:
        texts: token ids, (texts, tokens).
        ratio: 1 or more.

    """
    names = input_norms(lm)
    norms = {block: lm.model.get_submodule(name) for block, name in names.items()}
    spiking, resting = ({block: _Cosines() for block in names} for _ in range(2))
    spikes: dict[str, Tensor] = {}

    def find(block: str, values: Tensor) -> None:
        largest = values.detach().flatten(0, -2).abs().amax(-1).float()
        spikes[block] = largest > ratio * largest.median()

    def compare(block: str, values: Tensor) -> None:
        tokens, spike = values.flatten(0, -2), spikes[block]
        spiking[block].add(tokens[spike])
        resting[block].add(tokens[~spike])

    for text in texts:
        with observe_inputs(norms, find), observe_outputs(norms, compare):
            lm.body(text[None], past_key_values=prefix.cache(lm.model), use_cache=True)
    return Spikes(
        [one.count / len(texts) for one in spiking.values()],
        [one.mean for one in spiking.values()],
        [one.mean for one in resting.values()],
    )


@dataclass(frozen=True, eq=False)
class SpikesStep(Step[Spikes]):
    """Spike tokens behind a prefix, on the full-precision model.

    Args:
        behind: the prefix.
        texts: token ids, (texts, tokens).
        ratio: above how many times the median a token spikes.
        title: how progress calls the prefix.

    """

    name = "spikes"
    """Files: `spikes.json`, with `eval.spike_texts`
    Key: `prefix`, `texts`, `ratio`
    Of that: above how many medians a token spikes
    """
    behind: Prefix
    texts: Tensor
    ratio: float
    title: str

    def key(self, context: Context) -> dict[str, Any]:
        """Prefix, texts and the ratio."""
        return {"prefix": self.behind.fingerprint, "ratio": self.ratio, "texts": tensor_digest([self.texts])}

    def make(self, context: Context, workspace: Workspace) -> None:
        """One pass."""
        context.progress(f"spike tokens, {self.title}", 0, 1, "pass")
        found = spike_cosines(context.lm, self.behind, self.texts, self.ratio)
        write_json(workspace.folder / "spikes.json", asdict(found))
        context.progress(f"spike tokens, {self.title}", 1, 1, "pass")

    def read(self, context: Context, folder: Path) -> Spikes:
        """Counts and cosines."""
        return Spikes(**read_json(folder / "spikes.json"))
