"""`save_pretrained`, `from_pretrained` and `push_to_hub` of every model here.

A folder holds config.json, the keywords of the constructor, and model.safetensors: the files of
huggingface_hub's PyTorchModelHubMixin, which reads what is written here, and the reverse. Without
that package, folders on the disk work all the same.
"""

from __future__ import annotations

import inspect
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from fastssl.models.norm_names import name_of_norm
from fastssl.models.pretrained import load_pretrained
from fastssl.models.transformers_config import arguments

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# What a download takes of a repository: other frameworks' weights are left there.
_PATTERNS = ["*.json", "*.safetensors", "*.md"]
_OLDER = ["pytorch_model.bin"]


class HubModel:
    """A model that remembers its arguments, so that a folder can tell how to build it again."""

    _arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        model = super().__new__(cls)
        # A copy is made without arguments, and gets those of the original with its attributes.
        given = inspect.signature(cls.__init__).bind_partial(None, *args, **kwargs).arguments
        for name, parameter in inspect.signature(cls.__init__).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        model.__dict__["_arguments"] = {**_defaults(cls), **dict(list(given.items())[1:])}
        return model

    @property
    def arguments(self) -> dict[str, Any]:
        """The keywords that build such a model, defaults among them."""
        return dict(self._arguments)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write config.json and model.safetensors into a folder, made if need be.

        Raises ValueError for an argument that JSON cannot hold.
        """
        folder = Path(save_directory)
        config = {name: _as_json(name, value) for name, value in self._arguments.items()}
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / WEIGHTS, self.state_dict())
        text = json.dumps(config, sort_keys=True, indent=2)
        (folder / CONFIG).write_text(f"{text}\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **model_kwargs: Any,
    ) -> Self:
        """The model of a folder, or of a repository of the Hugging Face Hub, in evaluation mode.

        The folder is of `save_pretrained`, or one of transformers' ViT, ViTMAE, Dinov2 (with
        registers or without) or Hiera. `model_kwargs` go before what it says of the arguments;
        with another size of images the position embedding is resampled.

        Raises:
            ValueError: the folder is not of such a model, or its tensors do not fit.
            ImportError: a repository is named and huggingface_hub is not installed.
        """
        folder = local_folder(
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        config = _read_config(folder)
        foreign = "model_type" in config
        if foreign:
            config = arguments(config, cls)
        known = _defaults(cls, required=True)
        unknown = sorted(set(config) - set(known))
        if unknown:
            raise ValueError(
                f"{folder / CONFIG} must be of a {cls.__name__}, which has no {', '.join(unknown)}"
            )
        tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        model = cls(**{**tuples, **model_kwargs})
        # Their files may have a pooler or a classifier besides, or lack the decoder.
        load_pretrained(model, folder, strict=not foreign)
        return model.eval()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Push model using fastssl.",
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes to a repository, made if need be; the commit's URL.

        A folder of fastssl-export, which has a card besides, is uploaded by `hf upload`.
        """
        api = _huggingface_hub("pushing a model").HfApi(token=token)
        repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=branch
            )
        return str(commit)


def local_folder(name: str | os.PathLike, **download: Any) -> Path:
    """`name` if that is a folder, else the repository of that name, downloaded."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    parts = str(name).split("/")
    # "user/model" is all that a repository may be called; other paths are mistyped.
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise FileNotFoundError(f"{name} must be a folder, or user/model on the Hugging Face Hub")
    hub = _huggingface_hub(f"{name} is no folder, and downloading it")
    folder = Path(hub.snapshot_download(str(name), allow_patterns=_PATTERNS, **download))
    if not (folder / WEIGHTS).is_file():
        # Only then, so that what has both is not downloaded twice.
        hub.snapshot_download(str(name), allow_patterns=_OLDER, **download)
    return folder


def save_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write a safetensors file, all or nothing."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(f"writing {path} needs safetensors: pip install safetensors") from error
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    writing = path.with_name(f"{path.name}.writing")
    save_file(whole, writing, metadata={"format": "pt"})
    os.replace(writing, path)


def _huggingface_hub(what: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(f"{what} needs huggingface_hub: pip install 'fastssl[hub]'") from error
    return huggingface_hub


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} must hold {CONFIG} and {WEIGHTS}, it has no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold keywords, got {type(config).__name__}")
    return config


def _defaults(cls: type, required: bool = False) -> dict[str, Any]:
    """Keywords of the constructor, and of what it passes others on to, with their defaults; those
    that must be given are among them only where `required`, as None."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            if parameter.default is not parameter.empty:
                found.setdefault(parameter.name, parameter.default)
            elif required:
                found.setdefault(parameter.name, None)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def _as_json(name: str, value: Any) -> Any:
    if name == "norm_layer" and not isinstance(value, str):
        value = name_of_norm(value)
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        raise ValueError(
            f"save_pretrained cannot write the argument {name} = {value!r} as JSON"
        ) from None
