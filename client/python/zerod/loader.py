# SPDX-License-Identifier: Apache-2.0
"""A loader whose position is part of the training state."""

from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


class Loader:
    """Micro-batches of a map-style dataset: shuffled by (seed, epoch), dealt out over the ranks.

    The order is that of torch's DistributedSampler: the same permutation on all ranks, rank r takes
    its elements r, r + world, ... With `drop_last` what does not fill a batch on every rank is left
    out; else the last batch is smaller, and elements from the front come twice where the ranks
    would differ in number. Each `iter()` goes on where the last one
    stopped, to the end of the epoch; a finished epoch starts the next. It draws from a generator
    of its own, so that the global one stands where the training left it.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        drop_last: bool = False,
    ) -> None:
        if isinstance(dataset, DataLoader):
            raise TypeError("training_data is a DataLoader; pass its dataset")
        if not isinstance(dataset, Sized):
            raise TypeError("training_data needs a length; pass a map-style dataset")
        self.dataset = dataset
        self.batch_size = batch_size
        self.rank = rank
        self.world = world
        self.seed = seed
        self.shuffle = shuffle
        self.collate_fn = collate_fn
        self.num_workers = num_workers
        self.epoch = 0
        self.position = 0  # micro-batches of this epoch that were handed out
        self.drop_last = drop_last
        count = len(dataset)
        if drop_last:
            self._batches = count // world // batch_size
        else:
            self._batches = -(-(-(-count // world)) // batch_size)
        if self._batches == 0:
            raise ValueError(
                f"training_data has {count} elements, fewer than one batch of "
                f"{batch_size} for each of {world} ranks"
                if drop_last
                else "training_data is empty"
            )

    def __len__(self) -> int:
        """Micro-batches of one epoch, for each rank."""
        return self._batches

    def __iter__(self) -> Iterator[Any]:
        order = self._order()
        batches = [
            order[i * self.batch_size : (i + 1) * self.batch_size].tolist()
            for i in range(self.position, self._batches)
        ]
        loader = DataLoader(
            self.dataset,
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=self.collate_fn,
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed),
        )
        for batch in loader:
            self.position += 1
            last = self.position == self._batches
            if last:
                self.epoch += 1
                self.position = 0
            yield batch
            if last:
                return

    def _order(self) -> torch.Tensor:
        count = len(self.dataset)  # type: ignore[arg-type]
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(count, generator=generator)
        else:
            order = torch.arange(count)
        if self.drop_last:
            order = order[: count // self.world * self.world]
        else:
            padded = -(-count // self.world) * self.world
            order = order.repeat(-(-padded // count))[:padded]
        return order[self.rank :: self.world]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes effect with the next `iter()`."""
        self.epoch = state["epoch"]
        self.position = state["position"]
        self.seed = state["seed"]
