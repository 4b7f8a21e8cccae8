"""A step's settings, defined once as a dataclass: options of its command, and a table of the TOML file of a build."""

import argparse
import dataclasses
import difflib
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, TypeVar

Settings = TypeVar("Settings")

NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", tuple: "a list of texts"}


def setting(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    """Return a dataclass's field with a default (of type str, int, float, bool or tuple) and its line of help."""
    return field(default=default, metadata={"help": text, "choices": choices})


def run_command(step: str, text: str, settings: type, run: Callable[[Any, Path], Any]) -> None:
    """Do a step in the folder and with the settings that the command line says; a user's mistake ends with exit code 1.

    Args:
        text: what `--help` says.
    """
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=f"python -m data.zh.{step}", description=text, formatter_class=layout)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the data set")
    add_options(parser, settings)
    arguments = parser.parse_args()
    try:
        run(from_arguments(settings, arguments), arguments.work)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; the same command goes on where this one stopped")


def add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """Add an option for each field: `max_cost` is `--max-cost`; a tuple's may be repeated; a bool's takes no value."""
    for one in dataclasses.fields(settings):
        kind, text = type(one.default), one.metadata["help"].replace("%", "%%")
        name = "--" + one.name.replace("_", "-")
        if kind is bool:
            parser.add_argument(name, action="store_true", help=text)
        elif kind is tuple:
            parser.add_argument(name, action="append", default=[], metavar="TEXT", help=f"{text}; may be repeated")
        else:
            shown = f"{text} (default {one.default})" if one.default else text
            choices = one.metadata["choices"] or None
            metavar = None if choices else {str: "TEXT", int: "N", float: "X"}[kind]
            parser.add_argument(name, type=kind, default=one.default, choices=choices, metavar=metavar, help=shown)


def from_arguments(settings: type[Settings], arguments: argparse.Namespace) -> Settings:
    """Return the settings that a command's options say. Raises: as `make_settings`."""
    values = {one.name: getattr(arguments, one.name) for one in dataclasses.fields(typing.cast(Any, settings))}
    return make_settings(settings, values, "options")


def make_settings(settings: type[Settings], table: Mapping[str, Any], where: str) -> Settings:
    """Return settings made of a TOML table. Raises: ValueError for unknown keys, wrong types and impossible values."""
    fields = {one.name: one for one in dataclasses.fields(typing.cast(Any, settings))}
    values = {}
    for key, value in table.items():
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(fields)}"
            raise ValueError(f"{where}: unknown key '{key}', {hint}")
        kind, given = type(fields[key].default), value
        if kind is tuple and isinstance(value, list) and all(isinstance(item, str) for item in value):
            given = tuple(value)
        elif kind is float and type(value) is int:
            given = float(value)
        if type(given) is not kind:
            raise ValueError(f"{where}: {key} = {value!r}, expected {NAMES[kind]}")
        choices = fields[key].metadata["choices"]
        if choices and given not in choices:
            raise ValueError(f"{where}: {key} = {value!r}, expected one of {', '.join(choices)}")
        values[key] = given
    try:
        return settings(**values)
    except ValueError as error:  # of the dataclass's own check
        raise ValueError(f"{where}: {error}") from error
