"""What a row is compared with: full precision with the very same prefix."""

from __future__ import annotations

from collections.abc import Callable

from cushion.ceilings import Ceiling, Ceilings
from cushion.metrics.columns import Measured
from cushion.models import LanguageModel
from cushion.prefix import Prefix


def test_a_ceiling_has_the_same_keys_and_values(tiny: Callable[..., LanguageModel]) -> None:
    found = Prefix.from_tokens(tiny().model, [65])
    keys = tuple(key * 1.5 for key in found.keys)
    tuned = Prefix(found.token_ids, keys, found.values, tuned=True)
    measured = Measured({}, {}, None, 1.0, 1.0, 1.0)
    ceilings = Ceilings()
    ceilings.add("none", Prefix.empty(), Ceiling("plain", measured))
    ceilings.add("found", found, Ceiling("with found", measured))

    def name_of(stage: str, prefix: Prefix) -> str | None:
        ceiling = ceilings.of(stage, prefix)
        return None if ceiling is None else ceiling.name

    assert (name_of("none", Prefix.empty()), name_of("found", found)) == ("plain", "with found")
    assert name_of("tuned", tuned) is None, "the tokens are the same, the keys are not"
    assert name_of("tuned", found) == "with found", "tuning that kept what was found"
    ceilings.add("tuned", found, Ceiling("with tuned", measured))
    assert [name_of(stage, found) for stage in ("found", "tuned")] == ["with found", "with tuned"]
