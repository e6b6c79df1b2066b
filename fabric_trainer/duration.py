"""Lengths of time, as a user writes them and as a summary says them."""

from __future__ import annotations

import re

_NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
_UNITS = re.compile(rf"(?:{_NUMBER} ?d)? ?(?:{_NUMBER} ?h)? ?(?:{_NUMBER} ?m(?:in)?)? ?(?:{_NUMBER} ?s)?")
_CLOCK = re.compile(r"(?:([0-9]+):(?=[0-9]+:[0-9]+:))?([0-9]+):([0-5]?[0-9]):([0-5]?[0-9])")
_SECONDS = {"d": 86_400, "h": 3_600, "min": 60, "s": 1}


def seconds(text: str) -> float:
    """Of ``DD:HH:MM:SS``, ``HH:MM:SS``, ``90m`` or ``1d 12h 30m 10s``. Raises ValueError, with what would be right."""
    match = _UNITS.fullmatch(text.strip()) or _CLOCK.fullmatch(text.strip())
    parts = [float(part or 0) for part in match.groups()] if match else [0.0]
    total = sum(part * unit for part, unit in zip(parts, _SECONDS.values(), strict=False))
    if total <= 0 or (match and match.re is _CLOCK and match[1] and parts[1] >= 24):
        raise ValueError(f"must read like '02:12:00:00' (days first), '12:00:00', '90m' or '1d 12h', not {text!r}")
    return total


def spoken(length: float) -> str:
    """Such as "2 d 3 h" or "1 h 30 min", to the second."""
    rest, parts = round(length), []
    for unit, size in _SECONDS.items():
        count, rest = divmod(rest, size)
        parts += [f"{count} {unit}"] * (count > 0)
    return " ".join(parts) or "0 s"
