"""Decays per channel between the tokens of a chunk, without a quotient of exponentials: intervals by halving.

Halve a chunk again and again. Every pair of tokens j < i is first apart at exactly one of the halvings, at a border m between them:

    exp(g_{j+1} + ... + g_i) = exp(sum of g after j up to m) exp(sum of g after m up to i)

so all pairs that a border parts are one matrix product of tokens times factors, and no factor is above one. A chunk of 64 has six kinds
of borders, one for each width of the halves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gdn.ops.sequences.decay import decays
from gdn.ops.sequences.scratch import Scratch


def halves(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Left and right halves `[M, borders, width, X]` of x `[M, C, X]` on both sides of each border of one kind."""
    left, right = x.unflatten(1, (-1, 2, width)).unbind(2)
    return left, right


def parted(pairs: Tensor, width: int) -> Tensor:
    """The pairs that borders of one kind part: a view `[M, borders, width, width]` of pairs `[M, C, C]`, (right token, left token)."""
    split = pairs.unflatten(2, (-1, 2, width)).unflatten(1, (-1, 2, width))
    return split[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


@dataclass
class Intervals:
    """exp of sums of g over intervals of a chunk, each channel by itself."""

    factors: dict[int, Tensor]
    """By width of the halves, `[M, C, X]`: left of a border from after the token up to it, right of a border from it up to the token."""
    gamma: Tensor
    """From the begin of the chunk to each token, `[M, C, X]`."""
    tail: Tensor
    """From after each token to the end of the chunk, `[M, C, X]`."""

    @classmethod
    def of(cls, g: Tensor, scratch: Scratch) -> Intervals:
        """From log decays g `[M, C, X]`, whose memory is taken."""
        before, after = g, scratch("after", *g.shape).zero_()  # sums up to a token, and after it, inside ever wider parts of the chunk
        factors, width = {}, 1
        while width < g.shape[1]:
            factors[width] = scratch(f"factors {width}", *g.shape)
            (first, second), (rest, _) = halves(before, width), halves(after, width)
            left, right = halves(factors[width], width)
            decays(rest, left)
            decays(second, right)
            rest += second[:, :, -1:]
            second += first[:, :, -1:]
            width *= 2
        return cls(factors, decays(before, before), decays(after, after))

    def score(self, x: Tensor, y: Tensor, out: Tensor, scratch: Scratch) -> Tensor:
        """`out[i, j] = sum over channels of x_i y_j exp(g_{j+1} + ... + g_i)` for i >= j, else 0."""
        out.zero_()
        out.diagonal(dim1=1, dim2=2).copy_((x * y).sum(-1))
        for width in self.factors:
            right, left = self.reach(x, y, width, scratch)
            parted(out, width).copy_(torch.matmul(right, left.mT))
        return out

    def reach(self, x: Tensor, y: Tensor, width: int, scratch: Scratch) -> tuple[Tensor, Tensor]:
        """x of the tokens on the right of the borders and y of those on the left, both brought to the border."""
        left, right = halves(self.factors[width], width)
        return (
            torch.mul(halves(x, width)[1], right, out=scratch("right", *right.shape)),
            torch.mul(halves(y, width)[0], left, out=scratch("left", *left.shape)),
        )

    def read(self, pairs: Tensor, y: Tensor, into: Tensor, scratch: Scratch) -> Tensor:
        """Add `sum over j <= i of pairs[i, j] y_j exp(g_{j+1} + ... + g_i)` to row i of `into`."""
        into.addcmul_(pairs.diagonal(dim1=1, dim2=2).unsqueeze(-1), y)
        for width, factors in self.factors.items():
            left, right = halves(factors, width)
            brought = torch.mul(halves(y, width)[0], left, out=scratch("left", *left.shape))
            halves(into, width)[1].addcmul_(torch.matmul(parted(pairs, width), brought), right)
        return into

    def gradients(
        self, pairs: Tensor, x: Tensor, y: Tensor, d_x: Tensor, d_y: Tensor, d_before: Tensor, d_after: Tensor, scratch: Scratch
    ) -> Tensor:
        """Gradients of `sum of pairs * score(x, y)`: added to d_x and d_y; that of g is returned.

        `d_before` and `d_after` `[M, C, X]` are the gradients of the logarithms of `gamma` and `tail`; they are changed. Every exponent
        is a sum of some g, so the gradient of a g is the sum of those of the exponents it stands in, and nothing is subtracted.
        """
        diagonal = pairs.diagonal(dim1=1, dim2=2).unsqueeze(-1)
        d_x.addcmul_(diagonal, y)
        d_y.addcmul_(diagonal, x)
        for width, factors in reversed(self.factors.items()):
            (first, second), (rest, _) = halves(d_before, width), halves(d_after, width)
            first[:, :, -1] += second.sum(2)
            second[:, :, -1] += rest.sum(2)
            right, left = self.reach(x, y, width, scratch)
            apart = parted(pairs, width).contiguous()
            to_right, to_left = torch.matmul(apart, left), torch.matmul(apart.mT, right)
            left_factor, right_factor = halves(factors, width)
            halves(d_x, width)[1].addcmul_(to_right, right_factor)
            halves(d_y, width)[0].addcmul_(to_left, left_factor)
            second.addcmul_(to_right, right)
            rest.addcmul_(to_left, left)
        return d_before
