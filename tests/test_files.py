"""Files that are there whole or not at all, and the run folders version_N."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import BRIEF, LAST, main

from mnist_cnn.run.errors import UserError
from mnist_cnn.run.files import AtomicCheckpointIO, write_atomically
from mnist_cnn.run.folder import create_run, versions


class Fails:
    """Can't be pickled."""

    def __reduce__(self):
        raise OSError(28, "No space left on device")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new/metrics.json"
    with write_atomically(path) as file:
        file.write("first é\n")
        assert not path.exists()
    with pytest.raises(RuntimeError, match="halfway"), write_atomically(path) as file:
        file.write("second")
        raise RuntimeError("halfway")
    assert path.read_bytes() == "first é\n".encode()
    with write_atomically(path) as file:
        file.buffer.write(b"third")
    assert path.read_bytes() == b"third" and os.listdir(path.parent) == ["metrics.json"]


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "checkpoints/last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"a": torch.ones(3)}}, path)
    with pytest.raises(OSError):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"a": torch.zeros(10**6), "b": Fails()}}, path)
    assert torch.equal(torch.load(path, weights_only=True)["state_dict"]["a"], torch.ones(3))
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_a_runs_checkpoints_are_written_that_way(folder, monkeypatch):
    seen = []
    save = AtomicCheckpointIO.save_checkpoint

    def note(self, checkpoint, path, storage_options=None):
        seen.append(os.path.relpath(path))
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", note)
    main([*BRIEF, "--trainer.max_epochs=1"])
    assert str(LAST) in seen and len(seen) == 2


def test_run_folders_are_numbered(tmp_path):
    for name in ("version_2", "version_10", "version_x", "other"):
        (tmp_path / name).mkdir()
    assert list(versions(tmp_path).values()) == [tmp_path / "version_2", tmp_path / "version_10"]
    assert create_run(None, tmp_path, "model: CNN") == tmp_path / "version_11"
    assert (tmp_path / "version_11/config.yaml").read_text() == "model: CNN"


def test_many_at_once_get_a_folder_each(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: create_run(None, tmp_path / "logs", ""), range(40)))
    assert sorted(made) == sorted(tmp_path / "logs" / f"version_{n}" for n in range(40))


@pytest.mark.parametrize("name", ["config.yaml", "checkpoints/last.ckpt"])
def test_a_folder_with_another_run_is_refused_and_left_as_it_was(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("another")
    with pytest.raises(UserError, match="holds a run already"):
        create_run(tmp_path, tmp_path, "")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [os.path.basename(name)]
    assert (tmp_path / name).read_text() == "another"
