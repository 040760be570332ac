"""One short run with everything on, looked at from all sides."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import BASE, FIT, QUIET, REPO, SHORT, error_of, in_new_process, main, metrics_of, tensorboard
from lightning.pytorch import LightningModule
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

from mnist_cnn import CNN, LitClassifier
from mnist_cnn.callbacks import draw_confusion_matrix

LAYERS = ["conv1", "relu1", "conv2", "relu2", "conv3", "relu3", "fc1", "relu4", "fc2"]
ALL = {"allowedStatuses": ["STATUS_SUCCESS"], "colParams": [], "startIndex": 0, "sliceSize": 10}  # of HParams' rows


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """The folder in which the run was started, and the CLI object."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("fitted")
    patch.chdir(folder)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        patch.delenv(name, raising=False)
    patch.setenv("NETRC", str(folder / "netrc"))
    patch.setenv("HOME", str(folder))
    cli = main(FIT)
    yield folder, cli
    patch.undo()


@pytest.fixture
def run(fitted):
    return fitted[0] / "logs/mnist/version_0"


@pytest.fixture(scope="module")
def events(fitted):
    accumulator = EventAccumulator(str(fitted[0] / "logs/mnist/version_0"), size_guidance={"histograms": 0})
    accumulator.Reload()
    return accumulator


@pytest.fixture(scope="module")
def wandb_records(fitted):
    """The offline run as W&B's own reader gives it: its summary, its records."""
    (folder,) = (fitted[0] / "logs/wandb").glob("offline-run-*")
    read = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    lines = subprocess.run(read, capture_output=True, text=True, check=True).stdout.splitlines()
    summary = subprocess.run([*read, "--summary"], capture_output=True, text=True, check=True).stdout
    return json.loads(summary), [json.loads(line) for line in lines]


def test_folder_holds_the_run_and_nothing_else(run):
    names = {path.name.partition(".vm")[0] for path in run.iterdir()}
    assert {name for name in names if not name.startswith("events.out.tfevents")} == {
        "config.yaml",
        "metrics.json",
        "checkpoints",
    }
    assert len(list(run.glob("events*"))) == 1
    assert len(list((run / "checkpoints").glob("*.ckpt"))) == 3


def test_metrics_are_those_of_the_best_checkpoint(fitted, run):
    metrics = json.loads((run / "metrics.json").read_text())
    names = ["val/loss", "val/acc", "test/loss", "test/acc", "epochs", "seconds", "best_checkpoint"]
    assert list(metrics) == names
    assert metrics["epochs"] == 2 and metrics["seconds"] > 0
    score = fitted[1].trainer.checkpoint_callback.best_model_score.item()
    assert metrics["val/loss"] == pytest.approx(score, rel=1e-6)
    best = torch.load(run / metrics["best_checkpoint"], weights_only=True)["state_dict"]
    assert all(torch.equal(value, best[name]) for name, value in fitted[1].model.state_dict().items())


def test_validate_and_test_say_what_metrics_json_says(fitted, run, monkeypatch):
    monkeypatch.chdir(fitted[0])
    expected = metrics_of(run)
    config = ["--config", "logs/mnist/version_0/config.yaml"]
    for which in ("best", str(run / expected["best_checkpoint"])):
        for stage in ("validate", "test"):
            found = main([stage, *config, f"--ckpt_path={which}"]).trainer.callback_metrics
            prefix = "val" if stage == "validate" else "test"
            for name in (f"{prefix}/loss", f"{prefix}/acc"):
                assert found[name].item() == expected[name]
    last = main(["test", *config, "--ckpt_path=last"])
    weights = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, weights[name]) for name, value in last.model.state_dict().items())
    assert sorted(path.name for path in Path("logs/mnist").iterdir()) == ["version_0"]  # an evaluation is no run


@pytest.mark.parametrize("loader", [LightningModule, LitClassifier])
def test_checkpoint_alone_gives_the_model_back(fitted, run, loader):
    path = run / metrics_of(run)["best_checkpoint"]
    model = loader.load_from_checkpoint(path, weights_only=True)
    assert isinstance(model, LitClassifier)
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(model.eval()(images), fitted[1].model.eval()(images))


# TensorBoard


def test_tensorboard_scalars_are_logged_at_the_logging_interval(events):
    assert set(events.Tags()["scalars"]) == {
        *(f"{stage}/{name}" for stage in ("train", "val", "test") for name in ("loss", "acc")),
        "lr-SGD",
        "epoch",
    }
    assert [event.step for event in events.Scalars("train/loss")] == [4, 9, 14, 19, 24, 29, 34, 39]
    assert events.Scalars("lr-SGD")[0].value == pytest.approx(0.1)


def test_tensorboard_has_the_graph(events):
    nodes = {node.name.split("/")[1] for node in graph(events).node if "/" in node.name}
    assert {f"{type_}[{name}]" for type_, name in [("Conv2d", "conv1"), ("Linear", "fc2")]} <= nodes


def graph(events):
    from tensorboard.compat.proto.graph_pb2 import GraphDef

    return GraphDef.FromString(events._graph)


def test_histograms_of_the_very_step(events):
    tags = set(events.Tags()["histograms"])
    layers = [layer for layer in LAYERS if not layer.startswith("relu")]
    parameters = [f"net.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert tags == {
        *(f"act/net.{layer}" for layer in LAYERS),
        *(f"{kind}/{name}" for kind in ("param", "grad") for name in parameters),
    }
    for tag in tags:
        assert [event.step for event in events.Histograms(tag)] == [0, 10, 20, 30]


def test_histograms_are_what_the_step_computed(fitted, events):
    """The first step done again by hand: initial weights, first batch, its gradient and outputs."""
    cli = fitted[1]
    torch.manual_seed(yaml.safe_load(cli.config_yaml)["seed_everything"])
    net = CNN()
    loader = cli.datamodule.train_dataloader()
    loader.sampler.set_epoch(0)
    images, targets = next(iter(loader))
    outputs = {}
    for name, module in net.named_children():
        module.register_forward_hook(lambda _, __, output, name=name: outputs.setdefault(f"act/net.{name}", output))
    F.cross_entropy(net(images.unsqueeze(1).float().div(255)), targets).backward()
    expected = dict(outputs)
    for name, parameter in net.named_parameters():
        expected |= {f"param/net.{name}": parameter, f"grad/net.{name}": parameter.grad}
    assert expected.keys() == set(events.Tags()["histograms"])
    for tag, value in expected.items():
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
    main([*FIT, "--wandb=null", "--graph=null", "--histograms.every_n_steps=1", "--evaluate_best=false"])
    assert sum(passes) == 40


def test_pictures_are_legible(events):
    from io import BytesIO

    from PIL import Image

    for tag in ("test/confusion_matrix", "test/worst_classified"):
        (event,) = events.Images(tag)
        picture = Image.open(BytesIO(event.encoded_image_string))
        assert min(picture.size) >= 600
        assert len(picture.convert("L").getcolors(256)) > 10


def test_tensorboard_serves_all_of_it(fitted, run):
    with tensorboard(fitted[0] / "logs/mnist") as (_, get):
        scalars = get("plugin/scalars/tags")["version_0"]
        assert "val/acc" in scalars and "hp_metric" not in scalars
        assert get("plugin/scalars/scalars?run=version_0&tag=test%2Facc")[-1][2] == pytest.approx(
            metrics_of(run)["test/acc"], rel=1e-6
        )
        assert "grad/net.conv1.weight" in get("plugin/histograms/tags")["version_0"]
        assert set(get("plugin/images/tags")["version_0"]) == {"test/confusion_matrix", "test/worst_classified"}
        assert get("plugin/graphs/info")["version_0"]["run_graph"]
        experiment = get("plugin/hparams/experiment", {})
        assert {info["name"] for info in experiment["hparamInfos"]} >= {"model.net.l1_chan", "model.optimizer.lr"}
        (group,) = get("plugin/hparams/session_groups", ALL)["sessionGroups"]
        assert group["hparams"]["model.net"] == "CNN" and group["hparams"]["seed_everything"] >= 0
        values = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
        for name in ("val/acc", "val/loss", "test/acc", "test/loss"):
            assert values[name] == pytest.approx(metrics_of(run)[name], rel=1e-6)
        assert "train and val" in json.dumps(get("plugin/custom_scalars/layout"))


def test_hparams_of_several_runs_begin_with_what_differs(folder):
    for other in ("--data.batch_size=32", "--model.net.l1_chan=8"):
        main([*FIT, "--wandb=null", other])
    with tensorboard(folder / "logs/mnist") as (_, get):
        experiment = get("plugin/hparams/experiment", {})
    assert [info["name"] for info in experiment["hparamInfos"]][:2] == ["data.batch_size", "model.net.l1_chan"]
    assert [info["differs"] for info in experiment["hparamInfos"]][:3] == [True, True, False]


def test_a_swept_class_with_its_arguments_is_one_column_of_hparams(folder):
    net = {"class_path": "CNN", "init_args": {"l1_chan": 8}}
    content = {"model": {"init_args": {"net": net}}}
    (folder / "run.yaml").write_text(f"# swept: {json.dumps({'model.net': net})}\n{yaml.safe_dump(content)}")
    main([*FIT, "--wandb=null", "--config=run.yaml"])
    with tensorboard(folder / "logs/mnist") as (_, get):
        (group,) = get("plugin/hparams/session_groups", ALL)["sessionGroups"]
    assert group["hparams"] == {"net": "CNN l1_chan=8 l2_chan=8 l3_chan=16 fc1_out=30"}


# W&B


def test_wandb_has_the_whole_config_once(wandb_records, run):
    config = wandb_records[0]["config"]
    config.pop("_wandb", None)

    def filled(value):  # W&B leaves empty mappings out
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items() if item != {}}
        return value

    assert filled(config) == filled(yaml.safe_load((run / "config.yaml").read_text()))


def test_wandb_summary_is_that_of_the_best_checkpoint(wandb_records, run):
    summary = wandb_records[0]["summary"]
    for name in ("val/loss", "val/acc", "test/loss", "test/acc"):
        assert summary[name] == pytest.approx(metrics_of(run)[name], rel=1e-9)
    assert wandb_records[0]["exit_code"] == 0


def test_wandb_has_the_same_histograms_and_pictures(wandb_records, events):
    items = [record["history"]["item"] for record in wandb_records[1] if record["type"] == "history"]
    steps = [item["trainer/global_step"] for item in items if "param/net.fc2.bias._type" in item]
    assert steps == [0, 10, 20, 30]
    summary = wandb_records[0]["summary"]
    assert {tag for tag in summary if tag.startswith(("act/", "grad/", "param/"))} == set(events.Tags()["histograms"])
    for tag in events.Tags()["images"]:
        assert summary[tag]["_type"] == "images/separated"


# Loggers and folders


@pytest.mark.parametrize(
    "loggers",
    [
        [],
        ["--tensorboard=null"],
        ["--wandb=null"],
        QUIET,
        ["--trainer.logger=false"],
        ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", "--trainer.logger.name=mnist"],
        ["--config=wandb_first.yaml"],
    ],
    ids=["both", "W&B alone", "TensorBoard alone", "null", "false", "CSV", "W&B first"],
)
def test_any_loggers_twice_in_a_row(folder, loggers):
    (folder / "wandb_first.yaml").write_text(
        "trainer: {logger: [{class_path: lightning.pytorch.loggers.WandbLogger, init_args: {save_dir: logs}},"
        " {class_path: TensorBoardLogger, init_args: {save_dir: logs, name: mnist}}]}"
    )
    quick = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=5", "--trainer.log_every_n_steps=1"]
    for _ in range(2):
        main([*FIT, *quick, *loggers])
    runs = sorted(path.name for path in (folder / "logs/mnist").iterdir())
    assert runs == ["version_0", "version_1"]
    for run in runs:
        present = {path.name for path in (folder / "logs/mnist" / run).iterdir()}
        assert {"config.yaml", "metrics.json", "checkpoints"} <= present
    assert metrics_of(folder / "logs/mnist/version_0") == metrics_of(folder / "logs/mnist/version_1")
    offline = list(folder.glob("logs/wandb/offline-run-*"))
    assert all(list(run.glob("*.wandb")) for run in offline)
    assert len(offline) == (2 if loggers in ([], ["--tensorboard=null"], ["--config=wandb_first.yaml"]) else 0)


def test_fast_dev_run_leaves_nothing(folder):
    main(["fit", *BASE, "--trainer.fast_dev_run=true"])
    assert list(folder.iterdir()) == []


def test_evaluation_can_be_switched_off(folder, capsys):
    main([*FIT, *QUIET, "--evaluate_best=false"])
    assert not (folder / "logs/mnist/version_0/metrics.json").exists()
    assert (folder / "logs/mnist/version_0/config.yaml").exists()


def test_no_checkpoints_means_the_last_weights(folder):
    main([*FIT, *QUIET, "--trainer.enable_checkpointing=false"])
    run = folder / "logs/mnist/version_0"
    assert metrics_of(run)["best_checkpoint"] is None
    assert not (run / "checkpoints").exists()


def test_loss_that_is_not_finite_stops_the_run(folder, capfd):
    line = error_of(capfd, *FIT, *QUIET, "--model.optimizer.lr=1e30")
    assert "train/loss became" in line and "at step" in line
    assert not (folder / "logs/mnist/version_0/metrics.json").exists()


def test_loss_that_becomes_nan_in_validation_stops_the_run(folder, capfd):
    one_step = ["--trainer.limit_train_batches=1", "--trainer.log_every_n_steps=1", "--model.optimizer.lr=1e30"]
    assert "val/loss became" in error_of(capfd, *FIT, *QUIET, *one_step)
    assert not (folder / "logs/mnist/version_0/metrics.json").exists()


def test_net_that_cannot_be_traced_is_trained(folder, monkeypatch, capfd):
    (folder / "untraceable.py").write_text(
        "from mnist_cnn import CNN\n\nclass Untraceable(CNN):\n    def forward(self, images):\n"
        "        assert len(images) > 1, 'not for one image'\n        return super().forward(images)\n"
    )
    monkeypatch.syspath_prepend(folder)
    main([*FIT, "--wandb=null", "--model.net=untraceable.Untraceable"])
    assert "no graph in TensorBoard: not for one image" in capfd.readouterr().err


def test_run_that_fails_before_its_first_step_leaves_nothing(folder, capfd):
    error_of(capfd, *FIT, "--data.val_size=70000")  # found when both loggers have begun
    assert list(folder.iterdir()) == []


def test_two_processes_make_one_run(folder):
    """A fit over gloo: one folder, one set of pictures, metrics of all images."""
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu", "--trainer.max_epochs=1"]
    in_new_process(*FIT, *two, "--trainer.limit_val_batches=1.0", "--wandb=null")
    run = folder / "logs/mnist/version_0"
    assert [path.name for path in (folder / "logs/mnist").iterdir()] == ["version_0"]
    metrics = metrics_of(run)
    assert metrics["val/acc"] * 6000 == pytest.approx(round(metrics["val/acc"] * 6000), abs=1e-3)
    accumulator = EventAccumulator(str(run))
    accumulator.Reload()
    assert set(accumulator.Tags()["images"]) == {"test/confusion_matrix", "test/worst_classified"}
    one = main(["validate", f"--config={run / 'config.yaml'}", "--trainer.devices=1", "--trainer.strategy=auto"])
    assert one.trainer.callback_metrics["val/acc"].item() == metrics["val/acc"]


@pytest.mark.parametrize("setting", ["--data.val_size=0", "--trainer.limit_val_batches=0"])
def test_all_images_can_be_trained_on(folder, capfd, setting):
    without = [*FIT, *QUIET, setting]
    assert "give --early_stopping=null" in error_of(capfd, *without)
    assert "give --checkpoint=null" in error_of(capfd, *without, "--early_stopping=null")
    plateau = [
        "--early_stopping=null",
        "--checkpoint=null",
        "--model.lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau",
    ]
    monitor = "--model.lr_scheduler.monitor=val/loss"
    assert "give --model.lr_scheduler=null" in error_of(capfd, *without, *plateau, monitor)
    assert list(folder.iterdir()) == []
    cli = main([*without, "--early_stopping=null", "--checkpoint=null"])
    metrics = metrics_of(folder / "logs/mnist/version_0")
    assert list(metrics) == ["test/loss", "test/acc", "epochs", "best_checkpoint"]
    assert metrics["best_checkpoint"] == "checkpoints/last.ckpt"
    assert "warn" not in capfd.readouterr().err.lower()
    assert len(cli.datamodule.train_dataloader().dataset) == (60_000 if "val_size" in setting else 54_000)


@pytest.mark.parametrize("more", [[], ["--trainer.accumulate_grad_batches=2"]])
def test_training_metrics_are_means_since_the_last_logging(folder, more):
    for interval in (1, 5):
        main([*FIT, "--wandb=null", "--evaluate_best=false", *more, f"--trainer.log_every_n_steps={interval}"])
    each, fifth = (EventAccumulator(str(folder / f"logs/mnist/version_{run}")).Reload() for run in (0, 1))
    for name in ("train/loss", "train/acc"):
        values = [event.value for event in each.Scalars(name)]
        means = [sum(values[start : start + 5]) / 5 for start in range(0, len(values), 5)]
        assert len(values) == (20 if more else 40)
        assert [event.value for event in fifth.Scalars(name)] == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize(
    ("counts", "title"),
    [
        ([[9, 1], [3, 7]], "test: 4 errors among 20 images, accuracy 0.8000\nmost often: 1 → 0 (3), 0 → 1 (1)"),
        ([[9, 0], [0, 9]], "test: 0 errors among 18 images, accuracy 1.0000"),
    ],
)
def test_confusion_matrix_names_the_most_frequent_errors(counts, title):
    (axes,) = draw_confusion_matrix(np.array(counts), ["0", "1"]).axes
    assert axes.get_title() == title


def test_validation_may_come_every_other_epoch(folder):
    main([*FIT, *QUIET, "--trainer.check_val_every_n_epoch=2"])
    assert "val/acc" in metrics_of(folder / "logs/mnist/version_0")


def test_schedule_steps_once_an_epoch(folder):
    cli = main(
        [
            *FIT,
            *QUIET,
            "--model.lr_scheduler=StepLR",
            "--model.lr_scheduler.step_size=1",
            "--model.lr_scheduler.gamma=0.5",
        ]
    )
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**2)


def test_plateau_schedule_reads_its_metric(folder):
    cli = main(
        [
            *FIT,
            *QUIET,
            "--model.lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau",
            "--model.lr_scheduler.monitor=val/acc",
            "--model.lr_scheduler.mode=max",
            "--model.lr_scheduler.patience=0",
            "--model.lr_scheduler.threshold=10",  # no improvement is good enough
        ]
    )
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)


def test_progress_is_a_line_an_epoch_where_there_is_no_terminal(folder, capsys):
    main([*FIT, *QUIET])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("epoch")] == [["epoch", "0"], ["epoch", "1"]]
    assert len(lines) <= 8 and "\r" not in "".join(lines)


def test_fast_config_is_as_accurate_as_it_says(folder):
    main(["fit", f"--config={REPO / 'configs/fast.yaml'}", f"--data.data_dir={REPO / 'data'}", *QUIET])
    metrics = metrics_of(folder / "logs/fast/version_0")
    assert metrics["test/acc"] > 0.988  # 0.990 on average; other processors round differently
    assert metrics["epochs"] == 1 and metrics["best_checkpoint"] == "checkpoints/last.ckpt"


def test_best_config_trains(folder):
    config = REPO / "configs/best.yaml"
    main(["fit", f"--config={config}", f"--data.data_dir={REPO / 'data'}", *SHORT, *QUIET])
    assert metrics_of(folder / "logs/best/version_0")["test/acc"] > 0.5
