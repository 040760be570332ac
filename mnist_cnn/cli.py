"""ExperimentCLI: what a whole experiment needs beyond LightningCLI.

- Callbacks and loggers that have a name each, so that YAML or the command line changes one setting of one of them
  (`--early_stopping.patience=5`) or switches it off (`--histograms=null`).
- One folder for each run, whatever the loggers, with config.yaml, checkpoints and metrics.json.
- The best checkpoint validated and tested after fit.
- A user's mistake found before anything is written, and told in one line.
"""

import contextlib
import errno
import inspect
import json
import logging
import os
import pickle
import re
import signal
import stat
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import torch
import yaml
from jsonargparse.typing import restricted_number_type
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from mnist_cnn.callbacks import Histograms, ModelGraph, PredictionWriter, TestPictures
from mnist_cnn.errors import Parser, chain_of, fail, fail_unless_own
from mnist_cnn.files import AtomicCheckpointIO, check_writable, remove, remove_if_empty, write_atomically
from mnist_cnn.loggers import RunFolderTensorBoard, finish_wandb, flatten, log_hyperparameters, start_wandb
from mnist_cnn.stop import StopBySignal

# What libraries say to each other or in praise of themselves; a user can do nothing about it.
WARNINGS = [
    r"`torch.jit.\w+` is deprecated",  # TensorBoard's graph is traced that way by torch itself
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # within Lightning
    r"The '\w+' does not have many workers",  # the images are in memory
    r"torch.distributed.nn.functional.all_gather is deprecated",  # within Lightning
    r"Total length of `list` across ranks is zero",  # nothing held out for validation
    r"The `srun` command is available on your system but is not used",  # advice, where it may be meant so
]
MESSAGES = re.compile(
    "Seed set to|GPU available: False|TPU available|💡 Tip|Restoring states from|Loaded model weights from"
    "|was configured so|Loading `train_dataloader` to estimate|`weights_only` was not set"
)


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
LOGGERS = {"tensorboard": RunFolderTensorBoard, "wandb": WandbLogger}


KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has no SIGKILL
# The disk's, of which the code knows nothing.
DISKS_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
USERS_MISTAKES = (ValueError, RuntimeError, ImportError, TypeError, MisconfigurationException)
DEFAULT_NUM_THREADS = torch.get_num_threads()
Threads = restricted_number_type("Threads", int, [(">", 0), ("<=", 1024)])  # torch takes any, and may crash


def _is_of_interest(record: logging.LogRecord) -> bool:
    return not MESSAGES.search(record.getMessage())


# Lightning calls these of every callback, and of the model, at each step.
STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


def skip_empty_hooks(owner: Callback | LightningModule) -> None:
    """Sees to it that Lightning passes over the hooks at each step that do nothing: it calls only what is callable.

    base.yaml would have 66 calls a step, of which 8 do something; a call takes up to ten microseconds.

    Args:
        owner: Whose hooks they are.
    """
    base = Callback if isinstance(owner, Callback) else LightningModule
    for hook in STEP_HOOKS:
        if hook not in vars(owner) and getattr(type(owner), hook) is getattr(base, hook):
            setattr(owner, hook, None)


def _tell_of_thread(args: threading.ExceptHookArgs) -> None:
    """As ever, but not what TensorBoard's thread can't write: the main thread meets that again, and tells."""
    if not (type(args.thread).__name__ == "_AsyncWriterThread" and isinstance(args.exc_value, OSError)):
        threading.__excepthook__(args)


class NoProfiler(PassThroughProfiler):
    """Lightning's default, which measures nothing, without making a new context 80 times a step."""

    nothing = contextlib.nullcontext()

    def profile(self, action_name: str) -> Any:
        """Nothing."""
        return self.nothing


def random_state() -> list[torch.Tensor]:
    """The state of torch's random numbers, on the CPU and on the GPU."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]


def set_random_state(state: list[torch.Tensor]) -> None:
    """Goes on with random numbers where random_state was."""
    torch.set_rng_state(state[0].cpu())
    if len(state) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[1].cpu())


class RunFolder(Callback):
    """Gives W&B the whole config; brings a resumed run's checkpoints along, and its random numbers.

    Args:
        cli: The CLI that the run belongs to.
    """

    random_state: list[torch.Tensor] | None = None  # that of the checkpoint from which training goes on

    def __init__(self, cli: "ExperimentCLI") -> None:
        self.cli = cli

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives W&B the config, once."""
        for logger in trainer.loggers if self.cli.run_dir and stage == "fit" else ():
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams(self.cli.settings)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sees to it that what is monitored will be there.

        Raises:
            MisconfigurationException: If it belongs to a validation, and there is none.
        """
        if self.random_state is not None and trainer.world_size == 1:
            set_random_state(self.random_state)
        not_yet_known = trainer.val_dataloaders is None and trainer.limit_val_batches != 0  # type: ignore[attr-defined]
        if sum(trainer.num_val_batches) or not_yet_known:
            return
        fit, present = self.cli.config_init.fit, trainer.callbacks  # type: ignore[attr-defined]
        monitors = {name: fit[name].monitor for name in ("early_stopping", "checkpoint") if fit[name] in present}
        for config in trainer.lr_scheduler_configs:
            monitors["model.lr_scheduler"] = config.monitor if config.reduce_on_plateau else None
        for name, monitor in monitors.items():
            if (monitor or "").startswith("val"):
                raise MisconfigurationException(
                    f"{name} monitors {monitor}, but nothing is validated: give --{name}=null"
                )

    def on_train_batch_end(self, *args: Any) -> None:
        """From here on there is something to lose."""
        self.cli.trained = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Saves the state of the random numbers, with which dropout goes on in the middle of an epoch."""
        checkpoint["random_state"] = random_state()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Copies what the interrupted run kept, so that the best so far stays the best until it is beaten.

        Lightning forgets the scores of checkpoints that lie in another folder.
        """
        if not trainer.training:
            checkpoint["callbacks"] = {}  # an evaluation wants the weights alone
            return
        self.random_state = checkpoint.get("random_state")
        for early_stopping in trainer.early_stopping_callbacks:  # Lightning would let the checkpoint's patience win
            checkpoint["callbacks"].get(early_stopping.state_key, {})["patience"] = early_stopping.patience
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint["callbacks"].get(callback.state_key)
            old, new = Path(str(trainer.ckpt_path)).parent, Path(str(getattr(callback, "dirpath", "")))
            if not isinstance(callback, ModelCheckpoint) or not state or old.resolve() == new.resolve():
                continue
            kept = {*state["best_k_models"], state["best_model_path"], state["last_model_path"]}
            moved = {path: str(new / Path(path).name) for path in kept if (old / Path(path).name).is_file()}
            if trainer.is_global_zero:
                new.mkdir(parents=True, exist_ok=True)
                for path in moved.values():
                    with write_atomically(path, binary=True) as file:
                        file.write((old / Path(path).name).read_bytes())
            state["best_k_models"] = {moved[p]: score for p, score in state["best_k_models"].items() if p in moved}
            for name in ("best_model_path", "last_model_path", "kth_best_model_path"):
                state[name] = moved.get(state[name], "")
            state["dirpath"] = callback.dirpath


class ExperimentCLI(LightningCLI):
    """LightningCLI with named callbacks and loggers, one folder a run, and the best checkpoint evaluated after fit.

    Model and data are in subclass mode, and LightningCLI's own optimizer arguments are off, since optimizer and
    schedule belong to the model's signature.

    Args:
        args: The command line; None: that of the process.
    """

    run_dir: Path | None = None  # the run's folder, in the main process of a fit
    settings: dict[str, Any]  # what config.yaml says
    made: list[Path]  # the run's folder and those above it, as far as this process made them
    found: set[Path]  # what the run's folder held before
    trained = False  # whether a step of training has been made since

    def __init__(self, args: ArgsType = None) -> None:
        for message in WARNINGS:
            warnings.filterwarnings("ignore", message)
        checkpoints = "pytorch.trainer.connectors.checkpoint_connector"
        for name in ("pytorch.utilities.rank_zero", "fabric.utilities.seed", checkpoints):
            logging.getLogger(f"lightning.{name}").addFilter(_is_of_interest)
        given = sys.argv[1:] if args is None else args
        every = LightningCLI.subcommands()
        if isinstance(given, list) and given and given[0] in every:  # the others' parsers take a tenth of a second
            self.subcommands = lambda: {given[0]: every[given[0]]}  # type: ignore[method-assign]
        status = 1
        self.wandb_runs: list[Any] = []
        self.made, self.found = [], set()
        self.stop = StopBySignal()
        threading.excepthook = _tell_of_thread
        with self.stop:
            try:
                super().__init__(
                    LightningModule,
                    LightningDataModule,
                    subclass_mode_model=True,
                    subclass_mode_data=True,
                    auto_configure_optimizers=False,
                    save_config_callback=None,  # RunFolder does it, for any set of loggers
                    parser_class=Parser,
                    args=args,
                )
                self._close_tensorboard()
                status = 0
            except (Exception, SystemExit) as error:
                self._tell(error)
                raise
            finally:
                self.stop.close()
                self._clean_up(status)
                threading.excepthook = threading.__excepthook__

    def _tell(self, error: BaseException) -> None:
        """Tells in one line what a user can do something about, and exits; comes back from anything else."""
        if isinstance(error, MisconfigurationException | FloatingPointError):
            fail(str(error))
        if isinstance(error, RuntimeError) and "Early stopping conditioned on metric" in str(error):
            fail(str(error))  # its monitor is misspelt, or nothing is validated
        if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno in DISKS_FAULTS):
            where = error.filename or self.run_dir or Path.cwd()
            what = "" if isinstance(error, PermissionError) else " can't be written"  # it may be that it can't be read
            fail(f"{where}{what}: {error.strerror}{self._how_to_go_on()}")
        if number := self.stop.received:  # workers of a DataLoader may have got it, too, and be missed
            fail(f"stopped by {number.name}{self._how_to_go_on()}", 128 + number)
        if isinstance(error, Exception):
            fail_unless_own(error)

    def _clean_up(self, status: int) -> None:
        """Ends what the run began, and removes it if there is nothing to lose.

        Args:
            status: The exit status.
        """
        with contextlib.suppress(OSError):  # it has been told
            self._close_tensorboard()
        for run in self.wandb_runs:
            finish_wandb(run, status, keep=self.trained or status == 0)
        if self.run_dir and status and not self.trained:
            with contextlib.suppress(OSError):
                for path in set(self.run_dir.iterdir()) - self.found - set(versions(self.run_dir).values()):
                    remove(path)
            for folder in self.made:
                remove_if_empty(folder)
        if status and hasattr(self, "trainer") and self.trainer.strategy.launcher:
            self.trainer.strategy.launcher.kill(KILL)  # other processes would wait for this one

    def _close_tensorboard(self) -> None:
        for logger in self.trainer.loggers if hasattr(self, "trainer") else []:
            if isinstance(logger, RunFolderTensorBoard) and logger.run_dir:
                logger.experiment.close()

    def _how_to_go_on(self) -> str:
        if not (self.run_dir and self.trained):
            return ""
        if not (self.run_dir / "checkpoints/last.ckpt").exists():
            return "; there is no checkpoint yet"
        return f"; to go on: python main.py fit --config={self.run_dir / 'config.yaml'} --ckpt_path=last"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what a run has beside trainer, model and data."""
        for name, kind in (CALLBACKS | LOGGERS).items():
            others = "trainer.logger" if name in LOGGERS else "trainer.callbacks"
            help = f"{kind.__name__} or a subclass of it, beside those of {others}; null switches it off."
            parser.add_argument(f"--{name}", type=Optional[kind], default=None, help=help)  # noqa: UP045
        parser.add_argument(
            "--evaluate_best",
            type=bool,
            default=True,
            help="Whether fit ends with validating and testing the best checkpoint and writing metrics.json.",
        )
        parser.add_argument(
            "--num_threads",
            type=Threads,
            default=DEFAULT_NUM_THREADS,
            help="Threads of the CPU's operations. Their number changes the last digits of a sum, so it is saved in"
            " config.yaml. The default is torch's, one for each core.",
        )
        parser.add_argument(
            "--run_dir",
            type=Optional[str],  # noqa: UP045
            default=None,
            help="The run's folder, without a run in it; null: a new version_N in trainer.default_root_dir. It is not"
            " saved, since a rerun gets a folder of its own.",
        )

    def _parse_ckpt_path(self) -> None:
        """LightningCLI would let the checkpoint's settings win over the YAML's; here the YAML is the experiment."""

    def _set_seed(self) -> None:
        """Sets the seed; an earlier run's in the same process doesn't live on.

        Raises:
            MisconfigurationException: If it is out of range.
        """
        os.environ.pop("PL_GLOBAL_SEED", None)
        try:
            super()._set_seed()
        except ValueError as error:
            raise MisconfigurationException(f"seed_everything: {error}") from error

    def before_instantiate_classes(self) -> None:
        """Turns `best` and `last` into a path, and keeps the config for the run's folder."""
        config = self.config[self.subcommand]
        if config.ckpt_path in ("best", "last") or (config.ckpt_path is None and self.subcommand != "fit"):
            # The run whose config.yaml was given, or else the newest.
            given = [Path(file.absolute).parent for file in config.config or []]
            root = Path(config.trainer.default_root_dir or ".")
            named = "last.ckpt" if config.ckpt_path == "last" else ""  # a run that was killed may have none yet
            runs = [run for run in [*versions(root).values(), *given] if (run / "checkpoints" / named).exists()]
            if not runs:
                raise MisconfigurationException(
                    f"there is no run with a checkpoint in {root}: fit first, or give --ckpt_path=FILE"
                )
            config.ckpt_path = find_checkpoint(runs[-1], config.ckpt_path or "best")
        torch.set_num_threads(config.num_threads)
        self.swept = swept(config.config or [])
        # Without ckpt_path: a resumed run ends like one that was never stopped, and needs no other run's file for it.
        dump = self.parser.dump(self.config, "json", skip_unset=False, skip_validation=True)
        self.settings = {**json.loads(dump)[self.subcommand], "ckpt_path": None, "run_dir": None}
        self.config_yaml = yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True)
        # LightningCLI would make this when it instantiates, but validate it once more.
        dump = self.parser.dump(self.config, "json", skip_link_targets=False, skip_unset=False, skip_validation=True)
        self.config_dump = json.loads(dump)[self.subcommand]
        if config.ckpt_path is not None:
            self.config_yaml = f"# resumed from {config.ckpt_path}\n{self.config_yaml}"
        # Lightning would unpickle anything from a URL, and a variable of torch's environment could have it do so.
        config.weights_only = config.weights_only is not False

    def instantiate_classes(self) -> None:
        """Instantiates all that the config names.

        Raises:
            MisconfigurationException: If a class refuses its settings.
        """
        try:
            super().instantiate_classes()
        except USERS_MISTAKES as error:
            reason = chain_of(error)[-1]  # jsonargparse wraps what a constructor raises, whatever it is
            if isinstance(reason, USERS_MISTAKES) and not os.environ.get("JSONARGPARSE_DEBUG"):
                frames = [frame for frame, _ in traceback.walk_tb(reason.__traceback__)]
                made = [type(frame.f_locals["self"]).__name__ for frame in frames if "self" in frame.f_locals]
                # Python's own words don't say where: '<' not supported between instances of 'NoneType' and 'int'.
                place = f"{made[-1]}: " if made and isinstance(reason, TypeError) else ""
                raise MisconfigurationException(f"{place}{reason}") from error
            raise  # no setting, but a fault in the class: its author wants the traceback

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds the named callbacks and loggers to the trainer's own."""
        config = self.config_init[self.subcommand]
        trainer = config.trainer
        if trainer.logger in (None, True):
            named = [config[name] for name in LOGGERS if config[name] and not trainer.barebones]
            # An evaluation prints its numbers; it is no run.
            kwargs["logger"] = (named if self.subcommand == "fit" else []) or (None if trainer.barebones else False)
        off = set(CALLBACKS) if trainer.barebones else {name for name in CALLBACKS if not config[name]}
        if self.subcommand != "fit":
            warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks used to create")
            off |= CALLBACKS.keys() - {"test_pictures", "predictions", "progress_bar"}
        if trainer.enable_checkpointing is False or trainer.fast_dev_run:  # the latter would save all the same
            off |= {"checkpoint", "last_checkpoint"}
        given = trainer.callbacks or []
        given = given if isinstance(given, list) else [given]
        if trainer.enable_progress_bar is False or any(isinstance(callback, ProgressBar) for callback in given):
            off.add("progress_bar")  # there can be only one
        if not kwargs.get("logger", trainer.logger):
            off.add("lr_monitor")
        callbacks = [*given, *(config[name] for name in CALLBACKS if name not in off), RunFolder(self)]
        if self.subcommand == "fit" and not trainer.barebones:
            if not any(isinstance(callback, Checkpoint) for callback in callbacks):
                kwargs["enable_checkpointing"] = True  # for what stops a run, and saves nothing then
            callbacks.append(self.stop)
        # Where there is none, Lightning would put its own.
        for kind, switch in ((Checkpoint, "enable_checkpointing"), (ProgressBar, "enable_progress_bar")):
            if not any(isinstance(callback, kind) for callback in callbacks):
                kwargs[switch] = False
        if trainer.profiler is None and not trainer.barebones:
            kwargs["profiler"] = NoProfiler()
        # With trainer.deterministic, torch would fill each new tensor, which takes a twelfth of a step. It is for
        # operations that read what they haven't written; a net that does so isn't reproducible in any case.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        for owner in (*callbacks, self.model):
            skip_empty_hooks(owner)
        made = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        if type(made.strategy.checkpoint_io) is TorchCheckpointIO:
            made.strategy.checkpoint_io = AtomicCheckpointIO()
        return made

    def before_fit(self) -> None:
        """Makes the run's folder and tells the callbacks and loggers; starts the loggers."""
        self._start = time.monotonic()
        trainer = self.trainer
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return self.before_validate()
        given = self.config[self.subcommand].run_dir
        folders = [given] if given else [logger.log_dir for logger in trainer.loggers if logger.log_dir]
        self._check_checkpoint()
        for callback in trainer.checkpoint_callbacks:
            if (elsewhere := getattr(callback, "dirpath", None)) and "://" not in elsewhere:
                check_writable(Path(elsewhere))
        root = Path(folders[0] if folders else trainer.default_root_dir)
        new = [folder for folder in (root, *root.parents) if not folder.exists()]
        try:
            run_dir = root if folders else new_version(root)
            run_dir.mkdir(parents=True, exist_ok=True)
            found = set(run_dir.iterdir())
            (run_dir / "config.yaml").touch(exist_ok=False)  # two processes can't both do that
        except OSError as error:
            if folders and (root / "config.yaml").exists():
                raise MisconfigurationException(f"{root} holds a run already: give the run another folder") from None
            raise MisconfigurationException(f"{root} can't be written: {error.strerror}") from error
        self.run_dir, self.found, self.made = run_dir, found, [run_dir, *new] if run_dir != root else new
        with write_atomically(run_dir / "config.yaml") as file:
            file.write(self.config_yaml)
        if trainer.checkpoint_callbacks != [self.stop]:
            self.stop.path = run_dir / "checkpoints/last.ckpt"
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.run_dir.absolute() / "checkpoints")
        for logger in trainer.loggers:
            if isinstance(logger, RunFolderTensorBoard):
                logger.begin(str(self.run_dir))
        self._start_wandb()

    def before_validate(self) -> None:
        """Sees to it that the checkpoint fits the model, and starts W&B if trainer.logger names it."""
        self._check_checkpoint()
        self._start_wandb()

    before_test = before_predict = before_validate

    def _check_checkpoint(self) -> None:
        config = self.config[self.subcommand]
        # Not what Lightning fetches from elsewhere: its keywords and URLs.
        if config.ckpt_path is not None and not re.match(r"hpc$|registry|\w+://", str(config.ckpt_path)):
            settings = self.settings["model"] if self.subcommand == "fit" else None
            check_checkpoint(config.ckpt_path, self.model, config.weights_only, settings)

    def _start_wandb(self) -> None:
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger) and self.trainer.is_global_zero:
                folder = Path(logger.save_dir or ".").absolute()
                self.made += [new for new in (folder, *folder.parents) if not new.exists()]
                self.wandb_runs.append(start_wandb(logger))

    def after_fit(self) -> None:
        """Validates and tests the best checkpoint, writes metrics.json and prints a table."""
        trainer = self.trainer
        if trainer.fast_dev_run or not self.config_init.fit.evaluate_best:  # type: ignore[attr-defined]
            return
        seconds, epochs = time.monotonic() - self._start, trainer.current_epoch
        # That of a callback with a monitor; without one, best means latest.
        by_monitor = sorted(trainer.checkpoint_callbacks, key=lambda c: getattr(c, "monitor", None) is None)
        best = next(filter(None, (getattr(callback, "best_model_path", "") for callback in by_monitor)), None)
        metrics: dict[str, Any] = {}
        for evaluate, step in ((trainer.validate, "validation_step"), (trainer.test, "test_step")):
            if is_overridden(step, self.model):
                config = self.config_init.fit
                for result in evaluate(self.model, None, best, False, self.datamodule, config.weights_only):
                    metrics |= result
        if self.run_dir is None:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                log_hyperparameters(logger, self.settings, self.swept, metrics, trainer.global_step)
        print(table(metrics))
        metrics |= {
            "epochs": epochs,
            "seconds": seconds,
            "best_checkpoint": best and os.path.relpath(best, self.run_dir),
        }
        with write_atomically(self.run_dir / "metrics.json") as file:
            json.dump(metrics, file, indent=2)
        duration = f"{epochs} epoch{'s' * (epochs != 1)} in {seconds:.0f} s"
        print(f"{duration}. The run, with its config.yaml and metrics.json: {self.run_dir}")


def swept(configs: Sequence[Any]) -> dict[str, Any]:
    """What a sweep varies, as the first line of a config file says that sweep.py wrote; nothing in other files."""
    for path in filter(None, configs):  # None: settings typed in place of a file's name
        with contextlib.suppress(OSError, ValueError), open(path.absolute, encoding="utf-8") as file:
            if (line := file.readline()).startswith("# swept: "):
                return json.loads(line.removeprefix("# swept: "))
    return {}


def versions(root: Path) -> dict[int, Path]:
    """The run folders version_N of a folder by their N, ascending."""
    found = {int(f.name[8:]): f for f in root.glob("version_*") if f.name[8:].isdigit() and f.is_dir()}
    return dict(sorted(found.items()))


def new_version(root: Path) -> Path:
    """Makes the next free version_N. Two processes never get the same one."""
    while True:
        try:
            root.mkdir(parents=True, exist_ok=True)
            folder = root / f"version_{max(versions(root), default=-1) + 1}"
            folder.mkdir()
            return folder
        except (FileExistsError, FileNotFoundError) as error:
            # Another process made it, or removed root, which was empty; unless it is a file, or a link to nowhere.
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISDIR(os.lstat(error.filename).st_mode):
                    raise error


def find_checkpoint(run: Path, which: str) -> str:
    """The best or the last checkpoint of a run's folder.

    Raises:
        MisconfigurationException: If there is none.
    """
    path = run / "checkpoints" / "last.ckpt"
    if which == "best":
        try:
            path = run / json.loads((run / "metrics.json").read_text())["best_checkpoint"]
        except (OSError, ValueError, KeyError, TypeError):
            raise MisconfigurationException(
                f"{run} has no metrics.json that names a best checkpoint (its fit didn't end): give --ckpt_path=last"
                " or a file"
            ) from None
    return str(path)


def check_checkpoint(
    path: str, model: LightningModule, weights_only: bool, settings: dict[str, Any] | None = None
) -> None:
    """Sees to it that a checkpoint can be read and has the model's weights, name by name and shape by shape.

    Args:
        path: The checkpoint.
        model: The model that is to be given its weights.
        weights_only: As in torch.load.
        settings: The model's part of the config, if training is to go on: then they must be the checkpoint's own,
            since Lightning restores optimizer and schedule as they were.

    Raises:
        MisconfigurationException: If it isn't so.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
        shapes = [
            {name: tuple(value.shape) for name, value in state.items()}
            for state in (checkpoint["state_dict"], model.state_dict())
        ]
    except FileNotFoundError:
        raise MisconfigurationException(f"there is no checkpoint {path}") from None
    except (KeyError, TypeError, AttributeError):
        raise MisconfigurationException(f"{path} is no checkpoint of Lightning's") from None
    except Exception as error:  # torch raises what a file makes it raise
        if weights_only and (isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)):
            raise MisconfigurationException(
                f"checkpoint {path} is damaged, or holds more than tensors and plain settings, which might execute"
                " anything: give --weights_only=false if you trust who made it"
            ) from None
        raise MisconfigurationException(f"checkpoint {path} can't be read, it may be cut off: {error}") from None
    for name in {**shapes[0], **shapes[1]}:
        theirs, ours = (shape.get(name, "missing") for shape in shapes)
        if theirs != ours:
            raise MisconfigurationException(
                f"checkpoint {path} is of another net: {name} is {theirs} in it and {ours} in the model; its own"
                " config.yaml has the settings that fit"
            )
    if settings is None:
        return
    if not checkpoint.get("optimizer_states"):
        raise MisconfigurationException(f"checkpoint {path} holds weights only: training can't go on from it")
    made_with = {key: value for key, value in checkpoint.get("hyper_parameters", {}).items() if key[0] != "_"}
    if made_with:  # an older version of the class had fewer settings
        parameters = inspect.signature(type(model)).parameters.values()
        made_with = {p.name: p.default for p in parameters if p.default is not p.empty} | made_with
    old, new = (flatten({"model": value}) for value in (made_with, settings.get("init_args", {})))
    for name in {**old, **new} if made_with else {}:
        if old.get(name) != new.get(name):
            raise MisconfigurationException(
                f"checkpoint {path} was made with {name}={old.get(name)}, not {new.get(name)}: a resumed run keeps the"
                " model's settings"
            )


def table(metrics: dict[str, float]) -> str:
    """A line for each stage, a column for each of its metrics."""
    stages = dict.fromkeys(name.partition("/")[0] for name in metrics)
    names = dict.fromkeys(name.partition("/")[2] for name in metrics)
    rows = [["", *names]]
    for stage in stages:
        rows.append([stage, *(f"{metrics.get(f'{stage}/{name}', float('nan')):.4f}" for name in names)])
    return "\n".join(f"{row[0]:6}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows)
