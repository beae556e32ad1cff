"""Entry points of `torch.hub.load`: every factory of fastssl.models.

    model = torch.hub.load(REPOSITORY, "vit_small", pretrained="weights.pth")

`pretrained` is a file or folder that `fastssl.load_pretrained` reads, or user/model on the Hugging
Face Hub; other keywords are the factory's.
"""

from functools import wraps as _wraps
from pathlib import Path as _Path

from fastssl import models as _models

dependencies = ["torch", "numpy"]


def _entry(factory):
    @_wraps(factory)
    def build(pretrained=None, **kwargs):
        if pretrained is True:
            raise ValueError(
                "pretrained must be a file, a folder or user/model on the Hugging Face Hub: "
                "fastssl releases no weights of its own"
            )
        model = factory(**kwargs)
        if pretrained:
            path = _Path(pretrained).expanduser()
            path = path if path.is_file() else _models.hub.local_folder(pretrained)
            _models.load_pretrained(model, path)
        return model

    return build


# Factories are functions, classes take the same keywords under other names.
globals().update({n: _entry(getattr(_models, n)) for n in _models.FACTORIES if n.islower()})
