"""The options of ``run`` and ``chat`` that set fields of :class:`SamplingParams`, made from one table."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import click

from llama_export.runtime.sampling_params import SAMPLING_FLAGS, SamplingParams, flag_of

Command = Callable[..., None]


def sampling_options(command: Literal["run", "chat"]) -> Callable[[Command], Command]:
    """Adds the options of a command, in the order of the table. Each is passed by the name of its field.

    Args:
        command: ``run`` has every option, and the defaults of the fields. ``chat`` has those with ``chat_default``; one that
            is not given is None.
    """
    hints = typing.get_type_hints(SamplingParams)
    fields = {field.name: field for field in dataclasses.fields(SamplingParams)}
    options = []
    for name, flag in SAMPLING_FLAGS.items():
        settings: dict[str, Any] = {"metavar": flag.metavar, "help": flag.help, **_kind(hints[name])}
        if flag.least is not None:
            settings["type"] = click.IntRange(flag.least)
        default = flag.run_default
        if command == "chat":
            if flag.chat_default is None:
                continue
            default = flag.chat_default
        elif fields[name].default not in (dataclasses.MISSING, None, ()):
            settings["default"] = fields[name].default
        if default is not None:
            settings["help"] += f"  [default: {default}]"
        options.append(click.option(flag_of(name), name, **settings))

    def add(function: Command) -> Command:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def _kind(hint: Any) -> dict[str, Any]:
    """Click's settings for a field of this type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool:
        return {"is_flag": True}
    if origin is Mapping:
        return {"type": str, "multiple": True}
    if origin is Sequence:
        return {"type": arguments[0], "multiple": True}
    return {"type": float if hint is float else int}  # int, or int | None
