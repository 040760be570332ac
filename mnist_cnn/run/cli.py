"""ExperimentCLI: LightningCLI and what a whole experiment needs around a fit, in the order in which it happens."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any, Optional

import torch
import yaml
from jsonargparse.typing import PositiveInt
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from mnist_cnn.run.config import check_config_files, with_subcommand
from mnist_cnn.run.errors import Parser, UserError, fail
from mnist_cnn.run.experiment import Experiment
from mnist_cnn.run.files import AtomicCheckpointIO
from mnist_cnn.run.folder import RunFolder, check_checkpoint, find_checkpoint
from mnist_cnn.run.loggers import RunFolderTensorBoard, finish_wandb, start_wandb
from mnist_cnn.run.named import add_named_arguments, as_list, named_callbacks, named_loggers
from mnist_cnn.run.quiet import silence_libraries
from mnist_cnn.run.speed import speed_up
from mnist_cnn.run.stop import StopBySignal


class ExperimentCLI(LightningCLI):
    """LightningCLI with named callbacks and loggers, one folder a run, and the best checkpoint tested after fit.

    Model and data are chosen by class path; optimizer and schedule are arguments of the model. A user's mistake is
    reported in one line, before anything is written.

    Args:
        args: Command-line arguments; None: those of the process. Without a subcommand they are those of fit.
    """

    run: RunFolder | None = None  # in the main process of a fit
    metrics: dict[str, float] = {}  # noqa: RUF012  those of the best checkpoint, at the end

    def __init__(self, args: ArgsType = None) -> None:
        silence_libraries()
        if args is None or isinstance(args, list):
            args = with_subcommand(sys.argv[1:] if args is None else args)
        self.given_subcommand = args[0] if isinstance(args, list) and args else ""
        self.wandb_runs: list[Any] = []
        self.stop = StopBySignal()
        status = 1
        with self.stop:
            try:
                super().__init__(
                    LightningModule,
                    LightningDataModule,
                    subclass_mode_model=True,
                    subclass_mode_data=True,
                    auto_configure_optimizers=False,
                    save_config_callback=None,  # RunFolder writes it, whatever the loggers
                    parser_class=Parser,
                    args=args,
                )
                status = 0
            except (Exception, SystemExit) as error:
                if number := self.stop.received:  # a DataLoader's worker may have got the signal, too, and be missed
                    fail(f"stopped by {number.name}{self.how_to_resume()}", 128 + number)
                reported = isinstance(error, UserError | MisconfigurationException | FloatingPointError)
                if reported or "Early stopping conditioned on metric" in str(error):  # misspelt, or not logged
                    fail(str(error))
                raise
            finally:
                self.close(status)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the named callbacks and loggers, and the run's own settings."""
        add_named_arguments(parser)
        text = "Whether fit ends with validating and testing the best checkpoint and writing metrics.json."
        parser.add_argument("--evaluate_best", type=bool, default=True, help=text)
        text = "Number of CPU threads. Results with another number differ in the last digits."
        parser.add_argument("--num_threads", type=PositiveInt, default=torch.get_num_threads(), help=text)
        text = "The run's folder; null: a new version_N in trainer.default_root_dir. It is not saved in config.yaml."
        parser.add_argument("--run_dir", type=Optional[str], default=None, help=text)  # noqa: UP045

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the given subcommand; building the parser of each takes a tenth of a second."""
        every = LightningCLI.subcommands()
        return {self.given_subcommand: every[self.given_subcommand]} if self.given_subcommand in every else every

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        if isinstance(args, list):
            check_config_files(args)
        super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Overrides LightningCLI's, which would take settings from the checkpoint; here they come from the YAML."""

    def _set_seed(self) -> None:
        os.environ.pop("PL_GLOBAL_SEED", None)  # of an earlier run in this process
        try:
            super()._set_seed()
        except ValueError as error:
            raise UserError(f"seed_everything: {error}") from error

    def before_instantiate_classes(self) -> None:
        """Finds the checkpoint that `best` or `last` means, and keeps the complete config for the run's folder."""
        config = self.config[self.subcommand]
        given = config.ckpt_path
        if given in ("best", "last") or (given is None and self.subcommand != "fit"):
            files = [Path(file.absolute) for file in config.config or [] if file is not None]
            root = Path(config.trainer.default_root_dir or ".")
            config.ckpt_path = find_checkpoint(root, files, given or "best")
        torch.set_num_threads(config.num_threads)
        dump = self.parser.dump(self.config, "json", skip_unset=False, skip_validation=True)
        # A rerun starts at the beginning and gets a folder of its own.
        self.settings = {**json.loads(dump)[self.subcommand], "ckpt_path": None, "run_dir": None}

    def instantiate_classes(self) -> None:
        """Instantiates all classes; what a constructor refuses with a ValueError is a wrong setting."""
        mistakes = (ValueError, ImportError, MisconfigurationException, UserError)
        try:
            super().instantiate_classes()
            if isinstance(self.model, Experiment):
                self.model.configure_optimizers()  # a trial, so that a wrong setting fails before anything is written
        except mistakes as error:
            cause: BaseException = error  # jsonargparse wraps the exceptions of constructors
            while inner := cause.__cause__ or cause.__context__:
                cause = inner
            if isinstance(cause, mistakes):
                raise UserError(str(cause)) from error
            raise
        # With its settings in the checkpoint, load_from_checkpoint needs nothing else.
        model, instantiator = self.settings["model"], "lightning.pytorch.cli.instantiate_module"
        hparams = model.get("init_args", {}) | {"_class_path": model["class_path"], "_instantiator": instantiator}
        self.model.save_hyperparameters(hparams, logger=False)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds the named callbacks and loggers to the trainer's own."""
        config, is_fit = self.config_init[self.subcommand], self.subcommand == "fit"
        kwargs["logger"] = named_loggers(config) if is_fit else False  # an evaluation prints its numbers
        if config.trainer.logger not in (None, True):
            kwargs["logger"] = config.trainer.logger
        callbacks = as_list(config.trainer.callbacks)
        callbacks += named_callbacks(config, callbacks, is_fit, has_loggers=bool(kwargs["logger"]))
        self.saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        callbacks += [self.stop] if is_fit else []
        kwargs["profiler"] = speed_up(config.trainer.profiler)
        kwargs["enable_checkpointing"] = is_fit  # StopBySignal is a Checkpoint
        kwargs["enable_progress_bar"] = any(isinstance(callback, ProgressBar) for callback in callbacks)
        plugins = as_list(config.trainer.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins += [AtomicCheckpointIO()]
        return super().instantiate_trainer(callbacks=callbacks, plugins=plugins, **kwargs)

    def before_fit(self) -> None:
        """Checks the checkpoint, creates the run's folder, and starts the loggers."""
        self.start = time.monotonic()
        trainer, config = self.trainer, self.config[self.subcommand]
        self.check_checkpoint()
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        resumed = f"# resumed from {config.ckpt_path}\n" if config.ckpt_path else ""
        content = resumed + yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True)
        given = config.run_dir or next((logger.log_dir for logger in trainer.loggers if logger.log_dir), None)
        folder = Path(given or trainer.default_root_dir)
        self.run = RunFolder(folder, content, is_parent=given is None)
        self.stop.path = self.run.last_checkpoint if self.saves else None
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.run.path.absolute() / "checkpoints")
        for logger in trainer.loggers:
            if isinstance(logger, RunFolderTensorBoard):
                logger.start(self.run.path)
            elif isinstance(logger, WandbLogger):
                self.wandb_runs.append(start_wandb(logger))
                logger.log_hyperparams(self.settings)

    def check_checkpoint(self) -> None:
        """Checks a checkpoint in a local file before anything is written."""
        config = self.config[self.subcommand]
        if config.ckpt_path is not None and not re.match(r"hpc$|registry|\w+://", str(config.ckpt_path)):
            check_checkpoint(config.ckpt_path, self.model, config.weights_only, resume=self.subcommand == "fit")

    before_validate = before_test = before_predict = check_checkpoint

    def after_fit(self) -> None:
        """Validates and tests the best checkpoint, prints its metrics and writes them to metrics.json."""
        trainer, config = self.trainer, self.config_init.fit
        if trainer.fast_dev_run or not config.evaluate_best:  # type: ignore[attr-defined]
            return
        seconds, epochs = time.monotonic() - self.start, trainer.current_epoch
        # The best of a callback with a monitor; without one, the latest checkpoint.
        callbacks = sorted(trainer.checkpoint_callbacks, key=lambda callback: not getattr(callback, "monitor", None))
        best = next((path for path in (getattr(c, "best_model_path", None) for c in callbacks) if path), None)
        metrics: dict[str, Any] = {}
        for evaluate, step in ((trainer.validate, "validation_step"), (trainer.test, "test_step")):
            if is_overridden(step, self.model):
                for result in evaluate(self.model, None, best, False, self.datamodule, config.weights_only):
                    metrics |= result
        if self.run:
            for name, value in metrics.items():
                print(f"{name:10} {value:.4f}")
            print(f"{epochs} epoch{'s' * (epochs != 1)} in {seconds:.0f} s: {self.run.path}")
            path = best and os.path.relpath(best, self.run.path)
            self.metrics = metrics
            self.run.write_metrics(metrics | {"epochs": epochs, "seconds": seconds, "best_checkpoint": path})

    def how_to_resume(self) -> str:
        """What the message of a stopped run says about resuming it."""
        if not (self.run and self.stop.trained):
            return ""
        if not self.run.last_checkpoint.exists():
            return "; there is no checkpoint to resume from"
        return f"; resume with: python main.py fit --config={self.run.path / 'config.yaml'} --ckpt_path=last"

    def close(self, status: int) -> None:
        """Closes the loggers; removes the folder of a run that failed before its first step."""
        keep = status == 0 or self.stop.trained
        if status and hasattr(self, "trainer") and self.trainer.strategy.launcher:
            self.trainer.strategy.launcher.kill(signal.SIGKILL)  # other processes would wait for this one
        for logger in self.trainer.loggers if self.run else ():
            if isinstance(logger, RunFolderTensorBoard):
                shown = {name: self.settings[name] for name in ("seed_everything", "model", "data")}
                logger.close(shown, self.metrics)
        for run in self.wandb_runs:
            finish_wandb(run, status, keep)
        if self.run and not keep:
            self.run.discard()
