"""Classes by import path."""

from __future__ import annotations

import importlib
from typing import Any

from fabric_trainer.errors import InputError


def import_path(path: str, key: str) -> Any:
    """The object at ``package.module.Name``. Raises InputError, naming ``key``, where there is none.

    An import error inside the module itself is not hidden: it is the user's to see.
    """
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise
        raise InputError(f"{key}: no module {error.name} for {path}; is its folder on the Python path?") from None
    except ValueError:
        raise InputError(f"{key}: {path!r} is no import path such as package.module.Name") from None
    if not hasattr(module, name):
        raise InputError(f"{key}: {module_name} has no {name}")
    return getattr(module, name)
