"""Train on Lightning Fabric with a loop that you can read. ``fit`` runs it; the pieces work by themselves."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Agree": "faults",
    "Batch": "task",
    "EMA": "ema",
    "Loss": "task",
    "Order": "order",
    "Split": "evaluate",
    "SampleRandom": "random",
    "Shuffled": "order",
    "Task": "task",
    "Config": "config",
    "accumulating": "loop",
    "clip_gradients": "clip",
    "evaluate": "evaluate",
    "fit": "loop",
    "windows": "window",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    # lazily: the command line must answer --help without importing torch (four seconds)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
