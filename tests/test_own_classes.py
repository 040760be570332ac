"""Modules of a user's own: saved hyperparameters, lazy and compiled layers, other metric names."""

import re

import pytest
from conftest import BASE, BRIEF, CONSTANT, REPO, RUN, RUNS, assert_same_run, error_of, main, metrics_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PLAIN = """
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F

class Plain(LightningModule):
    def __init__(self, net: nn.Module, lr: float = 0.1, name: str = "model"):
        super().__init__()
        self.save_hyperparameters(SAVED)
        self.hparams["of_its_own"] = 3
        self.hparams["lr"] = 2 * lr
        self.net = net

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.get("lr", 0.1))
"""
DATA_OF_OWN = """
from mnist_cnn import MNISTDataModule

class Named(MNISTDataModule):
    def __init__(self, data_dir: str = "data", name: str = "data"):
        super().__init__(data_dir)
        self.save_hyperparameters()
"""
MONITOR = [
    "--early_stopping.monitor=val_loss",
    "--checkpoint.monitor=val_loss",
    "--checkpoint.filename={epoch}-{val_loss:.3f}",
]


def use(folder, saved: str = "") -> list[str]:
    """A command that trains the module above."""
    (folder / "plain.py").write_text(PLAIN.replace("SAVED", saved))
    (folder / "named.py").write_text(DATA_OF_OWN)
    of_data = f"{{class_path: named.Named, init_args: {{data_dir: {REPO}/data}}}}"
    model = "{class_path: plain.Plain, init_args: {net: CNN}}"
    (folder / "plain.yaml").write_text(f"model: {model}\ndata: {of_data}\n")
    limits = [option for option in BRIEF if option.startswith(("--trainer", "--graph", "--test_pict"))]
    return ["fit", *BASE[:2], "--config=plain.yaml", *MONITOR, *limits, "--wandb=null", "--data.name=data"]


@pytest.mark.parametrize("saved", ['ignore=["net"]', ""])
def test_a_module_with_hyperparameters_of_its_own_is_resumed(folder, saved, capfd):
    """Though model and data have one with the same name and different values."""
    command = use(folder, saved)
    main(command)
    main([*command, "--trainer.max_epochs=1"])
    cli = main([*command, "--ckpt_path=last"])
    assert_same_run(RUNS / "version_2", RUN)
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.2  # which the module has changed
    assert "model.lr=0.2" in error_of(capfd, *command, "--ckpt_path=last", "--model.lr=0.2")


def test_metrics_may_have_other_names(folder, capfd):
    command = use(folder)
    main(command)
    out = capfd.readouterr().out
    metrics = metrics_of(RUN)
    assert {"val_loss", "test_loss"} < set(metrics)
    assert all(re.search(rf"^{name} +{metrics[name]:.4f}$", out, re.MULTILINE) for name in ("val_loss", "test_loss"))
    assert len(re.findall(r"^epoch +\d  .*val_loss \d", out, re.MULTILINE)) == 2
    assert re.fullmatch(r"checkpoints/\d-2\.\d{3}\.ckpt", metrics["best_checkpoint"])


def test_a_monitor_that_the_module_does_not_log(folder, capfd):
    command = [option for option in use(folder) if option not in MONITOR]
    line = error_of(capfd, *command)
    for part in ("logs val_loss, not val/loss", "early_stopping.monitor", "checkpoint.monitor", "checkpoint.filename"):
        assert part in line
    assert not (folder / "logs").exists()


UNTYPED = """
from torch import nn

class Untyped(nn.Module):
    def __init__(self, inner, width: int = 3):
        super().__init__()
"""


@pytest.mark.parametrize("option", [[], ["--print_config"]])
def test_an_argument_without_a_type_gets_no_class(folder, capfd, option):
    (folder / "untyped.py").write_text(UNTYPED)
    line = error_of(capfd, *BRIEF, "--model.net=untyped.Untyped", "--model.net.inner={class_path: CNN}", *option)
    assert line == "error: untyped.Untyped: give its argument inner a type, to get a CNN"


def test_data_without_validation_is_noticed_before_training(folder, capfd):
    (folder / "unvalidated.py").write_text(
        "from torch.utils.data import DataLoader\n"
        "from lightning.pytorch import LightningDataModule\n"
        "class Unvalidated(LightningDataModule):\n"
        "    def train_dataloader(self):\n"
        "        return DataLoader([1.0])\n"
    )
    line = error_of(capfd, *BASE[:2], "--data=unvalidated.Unvalidated", "--wandb=null", "--tensorboard=null")
    assert line.startswith("error: there is no validation, and no val/loss: it needs validation batches, a val_dat")
    assert not (folder / "logs").exists()


NETS = """
import torch
from torch import nn
from mnist_cnn import CNN

class Lazy(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.LazyLinear(16), nn.ReLU(inplace=True), nn.LazyLinear(10))

class Compiled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.compile(CNN(), backend="eager")

    def forward(self, images):
        return self.net(images)
"""


def test_lazy_layers(folder):
    (folder / "nets.py").write_text(NETS)
    lazy = [*BRIEF, "--model.net=nets.Lazy", "--model.channels_last=false", CONSTANT, "--tensorboard={}"]
    main(lazy)
    main([*lazy, "--trainer.max_epochs=1"])
    main([*lazy, "--ckpt_path=last"])
    assert_same_run(RUNS / "version_2", RUN)
    found = main(["test", f"--config={RUN}/config.yaml"]).trainer.callback_metrics
    assert found["test/loss"].item() == metrics_of(RUN)["test/loss"]
    events = EventAccumulator(str(RUN), {"histograms": 0})
    events.Reload()
    outputs = {tag for tag in events.Tags()["histograms"] if tag.startswith("act/")}
    assert outputs == {"act/net.1", "act/net.2", "act/net.3"}  # that of Flatten is the image
    before, after = (events.Histograms(f"act/net.{layer}")[0].histogram_value for layer in (1, 2))
    assert before.min < 0 == after.min  # before ReLU changed it in place


def test_compiled_parts(folder):
    (folder / "nets.py").write_text(NETS)
    main([*BRIEF, "--model.net=nets.Compiled", "--tensorboard={}"])
    assert (RUN / "metrics.json").exists()


ODD = """
import datetime
import enum
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from mnist_cnn import CNN

Colour = enum.Enum("Colour", "RED BLUE")
DEFAULTS = {
    "device": (torch.device, torch.device("cpu")),
    "dtype": (Any, torch.float32),
    "act": (Callable, nn.ReLU),
    "norm": (Any, nn.BatchNorm2d),
    "function": (Any, torch.relu),
    "loss": (nn.Module, nn.CrossEntropyLoss()),
    "layers": (list[nn.Module], [nn.ReLU()]),
    "places": (dict, {"eval": [torch.device("cpu")]}),
    "power": (complex, 2j),
    "sizes": (tuple[int, ...], (1, 2)),
    "colour": (Colour, Colour.RED),
    "day": (datetime.date, datetime.date(2020, 1, 1)),
    "home": (str, "~/x"),
    "word": (str, "None"),
}


class Odd(CNN):
    def __init__(self, l1_chan: int = 4, ARGUMENTS):
        super().__init__(l1_chan)
        self.arguments = repr([LIST])
"""


def test_a_default_that_yaml_cannot_hold_or_would_change(folder):
    namespace = {}
    exec(ODD[: ODD.index("class Odd")], namespace)
    names = list(namespace["DEFAULTS"])
    arguments = ", ".join(f"{name}: DEFAULTS['{name}'][0] = DEFAULTS['{name}'][1]" for name in names)
    (folder / "unusual.py").write_text(ODD.replace("ARGUMENTS", arguments).replace("LIST", ", ".join(names)))
    first = main([*BRIEF, "--model.net=unusual.Odd", "--model.net.l1_chan=5"])
    assert first.model.net.arguments == repr([default for _, default in namespace["DEFAULTS"].values()])
    kept = [name for name in names if f" {name}:" in (RUN / "config.yaml").read_text()]
    assert kept == ["power", "sizes", "colour"]  # what YAML can hold
    again = main(["fit", f"--config={RUN}/config.yaml"])
    assert again.model.net.arguments == first.model.net.arguments
    assert_same_run(RUNS / "version_1", RUN)


OTHERS = """
import torch
from lightning.pytorch import LightningDataModule
from mnist_cnn import LitClassifier, MNISTDataModule
from torch import nn

class TooWide(nn.Module):
    def __init__(self):
        raise RuntimeError("this net is too wide")

class Regression(LitClassifier):
    def predict_step(self, batch, batch_idx):
        return torch.zeros(len(batch[0]), 1)

class Untested(LightningDataModule):
    def __init__(self, data_dir: str = "data"):
        super().__init__()
        self.mnist = MNISTDataModule(data_dir)
        self.mnist.setup("fit")
        self.on_after_batch_transfer = self.mnist.on_after_batch_transfer

    def train_dataloader(self):
        return self.mnist.train_dataloader()

    def val_dataloader(self):
        return self.mnist.val_dataloader()
"""


def test_an_exception_of_a_constructor_is_the_last_line(folder, capfd):
    """jsonargparse would put the whole config there."""
    (folder / "classes_of_own.py").write_text(OTHERS)
    with pytest.raises(RuntimeError, match=r"^this net is too wide$"):
        main([*BRIEF, "--model.net=classes_of_own.TooWide"])


def test_data_without_a_test(folder):
    (folder / "classes_of_own.py").write_text(OTHERS)
    limits = [option for option in BRIEF[4:] if not option.startswith("--data.")]
    main(["fit", *BASE[:2], "--data=classes_of_own.Untested", BASE[2], *limits])
    assert {"val/loss", "val/acc"} < set(metrics_of(RUN)) and "test/loss" not in metrics_of(RUN)


def test_predictions_that_are_no_probabilities(folder, fitted, capfd):
    (folder / "classes_of_own.py").write_text(OTHERS)
    line = error_of(capfd, "predict", fitted.config, "--model=classes_of_own.Regression", "--ckpt_path=best")
    assert "predict_step must return probabilities [N, C]" in line and "--predictions=null" in line
    assert not (folder / "predictions.csv").exists()
