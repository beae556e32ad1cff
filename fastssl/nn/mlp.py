"""The transformer's feed-forward layer."""

from collections.abc import Callable

from torch import Tensor, nn

from fastssl import functional
from fastssl.nn.linear import Linear, is_plain


class Mlp(nn.Module):
    """fc2(act(fc1(x))): [..., in_features] -> [..., out_features].

    `hidden_features` and `out_features` default to `in_features`. With the exact GELU it is one op,
    `functional.gelu_mlp`, unless a layer was replaced or has hooks. Keys: fc1, fc2.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = Linear(hidden_features, out_features or in_features)

    def forward(self, x: Tensor) -> Tensor:
        fc1, act, fc2 = self.fc1, self.act, self.fc2
        is_gelu = is_plain(act, nn.GELU) and act.approximate == "none"
        if is_gelu and is_plain(fc1, Linear) and is_plain(fc2, Linear):
            return functional.gelu_mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        return fc2(act(fc1(x)))
