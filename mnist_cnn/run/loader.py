"""Loaders whose order depends on the seed and the epoch alone, so that a resumed run repeats an uninterrupted one."""

import itertools
import os
import warnings
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class ResumableLoader(DataLoader):
    """A DataLoader that skips the batches that a resumed epoch has already seen."""

    loop: Any = None  # the trainer's loop over the batches of training

    def __iter__(self) -> Any:
        seen = self.loop.batch_progress.current.processed if self.loop and self.loop.restarting else 0
        yield from itertools.islice(super().__iter__(), seen, None)


def resumable_loader(dataset: Dataset, trainer: Trainer | None, train: bool = False, **options: Any) -> DataLoader:
    """Loads this process's share of a dataset; in training, in an order that depends on seed_everything and the epoch.

    Args:
        dataset: A dataset with a length.
        trainer: The data module's trainer; None outside of one.
        train: Whether the batches are those of training: shuffled, and continued by a resumed epoch.
        options: Further arguments of DataLoader.
    """
    seed = int(os.environ.get("PL_GLOBAL_SEED", 0))  # of seed_everything
    world_size, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
    # Lightning sets the sampler's epoch. In evaluation, no item is repeated to make the processes' shares equal.
    kind: type[DistributedSampler] = DistributedSampler if train else UnrepeatedDistributedSampler
    sampler = kind(dataset, world_size, rank, shuffle=train, seed=seed, drop_last=options.get("drop_last", False))
    generator = torch.Generator().manual_seed(seed)  # not the global one, from which the model draws
    loader = ResumableLoader(dataset, sampler=sampler, generator=generator, **options)
    if train and trainer:
        loader.loop = trainer.fit_loop.epoch_loop
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
    return loader
