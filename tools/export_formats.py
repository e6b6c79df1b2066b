"""The formats: each writes a file, reads it back, and is compared with the network."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

from fabric_trainer.errors import InputError
from tools.export_model import Call, Model, cloned

TOLERANCE = 1e-5  # of an output, in units of the largest where that is above 1

Run = Callable[[Call], list[Tensor]]
"""A file at work: its output tensors, in the order of the tree that ``forward`` returns."""


class ExportError(RuntimeError):
    """The network can't be written in this format, or what was written does not compute the same."""


def write(model: Model, name: str, file: Path) -> Run:
    """Write ``file`` in the format of that name, and read it back. Raises ExportError, InputError."""
    return {"state_dict": state_dict, "safetensors": safetensors, "torch_export": torch_export, "onnx": onnx}[name](
        model, file
    )


def state_dict(model: Model, file: Path) -> Run:
    torch.save(model.stored, file)
    return runner(model.loaded(torch.load(file, weights_only=True)))


def safetensors(model: Model, file: Path) -> Run:
    """A tensor of several names is written under the first; in the metadata the others point to it, which
    ``safetensors.torch.load_model`` follows."""
    library = needed("safetensors.torch")
    first: dict[int, str] = {}
    for name, value in model.stored.items():
        if not isinstance(value, Tensor):
            raise ExportError(f"safetensors holds tensors alone, and {name} is none: state_dict takes it")
        first.setdefault(id(value), name)
    names = {name: first[id(value)] for name, value in model.stored.items()}
    others = {name: kept for name, kept in names.items() if name != kept}
    tensors = {name: value.contiguous() for name, value in model.stored.items() if name not in others}
    library.save_file(tensors, file, {"format": "pt", **model.notes, **others})
    read = library.load_file(file)
    return runner(model.loaded({name: read[kept] for name, kept in names.items()}))


def torch_export(model: Model, file: Path) -> Run:
    program = traced(model)
    program.example_inputs = None  # else the samples would be in the file
    torch.export.save(program, file, extra_files={"notes.json": json.dumps(model.notes)})
    return runner(torch.export.load(file).module())


def onnx(model: Model, file: Path) -> Run:
    runtime = needed("onnxruntime")
    needed("onnxscript")
    inputs = [name for name, _ in named(arguments(model, model.calls[0]))]
    with torch.no_grad():
        made = model.network(*model.calls[0].args, **model.calls[0].kwargs)
    outputs = [name for name, _ in named(made if isinstance(made, dict) else {"output": made})]
    outputs = [f"{name}_out" if name in inputs else name for name in outputs]
    program = traced(model)
    try:
        graph = torch.onnx.export(program, input_names=inputs, output_names=outputs, verbose=False)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"onnx can't express this network: {cause(error)}") from None
    graph.model.metadata_props.update(model.notes)
    graph.save(file)
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    taken = {each.name for each in session.get_inputs()}  # without those that the outputs don't depend on

    def run(call: Call) -> list[Tensor]:
        given = {name: value.numpy() for name, value in named(arguments(model, call)) if name in taken}
        return [torch.from_numpy(array) for array in session.run(None, given)]

    return run


def runner(network: nn.Module) -> Run:
    return lambda call: tensors(network(*call.args, **call.kwargs))


# ---- graphs -------------------------------------------------------------------------------------------------------


def traced(model: Model) -> torch.export.ExportedProgram:
    """The graph, for any batch size if the network allows it, or for that of the first call: then those of other sizes
    are dropped. Raises ExportError."""
    module, (first, *others) = model.graph(), model.calls
    shapes = torch.export.AdditionalInputs()
    for call in others:
        shapes.add(call.args, call.kwargs)
    # tracing leaves marks on its tensors
    again, first = first, first._replace(args=cloned(first.args), kwargs=cloned(first.kwargs))
    try:
        program = torch.export.export(module, first.args, first.kwargs, dynamic_shapes=shapes)
        print("batch size: any")
        return program
    except Exception as error:
        reason = cause(error)
    try:
        program = torch.export.export(module, again.args, again.kwargs)
    except Exception as error:
        raise ExportError(f"torch.export can't trace this network: {cause(error)}") from None
    print(f"batch size: {first.samples} and no other; {reason}")
    model.calls = [call for call in model.calls if sizes(call) == sizes(first)]
    return program


def arguments(model: Model, call: Call) -> dict[str, Any]:
    """A call's arguments by the names that ``forward`` gives them."""
    return inspect.signature(model.network.forward).bind(*call.args, **call.kwargs).arguments


def named(tree: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """The tensors in it, by name: ``x``, or ``x_0`` and ``x_key`` within a list and a dict."""
    found = []
    for path, leaf in tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, Tensor):
            parts = [getattr(key, "key", getattr(key, "idx", getattr(key, "name", None))) for key in path]
            found.append(("_".join(map(str, parts)), leaf))
    return found


def sizes(call: Call) -> list[torch.Size]:
    return [leaf.shape for leaf in tensors((call.args, call.kwargs))]


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def cause(error: BaseException) -> str:
    """A line on what it came from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def needed(module: str) -> Any:
    """Import it. Raises InputError, naming the extra."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(f"this format needs the package {error.name}: pip install 'fabric-trainer[export]'") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' own chatter; and attention is traced in its plain form, which every format can express."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
        torch.backends.mha.set_fastpath_enabled(fast)


# ---- the comparison -----------------------------------------------------------------------------------------------


@torch.no_grad()
def compare(model: Model, run: Run) -> None:
    """Raises ExportError where an output is not the network's."""
    worst, samples = 0.0, 0
    for call in model.calls:
        theirs, ours = run(call), tensors(model.network(*call.args, **call.kwargs))
        if not ours or [x.shape for x in theirs] != [x.shape for x in ours]:
            found, right = ([tuple(x.shape) for x in tree] for tree in (theirs, ours))
            raise ExportError(f"the file's outputs are tensors of {found}, the network's of {right}")
        worst = max(worst, *(difference(a, b) for a, b in zip(theirs, ours, strict=True)))
        samples += call.samples
    found = f"outputs differ by {worst:.1e} on {samples} samples"
    if not worst <= TOLERANCE:
        raise ExportError(f"{found}, more than {TOLERANCE:.0e}: nothing was written")
    print(found)


def difference(a: Tensor, b: Tensor) -> float:
    """The largest, in units of the largest finite element of ``b`` where that is above 1; NaN equals NaN."""
    if not b.numel():
        return 0.0
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    size = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 1.0
    apart = torch.where(same, 0.0, a - b).abs().nan_to_num(math.inf)
    return float(apart.max()) / max(size, 1.0)
