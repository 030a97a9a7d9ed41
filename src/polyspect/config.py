"""Settings from plain values (YAML, JSON, the command line) into the frozen dataclasses that declare them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .errors import ConfigError, nearest_names


def build_config(cls: type[Any], values: Mapping[str, Any]) -> Any:
    """An instance of the dataclass `cls` from plain values (as YAML gives them), checked field by field.

    Raises:
        ConfigError: unknown field (names the nearest), one that follows from others, or a value of the wrong type or
            out of range.
    """
    fields = {field.name for field in dataclasses.fields(cls)}
    for key in values:
        if isinstance(derived := getattr(cls, key, None), property):
            meaning = " ".join((derived.__doc__ or "").split()).rstrip(".")
            raise ConfigError(f"`{key}` of {cls.__name__} is no setting, it follows from the others: {meaning}")
        if key not in fields:
            raise ConfigError(f"unknown setting '{key}' of {cls.__name__}: {nearest_names(key, fields)}")
    from jsonargparse import ArgumentError, ArgumentParser, Namespace

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "config")
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    try:
        parsed = parser.instantiate(parser.parse_object(Namespace(config=plain).as_dict()))
    except ArgumentError as error:
        raise ConfigError(f"bad setting of {cls.__name__}: {' '.join(str(error).split())}") from None
    return parsed.config
