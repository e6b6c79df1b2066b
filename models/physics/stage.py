"""What the stages of the physics pipeline share: data, latents, the system's parts, and what one leaves to the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from data import plans, ups
from data.fields import Fields
from data.normalise import fit
from data.pairs import Pairs, Several, States
from data.sets import Source
from fabric_trainer.errors import InputError
from fabric_trainer.order import Plan
from fabric_trainer.portable import check_names
from fabric_trainer.task import Batch, Loss, Task
from models.physics import symmetries as symmetry
from models.physics import weights
from models.physics.design import Design, Settings
from models.physics.figures import nrmses
from models.physics.losses import EPS
from models.physics.operator import StackLayer, UNetLayer
from models.physics.states import Cache, changes, states_of
from models.physics.system import Grid, PhysicsSystem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURED = 25  # steps of the rollouts in the report: an operator trained on single steps holds about so long


class Stage(Task):
    """A stage of the pipeline: a run of its own, whose network is the whole system so far.

    tasks: names of ``data.ups.TASKS``, read from ``<data.root>/<task>_<split>.h5``. made: tasks whose data our
    generators make, each with its parameters, such as {burgers1d: {nu: 0.01, nx: 256}}; samples: their trajectories,
    {train: 96, val: 16, test: 16}. files: tasks that are in PDEBench's own files, as ``data.sets.Source`` has them,
    {burgers1d: {train: PATH, val: PATH}}. sampling: of several tasks, "proportional" or "balanced".
    time_stride: frames in a step. rollout_horizon: states after the first that a sample brings. val_every: every how
    many-th pair of val and test is measured. symmetries: of ``models.physics.symmetries``, those that a task's equation
    has, {burgers1d: [shift, mirror]}: each training sample is turned by them at random, and encoded as it then is.

    encoder: arguments of every task's GridEncoder: tokens, dim, and patch and margin, points along each axis that a
    task's grid has; seed: the same for all tasks. train_encoder: it learns with the decoder; else it is frozen, and its
    latents, unless samples are turned, are cached: latent_cache_dir (``<data.root>/latent_cache``), latent_cache_dtype
    ("float32" or "float16").
    operator: of the LatentOperator, dim left out. reach: of PhysicsSystem.step; with one, losses are in units of the
    task's change. dt: what the operator is told of time. decoder: of the AnyPointDecoder, dim and fields left out.
    corrector, prior: of the DiffusionResidual and the SteadyPrior, dim left out.

    start: a file that this stage begins with: an earlier stage's checkpoint, its average where it has one, or weights
    of an operator alone (the Universal Physics Stack's, Lightning's, ours).
    """

    trains: tuple[str, ...] = ()
    """The parts of the system that this stage trains."""
    caches: bool = True
    """Whether samples bring latents from the cache, where the encoder is frozen."""
    compared: tuple[str, ...] = ()
    """Other predictions that are measured beside the stage's own, such as the operator's alone."""

    def __init__(
        self,
        *,
        tasks: list[str],
        made: dict[str, dict[str, Any]] | None = None,
        samples: dict[str, int] | None = None,
        files: dict[str, dict[str, Any]] | None = None,
        sampling: str = "proportional",
        time_stride: int = 1,
        rollout_horizon: int = 1,
        val_every: int = 1,
        symmetries: dict[str, list[str]] | None = None,
        encoder: Settings | None = None,
        train_encoder: bool = False,
        operator: Settings | None = None,
        reach: float | None = None,
        dt: float = 0.1,
        decoder: Settings | None = None,
        corrector: Settings | None = None,
        prior: Settings | None = None,
        latent_cache_dir: str | None = None,
        latent_cache_dtype: str = "float32",
        start: str | None = None,
    ) -> None:
        made, files, turned = made or {}, files or {}, symmetries or {}
        if not tasks or len(set(tasks)) < len(tasks):
            raise InputError(f"task.args.tasks: needs names, each once, not {tasks}")
        for key, named in (("made", made), ("files", files), ("symmetries", turned)):
            if unknown := set(named) - set(tasks):
                raise InputError(f"task.args.{key}: {', '.join(sorted(unknown))} is none of tasks, {', '.join(tasks)}")
        if val_every < 1:
            raise InputError(f"task.args.val_every: must be at least 1, not {val_every}")
        plans.check(sampling)
        symmetry.check(turned)
        self.sources = [Source(task, made.get(task), samples or {}, files.get(task)) for task in tasks]
        self.sampling, self.stride, self.horizon = sampling, time_stride, rollout_horizon
        self.val_every, self.symmetries = val_every, [turned.get(task, []) for task in tasks]
        parts = (dict(each or {}) for each in (encoder, operator, decoder, corrector, prior))
        self.design = Design(*parts, reach, dt, rollout_horizon)
        self.train_encoder = train_encoder
        self.cache: dict[str, Any] = {"folder": latent_cache_dir, "dtype": latent_cache_dtype}
        self.start = Path(start) if start else None
        self.started: dict[str, Tensor] = {}
        self.sets: dict[str, list[Fields]] = {}  # by split, in the order of the tasks
        self.grids: list[Grid] = []

    # ---- data -------------------------------------------------------------------------------------------------

    def prepare(self, root: Path) -> None:
        """Read or make every split, fit normalisation and scales on train, read ``start``, and cache latents.

        InputError where a file isn't what it should be."""
        self.started = weights.system(self.start, "task.args.start") if self.start else {}
        for split in ups.SPLITS:
            found = [source.read(root, split) for source in self.sources]
            if all(fields is not None for fields in found):
                self.sets[split] = [fields for fields in found if fields is not None]
        train = self.sets["train"]
        self.grids = [
            Grid(source.task, *fields.shape[2:], fields.steady)
            for source, fields in zip(self.sources, train, strict=True)
        ]
        for grid, names in zip(self.grids, self.symmetries, strict=True):
            symmetry.check_grid(grid.name, names, grid.height, grid.width)
        self.normalisers = [fit(fields) for fields in train]
        encoders = self.design.encoders(self.grids)
        self._take(nn.ModuleDict(dict(zip((grid.name for grid in self.grids), encoders, strict=True))), "encoders.")
        self._take(
            nn.ModuleDict(dict(zip((g.name for g in self.grids), self.normalisers, strict=True))), "normalisers."
        )
        self.states: dict[str, list[dict[str, States]]] = {}
        folder = Path(self.cache["folder"] or Path(root) / "latent_cache")
        cached = self.caches and not self.encoders_learn and not any(self.symmetries)
        cache = Cache(folder, self.design.encoder, self.cache["dtype"]) if cached else None
        for split, sets in self.sets.items():
            self.states[split] = [
                states_of(cache, *each) for each in zip(sets, self.normalisers, encoders, strict=True)
            ]
        for split in self.sets:
            self.dataset(split)  # says so where trajectories are too short
        scales = [changes(self.stride, *each) for each in zip(train, self.normalisers, encoders, strict=True)]
        self.latent_change, self.field_change = zip(*scales, strict=True)

    def missing(self, root: Path) -> list[str]:
        absent = self.start is not None and not self.start.is_file()
        lines = [f"task.args.start: there is no file {self.start}"] if absent else []
        return lines + [line for source in self.sources for line in source.missing(root)]

    def dataset(self, split: str) -> Dataset[Any] | None:
        """Pairs of states: ``z0``, ``z1`` [, ``z_future``] where latents are cached, ``u0``, ``u1`` [, ``u_future``],
        and ``task``."""
        if not self.sets:
            raise ValueError(f"{type(self).__name__}.prepare(root) has to come first: it reads the data")
        if split not in self.sets:
            return None
        pairs = [
            self.pairs(states, fields) for states, fields in zip(self.states[split], self.sets[split], strict=True)
        ]
        if split != "train" and self.val_every > 1:
            pairs = [Subset(each, range(0, len(each), self.val_every)) for each in pairs]  # type: ignore[arg-type]
        return Several([grid.name for grid in self.grids], pairs)

    def pairs(self, states: dict[str, States], fields: Fields) -> Dataset[Batch]:
        """The samples of one task's split."""
        return Pairs(states, self.stride, self.horizon, fields.steady, fields.name)

    def plan(self, dataset: Dataset[Any], seed: int) -> Plan:
        assert isinstance(dataset, Several)
        return plans.plan(self.sampling, dataset.sizes, seed)

    def augment(self, batch: Batch) -> Batch:
        return symmetry.turn(self.preprocess(batch), self.grids, self.symmetries, self.horizon)

    def preprocess(self, batch: Batch) -> Batch:
        batch["tasks"] = batch["task"].tolist()  # for the host: asking the device would wait for it
        return batch

    @property
    def encoders_learn(self) -> bool:
        """They do together with the decoder, in the first stage; the ones after find them trained."""
        return self.train_encoder and "decoder" in self.trains

    # ---- the system -------------------------------------------------------------------------------------------

    def build(self, kind: Callable[..., PhysicsSystem], *arguments: Any) -> Any:
        """The stage's network: a PhysicsSystem with the parts that this stage trains or its start has, and the start's
        weights. InputError where they are not of this network."""
        if not self.grids:
            raise ValueError(f"{type(self).__name__}.prepare(root) has to come first: it reads the data")
        started = {name.split(".")[0] for name in self.started}
        has = {part for part in ("corrector", "prior") if part in (*self.trains, *started)}
        changes = (self.latent_change, self.field_change)
        parts = self.design.parts(self.grids, self.normalisers, changes, has)
        network = kind(parts, (*self.trains, "encoders") if self.encoders_learn else self.trains, *arguments)
        self._take(network)
        return network

    def _take(self, module: nn.Module, prefix: str = "") -> None:
        """Load the start's weights into a module of the system: all of those that it has for it, and all but those of
        parts that this stage adds."""
        own = module.state_dict()
        saved = {name[len(prefix) :]: value for name, value in self.started.items() if name.startswith(prefix)}
        if not saved:
            return
        parts = {name.split(".")[0] for name in saved}
        new = {name for name in own if not prefix and name.split(".")[0] not in parts}
        alone = parts == {"operator"}
        added = {name for name in new if alone or name.split(".")[0] in self.trains}
        check_names({k: v for k, v in own.items() if k not in added}, saved, f"task.args.start: {self.start}")
        module.load_state_dict(own | saved)

    def describe(self) -> dict[str, str]:
        sizes = ", ".join(
            f"{grid.name} {' x '.join(str(n) for n in (grid.channels, grid.height, grid.width))}" for grid in self.grids
        )
        lines = {"tasks": f"{sizes}, {self.sampling}" if len(self.grids) > 1 else sizes}
        lines |= {"trains": ", ".join(self.trains)}
        return lines | ({"starts with": str(self.start)} if self.start else {})

    def blocks(self, network: nn.Module) -> Iterable[nn.Module]:
        return [module for module in network.modules() if isinstance(module, UNetLayer | StackLayer)]

    # ---- training ---------------------------------------------------------------------------------------------

    def weights(self, epoch: float) -> dict[str, float]:
        """Of every loss that counts in an epoch, by name: what the network's ``forward`` is asked for."""
        raise NotImplementedError(f"{type(self).__name__} must define weights(epoch)")

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        weights = self.weights(batch["random"].epoch)
        rows = network(batch, tuple(weights))
        untouched = rows.pop("untouched", 0.0)
        sums = {f"{name}_loss": (rows[name] * batch["weight"]).sum() for name in weights}
        total = sum(weight * sums[f"{name}_loss"] for name, weight in weights.items()) + untouched
        squares = {name: rows[name] for name in ("latent", "latent_error")}
        logs = {name: value for name, value in self.sums(batch, squares).items() if not name.endswith("/weight")}
        return Loss(total, sums | logs)

    def evaluate(self, network: nn.Module, batch: Batch, meters: dict[str, Any]) -> dict[str, Tensor]:
        weights = self.weights(math.inf)
        rows = network(batch, tuple(weights), measured=True)
        of_losses = {f"{name}_loss": (rows.pop(name) * batch["weight"]).sum() for name in weights}
        total = sum(weight * of_losses[f"{name}_loss"] for name, weight in weights.items())
        return {"loss": total, **of_losses, "weight": batch["weight"].sum(), **self.sums(batch, rows)}

    def predict(self, network: nn.Module, batch: Batch) -> dict[str, Tensor | list[str]]:
        """``u1``: (B, C, H, W), the fields after the step, in their units, at the grid points. Of several tasks
        ``task`` too, places in ``tasks``; where their grids differ, rows of u1 are flat, with zeros behind."""
        asked = {name: batch[name] for name in (("u0",) if len(self.grids) == 1 else ("u0", "task"))}
        found: dict[str, Tensor | list[str]] = {"u1": network(asked)["u1"]}
        return found | {name: value for name, value in asked.items() if name == "task"}

    # ---- figures ----------------------------------------------------------------------------------------------

    def figures(self, sums: dict[str, Any]) -> dict[str, float]:
        """``loss``, the mean of every loss, and those of ``figures.nrmses``."""
        means = {name: value / sums["weight"] for name, value in sums.items() if "/" not in name and name != "weight"}
        return means | nrmses(sums, [grid.name for grid in self.grids], self.compared)

    def pictures(self, network: nn.Module, device: torch.device) -> dict[str, Figure]:
        """Of every task a rollout beside the truth, each step from the field that the one before gave, and how its
        error and its spectrum go."""
        from models.physics.rollout_pictures import rollout_pictures

        assert isinstance(network, PhysicsSystem)
        return rollout_pictures(self, network, device, steps=PICTURED, space="field")

    def sums(self, batch: Batch, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of values per row (B,) the sums over samples, by task: ``<task>/<name>``, and ``<task>/weight``."""
        found: dict[str, Tensor] = {}
        for number, grid in enumerate(self.grids):
            weight = batch["weight"] if len(self.grids) == 1 else batch["weight"] * (batch["task"] == number)
            found |= {f"{grid.name}/{name}": (value * weight).sum() for name, value in rows.items()}
            found[f"{grid.name}/weight"] = weight.sum()
        return found

    def training_figures(self, means: dict[str, float]) -> dict[str, float]:
        """``<task>/nrmse`` of the update's own samples, exact over micro-batches and ranks; nan of a task without."""
        figures = {name: value for name, value in means.items() if "/" not in name}
        for grid in self.grids:
            error, truth = (means.get(f"{grid.name}/{name}") for name in ("latent_error", "latent"))
            if error is not None and truth is not None:
                figures[f"{grid.name}/nrmse"] = math.sqrt(error) / (math.sqrt(truth) + EPS) if truth else math.nan
        return figures
