"""User mistakes, reported in one line, and the argument parser that reports them."""

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

# A config may name nets and callbacks, not os.system.
set_parsing_settings(import_path_denylist=[], instantiate_subclass_spec_in_any=False)
# Lines of jsonargparse's messages that say where it looked, not what is wrong.
NOISE = re.compile(r"Expected a path but|Does not|Subtypes|Errors|Expected (a )?<class 'None|Problem|Given value")


class UserError(Exception):
    """A mistake that the user can correct; its message says what is wrong and what to do, in one line."""


def fail(message: str, status: int = 1) -> NoReturn:
    """Prints `error: message` on one line of standard error and exits."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(status)


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` with the most similar of the known names; empty if none is similar."""
    return "".join(f" (did you mean {match}?)" for match in difflib.get_close_matches(name, list(known), n=1))


class Parser(LightningArgumentParser):
    """LightningArgumentParser whose errors are one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)  # --trainer.max_epoch is not short for max_epochs

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a nested parser; the outer one reports the error
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        fail(explain(message, [*parser.get_defaults().keys(), "model", "data"]), status=2)


def explain(message: str, known: Iterable[str] = ()) -> str:
    """Shortens jsonargparse's message, of up to 65 lines, to the key, the innermost reason and the value.

    Args:
        message: jsonargparse's message.
        known: The keys of the parser, of which the most similar one to a misspelt key is suggested.
    """
    key = ".".join(re.findall(r'Parser key "([\w.]+)"', message))
    if unknown := re.search(r"(?:Group '(\w+)' does not accept o|O|o)ption '([\w.]+)'|arguments: --([\w.]+)", message):
        name = ".".join(filter(None, unknown.groups()))
        if classes := re.findall(r"class_path[= ]'([\w.]+)'", message):
            module, _, class_name = classes[-1].rpartition(".")
            known = inspect.signature(getattr(importlib.import_module(module), class_name)).parameters
        # An argument of a class may follow the misspelt name: --early_stoping.patience.
        return f"unknown key {key}{key and '.'}{name}{nearest(name, known) or nearest(name.split('.')[0], known)}"
    message = re.sub(r"Type typing\.\S.* callable class: |Parser key \S+:", "\n", message)
    lines = (line.strip(" -") for line in message.splitlines())
    reason = next((line for line in lines if line and not NOISE.match(line)), message).partition(". Got value")[0]
    given = re.search(r"(?:Got|Given) value: (?!NestedArg|\[?Namespace)(.*?)(?:\. Got value|$)", message, re.MULTILINE)
    if missing := re.search(r"dot import path string: (\S+)", reason):
        if missing[1].lower() == "false":
            return f"{key}: use null, not false, to disable it"
        reason = f"there is no class {missing[1]} of this kind{similar_class(missing[1])}"
    elif denied := re.search(r"Importing '([\w.]+)' is not allowed", reason):
        reason = f"{denied[1]} is not allowed in a config"
    reason = re.sub(r"Expected (?:an? )?(?:<class '(\w+)'>|typing\.)?", r"expected \1", reason)
    value = f", got {given[1]!r}" if given and reason.startswith(("expected", "Not a")) else ""
    return f"{key}: {reason}{value}" if key else reason


def similar_class(name: str) -> str:
    """` (did you mean X?)` with the most similar class that a config may give; the user's own ones come first."""
    classes: list[type] = [nn.Module, LightningModule, LightningDataModule, Callback, Logger, Optimizer, LRScheduler]
    for base in classes:  # grows while it is walked
        subclasses: list[type] = base.__subclasses__()
        classes += [kind for kind in subclasses if kind not in classes]
    own = [kind.__name__ for kind in classes if not kind.__module__.startswith(("torch", "lightning", "kornia"))]
    return nearest(name, own) or nearest(name, [kind.__name__ for kind in classes])
