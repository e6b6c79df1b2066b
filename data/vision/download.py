"""The published sets, fetched by torchvision."""

from __future__ import annotations

import os
import tempfile
from http.client import HTTPException
from pathlib import Path

from fabric_trainer.errors import InputError


def fetch(cls_name: str, folder: str, root: Path) -> None:
    """``root``/``folder``, as torchvision.datasets' class writes it, checked against its md5.

    It is fetched beside its place and renamed when it is whole. InputError, in one line, where that doesn't work.
    """
    try:
        from torchvision import datasets
    except ImportError:
        raise InputError("data.download needs torchvision: pip install 'fabric-trainer[vision]'") from None
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as beside:
            getattr(datasets, cls_name)(beside, download=True)
            os.replace(Path(beside) / folder, root / folder)
    except (OSError, RuntimeError, HTTPException) as error:  # no network, a full disk, a wrong md5
        reason = " ".join(str(error).split())
        raise InputError(
            f"data.download: {cls_name} could not be fetched into {root} ({reason}); put {folder} there by hand"
        ) from None
