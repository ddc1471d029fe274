"""The greedy search as cached steps: one for each step of Algorithm 1, and the search that they make up.

What the argmin of a step is depends on neither tau nor the maximal length, so searches that differ in those share their
steps. Only a search with a budget is one step as a whole: how far it gets depends on all that went before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cushion.artifacts import Workspace, read_json, write_json
from cushion.config import SearchConfig
from cushion.hashing import digest, tensor_digest
from cushion.prefix import Prefix
from cushion.quantization.text_errors import error_identity
from cushion.search.greedy import greedy_search
from cushion.search.greedy_state import Scored, SearchState, SearchStep
from cushion.search.proposals import Proposal
from cushion.search.rounds import rounds_of
from cushion.step import Context, Step, compute


def argmin_identity(config: SearchConfig) -> dict[str, Any]:
    """What of a search's configuration decides which candidate of a step is best, and what it is recorded to cost."""
    with_grid = config.objective == "quantization_error"
    return {
        "objective": config.objective,
        "grid": error_identity(config) if with_grid else None,
        "scoring": config.scoring,
        "rounds": [asdict(item) for item in config.rounds] if config.scoring != "full" else None,
        "rounds_dtype": config.rounds_dtype if rounds_of(config) else None,
        "verify_candidates": config.verify_candidates if config.verify_texts else None,
        "batch_size": config.batch_size,
    }


def report(context: Context, event: Scored) -> None:
    """Pass on how far a step of the search is."""
    stage = f"search step {event.step + 1}"
    if event.stages > 1:
        stage += f", round {event.stage + 1} of {event.stages}"
    context.progress(stage, event.done, event.total, "candidate")


@dataclass(frozen=True, eq=False)
class GreedyStep(Step[SearchStep]):
    """One step of Algorithm 1 without a budget: the best next token behind a prompt.

    Args:
        config: objective and scoring.
        text: token ids, (tokens,).
        candidates: token ids that are tried.
        prompt: the tokens so far.
        before: the steps that ended with this prompt; of them only the number matters.
        further: the texts that the best candidates are judged on too, (texts, tokens); there may be none.

    """

    name = "search_step"
    """Files: `search_step.json`: one step of a greedy search without a budget
    Key: `prompt`, `candidates`, `text`, `further`, `config.objective`, `config.grid`, `config.scoring`,
        `config.rounds`, `config.rounds_dtype`, `config.verify_candidates`, `config.batch_size`
    Of that: the further texts, and how many candidates are judged on them where there are some; the grid for L_q
        only; the rounds unless `search.scoring=full`, the dtype of the rounds where there are some
    """
    config: SearchConfig
    text: Tensor
    candidates: list[int]
    prompt: list[int]
    before: list[SearchStep]
    further: Tensor

    def key(self, context: Context) -> dict[str, Any]:
        """Prompt, candidates, texts, objective and scoring."""
        return {
            "prompt": self.prompt,
            "candidates": digest(self.candidates),
            "text": tensor_digest([self.text]),
            "further": tensor_digest([self.further]),
            "config": argmin_identity(self.config),
        }

    def make(self, context: Context, workspace: Workspace) -> None:
        """Find the argmin: a search whose tau accepts it if it is no worse than the prompt, and then ends."""
        saved = workspace.checkpoint.load()
        state = SearchState(list(self.prompt)) if saved is None else SearchState.from_dict(saved[0])
        state.steps = list(self.before)
        state.rounds_dtype = state.rounds_dtype or next((step.rounds_dtype for step in self.before), None)
        config = replace(self.config, tau=1.0, max_length=len(self.prompt) + 1)
        texts = self.text.expand(len(self.before) + 1, -1)
        for event in greedy_search(context.lm, config, texts, self.candidates, state, self.further):
            if isinstance(event, Scored):
                report(context, event)
                if workspace.checkpoint.due():
                    workspace.checkpoint.save(state.to_dict())
            else:
                write_json(workspace.folder / "search_step.json", asdict(event))

    def read(self, context: Context, folder: Path) -> SearchStep:
        """The record of the step; whether it is accepted is not for this step to say."""
        return SearchStep.from_dict(read_json(folder / "search_step.json"))


@dataclass(frozen=True, eq=False)
class GreedySearch(Step[tuple[SearchState, Prefix]]):
    """The whole greedy search: its record, and the prefix found (empty where nothing was).

    Args:
        config: all of the search.
        texts: one fresh text per step, token ids, (steps, tokens).
        proposal: the candidates.
        start: the start of the prompt.
        further: the texts that the best candidates of every step are judged on too, (texts, tokens); there may be none.

    """

    name = "search"
    """Files: `search.json`, and `prefix.*` where a prefix was found
    Key: `start`, `candidates`, `texts`, `further`, `config.objective`, `config.grid`, `config.scoring`,
        `config.rounds`, `config.rounds_dtype`, `config.verify_candidates`, `config.batch_size`, `config.tau`,
        `config.max_length`, `budget`
    Of that: as of `search_step`; with a budget also the budget, what the proposal spent of it, and `replicas` with
        `budget_seconds`
    """
    config: SearchConfig
    texts: Tensor
    proposal: Proposal
    start: list[int]
    further: Tensor

    @property
    def has_budget(self) -> bool:
        """Whether the search ends when it has run so many tokens, or taken so long."""
        return self.config.budget_token_forwards is not None or self.config.budget_seconds is not None

    def key(self, context: Context) -> dict[str, Any]:
        """All of the search; what decides how far a budget reaches only where there is one."""
        config, budget = self.config, None
        if self.has_budget:
            replicas = config.replicas if config.budget_seconds is not None else None
            spent = [self.proposal.token_forwards, config.proposal]
            budget = [config.budget_token_forwards, config.budget_seconds, replicas, *spent]
        return {
            "start": self.start,
            "candidates": digest(self.proposal.token_ids),
            "texts": tensor_digest([self.texts]),
            "further": tensor_digest([self.further]),
            "config": {**argmin_identity(config), "tau": config.tau, "max_length": config.max_length},
            "budget": budget,
        }

    def make(self, context: Context, workspace: Workspace) -> None:
        """Run Algorithm 1; the prefix is stored to the bit, so that what depends on it finds it on any machine."""
        saved = workspace.checkpoint.load()
        if saved is None:
            state = SearchState(
                list(self.start),
                proposal_token_forwards=self.proposal.token_forwards,
                proposal_seconds=self.proposal.seconds,
            )
        else:
            state = SearchState.from_dict(saved[0])
        events: Iterator[Scored | SearchStep] = self._step_by_step(context, state)
        if self.has_budget:
            events = greedy_search(context.lm, self.config, self.texts, self.proposal.token_ids, state, self.further)
        for event in events:
            if isinstance(event, Scored):
                report(context, event)
                if workspace.checkpoint.due():
                    workspace.checkpoint.save(state.to_dict())
            else:
                context.log_series("search", [step.point() for step in state.steps])
                workspace.checkpoint.save(state.to_dict())
        write_json(workspace.folder / "search.json", state.to_dict())
        if state.token_ids:
            Prefix.from_tokens(context.lm.model, state.token_ids).save(workspace.folder / "prefix")

    def read(self, context: Context, folder: Path) -> tuple[SearchState, Prefix]:
        """The record and the prefix. What the proposal cost is this run's own."""
        state = SearchState.from_dict(read_json(folder / "search.json"))
        state.proposal_token_forwards = self.proposal.token_forwards
        state.proposal_seconds = self.proposal.seconds
        found = Prefix.load(folder / "prefix") if state.token_ids else Prefix.empty()
        return state, found

    def tell(self, context: Context, outcome: tuple[SearchState, Prefix]) -> None:
        """The objectives by step."""
        context.log_series("search", [step.point() for step in outcome[0].steps])

    def _step_by_step(self, context: Context, state: SearchState) -> Iterator[SearchStep]:
        """Algorithm 1 over steps of their own."""
        longest = self.config.max_length
        while not state.finished and len(state.token_ids) < longest:
            number, prompt, before = len(state.steps), list(state.token_ids), list(state.steps)
            one = GreedyStep(self.config, self.texts[number], self.proposal.token_ids, prompt, before, self.further)
            step = compute(one, context)
            accepted = step.is_accepted(self.config.tau)
            step = replace(step, step=number, accepted=accepted)
            state.steps.append(step)
            state.rounds_dtype = step.rounds_dtype
            if accepted:
                state.token_ids.append(step.token_id)
            else:
                state.finished, state.stop_reason = True, "tau"
            yield step
        if not state.finished:
            state.finished, state.stop_reason = True, "max_length"
