"""What kernels do with scores and weights, so that every Triton compiles it to the same arithmetic.

* Triton up to 3.8 takes a literal in `tl.fma` for float32, whatever it meets there: in float64 half of the digits of ln 2
  would be lost. So literals are made numbers of the block's type.
* A compiler may contract a product and a sum into one multiply-add, which rounds once. In `tl.sum(x * y)` over lanes that
  hold one product each, it contracts a lane's own product with the first sum across lanes: one lane computes
  fma(x_0, y_0, x_1 y_1), and its neighbour fma(x_1, y_1, x_0 y_0). These differ in the last bit, all lanes of a row store
  their result to one address, and which of them stays there is not defined. `fma(x, y, 0)` is a product already rounded,
  which nothing can be contracted with. So no reduction in this package is given a product, unless a `where` stands
  between: there is `weighted_sum`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grade_kernels.backends.triton.philox import LN2, LOG2E

__all__ = ["rate_of", "score", "weighted_sum"]


@triton.jit
def score(b_n, b_l):
    """Scores l + g from scaled noise n and logits l, but for the shift that all noise shares (SHIFT)."""
    return tl.fma(b_n, tl.full((), -LN2, b_l.dtype), b_l)


@triton.jit
def rate_of(r_tau):
    """What a distance of scores is multiplied with, to be the weight's binary logarithm."""
    return tl.full((), LOG2E, r_tau.dtype) / r_tau


@triton.jit
def weighted_sum(b_w, b_x, AXIS: tl.constexpr):
    """Sum of w * x along an axis, the same in all lanes."""
    return tl.sum(tl.fma(b_w, b_x, 0.0), AXIS)
