"""Representations of dataclasses without their defaults."""

import dataclasses
from typing import Any


def concise(x: Any) -> str:
    """Return the expression that makes a dataclass, without arguments at defaults."""
    arguments = []
    for field in dataclasses.fields(x):
        value, default = getattr(x, field.name), field.default
        if default is dataclasses.MISSING and callable(field.default_factory):
            default = field.default_factory()
        if value != default:
            arguments.append(f"{field.name}={value!r}")
    return f"{type(x).__name__}({', '.join(arguments)})"
