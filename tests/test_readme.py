"""What the README and the container's files say is there."""

import json
import re
import shlex

import pytest
from conftest import REPO, RUN, RUNS, assert_same_run, main, metrics_of, printed_config

README = (REPO / "README.md").read_text()
COMMANDS = re.findall(r"^python (main\.py .*--config configs/[^#\n]*)", README, re.MULTILINE)
LOCK = (REPO / "requirements.lock").read_text()
DOCKERFILE = (REPO / "Dockerfile").read_text()
DEV, IMAGE = (stage.partition("\n")[2] for stage in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:])


def test_links_and_pictures_are_files():
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert len(targets) >= 10
    assert [target for target in targets if not (REPO / target).exists()] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(folder, capfd, command):
    (folder / "configs").symlink_to(REPO / "configs")
    for name, code in re.findall(r"```python\n# (\w+\.py).*?\n(.*?)```", README, re.DOTALL):
        (folder / name).write_text(code)
    for name, base in (("MyDataModule", "MNISTDataModule"), ("MyLightningModule", "LitClassifier")):
        file = folder / {"MyDataModule": "my_data.py", "MyLightningModule": "my_models.py"}[name]
        file.write_text(f"import mnist_cnn\n\nclass {name}(mnist_cnn.{base}):\n    pass\n")
    assert printed_config(capfd, *[word for word in shlex.split(command)[1:] if word != "--print_config"])


def test_there_are_commands():
    assert len(COMMANDS) >= 5


def test_a_data_module_and_a_model_as_printed(folder):
    (code,) = re.findall(r"```python\n(# my_waves.py.*?)```", README, re.DOTALL)
    (folder / "my_waves.py").write_text(code)
    (command,) = [command for command in COMMANDS if "my_waves" in command]
    (folder / "configs").symlink_to(REPO / "configs")
    main([*shlex.split(command)[1:], "--trainer.max_epochs=3", "--wandb=null"])
    assert metrics_of(RUN)["test/acc"] > 0.6
    main(["fit", f"--config={RUN}/config.yaml"])
    assert_same_run(RUNS / "version_1", RUN)


# The container


def of(instruction: str, stage: str) -> list[str]:
    """What follows an instruction, each time that it occurs."""
    return re.findall(rf"^{instruction} (.*)", stage.replace("\\\n", ""), re.MULTILINE)


def test_each_locked_package_has_a_version_and_a_hash_and_no_host():
    packages = re.split(r"^(?=[^ #])", LOCK, flags=re.MULTILINE)[1:]
    assert len(packages) > 50
    for package in packages:
        assert re.match(r"[\w.-]+==[\w.!+]+( ; [^;]+?)? \\\n    --hash=sha256:[0-9a-f]{64}", package), package
    assert re.findall(r".*(?:://|--index|--find| @ |file:|/).*", LOCK) == []
    assert len(re.findall(r"^setuptools==", LOCK, re.MULTILINE)) == 1  # with which the image is built


def test_no_key_is_built_in():
    assert not re.search(r"^(ARG|ENV).*(KEY|WANDB)", DOCKERFILE.replace("\\\n", ""), re.MULTILINE)
    assert {"**/.env*", "**/.netrc", ".git", "wandb"} <= set((REPO / ".dockerignore").read_text().split())


def test_the_dev_container_is_the_image_without_its_code():
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
