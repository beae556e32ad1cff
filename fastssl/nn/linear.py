"""nn.Linear as one op under autocast."""

from torch import Tensor, nn

from fastssl import functional


class Linear(nn.Linear):
    """As nn.Linear, with its arguments and keys: [..., in_features] -> [..., out_features].

    Under autocast it is one op, `functional.linear`: the weight is cast once, and its gradient is
    returned in the weight's dtype.
    """

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` does what `kind` does and nothing else, so that an op may do it.

    Not so for a subclass, a module put in its place (adapters, quantisation) and where a hook waits
    for the call.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return type(module) is kind and not any((*hooks, module._backward_pre_hooks))
