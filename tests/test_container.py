"""The container, as far as files tell: what it is built from, and the lock of its packages."""

import json
import re

from conftest import REPO

LOCK = (REPO / "requirements.lock").read_text()
DOCKERFILE = (REPO / "Dockerfile").read_text()
DEV, IMAGE = (stage.partition("\n")[2] for stage in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:])


def of(instruction: str, stage: str) -> list[str]:
    """What follows an instruction, each time that it occurs."""
    return re.findall(rf"^{instruction} (.*)", stage.replace("\\\n", ""), re.MULTILINE)


def test_all_that_is_locked_has_a_version_and_a_hash():
    packages = re.split(r"^(?=[^ #])", LOCK, flags=re.MULTILINE)[1:]
    assert len(packages) > 50
    for package in packages:
        assert re.match(r"[\w.-]+==[\w.!+]+( ; [^;]+?)? \\\n    --hash=sha256:[0-9a-f]{64}", package), package


def test_lock_names_no_host_and_no_folder():
    assert re.findall(r".*(?:://|--index|--find| @ |file:|/).*", LOCK) == []


def test_the_image_is_built_with_the_setuptools_of_the_lock():
    assert len(re.findall(r"^setuptools==", LOCK, re.MULTILINE)) == 1


def test_no_key_is_built_in():
    assert not re.search(r"^(ARG|ENV).*(KEY|WANDB)", DOCKERFILE.replace("\\\n", ""), re.MULTILINE)
    assert {"**/.env*", "**/.netrc", ".git", "wandb"} <= set((REPO / ".dockerignore").read_text().split())


def test_dev_container_is_the_image_less_its_code():
    text = (REPO / ".devcontainer/devcontainer.json").read_text()
    settings = json.loads(re.sub(r"^\s*//.*", "", text, flags=re.MULTILINE))
    build = settings["build"]
    assert (REPO / ".devcontainer" / build["dockerfile"]).samefile(REPO / "Dockerfile")
    assert (REPO / ".devcontainer" / build["context"]).samefile(REPO)
    assert re.search(rf"^FROM \S+ AS {build['target']}$", DOCKERFILE, re.MULTILINE)
    assert of("COPY", DEV) == ["requirements.lock /opt/"]
    assert of("WORKDIR", DEV) == [settings["workspaceFolder"]]
    assert f"target={settings['workspaceFolder']},type=bind" in settings["workspaceMount"]
    assert of("USER", DOCKERFILE) == [settings["remoteUser"]]
    assert of("EXPOSE", DEV) == ["6006"] and settings["forwardPorts"] == [6006]
    assert settings["hostRequirements"]["gpu"] == "optional"
    assert settings["postCreateCommand"] in of("RUN", IMAGE)
