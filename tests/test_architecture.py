"""The shape of the code: which package may import which, and how long a file may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cushion"

RANKS = (
    {"errors", "events", "hashing", "launching", "activations"},
    {"artifacts", "code", "registry", "progress"},
    {"config"},
    {"sources"},
    {"models"},
    {"data", "prefix", "step"},
    {"blockwise"},
    {"quantization"},
    {"search", "tuning"},
    {"config_warnings"},
    {"tuning_step"},
    {"evaluation"},
    {"row", "results"},
    {"preparation"},
    {"steps"},
    {"pipeline"},
    {"reporting"},
    {"tracking"},
    {"cli"},
    {"preflight"},
)
"""The packages, and the modules that stand in none, from the ground up: each imports only from ranks below its own."""

LONGEST = 400
"""Lines of a file of code at most."""
TOO_LONG = {"config.py", "pipeline.py", "evaluation/tasks.py"}
"""Files that are longer still; none may join them."""


def rank_of(name: str) -> int:
    ranks = [number for number, names in enumerate(RANKS) if name in names]
    assert len(ranks) == 1, f"{name} stands in {len(ranks)} ranks of tests/test_architecture.py, not in one"
    return ranks[0]


def imports(path: Path) -> Iterator[str]:
    """The packages and modules of Cushion that a file imports, by the first part of their names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "cushion" else [module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            inside = len(parts) > 1 and parts[0] == "cushion"
            if inside and ((PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file()):
                yield parts[1]


def test_a_package_imports_only_from_packages_below_it() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if own == "__init__":
            continue
        for other in imports(path):
            if other != own and rank_of(other) >= rank_of(own):
                wrong.append(f"{path.relative_to(ROOT)} imports {other}, which does not stand below {own}")
    assert not wrong, "\n".join(wrong)


def test_every_rank_is_of_something_that_there_is() -> None:
    for name in set().union(*RANKS):
        assert (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file(), name


def test_no_file_of_code_is_longer_than_it_may_be() -> None:
    lengths = {
        path.relative_to(PACKAGE).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    assert {name for name, length in lengths.items() if length > LONGEST} <= TOO_LONG
