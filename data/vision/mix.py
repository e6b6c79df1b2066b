"""Mixup and CutMix, exact under any split: every sample draws a partner of its own from the whole training set.

Usually a batch is mixed with a permutation of itself, and what becomes of a sample depends on what it came with. Here
``drawn`` says, on the host, who is mixed with whom and how; the task fetches the partners, augments them by their own
draws (``partners_random``), and the device mixes (``mixed``) and weighs both labels (``soft_loss``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.special import betaincinv
from torch import Tensor

from data.vision.augment import inside
from fabric_trainer.random import SampleRandom


def drawn(
    random: SampleRandom, samples: int, height: int, width: int, mixup: float, cutmix: float
) -> dict[str, Tensor]:
    """How each sample is mixed, with a row per sample, on the host; a batch may hold it and be cut by rows.

    partner  int64 (B,), a place among the ``samples`` of the training set; it may be the sample's own
    blend    float32 (B,), the share of the sample's own pixels everywhere outside the box
    box      int64 (B, 4), top, left, bottom, right of what comes from the partner alone
    share    float32 (B,), that of the sample's own label

    mixup, cutmix: the alphas, at least one of them above 0. Mixup (Zhang et al., arXiv 1710.09412) blends by lambda
    from Beta(alpha, alpha). CutMix (Yun et al., arXiv 1905.04899) pastes a box of the area 1 - lambda, cut off at
    the picture's edges; lambda is then what is left. With both, each sample takes either, by a fair coin.
    """
    cut = random.uniform("cutmix") < 0.5 if mixup and cutmix else torch.full((len(random),), cutmix > 0)
    alpha = torch.where(cut, cutmix, mixup).double().numpy()
    share = torch.from_numpy(betaincinv(alpha, alpha, random.uniform("lambda").double().numpy()))
    side = (1 - share).sqrt() * cut
    rows, columns = (height * side).long(), (width * side).long()
    top = random.integers("box row", 0, height) - rows // 2
    left = random.integers("box column", 0, width) - columns // 2
    bottom, right = (top + rows).clamp(max=height), (left + columns).clamp(max=width)
    top, left = top.clamp(min=0), left.clamp(min=0)
    left_over = 1 - (bottom - top) * (right - left) / (height * width)
    return {
        "partner": random.integers("partner", 0, samples),
        "blend": torch.where(cut, 1.0, share).float(),
        "box": torch.stack([top, left, bottom, right], 1),
        "share": torch.where(cut, left_over.double(), share).float(),
    }


def partners_random(random: SampleRandom, mix: dict[str, Tensor]) -> SampleRandom:
    """The partners' own draws of this epoch: they come out as they do where they are samples themselves."""
    return SampleRandom(random.seed, random.epoch, mix["partner"])


def mixed(pictures: Tensor, partners: Tensor, mix: dict[str, Tensor]) -> Tensor:
    """The pictures with their partners in them: float (B, C, H, W) each, normalised; ``mix`` on their device."""
    blend = mix["blend"].view(-1, 1, 1, 1)
    # in three steps that round alike everywhere: lerp's vectors and what is left of a row differ in the last digit
    outside = (pictures * blend).add_(partners * (1 - blend))
    return torch.where(inside(pictures, *mix["box"].unbind(1)), partners, outside)


def soft_loss(
    logits: Tensor, labels: Tensor, partner_labels: Tensor, share: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Cross entropy with ``share`` of each label and the rest of its partner's: (B, C), int64 (B,), (B,), (B,) -> (B,).

    That of ``F.cross_entropy`` with the same soft targets; label smoothing as defined there.
    """
    own = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    partners = F.cross_entropy(logits, partner_labels, reduction="none", label_smoothing=label_smoothing)
    return share * own + (1 - share) * partners
