"""Kinds of things that have names, and what there is of each: an addition is a module that registers itself.

The modules of a kind's own package are found by looking into it; a user's package adds its own through the entry-point
group `cushion.plugins`. What is registered is a light declaration: torch is imported by what it names, when it is used.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, ItemsView, Iterator, Mapping
from importlib.metadata import entry_points
from threading import RLock
from typing import Any, Generic, TypeVar

from cushion.errors import ConfigError, did_you_mean
from cushion.hashing import digest
from cushion.syntax import Sources, source_of

GROUP = "cushion.plugins"
"""The entry points that are loaded: modules that register things, or functions without arguments that do."""

Item = TypeVar("Item")


class Plugins:
    """The entry points of the group, each loaded once."""

    def __init__(self) -> None:
        self._modules: dict[str, str] = {}
        self._sources: dict[str, Sources] = {}
        self._broken: ConfigError | None = None
        self._are_loaded = False

    def load(self) -> None:
        """Let every plugin register what it has.

        Raises:
            ConfigError: one of them cannot be loaded; the message names it. Every later call raises it again.

        """
        if self._broken is not None:
            raise self._broken
        if self._are_loaded:  # to ask the system again takes as long as the rest of naming a run's folder
            return
        for point in entry_points(group=GROUP):
            name = f"{point.name} = {point.value}"
            if name not in self._modules:
                self._modules[name] = point.module  # what it looks up while it is loaded finds the ones before it
                try:
                    loaded = point.load()
                    if callable(loaded):
                        loaded()
                    self._sources[name] = _source(point.module)  # now: an edit later on is not what was loaded
                except Exception as error:
                    package = f" of {point.dist.name}" if point.dist is not None else ""
                    self._broken = ConfigError(
                        f"the plugin {name}{package} cannot be loaded (mend or uninstall it): "
                        f"{type(error).__name__}: {error}"
                    )
                    raise self._broken from error
        self._are_loaded = True

    def versions(self) -> dict[str, str]:
        """By plugin, a hash of the code of its module, or of all of its package's, as it was loaded."""
        self.load()
        return {
            name: digest([[module, source.hash_of(module)] for module in source.modules])
            for name, source in self._sources.items()
        }


def _source(module: str) -> Sources:
    package = module.partition(".")[0]
    source = source_of(package)
    if source is None:
        raise ConfigError(f"the source of {package} cannot be found, so nothing could tell when it changes")
    return source


class Registry(Generic[Item]):
    """What there is of one kind, by name, in the order of registration: Cushion's own first.

    Args:
        key: the configuration key whose values the names are.
        package: every module of this package is imported before the first look-up.
        plugins: loaded after it.

    """

    def __init__(self, key: str, package: str, plugins: Plugins) -> None:
        self.key, self._package, self._plugins = key, package, plugins
        self._items: dict[str, Item] = {}
        self._lock, self._is_complete = RLock(), False
        self._broken: BaseException | None = None

    def register(self, name: str, item: Item) -> Item:
        """Add an item.

        Raises:
            ConfigError: there is one of this name.

        """
        if name in self._items:
            raise ConfigError(f"{self.key}={name} is registered twice: give one of the two another name")
        self._items[name] = item
        return item

    def __getitem__(self, name: str) -> Item:
        """The item of this name.

        Raises:
            ConfigError: there is none; the message names all that there are, and the nearest.

        """
        items = self._all()
        if name not in items:
            allowed = f"choose one of {', '.join(items)}{did_you_mean(name, items)}"
            raise ConfigError(f"{self.key}={name!r} is not allowed: {allowed}")
        return items[name]

    def get(self, name: object) -> Item | None:
        """The item of this name, or None."""
        return self._all().get(str(name))

    def __contains__(self, name: object) -> bool:
        return name in self._all()

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def items(self) -> ItemsView[str, Item]:
        """All names with their items."""
        return self._all().items()

    def _all(self) -> dict[str, Item]:
        with self._lock:
            if self._broken is not None:
                raise self._broken
            if not self._is_complete:
                self._is_complete = True  # what is imported here may look up names itself
                try:
                    package = importlib.import_module(self._package)
                    for module in pkgutil.iter_modules(package.__path__, f"{self._package}."):
                        importlib.import_module(module.name)
                    self._plugins.load()
                except BaseException as error:  # a second try would find half of it registered
                    self._broken = error
                    raise
            return self._items


def located(place: str) -> Any:
    """What `module:attribute` names; its module is imported now.

    Raises:
        ConfigError: there is no such module, or it has no such attribute.

    """
    module, _, attribute = place.partition(":")
    if not module or not attribute:
        raise ConfigError(f"{place!r} names nothing: it is written module:attribute")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and what it imports itself is not
        raise ConfigError(f"{place!r} names nothing: there is no module {error.name}") from error
    if found is None:
        raise ConfigError(f"{place!r} names nothing: it is written module:attribute")
    return found


def imported_when_used(module: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module whose names stand elsewhere: by name `module:attribute`."""

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return located(places[name])

    return find


PLUGINS = Plugins()
SEARCH_METHODS: Registry[Any] = Registry("search.method", "cushion.search.built_in", PLUGINS)
"""The ways of finding a prefix; `cushion.search.methods` says what one is."""
EXECUTIONS: Registry[str] = Registry("execution", "cushion.execution.built_in", PLUGINS)
"""How quantized linears are computed: `module:class` of a `cushion.execution.base.Execution`."""
