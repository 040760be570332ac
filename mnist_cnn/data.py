"""MNISTDataModule: MNIST and its drop-in siblings, held in memory as uint8 and cut into whole batches.

A Dataset that returns one image at a time makes an epoch cost several times what the net costs. Here a batch is one
indexing operation, and becomes float and normalised on the device.
"""

import contextlib
import functools
import gzip
import itertools
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchvision import datasets

from mnist_cnn.images import read_images
from mnist_cnn.run.errors import UserError


class TensorBatches(TensorDataset):
    """A TensorDataset that gathers a whole batch in one operation."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        index = torch.tensor(indices)
        return tuple(tensor.index_select(0, index) for tensor in self.tensors)


class ResumableLoader(DataLoader):
    """A DataLoader that skips the batches that a resumed epoch has already seen."""

    epoch_loop: Any = None  # the trainer's loop over the batches of training

    def __iter__(self) -> Any:
        loop = self.epoch_loop
        done = loop.batch_progress.current.processed if loop and loop.restarting else 0
        yield from itertools.islice(super().__iter__(), done, None)


class MNISTDataModule(LightningDataModule):
    """MNIST, Fashion-MNIST or KMNIST: batches of images [N, 1, 28, 28], normalised, and targets [N].

    The order of the training images in epoch k depends on `seed_everything` and k alone, so a resumed run sees the
    same batches as an uninterrupted one. The validation set depends on `split_seed` alone.

    Args:
        data_dir: Folder that holds MNIST/raw/*.gz; missing archives are downloaded into it.
        dataset: Name of a dataset of torchvision.
        batch_size: Images in a training step, in each process.
        val_size: Held out of the 60,000 training images: a number of images, or a fraction below 1.
        split_seed: Seed that chooses the validation images.
        eval_batch_size: Images in a step of validation, test and prediction; changes speed and memory only.
        drop_last: Whether an incomplete last training batch is dropped.
        mean: Subtracted from pixels in [0, 1]. Default: the mean of MNIST's training images.
        std: Divides pixels in [0, 1]. Default: the standard deviation of MNIST's training images.
        num_workers: Worker processes of a DataLoader; 0 is fastest for images in memory.
        predict_dir: Folder of PNG or JPEG files to predict instead of the test set.
        augment: Modules that change the training images in turn, on the device, before they are normalised: from
            [N, 1, H, W] in [0, 1] to the same, with separate random numbers for each image, as in kornia.augmentation.
    """

    def __init__(
        self,
        data_dir: str = "data",
        dataset: Literal["MNIST", "FashionMNIST", "KMNIST"] = "MNIST",
        batch_size: PositiveInt = 64,
        val_size: int | float = 0.1,
        split_seed: int = 0,
        eval_batch_size: PositiveInt = 1000,
        drop_last: bool = True,
        mean: float = 0.1307,
        std: PositiveFloat = 0.3081,
        num_workers: NonNegativeInt = 0,
        predict_dir: str | None = None,
        augment: list[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.data_dir, self.dataset = data_dir, getattr(datasets, dataset)
        self.classes = [name.split(" - ")[0] for name in self.dataset.classes]  # MNIST's are called "0 - zero"
        self.batch_size, self.eval_batch_size, self.drop_last = batch_size, eval_batch_size, drop_last
        self.val_size, self.split_seed = val_size, split_seed
        self.mean, self.std = mean, std
        self.num_workers = num_workers
        self.predict_dir = predict_dir
        self.augment = nn.Sequential(*(augment or []))
        self.sets: dict[str, TensorBatches] = {}  # train, val, test, predict, once they have been read
        self.predict_names: list[str] = []
        self.unreadable: list[str] = []  # files of predict_dir that are no images, each with the reason

    def prepare_data(self) -> None:
        """Downloads the archives if one is missing."""
        raw = Path(self.data_dir, self.dataset.__name__, "raw")
        missing = [raw / name for name, _ in self.dataset.resources if not (raw / name).exists()]
        if missing and not (self.predict_dir and self.trainer and self.trainer.predicting):
            try:
                self.dataset(self.data_dir, download=True)
            except (OSError, RuntimeError) as error:
                for folder in (raw, raw.parent, raw.parent.parent):  # which torchvision has created
                    with contextlib.suppress(OSError):
                        folder.rmdir()
                raise UserError(f"{missing[0]} is missing and cannot be downloaded ({error}): copy it there") from error

    def setup(self, stage: str) -> None:
        """Reads the images of the stage, once."""
        if stage in ("fit", "validate") and "train" not in self.sets:
            images, targets = self._read("train")
            num_val = round(self.val_size * len(images)) if isinstance(self.val_size, float) else self.val_size
            if not 0 <= num_val <= len(images) - self.batch_size:
                left = f"val_size={self.val_size} leaves {len(images) - num_val} of {len(images)} images to train on"
                raise UserError(f"{left}; batch_size is {self.batch_size}")
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.split_seed))
            for name, index in (("val", order[:num_val]), ("train", order[num_val:])):
                self.sets[name] = TensorBatches(images[index], targets[index])
        elif stage == "predict" and self.predict_dir is not None:
            images, self.predict_names, self.unreadable = read_images(self.predict_dir)
            self.sets["predict"] = TensorBatches(images, torch.full([len(images)], -1))
        elif stage in ("test", "predict") and "test" not in self.sets:
            self.sets["test"] = TensorBatches(*self._read("t10k"))

    def train_dataloader(self) -> DataLoader:
        """Batches in an order that depends on seed and epoch alone, since Lightning tells the sampler the epoch."""
        images, drop_last = self.sets["train"], self.drop_last
        sampler: DistributedSampler = DistributedSampler(images, *self._replicas(), True, seed(), drop_last)
        loader = self._loader("train", self.batch_size, sampler, drop_last)
        loader.epoch_loop = self.trainer and self.trainer.fit_loop.epoch_loop
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
        return loader

    def val_dataloader(self) -> DataLoader:
        """Every validation image once, in order."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader:
        """Every test image once, in order."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Every image of predict_dir, or else of the test set, once, in order."""
        return self._eval_loader("test" if self.predict_dir is None else "predict")

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Turns uint8 [N, 28, 28] into float [N, 1, 28, 28], augmented in training, normalised; on the device."""
        images, targets = batch
        module = self.trainer and self.trainer.lightning_module
        images = images.unsqueeze(1).float()
        if self.augment and self.trainer and self.trainer.training:
            images = self.augment.to(images)(images.div_(255)).mul_(255)
        images.sub_(255 * self.mean).div_(255 * self.std)
        return images.to(module.dtype if module else torch.float32), targets

    def _replicas(self) -> tuple[int, int]:
        """Number of processes and the rank of this one."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _eval_loader(self, name: str) -> DataLoader:
        # Unlike torch's, this sampler repeats no image to make the processes' shares equal.
        sampler = UnrepeatedDistributedSampler(self.sets[name], *self._replicas(), shuffle=False)
        return self._loader(name, self.eval_batch_size, sampler, drop_last=False)

    def _loader(self, name: str, batch_size: int, sampler: DistributedSampler, drop_last: bool) -> ResumableLoader:
        return ResumableLoader(
            self.sets[name],
            batch_size=batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=tuple,  # __getitems__ returns a batch
            generator=torch.Generator().manual_seed(seed()),  # not the global one, from which the model draws
        )

    def _read(self, name: str) -> tuple[Tensor, Tensor]:
        """Images uint8 [N, H, W] and targets int64 [N] of train or t10k."""
        raw = Path(self.data_dir, self.dataset.__name__, "raw")
        images, targets = (read_idx(raw / f"{name}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
        return images, targets.long()


@functools.cache
def read_idx(path: Path) -> Tensor:
    """Reads a gzipped file of unsigned bytes in MNIST's IDX format: uint8, of the shape that the file says.

    The format, as its authors describe it: two zero bytes, type, number of dimensions, their sizes, values.
    """
    try:
        content = bytearray(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is missing or damaged ({error}): restore it, or delete it to download it") from error
    dimensions = content[3]
    shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    return torch.frombuffer(content, dtype=torch.uint8, offset=4 + 4 * dimensions).view(shape)


def seed() -> int:
    """The seed of seed_everything; 0 if there is none."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))
