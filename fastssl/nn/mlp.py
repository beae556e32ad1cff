"""The transformer's feed-forward layer."""

from collections.abc import Callable

from torch import Tensor, nn


class Mlp(nn.Module):
    """fc2(act(fc1(x))): [..., in_features] -> [..., out_features].

    `hidden_features` and `out_features` default to `in_features`. Keys: fc1, fc2.
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
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))
