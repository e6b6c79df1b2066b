"""The pictures of all splits in one row, from which any of them is had by its place."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.vision.pictures import Pictures, PictureSets


class Album:
    """First the training pictures, then val's and test's. A *place* counts from the first training picture.

    labels: int64 (N,). names: N strings. size: of the pictures' sides, where all are arrays of one square size.
    """

    def __init__(self, sets: PictureSets) -> None:
        splits = {"train": sets.train, "val": sets.val, "test": sets.test}
        self.splits: dict[str, Pictures] = {name: pictures for name, pictures in splits.items() if pictures is not None}
        counts = [len(pictures) for pictures in self.splits.values()]
        self.starts = [0, *np.cumsum(counts).tolist()]
        self.labels = torch.from_numpy(np.concatenate([pictures.labels for pictures in self.splits.values()]))
        self.names = [name for pictures in self.splits.values() for name in pictures.names]
        sizes = {None if p.pixels is None else p.pixels.shape[1:3] for p in self.splits.values()}
        square = sizes.pop() if len(sizes) == 1 else None
        self.size = square[0] if square is not None and square[0] == square[1] else None

    def places(self, split: str) -> Tensor:
        """Of the split's pictures: int64 (n,)."""
        number = list(self.splits).index(split)
        return torch.arange(self.starts[number], self.starts[number + 1])

    def picture(self, place: int, least: int | None = None) -> Image.Image:
        """See :meth:`Pictures.picture`."""
        number = bisect_right(self.starts, place) - 1
        return list(self.splits.values())[number].picture(place - self.starts[number], least)

    def pixels(self) -> Tensor:
        """Of arrays of one size: uint8 (N, 3, size, size)."""
        arrays = [pictures.pixels for pictures in self.splits.values() if pictures.pixels is not None]
        return torch.from_numpy(np.concatenate(arrays)).permute(0, 3, 1, 2).contiguous()

    def stacked(self, transform: Callable[[Image.Image], Tensor], least: int | None = None) -> Tensor:
        """What ``transform`` makes of each: uint8 (N, 3, S, S). Decoded by all cores."""
        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(lambda i: transform(self.picture(i, least)), range(len(self.names)))))
