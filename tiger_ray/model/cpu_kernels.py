"""Three layers for CPUs, each with its own backward pass: they pass over memory less often than torch's layers.

B rows in batch, T tokens, H heads, D width, N = all rows of a batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EPSILON = 1e-6
"""Epsilon of T5's layer norm."""


class ReluDropout(torch.autograd.Function):
    """ReLU and dropout in place, for the widest tensors of a layer: a new tensor costs a millisecond per megabyte.

    The result is enough for the backward pass: exactly its non-zero elements have a gradient.

    >>> ReluDropout.apply(torch.tensor([-1.0, 2.0]), 0.0)
    tensor([0., 2.])
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, p: float) -> Tensor:
        ctx.mark_dirty(hidden)
        ctx.scale = 1 / (1 - p)
        bits = torch.int16 if hidden.dtype == torch.bfloat16 else torch.int32
        all_ones = dropout_mask(hidden.shape, p).neg_().to(bits)
        hidden.relu_().view(bits).bitwise_and_(all_ones)
        ctx.save_for_backward(hidden.mul_(ctx.scale))
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (dropped,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient, dropped, 0).mul_(ctx.scale), None


class WholeHeads(torch.autograd.Function):
    """Parts (B, H, T, D) of projections (B, T, parts, H, D), contiguous, or each matrix product would copy them.

    The backward pass copies each gradient into its place; the gradient of torch's `unbind` is a `cat`, which
    takes several times as long.

    >>> query, key, value = WholeHeads.apply(torch.zeros(2, 5, 3, 4, 8))
    >>> query.shape, query.is_contiguous()
    (torch.Size([2, 4, 5, 8]), True)
    """

    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.transpose(1, 2).contiguous() for part in projected.unbind(2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        batch, heads, length, width = gradients[0].shape
        of_projected = gradients[0].new_empty(batch, length, len(gradients), heads, width)
        for part, gradient in enumerate(gradients):
            of_projected[:, :, part] = gradient.transpose(1, 2)
        return of_projected


class RmsNorm(torch.autograd.Function):
    """RMSNorm and its gradient, with a third of the passes over memory of torch's RMSNorm on a CPU.

    Let x be one of N hidden states of width D, r = 1 / sqrt(mean(x^2) + EPSILON), y = x r w, and g the gradient
    of y. Then the gradient of x is r (g w - x r^2 mean(g w x)), and the gradient of w is the sum of g x r over N.

    >>> round(RmsNorm.apply(torch.tensor([[3.0, 4.0]]), torch.ones(2)).square().mean().item(), 3)
    1.0
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_D: Tensor) -> Tensor:
        x_ND = hidden.reshape(-1, len(weight_D))
        square_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True).square_()
        r_N1 = square_N1.div_(len(weight_D)).add_(EPSILON).rsqrt_()
        ctx.save_for_backward(x_ND, weight_D, r_N1)
        return (x_ND * r_N1).mul_(weight_D).view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x_ND, weight_D, r_N1 = ctx.saved_tensors
        g_ND = gradient.reshape(x_ND.shape)
        gx_ND = g_ND * x_ND
        mean_N1 = (gx_ND @ weight_D)[:, None].div_(-len(weight_D)).mul_(r_N1).mul_(r_N1)
        of_x_ND = (g_ND * weight_D).addcmul_(x_ND, mean_N1).mul_(r_N1)
        return of_x_ND.view_as(gradient), (r_N1.T @ gx_ND)[0]


def dropout_mask(shape: torch.Size, p: float) -> Tensor:
    """Mask of dropout on a CPU, int16: 0 with probability p, else 1.

    One random word of 64 bits gives four elements. torch's dropout takes half of a training step on a CPU.
    """
    words = torch.empty((shape.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return words.view(torch.int16)[: shape.numel()].view(shape).ge_(min(round(p * 2**16), 2**16 - 1) - 2**15)
