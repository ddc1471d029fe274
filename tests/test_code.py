"""Versions of code: what changes them, what does not, and that they are those of the code that runs."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import cushion.search.greedy_prefix
import cushion.search.rule_prefix
import cushion.steps  # noqa: F401 - with the two above, every step is defined
from cushion import code
from cushion.code import INFRASTRUCTURE
from cushion.quantization.formats.registry import FORMATS
from cushion.step import Step
from cushion.syntax import Sources

PACKAGE = Path(code.__file__).parent


def written(folder: Path, **modules: str) -> Sources:
    """A package `p` of these modules; `a__b` stands for the module `a.b`."""
    package = folder / "p"
    for name, text in {"__init__": "", **modules}.items():
        path = package / f"{name.replace('__', '/') if name != '__init__' else name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent != package and not (path.parent / "__init__.py").exists():
            (path.parent / "__init__.py").write_text("")
        path.write_text(text)
    return Sources("p", [package])


def every_step(kind: type[Step] = Step) -> dict[str, type[Step]]:
    found = {}
    for step in kind.__subclasses__():
        found |= every_step(step)
        if hasattr(step, "name"):
            found[step.name] = step
    return found


def closures(sources: Sources) -> dict[str, set[str]]:
    return {name: sources.closure(step.__module__, INFRASTRUCTURE) for name, step in every_step().items()}


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ("# a comment\nX = 1\n", True),
        ('"""Another docstring."""\nX = 1\n\n"""Of an attribute."""\n', True),
        ("X    =   (1)\n", True),
        ("X = 2\n", False),
        ("X = 1\nY = 2\n", False),
    ],
)
def test_comments_docstrings_and_layout_change_no_hash(tmp_path: Path, changed: str, same: bool) -> None:
    before = written(tmp_path / "a", m='"""A docstring."""\nX = 1\n').hash_of("p.m")
    assert (written(tmp_path / "b", m=changed).hash_of("p.m") == before) == same


def test_a_docstring_of_a_function_is_left_out_and_a_string_that_is_used_is_not(tmp_path: Path) -> None:
    hashes = [
        written(tmp_path / str(number), m=f"def f():\n    {first}\n    return {value!r}\n").hash_of("p.m")
        for number, (first, value) in enumerate([('"""One."""', "x"), ('"""Two."""', "x"), ('"""One."""', "y")])
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_closure_has_what_is_imported_directly_through_others_and_inside_of_functions(tmp_path: Path) -> None:
    sources = written(
        tmp_path,
        step="from p.middle import x\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import p.types\n",
        middle="def f():\n    from p import late\n",
        late="from .sub.inner import y\nNAMED = {'a': 'p.named:Thing', 'b': 'p:nothing here'}\n",
        named="",
        sub__inner="import os\nfrom p import infrastructure\n",
        infrastructure="import p.behind\n",
        behind="",
        types="",
        other="",
    )
    found = sources.closure("p.step", frozenset({"p.infrastructure"}))
    assert found == {"p", "p.step", "p.middle", "p.late", "p.named", "p.sub", "p.sub.inner"}


def test_what_is_left_out_of_versions_exists_and_every_step_has_a_version() -> None:
    assert set(code._OWN.modules) >= INFRASTRUCTURE
    steps = every_step()
    assert {"search", "search_step", "proposal", "qfep", "prefixquant", "calibration", "tuning", "activations",
            "activation_map", "attention", "perplexity", "tasks", "inputs", "alpha"} <= set(steps)  # fmt: skip
    for name, step in steps.items():
        assert step.version == code.version_of(step.__module__), name


@pytest.mark.parametrize(
    ("module", "with_it", "without_it"),
    [
        ("cushion.quantization.hadamard", {"calibration", "perplexity", "tuning", "inputs"}, {"search", "attention"}),
        ("cushion.search.rounds", {"search", "search_step", "proposal"}, {"calibration", "perplexity", "qfep"}),
        ("cushion.search.scan", {"qfep", "prefixquant"}, {"search", "perplexity", "tuning"}),
        ("cushion.quantization.numerics", {"search_step", "perplexity", "activations"}, {"attention", "qfep"}),
        ("cushion.evaluation.harness", {"tasks"}, {"perplexity", "alpha", "search"}),
        ("cushion.models.language_model", set(every_step()), set()),
        ("cushion.prefix", set(every_step()), set()),
        ("cushion.config", set(), set(every_step())),
        ("cushion.tuning", {"tuning"}, set(every_step()) - {"tuning"}),
        ("cushion.steps", set(), set(every_step())),
    ],
)
def test_a_constant_in_a_module_changes_the_steps_that_import_it_and_no_other(
    module: str, with_it: set[str], without_it: set[str]
) -> None:
    reached = {name for name, closure in closures(code._OWN).items() if module in closure}
    assert with_it <= reached
    assert not without_it & reached


@pytest.mark.parametrize(
    ("module", "of"),
    [
        ("floats", {"fp8_e4m3", "fp8_e5m2", "mxfp8", "mxfp6", "mxfp4", "nvfp4"}),
        ("blocks", {"mxfp8", "mxfp6", "mxfp4", "nvfp4"}),
        ("microscaling", {"mxfp8", "mxfp6", "mxfp4"}),
        ("nvfp4", {"nvfp4"}),
        ("registry", set()),
    ],
)
def test_a_number_format_counts_with_all_that_it_is_made_of(
    monkeypatch: pytest.MonkeyPatch, module: str, of: set[str]
) -> None:
    monkeypatch.setattr(code, "version_of", code.version_of.__wrapped__)
    before, own = {name: FORMATS[name].identity() for name in FORMATS}, code._OWN.hash_of
    edited = f"cushion.quantization.formats.{module}"
    monkeypatch.setattr(code._OWN, "hash_of", lambda name: "edited" if name == edited else own(name))
    assert {name for name in FORMATS if FORMATS[name].identity() != before[name]} == of


def test_the_rule_of_mx_scales_is_part_of_what_a_format_is() -> None:
    own = FORMATS["mxfp4"]
    assert replace(own, shared_exponent="floor").identity() != own.identity()


def test_code_that_changes_on_disk_labels_nothing_that_ran_before(tmp_path: Path) -> None:
    """In a process of its own, over a copy of some modules: the version asked for after an edit is the old one."""
    name = "cushion.quantization.numerics"
    for module in code._OWN.closure(code.__name__, frozenset()) | code._OWN.closure(name, INFRASTRUCTURE):
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None
        source = Path(spec.origin)
        target = tmp_path / "cushion" / source.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    edit = (
        "numerics = Path(code.__file__).parent / 'quantization' / 'numerics.py'\n"
        "numerics.write_text(numerics.read_text() + '\\nNEW = 1\\n')\n"
    )

    def printed(before: str) -> list[str]:
        script = (
            f"from pathlib import Path\nfrom cushion import code\n{before}"
            f"print(code.version_of('{name}'), code.package_version())\n"
        )
        command = [sys.executable, "-c", script]
        return subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True).stdout.split()  # fmt: skip # noqa: E501

    unedited, first, second = printed(""), printed(edit), printed("")
    assert first == unedited
    assert first[0] == code.version_of(name)
    assert second[0] != first[0], "the next process sees the edit"
    assert second[1] != first[1]


def test_a_step_of_a_users_package_counts_its_own_modules_and_those_of_cushion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str, constant: int) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").write_text("")
        (folder / "constants.py").write_text(f"X = {constant}\n")
        (folder / "step.py").write_text("from cushion.search.scan import ratios\nfrom . import constants\n")
        importlib.import_module(name)
        return code.version_of(f"{name}.step")

    monkeypatch.syspath_prepend(str(tmp_path))
    assert version("users_one", 1) != version("users_two", 2)
    names = code._sources("users_one").closure("users_one.step", INFRASTRUCTURE)
    assert names == {"users_one", "users_one.step", "users_one.constants"}
    assert "cushion.search.scan" in code._sources("users_one").imports("users_one.step", code._OWN)
