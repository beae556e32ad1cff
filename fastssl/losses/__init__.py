"""Losses as modules: they hold state (centers, queues) and make one call.

Those with a distribution over classes take return_stats=True in forward and then return the loss
and a dictionary of detached scalars: `loss_over_log_k` (1 for a uniform student) and, where there
is a teacher, `teacher_entropy` in nats.
"""

from fastssl.losses.barlow_twins_loss import BarlowTwinsLoss
from fastssl.losses.dino_loss import DINOLoss
from fastssl.losses.gram_loss import GramLoss
from fastssl.losses.ibot_patch_loss import iBOTPatchLoss
from fastssl.losses.info_nce_loss import InfoNCELoss
from fastssl.losses.koleo_loss import KoLeoLoss
from fastssl.losses.msn_loss import MSNLoss
from fastssl.losses.negative_cosine_similarity import NegativeCosineSimilarity
from fastssl.losses.nt_xent_loss import NTXentLoss
from fastssl.losses.swav_loss import SwAVLoss
from fastssl.losses.vicreg_loss import VICRegLoss

# The spellings of other libraries.
IBOTPatchLoss = iBOTPatchLoss
NTXEntLoss = NTXentLoss
SwaVLoss = SwAVLoss

__all__ = [
    "BarlowTwinsLoss",
    "DINOLoss",
    "GramLoss",
    "IBOTPatchLoss",
    "InfoNCELoss",
    "KoLeoLoss",
    "MSNLoss",
    "NTXEntLoss",
    "NTXentLoss",
    "NegativeCosineSimilarity",
    "SwAVLoss",
    "SwaVLoss",
    "VICRegLoss",
    "iBOTPatchLoss",
]
