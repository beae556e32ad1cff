"""What a checkpoint says is not run when it is read."""

import io
import os
import pickle

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, StorageMeta

from fastssl.training import checkpoint
from tests.training.test_checkpoint import POSITION, make, save, state
from tests.training.tiny import assert_same_tensors


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture
def saved(tmp_path):
    return save(tmp_path, 2, *make())


def described(path):
    return pickle.loads((path / ".metadata").read_bytes())


def describe(path, metadata):
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def assert_refused(path, match):
    """By everything that reads tensors."""
    module, optimizer = make()
    before = state(module, optimizer)
    with pytest.raises(ValueError, match=match):
        checkpoint.restore(path, module, optimizer, position=POSITION)
    with pytest.raises(ValueError, match=match):
        checkpoint.read_tensors(path)
    with pytest.raises(ValueError, match=match):
        checkpoint.load_tensors(path, {"model": module.state_dict()})
    assert_same_tensors(state(module, optimizer), before)


def test_a_description_that_calls_something(saved, tmp_path):
    describe(saved, Evil(tmp_path / "mark"))
    assert_refused(saved, r".metadata must describe tensors and no more: it names posix.mkdir")
    assert not (tmp_path / "mark").exists()
    pickle.loads((saved / ".metadata").read_bytes())
    assert (tmp_path / "mark").exists(), "an ordinary reader would have called it"


@pytest.mark.parametrize("part", ["planner_data", "storage_data", "storage_meta"])
def test_a_call_within_a_description(saved, tmp_path, part):
    metadata = described(saved)
    setattr(metadata, part, Evil(tmp_path / "mark"))
    describe(saved, metadata)
    assert_refused(saved, "it names posix.mkdir")
    assert not (tmp_path / "mark").exists()


def test_tensors_that_call_something(saved, tmp_path):
    stream = io.BytesIO()
    torch.save(Evil(tmp_path / "mark"), stream)
    content = stream.getvalue()
    (saved / "__0_0.distcp").write_bytes(content)
    metadata = described(saved)
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, len(content)
    describe(saved, metadata)
    assert_refused(saved, "cannot be loaded: (.|\n)*[Ww]eights.only")
    assert not (tmp_path / "mark").exists()
    torch.load(saved / "__0_0.distcp", weights_only=False)
    assert (tmp_path / "mark").exists(), "an ordinary reader would have called it"


def test_objects_beside_tensors(saved, tmp_path):
    """They would be unpickled, whatever they are."""
    metadata = described(saved)
    name = next(iter(metadata.state_dict_metadata))
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    describe(saved, metadata)
    assert_refused(saved, "it names torch.distributed.checkpoint.metadata.BytesStorageMetadata")


@pytest.mark.parametrize("where", ["../step_00000001/__0_0.distcp", "/etc/passwd"])
def test_files_of_others(saved, where):
    metadata = described(saved)
    for index in metadata.storage_data:
        metadata.storage_data[index] = _StorageInfo(where, 0, 10)
    describe(saved, metadata)
    assert_refused(saved, f"it points to {where}")


def test_a_transformation(saved):
    metadata = described(saved)
    next(iter(metadata.storage_data.values())).transform_descriptors = ["zstd"]
    describe(saved, metadata)
    assert_refused(saved, "it points to __0_0.distcp .'zstd'.")


def test_classes_keep_their_attributes(saved):
    """BUILD of a class: cloudpickle's way to define one, and here one for all who use it."""
    module, name = StorageMeta.__module__, StorageMeta.__qualname__
    content = pickle.PROTO + b"\x02" + pickle.GLOBAL + f"{module}\n{name}\n".encode()
    content += pickle.EMPTY_DICT + pickle.BINUNICODE + b"\x04\x00\x00\x00mark"
    content += pickle.NEWTRUE + pickle.SETITEM + pickle.BUILD + pickle.STOP
    (saved / ".metadata").write_bytes(content)
    assert_refused(saved, "it changes <class .*StorageMeta")
    assert not hasattr(StorageMeta, "mark")


@pytest.mark.parametrize("part", ["state_dict_metadata", "storage_data"])
def test_what_looks_like_a_dict(saved, part):
    metadata = described(saved)
    setattr(metadata, part, torch.Size([1]))
    describe(saved, metadata)
    assert_refused(saved, "dict was expected, Size came")


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", pickle.dumps([1]), pickle.dumps({"a": torch.float32}), b"\x80"]
)
def test_no_description_at_all(saved, content):
    (saved / ".metadata").write_bytes(content)
    assert_refused(saved, ".metadata must describe tensors and no more: ")


def test_everything_is_read_into_the_memory_of_the_cpu(tmp_path):
    module, optimizer = make()
    path = save(tmp_path, 2, module, optimizer)
    parts = checkpoint.read_tensors(path)
    assert parts.keys() == {"model", "optimizer"}
    flat = {f"{p}.{n}": t for p in parts for n, t in parts[p].items()}
    assert_same_tensors(flat, state(module, optimizer))
