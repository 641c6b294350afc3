"""The softmax over tiles of scores: device functions of decode attention.

Every warp keeps a softmax of its own over its own tokens, so warps meet only once, at the end of a share.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def visible(
    s, position, kv_length, mask, head, token, in_range, stride_mh, stride_mq, stride_mk, softcap,
    Q_LENGTH: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Cap and mask a tile of scores `[W, BN, ROWS]`; afterwards they are in base 2.

    Positions, and whether there is such a token, are `[W, BN, 1]`, or of every score.
    """
    if SOFTCAP:
        x = s / softcap
        e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
        s = tl.where(x < 0, -1.0, 1.0) * (1 - e) / (1 + e) * softcap * LOG2E
    if CAUSAL:
        s = tl.where(position > kv_length - Q_LENGTH + token[None, None, :], -INFINITY, s)
    if MASK != "none":
        row_at = head.to(tl.int64) * stride_mh + token * stride_mq
        at = mask + row_at[None, None, :] + position.to(tl.int64) * stride_mk
        shown = tl.load(at, mask=in_range, other=0)
        if MASK == "bool":
            s = tl.where(shown != 0, s, -INFINITY)
        else:  # the lowest float32 must not overflow on its way to base 2
            s += tl.where(shown == -INFINITY, -INFINITY, tl.maximum(shown.to(tl.float32), -2e38) * LOG2E)
    return s


@triton.jit
def softmax_step(s, scale, lift, m, total, acc):
    """One step of the running softmax of every warp.

    Args:
        s: Scores `[W, BN, ROWS]` in base 2.
        scale: What the tokens' values are to be multiplied by, `[W, BN, 1]` or of every score, not negative.
        lift: Its logarithm, but for 1; anything finite for 0.
        m: Running maximum of score times scale, `[W, ROWS]`, up to a factor of 2: so the weights fit float16 whatever
            the scales are.
        total: Running sum of the exponentials, one for every register, `[W, BN, ROWS]`.
        acc: Running sum of the values, `[W, VD, ROWS]`.

    Returns:
        Weights `[W, BN, ROWS]`, scale included, what sums so far are to be multiplied by, `[W, ROWS]`, and the three
        running quantities.
    """
    new = tl.maximum(m, tl.max(s + lift, 1))
    base = tl.where(new == -INFINITY, 0.0, new)
    decay = tl.exp2(m - base)
    weights = tl.exp2(s - base[:, None, :])
    total = total * decay[:, None, :] + weights
    return weights * scale, decay, new, total, acc * decay[:, None, :]


@triton.jit
def _halved(x):
    one, other = tl.split(x)
    return one + other


@triton.jit
def _of_both(one, other):
    """Maximum and sum, `[..., 2]`, of two sets of tokens."""
    m, mass = tl.split(one)
    m2, mass2 = tl.split(other)
    top = tl.maximum(m, m2)
    base = tl.where(top == -INFINITY, 0.0, top)
    return tl.join(top, mass * tl.exp2(m - base) + mass2 * tl.exp2(m2 - base))


@triton.jit
def _of_pairs(both):
    """Maxima and sums `[ROWS, 2, W]` of every two neighbouring warps."""
    one, other = tl.split(tl.reshape(both, [both.shape[0], 2, both.shape[2] // 2, 2]))
    return tl.permute(_of_both(tl.permute(one, [0, 2, 1]), tl.permute(other, [0, 2, 1])), [0, 2, 1])


@triton.jit
def finish(
    m, total, acc, sums, low, step, place, out, lse, row, valid, DP: tl.constexpr, NR: tl.constexpr
):  # fmt: skip
    """Merge the warps' results, and store the mean value and the logarithm (base 2) of the sum.

    Args:
        m: As in `softmax_step`.
        total: Likewise.
        acc: Likewise.
        sums: What is to be subtracted from every channel of `low * acc`, `[W, ROWS]`.
        low: See `codes.lowered`, `[DP]`.
        step: What the values are to be multiplied by.
        place: Where each channel is to lie, `[DP]`.
        out: Where this share is to lie, `[NR, DP]`.
        lse: Likewise, `[NR]`.
        row: Number of every query, `[ROWS]`.
        valid: Which of them there are.
        DP: Size of a value, padded.
        NR: Rows of `out`.
    """
    W: tl.constexpr = acc.shape[0]
    ROWS: tl.constexpr = acc.shape[2]
    both = tl.permute(tl.join(m, tl.sum(total, 1)), [1, 2, 0])  # so warps meet once, where reductions take four times
    if W == 8:
        both = _of_pairs(both)
    if W >= 4:
        both = _of_pairs(both)
    if W > 1:
        one, other = tl.split(both)
        both = _of_both(one, other)
    else:
        both = tl.reshape(both, [ROWS, 2])
    top, mass = tl.split(both)
    top = tl.where(top == -INFINITY, 0.0, top)
    seen = mass > 0
    share = tl.exp2(m - top[None, :]) * (step / tl.where(seen, mass, 1.0))[None, :]
    x = tl.permute((acc * low[None, :, None] - sums[:, None, :]) * share[:, None, :], [1, 2, 0])
    if W == 8:
        x = _halved(tl.reshape(x, [DP, ROWS, 4, 2]))
    if W >= 4:  # not by a reduction: that would take shuffles
        x = _halved(tl.reshape(x, [DP, ROWS, 2, 2]))
    if W > 1:
        x = _halved(x)
    else:
        x = tl.reshape(x, [DP, ROWS])
    tl.store(out + place[:, None] + row[None, :] * DP, x, mask=valid[None, :] & (place >= 0)[:, None])
    tl.store(lse + row, tl.where(seen, top + tl.log2(tl.where(seen, mass, 1.0)), -INFINITY), mask=valid)
