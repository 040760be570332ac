"""MNISTDataModule: MNIST and its siblings, in memory as uint8; a batch is one operation, normalised on the device."""

import contextlib
import os
from pathlib import Path
from typing import Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets

from mnist_cnn.images import read_images
from mnist_cnn.run.errors import UserError
from mnist_cnn.run.loader import resumable_loader


class TensorBatches(TensorDataset):
    """A TensorDataset that gathers a whole batch in one operation."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        index = torch.tensor(indices)
        return tuple(tensor.index_select(0, index) for tensor in self.tensors)


class MNISTDataModule(LightningDataModule):
    """MNIST, Fashion-MNIST or KMNIST: batches of images [N, 1, 28, 28], normalised, and targets [N].

    The order of the training images depends on `seed_everything` and the epoch alone, the validation set on
    `split_seed` alone.

    Args:
        data_dir: Folder that holds MNIST/raw/*.gz; torchvision unpacks them, and downloads missing ones.
        dataset: Name of a dataset of torchvision.
        batch_size: Images in a training step, in each process.
        val_size: Held out of the 60,000 training images: a number of images, or a fraction.
        split_seed: Seed that chooses the validation images.
        eval_batch_size: Images in a step of validation, test and prediction; changes speed and memory only.
        drop_last: Whether an incomplete last training batch is dropped.
        mean: Subtracted from pixels in [0, 1]; by default the mean of MNIST's training images.
        std: Divides pixels in [0, 1]; by default the standard deviation of MNIST's training images.
        num_workers: Worker processes of a DataLoader; 0 is fastest for images in memory.
        predict_dir: An image file, or a folder of them, to predict instead of the test set.
        augment: Modules, such as kornia's, that change the training images [N, 1, H, W] in [0, 1] on the device.
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
        self.val_size, self.split_seed, self.predict_dir = val_size, split_seed, predict_dir
        self.mean, self.std, self.num_workers = mean, std, num_workers
        self.augment = nn.Sequential(*(augment or []))
        self.sets: dict[str, TensorBatches] = {}  # train, val, test, predict, once they have been read
        self.predict_names: list[str] = []
        self.unreadable: list[str] = []  # files of predict_dir that are no images, each with the reason

    def prepare_data(self) -> None:
        """Unpacks the archives, and downloads those that are missing."""
        if not (self.predict_dir and self.trainer and self.trainer.predicting):
            self._read(train=False)

    def setup(self, stage: str) -> None:
        if stage in ("fit", "validate") and "train" not in self.sets:
            images, targets = self._read(train=True)
            num_val = round(self.val_size * len(images)) if isinstance(self.val_size, float) else self.val_size
            if not 0 <= num_val <= len(images) - self.batch_size:
                sizes = f"val_size={self.val_size} and batch_size={self.batch_size}"
                raise UserError(f"{sizes} leave no batch of the {len(images)} training images")
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.split_seed))
            for name, index in (("val", order[:num_val]), ("train", order[num_val:])):
                self.sets[name] = TensorBatches(images.index_select(0, index), targets[index])
        elif stage == "predict" and self.predict_dir is not None:
            images, self.predict_names, self.unreadable = read_images(self.predict_dir)
            self.sets["predict"] = TensorBatches(images, torch.full([len(images)], -1))
        elif stage in ("test", "predict") and "test" not in self.sets:
            self.sets["test"] = TensorBatches(*self._read(train=False))

    def train_dataloader(self) -> DataLoader:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader:
        return self._loader("test" if self.predict_dir is None else "predict")

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Turns uint8 [N, 28, 28] into float [N, 1, 28, 28], augmented in training, normalised; on the device."""
        images, targets = batch[0].unsqueeze(1), batch[1]
        if self.augment and self.trainer and self.trainer.training:
            images = self.augment.to(images.device)(images.div(255)).mul_(255)
        images = images.sub(255 * self.mean).div_(255 * self.std)
        return (images.to(self.trainer.lightning_module.dtype) if self.trainer else images), targets

    def _loader(self, name: str) -> DataLoader:
        train = name == "train"
        return resumable_loader(
            self.sets[name],
            self.trainer,
            train,
            batch_size=self.batch_size if train else self.eval_batch_size,
            drop_last=self.drop_last and train,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=tuple,  # __getitems__ returns a batch
        )

    def _read(self, train: bool) -> tuple[Tensor, Tensor]:
        """The images, uint8 [N, 28, 28], and targets, int64 [N]."""
        raw = Path(self.data_dir, self.dataset.__name__, "raw")
        try:
            source = self.dataset(self.data_dir, train, download=True)
        except (OSError, RuntimeError, ValueError) as error:
            with contextlib.suppress(OSError):
                os.removedirs(raw)  # those that torchvision has created
            raise UserError(f"{raw} is incomplete or damaged ({error}): copy *.gz there, delete *-ubyte") from error
        return source.data, source.targets
