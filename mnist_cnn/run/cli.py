"""ExperimentCLI: LightningCLI and what a whole experiment needs around a fit, in the order in which it happens."""

import copy
import itertools
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from mnist_cnn.run import folder
from mnist_cnn.run.callbacks import Histograms, ModelGraph, MonitoredMetrics, PredictionWriter, check_callbacks
from mnist_cnn.run.errors import Parser, UserError, fail
from mnist_cnn.run.experiment import Experiment
from mnist_cnn.run.files import AtomicCheckpointIO
from mnist_cnn.run.libraries import NoProfiler, silence_libraries
from mnist_cnn.run.loggers import RunFolderTensorBoard, finish_wandb, log_result, start_wandb
from mnist_cnn.run.pictures import TestPictures
from mnist_cnn.run.stop import StopBySignal

# What has a name in YAML: `early_stopping: {patience: 3}`, `histograms: null`.
CALLBACKS: dict[str, type[Callback]] = {
    "checkpoint": ModelCheckpoint,
    "last_checkpoint": ModelCheckpoint,
    "early_stopping": EarlyStopping,
    "lr_monitor": LearningRateMonitor,
    "graph": ModelGraph,
    "histograms": Histograms,
    "test_pictures": TestPictures,
    "predictions": PredictionWriter,
    "progress_bar": ProgressBar,
}
LOGGERS: dict[str, type[Logger]] = {"tensorboard": RunFolderTensorBoard, "wandb": WandbLogger}


class ExperimentCLI(LightningCLI):
    """LightningCLI with named callbacks and loggers, one folder a run, and the best checkpoint tested after fit."""

    run: Path | None = None  # the folder of a fit, in the main process

    def __init__(self, args: list[str] | None = None, defaults: Path | None = None) -> None:
        silence_libraries()
        os.environ.pop("PL_GLOBAL_SEED", None)  # of an earlier run in this process
        args = with_subcommand(sys.argv[1:] if args is None else args)
        self.given_subcommand = args[0] if args else ""
        if defaults and self.given_subcommand in LightningCLI.subcommands():
            args.insert(1, f"--config={defaults}")  # jsonargparse does not name its default_config_files in errors
        with StopBySignal() as self.stop:
            try:
                super().__init__(
                    args=args, parser_class=Parser, auto_configure_optimizers=False, save_config_callback=None
                )
            except (Exception, SystemExit) as error:
                self.close(status=1)
                if (cause := self.report(error)) is error:
                    raise
                raise cause from None
            self.close(status=0)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the named callbacks and loggers, and the run's own settings."""
        for name, kind in {**CALLBACKS, **LOGGERS}.items():
            parser.add_argument(f"--{name}", type=kind | None, default=None, help=f"{kind.__name__}; null disables it.")
        parser.add_argument("--evaluate_best", type=bool, default=True, help="Validate and test the best checkpoint.")
        parser.add_argument("--num_threads", type=PositiveInt, default=torch.get_num_threads(), help="CPU threads.")
        parser.add_argument("--weights", type=str | None, default=None, help="Checkpoint from which fit takes weights.")
        parser.add_argument("--run_dir", type=str | None, default=None, help="The run's folder; null: a new version_N.")

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the given subcommand; building the parser of each takes a tenth of a second."""
        every = LightningCLI.subcommands()
        return {name: every[name] for name in every if name == self.given_subcommand} or every

    def _parse_ckpt_path(self) -> None:
        """Overrides LightningCLI's, which would take settings from the checkpoint; here they come from the YAML."""

    def before_instantiate_classes(self) -> None:
        """Finds the checkpoint that `best` or `last` means, and keeps the complete config."""
        config = self.config[self.subcommand]
        if config.ckpt_path in ("best", "last") or (config.ckpt_path is None and self.subcommand != "fit"):
            files = [Path(file.absolute) for file in config.config or [] if file is not None]
            root = Path(config.trainer.default_root_dir or ".")
            config.ckpt_path = folder.find_checkpoint(root, files, config.ckpt_path or "best")
        torch.set_num_threads(config.num_threads)
        # LightningCLI would validate the config again, which takes as long as parsing it.
        dump = self.parser.dump(self.config, skip_unset=False, skip_link_targets=False, skip_validation=True)
        # The complete config. A rerun starts at the beginning and gets a folder of its own.
        self.config_dump = yaml.load(dump, yaml.CSafeLoader)[self.subcommand] | {"ckpt_path": None, "run_dir": None}

    def instantiate_classes(self) -> None:
        """Instantiates all classes, and gives the model its settings as hyperparameters."""
        super().instantiate_classes()
        if isinstance(self.model, Experiment):
            self.model.configure_optimizers()  # a trial, so that a wrong setting fails before anything is written
        # With its settings in the checkpoint, load_from_checkpoint needs nothing else.
        model, instantiator = self.config_dump["model"], "lightning.pytorch.cli.instantiate_module"
        hparams = model.get("init_args", {}) | {"_class_path": model["class_path"], "_instantiator": instantiator}
        self.hparams = {name: self.model.hparams.get(name, value) for name, value in hparams.items()}
        self.model.save_hyperparameters(self.hparams, logger=False)
        if self.datamodule:  # W&B gets the complete config, and names in both would be a conflict
            self.datamodule.save_hyperparameters({}, logger=False)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds the named callbacks and loggers to the trainer's own."""
        config = self.config_init[self.subcommand]
        given, loggers = config.trainer.callbacks or [], config.trainer.logger
        given = given if isinstance(given, list) else [given]
        if loggers in (None, True):  # an evaluation prints its numbers
            loggers = [config[name] for name in LOGGERS if config[name] and self.subcommand == "fit"]
        if not loggers:  # Lightning would refuse these callbacks
            config.lr_monitor = None
        if config.trainer.enable_checkpointing is False:
            config.checkpoint = config.last_checkpoint = None
        if config.trainer.enable_progress_bar is False or any(isinstance(callback, ProgressBar) for callback in given):
            config.progress_bar = None
        named = {name: config[name] for name in CALLBACKS if config[name]}
        check_callbacks(given, named)
        # A callback that averages weights has those of the end of fit; its copy takes the checkpoint's, as in `test`.
        self.evaluation_callbacks = [*copy.deepcopy(given), *named.values(), self.stop]
        callbacks = [*named.values(), *given, MonitoredMetrics(), self.stop]  # the named checkpoint chooses the best
        kwargs |= {"logger": loggers, "callbacks": callbacks, "enable_checkpointing": True}  # for StopBySignal
        kwargs["plugins"] = config.trainer.plugins or AtomicCheckpointIO()
        kwargs["profiler"] = config.trainer.profiler or NoProfiler()
        kwargs["enable_progress_bar"] = any(isinstance(callback, ProgressBar) for callback in callbacks)
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Checks the checkpoint, creates the folder and config.yaml of a fit, whatever the loggers; starts these."""
        self.start, self.epochs_before = time.monotonic(), 0
        trainer, config = self.trainer, self.config[self.subcommand]
        path = config.ckpt_path
        if "MultiProcessing" in type(trainer.strategy.launcher).__name__:
            raise UserError("forked or spawned processes do not share a run: give --trainer.strategy=ddp")
        if path is not None and "://" not in path:
            checkpoint = folder.read_checkpoint(path, self.model, config.weights_only)
            if self.subcommand == "fit":
                self.epochs_before = folder.check_resume(path, checkpoint, trainer, self.hparams, config.evaluate_best)
        elif self.subcommand == "fit" and config.weights:
            folder.read_checkpoint(config.weights, self.model, config.weights_only)  # which loads the weights
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        device, count = trainer.strategy.root_device, config.num_threads
        threads = f"{count} thread{'s' * (count != 1)}"
        print(f"on {device}, {torch.cuda.get_device_name(device) if device.type == 'cuda' else threads}")
        if path is not None:
            print(f"checkpoint: {path}")
        if self.subcommand == "fit":
            header = f"# resumed from {path}\n" if path else ""
            content = header + yaml.dump(self.config_dump, Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=True)
            given = config.run_dir or next((logger.log_dir for logger in trainer.loggers if logger.log_dir), None)
            self.run = folder.create_run(Path(given) if given else None, Path(trainer.default_root_dir), content)
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint):  # without one, the user wants no checkpoints
                    callback.dirpath = callback.dirpath or str(self.run.absolute() / "checkpoints")
                    self.stop.path = self.run / "checkpoints/last.ckpt"
        for logger in trainer.loggers:
            if isinstance(logger, RunFolderTensorBoard) and self.run:
                logger.start(self.run)
            elif isinstance(logger, WandbLogger):
                start_wandb(logger)
                logger.log_hyperparams(self.config_dump)

    before_validate = before_test = before_predict = before_fit

    def after_fit(self) -> None:
        """Validates and tests the best checkpoint, prints its metrics and writes them to metrics.json."""
        trainer: Any = self.trainer
        if trainer.fast_dev_run or not self.config_init.fit.evaluate_best:
            return
        seconds, epochs, best = time.monotonic() - self.start, trainer.current_epoch, folder.best_checkpoint(trainer)
        metrics: dict[str, float] = {}
        callbacks, trainer.callbacks = trainer.callbacks, self.evaluation_callbacks
        loggers, trainer.loggers = trainer.loggers, [DummyLogger()]  # val/loss has been logged; the test is logged
        parts = [part for part in (self.model, self.datamodule) if part is not None]
        for evaluate, step, loader in (
            (trainer.validate, "validation_step", "val_dataloader"),
            (trainer.test, "test_step", "test_dataloader"),
        ):
            if is_overridden(step, self.model) and any(is_overridden(loader, part) for part in parts):
                for result in evaluate(self.model, None, best, False, self.datamodule, weights_only=False):
                    metrics |= {f"test/{name}" if name in metrics else name: value for name, value in result.items()}
            trainer.loggers = loggers
        trainer.callbacks = callbacks
        if self.run:
            for name, value in metrics.items():
                print(f"{name:10} {value:.4f}")
            new = f" ({epochs - self.epochs_before} of them new)" if self.epochs_before else ""
            print(f"{epochs} epoch{'s' * (epochs != 1)}{new} in {seconds:.0f} s: {self.run}")
            log_result(trainer, self.config_dump, metrics)
            folder.write_metrics(self.run, trainer, metrics, seconds, best)

    def report(self, error: BaseException) -> BaseException:
        """Exits with one line if a signal has stopped the run, or for a user's mistake; otherwise returns the cause."""
        if number := self.stop.received:  # a DataLoader's worker may have got the signal, too, and be missed
            resume = ""
            if self.run and self.stop.trained:
                command = f"python main.py fit --config={self.run / 'config.yaml'} --ckpt_path=last"
                saved = self.stop.path and self.stop.path.exists()
                resume = f"; resume with: {command}" if saved else "; there is no checkpoint to resume from"
            fail(f"stopped by {number.name}{resume}", 128 + number)
        while isinstance(error, ValueError) and error.__cause__:  # jsonargparse wraps the exceptions of constructors
            error = error.__cause__
        mistake = isinstance(error, UserError | MisconfigurationException | FloatingPointError)
        refused = isinstance(error, ValueError | ImportError) and not hasattr(self, "hparams")  # by a constructor
        if mistake or refused or re.search("Early stopping conditioned|more than one stateful", str(error)):
            fail(str(error))
        return error

    def close(self, status: int) -> None:
        """Finishes the W&B run; removes the folder of a run that failed before its first step."""
        if not hasattr(self, "trainer"):
            return
        keep = status == 0 or self.stop.trained
        if status and self.trainer.strategy.launcher:
            self.trainer.strategy.launcher.kill(signal.SIGKILL)  # other processes would wait for this one
        finish_wandb(status, keep)
        self.trainer.loggers = [logger for logger in self.trainer.loggers if not isinstance(logger, WandbLogger)]
        if self.run and not keep:
            folder.discard(self.run)


def with_subcommand(args: list[str]) -> list[str]:
    """Moves the subcommand to the front; without one, the options are those of fit."""
    for index, (before, arg) in enumerate(itertools.pairwise(["", *args])):
        is_value = before.startswith("-") and "=" not in before and before != "--print_config"
        if arg in LightningCLI.subcommands() and not is_value:
            return [arg, *args[:index], *args[index + 1 :]]
    return ["fit", *args] if args and args[0].startswith("-") and args[0] not in ("-h", "--help") else args
