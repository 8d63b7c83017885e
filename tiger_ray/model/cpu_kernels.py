"""CPU versions of three layers, each with its own backward pass: fewer passes over memory than torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EPSILON = 1e-6
"""Of T5's layer norm."""


class ReluDropout(torch.autograd.Function):
    """ReLU and dropout in place: the widest tensors of a layer, of which each new one would cost a millisecond
    per megabyte. What is not zero afterwards has a gradient, so nothing else is kept for it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, p: float) -> Tensor:
        ctx.mark_dirty(hidden)
        ctx.scale = 1 / (1 - p)
        bits = torch.int16 if hidden.dtype == torch.bfloat16 else torch.int32
        all_ones = kept(hidden.shape, p).neg_().to(bits)
        hidden.relu_().view(bits).bitwise_and_(all_ones)
        ctx.save_for_backward(hidden.mul_(ctx.scale))
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (dropped,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient, dropped, 0).mul_(ctx.scale), None


class WholeHeads(torch.autograd.Function):
    """Parts (B, H, T, D) of projections (B, T, parts, H, D), each head's numbers in a row, or each product would
    copy what it reads. Copies alone: the gradient of `unbind` is a `cat` that takes several times as long."""

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
    """RMSNorm and its gradient in a third of the passes over memory that torch's own takes on a CPU.

    With x a row of N = rows hidden states of width D, r = 1 / sqrt(mean(x^2) + EPSILON), and g the gradient of
    y = x r w, that of x is r (g w - x r^2 mean(g w x)), and that of w is the sum of g x r over rows.
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


def kept(shape: torch.Size, p: float) -> Tensor:
    """Which elements dropout leaves on a CPU: each 0 with probability p, else 1; int16.

    torch's own dropout takes half of a training step there; four draws from 64 random bits are enough.
    """
    words = torch.empty((shape.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return words.view(torch.int16)[: shape.numel()].view(shape).ge_(min(round(p * 2**16), 2**16 - 1) - 2**15)
