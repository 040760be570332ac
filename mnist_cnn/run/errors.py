"""User mistakes, reported in one line, and the argument parser that reports them."""

import difflib
import inspect
import pydoc
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule
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

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """Checks that a config file is YAML with settings; jsonargparse would not name the file."""
        try:
            content = yaml.load(Path(path).read_text(encoding="utf-8"), yaml.CSafeLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"config file {path} is not valid YAML: {error}") from error
        if not isinstance(content, dict):
            raise UserError(f"config file {path} has no settings (key: value)")
        return super().parse_path(path, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a nested parser; the outer one reports the error
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        fail(explain(message, [*parser.get_defaults().keys(), "model", "data"]), status=2)


def explain(message: str, known: Iterable[str] = ()) -> str:
    """Shortens jsonargparse's message, of up to 65 lines, to the key, the innermost reason and the value."""
    key = ".".join(re.findall(r'Parser key "([\w.]+)"', message))
    if unknown := re.search(r"ption '([\w.]+)'|arguments: --([\w.]+)", message):
        name = unknown[1] or unknown[2]
        if classes := re.findall(r"class_path[= ]'([\w.]+)'", message):
            known = inspect.signature(pydoc.locate(classes[-1])).parameters  # type: ignore[arg-type]
        # An argument of a class may follow the misspelt name: --early_stoping.patience.
        return f"unknown key {key}{key and '.'}{name}{nearest(name, known) or nearest(name.split('.')[0], known)}"
    lines = re.split(r"\n[ -]*|Type typing\..* class: |Parser key \S+: ?|\. Got value: ", message)
    reason = next((line for line in lines if line.strip() and not NOISE.match(line)), message)
    if missing := re.search(r"dot import path string: (\S+)", reason):
        kinds: list[type[Any]] = [nn.Module, LightningDataModule, Optimizer, LRScheduler, Callback, Logger]
        for kind in kinds:  # grows while it is walked
            kinds += kind.__subclasses__()
        similar = nearest(missing[1], [kind.__name__ for kind in kinds if "torchvision" not in kind.__module__])
        hint = "; null disables it" if missing[1].lower() == "false" else similar
        return f"{key}: there is no class {missing[1]} of this kind{hint}"
    value = re.search(r"(?:Got|Given) value: (.*?)(?:\. Got value|$)", message, re.MULTILINE)
    if value and reason.startswith(("Expected", "Not a")):
        reason = re.sub(r"<class '([\w.]+)'>", r"\1", reason) + f", got {value[1]!r}"
    return f"{key}: {reason}" if key else reason
