"""Reading a checkpoint of torch.distributed.checkpoint without running what it says.

Its `.metadata` is a pickle, and a pickle can call anything. Here it may name nothing but the
classes that a description of tensors is made of. The tensors' own files are read by torch with
weights_only=True.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from fastssl.training.checkpoint_files import METADATA

_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
# BytesStorageMetadata is not among them: what it describes is loaded by pickle.
_ALLOWED = {
    (_METADATA_MODULE, "ChunkStorageMetadata"),
    (_METADATA_MODULE, "Metadata"),
    (_METADATA_MODULE, "MetadataIndex"),
    (_METADATA_MODULE, "StorageMeta"),
    (_METADATA_MODULE, "TensorProperties"),
    (_METADATA_MODULE, "TensorStorageMetadata"),
    (_METADATA_MODULE, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


class _Unpickler(pickle._Unpickler):
    """The one in Python, whose steps can be looked at."""

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def load_build(self) -> None:
        """Give an object its attributes; a class keeps its own, for all who use it."""
        if isinstance(self.stack[-2], type) or not hasattr(self.stack[-2], "__dict__"):
            raise pickle.UnpicklingError(f"it changes {self.stack[-2]}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor")


class CheckedReader(dcp.FileSystemReader):
    """Reads tensors, and nothing but tensors, out of the folder of one checkpoint.

    A description that asks for anything else raises a ValueError that names the file.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / METADATA
        try:
            with open(file, "rb") as stream:
                metadata = _Unpickler(stream).load()
            _check(metadata)
        except OSError:
            raise
        # A damaged pickle raises nearly anything.
        except Exception as error:
            raise ValueError(f"{file} must describe tensors and no more: {error}") from error
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _check(metadata: Metadata) -> None:
    _expect(metadata, Metadata)
    _expect(metadata.storage_meta, StorageMeta)
    for parts in (metadata.state_dict_metadata, metadata.storage_data):
        _expect(parts, dict)
    for item in metadata.state_dict_metadata.values():
        _expect(item, TensorStorageMetadata)
    for place in metadata.storage_data.values():
        _expect(place, _StorageInfo)
        # No other folder's files, and no decompression by what is installed under some name.
        if Path(place.relative_path).name != place.relative_path or place.transform_descriptors:
            raise ValueError(f"it points to {place.relative_path} {place.transform_descriptors}")


def _expect(value: Any, kind: type) -> None:
    if type(value) is not kind:
        raise TypeError(f"{kind.__name__} was expected, {type(value).__name__} came")


def load_tensors(path: Path, tensors: dict[str, Any]) -> None:
    """Fill `tensors`, nested as they were saved, from the checkpoint in the folder `path`.

    Raises:
        ValueError: one of them is not in there, or has another shape, or the files are damaged.
    """
    reader = CheckedReader(path)
    # torch says no more than "metadata is None".
    reader.read_metadata()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, storage_reader=reader)
    except dcp.api.CheckpointException as error:
        reason = "; ".join(_sentences(cause for cause, _ in error.failures.values()))
        raise ValueError(f"the checkpoint {path} cannot be loaded: {reason}") from error


def _sentences(errors: Iterable[BaseException]) -> list[str]:
    """Each once: often all ranks say the same."""
    return list(dict.fromkeys(str(error) or type(error).__name__ for error in errors))


def read_tensors(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """All that is in the checkpoint `path`, whole and on the CPU: {"model": ..., "optimizer": ...}.

    ValueError as `load_tensors`.
    """
    described = CheckedReader(path).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(item.size, dtype=item.properties.dtype)
        for name, item in described.items()
    }
    load_tensors(path, tensors)
    parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    return parts
