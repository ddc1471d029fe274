"""The shape of the code: which package may import which, and how long a file may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cushion"

RANKS = (
    {"errors", "events", "hashing", "launching", "activations", "flat", "results_v1", "intervals", "start", "float64"},
    {"processor"},
    {"syntax", "integrity", "swept", "system_errors"},
    {"artifacts", "code", "registry", "progress", "checks", "schema", "text_files"},
    {"metrics"},
    {"quantization/parts/base"},
    {"quantization/estimators/base", "quantization/formats/base"},
    {"quantization/estimators/registry", "quantization/formats/registry"},
    {"quantization/estimators/built_in", "quantization/formats/built_in"},
    {"quantization/parts"},
    {"quantization/quantizer"},
    {"config"},
    {"sources", "moving_names", "places"},
    {"models"},
    {"data", "chats", "prefix", "step"},
    {"blockwise", "held_out"},
    {"quantization/numerics"},
    {"quantization/linear"},
    {"quantization/formats"},
    {"execution"},
    {"quantization"},
    {"tuning_loss", "tuning_ranges", "tuning_state"},
    {"search", "tuning"},
    {"tuning_step"},
    {"evaluation"},
    {"row", "results", "ceilings"},
    {"preparation"},
    {"run_folder", "run_warnings", "steps", "config_reads"},
    {"config_warnings"},
    {"pipeline", "remade"},
    {"reporting", "final_numbers"},
    {"tracking"},
    {"export", "journal", "sweeps"},
    {"words"},
    {"cli"},
    {"preflight", "composition", "generate"},
    {"rerun", "__main__"},
)
"""The packages, and the modules that stand in none, from the ground up: each imports only from ranks below its own."""

LONGEST = 400
"""Lines of a file of code at most."""


def unit_of(module: str) -> str:
    """What a module, `quantization/linear`, is ranked as: itself, or the package nearest above it that has a rank."""
    named = [name for names in RANKS for name in names if module == name or module.startswith(f"{name}/")]
    assert named, f"{module} stands in no rank of tests/test_architecture.py"
    return max(named, key=len)


def rank_of(unit: str) -> int:
    ranks = [number for number, names in enumerate(RANKS) if unit in names]
    assert len(ranks) == 1, f"{unit} stands in {len(ranks)} ranks of tests/test_architecture.py, not in one"
    return ranks[0]


def imports(path: Path) -> Iterator[str]:
    """The modules of Cushion that a file imports, `quantization/linear`, what is imported for type checkers aside."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        names = []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            top, *parts = name.split(".")
            while top == "cushion" and parts:
                place = "/".join(parts)
                if (PACKAGE / place).is_dir() or (PACKAGE / f"{place}.py").is_file():
                    yield place
                    break
                parts.pop()


def test_a_package_imports_only_from_packages_below_it() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).with_suffix("").as_posix().removesuffix("/__init__")
        if module == "__init__":
            continue
        own = unit_of(module)
        for other in map(unit_of, imports(path)):
            if other != own and rank_of(other) >= rank_of(own):
                wrong.append(f"{path.relative_to(ROOT)} imports {other}, which does not stand below {own}")
    assert not wrong, "\n".join(wrong)


def test_every_rank_is_of_something_that_there_is() -> None:
    for name in set().union(*RANKS):
        assert (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file(), name


def test_no_file_of_code_is_longer_than_it_may_be() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for top in (PACKAGE, ROOT / "scripts")
        for path in top.rglob("*.py")
    }
    assert not {name: length for name, length in lengths.items() if length > LONGEST}
