"""The head of DINO, iBOT and DINOv2: an MLP, a bottleneck on the unit sphere, and prototypes.

Caron et al. 2021, arXiv 2104.14294. D the bottleneck's width, K prototypes.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.kernels.common.checks import check_int

SMALLEST_NORM = 1e-12
# Where both styles of torch's weight normalisation keep the scale and the direction.
OTHER_NAMES = {
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}

Result = TypeVar("Result")


class HeadOutput(NamedTuple):
    """What `linear_dino_cross_entropy` needs of a head."""

    features: Tensor  # [..., D], of length 1
    prototypes: Tensor  # [K, D]
    normalize_prototypes: bool  # whether each prototype counts as divided by its length
    lengths: Tensor | None = None  # [K], and as multiplied by this

    def logits(self) -> Tensor:  # [..., K]
        weight = self.prototypes
        if self.normalize_prototypes:
            norm = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
            weight = weight / norm.clamp(min=SMALLEST_NORM)
        if self.lengths is not None:
            weight = weight * self.lengths[:, None]
        return F.linear(self.features, weight)


class WeightNormLinear(nn.Module):
    """x @ (weight_g * weight_v / |weight_v|)^T, without bias: [..., D] -> [..., K].

    Keys `weight_g` [K, 1] and `weight_v` [K, D], as torch.nn.utils.weight_norm names them; those of
    torch.nn.utils.parametrizations.weight_norm are read, too. The product is written out, hence the
    layer can be copied, compiled and sharded. With unit_scale weight_g is 1 and stays so.
    """

    def __init__(self, in_features: int, out_features: int, unit_scale: bool = False) -> None:
        super().__init__()
        self.unit_scale = unit_scale
        self.weight_g = nn.Parameter(torch.ones(out_features, 1), requires_grad=not unit_scale)
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.trunc_normal_(self.weight_v, std=0.02)

    def weight(self) -> Tensor:  # [K, D], the normalised copy
        norm = torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True)
        scale = norm.clamp(min=SMALLEST_NORM).reciprocal()
        return self.weight_v * (scale if self.unit_scale else self.weight_g * scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight())

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: object
    ) -> None:
        for other, name in OTHER_NAMES.items():
            if prefix + other in state_dict:
                state_dict[prefix + name] = state_dict.pop(prefix + other)
        scale = state_dict.get(prefix + "weight_g")
        if self.unit_scale and scale is not None and not scale.is_meta:
            if not bool(torch.isclose(scale.float(), torch.ones_like(scale.float())).all()):
                raise ValueError(
                    f"{prefix}weight_g must be 1 for a head with norm_last_layer=True, got values "
                    f"up to {float(scale.abs().max()):.6g}; make the head with "
                    "norm_last_layer=False"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


class DINOHead(nn.Module):
    """[..., in_dim] -> [..., out_dim] logits. Arguments in the official order:

    in_dim, out_dim: widths of the features and number K of prototypes.
    use_bn: batch normalisation between the layers of the MLP.
    norm_last_layer: all prototypes have length 1; False learns a length for each.
    nlayers, hidden_dim, bottleneck_dim: the MLP, of GELUs between its layers.
    mlp_bias: DINOv2's option.

    Keys are the official ones: `mlp.{0,2,4}.*` (`mlp.*` for one layer), `last_layer.weight_g` and
    `last_layer.weight_v`.

    `loss` and `return_prototypes` serve `linear_dino_cross_entropy`, which multiplies by the
    prototypes itself, so that no logits are stored. Under FSDP2 the weights are whole inside
    `forward` only. Hence the student's loss is computed there, by a function that the caller gives;
    and of several processes the teacher returns its prototypes as a copy, which the backward pass
    needs long after the teacher's forward. See `DINOLoss.linear`.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        *,
        mlp_bias: bool = True,
    ) -> None:
        super().__init__()
        sizes = {"in_dim": in_dim, "out_dim": out_dim, "hidden_dim": hidden_dim}
        for name, value in {**sizes, "bottleneck_dim": bottleneck_dim}.items():
            check_int(name, value, 1)
        check_int("nlayers", nlayers, 1)
        widths = [in_dim, *[hidden_dim] * (nlayers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for i in range(nlayers):
            if i:
                layers += [nn.BatchNorm1d(hidden_dim), nn.GELU()] if use_bn else [nn.GELU()]
            layers.append(nn.Linear(widths[i], widths[i + 1], bias=mlp_bias))
        self.mlp = nn.Sequential(*layers) if nlayers > 1 else layers[0]
        self.mlp.apply(_init_linear)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, unit_scale=norm_last_layer)

    def forward(
        self,
        x: Tensor,
        *,
        loss: Callable[[HeadOutput], Result] | None = None,
        return_prototypes: bool = False,
    ) -> Tensor | HeadOutput | Result:
        """Logits; or what `loss` makes of features and prototypes; or those two, to keep."""
        if loss is not None and return_prototypes:
            raise ValueError("return_prototypes must be False where loss is given")
        x = self.mlp(x)
        x = F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else SMALLEST_NORM)
        if loss is not None:
            return loss(self._output(x))
        if return_prototypes:
            output = self._output(x)
            # Of one process nothing is sharded, and what is whole stays.
            copies = dist.is_available() and dist.is_initialized()
            lengths = None if output.lengths is None else output.lengths.detach().clone()
            prototypes = output.prototypes.detach()
            return output._replace(
                prototypes=prototypes.clone() if copies else prototypes, lengths=lengths
            )
        return self.last_layer(x)

    def _output(self, features: Tensor) -> HeadOutput:
        layer = self.last_layer
        lengths = None if layer.unit_scale else layer.weight_g.flatten()
        return HeadOutput(features, layer.weight_v, True, lengths)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
