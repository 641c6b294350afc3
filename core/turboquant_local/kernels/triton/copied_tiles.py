"""Tiles of packed codes that the copy engine brings into shared memory (tensor descriptors): device functions.

Tokens are neighbours in memory, so a tile comes as rows of 128 bytes whatever a token's size is; the engine exchanges
their 16-byte pieces so that no two rows of 8 have a piece in the same banks.
"""

import triton
import triton.language as tl

from turboquant_local.kernels.triton.codes import joined8, slots


@triton.jit
def load_copied(tiles, batch, head, start, D: tl.constexpr, BITS: tl.constexpr):
    """The tile from token `start` on, as rows of 64 elements of 16 bits; of 3 bits as thirds of every 8 tokens."""
    batch, head = batch.to(tl.int32), head.to(tl.int32)
    if BITS == 3:
        group = start // 8
        rows = (
            tiles.load([batch, head, group, 0]), tiles.load([batch, head, group, 64]),
            tiles.load([batch, head, group, 128]),
        )  # fmt: skip
    else:
        rows = tiles.load([batch, head, start // (1024 // (D * BITS)), 0])
    return rows


@triton.jit
def copied_elements(rows, D: tl.constexpr, BITS: tl.constexpr, W: tl.constexpr, R: tl.constexpr):
    """Elements of a copied tile, `[4, 8, W, R, elements]` by t, g, w and r (see `token_order`), of up to three planes.

    For 3 bits the second dimension counts by g with its bits in reverse.
    """
    if BITS == 3:
        x, y, z = _planes(rows, W)
    else:
        x = tl.permute(tl.reshape(rows, [R, W, 8, 4, D // slots(BITS, D)]), [3, 2, 1, 0, 4])
        y = x
        z = x
    return x, y, z


@triton.jit
def _planes(thirds, W: tl.constexpr):
    """The planes of three-bit codes, `[4, 8, W, 2, 8]`, of a tile that came in thirds of 8 tokens, 128 bytes each.

    Of 8 tokens, 16 bytes each of three planes, the third n // 8 holds piece n, which is plane n % 3 of token n // 3.
    """
    a, b, c = thirds
    n0, n1, n2, n3, n4, n5, n6, n7 = _eighths(a, W)
    n8, n9, n10, n11, n12, n13, n14, n15 = _eighths(b, W)
    n16, n17, n18, n19, n20, n21, n22, n23 = _eighths(c, W)
    x = _plane(n0, n3, n6, n9, n12, n15, n18, n21)
    y = _plane(n1, n4, n7, n10, n13, n16, n19, n22)
    z = _plane(n2, n5, n8, n11, n14, n17, n20, n23)
    return x, y, z


@triton.jit
def _eighths(x, W: tl.constexpr):
    x = tl.permute(tl.reshape(x, [W, 8, 2, 2, 2, 8]), [0, 1, 5, 2, 3, 4])
    even, odd = tl.split(x)
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _plane(x0, x1, x2, x3, x4, x5, x6, x7):
    W: tl.constexpr = x0.shape[0]
    x = tl.reshape(joined8(x0, x1, x2, x3, x4, x5, x6, x7), [W, 2, 2, 2, 8, 2, 4])
    return tl.reshape(tl.permute(x, [6, 3, 2, 1, 0, 5, 4]), [4, 8, W, 2, 8])
