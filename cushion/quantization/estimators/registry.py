"""The range estimators by name."""

from __future__ import annotations

from cushion.quantization.estimators.base import Estimator
from cushion.registry import PLUGINS, Registry

ESTIMATORS: Registry[Estimator] = Registry(
    "quantizer.activations.estimator", "cushion.quantization.estimators.built_in", PLUGINS
)


def register(estimator: Estimator) -> Estimator:
    """Make an estimator known under its name.

    Raises:
        ConfigError: there is one of this name.

    """
    return ESTIMATORS.register(estimator.name, estimator)
