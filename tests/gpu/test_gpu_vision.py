"""On one GPU: the pictures that lie there are those that a CPU's loader prepares, and are never copied again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gpus import needs
from lightning.fabric import Fabric
from small_pictures import write_cifar10
from torch import Tensor, nn
from toys import config

from fabric_trainer import fit
from fabric_trainer.random import SampleRandom
from models.vision.task import ImageClassification

pytestmark = [pytest.mark.gpu, needs(1)]


class Watched(ImageClassification):
    """Keeps what its network is given."""

    def network(self) -> nn.Module:
        network, self.seen = super().network(), list[Tensor]()
        network.register_forward_pre_hook(lambda _, x: self.seen.append(x[0].detach().cpu()))
        return network


def trained(root: Path, accelerator: str, **args: object) -> Watched:
    fabric = Fabric(accelerator=accelerator, devices=1)
    fabric.launch()
    task = Watched(model="test_resnet", cutout=8, mixup=0.2, **args)
    task.prepare(root)
    fit(fabric, task, config(**{"batch.micro_batch_size": 16, "data.num_workers": 0}))
    return task


@pytest.mark.parametrize("channels_last", [False, True])
def test_resident_pictures_are_the_loaders(tmp_path, channels_last):
    root = write_cifar10(tmp_path, train=100, test=40)
    here = trained(root, "cpu")
    there = trained(root, "cuda", resident=True, channels_last=channels_last)
    assert there.stack.is_cuda and len(here.seen) == len(there.seen) > 10
    for a, b in zip(here.seen, there.seen, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-6, check_stride=False)


def test_a_batch_waits_for_nothing(tmp_path):
    """Indexing, cropping, flipping, cutting and normalising make no host synchronisation."""
    task = trained(write_cifar10(tmp_path, train=100, test=40), "cuda", resident=True)
    index = torch.arange(16)
    samples = task.dataset("train").__getitems__(index.tolist())
    batch = task.augment(samples | {"random": SampleRandom(0, 0, index)})
    place, random = batch["place"].cuda(), batch["random"].to(torch.device("cuda"))
    first = task._augmented({}, place, random)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # raises at a synchronisation
    try:
        again = task._augmented({}, place, random)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again)
