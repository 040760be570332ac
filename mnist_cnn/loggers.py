"""TensorBoard in the run's folder, W&B with or without an account, and the same pictures and histograms to both."""

import contextlib
import http.client
import json
import os
import re
import secrets
import shlex
import shutil
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from mnist_cnn.files import remove_if_empty


class RunFolderTensorBoard(TensorBoardLogger):
    """Lightning's TensorBoardLogger, writing into the run's own folder.

    Args:
        max_queue: Events kept before they are written.
        flush_secs: Seconds after which they are written; what a run may wait for at its end if a signal broke off the
            writing.
    """

    run_dir: str | None = None

    def __init__(self, max_queue: int = 10, flush_secs: int = 10) -> None:
        super().__init__("", name="", version="", default_hp_metric=False, max_queue=max_queue, flush_secs=flush_secs)

    def begin(self, run_dir: str) -> None:
        """Begins a run in its folder, with charts of training and validation together in the tab Custom Scalars."""
        self.run_dir = run_dir
        charts = {name: ["Multiline", [f"(train|val)/{name}"]] for name in ("loss", "acc")}
        self.experiment.add_custom_scalars({"train and val": charts})

    @property
    def log_dir(self) -> str:
        """The run's folder; empty before a fit."""
        return self.run_dir or ""

    def finalize(self, status: str) -> None:
        """Flushes. The file stays open, since validation and test follow fit: one run, one file."""
        if self._experiment is not None:
            self._experiment.flush()

    def save(self) -> None:
        """Flushes. There is no hparams.yaml, since config.yaml says it all."""
        self.experiment.flush()


def log_histograms(trainer: Trainer, values: dict[str, Tensor], bins: int) -> None:
    """Logs a histogram of each tensor's finite values to each TensorBoardLogger and WandbLogger."""
    histograms = {}
    for tag, value in values.items():
        # On the CPU, since histogram functions on CUDA aren't deterministic.
        array = value.detach().flatten().float().cpu().numpy()
        array = array[np.isfinite(array)]
        if array.size:
            histograms[tag] = (array, *np.histogram(array, bins))
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            for tag, (array, counts, edges) in histograms.items():
                logger.experiment.add_histogram_raw(
                    tag,
                    min=float(array.min()),
                    max=float(array.max()),
                    num=array.size,
                    sum=float(array.sum(dtype=np.float64)),
                    sum_squares=float(np.square(array, dtype=np.float64).sum()),
                    bucket_limits=edges[1:].tolist(),
                    bucket_counts=counts.tolist(),
                    global_step=trainer.global_step,
                )
        elif isinstance(logger, WandbLogger):
            import wandb

            pictures: Any = {tag: wandb.Histogram(np_histogram=(c, e)) for tag, (_, c, e) in histograms.items()}
            logger.log_metrics(pictures, trainer.global_step)


def to_picture(figure: Figure) -> np.ndarray:
    """Draws a Matplotlib figure: uint8 [H, W, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def log_figure(trainer: Trainer, tag: str, figure: Figure) -> None:
    """Logs a Matplotlib figure as a picture to each TensorBoardLogger and WandbLogger."""
    picture = to_picture(figure)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, picture, trainer.global_step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(tag, [picture], trainer.global_step)


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """Settings by short names: `{"model.net": "CNN", "model.net.l1_chan": 4, ...}`, without what is null."""
    flat: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            if "class_path" in value:
                flat[name] = value["class_path"].rpartition(".")[2]
                value = value.get("init_args", {})
            for key, item in value.items():
                add(f"{name}.{key}", item)
        elif value is not None:
            plain = isinstance(value, int | float | str) and not isinstance(value, bool)
            flat[name] = value if plain else json.dumps(value)  # TensorBoard would show true as 1.0000

    for name, value in config.items():
        add(name, value)
    return flat


def log_hyperparameters(
    logger: TensorBoardLogger, config: dict[str, Any], swept: dict[str, Any], metrics: dict[str, float], step: int
) -> None:
    """Fills the run's row in TensorBoard's HParams tab.

    In a sweep, that is what was swept, by the last part of its key, and the metrics. Otherwise it is seed, model and
    data, of which TensorBoard puts in front what differs between runs; it does so only where no run says which columns
    there are, as those of a sweep and Lightning's do.

    Args:
        logger: Where to.
        config: The run's whole config.
        swept: What a sweep varies: key as on the command line -> value.
        metrics: Those at the end. Losses come last, since TensorBoard colours and sorts by the first.
        step: The step to log them at.
    """
    metrics = dict(sorted(metrics.items(), key=lambda item: "loss" in item[0]))
    if not swept:
        from torch.utils.tensorboard.summary import hparams

        _, *row = hparams(flatten({name: config[name] for name in ("seed_everything", "model", "data")}), metrics)
        for summary in row:
            logger.experiment._get_file_writer().add_summary(summary, step)
        return
    flat = flatten(config)
    shown: dict[str, Any] = {}
    names = {key: key.replace(".init_args", "").removesuffix(".class_path") for key in swept}
    last = [name.rpartition(".")[2] for name in names.values()]
    for key, name in names.items():
        value = str(swept[key]) if key == "config" else flat.get(name, "null")  # which files were laid over it
        if isinstance(swept[key], dict):  # a class with its arguments
            arguments = (item.removeprefix(f"{name}.") for item in flat if item.startswith(f"{name}."))
            named = [str(flat[name])] if name in flat else []
            value = " ".join([*named, *(f"{item}={flat[f'{name}.{item}']}" for item in arguments)])
        short = name.rpartition(".")[2]
        shown[short if last.count(short) == 1 else name] = value
    logger.log_hyperparams(shown, metrics, step)


def start_wandb(logger: WandbLogger) -> Any:
    """Starts a W&B run: online where that works, otherwise offline. Never asks, never fails, never waits long.

    Args:
        logger: A logger whose run has not begun.

    Returns:
        The W&B run.

    Raises:
        MisconfigurationException: If WANDB_MODE is none of W&B's modes.
    """
    import wandb

    def set_mode(mode: Any) -> None:
        # finish_timeout: what isn't uploaded by then stays on disk, for wandb sync.
        wandb.setup(wandb.Settings(mode=mode, silent=True, init_timeout=5, finish_timeout=10))
        logger._wandb_init["mode"] = mode

    # Absolute, since W&B's server process may have been started in another folder; there, since W&B would go elsewhere.
    logger._wandb_init["dir"] = os.path.abspath(logger.save_dir or ".")
    os.makedirs(logger._wandb_init["dir"], exist_ok=True)
    if logger._wandb_init.get("anonymous") is None:
        logger._wandb_init.pop("anonymous", None)  # W&B warns of it, given or not
    in_yaml = "offline" if logger._offline else logger._wandb_init.get("mode")
    logger._offline = False  # Lightning would set WANDB_MODE for the whole process
    wanted = os.environ.get("WANDB_MODE") or in_yaml
    settings = logger._wandb_init  # with an id, the folder of a run that W&B gives up is known
    settings["id"] = settings.get("id") or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    pattern = f"wandb/run-*-{settings['id']}"
    there = set(Path(settings["dir"]).glob(pattern))
    try:
        set_mode(wanted or "online")
    except ValueError:
        raise MisconfigurationException(f"WANDB_MODE={wanted} is none of W&B's modes") from None
    try:
        if wanted in (None, "online", "run"):
            url = wandb.setup().settings.base_url
            if not wandb.login(prompt=False, verify=False):
                if wanted:  # otherwise it is the usual case: no account
                    print("W&B: there is no API key, so the run is offline", file=sys.stderr)
                set_mode("offline")
            elif not answers(url):
                shown = re.sub(r"//[^/]*@", "//", url)  # without a user's name and password
                print(f"W&B: {shown} can't be reached, so the run is offline", file=sys.stderr)
                set_mode("offline")
        run = logger.experiment
    except wandb.Error as error:
        reason = str(error).partition("\n")[0]  # what follows is advice
        print(f"W&B: {reason}; so the run is offline", file=sys.stderr)
        wandb.teardown()  # or else the id would be in use
        for folder in set(Path(settings["dir"]).glob(pattern)) - there:
            shutil.rmtree(folder, ignore_errors=True)
        set_mode("offline")
        run = logger.experiment
    if not run.offline and run.url:
        print(f"W&B: {run.url}")
    return run


def finish_wandb(run: Any, status: int, keep: bool) -> None:
    """Ends a W&B run.

    Args:
        run: The run. If it is offline, how to sync it is said.
        status: Its exit status.
        keep: Whether an offline run's folder stays.
    """
    import wandb

    offline, folder = run.offline, Path(run.settings.sync_dir)
    try:
        run.finish(exit_code=status)
    except (OSError, wandb.Error) as error:  # its process was killed; what is on the disk may end before the run
        print(f"W&B: the run isn't finished there: {error}", file=sys.stderr)
        with contextlib.suppress(Exception):  # or else it would be tried again at the interpreter's end
            wandb.teardown()
    if offline and not keep:
        shutil.rmtree(folder, ignore_errors=True)
        if not any(folder.parent.glob("*run-*/")):  # then W&B's links to its debug logs lead nowhere
            for link in folder.parent.iterdir():
                if link.is_symlink() and not link.exists():
                    link.unlink()
            remove_if_empty(folder.parent)
    elif offline:
        if folder.is_relative_to(Path.cwd()):
            folder = folder.relative_to(Path.cwd())
        quoted = shlex.quote(str(folder))
        print(f"W&B: look at the run with `wandb leet {quoted}`, upload it with `wandb sync {quoted}`")


def answers(url: str) -> bool:
    """Whether an HTTP server answers there within 3 seconds, with any status."""
    heard = []

    def ask() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            with contextlib.suppress(urllib.error.HTTPError):
                urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=3)
            heard.append(True)

    # In a thread, since urllib's timeout is for each packet, each address and each redirect, and not for names.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(3)
    return bool(heard)
