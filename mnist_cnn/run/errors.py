"""User mistakes, reported in one line, and the argument parser that reports them."""

import argparse
import difflib
import inspect
import json
import pydoc
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace, get_loader, set_loader, set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.optim import Optimizer, lr_scheduler

# Lines of jsonargparse's messages that say where it looked, not what is wrong.
NOISE = re.compile(r"Expected a path but|Does not|Subtypes|Errors|Expected (a )?<class 'None|Problem|Given value")
UNSERIALIZABLE = "Unable to serialize instance"  # jsonargparse's text in place of a value
read_yaml = get_loader("yaml")  # jsonargparse's own


class UserError(Exception):
    """A mistake that the user can correct; its message says what is wrong and what to do, in one line."""


def fail(message: str, status: int = 1) -> NoReturn:
    """Prints `error: message` on one line of standard error and exits."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(status)


def nearest(name: str, known: Iterable[str], key: str = "{}") -> str:
    """` (did you mean X?)` with the most similar of the known names, within its key; empty if none is similar."""
    return "".join(f" (did you mean {key.format(it)}?)" for it in difflib.get_close_matches(name, list(known), n=1))


class UniqueKeysLoader(yaml.CSafeLoader):
    """Raises a UserError if a key is repeated, since only its last value would count."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise UserError(f"the key {key.value} is repeated, first in line {key.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """Reads YAML as jsonargparse does, but with unique keys, None for null and ~/ for the home folder."""
    yaml.load(text, UniqueKeysLoader)
    return convert(read_yaml(text))


def convert(value: Any) -> Any:
    """A config in which None is null and ~/ the home folder, without values that jsonargparse could not serialize."""
    if isinstance(value, dict):
        return {key: convert(item) for key, item in value.items() if not str(item).startswith(UNSERIALIZABLE)}
    if isinstance(value, list):
        return [convert(item) for item in value]
    if isinstance(value, str) and "${" in value:
        raise UserError(f"{value}: nothing replaces ${{...}}, write the value itself")
    return None if value == "None" else str(Path(value).expanduser()) if str(value).startswith("~/") else value


def drop_defaults(config: Any) -> None:
    """Removes those defaults of a config's classes that YAML would change, such as a module, a class or a device.

    Raises:
        UserError: An argument without a type has a class, which jsonargparse does not instantiate then.
    """
    for value in vars(config).values() if isinstance(config, Namespace) else config if isinstance(config, list) else ():
        drop_defaults(value)
    if isinstance(config, Namespace) and isinstance(config.get("init_args"), Namespace):
        for name, parameter in inspect.signature(pydoc.locate(config.class_path)).parameters.items():  # type: ignore
            value = config.init_args.get(name)
            has_class = isinstance(value, Namespace | dict) and "class_path" in value
            if has_class and parameter.annotation is parameter.empty:
                raise UserError(f"{config.class_path}: give its argument {name} a type, to get a {value['class_path']}")
            try:
                same = json.dumps(value) == json.dumps(convert(value))
            except (TypeError, UserError):  # jsonargparse can read an object by its type, not a class
                same = not (parameter.annotation is Any or callable(value) or isinstance(value, str | list | dict))
            if not same and repr(value) == repr(parameter.default):
                del config.init_args[name]


def set_parsing(own: bool) -> None:
    """Sets how the parsers of this process read values: as this project's do, or those of other programs."""
    # A config may name nets and callbacks, not os.system.
    set_parsing_settings(import_path_denylist=[], instantiate_subclass_spec_in_any=not own)
    set_loader("yaml", load_yaml if own else read_yaml, (yaml.YAMLError,))


class Parser(LightningArgumentParser):
    """LightningArgumentParser whose errors are one line, and whose options override config files wherever they are."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        set_parsing(own=True)
        super().__init__(*args, allow_abbrev=False, **kwargs)  # --trainer.max_epoch is not short for max_epochs

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Moves config files to the front, so that options override them; None and ~/ mean what they do in a file."""
        files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        files.add_argument("-c", "--config", action="append", default=[], nargs="?")
        found, options = files.parse_known_args(args)
        start = bool(options) and not options[0].startswith("-")  # a subcommand stays in front
        options[start:start] = [f"--config={file}" if file else "--config" for file in found.config]
        for index, option in enumerate(options):
            key, value = re.match(r"(--[^=]+=)?(.*)", option, re.DOTALL).groups("")  # type: ignore[union-attr]
            options[index] = key + ("null" if (value := convert(value)) is None else value)
        return super().parse_args(options, *more, **kwargs)

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """Checks a config file; jsonargparse would not name it."""
        try:
            if not isinstance(settings := load_yaml(Path(path).read_text(encoding="utf-8")), dict):
                raise UserError("it has no settings (key: value)")
            known = [*vars(self.get_defaults()), "model", "data", "$schema"]
            for name in (str(key).partition(".")[0] for key in settings):
                if name not in known:  # jsonargparse would ignore `histogrms: {}`
                    raise UserError(f"unknown key {name}{nearest(name, known)}")
        except (UserError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"config file {path}: {error}") from error
        return super().parse_path(path, *args, **kwargs)

    def dump(self, namespace: Namespace, **kwargs: Any) -> str:  # type: ignore[override]
        """Leaves out defaults that YAML would change; a rerun takes them from the class again."""
        drop_defaults(namespace := namespace.clone())
        return super().dump(namespace, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a nested parser; the outer one reports the error
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        fail(explain(message, [*parser.get_defaults().keys(), "model", "data"]), status=2)


def explain(message: str, known: Iterable[str] = ()) -> str:
    """Shortens jsonargparse's message, of up to 65 lines, to the key, the innermost reason and the value."""
    key = ".".join(re.findall(r'Parser key "([\w.]+)"', message))
    if unknown := re.search(r"(?:ption '|arguments: --)([^'\s=]+)", message):
        name, prefix = unknown[1], key and f"{key}."
        if classes := re.findall(r"class_path[= ]'([\w.]+)'", message):
            known = inspect.signature(pydoc.locate(classes[-1])).parameters  # type: ignore[arg-type]
        similar, (first, dot, rest) = nearest(name, known, prefix + "{}"), name.partition(".")
        if dot and first not in (groups := {each.partition(".")[0] for each in known}):  # --early_stoping.patience
            similar = nearest(first, groups, f"{prefix}{{}}.{rest}")
        of_class = f": {classes[-1]} has no such argument" if classes else ""
        order = f"{of_class}; an option that chooses its class must stand before it" if key else ""
        return f"unknown key {prefix}{name}{similar or order}"
    lines = re.split(r"\n[ -]*|Type [\w.]+Callable.* class: |Parser key \S+: ?|\. Got value: ", message)
    reason = next((line for line in lines if line.strip() and not NOISE.match(line)), message)
    if missing := re.search(r"dot import path string: (\S+)", reason):
        kinds: list[type[Any]] = [nn.Module, LightningDataModule, Optimizer, lr_scheduler.LRScheduler, Callback, Logger]
        for kind in kinds:  # grows while it is walked
            kinds += kind.__subclasses__()
        similar = nearest(missing[1], [kind.__name__ for kind in kinds if "torchvision" not in kind.__module__])
        hint = "; null disables it" if missing[1].lower() == "false" else similar
        return f"{key}: there is no class {missing[1]} of this kind{hint}"
    value = re.search(r"(?:Got|Given) value: (.*?)(?:\. Got value|$)", message, re.MULTILINE)
    if value and reason.startswith(("Expected", "Not a")):
        reason = re.sub(r"(a )?<class '([\w.]+)'>", r"\2", reason).replace("a typing.Literal", "one of ")
        reason += f", got {value[1]!r}"
    return f"{key}: {reason}" if key else reason
