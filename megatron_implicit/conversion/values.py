"""Values of a config.json that something is calculated from, or that decide what a model computes."""

from __future__ import annotations

from typing import Any, Optional

from megatron_implicit.errors import CheckpointError


def count(raw: dict[str, Any], key: str, source: str, default: Optional[int] = None) -> int:
    """A positive integer; the default, if there is one, where it is missing or null.

    Raises:
        CheckpointError: it is missing or something else; names folder and key.
    """
    value = _value(raw, key, source, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{source}: config.json has {key}={value!r}: it must be a positive integer")
    return value


def number(raw: dict[str, Any], key: str, source: str, default: Optional[float] = None) -> float:
    """As ``count``, any number."""
    value = _value(raw, key, source, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise CheckpointError(f"{source}: config.json has {key}={value!r}: it must be a number")
    return float(value)


def section(raw: dict[str, Any], key: str, source: str) -> dict[str, Any]:
    """An object in the object; empty where it is missing or null.

    Raises:
        CheckpointError: it is something else; names folder and key.
    """
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: config.json has {key}={value!r}: it must be an object")
    return value


def refuse_other(source: str, key: str, value: Any, only: Any) -> None:
    """Refuses a value that changes what a model computes.

    Raises:
        CheckpointError: it is not the one we build.
    """
    if value != only:
        raise CheckpointError(f"{source}: {key}={value} is not supported: only {only} is")


def _value(raw: dict[str, Any], key: str, source: str, default: Any) -> Any:
    value = default if raw.get(key) is None else raw[key]
    if value is None:
        raise CheckpointError(f"{source}: config.json lacks {key!r}")
    return value
