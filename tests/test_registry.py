"""The registry: what is found without a list, what is refused, and plugins."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cushion.errors import ConfigError
from cushion.registry import Plugins, Registry, located

MODULE = "from cushion_test_things import THINGS\nTHINGS.register({name!r}, {name!r} + '!')\n"


@pytest.fixture
def things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[str]:
    """A registry whose own package holds `alpha` and `beta`, with what is installed in `tmp_path`."""
    package = tmp_path / "cushion_test_package"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("beta", "alpha"):
        (package / f"{name}.py").write_text(MODULE.format(name=name))
    (tmp_path / "cushion_test_things.py").write_text("THINGS = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    for module in [name for name in sys.modules if name.startswith("cushion_test_")]:
        monkeypatch.delitem(sys.modules, module)
    import cushion_test_things

    cushion_test_things.THINGS = Registry("thing", "cushion_test_package", Plugins())
    return cushion_test_things.THINGS


@pytest.fixture
def install(tmp_path: Path) -> Callable[[str, str, str], Path]:
    """`install("name", "module:attribute", text)`: a package with an entry point, and its only module."""

    def make(name: str, value: str, text: str) -> Path:
        module = tmp_path / f"{value.partition(':')[0]}.py"
        module.write_text(text)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[cushion.plugins]\n{name} = {value}\n")
        return module

    return make


Install = Callable[[str, str, str], Path]


def test_the_modules_of_the_package_are_found(things: Registry[str]) -> None:
    assert "cushion_test_package.alpha" not in sys.modules, "nothing is imported before it is asked for"
    assert list(things) == ["alpha", "beta"]
    assert (things["beta"], things.get("alpha"), things.get("gamma"), things.get(None)) == (
        "beta!",
        "alpha!",
        None,
        None,
    )
    assert "alpha" in things and "gamma" not in things and len(things) == 2


def test_an_unknown_name_is_refused_with_the_nearest(things: Registry[str]) -> None:
    with pytest.raises(ConfigError, match=r"thing='alhpa' is not allowed: choose one of alpha, beta; .*'alpha'"):
        things["alhpa"]


def test_a_name_is_given_once(things: Registry[str]) -> None:
    with pytest.raises(ConfigError, match=r"thing=beta is registered twice"):
        things.register("beta", "another")  # before the look-up that finds the package's own
        len(things)


def test_a_module_that_cannot_be_imported_is_no_secret(things: Registry[str], tmp_path: Path) -> None:
    (tmp_path / "cushion_test_package" / "broken.py").write_text("import cushion_test_missing\n")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="cushion_test_missing"):
            len(things)


def test_plugins_are_modules_and_functions(things: Registry[str], install: Install) -> None:
    install("first", "cushion_test_first", MODULE.format(name="first"))
    body = "from cushion_test_things import THINGS\ndef add():\n    THINGS.register('second', str(len(THINGS)))\n"
    install("second", "cushion_test_second:add", body)
    assert list(things)[:2] == ["alpha", "beta"]
    assert sorted(things) == ["alpha", "beta", "first", "second"]
    assert int(things["second"]) in (2, 3), "it was called once, and could look up what there was"
    assert len(things) == 4


def test_a_broken_plugin_is_named_every_time(things: Registry[str], install: Install) -> None:
    install("mine", "cushion_test_mine:add", "def add():\n    raise OSError('no disk')\n")
    for _ in range(2):
        message = r"the plugin mine = cushion_test_mine:add of mine cannot be loaded .*: OSError: no disk"
        with pytest.raises(ConfigError, match=message):
            things["alpha"]


def test_a_plugin_that_takes_a_name_is_named(things: Registry[str], install: Install) -> None:
    install("mine", "cushion_test_mine", MODULE.format(name="alpha"))
    with pytest.raises(ConfigError, match=r"the plugin mine = .*thing=alpha is registered twice"):
        len(things)


def test_the_version_of_a_plugin_is_that_of_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a module alone, or of a package with all its modules; not of its comments, and not of a later edit."""

    def versions(site: Path, constant: int, comment: str) -> list[str]:
        files = {
            "cushion_test_alone.py": f"# {comment}\nX = {constant}\n",
            "cushion_test_pack/inner.py": f'"""{comment}"""\n',
            "cushion_test_pack/other.py": f"# {comment}\nX = {constant}\n",
            "cushion_test_pack/template.py": "{{ not Python }}\n",
            "mine-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n",
            "mine-1.0.dist-info/entry_points.txt": (
                "[cushion.plugins]\n1 = cushion_test_alone\n2 = cushion_test_pack.inner\n"
            ),
        }
        for name, text in files.items():
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            (site / name).write_text(text)
        with monkeypatch.context() as patch:
            patch.syspath_prepend(site)
            for module in [name for name in sys.modules if name.startswith("cushion_test_")]:
                patch.delitem(sys.modules, module)
            plugins = Plugins()
            plugins.load()
            for name in ("cushion_test_alone.py", "cushion_test_pack/other.py"):
                (site / name).write_text("X = 100\n")
            found = plugins.versions()
        return [found["1 = cushion_test_alone"], found["2 = cushion_test_pack.inner"]]

    one = versions(tmp_path / "one", 1, "one")
    assert versions(tmp_path / "two", 1, "two") == one
    assert not set(versions(tmp_path / "three", 2, "one")) & set(one)


def test_a_place_is_a_module_and_its_attribute() -> None:
    assert located("cushion.registry:Registry") is Registry
    for place in ("cushion.registry:Registri", "cushion.registry"):
        with pytest.raises(ConfigError, match=f"'{place}' names nothing: it is written module:attribute"):
            located(place)


def test_a_misspelt_module_is_told_from_a_module_that_lacks_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, missing in (("cushion.registri:Registry", "cushion.registri"), ("cushon.registry:R", "cushon")):
        with pytest.raises(ConfigError, match=f"'{place}' names nothing: there is no module {missing}$"):
            located(place)
    (tmp_path / "half_installed.py").write_text("import not_installed_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_here"):
        located("half_installed:anything")
