"""A model that gets its quantizer when something has to be computed on it, and not before."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from cushion.config import QuantizerConfig
from cushion.execution.registry import SIMULATED
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.calibration import Calibration
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.identity import quantizer_identity
from cushion.quantization.learned import Learned
from cushion.quantization.replacements import Replacements


@dataclass(eq=False)
class QuantizedLazily:
    """A prefix and a quantizer, or none, as the rows of a table have them.

    A context manager: on leaving, the model is as it was before.

    Args:
        lm: the model, in full precision.
        behind: the prefix.
        quantizer: None for full precision.
        calibration: statistics behind this prefix, where the quantizer needs them.
        keep: the linears whose input stays in full precision, where the quantizer uses QFeM.
        execution: how quantized linears are computed.
        learned: ranges and weights that were learned for this prefix and quantizer, if any.

    """

    lm: LanguageModel
    behind: Prefix
    quantizer: QuantizerConfig | None = None
    calibration: Calibration | None = None
    keep: frozenset[str] = frozenset()
    execution: str = SIMULATED
    learned: Learned | None = None
    _stack: ExitStack = field(default_factory=ExitStack, repr=False)
    _replacements: Replacements = field(default_factory=Replacements, repr=False)
    _is_on: bool = False

    def __enter__(self) -> QuantizedLazily:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.take_off()

    @property
    def fitted(self) -> FittedQuantizer:
        """The quantizer with all that was measured and learned for it; there must be one."""
        assert self.quantizer is not None
        return FittedQuantizer.of(self.quantizer, self.calibration, self.keep, self.learned)

    def put_on(self) -> None:
        """Put the quantizer on the model, unless it is there already."""
        if self.quantizer is not None and not self._is_on:
            on = self.fitted.on(self.lm, execution=self.execution, replacements=self._replacements)
            self._stack.enter_context(on)
            self._is_on = True

    def take_off(self) -> None:
        """Leave the model as it was before, until `put_on` is called again."""
        self._is_on = False
        self._stack.close()

    def suspended(self) -> AbstractContextManager[None]:
        """Full-precision linears for the length of a `with` block, behind rotation and smoothing."""
        return self._replacements.suspended()

    def identity(self) -> dict[str, Any]:
        """What of prefix and quantizer decides an outcome."""
        quantizer = None
        if self.quantizer is not None:
            quantizer = quantizer_identity(self.quantizer, self.calibration, self.keep, self.execution, self.learned)
        return {"prefix": self.behind.fingerprint, "quantizer": quantizer}
