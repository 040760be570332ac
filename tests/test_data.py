"""MNIST in memory: which images, in which order, and what a broken archive leads to; a user's own images."""

import shutil

import numpy as np
import pytest
import torch
from conftest import BRIEF, DATA, FIT, QUIET, callback_of, error_of, main, mnist
from PIL import Image
from torchvision import datasets

from mnist_cnn import MNISTDataModule
from mnist_cnn.images import read_images, to_mnist

RECORD = "--trainer.callbacks+=probes.Record"


def module(data_dir=DATA, **settings):
    data = MNISTDataModule(str(data_dir), **settings)
    data.prepare_data()
    for stage in ("fit", "test"):
        data.setup(stage)
    return data


def recorded(*args):
    """The batches that the model got, by stage and epoch."""
    cli = main([*BRIEF, RECORD, *args])
    return callback_of(cli, "Record").batches | cli.evaluation_callbacks[0].batches  # copies


def sums(images):
    """What identifies a set of images, in any order."""
    return (images.flatten(1).float() @ (torch.arange(784) % 80).float()).sort().values  # exact below 2**24


def test_every_training_image_is_in_train_or_val_once():
    data = module(batch_size=1000, num_workers=1)
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    train, val, test = (torch.cat([images for images, _ in loader]) for loader in loaders)
    assert (len(train), len(val), len(test)) == (54_000, 6_000, 10_000)
    assert torch.equal(sums(torch.cat([train, val])), sums(mnist("train")[0]))
    assert torch.equal(test.squeeze(), mnist("t10k")[0])
    assert torch.equal(next(iter(module(batch_size=1000).train_dataloader()))[0], train[:1000])  # without a worker


def test_the_split_depends_on_its_own_seed_alone():
    def val(**settings):
        return next(iter(module(**settings).val_dataloader()))[0]

    torch.manual_seed(1)
    ours = val()
    torch.manual_seed(2)
    assert torch.equal(ours, val(val_size=6000))
    assert not torch.equal(ours, val(split_seed=1))


def test_the_order_depends_on_seed_and_epoch_alone(folder):
    ours, same = recorded("--seed_everything=1"), recorded("--seed_everything=1", "--model.net=probes.Dropping")
    other = recorded("--seed_everything=2")

    def images(batches, epoch):
        return torch.cat([images for images, _ in batches["train", epoch]])

    for epoch in (0, 1):
        assert torch.equal(images(ours, epoch), images(same, epoch))
        assert not torch.equal(images(ours, epoch), images(other, epoch))
    assert not torch.equal(images(ours, 0), images(ours, 1))


def test_an_incomplete_last_batch_is_dropped_in_training_only():
    data = module(batch_size=1001, eval_batch_size=999)
    assert len(data.train_dataloader()) == 53
    assert {len(targets) for _, targets in data.train_dataloader()} == {1001}
    assert sum(len(targets) for _, targets in data.val_dataloader()) == 6_000
    assert sum(len(targets) for _, targets in data.test_dataloader()) == 10_000
    assert sum(len(targets) for _, targets in module(batch_size=1001, drop_last=False).train_dataloader()) == 54_000


def test_images_are_normalised_and_augmented_each_by_itself_in_training_only(folder):
    plain = recorded("--trainer.max_epochs=1")
    images, targets = plain["test", 1][0]
    expected, digits = mnist("t10k")
    assert images.dtype == torch.float32 and targets.dtype == torch.int64
    assert torch.allclose(images, (expected[:500, None] / 255 - 0.1307) / 0.3081, atol=1e-5)
    assert torch.equal(targets, digits[:500])
    flipped = recorded("--trainer.max_epochs=1", "--data.augment+=kornia.augmentation.RandomHorizontalFlip")
    for stage, epoch in (("val", 0), ("test", 1)):
        assert torch.equal(plain[stage, epoch][0][0], flipped[stage, epoch][0][0])
    pairs = zip(plain["train", 0][0][0], flipped["train", 0][0][0])
    kinds = [[torch.allclose(image, ours, atol=1e-3) for image in (theirs, theirs.flip(2))] for theirs, ours in pairs]
    assert all(map(any, kinds)) and {kind.index(True) for kind in kinds} == {0, 1}  # about half of the images each


def test_metrics_do_not_depend_on_the_evaluation_batch(fitted):
    whole = [fitted.config, "--trainer.limit_test_batches=1.0"]
    ours, theirs = (main(["test", *whole, f"--data.eval_batch_size={n}"]).trainer.callback_metrics for n in (333, 1000))
    assert ours["test/acc"] == theirs["test/acc"]
    assert ours["test/loss"].item() == pytest.approx(theirs["test/loss"].item(), rel=1e-6)


def test_overfit_batches(folder):
    cli = main([*FIT, *QUIET, "--trainer.overfit_batches=3", "--trainer.limit_train_batches=1.0"])
    assert (cli.trainer.num_training_batches, cli.trainer.global_step) == (3, 6)


def test_class_names():
    assert [len(MNISTDataModule(dataset=f"{kind}MNIST").classes) for kind in ("", "Fashion", "K")] == [10, 10, 10]


@pytest.fixture
def archives(folder, monkeypatch):
    """A data folder of its own, into which nothing can be downloaded."""
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nothing listens there
    return shutil.copytree(DATA / "MNIST/raw", folder / "copy/MNIST/raw", ignore=shutil.ignore_patterns("*-ubyte"))


@pytest.mark.parametrize("damage", ["truncated", "altered", "no archive"])
def test_a_damaged_archive_is_named(archives, damage, folder, capfd):
    victim = archives / "train-labels-idx1-ubyte.gz"
    good = victim.read_bytes()
    damaged = {"truncated": good[:-9], "altered": good[:9000] + b"!!" + good[9002:], "no archive": b"no archive"}
    victim.write_bytes(damaged[damage])
    line = error_of(capfd, *FIT, *QUIET, f"--data.data_dir={archives.parents[1]}")
    assert str(archives) in line and victim.name in line
    assert not (folder / "logs").exists()


def test_archives_are_unpacked_once(archives, folder, capfd):
    assert len(module(archives.parents[1]).test_dataloader()) == 10
    for archive in archives.glob("*.gz"):
        archive.unlink()
    assert len(module(archives.parents[1]).test_dataloader()) == 10
    unpacked = archives / "train-images-idx3-ubyte"
    unpacked.write_bytes(unpacked.read_bytes()[:-9])  # the disk was full
    line = error_of(capfd, *FIT, *QUIET, f"--data.data_dir={archives.parents[1]}")
    assert str(archives) in line and "damaged" in line


def test_a_missing_archive_that_cannot_be_downloaded_is_named(archives, folder, capfd):
    shutil.rmtree(folder / "copy")
    line = error_of(capfd, *FIT, *QUIET, "--data.data_dir=new")
    assert "new/MNIST/raw" in line and "ubyte.gz" in line
    assert list(folder.iterdir()) == []


# A user's own images


def picture(size=(200, 150), ink=0, paper=255, box=(60, 30, 90, 120)):
    image = Image.new("L", size, paper)
    image.paste(ink, box)
    return image


@pytest.mark.parametrize(("ink", "paper"), [(0, 255), (255, 0), (40, 200)])
def test_any_ink_on_any_paper_becomes_white_on_black(ink, paper):
    digit = to_mnist(picture(ink=ink, paper=paper))
    assert digit.shape == (28, 28) and digit.dtype == torch.uint8
    assert digit.max() == 255 and digit[0].sum() == digit[-1].sum() == 0
    assert len(digit.float().sum(dim=1).nonzero()) == 20  # the longer side fills the box of 20
    at = torch.arange(28, dtype=torch.double)
    for dimension in (0, 1):  # centred by mass
        assert abs((digit.double().sum(dim=dimension) @ at / digit.sum()).item() - 14) <= 0.5


def test_mnist_images_come_back_as_they_were():
    """An MNIST image pasted somewhere on white paper, four times as large, is found again."""
    difference = []
    for image in mnist("t10k")[0][:50]:
        large = Image.fromarray(255 - image.numpy()).resize((112, 112), Image.Resampling.BICUBIC)
        paper = Image.new("L", (300, 200), 255)
        paper.paste(large, (150, 20))
        difference.append((to_mnist(paper).float() - image.float()).abs().mean().item())
    assert np.mean(difference) < 12  # of 255


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I", "I;16", "F"])
def test_any_mode(mode):
    if mode == "I;16":
        image = Image.fromarray(np.asarray(picture(), dtype=np.uint16) * 257)
    elif mode in ("I", "F"):
        image = Image.fromarray(np.asarray(picture()).astype(np.int32 if mode == "I" else np.float32))
    else:
        image = picture().convert(mode)
    assert (to_mnist(image).int() - to_mnist(picture()).int()).abs().max() <= 2


def test_transparent_paper_counts_as_white():
    image = Image.new("RGBA", (100, 100), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (40, 20, 50, 80))
    assert to_mnist(image).max() == 255


def test_a_folder_is_read_by_name_and_its_broken_files_are_named(tmp_path):
    picture().save(tmp_path / "b.png")
    picture().convert("RGB").save(tmp_path / "a.JPG", format="JPEG")
    (tmp_path / "c.png").write_bytes(b"no image")
    Image.new("L", (50, 50), 255).save(tmp_path / "blank.png")
    (tmp_path / "notes.txt").write_text("not looked at")
    (tmp_path / "more").mkdir()
    for suffix in ("bmp", "tif", "webp"):
        picture().convert("RGB").save(tmp_path / f"more/d.{suffix}")
    images, names, unreadable = read_images(str(tmp_path))
    assert names == ["a.JPG", "b.png", "more/d.bmp", "more/d.tif", "more/d.webp"]
    assert torch.equal(images[1], images[2]) and torch.equal(images[1], images[3])
    single, name, _ = read_images(str(tmp_path / "b.png"))
    assert torch.equal(single, images[1:2]) and name == ["b.png"]
    assert [line.split()[0] for line in unreadable] == ["blank.png", "c.png"]
