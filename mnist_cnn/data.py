"""MNISTDataModule: MNIST and its drop-in siblings, held in memory as uint8 and cut into whole batches.

One epoch through a Dataset that returns one image at a time costs several times what the net costs. Here the
DataLoader asks its dataset for a whole batch (`__getitems__`), which is one indexing operation; the batch becomes
float and is normalised after it has been moved to the device.
"""

import itertools
import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import datasets
from torchvision.datasets.utils import check_integrity, download_url, extract_archive

from mnist_cnn.images import read_images


class TensorBatches(Dataset):
    """A dataset whose unit is the batch: `__getitems__` gathers all images of a batch at once.

    Args:
        images: uint8 [N, H, W].
        targets: int64 [N].
    """

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        self.images = images
        self.targets = targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(indices)
        return self.images.index_select(0, index), self.targets[index]  # faster than [index]


class ResumableLoader(DataLoader):
    """A DataLoader that goes on in the middle of an epoch.

    It begins at its first batch, not before: Lightning asks for an iterator before it knows where a resumed run stands.
    """

    epoch: Any = None  # the trainer's loop over it

    def __iter__(self) -> Any:
        done = self.epoch.batch_progress.current.processed if self.epoch and self.epoch.restarting else 0
        yield from itertools.islice(super().__iter__(), done, None)


def _as_it_is(batch: Any) -> Any:
    """Collates a batch that is one already."""
    return batch


class MNISTDataModule(LightningDataModule):
    """MNIST, Fashion-MNIST or KMNIST: batches of images [N, 1, 28, 28], normalised, and targets [N].

    The order of the training images in epoch k depends on `seed_everything` and k alone, so a resumed run sees what
    an uninterrupted one sees. Which images are held out for validation depends on `split_seed` alone.

    Args:
        data_dir: Folder that holds MNIST/raw/*.gz; missing archives are downloaded into it.
        dataset: Which of torchvision's datasets.
        batch_size: Images a training step, in each process.
        val_size: Held out of the 60,000 training images: a number of images, or a fraction below 1.
        split_seed: Chooses the images held out.
        eval_batch_size: Images a step in validation, test and prediction; changes speed and memory only.
        drop_last: Whether an incomplete last training batch is dropped.
        mean: Subtracted from pixels in [0, 1]. Default: the mean of MNIST's training images.
        std: Divides pixels in [0, 1]. Default: the standard deviation of MNIST's training images.
        num_workers: Worker processes of a DataLoader; 0 is fastest for images in memory.
        predict_dir: Folder of PNG or JPEG files to predict instead of the test set.
        augment: Modules that change the training images one after another, on the device, before they are normalised:
            from [N, 1, H, W] in [0, 1] to the same, each image by its own random numbers, as those of
            kornia.augmentation do.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        data_dir: str = "data",
        dataset: Literal["MNIST", "FashionMNIST", "KMNIST"] = "MNIST",
        batch_size: int = 64,
        val_size: int | float = 0.1,
        split_seed: int = 0,
        eval_batch_size: int = 1000,
        drop_last: bool = True,
        mean: float = 0.1307,
        std: float = 0.3081,
        num_workers: int = 0,
        predict_dir: str | None = None,
        augment: list[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        for name, value, lowest in [
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("val_size", val_size, 0),
            ("num_workers", num_workers, 0),
        ]:
            if value < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {value}")
        if isinstance(val_size, float) and not val_size < 1:
            raise ValueError(f"val_size must be a whole number of images or a fraction below 1, got {val_size}")
        if not std > 0:
            raise ValueError(f"std must be above 0, got {std}")
        self.data_dir = data_dir
        self.dataset = getattr(datasets, dataset)
        self.classes = [name.split(" - ")[0] for name in self.dataset.classes]  # MNIST's are called "0 - zero"
        self.batch_size = batch_size
        self.val_size = val_size
        self.split_seed = split_seed
        self.eval_batch_size = eval_batch_size
        self.drop_last = drop_last
        self.mean = mean
        self.std = std
        self.num_workers = num_workers
        self.predict_dir = predict_dir
        self.augment = nn.Sequential(*(augment or []))
        self._verified = False
        self._sets: dict[str, TensorBatches] = {}  # train, val, test, predict, as far as they have been read
        self.predict_names: list[str] = []
        self.unreadable: list[str] = []  # files of predict_dir that are no images, each with the reason

    def prepare_data(self) -> None:
        """Verifies and unpacks the archives; downloads those that are missing.

        Raises:
            MisconfigurationException: If a file is damaged, missing or can't be written.
        """
        predicts_files = self.predict_dir is not None and self.trainer is not None and self.trainer.predicting
        if not predicts_files and not self._verified:
            verify(self.dataset, self.data_dir)
            self._verified = True

    def setup(self, stage: str) -> None:
        """Reads what the stage needs; what has been read stays.

        Raises:
            MisconfigurationException: If val_size or batch_size don't fit the set, or predict_dir has no images.
        """
        if stage in ("fit", "validate") and "train" not in self._sets:
            images, targets = self._read("train")
            num_val = round(self.val_size * len(images)) if isinstance(self.val_size, float) else self.val_size
            num_train = len(images) - num_val
            if num_train < self.batch_size:
                raise MisconfigurationException(
                    f"val_size={self.val_size} leaves {max(num_train, 0)} of the {len(images)} images to train on,"
                    f" less than one batch of {self.batch_size}"
                )
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.split_seed))
            for name, index in (("val", order[:num_val]), ("train", order[num_val:])):
                self._sets[name] = TensorBatches(images[index], targets[index])
        if stage == "test" or (stage == "predict" and self.predict_dir is None):
            if "test" not in self._sets:
                self._sets["test"] = TensorBatches(*self._read("t10k"))
            if stage == "predict":
                self._sets["predict"] = self._sets["test"]
                self.predict_names = [str(index) for index in range(len(self._sets["test"]))]
        elif stage == "predict" and self.predict_dir is not None:
            images, self.predict_names, self.unreadable = read_images(self.predict_dir)
            self._sets["predict"] = TensorBatches(images, torch.full([len(images)], -1))

    def train_dataloader(self) -> DataLoader:
        """Batches in an order that depends on seed and epoch alone; a resumed epoch goes on where it was left."""
        # Lightning leaves a DistributedSampler alone and tells it the epoch, in one process as in several.
        sampler: DistributedSampler = DistributedSampler(
            self._sets["train"],
            *self._replicas(),
            shuffle=True,
            seed=_seed(),
            drop_last=self.drop_last,
        )
        loader = self._loader(self._sets["train"], sampler, self.batch_size, drop_last=self.drop_last)
        loader.epoch = self.trainer and self.trainer.fit_loop.epoch_loop
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
        return loader

    def val_dataloader(self) -> DataLoader | list:
        """Every validation image once, in order."""
        return self._eval_loader(self._sets["val"])

    def test_dataloader(self) -> DataLoader | list:
        """Every test image once, in order."""
        return self._eval_loader(self._sets["test"])

    def predict_dataloader(self) -> DataLoader | list:
        """Every image to predict once, in order."""
        return self._eval_loader(self._sets["predict"])

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Turns uint8 [N, 28, 28] to float [N, 1, 28, 28], augmented in training, normalised; on the device."""
        images, targets = batch
        module = self.trainer and self.trainer.lightning_module
        dtype = module.dtype if module else torch.float32  # trainer.precision may ask for another
        images = images.unsqueeze(1).float()
        if self.augment and self.trainer and self.trainer.training:
            images = self.augment.to(images)(images.div_(255)).mul_(255)
        if self.mean:
            images.sub_(255 * self.mean)
        return images.div_(255 * self.std).to(dtype), targets

    def _read(self, name: str) -> tuple[Tensor, Tensor]:
        """Images uint8 [N, H, W] and targets int64 [N] of train or t10k."""
        raw = Path(self.data_dir, self.dataset.__name__, "raw")
        return read_idx(raw / f"{name}-images-idx3-ubyte"), read_idx(raw / f"{name}-labels-idx1-ubyte").long()

    def _replicas(self) -> tuple[int, int]:
        """Number of processes and the rank of this one."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _eval_loader(self, dataset: TensorBatches) -> DataLoader | list:
        if not len(dataset):
            return []
        replicas = self._replicas()
        # Unlike torch's, this sampler repeats no image to make the processes' shares equal.
        sampler = UnrepeatedDistributedSampler(dataset, *replicas, shuffle=False) if replicas[0] > 1 else None
        return self._loader(dataset, sampler, self.eval_batch_size, drop_last=False)

    def _loader(self, dataset: TensorBatches, sampler: Any, batch_size: int, drop_last: bool) -> ResumableLoader:
        return ResumableLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=_as_it_is,
            # A DataLoader draws from its generator; the global one is the model's.
            generator=torch.Generator().manual_seed(_seed()),
        )


def read_idx(path: Path) -> Tensor:
    """The content of a file in MNIST's format, mapped and not copied, as torchvision would three times.

    The format, as its authors describe it: two zero bytes, type, number of dimensions, their sizes, values.

    Args:
        path: The file; its type is unsigned byte.

    Returns:
        uint8, of the shape that the file says.
    """
    with open(path, "rb") as file:
        dimensions = file.read(4)[3]
        shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
    content = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    return content[4 + 4 * dimensions :].view(shape)


def _seed() -> int:
    """That of seed_everything; 0 where it is off."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def verify(dataset: type[datasets.MNIST], data_dir: str) -> None:
    """Sees to it that each archive has its MD5 and each unpacked file is what its archive holds.

    Args:
        dataset: A dataset of torchvision's in MNIST's format.
        data_dir: Folder in which its own folder lies.

    Raises:
        MisconfigurationException: If that can't be had; names the file and the remedy.
    """
    raw = Path(data_dir, dataset.__name__, "raw")

    def verify_one(name: str, md5: str) -> None:
        archive, unpacked = raw / name, (raw / name).with_suffix("")
        is_unpacked = threads.submit(_is_content_of, unpacked, archive)
        if archive.exists() and not check_integrity(archive, md5):
            raise MisconfigurationException(
                f"{archive} is damaged (its MD5 is not {md5}): delete it to download it anew, or restore it with git"
            )
        if not archive.exists():
            _download(dataset, raw, name, md5)
        try:
            if not is_unpacked.result():
                unpacked.unlink(missing_ok=True)  # an interrupted unpack
                extract_archive(str(archive), str(raw))
        except OSError as error:
            raise MisconfigurationException(
                f"{unpacked} can't be unpacked ({error.strerror}): make the folder writable, or copy it and give the"
                " copy as data_dir"
            ) from error

    with ThreadPoolExecutor(2 * len(dataset.resources)) as threads:  # checksums release the interpreter's lock
        list(threads.map(verify_one, *zip(*dataset.resources)))


def _download(dataset: type[datasets.MNIST], raw: Path, name: str, md5: str) -> None:
    new = not raw.exists()
    for mirror in dataset.mirrors:
        try:
            return download_url(mirror + name, raw, md5=md5)
        except (OSError, RuntimeError) as error:  # URLError is an OSError; RuntimeError: the MD5 differs
            reason = error
    if new and raw.exists():
        os.removedirs(raw)
    raise MisconfigurationException(f"{raw / name} is missing and can't be downloaded ({reason}): put it there by hand")


def _is_content_of(unpacked: Path, archive: Path) -> bool:
    """Whether the file has the CRC-32 and the length that end the gzip archive (RFC 1952, 2.3.1)."""
    if not (archive.exists() and unpacked.exists() and (size := unpacked.stat().st_size)):
        return False
    trailer = zlib.crc32(np.memmap(unpacked, mode="r").data).to_bytes(4, "little") + size.to_bytes(4, "little")
    return archive.read_bytes()[-8:] == trailer
