"""The registered ops of barlow_twins, vicreg and covariance_loss: one definition, three names."""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastssl.kernels.common import collectives, dispatch, gram
from fastssl.kernels.common.autograd import reference_gradients
from fastssl.kernels.common.collectives import Group
from fastssl.kernels.common.eager import custom_op


class GramOp:
    """fastssl::<name>(z0, ..., <numbers>, group, backend), its dispatch and its backward.

    `loss` makes gram.BarlowTwins or gram.VICReg of the numbers; `reference` has a function of the
    op's name that takes the views, the numbers and the group.
    """

    def __init__(
        self,
        name: str,
        num_views: int,
        numbers: Sequence[str],
        loss: Callable[..., gram.Loss],
        reference: ModuleType,
    ) -> None:
        self.num_views, self.loss = num_views, loss
        self.reference = getattr(reference, name)
        self.entry = dispatch.register(
            name,
            {"triton": dispatch.cannot_run_triton, "cpp": dispatch.cannot_run_cpp},
            lambda device: tuple(torch.zeros(4, 6, device=device) for _ in range(num_views)),
        )
        views = "".join(f"Tensor z{view}, " for view in range(num_views))
        rest = "".join(f"float {number}, " for number in numbers) + "str group, str backend"
        # Returned are the loss, y of each view, matrices and factors: see gram.py.
        op = custom_op(f"fastssl::{name}", schema=f"({views}{rest}) -> Tensor[]")(self._forward)
        backward = custom_op(
            f"fastssl::{name}_backward",
            schema="(Tensor dloss, Tensor[] ys, Tensor[] matrices, Tensor factors, "
            f"ScalarType dtype, bool[] wanted, {rest}) -> Tensor[]",
        )(self._run_backward)
        op.register_fake(self._fake)
        backward.register_fake(
            lambda dloss, ys, matrices, factors, dtype, wanted, *_: gram.empty_gradients(
                ys, matrices, dtype, wanted
            )
        )
        op.register_autograd(self._backward, setup_context=_setup_context(num_views))
        self.op = getattr(torch.ops.fastssl, name)
        self.backward_op = getattr(torch.ops.fastssl, f"{name}_backward")
        register_flop_formula(self.op)(self._flops)
        register_flop_formula(self.backward_op)(_backward_flops)

    def __call__(
        self, *views: Tensor, numbers: Sequence[float], group: Group, backend: str | None
    ) -> Tensor:
        """The loss of views that have been checked."""
        chosen = dispatch.choose_backend(self.entry, backend, *views)
        group = collectives.group_name(group)
        if chosen == "reference":
            return self.reference(*views, *numbers, group)
        return self.op(*(view.contiguous() for view in views), *numbers, group, chosen)[0]

    def _parts(self, arguments: Sequence) -> tuple[list[Tensor], gram.Loss, str, str]:
        views, rest = arguments[: self.num_views], arguments[self.num_views :]
        *numbers, group, backend = rest
        return list(views), self.loss(*numbers), group, backend

    def _forward(self, *arguments: object) -> list[Tensor]:
        views, loss, group, backend = self._parts(arguments)
        if backend == "reference":
            outputs = self._fake(*arguments)
            value = self.reference(*arguments[:-1])
            return [value.float(), *(output.zero_() for output in outputs[1:])]
        return list(gram.forward(backend, views, loss, group))

    def _fake(self, *arguments: object) -> list[Tensor]:
        views, loss, group, _ = self._parts(arguments)
        return list(gram.empty_outputs(views, loss, group))

    def _run_backward(self, dloss, ys, matrices, factors, dtype, wanted, *rest) -> list[Tensor]:
        *numbers, group, backend = rest
        loss = self.loss(*numbers)
        return gram.backward(backend, dloss, ys, matrices, factors, loss, dtype, wanted, group)

    def _backward(self, ctx, grads):
        nothing = (None,) * (len(ctx.numbers) + 2)
        saved, count = ctx.saved_tensors, self.num_views
        if ctx.backend == "reference":
            inputs = (*saved, *ctx.numbers, ctx.group)
            found = reference_gradients(ctx, self.reference, inputs, grads[0])
            return *found[:count], *nothing
        *matrices, factors = saved[count:]
        wanted = ctx.needs_input_grad[:count]
        found = self.backward_op(
            *(grads[0], saved[:count], matrices, factors, ctx.dtype, wanted),
            *(*ctx.numbers, ctx.group, ctx.backend),
        )
        return *(grad if want else None for grad, want in zip(found, wanted, strict=True)), *nothing

    def _flops(self, z, *rest, **_):
        # Shapes come in place of tensors; what is crossed does not depend on the numbers.
        crossed = self.loss is gram.BarlowTwins
        return gram.forward_flops(z, self.num_views, crossed)


def _setup_context(num_views: int) -> Callable:
    def setup_context(ctx, inputs, output):
        views, (*ctx.numbers, ctx.group, ctx.backend) = inputs[:num_views], inputs[num_views:]
        ctx.dtype = views[0].dtype
        # Autograd would fill the gradients of everything saved with zeros.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(views if ctx.backend == "reference" else output[1:]))

    return setup_context


def _backward_flops(dloss, ys, matrices, factors, dtype, wanted, *_, **__):
    return gram.backward_flops(matrices[0], ys[0], sum(wanted))
