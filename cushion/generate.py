"""The command `cushion-generate`: text as the model of a finished run's row goes on with it, behind its prefix."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cushion
from cushion import system_errors
from cushion.errors import ConfigError, did_you_mean
from cushion.events import Event, Progress
from cushion.export.finished import FinishedRun
from cushion.progress import ProgressBars
from cushion.schema import FILE_NAME, NO_PREFIX

if TYPE_CHECKING:
    from torch import Tensor

    from cushion.models import LanguageModel
    from cushion.prefix import Prefix
    from cushion.quantization.lazily import QuantizedLazily

FULL_PRECISION = {"name": "full_precision", "label": "full precision", "stage": NO_PREFIX, "quantized": False}
"""The row that every run can be asked for, measured or not."""

SMALLEST_TEMPERATURE = 1e-4
"""Below it, logits over the temperature can be too large for a floating-point number."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        new_tokens: how many at most, at least 1.
        temperature: 0 chooses the most probable token; above it, tokens are drawn from softmax(logits / temperature).
        seed: of the draws.

    Raises:
        ConfigError: a number is out of range.

    """

    new_tokens: int = 100
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.new_tokens < 1:
            raise ConfigError(f"--max-new-tokens={self.new_tokens} is not allowed: it must be at least 1")
        if not (self.temperature == 0 or SMALLEST_TEMPERATURE <= self.temperature < math.inf):
            raise ConfigError(
                f"--temperature={self.temperature} is not allowed: 0 for the most probable token, or a number from "
                f"{SMALLEST_TEMPERATURE} on"
            )
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed={self.seed} is not allowed: it must be from 0 to 2^63 - 1")


def generate(model: QuantizedLazily, tokens: Tensor, sampling: Sampling, streamer: Any = None) -> list[int]:
    """The tokens that a row's model puts behind a text, until it ends the text or has given enough.

    Args:
        model: with its prefix and quantizer; on leaving, the model is as it was before.
        tokens: token ids of the text without the prefix, (1, tokens), at least one.
        sampling: how they are chosen. Of the model's own settings only the tokens that end a text are used.
        streamer: is given each token as it comes, as transformers' `generate` does.

    Raises:
        ConfigError: prefix, text and new tokens do not fit the model's context.

    """
    import torch

    lm, prefix = model.lm, model.behind
    check_room(lm, prefix, tokens, sampling)
    choice: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        choice = {"do_sample": True, "temperature": sampling.temperature, "top_p": 1.0, "top_k": 0}
    torch.manual_seed(sampling.seed)
    with model, prefix.kept(lm.model), _plain_settings(lm), torch.no_grad():
        model.put_on()
        inputs = prefix.prepend({"input_ids": tokens.to(lm.device)})
        generator: Any = lm.model
        output = generator.generate(
            **inputs,
            **choice,
            past_key_values=prefix.cache(lm.model),
            max_new_tokens=sampling.new_tokens,
            streamer=streamer,
        )
    new: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return new


@contextmanager
def _plain_settings(lm: LanguageModel) -> Iterator[None]:
    """Within the block, of the model's settings of generation only the tokens that end a text hold."""
    from transformers import GenerationConfig

    model: Any = lm.model
    own = model.generation_config
    padding = lm.tokenizer.eos_token_id  # nothing is padded: transformers warns without one
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=padding)
    try:
        yield
    finally:
        model.generation_config = own


def check_room(lm: LanguageModel, prefix: Prefix, tokens: Tensor, sampling: Sampling) -> None:
    """Raise `ConfigError` where prefix, text, (1, tokens), and new tokens do not fit the model's context."""
    needed = len(prefix) + tokens.shape[1] + sampling.new_tokens
    if lm.context_length is not None and needed > lm.context_length:
        raise ConfigError(
            f"--max-new-tokens={sampling.new_tokens} behind {len(prefix)} tokens of prefix and {tokens.shape[1]} of "
            f"text needs {needed} positions, but {lm.label} has {lm.context_length}: ask for fewer, or shorten the text"
        )


def prompt_tokens(lm: LanguageModel, text: str, chat: bool, bos: bool) -> Tensor:
    """Token ids of a prompt, (1, tokens), as the run has its texts.

    Args:
        chat: take the text for what a user says, in the tokenizer's chat template.
        bos: put BOS in front, unless the text begins with it.

    Raises:
        CushionError: there is no token at all, or no chat template.

    """
    from cushion.chats import chat_text

    if chat and not lm.tokenizer.chat_template:
        raise ConfigError(f"--chat: the tokenizer of {lm.label} has no chat template: leave --chat out")
    if chat:
        text = chat_text(lm, [{"role": "user", "content": text}], asks=True)
    tokens = lm.encode(text)[None]
    if bos and tokens[0, :1].tolist() != [lm.bos_token_id]:  # a chat template may write it
        tokens = lm.with_bos(tokens)
    if tokens.shape[1] == 0:
        raise ConfigError("PROMPT='' gives the model nothing to go on from: write at least one word")
    return tokens


def find_row(run: FinishedRun, wanted: str | None) -> dict[str, Any]:
    """A row of a run by its name or its label; the last one where none is named.

    Raises:
        ConfigError: there is none; the message names those there are.

    """
    rows: list[dict[str, Any]] = run.record["rows"]
    if wanted is None:
        return rows[-1]
    for row in (*rows, FULL_PRECISION):
        if wanted in (row["name"], row["label"]):
            return row
    names = list(dict.fromkeys([*(row["name"] for row in rows), FULL_PRECISION["name"]]))
    raise ConfigError(f"--row={wanted!r} is not a row of this run: choose one of {', '.join(names)}"
                      f"{did_you_mean(wanted, names)}")  # fmt: skip


def told(bars: ProgressBars) -> Callable[[Event], None]:
    """A listener that says of each stage that it is computed anew, and shows how far it is."""
    known: set[str] = set()

    def listen(event: Event) -> None:
        if isinstance(event, Progress) and event.stage not in known:
            known.add(event.stage)
            bars.close()
            print(f"cushion-generate: {event.stage}: not in the cache, computed anew", file=sys.stderr, flush=True)
        bars(event)

    return listen


def stream(
    run: FinishedRun, rows: list[dict[str, Any]], prompt: str, chat: bool, sampling: Sampling, device: str | None
) -> None:
    """Print what the model of every row makes of a prompt, one after another, as it comes.

    The label of a row stands before its text: on standard error where there is but one.

    Raises:
        CushionError: a model cannot be made again, or the prompt does not fit it.

    """
    from transformers import TextStreamer

    from cushion.prefix import Prefix
    from cushion.remade import RemadeRun

    final = run.prefix() if run.record["prefix"] else Prefix.empty()
    with ProgressBars() as bars:
        remade = RemadeRun(run.folder, run.record, final, told(bars), device, measures=False)
        lm = remade.prepared.lm
        tokens = prompt_tokens(lm, prompt, chat, remade.prepared.bos)
        for row in rows:  # before any of them says a word
            check_room(lm, remade.prefix(row["stage"]), tokens, sampling)
        for row in rows:
            model = remade.model(row)
            print(f"[{row['label']}]", file=sys.stdout if len(rows) > 1 else sys.stderr, flush=True)
            generate(model, tokens, sampling, TextStreamer(lm.tokenizer, skip_prompt=True, skip_special_tokens=True))


_ELSEWHERE = "if it is in the run's outputs, copy the run's folder and the cache to another place and name that as RUN"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command `cushion-generate`."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    given = _parser().parse_args(arguments)
    try:
        sampling = Sampling(given.max_new_tokens, given.temperature, given.seed)
        folder = given.run.parent if given.run.name == FILE_NAME else given.run
        prompt = _prompt(given.prompt)
        run = FinishedRun.read(folder)
        rows = [FULL_PRECISION] * given.beside + [find_row(run, name) for name in given.row or [None]]
        stream(run, rows, prompt, given.chat, sampling, given.device)
    except system_errors.MENDABLE as error:
        system_errors.end("cushion-generate", error, _ELSEWHERE)


def _prompt(given: str) -> str:
    """The text of PROMPT, which `-` reads from standard input.

    Raises:
        ConfigError: it is not UTF-8.

    """
    try:
        text = sys.stdin.read().removesuffix("\n") if given == "-" else given
        text.encode()
    except UnicodeError as error:
        raise ConfigError(f"PROMPT is not UTF-8 text ({error}): iconv -t UTF-8 makes it such") from error
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cushion-generate",
        description="Stream text from the model of a finished run's row, behind its prefix.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {cushion.__version__}")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run, or its result.json")
    parser.add_argument("prompt", metavar="PROMPT", help="the text to go on from; - reads it from standard input")
    parser.add_argument(
        "--row",
        action="append",
        metavar="NAME",
        help="which row of the run, by its name or label in result.json, several times for several rows; the last row "
        "if left out. full_precision is there in every run",
    )
    parser.add_argument("--beside", action="store_true", help="full precision without a prefix first, then the row")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="at most so many tokens (100)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 for the most probable token (default), or draw"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (0)")
    parser.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:<number>, if not the run's own")
    return parser


if __name__ == "__main__":
    main()
