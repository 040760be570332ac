"""One short run with everything on, looked at from all sides; then runs with one thing different."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import BRIEF, DATA, FIT, RUN, RUNS, error_of, main, metrics_of, mnist
from lightning.pytorch import LightningModule
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.plugins.hparams import metadata
from torch.nn import functional as F

from mnist_cnn import CNN, LitClassifier, MNISTDataModule

LAYERS = ["conv1", "relu1", "conv2", "relu2", "conv3", "relu3", "fc1", "relu4", "fc2"]
METRICS = ["val/loss", "val/acc", "test/loss", "test/acc"]


def events_of(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run), size_guidance={"histograms": 0, "scalars": 0}).Reload()


@pytest.fixture(scope="module")
def events(fitted):
    return events_of(fitted.run)


def first_step(seed: int, net):
    """The first step done by hand: logits, targets, and the outputs and gradients by the tags of the histograms."""
    data = MNISTDataModule(str(DATA))
    data.prepare_data()
    data.setup("fit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", str(seed))
        images, targets = next(iter(data.train_dataloader()))
    values = {}
    for name, module in net.named_children():
        module.register_forward_hook(lambda _, __, output, name=name: values.setdefault(f"act/net.{name}", output))
    logits = net(normalised(images))
    F.cross_entropy(logits, targets).backward()
    for name, parameter in net.named_parameters():
        values |= {f"param/net.{name}": parameter, f"grad/net.{name}": parameter.grad}
    return logits.detach(), targets, values


def normalised(images):
    return images.unsqueeze(1).float().div(255).sub(0.1307).div(0.3081)


def small_net():
    torch.manual_seed(42)
    return CNN(4, 8, 16, 64)


def test_the_folder_holds_the_run_and_nothing_else(fitted):
    names = {path.name for path in fitted.run.iterdir() if not path.name.startswith("events.out.tfevents")}
    assert names == {"config.yaml", "metrics.json", "checkpoints"}
    assert len(list(fitted.run.glob("events*"))) == 1
    assert len(list((fitted.run / "checkpoints").glob("*.ckpt"))) == len(os.listdir(fitted.run / "checkpoints")) == 3
    assert sorted(os.listdir(fitted.folder)) == ["logs"] and sorted(os.listdir(fitted.folder / "logs")) == [
        "mnist",
        "wandb",
    ]


def test_a_line_an_epoch_and_a_table_are_printed(fitted):
    lines = fitted.out.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("epoch")] == [["epoch", "0"], ["epoch", "1"]]
    assert len(lines) <= 10 and "\r" not in fitted.out
    for name in METRICS:
        assert [name, f"{metrics_of(fitted.run)[name]:.4f}"] in [line.split() for line in lines]
    assert str(RUN) in lines[-2] + lines[-1]
    assert "wandb" not in fitted.err.lower() and "warn" not in fitted.err.lower()


def test_metrics_are_those_of_the_best_checkpoint(fitted):
    metrics = json.loads((fitted.run / "metrics.json").read_text())
    assert list(metrics) == [*METRICS, "epochs", "seconds", "best_checkpoint"]
    assert metrics["epochs"] == 2 and metrics["seconds"] > 0
    score = fitted.cli.trainer.checkpoint_callback.best_model_score.item()
    assert metrics["val/loss"] == pytest.approx(score, rel=1e-6)


def test_validate_and_test_say_what_metrics_json_says(fitted, monkeypatch):
    monkeypatch.chdir(fitted.folder)
    expected = metrics_of(fitted.run)
    for stage, prefix, which in (
        ("validate", "val", "best"),
        ("test", "test", fitted.run / expected["best_checkpoint"]),
    ):
        found = main([stage, fitted.config, f"--ckpt_path={which}"]).trainer.callback_metrics
        assert found.keys() == {f"{prefix}/loss", f"{prefix}/acc"}
        for name, value in found.items():
            assert value.item() == expected[name]
    last = main(["test", fitted.config, "--ckpt_path=last"])
    weights = torch.load(fitted.run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, weights[name]) for name, value in last.model.state_dict().items())
    assert os.listdir(RUNS) == ["version_0"]  # an evaluation is no run


@pytest.mark.parametrize("loader", [LightningModule, LitClassifier])
def test_a_checkpoint_alone_gives_the_model_back(fitted, loader):
    path = fitted.run / metrics_of(fitted.run)["best_checkpoint"]
    model = loader.load_from_checkpoint(path, weights_only=True)
    assert isinstance(model, LitClassifier)
    best = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())
    images, targets = mnist("t10k")
    loss = F.cross_entropy(model.eval()(normalised(images[:1000])), targets[:1000])
    assert loss.item() == pytest.approx(metrics_of(fitted.run)["test/loss"], rel=1e-5)


# TensorBoard


def test_scalars_are_logged_at_the_logging_interval(fitted, events):
    assert set(events.Tags()["scalars"]) >= {"train/loss", "train/acc", *METRICS, "lr-SGD"}
    assert "hp_metric" not in events.Tags()["scalars"]
    assert [event.step for event in events.Scalars("train/loss")] == [4, 9, 14, 19, 24, 29, 34, 39]
    assert events.Scalars("lr-SGD")[0].value == pytest.approx(0.1)
    for name in METRICS:
        assert events.Scalars(name)[-1].value == pytest.approx(metrics_of(fitted.run)[name], rel=1e-6)


def test_hparams_have_settings_and_metrics(fitted, events):
    summary = events.SummaryMetadata("_hparams_/session_start_info")
    row = metadata.parse_session_start_info_plugin_data(summary.plugin_data.content).hparams
    assert row["model.net"].string_value == "CNN" and row["seed_everything"].number_value == 42
    assert row["model.net.l1_chan"].number_value == 4 and row["model.optimizer.lr"].number_value == 0.1


def test_the_graph_names_the_layers(events):
    graph = GraphDef.FromString(events._graph)
    nodes = {node.name.split("/")[1] for node in graph.node if "/" in node.name}
    assert {"Conv2d[conv1]", "Linear[fc2]"} <= nodes


def test_the_best_checkpoints_metrics_are_no_points_of_the_curves(fitted, events):
    for name in ("val/loss", "val/acc"):
        assert len(events.Scalars(name)) == 2  # one an epoch
        (best,) = events.Scalars(f"best/{name}")
        assert best.value == pytest.approx(metrics_of(fitted.run)[name], rel=1e-6)


def test_histograms_are_what_the_step_computed(events):
    expected = first_step(42, small_net())[2]
    layers = [layer for layer in LAYERS if not layer.startswith("relu")]
    names = [f"net.{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    tags = {f"{kind}/{name}" for kind in ("param", "grad") for name in names} | {f"act/net.{layer}" for layer in LAYERS}
    assert expected.keys() == set(events.Tags()["histograms"]) == tags
    for tag, value in expected.items():
        assert [event.step for event in events.Histograms(tag)] == [0, 10, 20, 30]
        value = value.detach().double()
        logged = events.Histograms(tag)[0].histogram_value
        assert logged.num == sum(logged.bucket) == value.numel()
        assert (logged.min, logged.max) == pytest.approx((value.min().item(), value.max().item()), rel=1e-4, abs=1e-9)
        assert logged.sum == pytest.approx(value.sum().item(), rel=1e-3, abs=1e-5)
        assert logged.sum_squares == pytest.approx(value.square().sum().item(), rel=1e-4, abs=1e-9)


def test_histograms_cost_no_extra_pass(folder, monkeypatch):
    passes = []
    forward = CNN.forward
    monkeypatch.setattr(CNN, "forward", lambda self, images: passes.append(self.training) or forward(self, images))
    main([*BRIEF, "--tensorboard={}", "--histograms.every_n_steps=1", "--evaluate_best=false"])
    assert sum(passes) == 16
    assert len(events_of(RUN).Histograms("act/net.conv1")) == 16


def test_pictures_are_legible(events):
    assert set(events.Tags()["images"]) == {"test/confusion_matrix", "test/worst_classified"}
    for tag in events.Tags()["images"]:
        (event,) = events.Images(tag)
        picture = Image.open(io.BytesIO(event.encoded_image_string))
        assert min(picture.size) >= 600
        assert len(picture.convert("L").getcolors(256)) > 10


# W&B, offline since there is no key


@pytest.fixture(scope="module")
def wandb_run(fitted):
    """The offline run as W&B's own reader gives it: its summary, its records."""
    (folder,) = (fitted.folder / "logs/wandb").glob("offline-run-*")
    read = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(folder)]
    lines = subprocess.run(read, capture_output=True, text=True, check=True).stdout.splitlines()
    summary = subprocess.run([*read, "--summary"], capture_output=True, text=True, check=True).stdout
    return json.loads(summary), [json.loads(line) for line in lines]


def test_wandb_has_the_whole_config_once(wandb_run, fitted):
    config = wandb_run[0]["config"]
    config.pop("_wandb", None)

    def filled(value):  # W&B leaves empty mappings out
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items() if item != {}}
        return value

    assert filled(config) == filled(yaml.safe_load((fitted.run / "config.yaml").read_text()))


def test_wandb_has_the_same_metrics_histograms_and_pictures(wandb_run, fitted, events):
    summary = wandb_run[0]["summary"]
    assert wandb_run[0]["exit_code"] == 0
    for name in METRICS:
        assert summary[name] == pytest.approx(metrics_of(fitted.run)[name], rel=1e-9)
    items = [record["history"]["item"] for record in wandb_run[1] if record["type"] == "history"]
    steps = [item["trainer/global_step"] for item in items if "param/net.fc2.bias._type" in item]
    assert steps == [0, 10, 20, 30]
    assert {tag for tag in summary if tag.startswith(("act/", "grad/", "param/"))} == set(events.Tags()["histograms"])
    for tag in events.Tags()["images"]:
        assert summary[tag]["_type"] == "images/separated"


def test_no_key_ends_up_in_a_file(folder, monkeypatch, capfd):
    key = "5ec2e7" + "0123456789abcdef" * 2 + "ab"
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_MODE", "offline")  # Lightning sets it and leaves it to the next run
    main([*BRIEF, "--wandb={project: mnist, save_dir: logs, offline: true}"])
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert [path for path in files if path.name.endswith(".wandb")]
    assert [path for path in files if key.encode() in path.read_bytes()] == []
    assert key not in "".join(capfd.readouterr())


# Loggers and folders


LOGGERS = {
    "W&B alone": ["--wandb={project: mnist, save_dir: logs}"],
    "TensorBoard alone": ["--tensorboard={}"],
    "none": [],
    "CSV": ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", "--trainer.logger.name=mnist"],
    "a list": ["--config=list.yaml"],
}


@pytest.mark.parametrize("loggers", LOGGERS.values(), ids=LOGGERS)
def test_any_loggers_have_one_folder_a_run(folder, loggers):
    (folder / "list.yaml").write_text(
        "trainer: {logger: [{class_path: lightning.pytorch.loggers.WandbLogger, init_args: {save_dir: logs}},"
        " {class_path: TensorBoardLogger, init_args: {save_dir: logs, name: mnist}}]}"
    )
    for _ in range(2):
        main([*BRIEF, "--trainer.max_epochs=1", *loggers])
    assert sorted(os.listdir(RUNS)) == ["version_0", "version_1"]
    for run in RUNS.iterdir():
        assert {"config.yaml", "metrics.json", "checkpoints"} <= set(os.listdir(run))
        assert bool(list(run.glob("events.*"))) == (loggers in (LOGGERS["TensorBoard alone"], LOGGERS["a list"]))
    offline = list(folder.glob("logs/wandb/offline-run-*/*.wandb"))
    assert len(offline) == (2 if loggers in (LOGGERS["W&B alone"], LOGGERS["a list"]) else 0)


def test_the_trainer_can_be_used_after_a_run(folder, capfd):
    cli = main([*BRIEF, "--wandb={project: mnist, save_dir: logs}", "--tensorboard={}"])
    assert "on cpu, 1 thread" in capfd.readouterr().out.splitlines()
    cli.trainer.test(cli.model, cli.datamodule)
    assert set(cli.trainer.callback_metrics) == {"test/loss", "test/acc"}


def test_an_evaluation_can_be_logged_to_wandb(fitted, folder, capfd):
    wandb = ["--trainer.logger=WandbLogger", "--trainer.logger.save_dir=logs"]
    main(["test", fitted.config, "--ckpt_path=best", *wandb])
    (run,) = folder.glob("logs/wandb/offline-run-*")
    assert f"wandb sync {run.relative_to(folder)}" in capfd.readouterr().out


def test_no_checkpoints_means_the_last_weights(folder):
    main([*BRIEF, "--trainer.enable_checkpointing=false"])
    assert metrics_of(RUN)["best_checkpoint"] is None
    assert not (RUN / "checkpoints").exists()


def test_a_run_that_fails_before_its_first_step_leaves_nothing(folder, capfd):
    error_of(capfd, *FIT, "--data.val_size=70000")  # found when both loggers have begun
    assert list(folder.iterdir()) == []


# The loss


def test_a_loss_that_is_not_finite_stops_the_run(folder, capfd):
    line = error_of(capfd, *BRIEF, "--trainer.log_every_n_steps=3", "--model.optimizer.lr=1e30")
    assert "train/loss" in line
    step = int(line.partition("step ")[2].split()[0])
    assert 1 <= step <= 5  # the first that can be; then at most as many as lie between two loggings
    assert not (RUN / "metrics.json").exists()


def test_a_loss_that_becomes_nan_in_validation_stops_the_run(folder, capfd):
    one_step = ["--trainer.limit_train_batches=1", "--trainer.log_every_n_steps=1", "--model.optimizer.lr=1e30"]
    assert "val/loss" in error_of(capfd, *BRIEF, *one_step)
    assert not (RUN / "metrics.json").exists()


@pytest.mark.parametrize("more", [[], ["--trainer.accumulate_grad_batches=2"]])
def test_training_metrics_are_means_since_the_last_logging(folder, more):
    for interval in (1, 4):
        main([*BRIEF, "--tensorboard={}", "--evaluate_best=false", *more, f"--trainer.log_every_n_steps={interval}"])
    each, fourth = (events_of(RUNS / f"version_{run}") for run in (0, 1))
    assert each.Scalars("train/loss")[0].value == pytest.approx(math.log(10), abs=0.1)  # an untrained net guesses
    for name in ("train/loss", "train/acc"):
        values = [event.value for event in each.Scalars(name)]
        means = [sum(values[start : start + 4]) / 4 for start in range(0, len(values), 4)]
        assert len(values) == (8 if more else 16)
        assert [event.value for event in fourth.Scalars(name)] == pytest.approx(means, rel=1e-5)


def test_labels_are_smoothed_in_training_only(folder):
    one = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.log_every_n_steps=1"]
    main([*FIT, "--wandb=null", *one, "--model.label_smoothing=0.1", "--model.optimizer.lr=0"])
    logits, targets, _ = first_step(42, small_net())
    nats = -logits.log_softmax(dim=1)  # those of the target count 0.9 and a tenth of 0.1, the others the latter
    expected = 0.9 * nats[range(64), targets].mean() + 0.1 * nats.mean()
    assert events_of(RUN).Scalars("train/loss")[0].value == pytest.approx(expected.item(), rel=1e-6)
    images, targets = (part[:1000] for part in mnist("t10k"))
    with torch.no_grad():
        plain = F.cross_entropy(small_net()(normalised(images)), targets).item()
    assert metrics_of(RUN)["test/loss"] == pytest.approx(plain, rel=1e-5)


# Other settings


def test_a_net_that_cannot_be_traced_is_trained(folder, capfd):
    (folder / "untraceable.py").write_text(
        "from mnist_cnn import CNN\n\nclass Untraceable(CNN):\n    def forward(self, images):\n"
        "        assert len(images) > 1, 'not for one image'\n        return super().forward(images)\n"
    )
    main([*BRIEF, "--graph={}", "--tensorboard={}", "--model.net=untraceable.Untraceable"])
    assert "not for one image" in capfd.readouterr().err
    assert (RUN / "metrics.json").exists()


def test_a_net_that_is_called_with_a_number_is_trained(folder, capfd):
    """TensorBoard's graph takes tensors only."""
    (folder / "scaled.py").write_text(
        "from mnist_cnn import CNN, LitClassifier\n\nclass Scaled(LitClassifier):\n    def forward(self, images):\n"
        "        return self.net(images, 2)\n\nclass Net(CNN):\n    def forward(self, images, scale):\n"
        "        return scale * super().forward(images)\n"
    )
    main([*BRIEF, "--graph={}", "--tensorboard={}", "--model=scaled.Scaled", "--model.net=scaled.Net"])
    assert "no graph in TensorBoard: RuntimeError" in capfd.readouterr().err
    assert (RUN / "metrics.json").exists()


def test_a_net_that_does_not_fit_the_images_is_reported_once(folder, capfd):
    (folder / "wrong.py").write_text(
        "from torch import nn\n\nclass Wrong(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Conv2d(3, 4, 3))\n"
    )
    with pytest.raises(RuntimeError, match="3 channels"):
        main([*BRIEF, "--graph={}", "--tensorboard={}", "--model.net=wrong.Wrong"])
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("setting", ["--data.val_size=0", "--trainer.limit_val_batches=0"])
def test_without_validation_what_monitors_it_has_to_be_off(folder, capfd, setting):
    without = [*BRIEF, setting]
    assert "--early_stopping=null" in error_of(capfd, *without)
    assert "--checkpoint=null" in error_of(capfd, *without, "--early_stopping=null")
    off = ["--early_stopping=null", "--checkpoint=null"]
    plateau = ["--model.lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau", "--model.lr_scheduler.monitor=val/loss"]
    assert "--model.lr_scheduler=null" in error_of(capfd, *without, *off, *plateau)
    assert list(folder.iterdir()) == []
    cli = main([*without, *off])
    metrics = metrics_of(RUN)
    assert list(metrics) == ["test/loss", "test/acc", "epochs", "best_checkpoint"]
    assert metrics["best_checkpoint"] == "checkpoints/last.ckpt"
    assert "warn" not in capfd.readouterr().err.lower()
    assert len(cli.datamodule.train_dataloader().dataset) == (60_000 if "val_size" in setting else 54_000)


def test_validation_may_come_every_other_epoch(folder):
    main([*BRIEF, "--trainer.check_val_every_n_epoch=2"])
    assert "val/acc" in metrics_of(RUN)
