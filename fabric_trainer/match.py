"""Parameters by patterns of their names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from fabric_trainer.errors import InputError


def matching(patterns: Sequence[str], names: Iterable[str], key: str) -> list[str]:
    """The names that a pattern meets, in their own order: ``head`` and ``head.*`` meet all of that module's, ``*.bias``
    every bias. Raises InputError, naming ``key`` and near names, for a pattern that meets none."""
    names = list(names)
    met = {pattern: {name for name in names if _meets(pattern, name)} for pattern in patterns}
    for pattern, found in met.items():
        if not found:
            places = dict.fromkeys(place for name in names for place in _places(name))
            near = difflib.get_close_matches(pattern, places, n=3, cutoff=0.5) or list(places)[:5]
            raise InputError(f"{key}: {pattern} meets no parameter; did you mean {', '.join(near)}?")
    wanted = set().union(*met.values())
    return [name for name in names if name in wanted]


def _meets(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _places(name: str) -> list[str]:
    """a.b.weight -> a, a.b, a.b.weight"""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
