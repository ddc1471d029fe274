"""The documentation says what the code does: its Python runs, its keys, defaults and floors are the real ones."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import load_script

from cushion import compose
from cushion.config import CorpusConfig, RunConfig
from cushion.errors import ConfigError
from cushion.reporting import figures

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cushion"
PURPOSE = "<purpose>"
"""How docs/config.md writes the four purposes of `data` at once."""

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def python_fences(name: str) -> list[str]:
    return [body for language, body in FENCE.findall(page(name)) if language == "python"]


def keys(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a configuration by its dotted name, with its default; the purposes of `data` as one."""
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if isinstance(value, CorpusConfig):
            name = f"data.{PURPOSE}"
        if dataclasses.is_dataclass(value):
            yield from keys(value, f"{name}.")
        else:
            yield name, value


DEFAULTS = dict(keys(RunConfig()))
GROUPS = {name.partition(".")[0] for name in DEFAULTS if "." in name}
PARTS = {name[: match.start()] for name in DEFAULTS for match in re.finditer(r"\.", name)} - GROUPS
"""What stands between a group and its keys, like `quantizer.weights`."""


def documented_keys() -> dict[str, str]:
    """The keys that the tables of docs/config.md have a row for, with the cell of the column `default`."""
    found = {}
    group, default_column = "", -1
    for line in page("docs/config.md").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("## "):
            named = re.fullmatch(r"## `(\w+)`", line)
            group, default_column = f"{named[1]}." if named else "", -1
        elif line.startswith("| key | "):
            default_column = cells.index("default")
        elif not line.startswith("|"):
            default_column = -1
        elif default_column >= 0 and (key := re.match(r"\| `([\w.<>]+)` \|", line)):
            found[group + key[1]] = cells[default_column]
    return found


def test_the_snippets_of_the_python_page_run(
    text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(text_file.parent)
    curves = {"activation_curves": figures.FIGURES["activation_curves"]}
    monkeypatch.setattr(figures, "FIGURES", {**dict.fromkeys(figures.FIGURES, lambda *_: None), **curves})
    names: dict[str, Any] = {"__name__": "docs"}
    fences = python_fences("docs/python.md")
    for number, fence in enumerate(fences, start=1):
        exec(compile(fence, f"docs/python.md, snippet {number}", "exec"), names)
    assert len(fences) > 5
    assert (names["folder"] / "figures" / "activation_curves.png").is_file()
    assert Path("results/cache").is_dir()  # the page says so of `paths.cache`
    assert names["result"].rows[-1].label in capsys.readouterr().out
    monkeypatch.chdir(names["folder"])  # the page on results draws the same figure from the file alone
    for fence in python_fences("docs/results.md"):
        exec(compile(fence, "docs/results.md", "exec"), names)
    assert Path("curves.png").read_bytes() == Path("figures/activation_curves.png").read_bytes()


def test_the_snippet_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = python_fences("README.md")
    exec(compile(snippet.replace("smollm2_135m", "tiny"), "README.md", "exec"), {"__name__": "readme"})
    without, with_prefix, text = capsys.readouterr().out.split("\n", 2)
    assert float(without) != float(with_prefix)
    assert "Once upon a time" in text


def test_the_tutorial_runs_on_the_random_model(
    text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(text_file.parent)
    names: dict[str, Any] = {"__name__": "tutorial"}
    cells = json.loads(page("docs/tutorial.ipynb"))["cells"]
    settings, *others = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for number, source in enumerate([settings.replace("# SETTINGS", "SETTINGS"), *others], start=1):
        exec(compile(source, f"docs/tutorial.ipynb, cell {number}", "exec"), names)
    assert names["tuned"].rows[-1].label in capsys.readouterr().out
    assert len(names["prefix"]) == 1


@pytest.mark.parametrize(
    ("target", "time"),
    [("quick", "a minute or two"), ("run", "5 to 7 minutes on 2 CPU cores with AVX512")],
)
def test_make_says_first_what_it_does_and_how_long_as_the_readme_does(target: str, time: str) -> None:
    (line,) = re.findall(rf"^make {target} .*$", page("README.md"), re.MULTILINE)
    assert time in line
    makefile = page("Makefile")
    (said,) = re.findall(rf"^{target}: installs (\w+) \$\(STAMP\)", makefile, re.MULTILINE)  # in this order
    recipes = dict(re.findall(r"^(\w+):\n((?:\t.*\n)+)", makefile, re.MULTILINE))
    words = " ".join(re.findall(r'^\t@echo "(.*)"$', recipes[said], re.MULTILINE)).replace("free ", "")
    assert time.lower() in words.lower()
    assert "the time is that of the download" in recipes["installs"]


def test_the_readme_is_short() -> None:
    assert len(page("README.md").splitlines()) <= 120


def slugs(path: Path) -> set[str]:
    """The anchors of a page: its headings as repositories and the site write them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("folder", [".", "docs", "docs/results", "experiments"])
def test_links_lead_somewhere(folder: str) -> None:
    """To a file, and to a heading of it; from a page of the site only to the site's own files."""
    broken, count = [], 0
    for path in (ROOT / folder).glob("*.md"):
        for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", path.read_text(encoding="utf-8"))):
            name, _, anchor = link.partition("#")
            target = path.parent / name if name else path
            outside = path.is_relative_to(ROOT / "docs") and not target.resolve().is_relative_to(ROOT / "docs")
            if "://" in link:
                continue
            count += 1
            if outside or not target.exists() or (anchor and anchor not in slugs(target)):
                broken.append(f"{path.name}: {link}")
    assert count and broken == []


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    listed = re.findall(r": ([\w/]+\.md)$", page("mkdocs.yml"), re.MULTILINE)
    pages = [path.relative_to(ROOT / "docs") for kind in ("*.md", "*.ipynb") for path in (ROOT / "docs").rglob(kind)]
    assert sorted(listed) == sorted(path.with_suffix(".md").as_posix() for path in pages)


def test_the_readme_names_every_model_and_no_option_that_there_is_not() -> None:
    tables = page("README.md").partition("## Models")[2]
    options = {group: {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")} for group in GROUPS}
    models, methods = (body.splitlines() for body in tables.split("## Methods"))
    named = {name for line in models for name in re.findall(r"`([\w.]+)`", line.split("|")[1] if "|" in line else "")}
    assert named == options["model"]
    for line in methods:
        group = ""
        for cell in re.findall(r"`([\w=*]+)`", line.split("|")[2] if line.startswith("|") else ""):
            before, _, option = cell.rpartition("=")
            group = before or group
            pattern = option.replace("*", r"\w+")
            assert [name for name in options[group] if re.search(rf"{pattern}$", name)], cell


def test_every_key_has_a_row_in_the_configuration_page() -> None:
    undescribed = {name for name in DEFAULTS if not name.endswith(".name")}
    assert {name for name in GROUPS if f"{name}.name" in DEFAULTS} == GROUPS - {"model", "paths"}
    assert "Every group but `model` has a key `name`" in page("docs/config.md")
    assert undescribed - set(documented_keys()) == set()
    assert set(documented_keys()) - set(DEFAULTS) == set()


def as_written(item: Any) -> str:
    """An entry of a list the way the command line takes it."""
    if not dataclasses.is_dataclass(item):
        return str(item)
    return f"{{{', '.join(f'{key}: {value}' for key, value in vars(item).items())}}}"


def test_the_defaults_in_the_configuration_page_are_those_of_the_schema() -> None:
    for name, cell in documented_keys().items():
        default, written = DEFAULTS[name], cell.partition(":")[0] if cell.startswith("null:") else cell.strip("`")
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            assert float(written) == default, name
        elif isinstance(default, list):
            assert written == f"[{', '.join(map(as_written, default))}]", name
        elif isinstance(default, dict):
            assert written == "{}" and not default, name
        else:
            assert written == {None: "null", True: "true", False: "false"}.get(default, default), name


def test_what_pages_take_from_the_code_is_what_it_says() -> None:
    reference = load_script("reference")
    pages = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md")}
    assert {name for name, text in pages.items() if "<!-- generated" in text} >= {
        "config.md",
        "method.md",
        "results.md",
    }
    stale = [name for name, text in pages.items() if reference.refreshed(text) != text]
    assert stale == [], "run: python scripts/reference.py"


def test_two_sections_of_one_title_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load_script("reference")
    monkeypatch.setattr(reference, "ROOT", tmp_path)
    (tmp_path / "package").mkdir()
    for name, title in (("a", "One"), ("b", "Two"), ("c", "Two")):
        (tmp_path / "package" / f"{name}.py").write_text(f'"""About.\n\n## {title}\n\nText of {name}.\n"""\n')
        if name == "b":
            assert reference.sections("package").count("## ") == 2
    with pytest.raises(AssertionError, match=r"package/c\.py: another module has the heading 'Two'"):
        reference.sections("package")


WRITTEN_BY_SCRIPTS = ("trouble.md", "report.md")
"""The pages that a script writes as a whole: scripts/trouble.py and cushion-report."""


def hand_written_words(path: Path) -> int:
    """The words of a page that somebody writes and somebody reads.

    Not counted are blocks of code, what scripts/reference.py takes from the code, and the rows of tables in which most
    cells hold a number.
    """
    count = 0
    for line in FENCE.sub("", load_script("reference").hand_written(path.read_text(encoding="utf-8"))).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        numbers = sum(bool(re.match(r"\W*\d", cell)) for cell in cells)
        if 2 * numbers < len(cells) or not cells:
            count += sum(any(letter.isalnum() for letter in word) for word in line.split())
    return count


def test_the_pages_have_at_most_15000_words_that_somebody_writes() -> None:
    pages = [path for path in (ROOT / "docs").rglob("*.md") if path.name not in WRITTEN_BY_SCRIPTS]
    words = {path.relative_to(ROOT).as_posix(): hand_written_words(path) for path in [*pages, ROOT / "README.md"]}
    assert sum(words.values()) <= 15000, words


def test_the_page_on_trouble_is_what_the_messages_in_the_code_say() -> None:
    assert page("docs/trouble.md") == load_script("trouble").page(), "run: python scripts/trouble.py"


@pytest.mark.parametrize(
    "overrides",
    [
        ("tuning=short", "search=none"),
        ("search=qfep", "search.method=qfeb"),
        ("reconstruction=scales", "quantizer=none"),
        ("quantizer=mxfp4", "reconstruction=scales"),
        ("model=hub",),
    ],
)
def test_the_page_on_trouble_has_the_message_and_the_way_out_of_an_error(overrides: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as raised:
        compose(*overrides)
    rows = re.findall(r"^\| `(.*)` \| (.*) \|$", page("docs/trouble.md").partition("## `ModelNotFoundError`")[0], re.M)
    templates = [f"{message}<>{way_out}" if way_out != "see the message" else message for message, way_out in rows]
    patterns = [".+".join(map(re.escape, re.split(r"`?<[^>]*>`?", template))) for template in templates]
    assert [pattern for pattern in patterns if re.match(pattern, str(raised.value))], str(raised.value)


PAGES = (
    "docs/config.md",
    "docs/data.md",
    "docs/execution.md",
    "docs/export.md",
    "docs/method.md",
    "docs/results.md",
    "docs/trouble.md",
    "README.md",
)
"""The pages that speak of keys of the configuration."""


@pytest.mark.parametrize("name", PAGES)
def test_no_page_names_a_key_that_there_is_not(name: str) -> None:
    text = page(name)
    code = [body for language, body in FENCE.findall(text) if language != "python"]
    code += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    pattern = rf"(?<![\w./-])((?:{'|'.join(GROUPS)})(?:\.(?:\w+|{PURPOSE}|\*))+)(?![\w(])"
    mentioned = {key for piece in code for key in re.findall(pattern, piece)}
    known = set(DEFAULTS) | PARTS | {f"{part}.*" for part in PARTS | GROUPS}
    for purpose in ("evaluation", "calibration", "tuning", "search"):
        known |= {key.replace(PURPOSE, purpose) for key in known}
    files = {key for key in mentioned if key.endswith((".json", ".md", ".py", ".yaml"))}
    assert mentioned, "the pattern finds no key at all"
    assert mentioned - files - known == set()
