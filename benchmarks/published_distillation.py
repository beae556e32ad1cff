"""DINO and iBOT in plain torch, written as their papers have them: a rival for fastssl's methods.

Attention with its scores written out, logits stored, a loop over pairs of views, an EMA parameter
by parameter. Keys are the official ones, the prototypes' those of torch's weight_norm.

B images, V views, N patches, D features, K prototypes, M masked patches.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

STUDENT_TEMP, TEACHER_TEMP, CENTER_MOMENTUM = 0.1, 0.04, 0.9
# Any momentum costs the same, and a move half-way to the student shows in what is compared.
TEACHER_MOMENTUM = 0.5


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D]
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        return self.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Images, and masks [B, N] or None, to normed tokens [B, 1 + N, D]."""

    def __init__(self, side: int, dim: int, depth: int, num_heads: int, use_masks: bool) -> None:
        super().__init__()
        self.grid = side // 16
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, 16, stride=16)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim)) if use_masks else None
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        x = self.patch_embed.proj(images)
        pos_embed = self._pos_embed(x.shape[-1])
        x = x.flatten(2).transpose(1, 2)
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def _pos_embed(self, side: int) -> Tensor:
        if side == self.grid:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        grid = functional.interpolate(grid, size=(side, side), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


class Head(nn.Module):
    def __init__(self, dim: int, out_dim: int, hidden_dim: int, bottleneck_dim: int) -> None:
        super().__init__()
        layers = [nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim)]
        self.mlp = nn.Sequential(*layers, nn.GELU(), nn.Linear(hidden_dim, bottleneck_dim))
        self.last_layer = weight_norm(nn.Linear(bottleneck_dim, out_dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(functional.normalize(self.mlp(x), dim=-1))


class Published(nn.Module):
    """DINO (arXiv 2104.14294, Algorithm 1); with masks iBOT (arXiv 2111.07832, Algorithm 1).

    Only the masked patches, picked by boolean index, pass through the heads. iBOT's algorithm makes
    logits of all patches and multiplies the losses of the others by 0, which takes longer.
    """

    def __init__(self, backbone: Callable[[], nn.Module], head: Callable[[], nn.Module]) -> None:
        super().__init__()
        for name in ("student", "teacher"):
            self.add_module(name, nn.ModuleDict({"backbone": backbone(), "head": head()}))
        self.teacher.requires_grad_(False)
        out_dim = self.student.head.last_layer.out_features
        self.register_buffer("center", torch.zeros(out_dim))
        if self.student.backbone.mask_token is not None:
            self.register_buffer("patch_center", torch.zeros(out_dim))

    def forward(self, masks: Tensor | None, views: Sequence[Tensor]) -> Tensor:
        """The loss. What the centers move by is kept for `after_step`."""
        student, teacher = self.student, self.teacher
        with torch.no_grad():
            targets = teacher.backbone(torch.cat(views[:2]))
            class_targets = teacher.head(targets[:, 0])
        tokens = student.backbone(torch.cat(views[:2]), masks)
        others = student.backbone(torch.cat(views[2:]))
        logits = student.head(torch.cat([tokens[:, 0], others[:, 0]]))
        loss = self._class_loss(logits.chunk(len(views)), class_targets)
        self.targets = [class_targets]
        if masks is None:
            return loss
        with torch.no_grad():
            patch_targets = teacher.head(targets[:, 1:][masks])
        patch_loss = self._patch_loss(student.head(tokens[:, 1:][masks]), patch_targets, masks)
        self.targets.append(patch_targets)
        return loss + patch_loss

    def _class_loss(self, logits: Sequence[Tensor], targets: Tensor) -> Tensor:
        probabilities = functional.softmax((targets - self.center) / TEACHER_TEMP, dim=-1)
        total, num_terms = 0.0, 0
        for t, q in enumerate(probabilities.chunk(2)):
            for s, row in enumerate(logits):
                if s != t:
                    log_p = functional.log_softmax(row / STUDENT_TEMP, dim=-1)
                    total = total + torch.sum(-q * log_p, dim=-1).mean()
                    num_terms += 1
        return total / num_terms

    def _patch_loss(self, logits: Tensor, targets: Tensor, masks: Tensor) -> Tensor:  # [M, K]
        q = functional.softmax((targets - self.patch_center) / TEACHER_TEMP, dim=-1)
        losses = torch.sum(-q * functional.log_softmax(logits / STUDENT_TEMP, dim=-1), dim=-1)
        weights = 1 / masks.sum(dim=1, keepdim=True).clamp(min=1).expand_as(masks)[masks]
        return (losses * weights).sum() / masks.shape[0]

    @torch.no_grad()
    def after_step(self) -> None:
        self._move_centers()
        pairs = zip(self.student.parameters(), self.teacher.parameters(), strict=True)
        for student, teacher in pairs:
            teacher.mul_(TEACHER_MOMENTUM).add_((1 - TEACHER_MOMENTUM) * student)

    def _move_centers(self) -> None:
        for center, targets in zip(self.buffers(recurse=False), self.targets, strict=True):
            mean = targets.sum(dim=0) / max(len(targets), 1)  # of no masked patch 0
            center.copy_(center * CENTER_MOMENTUM + mean * (1 - CENTER_MOMENTUM))
