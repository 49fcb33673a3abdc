"""From a YAML file and dotted overrides to a resolved, validated configuration, and back to YAML.

jsonargparse does the parsing: unknown keys and wrong types are rejected with their path. Two things are added here:
overrides always win over the file, wherever they stand on the command line, and an error is one line with a
suggestion.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import typing
from pathlib import Path
from typing import Any, NoReturn, Sequence

import jsonargparse
import yaml

from megatron_implicit.config.files import read_config_file
from megatron_implicit.config.resolve import resolve
from megatron_implicit.config.schema import Config, PhaseConfig
from megatron_implicit.config.validate import validate
from megatron_implicit.errors import ConfigError

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


class _Parser(jsonargparse.ArgumentParser):
    """A parser whose errors are exceptions with one line of text."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigError(_one_line(message))


def load_config(arguments: Sequence[str], *, prog: str | None = None, base: str | Path | None = None) -> Config:
    """Parses ``--config FILE`` and dotted overrides (``--parallel.tensor 2``) into a resolved configuration.

    Args:
        arguments: the command line without the program's name.
        prog: program name in ``--help``.
        base: a YAML file whose values the arguments override; the checkpoint's, for a resumed run.

    Raises:
        ConfigError: unknown key, wrong type, missing file or impossible combination, in one line with the remedy.
    """
    return _finish(_parse(arguments, prog, base))


def peek_run_dir(arguments: Sequence[str], prog: str | None = None) -> str:
    """``run.dir`` of a command line, before anything else of it is judged.

    Raises:
        ConfigError: the arguments cannot be parsed.
    """
    return _parse(arguments, prog, None).run.dir


def _parse(arguments: Sequence[str], prog: str | None, base: str | Path | None) -> Any:
    parser = _build_parser(prog)
    ordered = _file_first(arguments)
    saved = None if base is None else read_config_file(base)
    if saved is not None:
        ordered = ["--config", str(base), *ordered]
    parsed = parser.instantiate(parser.parse_args(ordered))
    if saved is not None:
        _derive_length_again(parsed.train, saved.get("train", {}))
        _derive_stages_again(parsed.parallel, saved.get("parallel", {}))
    return parsed


def _derive_length_again(train: Any, saved: dict[str, Any]) -> None:
    """A resolved file has both steps and tokens: where the arguments change one, the other is derived from it."""
    steps, tokens = saved.get("steps"), saved.get("tokens")
    if train.steps != steps and train.tokens == tokens:
        train.tokens = None
    elif train.tokens != tokens and train.steps == steps:
        train.steps = None


def _derive_stages_again(parallel: Any, saved: dict[str, Any]) -> None:
    """On another number of stages, what was derived from it is derived again, unless the arguments say otherwise."""
    if parallel.pipeline == saved.get("pipeline"):
        return
    for name in ("layers_per_stage", "microbatches_in_flight"):
        if getattr(parallel, name) == saved.get(name):
            setattr(parallel, name, None)


def config_from_dict(values: dict[str, Any]) -> Config:
    """A resolved, validated configuration from nested dictionaries, as ``config.yaml`` holds them.

    Raises:
        ConfigError: as :func:`load_config`.
    """
    parser = _build_parser(None)
    return _finish(parser.instantiate(parser.parse_object(values)))


def config_to_dict(config: Config) -> dict[str, Any]:
    """Nested plain dictionaries with every field."""
    return dataclasses.asdict(config)


def config_to_yaml(config: Config) -> str:
    """``config`` as YAML, keys in the schema's order, without what concerns one job and not the run."""
    values = config_to_dict(config)
    for section, name in JOB_KEYS:
        values[section][name] = None
    return yaml.safe_dump(values, sort_keys=False)


def save_config(config: Config, path: str | Path) -> None:
    """Writes ``config_to_yaml``; whoever reads the file meanwhile finds all of the old one or all of the new one."""
    partial = Path(f"{path}.partial")
    partial.write_text(config_to_yaml(config), encoding="utf-8")
    os.replace(partial, path)


JOB_KEYS = (("train", "stop_after_steps"), ("run", "time_limit_minutes"), ("debug", "inject"))
"""Keys that a resumed run does not inherit."""


def _finish(namespace: Any) -> Config:
    values = {f.name: getattr(namespace, f.name) for f in dataclasses.fields(Config)}
    config = resolve(Config(**values))
    validate(config)
    return config


def _build_parser(prog: str | None) -> _Parser:
    parser = _Parser(
        prog=prog,
        description="Pretrain an implicit or explicit language model; --dry-run only says what it would cost.",
        exit_on_error=True,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    for field in dataclasses.fields(Config):
        if field.name == "curriculum":
            parser.add_argument("--curriculum", type=_field_type(field.name), default=[], help="list of phases (YAML)")
        else:
            parser.add_class_arguments(_field_type(field.name), field.name)
    return parser


def _field_type(name: str) -> Any:
    return typing.get_type_hints(Config)[name]


def _file_first(arguments: Sequence[str]) -> list[str]:
    """Moves ``--config FILE`` to the front, so that overrides win wherever they stand."""
    rest, first = list(arguments), []
    for index, argument in enumerate(rest):
        if argument == "--config" or argument.startswith("--config="):
            width = 1 if "=" in argument else 2
            first = rest[index : index + width]
            path = first[-1].removeprefix("--config=")
            if width == 2 and len(first) < 2:
                raise ConfigError("--config needs a YAML file, for example launch/configs/implicit_mamba2_tiny.yaml")
            if not Path(path).is_file():
                raise ConfigError(f"--config {path}: no such file; the presets are in launch/configs/")
            read_config_file(path)  # jsonargparse's own errors do not name the file
            return first + rest[:index] + rest[index + width :]
    return rest


def _known_keys() -> list[str]:
    keys = ["curriculum"]
    for field in dataclasses.fields(Config):
        if field.name != "curriculum":
            keys += [f"{field.name}.{inner.name}" for inner in dataclasses.fields(_field_type(field.name))]
    return keys


def _one_line(message: str) -> str:
    """jsonargparse's message without its layout: the key, the value and what would be accepted."""
    text = " ".join(message.split())
    unknown = re.search(r"(?:[Uu]nrecognized arguments?:|[Kk]ey|[Oo]ption) *['\"]?(?:--)?([A-Za-z_][\w.]*)", text)
    if unknown and unknown.group(1) not in _known_keys():
        return f"unknown configuration key '{unknown.group(1)}'{_suggestion(unknown.group(1))}"
    value = re.search(r"(?:Given value:|Got value:) *(.*)$", text)
    if unknown and value:
        return f"{unknown.group(1)}={value.group(1)} is not valid: expected {_expectation(text)}"
    return text


def _suggestion(key: str) -> str:
    """': did you mean ...?' for the key that has these initials, or looks most alike by its whole path or last part."""
    if meant := _by_initials(key):
        return f": did you mean '{meant}'?"
    names = {known: known for known in _known_keys()}
    names |= {known.rsplit(".", 1)[-1]: known for known in _known_keys()}
    names |= {
        field.name: f"curriculum[].{field.name}" for field in dataclasses.fields(PhaseConfig) if field.name not in names
    }
    near = difflib.get_close_matches(key, list(names), n=1, cutoff=0.5)
    return f": did you mean '{names[near[0]]}'?" if near else "; --help lists the keys"


def _by_initials(key: str) -> str | None:
    """The known key that 'lr' or 'optim.lr' stands for, if possible of the same section."""
    section, _, short = key.rpartition(".")
    keys = [known for known in _known_keys() if _initials(known) == short]
    if len(short) < 2 or not keys:
        return None
    return next((known for known in keys if known.startswith(section)), keys[0])


def _initials(key: str) -> str:
    return "".join(word[0] for word in key.rsplit(".", 1)[-1].split("_"))


def _expectation(text: str) -> str:
    literal = re.search(r"Literal\[([^\]]*)\]", text)
    if literal:
        return "one of " + literal.group(1).replace("'", "")
    types = re.findall(r"Expected a <class '(\w+)'>", text) or re.findall(r"<class '(\w+)'>", text)
    words = {
        "int": "an integer",
        "float": "a number",
        "str": "text",
        "bool": "true or false",
        "NoneType": "null",
        "list": "a list",
    }
    return " or ".join(dict.fromkeys(words.get(name, name) for name in types)) or "another type"
