"""`cushion rerun RESULT_OR_FOLDER [overrides]`: a run again, from the configuration that its folder keeps.

The configuration becomes the overrides that compose it (`overrides_of`), and then the command `cushion` is given these
and the user's own: everything that it does, sweeps too, is done in the same way.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import cushion
from cushion import cli
from cushion.composition import compose_raw
from cushion.config import RunConfig, to_dict
from cushion.errors import ArtifactError, ConfigError
from cushion.journal import CONFIG
from cushion.reporting.collect import read_result
from cushion.schema import FILE_NAME, SCHEMA_VERSION
from cushion.words import quoted

USAGE = f"""cushion rerun RESULT_OR_FOLDER [overrides]

Does a run again, from the configuration in its {FILE_NAME} (or {CONFIG}, where it was killed before it had a result).
RESULT_OR_FOLDER is that file or the run's folder; overrides are those of cushion and change the configuration.

  cushion rerun outputs/main/smollm2-135m/per_tensor_static-greedy_pruned-short/0123456789ab
  cushion rerun RESULT seed=1                      the same with another seed
  cushion rerun RESULT -m search.tau=0.3,0.5,0.7   a sweep around it
  cushion rerun RESULT paths.output_dir=again      computed again: a finished run is not done twice in one place
"""

_GROUPS = ("data", "quantizer", "search", "tuning", "reconstruction", "eval", "tracking")
"""The groups whose options have their own name in the configuration."""


def main(words: Sequence[str] | None = None) -> None:
    """Do what `cushion rerun` is asked for with these words behind it."""
    words = sys.argv[2:] if words is None else list(words)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        sys.exit(0 if words else 2)
    try:
        place, given = words[0], list(words[1:])
        config = recorded(Path(place))
        with tempfile.TemporaryDirectory() as folder:
            overrides = without(overrides_of(config, Path(folder)), given)
            sys.argv = ["cushion", *command(overrides, given)]
            print(f"cushion rerun: {shlex.join(sys.argv)}", file=sys.stderr, flush=True)
            cli.main()
    except (ArtifactError, ConfigError, OSError) as error:
        cli.report(error)
        sys.exit(1)


def command(overrides: Sequence[str], given: Sequence[str]) -> list[str]:
    """The words of the command: options stand before all overrides, since Hydra takes those in one row only."""
    own = [word for word in given if not word.startswith("-") and ("=" in word or word.startswith("~"))]
    options = [word for word in given if word not in own]
    if options and options[-1] in ("--info", "-i"):  # it would take the first override for what it is to print
        options.append("all")
    return [*options, *overrides, *own]


def recorded(place: Path) -> RunConfig:
    """The configuration that a run's folder or result.json keeps; says what of it is of another version.

    Raises:
        ArtifactError: there is none, or it is damaged or of a schema version that is not known.
        ConfigError: it holds what the schema does not have any more.

    """
    path = place / FILE_NAME if place.is_dir() else place
    kept = place / CONFIG if place.is_dir() else place.with_name(CONFIG)
    if path.is_file():
        result = read_result(path)
        _tell_differences(path, result)
        return RunConfig.from_dict(result["config"])
    if kept.is_file():
        try:
            return RunConfig.from_dict(yaml.safe_load(kept.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ArtifactError(
                f"{kept} is damaged ({' '.join(str(error).split())}): give the run's command"
            ) from error
    raise ArtifactError(
        f"{place} holds no {FILE_NAME} and no {CONFIG}: name the folder of one run, or its {FILE_NAME} "
        "(cushion-status outputs lists the runs)"
    )


def _tell_differences(path: Path, result: dict[str, Any]) -> None:
    """Say on standard error where this is not what the result was made with: numbers may differ."""
    written = json.loads(path.read_text(encoding="utf-8"))["schema_version"]
    notes = [] if written == SCHEMA_VERSION else [f"schema version {written}, here {SCHEMA_VERSION}"]
    made = result["environment"]
    packages = made.get("packages") or {}
    here = {"cushion": cushion.__version__, **{name: version(name) for name in ("torch", "transformers")}}
    for name, now in here.items():
        then = made.get("cushion") if name == "cushion" else packages.get(name)
        if then is not None and then != now:
            notes.append(f"{name} {then}, here {now}")
    if notes:
        print(f"cushion rerun: {path} was made with {'; '.join(notes)}", file=sys.stderr)


# ---- a configuration as overrides -----------------------------------------------------------------------------------


def overrides_of(config: RunConfig, folder: Path | None = None) -> list[str]:
    """The overrides of the command `cushion` that compose a configuration, as few as there need be.

    Args:
        config: what they shall compose.
        folder: where a file may be written for an experiment that is not one of the shipped ones; without it, its
            name is left out.

    Raises:
        ConfigError: no overrides compose it.

    """
    words = [*_experiment(config, folder), *_options(config)]
    made: dict[int, tuple[DictConfig, dict[str, Any]]] = {}

    def composed() -> tuple[DictConfig, dict[str, Any]]:
        if len(words) not in made:  # words are only added
            made[len(words)] = compose_raw(words)
        return made[len(words)]

    try:
        _, params = composed()  # what the experiment sweeps has one value here, also if that is the default
        groups = {word.partition("=")[0] for word in words}
        pinned = [key for key in params if key not in groups and key not in (*_GROUPS, "model")]
        words += [f"{key}={text_of(_value(config, key))}" for key in pinned]
        for follows in (False, True):  # what an interpolation takes from another key may be right when that one is
            words += _differences(config, composed()[0], follows)
        _check(config, composed()[0], folder)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"this configuration cannot be given as overrides: {cli.one_line(error)}") from error
    return words


def without(words: Sequence[str], given: Sequence[str]) -> list[str]:
    """Those words that further ones leave standing: what these set or choose (a group as a whole) goes."""

    def key(word: str) -> str:
        return word.partition("=")[0].lstrip("+~")

    named = {key(word) for word in given if "=" in word or word.startswith("~")}
    groups = {name for name in named if (cli.config_folder() / name).is_dir()}
    if {"-m", "--multirun"} & set(given):
        named.add("hydra.mode")
    if "experiment" in groups:
        named |= {"hydra.mode", "hydra.searchpath"}
    return [word for word in words if key(word) not in named and key(word).partition(".")[0] not in groups]


def _experiment(config: RunConfig, folder: Path | None) -> list[str]:
    """What gives a run the experiment's name: it is a group too, so nothing but an option's file can."""
    name = config.experiment
    if name == RunConfig().experiment:
        return []
    shipped = cli.config_folder() / "experiment" / f"{name}.yaml"
    if shipped.is_file():
        return [f"experiment={name}", "hydra.mode=RUN"]
    if folder is None:
        return []
    path = folder / "experiment" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"# @package _global_\nexperiment: {name}\n", encoding="utf-8")
    return [f"hydra.searchpath=[{text_of(f'file://{folder}')}]", f"experiment={name}"]


def _options(config: RunConfig) -> Iterator[str]:
    """Every group's option of the configuration's own name, where one is shipped."""
    place = cli.config_folder()
    paths = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))["path"] for path in place.glob("model/*.yaml")}
    models = {path: name for name, path in sorted(paths.items(), reverse=True)}
    yield f"model={models.get(config.model.path, 'hub')}"
    for group in _GROUPS:
        name = getattr(config, group).name
        if (place / group / f"{name}.yaml").is_file():
            yield f"{group}={name}"


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config[name] if isinstance(config, dict) else getattr(config, name)
    return config


def _differences(config: RunConfig, node: DictConfig, follows: bool) -> list[str]:
    """The override of each value that a composed configuration has otherwise; where it interpolates only if asked."""
    found: list[str] = []

    def look(wanted: Any, there: DictConfig, above: str) -> None:
        for name in (field.name for field in fields(wanted)):
            key, value = f"{above}{name}", getattr(wanted, name)
            if key == "experiment" or (not follows and OmegaConf.is_interpolation(there, name)):
                continue
            below = None if OmegaConf.is_missing(there, name) else there[name]
            if is_dataclass(value) and isinstance(below, DictConfig):
                look(value, below, f"{key}.")
            elif OmegaConf.is_missing(there, name) or _plain(below) != _plain(value):
                if isinstance(below, DictConfig) and isinstance(value, dict):  # free keys: one adds to those there are
                    found.extend(f"~{key}.{gone}" for gone in map(str, below) if gone not in value)
                    found.append(f"++{key}={text_of(value)}")
                else:
                    found.append(f"{key}={text_of(value)}")

    look(config, node, "")
    return found


def _plain(value: Any) -> Any:
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True)
    if isinstance(value, list):
        return [to_dict(item) if is_dataclass(item) else item for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return to_dict(value) if is_dataclass(value) else value


def _check(config: RunConfig, node: DictConfig, folder: Path | None) -> None:
    """Refuse what was composed if it is not the configuration."""
    made, wanted = to_dict(cli.to_run_config(node)), to_dict(config)
    if folder is None:
        made["experiment"] = wanted["experiment"]
    if made != wanted:
        wrong = [key for key in wanted if made[key] != wanted[key]]
        raise ConfigError(f"this configuration cannot be given as overrides: they do not set {', '.join(wrong)}")


_BARE = re.compile(r"[A-Za-z_][\w./-]*|/[\w./-]+", re.ASCII)
"""Text that needs no quotes, but for what would be read as a word of YAML."""
_WORDS = ("null", "true", "false", "inf", "nan")


def text_of(value: Any) -> str:
    """A value as Hydra's overrides write it."""
    value = _plain(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(text_of, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{text_of(key)}:{text_of(item)}" for key, item in value.items()) + "}"
    if not isinstance(value, str):
        return repr(value)
    if _BARE.fullmatch(value) and value.lower() not in _WORDS:
        return value
    return quoted(value)
