"""A validation split drawn from the training pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from fabric_trainer.errors import InputError


def draw(
    names: Sequence[str], labels: np.ndarray, classes: Sequence[str], share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Places of the training and of the validation pictures, int64, ascending.

    Of each class's n pictures, round(share * n) are for validation, but at least one, and at least one is left to
    train on; InputError where a class has fewer than two. Which ones: those whose hashes of seed and name come
    first, so that a picture added, removed or found corrupt moves at most one other of its class.
    """
    hashes = np.array([_hash(f"{seed}:{name}") for name in names])
    chosen = np.zeros(len(labels), dtype=bool)
    for label, name in enumerate(classes):
        places = np.flatnonzero(labels == label)
        if len(places) < 2:
            raise InputError(f"data.val_split: class '{name}' has {len(places)} training pictures; it takes 2 to split")
        count = min(max(round(share * len(places)), 1), len(places) - 1)
        chosen[places[np.argsort(hashes[places], kind="stable")[:count]]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).hexdigest()


def check(share: float | None) -> None:
    """InputError for a share that isn't one."""
    if share is not None and not 0 < share < 1:
        raise InputError(f"data.val_split: {share} is no share of the training pictures; between 0 and 1, such as 0.1")
