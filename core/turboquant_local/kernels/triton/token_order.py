"""Which token every row and column of a tile of decode attention is: device functions.

A row of a warp's scores is 32r + 8t + p, t and r counted by registers and p by lanes. ORDER says which token that is:

- "read": of codes that threads read, token 32(rW + w) + 4p + t of warp w of W, so that a lane's tokens are neighbours.
- "copied": of tiles that the copy engine brought, 32(rW + w) + 4g + t, where g is p with its lowest two bits exchanged:
  so shared memory is read without bank conflicts.
- "thirds": of copied three-bit codes, 64w + 8g + 4r + t, where g is p with its bits b2 b1 b0 in the order b1 b0 b2.

With two SIDES the scores of the first half of a warp's tokens lie beside those of the second, in the columns that
queries leave free: the softmax, the scales and what is done once a tile then cost half.
"""

import triton
import triton.language as tl


@triton.jit
def token_of(w, row, W: tl.constexpr, ORDER: tl.constexpr):
    """Which token of a tile row `row` of warp `w` is."""
    r = row // 32
    t = row // 8 % 4
    p = row % 8
    if ORDER == "thirds":
        at = w * 64 + (p % 4 * 2 + p // 4) * 8 + r * 4 + t
    elif ORDER == "copied":
        at = (r * W + w) * 32 + (p // 4 * 4 + p % 2 * 2 + p // 2 % 2) * 4 + t
    else:
        at = (r * W + w) * 32 + p * 4 + t
    return at


@triton.jit
def tokens_of(W: tl.constexpr, BN: tl.constexpr, SIDES: tl.constexpr, ROWS: tl.constexpr, ORDER: tl.constexpr):
    """Token of every score of a tile: `[W, BN, 1]`, of two sides `[W, BN / 2, ROWS]`."""
    w = tl.arange(0, W)[:, None, None]
    row = tl.arange(0, BN // SIDES)[None, :, None]
    if SIDES == 2:
        row = row + tl.arange(0, ROWS)[None, None, :] // (ROWS // 2) * (BN // 2)
    return token_of(w, row, W, ORDER)


@triton.jit
def by_rows(x, SIDES: tl.constexpr, ROWS: tl.constexpr, ORDER: tl.constexpr):
    """Numbers of tokens `[R, W, 8, 4]`, by r, w, p or g and t, as scores lie: `[W, 32R, 1]`, or `[W, 16R, ROWS]`."""
    W: tl.constexpr = x.shape[1]
    R: tl.constexpr = x.shape[0] // SIDES
    x = tl.reshape(x, [SIDES, R, W, 2, 2, 2, 4])
    x = tl.permute(x, [2, 1, 6, 3, 4, 5, 0]) if ORDER == "read" else tl.permute(x, [2, 1, 6, 3, 5, 4, 0])
    if SIDES == 2:
        x = tl.broadcast_to(tl.reshape(x, [W, R * 32, 2, 1]), [W, R * 32, 2, ROWS // 2])
        x = tl.reshape(x, [W, R * 32, ROWS])
    else:
        x = tl.reshape(x, [W, R * 32])[:, :, None]  # reshaped to three dimensions at once, Triton 3.6 adds up wrongly
    return x


@triton.jit
def side_by_side(s, SIDES: tl.constexpr):
    """Scores `[W, BN, ROWS]`, whose second half of columns repeats the first, as two sides: `[W, BN / 2, ROWS]`."""
    if SIDES == 2:
        W: tl.constexpr = s.shape[0]
        BN: tl.constexpr = s.shape[1]
        ROWS: tl.constexpr = s.shape[2]
        left, right = tl.split(tl.permute(tl.reshape(s, [W, 2, BN // 2, ROWS]), [0, 2, 3, 1]))
        s = tl.where(tl.arange(0, ROWS)[None, None, :] < ROWS // 2, left, right)
    return s


@triton.jit
def for_values(p, SIDES: tl.constexpr, ORDER: tl.constexpr):
    """Weights as the right operand of the product with values, whose tokens are in an order of their own.

    Those of two sides are put one below the other, `[W, BN, ROWS]`, with 0 in the columns of the other side.
    """
    W: tl.constexpr = p.shape[0]
    BN: tl.constexpr = p.shape[1] * SIDES
    ROWS: tl.constexpr = p.shape[2]
    if SIDES == 2:
        side = tl.arange(0, 2)[None, :, None, None] == tl.arange(0, ROWS)[None, None, None, :] // (ROWS // 2)
        p = tl.broadcast_to(tl.reshape(p, [W, 1, BN // 2, ROWS]), [W, 2, BN // 2, ROWS])
        p = tl.reshape(p * side.to(p.dtype), [W, BN, ROWS])
    if ORDER != "read":
        p = tl.reshape(p, [W, BN // 32, 2, 2, 2, 2, 2, ROWS])
        p = tl.permute(p, [0, 1, 2, 5, 6, 3, 4, 7]) if ORDER == "thirds" else tl.permute(p, [0, 1, 4, 5, 2, 6, 3, 7])
        p = tl.reshape(p, [W, BN, ROWS])
    return p


@triton.jit
def split_sides(x):
    """Both sides as warps of their own: `[W, ROWS]` to `[2W, ROWS / 2]`, or the same with a dimension between."""
    W: tl.constexpr = x.shape[0]
    if len(x.shape) == 2:
        x = tl.reshape(x, [2 * W, x.shape[1] // 2])
    else:
        N: tl.constexpr = x.shape[1]
        HALF: tl.constexpr = x.shape[2] // 2
        x = tl.reshape(tl.permute(tl.reshape(x, [W, N, 2, HALF]), [0, 2, 1, 3]), [2 * W, N, HALF])
    return x
