"""What barlow_twins, vicreg and covariance_loss share: their steps on cpp or Triton.

N samples of all processes, n of this one, D features. y is a view's [N, D] features, centered, and
for barlow_twins divided by the standard deviation. All three losses are column sums and the squared
norm of products y_a^T y_b [D, D], which is also <y_a y_a^T, y_b y_b^T> of two N x N matrices:

1. `columns`: one read of the features gives means, centered squares, y and its column products.
2. Matrix products by torch: for N < D rows of the Gram matrices [n, N], else [D, D], whose
   diagonal is set to 0 (so that nothing cancels); either is the only one of its size.
3. `dot`: the squared norm.
4. Backward: p = y_a y_b^T y_b by one more matrix product per view, then `combine`: with a factor
   per column, dz = r p + k y + b y_other + c, where k also takes the projection of p on y.

Processes: for N < D features are gathered once and each multiplies its own rows of the Gram
matrices with all; otherwise vectors of D and the D x D products are summed. Backward sends a
number, and for barlow_twins with N < D a vector of D per view.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from fastssl.kernels.common import collectives

# Rows of a matrix product that runs at full speed.
MIN_BLOCK = 64


@dataclass(frozen=True)
class BarlowTwins:
    lambd: float
    eps: float
    # sum over rows of y0 * y1, else of (y0 - y1)^2
    differences = False
    # The product is of two views with each other, and its gradient passes a standardisation.
    crossed = True

    @property
    def scale_eps(self) -> float:
        return self.eps

    def finish(
        self, stats: Tensor, cross: Tensor, squares: list[Tensor], count: int, whole: bool
    ) -> tuple[Tensor, Tensor]:
        """The loss, and the factors (r, k, b, c) [2, 4, D] of its gradient.

        stats [2, 2, D] are the views' means and centered squares, `squares` the squared norm of
        y0^T y1, with its diagonal if `whole`.
        """
        correlation = cross / count
        loss = (correlation - 1).square().sum() + self.lambd / count**2 * squares[0]
        slope = 2 * (correlation - 1)
        if whole:
            loss = loss - self.lambd * correlation.square().sum()
            slope = slope - 2 * self.lambd * correlation
        factors = torch.zeros_like(stats).repeat(1, 2, 1)
        inverse_std = (stats[:, 1] / count + self.eps).rsqrt()
        factors[:, 0] = inverse_std * (2 * self.lambd / count**2)
        factors[:, 1] = -inverse_std * slope * correlation / count
        factors[:, 2] = inverse_std * slope / count
        return loss, factors


@dataclass(frozen=True)
class VICReg:
    sim_coeff: float
    std_coeff: float
    cov_coeff: float
    eps: float
    differences = True
    crossed = False
    scale_eps = -1.0

    def finish(
        self, stats: Tensor, cross: Tensor, squares: list[Tensor], count: int, whole: bool
    ) -> tuple[Tensor, Tensor]:
        """As BarlowTwins.finish; one or two views, each with a squared norm."""
        means, variances = stats[:, 0], stats[:, 1] / max(count - 1, 1)
        width, degrees = stats.shape[2], max(count - 1, 1)
        std = (variances + self.eps).sqrt()
        loss = self.std_coeff / (2 * width) * (1 - std).clamp(min=0).sum()
        loss = loss + self.cov_coeff / (width * degrees**2) * sum(squares)
        factors = torch.zeros_like(stats).repeat(1, 2, 1)
        factors[:, 0] = 4 * self.cov_coeff / (width * degrees**2)
        own = -self.std_coeff / (2 * width * degrees) * (std <= 1) / std
        if whole:
            loss = loss - self.cov_coeff / width * variances.square().sum()
            own = own - 4 * self.cov_coeff / (width * degrees) * variances
        factors[:, 1] = own
        if len(stats) == 2:
            apart = means[0] - means[1]
            weight = self.sim_coeff / (count * width)
            loss = loss + weight * (cross.sum() + count * apart.square().sum())
            factors[:, 1] += 2 * weight
            factors[:, 2] = -2 * weight
            factors[0, 3] = 2 * weight * apart
            factors[1, 3] = -2 * weight * apart
        return loss, factors


Loss = BarlowTwins | VICReg


def backend_module(backend: str) -> ModuleType:
    if backend == "cpp":
        from fastssl.kernels.common import cpp_gram as module
    else:
        from fastssl.kernels.common import triton_gram as module
    return module


def takes_gram(z: Tensor, group: str) -> bool:
    """Whether the N x N matrices are smaller than D x D."""
    return z.shape[0] * collectives.world_size(group) < z.shape[1]


def kept_gram(ys: list[Tensor], matrices: list[Tensor]) -> bool:
    """takes_gram of what `forward` kept: a rank's own rows say nothing about those of all."""
    return matrices[0].shape[1] < ys[0].shape[1]


def own_rows(y: Tensor, group: str) -> Tensor:
    """This process's rows of gathered ones."""
    size = collectives.world_size(group)
    return y if size == 1 else y.chunk(size)[collectives.rank(group)]


def symmetric_product(y: Tensor) -> Tensor:  # [N, D] -> y y^T [N, N]
    """With 3/8 less work where blocks are large enough: above the diagonal it is a copy."""
    size = y.shape[0]
    block = max(MIN_BLOCK, -(-size // (4 * 64)) * 64)
    out = y.new_empty((size, size))
    for first in range(0, size, block):
        last = min(first + block, size)
        torch.mm(y[first:last], y[:last].T, out=out[first:last, :last])
        out[:first, first:last] = out[first:last, :first].T
    return out


def empty_outputs(views: list[Tensor], loss: Loss, group: str) -> tuple[Tensor, ...]:
    """loss [], y per view, matrices, factors [V, 4, D]; what `forward` returns."""
    rows, width = views[0].shape
    kwargs = {"dtype": torch.float32}
    if takes_gram(views[0], group):
        total = rows * collectives.world_size(group)
        y_shape, shape, number = (total, width), (rows, total), len(views)
    else:
        y_shape, shape, number = (rows, width), (width, width), 1 if loss.crossed else len(views)
    return (
        views[0].new_empty((), **kwargs),
        *(views[0].new_empty(y_shape, **kwargs) for _ in views),
        *(views[0].new_empty(shape, **kwargs) for _ in range(number)),
        views[0].new_empty((len(views), 4, width), **kwargs),
    )


def forward(backend: str, views: list[Tensor], loss: Loss, group: str) -> tuple[Tensor, ...]:
    with torch.autocast(views[0].device.type, enabled=False):
        kernels = backend_module(backend)
        count = views[0].shape[0] * collectives.world_size(group)
        gram = takes_gram(views[0], group)
        step = _gram if gram else _covariance
        stats, ys, cross, matrices, squares = step(kernels, views, loss, count, group)
        value, factors = loss.finish(stats, cross, squares, count, whole=gram)
        return value, *ys, *matrices, factors


def _gram(kernels, views, loss, count, group):
    views = [collectives.all_gather_with_grad(z, group) for z in views]
    stats, ys, cross = kernels.columns(views, None, count, loss.scale_eps, loss.differences)
    matrices = [own_rows(y, group) @ y.T if group else symmetric_product(y) for y in ys]
    if loss.crossed:
        squares = [kernels.dot(*matrices)]
    else:
        squares = [kernels.dot(matrix, matrix) for matrix in matrices]
    squares = [collectives.all_reduce_sum(square, group) for square in squares]
    return stats, ys, cross, matrices, squares


def _covariance(kernels, views, loss, count, group):
    known = _stats_of_all(kernels, views, group) if group else None
    stats, ys, cross = kernels.columns(views, known, count, loss.scale_eps, loss.differences)
    cross = collectives.all_reduce_sum(cross, group)
    products = [ys[0].T @ ys[1]] if loss.crossed else [symmetric_product(y.T) for y in ys]
    matrices = [collectives.all_reduce_sum(product, group) for product in products]
    for matrix in matrices:
        matrix.fill_diagonal_(0)
    return stats, ys, cross, matrices, [kernels.dot(matrix, matrix) for matrix in matrices]


def _stats_of_all(kernels, views: list[Tensor], group: str) -> Tensor:  # [V, 2, D]
    rows = views[0].shape[0]
    by_rank = collectives.all_gather_with_grad(kernels.stats(views)[None], group)  # [W, V, 2, D]
    means, squares = by_rank[:, :, 0], by_rank[:, :, 1]
    mean = means.mean(dim=0)
    squares = squares.sum(dim=0) + rows * (means - mean).square().sum(dim=0)
    return torch.stack([mean, squares], dim=1)


def backward(
    backend: str,
    dloss: Tensor,  # []
    ys: list[Tensor],
    matrices: list[Tensor],
    factors: Tensor,  # [V, 4, D]
    loss: Loss,
    dtype: torch.dtype,
    wanted: list[bool],
    group: str,
) -> list[Tensor]:
    """The gradient of every view, empty where it is not wanted."""
    with torch.autocast(dloss.device.type, enabled=False):
        kernels = backend_module(backend)
        gram = kept_gram(ys, matrices)
        own = [own_rows(y, group) if gram else y for y in ys]
        factors = factors * collectives.all_reduce_sum(dloss, group)
        count = own[0].shape[0] * collectives.world_size(group)
        grads = []
        for view, want in enumerate(wanted):
            if not want:
                grads.append(ys[0].new_empty((0,), dtype=dtype))
                continue
            p = torch.mm(*_operands(view, ys, matrices, loss.crossed, gram))
            other = own[1 - view] if len(ys) == 2 else None
            coefficients, project = factors[view], 1 / count if loss.crossed else 0.0
            if project and group:
                dots = collectives.all_reduce_sum(kernels.dots(p, own[view]), group)
                coefficients = coefficients.clone()
                coefficients[1] -= coefficients[0] * dots * project
                project = 0.0
            grads.append(kernels.combine(p, own[view], other, coefficients, project, dtype))
        return grads


def _operands(
    view: int, ys: list[Tensor], matrices: list[Tensor], crossed: bool, gram: bool
) -> tuple[Tensor, Tensor]:  # whose product is p [n, D]
    if gram:
        return matrices[1 - view if crossed else view], ys[view]
    if not crossed:
        return ys[view], matrices[view]
    return (ys[1], matrices[0].T) if view == 0 else (ys[0], matrices[0])


def empty_gradients(
    ys: list[Tensor], matrices: list[Tensor], dtype: torch.dtype, wanted: list[bool]
) -> list[Tensor]:
    """What `backward` returns."""
    rows, width = ys[0].shape
    if kept_gram(ys, matrices):
        rows = matrices[0].shape[0]
    return [ys[0].new_empty((rows, width) if want else (0,), dtype=dtype) for want in wanted]


def forward_flops(shape: torch.Size, views: int, crossed: bool) -> int:
    """Of one process's own rows against themselves."""
    rows, width = shape
    if rows < width:
        return 2 * views * rows**2 * width
    return 2 * (1 if crossed else views) * rows * width**2


def backward_flops(matrix: torch.Size, y: torch.Size, wanted: int) -> int:
    rows = matrix[0] if matrix[1] < y[1] else y[0]
    return 2 * wanted * rows * matrix[1] * y[1]
