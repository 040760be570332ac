import csv
import os

import pytest
import torch
from conftest import BRIEF, error_of, main, mnist
from PIL import Image


def predict(config, *args):
    main(["predict", config, "--ckpt_path=best", *args])


def rows(path="predictions.csv"):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_own_images_and_the_test_set(folder):
    """MNIST digits drawn large, in black on white, are recognised about as well as the originals."""
    train = ["--trainer.limit_train_batches=400", "--trainer.max_epochs=1"]
    main([*BRIEF, *train])
    config = "--config=logs/mnist/version_0/config.yaml"
    images, targets = mnist("t10k")
    (folder / "my_digits").mkdir()
    for index in range(40):
        image = Image.fromarray(255 - images[index].numpy()).resize((280, 280)).convert("RGB")
        image.save(f"my_digits/{index:02}.png")
    predict(config, "--data.predict_dir=my_digits", "--predictions.path=out/mine.csv")
    own = rows("out/mine.csv")
    assert [row["file"] for row in own] == [f"{index:02}.png" for index in range(40)]
    predict(config)
    table = rows()
    assert [int(row["index"]) for row in table] == list(range(10_000))
    assert list(table[0]) == ["index", "predicted", *(f"p{digit}" for digit in range(10))]
    predicted = torch.tensor([int(row["predicted"]) for row in table])
    probabilities = torch.tensor([[float(row[f"p{digit}"]) for digit in range(10)] for row in table])
    assert torch.equal(probabilities.argmax(dim=1), predicted)
    assert (probabilities.sum(dim=1) - 1).abs().max() < 1e-4
    cli = main(["test", config, "--trainer.limit_test_batches=1.0"])
    right = predicted == targets
    assert right.float().mean().item() == pytest.approx(cli.trainer.callback_metrics["test/acc"].item(), abs=1e-6)
    assert right[:40].sum() > 20
    assert sum(int(row["predicted"]) == target for row, target in zip(own, targets.tolist())) >= right[:40].sum() - 4


def test_a_broken_image_is_named_and_the_others_predicted(fitted, folder, capfd):
    """Without MNIST, which these images don't need."""
    name = os.fsdecode(b"caf\xe9.png")  # not UTF-8
    Image.new("L", (9, 9)).save("blank.png")
    Image.linear_gradient("L").save(name, format="PNG")
    (folder / "broken.jpg").write_bytes(b"no image")
    options = [f"--data.predict_dir={folder}", "--data.data_dir=nowhere"]
    line = error_of(capfd, "predict", fitted.config, "--ckpt_path=best", *options)
    assert "blank.png" in line and "broken.jpg" in line and "caf" not in line
    assert (folder / "predictions.csv").read_bytes().splitlines()[1].startswith(os.fsencode(name) + b",")
    assert len(rows_of_bytes := (folder / "predictions.csv").read_bytes().splitlines()) == 2, rows_of_bytes
    assert not (folder / "nowhere").exists()


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_folder_without_images_is_named(fitted, folder, capfd, name):
    (folder / "empty").mkdir()
    line = error_of(capfd, "predict", fitted.config, "--ckpt_path=best", f"--data.predict_dir={name}")
    assert "predict_dir" in line and name in line
    assert not (folder / "predictions.csv").exists()
