"""The pre-norm transformer block of ViT."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fastssl.nn.attention import Attention
from fastssl.nn.drop_path import DropPath, columns
from fastssl.nn.linear import is_plain
from fastssl.nn.mlp import Mlp
from fastssl.nn.norm import add_layer_norm, layer_norm

NormLayer = Callable[[int], nn.Module]
FeedForward = Callable[[int, int], nn.Module]  # of the width and of the hidden width
Select = Callable[[Tensor], Tensor]  # of [B, N, D] some tokens [..., D]
LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)  # the eps of every ViT that was released


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al., 2021, arXiv:2103.17239). Key: gamma."""

    def __init__(self, dim: int, init_values: float = 1e-5) -> None:
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """x + ls1(attn(norm1(x))), then the same with the Mlp: [B, N, D] -> [B, N, D].

    `init_values` not None adds LayerScale with that start; `drop_path` is the probability that a
    sample skips a branch; `ffn_layer` makes what stands in place of the Mlp. Keys: norm1, attn,
    ls1, norm2, mlp, ls2. With `select`, which takes tokens out of [B, N, D], the result is that of
    these alone, and for the others nothing is computed but the keys and values they are to these.
    `drops` [B, 2] decide what is dropped, see `DropPath`.
    """

    num_drops = 2

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: float | None = None,
        drop_path: float = 0.0,
        norm_layer: NormLayer = LAYER_NORM,
        ffn_layer: FeedForward = Mlp,
    ) -> None:
        super().__init__()

        def layer_scale() -> nn.Module:
            return nn.Identity() if init_values is None else LayerScale(dim, init_values)

        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.ls1 = layer_scale()
        self.norm2 = norm_layer(dim)
        self.mlp = ffn_layer(dim, int(dim * mlp_ratio))
        self.ls2 = layer_scale()
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, select: Select | None = None, *, drops: Tensor | None = None
    ) -> Tensor:
        drop_path, (first, second) = self.drop_path, columns(drops, self.num_drops)
        if drop_path.num_kept(x.shape[0]) < x.shape[0]:
            x = drop_path.add_branch(x, x, self._attend, first)
            x = drop_path.add_branch(x, x, self._feed_forward, second)
            return x if select is None else select(x)
        scale = drop_path.draw(x, first)
        if select is not None:
            return self._of_selected(x, select, (scale, drop_path.draw(x, second)))
        branch, gamma = self.attn(layer_norm(self.norm1, x)), None
        if is_plain(self.ls1, LayerScale):
            gamma = self.ls1.gamma
        else:
            branch = self.ls1(branch)
        x, y = add_layer_norm(self.norm2, x, branch, gamma=gamma, scale=scale)
        return x + drop_path(self.ls2(self.mlp(y)), second)

    def _of_selected(
        self, x: Tensor, select: Select, scales: tuple[Tensor | None, Tensor | None]
    ) -> Tensor:
        branches = (
            lambda kept: self.ls1(self.attn(layer_norm(self.norm1, x), select)),
            self._feed_forward,
        )
        kept = select(x)
        for scale, branch in zip(scales, branches, strict=True):
            added = branch(kept)
            if scale is not None:
                # A factor per sample becomes one per token.
                added = added * select(scale.view(-1, 1, 1).expand(*x.shape[:2], 1))
            kept = kept + added
        return kept

    def _attend(self, x: Tensor) -> Tensor:
        return self.ls1(self.attn(layer_norm(self.norm1, x)))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.ls2(self.mlp(layer_norm(self.norm2, x)))
