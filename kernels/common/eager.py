"""Calls of registered ops in plain eager mode, without torch.library's detour through Python.

The registered op is what torch.compile, export and dispatch modes (FLOP counters, fake tensors)
see. Where nothing looks on, its body runs at once, under an autograd.Function with the
op's own backward: 40 microseconds instead of 120 for a forward and its backward, which is what a
small kernel takes.
"""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.library import CustomOpDef

_PLAIN = (Tensor, nn.Parameter)


def custom_op(name: str, num_outputs: int | None = None, **options: object) -> Callable:
    """torch.library.custom_op of a body, called with the GPU of its tensors as the current device.

    With `num_outputs` the body may return None for outputs that are not there. The registered op
    returns an empty tensor of the first tensor's dtype for each, and so must its fake. `direct`
    leaves the Nones: on a GPU's host an empty tensor costs microseconds.
    """

    def register(body: Callable) -> CustomOpDef:
        own = shown = _on_their_device(body)
        if num_outputs is not None:

            @functools.wraps(body)
            def shown(*args: object) -> tuple[Tensor, ...]:
                like = next(x for x in args if isinstance(x, Tensor))
                return tuple(like.new_empty((0,)) if x is None else x for x in own(*args))

            shown.__signature__ = inspect.signature(body).replace(
                return_annotation=tuple[(Tensor,) * num_outputs]
            )
        op = torch.library.custom_op(name, shown, **{"mutates_args": ()} | options)
        op.body = own
        return op

    return register


def _on_their_device(body: Callable) -> Callable:
    """Triton launches on the current device, whichever the tensors are on."""

    @functools.wraps(body)
    def run(*args: object) -> object:
        device = _device_of(args)
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return body(*args)
        with torch.cuda.device(device):
            return body(*args)

    return run


def _device_of(args: tuple) -> torch.device:
    """That of the first tensor, or of the first list of tensors."""
    for x in args:
        if isinstance(x, Tensor):
            return x.device
        if isinstance(x, list | tuple) and x and isinstance(x[0], Tensor):
            return x[0].device
    return torch.device("cpu")


def direct(
    op: CustomOpDef,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """A function of the op's positional arguments: the op's body where nothing intercepts calls.

    `setup_context` and `backward` are those of op.register_autograd; None for an op without a
    gradient.
    """
    registered, body = op._opoverload, op.body
    differentiable = body
    if backward is not None:
        # With a setup_context of its own the Function would inspect forward's signature per call.
        def forward(ctx: object, *args: object) -> object:
            output = body(*args)
            setup_context(ctx, args, output)
            return output

        methods = {"forward": forward, "backward": _once(backward)}
        methods = {name: staticmethod(method) for name, method in methods.items()}
        differentiable = type(op._name, (torch.autograd.Function,), methods).apply

    def call(*args: object) -> object:
        if is_intercepted(args):
            return registered(*args)
        return differentiable(*args) if torch.is_grad_enabled() else body(*args)

    return call


def _once(backward: Callable) -> Callable:
    """`backward` with gradients that refuse to be differentiated, instead of counting as constant
    where somebody asked for that (create_graph=True)."""

    def run(ctx: object, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        found = found if isinstance(found, tuple) else (found,)
        sources = [x for x in (*grads, *ctx.saved_tensors) if x is not None and x.requires_grad]
        return tuple(g if g is None else _FirstDerivative.apply(g, *sources) for g in found)

    return run


class _FirstDerivative(torch.autograd.Function):
    """`grad`, for autograd a function of the tensors that it was made of."""

    @staticmethod
    def forward(ctx: object, grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: object, _: Tensor) -> Tensor:
        raise RuntimeError(
            "this op's kernels compute first derivatives only; backend='reference' (or "
            "FASTSSL_BACKEND=reference) computes all"
        )


def is_intercepted(args: tuple) -> bool:
    """Whether something other than plain tensors in plain eager mode would see a call."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_tracing()
    ):
        return True
    # A loop, which takes less time than a generator.
    for x in args:
        if type(x) not in _PLAIN and isinstance(x, Tensor):
            return True
    return False
