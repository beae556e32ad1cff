"""MoCo (He et al., 2020, arXiv:1911.05722) and its second version (Chen et al., 2020,
arXiv:2003.04297).

B images, D embedding, M keys in the queue, W processes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastssl import functional as F
from fastssl.data import Batch
from fastssl.kernels.common import collectives
from fastssl.losses import InfoNCELoss
from fastssl.methods.base import Setting
from fastssl.methods.common import TeacherMethod, check_views, num_features
from fastssl.methods.views import MOCO_V1, MOCO_V2
from fastssl.nn import MoCoProjectionHead, SyncBatchNorm
from fastssl.optim.schedules import Schedule


class MoCo(TeacherMethod):
    """The first view's query finds the teacher's key of the second among the keys of a queue::

        loss = -log(exp(q . k / t) / (exp(q . k / t) + sum over the queue of exp(q . key / t)))

    By default version 2; `MoCoV1` is the first. The queue and the teacher move once per step.

    mlp: whether the head has a hidden layer, of hidden_dim, or is linear.
    shuffle_bn: the teacher normalises over this process's batch alone, whose images come from the
        batches of all processes, so that a query cannot know its key by the statistics. Every
        process then holds the images of all. The running statistics of the teacher, which nothing
        reads, differ between processes. In a process alone nothing changes. Without it, batch
        statistics are whatever the trainer makes of them.
    """

    views = MOCO_V2
    schedules: ClassVar[Mapping[str, Schedule]] = {
        "teacher_momentum": Schedule(0.999, kind="constant"),
    }

    def __init__(
        self,
        setting: Setting,
        *,
        mlp: bool = True,
        hidden_dim: int = 2048,
        output_dim: int = 128,
        queue_size: int = 65536,
        temperature: float = 0.2,
        shuffle_bn: bool = False,
    ) -> None:
        super().__init__()
        check_views(setting, "moco", 2)
        head = MoCoProjectionHead(num_features(setting), hidden_dim, output_dim, 2 if mlp else 1)
        self.make_teacher(nn.Sequential(OrderedDict(encoder=setting.encoder, head=head)))
        if shuffle_bn:
            # Those that are synchronised over no group stay as they are when the trainer converts.
            SyncBatchNorm.convert_sync_batchnorm(self.teacher, "")
        self.loss = InfoNCELoss(temperature, queue_size, output_dim, update_queue=False)
        self.shuffle_bn, self.seed = shuffle_bn, setting.seed

    @property
    def model(self) -> nn.Module:
        return self.student.encoder

    @torch.no_grad()
    def keys(self, batch: Batch) -> Tensor:
        """The teacher's [B, D] of the second view."""
        images, number = batch.views[1], len(batch)
        if not self.shuffle_bn or collectives.world_size() == 1:
            return self.teacher(images)
        gather = collectives.all_gather_with_grad
        index = gather(batch.index)
        noise = F.keyed_uniform(
            index, 1, seed=self.seed, epoch=batch.epoch, view=batch.view, stream=F.STREAM_METHOD
        )
        # Position p of the whole batch is encoded in place of order[p].
        order = noise[:, 0].argsort(stable=True)
        mine = slice(collectives.rank() * number, (collectives.rank() + 1) * number)
        keys = gather(self.teacher(gather(images)[order[mine]]))
        return keys[order.argsort()[mine]]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.student.encoder(batch.views[0])
        queries = self.student.head(features)
        loss, stats = self.loss(queries, self.keys(batch), return_stats=True)
        return {"loss": loss, "features": features.detach(), **stats}


class MoCoV1(MoCo):
    """MoCo as first published: a linear head, a lower temperature, views without blur."""

    views = MOCO_V1

    def __init__(self, setting: Setting, **options: Any) -> None:
        super().__init__(setting, **{"mlp": False, "temperature": 0.07, **options})
