"""A user's mistake, told in one line of the user's words; the parser that tells it."""

import difflib
import importlib.util
import inspect
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

LIBRARIES = ("torch", "lightning", "pytorch", "kornia")
# Files whose frames in a traceback are nothing that the user wrote.
LIBRARY = re.compile(rf"[\\/](site|dist)-packages[\\/]|^<|^{re.escape(sysconfig.get_path('stdlib'))}")
PROJECT = str(Path(__file__).parent)

# A config names nets and callbacks, not os.system; jsonargparse would only warn of it, and make any class where any
# value will do. Its next version won't.
set_parsing_settings(import_path_denylist=[], instantiate_subclass_spec_in_any=False)


class Parser(LightningArgumentParser):
    """LightningArgumentParser whose errors are one line that names the nearest right key."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)  # --trainer.max_epoch is a mistake, not max_epochs

    def parse_args(self, args: Any = None, *more: Any, **kwargs: Any) -> Any:
        """Remembers the arguments, so that an error can name the file that it lies in."""
        given = sys.argv[1:] if args is None else list(args)
        # Absolute paths, too, since jsonargparse parses a file in the file's own folder.
        paths = [value.removeprefix("--config=") for value in given if isinstance(value, str)]
        self._files = {path: Path(path).absolute() for path in paths}
        try:
            return super().parse_args(args, *more, **kwargs)
        except UnicodeDecodeError as error:
            self.error(f"Problems parsing config: {error}")
        except Exception as error:
            if self.exit_on_error:  # unlike the parsers of classes within it
                fail_unless_own(error)
            raise

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints what was wrong to standard error, in one line, and exits with status 2."""
        if not self.exit_on_error or os.environ.get("JSONARGPARSE_DEBUG"):  # the latter is jsonargparse's own switch
            super().error(message, ex)
        fail(explain(message, getattr(ex, "subcommand_parser", None) or self, getattr(self, "_files", {})), status=2)


def fail(message: str, status: int = 1) -> NoReturn:
    """Prints one line to standard error and exits."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(status)


def chain_of(error: BaseException) -> list[BaseException]:
    """An exception, what it was raised from or while handling, and so on; each once, since a chain may be a circle."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) and inner not in chain:
        chain.append(inner)
    return chain


def fail_unless_own(error: BaseException) -> None:
    """Tells in one line what a library or this project raised, and exits; comes back if a class of the user's own did.

    Whoever wrote it wants the traceback, and sees it for anything with JSONARGPARSE_DEBUG=1.

    Args:
        error: What was raised.
    """
    frames: list[traceback.FrameSummary] = []
    for link in chain_of(error):
        frames += [frame for frame in traceback.extract_tb(link.__traceback__) if not LIBRARY.search(frame.filename)]
    own = any(not frame.filename.startswith(PROJECT) for frame in frames)
    if not own and not os.environ.get("JSONARGPARSE_DEBUG"):
        place = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}; " if frames else ""
        fail(f"{type(error).__name__}: {error} ({place}JSONARGPARSE_DEBUG=1 shows the traceback)")


def explain(message: str, parser: LightningArgumentParser, files: dict[str, Path]) -> str:
    """Says in the user's words what jsonargparse says in a paragraph.

    Args:
        message: jsonargparse's message.
        parser: The parser whose keys are the right ones.
        files: What on the command line may be a file, by its name there.

    Returns:
        The key, the value and, for a misspelt name, the nearest right one.
    """
    if message.startswith(("Unexpected config", "Problems parsing config")):
        for path in (path for path, file in files.items() if os.path.isfile(file)):
            try:
                content = yaml.safe_load(files[path].read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                return f"config file {path} is not valid YAML: {error}"
            if not isinstance(content, dict):
                return f"config file {path} {'is empty' if content is None else 'holds no settings (key: value)'}"
    if "File does not exist" in message:
        return f"there is no config file {message.rpartition(': ')[2]}"
    key = ".".join(re.findall(r'Parser key "([\w.]+)"', message))
    unknown = re.search(
        r"Option '([\w.]+)' is not accepted|unrecognized arguments: --([\w.]+)|option '([\w.]+)'", message
    )
    if unknown:
        name = next(filter(None, unknown.groups()))
        classes = re.findall(r"class_path[= ]'([\w.]+)'", message)
        if key and classes:
            module, _, class_name = classes[-1].rpartition(".")
            parameters = inspect.signature(getattr(importlib.import_module(module), class_name)).parameters
            return f"unknown key {key}.{name}{_nearest(name.split('.')[0], parameters)}"
        known = [action.dest for action in parser._actions]
        return f"unknown key {name}{_nearest(name, known) or _nearest(name.split('.')[0], known)}"
    value = re.findall(r"(?:Got|Given) value: (?!NestedArg|Namespace)(.*)", message)
    given_value = value[0].partition(". Got value")[0] if value else ""
    types = re.findall(r"Expected (?:an? )?(?:<class '([\w.]+)'>|typing.(Literal\[.*?\]))", message)
    types = [name for pair in types for name in pair if name and name != "NoneType"]
    missing = re.search(
        r"dot import path string: (\S+)|given class_path '(\S+)':\s*(?:No module|.* has no attr)", message
    )
    if missing and given_value.lower() == "false":
        return f"{key}: false is no value; null switches it off"
    if missing and not {"int", "float", "str"} & set(types):
        path = missing[1] or missing[2]
        name = path.rpartition(".")[2]
        if path in _classes():
            return f"{key}: {path} is a class of another kind"
        module = path.partition(".")[0]
        if module != path and module not in sys.modules and importlib.util.find_spec(module) is None:
            return f"{key}: {path} can't be found, since there is no module {module}; is it installed?"
        return f"{key}: there is no class {path}{_nearest(name, _classes(own=True)) or _nearest(name, _classes())}"
    if types and value:
        return f"{key}: expected {' or '.join(dict.fromkeys(types))}, got {given_value!r}"
    if denied := re.search(r"Importing '([\w.]+)' is not allowed", message):
        return f"{key}: {denied[1]} is nothing that a config may name"
    empty = (
        "Parser key",
        "Expected a path but",
        "Does not validate",
        "Subtypes",
        "Errors",
        "Expected a <class 'NoneType'>",
        "Problem with given",
    )
    reasons = [re.sub("^Type typing.* callable class: ", "", line.strip(" -")) for line in message.splitlines()]
    reasons = [line for line in reasons if line and not line.startswith(empty)]
    got = f", got {given_value!r}" if given_value and reasons and "ot a valid subclass" in reasons[0] else ""
    return f"{key}: {reasons[0]}{got}" if key and reasons else message


def _classes(own: bool = False) -> list[str]:
    """Names of all classes that a config may name; own: without those of the libraries."""
    classes: list[type] = [nn.Module, LightningDataModule, Callback, Logger, Optimizer, LRScheduler]
    for base in classes:  # grows while it is walked
        subclasses: list[type] = base.__subclasses__()
        classes += [kind for kind in subclasses if kind not in classes]
    return [c.__name__ for c in classes if not (own and c.__module__.startswith(LIBRARIES))]


def _nearest(name: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {match[0]}?)" if match else ""
