"""Rows that lie on several ranks, seen as one tensor: rank 0's first, then rank 1's, and so on.

Ranks may hold different numbers of rows, or none. `group` is a process group, None for the
default one, "" for this process alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fastssl.kernels.common import collectives
from fastssl.kernels.common.checks import check_shape, check_tensor
from fastssl.kernels.common.collectives import Group

# Rows of one broadcast where all are gathered; the same on all ranks, which must cut alike.
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Shares:
    """How many rows every rank holds, and which of all are this rank's."""

    sizes: tuple[int, ...]
    rank: int

    @classmethod
    def of(cls, rows: Tensor, group: Group = None) -> Shares:
        sizes = torch.zeros(collectives.world_size(group), dtype=torch.int64, device=rows.device)
        rank = collectives.rank(group)
        sizes[rank] = len(rows)
        return cls(tuple(collectives.all_reduce_sum(sizes, group).tolist()), rank)

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def start(self) -> int:
        """The place of this rank's first row among all."""
        return sum(self.sizes[: self.rank])

    def own(self, places: Tensor) -> Tensor:
        """Those of `places` among all rows that are this rank's, as indices into its share."""
        places = places - self.start
        return places[(places >= 0) & (places < self.sizes[self.rank])]


def broadcast_rows(rows: Tensor, chunk: int, group: Group = None) -> Iterator[tuple[int, Tensor]]:
    """All ranks' rows in order, at most `chunk` at a time: (place of the first, the rows).

    `chunk` is the same on all ranks, and every rank must read to the end. Rows have one shape and
    type on all ranks.
    """
    shares = Shares.of(rows, group)
    # A name is what the ops of the losses know a group by.
    named = isinstance(group, str) and group != ""
    process_group = dist.distributed_c10d._resolve_process_group(group) if named else group
    place = 0
    for rank, size in enumerate(shares.sizes):
        for start in range(0, size, chunk):
            stop = min(start + chunk, size)
            if rank == shares.rank:
                part = rows[start:stop].contiguous()
            else:
                part = rows.new_empty(stop - start, *rows.shape[1:])
            if len(shares.sizes) > 1:
                dist.broadcast(part, group=process_group, group_src=rank)
            yield place, part
            place += stop - start


def gather_rows(rows: Tensor, group: Group = None) -> Tensor:
    """All ranks' rows in order, on every rank."""
    parts = [part for _, part in broadcast_rows(rows, _CHUNK, group)]
    return torch.cat([rows[:0], *parts])


def num_classes(group: Group, *labels: Tensor) -> int:
    """One more than the largest label on any rank."""
    largest = torch.stack([part.max() if len(part) else part.new_tensor(-1) for part in labels])
    return int(collectives.all_reduce_max(largest.max(), group)) + 1


def percent(correct: Tensor, total: int, group: Group) -> list[float]:
    """Counts of right answers [n] on this rank -> percent of `total` over all ranks."""
    return [100 * count / total for count in collectives.all_reduce_sum(correct, group).tolist()]


def check_features(name: str, features: Tensor, *, dim: int = 2) -> None:
    """Refuse what is not a share of finite features of `dim` dimensions."""
    check_tensor(name, features, dim=dim)
    if not features.isfinite().all():
        raise ValueError(f"{name} must be finite, got nan or inf")


def check_sets(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    group: Group,
    *,
    dim: int = 2,
) -> tuple[Shares, Shares]:
    """Refuse sets that do not fit together; the shares of the two."""
    for name, features, labels in (
        ("train", train_features, train_labels),
        ("test", test_features, test_labels),
    ):
        check_features(f"{name}_features", features, dim=dim)
        check_labels(f"{name}_labels", labels, features)
    width = train_features.shape[1:]
    check_shape("test_features", test_features, (None, *width), "[M, ...] as train_features")
    shares = Shares.of(train_features, group), Shares.of(test_features, group)
    for name, share in zip(("train_features", "test_features"), shares, strict=True):
        if share.total == 0:
            raise ValueError(f"{name} must have at least one row over all ranks, got none")
    return shares


def check_labels(name: str, labels: Tensor, rows: Tensor | None = None) -> None:
    """Refuse labels other than int64 [N] from 0 on, one for each of `rows`."""
    device = None if rows is None else rows.device
    check_tensor(name, labels, dim=1, dtypes=(torch.int64,), device=device)
    if rows is not None:
        check_shape(name, labels, (len(rows),), "[N]")
    if (labels < 0).any():
        raise ValueError(f"{name} must be at least 0, got {int(labels.min())}")
