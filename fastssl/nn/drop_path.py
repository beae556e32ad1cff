"""Stochastic depth (Huang et al., 2016, arXiv:1603.09382)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastssl import functional as F

# Above this rate the branch is computed for the samples that keep it only, as in DINOv2.
MAX_RATE_COMPUTED = 0.1
_UNIFORM_BITS = 24  # of keyed_uniform's numbers


class _Keys:
    """What decisions are keyed by for now; no ids: nothing, torch's generator decides."""

    ids: Tensor | None = None  # [B] int64
    num_calls = 0  # of blocks that drew


_keys = _Keys()


@contextmanager
def keyed_drops(
    samples: Tensor,  # [B] int64
    *,
    seed: int,
    epoch: int = 0,
    view: int = 0,
) -> Iterator[None]:
    """Within, stochastic depth of this library's models is a function of these keys, as of
    `keyed_uniform`.

    A sample's branches are dropped or kept whatever rank, micro-batch or attempt it comes in. Where
    only kept branches are computed, at rates above 0.1, each call of a block keeps a number of its
    samples, so that others in the micro-batch matter, too. Inputs of models are whole batches
    [B, ...], or [V * B, ...], view after view; of other numbers of samples decisions are torch's,
    as they are without this. `set_grad_checkpointing` draws nothing again; to checkpoint a whole
    model by hand would. A compiled model is compiled once for each of its calls within.
    """
    if _keys.ids is not None:
        raise RuntimeError("keyed_drops cannot be entered within itself")
    key = {"seed": seed, "epoch": epoch, "view": view, "stream": F.STREAM_DROP}
    # All keys in one number, for a compiled model would be compiled anew for each epoch.
    high, low = (F.keyed_uniform(samples, 2, **key) * 2**_UNIFORM_BITS).long().unbind(1)
    _keys.ids, _keys.num_calls = high * 2**_UNIFORM_BITS + low, 0
    try:
        yield
    finally:
        _keys.ids = None


def drops_of(block: nn.Module, rows: int) -> Tensor | None:
    """Uniform numbers [rows, block.num_drops], by which this call of `block` drops; None where it
    drops nothing, has no `num_drops`, or no keys are given."""
    ids, drop_path = _keys.ids, getattr(block, "drop_path", None)
    num_drops = getattr(block, "num_drops", None)
    is_active = isinstance(drop_path, DropPath) and drop_path.is_active
    if ids is None or num_drops is None or not is_active:
        return None
    batch = ids.shape[0]
    if rows == 0 or batch == 0 or rows % batch:
        return None
    copies = rows // batch
    uniforms = F.keyed_uniform(ids, copies * num_drops, seed=0, stream=_keys.num_calls)
    _keys.num_calls += 1
    return uniforms.unflatten(1, (copies, -1)).transpose(0, 1).flatten(0, 1)


def columns(drops: Tensor | None, number: int) -> Sequence[Tensor | None]:
    """A block's `drops` [B, number], one for each of its branches."""
    return (None,) * number if drops is None else drops.unbind(1)


class DropPath(nn.Module):
    """Zero the whole residual branch of a sample with probability `drop_prob` while training.

    The branches kept are divided by 1 - drop_prob, so that the expectation stays. Input
    [B, ...] of any shape; the identity in evaluation and for `drop_prob=0`. Called, it drops the
    values of a branch that was computed; `add_branch` spares the work. A block takes the uniform
    numbers that decide for its `num_drops` branches as `drops` [B, num_drops], see `keyed_drops`.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= drop_prob < 1.0:
            raise ValueError(f"drop_prob must be in [0, 1), got {drop_prob}")
        self.drop_prob = drop_prob

    @property
    def is_active(self) -> bool:
        return self.training and self.drop_prob > 0.0

    def draw(self, x: Tensor, uniform: Tensor | None = None) -> Tensor | None:
        """The factor [B] of each sample's branch, 0 or 1 / (1 - drop_prob); None is 1 for all.

        Those whose `uniform` [B] is below 1 - drop_prob are kept; None: torch's generator decides.
        """
        if not self.is_active:
            return None
        keep_prob = 1.0 - self.drop_prob
        if uniform is None:
            return x.new_empty(x.shape[:1]).bernoulli_(keep_prob).div_(keep_prob)
        return (uniform < keep_prob).to(x.dtype).div_(keep_prob)

    def forward(self, x: Tensor, uniform: Tensor | None = None) -> Tensor:
        scale = self.draw(x, uniform)
        return x if scale is None else x * scale.view(-1, *(1,) * (x.dim() - 1))

    def num_kept(self, batch: int) -> int:
        """How many of `batch` samples `add_branch` computes; `batch` at rates of 0.1 and below."""
        if not self.training or self.drop_prob <= MAX_RATE_COMPUTED:
            return batch
        return max(1, round(batch * (1.0 - self.drop_prob)))

    def add_branch(
        self,
        x: Tensor,
        source: Tensor,
        branch: Callable[[Tensor], Tensor],
        uniform: Tensor | None = None,
    ) -> Tensor:
        """x + branch(source) for `num_kept` samples, scaled to keep the expectation; x for the
        others, of which nothing is computed. x and source are [B, ...].

        Kept are those with the smallest `uniform` [B]; None: torch's generator decides.
        """
        batch, device = x.shape[0], x.device
        order = (
            torch.randperm(batch, device=device)
            if uniform is None
            else uniform.argsort(stable=True)
        )
        kept = order[: self.num_kept(batch)]
        added = branch(source.index_select(0, kept))
        dtype = torch.promote_types(x.dtype, added.dtype)
        return x.to(dtype).index_add(0, kept, added.to(dtype), alpha=batch / kept.shape[0])

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"
