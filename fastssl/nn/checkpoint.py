"""Activation checkpointing (Chen et al., 2016, arXiv:1604.06174) of a model's blocks."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastssl.nn.drop_path import drops_of


class BlockCheckpointing:
    """For models made of blocks: `set_grad_checkpointing` keeps each block's input only.

    What the block made of it is computed again in backward, with the same random numbers: about a
    third more work for the memory of one block.

    A block with a `drop_path` and a number `num_drops` of branches takes `drops`, see `DropPath`.
    """

    grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def run_block(self, block: nn.Module, x: Tensor, *args: object) -> Tensor:
        # Drawn here, since a block that is computed again must not draw again.
        drops = drops_of(block, x.shape[0])
        kwargs = {} if drops is None else {"drops": drops}
        if self.grad_checkpointing and torch.is_grad_enabled():
            kwargs |= {"use_reentrant": False, **self._recomputation(block)}
            return checkpoint(block, x, *args, **kwargs)
        return block(x, *args, **kwargs)

    def _recomputation(self, block: nn.Module) -> dict[str, object]:
        """Keywords of `checkpoint` beyond use_reentrant."""
        return {}
