"""The keys of ``fabric``: devices, precision, and each strategy's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class DdpConfig:
    """DistributedDataParallel's options."""

    find_unused_parameters: bool = False
    """Look for parameters that a forward left out; costs a pass over the graph."""
    static_graph: bool = False
    """Promise that every forward uses the same parameters."""
    gradient_as_bucket_view: bool = True
    """Gradients lie in the buckets that are reduced: one copy less."""
    sync_batchnorm: bool = False
    """BatchNorm statistics over all ranks."""


@dataclass
class FsdpConfig:
    """Fully sharded data parallel."""

    sharding: Literal["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"] = "FULL_SHARD"
    """SHARD_GRAD_OP keeps the weights gathered between forward and backward; NO_SHARD is ddp."""
    blocks: list[str] | int | None = None
    """What is sharded as one: class names, or the least number of parameters; else the blocks that the task names."""
    cpu_offload: bool = False
    """Shards lie in host memory while they are not used."""
    meta_init: bool = False
    """Build the network without memory, shard it, then initialise: for models larger than one device."""
    param_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """What weights are gathered and computed in; else it follows fabric.precision (bf16-mixed: bf16)."""
    reduce_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """What gradients are reduced in; else it follows fabric.precision (bf16-mixed: fp32)."""


@dataclass
class DeepspeedConfig:
    """DeepSpeed ZeRO."""

    offload_optimizer: bool = False
    """Optimizer state lies in host memory."""
    offload_parameters: bool = False
    """stage 3: weights lie in host memory while they are not used."""
    config: dict[str, Any] | str | None = None
    """A DeepSpeed JSON file, or its content; "auto" in it is filled from this configuration."""


@dataclass
class FabricConfig:
    """Devices, precision and strategy: handed to Lightning Fabric."""

    accelerator: str = "auto"
    """auto, cpu, cuda, gpu or mps."""
    devices: int | str | list[int] = "auto"
    """How many, or which; auto means one without a launcher, and the launcher's number under one."""
    num_nodes: int = 1
    """Machines."""
    strategy: str = "auto"
    """single, ddp, ddp_spawn, ddp_notebook, fsdp, fsdp1, tensor_parallel, deepspeed (see --strategies); auto: single on
    one device, else ddp."""
    precision: str = "auto"
    """32-true (which auto means), 16-mixed, bf16-mixed, bf16-true, 64-true or transformer-engine."""
    stage: Literal[1, 2, 3] = 2
    """deepspeed: what ZeRO shards; 1 the optimizer, 2 the gradients too, 3 the weights too."""
    tensor_parallel_size: int | None = None
    """Ranks that share each layer; else all of them under tensor_parallel, 1 under fsdp (more is 2-D)."""
    activation_checkpointing: list[str] = field(default_factory=list)
    """Class names of blocks whose activations are recomputed in the backward."""
    timeout: float = 30.0
    """Minutes that a collective may wait."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Of float32 matrix products; high uses TF32."""
    cudnn_tf32: bool = True
    """TF32 in float32 convolutions."""
    requeue: bool = False
    """SLURM: on SIGUSR1 save, then scontrol requeue this job."""
    ddp: DdpConfig = field(default_factory=DdpConfig)
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    deepspeed: DeepspeedConfig = field(default_factory=DeepspeedConfig)
