import csv
import os
from pathlib import Path

import pytest
import torch
from conftest import BASE, FIT, QUIET, error_of, main
from PIL import Image
from torchvision import datasets


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint that tells digits apart, more often than not."""
    patch = pytest.MonkeyPatch()
    patch.chdir(tmp_path_factory.mktemp("trained"))
    folder = Path.cwd()
    cli = main([*FIT, *QUIET, "--trainer.limit_train_batches=400", "--data.mean=0.1307", "--data.std=0.3081"])
    patch.undo()
    return folder / cli.run_dir


def predict(run, *args):
    main(["predict", "--config", str(run / "config.yaml"), "--ckpt_path=best", *args])


def rows(path="predictions.csv"):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_test_set(trained, folder):
    predict(trained)
    table = rows()
    assert [int(row["index"]) for row in table] == list(range(10000))
    assert list(table[0]) == ["index", "predicted", *(f"p{digit}" for digit in range(10))]
    targets = datasets.MNIST(str(BASE[2]).partition("=")[2], train=False).targets
    predicted = torch.tensor([int(row["predicted"]) for row in table])
    probabilities = torch.tensor([[float(row[f"p{digit}"]) for digit in range(10)] for row in table])
    assert torch.equal(probabilities.argmax(dim=1), predicted)
    assert (probabilities.sum(dim=1) - 1).abs().max() < 1e-4
    accuracy = main(["test", "--config", str(trained / "config.yaml"), "--trainer.limit_test_batches=1.0"])
    assert (predicted == targets).float().mean().item() == pytest.approx(
        accuracy.trainer.callback_metrics["test/acc"].item(), abs=1e-6
    )


def test_own_images(trained, folder):
    """MNIST digits drawn large, in black on white, are mostly recognised."""
    test = datasets.MNIST(str(BASE[2]).partition("=")[2], train=False)
    (folder / "my_digits").mkdir()
    for index in range(40):
        image = Image.fromarray(255 - test.data[index].numpy()).resize((280, 280)).convert("RGB")
        image.save(folder / f"my_digits/{index:02}.png")
    predict(trained, "--data.predict_dir=my_digits", "--predictions.path=out/mine.csv")
    table = rows("out/mine.csv")
    assert [row["file"] for row in table] == [f"{index:02}.png" for index in range(40)]
    own = sum(int(row["predicted"]) == target for row, target in zip(table, test.targets.tolist()))
    predict(trained)
    original = sum(int(row["predicted"]) == target for row, target in zip(rows(), test.targets.tolist()[:40]))
    assert own >= original - 4


def test_broken_image_is_named_and_the_others_predicted(trained, folder, capfd):
    Image.new("L", (9, 9)).save(folder / "blank.png")
    Image.linear_gradient("L").save(folder / "good.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    line = error_of(
        capfd, "predict", "--config", str(trained / "config.yaml"), "--ckpt_path=best", f"--data.predict_dir={folder}"
    )
    assert "blank.png (blank" in line and "broken.jpg (cannot identify" in line
    assert [row["file"] for row in rows()] == ["good.png"]


def test_file_name_that_is_not_utf8(trained, folder):
    name = b"caf\xe9.png"
    try:
        (folder / os.fsdecode(name)).touch()
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    Image.linear_gradient("L").save(folder / os.fsdecode(name), format="PNG")
    predict(trained, f"--data.predict_dir={folder}")
    assert name in (folder / "predictions.csv").read_bytes()


def test_own_images_need_no_mnist(trained, folder):
    Image.linear_gradient("L").save(folder / "good.png")
    predict(trained, f"--data.predict_dir={folder}", "--data.data_dir=nowhere")
    assert len(rows()) == 1 and not (folder / "nowhere").exists()


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_folder_without_images(trained, folder, capfd, name):
    (folder / "empty").mkdir()
    line = error_of(
        capfd, "predict", "--config", str(trained / "config.yaml"), "--ckpt_path=best", f"--data.predict_dir={name}"
    )
    assert f"predict_dir {name}" in line
    assert not (folder / "predictions.csv").exists()
