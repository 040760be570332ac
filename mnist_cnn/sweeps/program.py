"""The program that is swept: a function that takes command-line arguments and returns its LightningCLI."""

import contextlib
import importlib
import io
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from mnist_cnn.run.config import flatten
from mnist_cnn.run.errors import UserError, explain, fail
from mnist_cnn.run.folder import write_metrics


def import_program(program: str) -> Callable[[list[str]], Any]:
    """Imports the function that `module:function` names; the module may be in the working directory."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module, _, function = program.partition(":")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the threads of OpenMP, if the import started them, would block the runs that are forked
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, SyntaxError, AttributeError) as error:
        raise UserError(f"program {program} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        torch.set_num_threads(threads)


def print_config(program: str, args: list[str]) -> dict[str, Any]:
    """The complete config that the program's `fit --print_config` prints."""
    function, output, errors = import_program(program), io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            function(["fit", *args, "--print_config"])
    except SystemExit as ended:
        if ended.code:
            message = re.split("^error: ", errors.getvalue(), flags=re.MULTILINE)[-1].strip()
            known = [".".join(key) for key in flatten(print_config(program, []))] if args else []
            raise UserError(explain(message or str(ended.code), known)) from None
    config = yaml.load(output.getvalue(), yaml.CSafeLoader)
    if not isinstance(config, dict):
        remedy = "pass its arguments to LightningCLI(args=...)"
        raise UserError(f"program {program} prints no config for `fit --print_config`: {remedy}")
    return config


def run_program(program: str, config: Path, run: Path) -> None:
    """Executes a run in this process; writes config.yaml and metrics.json into its folder if the program does not."""
    function, settings = import_program(program), yaml.load(config.read_bytes(), yaml.CSafeLoader)
    option = "run_dir" if "run_dir" in settings else "trainer.default_root_dir"
    args = ["fit", f"--config={config}", f"--{option}={run}"]
    sys.argv = [str(sys.modules[function.__module__].__file__), *args]  # Lightning starts further processes with it
    os.environ |= {"WANDB_RUN_GROUP": run.parent.name, "WANDB_NAME": run.name, "WANDB_PROGRAM": sys.argv[0]}
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")
    start = time.monotonic()
    cli = function(args)
    if not hasattr(cli, "trainer"):
        fail(f"program {program} must return its LightningCLI; it returned {cli!r}")
    if not (run / "config.yaml").exists():
        shutil.copy(config, run / "config.yaml")
    if not (run / "metrics.json").exists():
        metrics = {key: value.item() for key, value in cli.trainer.callback_metrics.items()}
        write_metrics(run, cli.trainer, metrics, time.monotonic() - start)
    if "wandb" in sys.modules:  # a forked process skips the exit handlers, with which W&B closes a run
        sys.modules["wandb"].finish()
