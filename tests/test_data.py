import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import FIT, QUIET, REPO, error_of, main, metrics_of
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torchvision import datasets

from mnist_cnn import LitClassifier, MNISTDataModule
from mnist_cnn.data import verify
from mnist_cnn.images import read_images, to_mnist

DATA = str(REPO / "data")
RAW = REPO / "data/MNIST/raw"


def module(**settings):
    data = MNISTDataModule(DATA, **settings)
    data.prepare_data()
    for stage in ("fit", "test"):
        data.setup(stage)
    return data


@pytest.fixture
def archives(tmp_path):
    """A data folder of its own, with the archives and nothing unpacked."""
    raw = tmp_path / "data/MNIST/raw"
    raw.mkdir(parents=True)
    for archive in RAW.glob("*.gz"):
        shutil.copy(archive, raw)
    return raw


def test_every_training_image_is_in_train_or_val_once():
    data = module()
    full = datasets.MNIST(DATA, train=True).data.sum(dim=(1, 2)).sort().values
    parts = [loader.dataset.images for loader in (data.train_dataloader(), data.val_dataloader())]
    assert [len(part) for part in parts] == [54000, 6000]
    assert torch.equal(torch.cat(parts).sum(dim=(1, 2)).sort().values, full)


def test_split_depends_on_its_own_seed_alone():
    def val(**settings):
        return module(**settings).val_dataloader().dataset.images

    torch.manual_seed(1)
    ours = val()
    torch.manual_seed(2)
    assert torch.equal(ours, val())
    assert torch.equal(ours, val(val_size=6000))
    assert not torch.equal(ours, val(split_seed=1))


def test_order_depends_on_seed_and_epoch_alone(monkeypatch):
    def order(seed, epoch):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        loader = module().train_dataloader()
        loader.sampler.set_epoch(epoch)
        torch.rand(seed + epoch)  # what else was drawn plays no part
        return list(loader.sampler)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    assert sorted(order(1, 0)) == list(range(54000))


def test_batches_are_whole_and_normalised_after_the_transfer():
    data = module(batch_size=100, mean=0.1307, std=0.3081)
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 540
    images, targets = batches[0]
    assert images.shape == (100, 28, 28) and images.dtype == torch.uint8
    assert targets.shape == (100,) and targets.dtype == torch.int64
    full = (loader.dataset.images, loader.dataset.targets)
    normalised, _ = data.on_after_batch_transfer(full, 0)
    assert normalised.shape == (54000, 1, 28, 28)
    assert abs(normalised.mean().item()) < 0.01 and abs(normalised.std().item() - 1) < 0.01


def test_augmentation_changes_each_training_image_by_itself_and_no_other(folder, monkeypatch):
    seen = {}

    def step(stage):
        original = getattr(LitClassifier, f"{stage}_step")

        def keep(self, batch, batch_idx):
            seen.setdefault(stage, []).append(batch[0])
            return original(self, batch, batch_idx)

        monkeypatch.setattr(LitClassifier, f"{stage}_step", keep)

    for stage in ("training", "validation", "test"):
        step(stage)
    options = ["--data.mean=0.1307", "--data.std=0.3081", "--trainer.max_epochs=1", "--trainer.limit_test_batches=1"]
    main([*FIT, *QUIET, *options])
    plain, seen = seen, {}
    main([*FIT, *QUIET, *options, "--data.augment+=kornia.augmentation.RandomHorizontalFlip"])
    assert torch.equal(plain["validation"][0], seen["validation"][0]) and torch.equal(plain["test"][0], seen["test"][0])
    kinds = set()
    for ours, theirs in zip(plain["training"][0], seen["training"][0]):
        kinds.add([torch.allclose(image, theirs, atol=1e-3) for image in (ours, ours.flip(2))].index(True))
    assert kinds == {0, 1}  # about half of the images each


def test_incomplete_last_batch_is_dropped_in_training_only():
    data = module(batch_size=1001, eval_batch_size=999)
    assert sum(len(targets) for _, targets in data.train_dataloader()) == 53 * 1001
    assert sum(len(targets) for _, targets in data.val_dataloader()) == 6000
    assert sum(len(targets) for _, targets in data.test_dataloader()) == 10000
    keeps = module(batch_size=1001, drop_last=False)
    assert sum(len(targets) for _, targets in keeps.train_dataloader()) == 54000


def test_workers_bring_the_same_batches():
    def first(num_workers):
        return next(iter(module(num_workers=num_workers).train_dataloader()))[0]

    assert torch.equal(first(0), first(2))


@pytest.mark.parametrize("dataset", ["MNIST", "FashionMNIST", "KMNIST"])
def test_class_names(dataset):
    assert len(MNISTDataModule(dataset=dataset).classes) == 10


def test_archives_are_unpacked_without_a_network(archives):
    verify(datasets.MNIST, str(archives.parents[1]))
    assert sorted(path.name for path in archives.iterdir() if path.suffix != ".gz") == [
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
    ]


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_unpacked_file_is_repaired(archives, damage):
    verify(datasets.MNIST, str(archives.parents[1]))
    victim = archives / "train-images-idx3-ubyte"
    good = victim.read_bytes()
    victim.write_bytes(good[:-1] if damage == "truncated" else good[:-1] + bytes([good[-1] ^ 1]))
    verify(datasets.MNIST, str(archives.parents[1]))
    assert victim.read_bytes() == good


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_damaged_archive_is_named(archives, damage, folder, capfd):
    victim = archives / "t10k-labels-idx1-ubyte.gz"
    good = victim.read_bytes()
    victim.write_bytes(good[:-9] if damage == "truncated" else good[:50] + b"!" + good[51:])
    line = error_of(capfd, *FIT, *QUIET, f"--data.data_dir={archives.parents[1]}")
    assert str(victim) in line and "delete it to download it anew" in line
    assert not (folder / "logs").exists()


def test_missing_archive_that_cannot_be_downloaded_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nothing listens there
    with pytest.raises(MisconfigurationException, match=r"train-images-idx3-ubyte.gz is missing and can't"):
        verify(datasets.MNIST, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_folder_that_cannot_be_written_is_named(archives):
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):  # as root, permissions would not do
        (archives / name).mkdir()
    with pytest.raises(MisconfigurationException, match=r"train-images-idx3-ubyte can't be unpacked .*writable"):
        verify(datasets.MNIST, str(archives.parents[1]))


def test_overfit_and_limits_keep_working(folder):
    cli = main([*FIT, *QUIET, "--trainer.overfit_batches=3", "--trainer.limit_train_batches=1.0"])
    assert cli.trainer.num_training_batches == 3
    assert cli.trainer.global_step == 6


def test_two_processes_see_each_test_image_once(folder):
    """The same checkpoint tested by one process and by two, over gloo."""
    main([*FIT, *QUIET])
    script = folder / "evaluate.py"  # an evaluation prints its numbers; this one keeps them too
    script.write_text(
        f"import json, sys\nsys.path.insert(0, {str(REPO)!r})\nfrom main import main\ncli = main()\n"
        "values = {name: value.item() for name, value in cli.trainer.callback_metrics.items()}\n"
        "if cli.trainer.is_global_zero:\n    json.dump(values, open(f'{cli.trainer.world_size}.json', 'w'))\n"
    )
    for processes, strategy in ((1, "auto"), (2, "ddp")):
        command = [sys.executable, str(script), "test", "--config=logs/mnist/version_0/config.yaml"]
        command += ["--data.eval_batch_size=333", "--trainer.limit_test_batches=1.0", "--trainer.accelerator=cpu"]
        command += [f"--trainer.devices={processes}", f"--trainer.strategy={strategy}"]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
    one, two = (json.loads((folder / f"{n}.json").read_text()) for n in (1, 2))
    assert one["test/acc"] == two["test/acc"]
    assert one["test/loss"] == pytest.approx(two["test/loss"], rel=1e-5)


# A user's own pictures


def picture(size=(200, 150), ink=0, paper=255, box=(60, 30, 90, 120), mode="L"):
    image = Image.new("L", size, paper)
    image.paste(ink, box)
    return image.convert(mode)


@pytest.mark.parametrize(("ink", "paper"), [(0, 255), (255, 0), (40, 200)])
def test_any_ink_on_any_paper_becomes_white_on_black(ink, paper):
    digit = to_mnist(picture(ink=ink, paper=paper))
    assert digit.shape == (28, 28) and digit.dtype == torch.uint8
    assert digit.max() == 255 and digit[0].sum() == digit[-1].sum() == 0
    rows = digit.float().sum(dim=1).nonzero()
    assert len(rows) == 20  # the longer side fills the box of 20


def test_mass_is_centred_as_in_mnist():
    digit = to_mnist(picture()).double()
    at = torch.arange(28, dtype=torch.double)
    assert abs((digit.sum(dim=1) @ at / digit.sum()).item() - 14) <= 0.5
    assert abs((digit.sum(dim=0) @ at / digit.sum()).item() - 14) <= 0.5


def test_mnist_images_come_back_as_they_were():
    """An MNIST image pasted somewhere on white paper, four times as large, is found again."""
    images = datasets.MNIST(DATA, train=False).data[:50]
    difference = []
    for image in images:
        large = Image.fromarray(255 - image.numpy()).resize((112, 112), Image.Resampling.BICUBIC)
        paper = Image.new("L", (300, 200), 255)
        paper.paste(large, (150, 20))
        difference.append((to_mnist(paper).float() - image.float()).abs().mean().item())
    assert np.mean(difference) < 12  # of 255


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I", "I;16", "F"])
def test_any_mode(mode, tmp_path):
    if mode == "I;16":
        image = Image.fromarray(np.asarray(picture(), dtype=np.uint16) * 257)
    elif mode in ("I", "F"):
        image = Image.fromarray(np.asarray(picture()).astype(np.int32 if mode == "I" else np.float32))
    else:
        image = picture(mode="L").convert(mode)
    assert (to_mnist(image).int() - to_mnist(picture()).int()).abs().max() <= 2


def test_transparent_paper_counts_as_white():
    image = Image.new("RGBA", (100, 100), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (40, 20, 50, 80))
    assert to_mnist(image).max() == 255


def test_folder_is_read_by_name_and_its_broken_files_are_named(tmp_path):
    picture().save(tmp_path / "b.png")
    picture(mode="RGB").save(tmp_path / "a.JPG", format="JPEG")
    (tmp_path / "c.png").write_bytes(b"no image")
    Image.new("L", (50, 50), 255).save(tmp_path / "blank.png")
    (tmp_path / "notes.txt").write_text("not looked at")
    images, names, unreadable = read_images(str(tmp_path))
    assert names == ["a.JPG", "b.png"] and images.shape == (2, 28, 28)
    assert [line.split()[0] for line in unreadable] == ["blank.png", "c.png"]


def test_metrics_do_not_depend_on_the_evaluation_batch(folder):
    main([*FIT, *QUIET, "--data.eval_batch_size=1000", "--trainer.limit_test_batches=1"])
    main([*FIT, *QUIET, "--data.eval_batch_size=500", "--trainer.limit_test_batches=2"])
    ours, theirs = (metrics_of(folder / f"logs/mnist/version_{n}") for n in (0, 1))
    assert ours["test/acc"] == theirs["test/acc"]
    assert ours["test/loss"] == pytest.approx(theirs["test/loss"], rel=1e-6)
