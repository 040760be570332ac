"""Prints the JSON Schema by which an editor checks and completes the configs: `make schema`."""

import json
import sys
from abc import ABCMeta
from typing import Any

from jsonargparse.typing import register_type
from lightning.pytorch.cli import LightningArgumentParser

from mnist_cnn.run.cli import ExperimentCLI


class SchemaCLI(ExperimentCLI):
    """Prints the schema of the configs of fit in place of a run."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        register_type(ABCMeta)  # jsonargparse fails to list its subclasses; torch's FakeQuantize takes one
        schema = json.loads(parser.get_completion_script("jsonschema"), object_hook=as_written)
        print(json.dumps(schema | schema.pop("properties")["fit"]))
        sys.exit()


def as_written(node: dict[str, Any]) -> dict[str, Any]:
    """Adds what jsonargparse's schema lacks: short names, arguments without a class, parts of a config, new classes."""
    for name, kind in (("required", list), ("$schema", dict)):  # an overlay has a part; a comment names the schema
        if isinstance(node.get(name), kind):
            del node[name]
    if "anyOf" not in node:
        return node
    node["anyOf"].sort(key=lambda form: form == {"type": "null"})  # an editor explains the first that fails
    classes = [form for form in node["anyOf"] if "const" in form.get("properties", {}).get("class_path", {})]
    if not classes:
        return node
    paths = [form["properties"]["class_path"].pop("const") for form in classes]
    names = [path.rpartition(".")[2] for path in paths]
    short = {path: name for path, name in zip(paths, names) if names.count(name) == 1}
    for path, form in zip(paths, classes):
        form["properties"]["class_path"]["enum"] = [short[path], path] if path in short else [path]
    new = {"type": "string", "pattern": "[./]", "not": {"enum": paths}}  # the path of a class or file unknown here
    other = {"type": "object", "properties": {"class_path": new}, "required": ["class_path"]}
    alone = [form["properties"]["init_args"] for form in classes]  # the arguments of the base or an earlier config
    return {"anyOf": [*alone, *classes, other, {"enum": [*short.values(), *paths]}, new]}


if __name__ == "__main__":
    SchemaCLI(["fit"])
