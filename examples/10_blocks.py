"""Lesson 10: sparse products on matrix tiles, for blocks and for short columns.

    python examples/10_blocks.py

Three formats, two programs, one schedule for each: a BSR matrix has dense blocks under its rows of
blocks, a DBSR matrix lists the rows of blocks that are not empty, an SR-BCRS matrix has columns of
8 or 16 elements in each stripe of rows. Tile operations want dense operands: `cache` gathers the
rows that a block or a group of columns meets into shared memory, zeros where there are none.
"""

import numpy as np

import tilewright as tw
from tilewright.ir.levels import Compressed, Fixed


@tw.program
def spmm(A=tw.sparse("m n"), X=tw.dense("n d")):
    i, j, k = tw.indices("i:m j:n k:d")
    return tw.out.typed("float32")[i, k](tw.sum(A[i, j] * X[j, k], over=j))


@tw.program
def sddmm(A=tw.sparse("m n"), X=tw.dense("m d"), Y=tw.dense("n d")):
    i, j, k = tw.indices("i:m j:n k:d")
    return tw.out.typed("float32").like(A)[i, j](A[i, j] * tw.sum(X[i, k] * Y[j, k], over=k))


def covering_dbsr(block):
    """DBSR, and the rows without a block: one launch, which stores each row of Y once."""
    parts = (tw.Where(1), tw.dbsr(block)), (tw.Where(0, 0), tw.bucket(0))
    return tw.Composed(f"dbsr({block}) and empty rows", parts, disjoint_rows=True, covers_rows=True)


def spmm_on_tiles(s, d, features=64, warps=4, group=32, stages=3):
    """A CTA has a row of blocks, and `features` for each of its warps. It copies a block, or
    `group` columns, and the rows of X that they meet, `stages` - 1 steps ahead."""
    s = s.specialize("d", d)
    for n, nest in enumerate(s.nests):
        block, s = s.format_of(n).blocks, s.on(n)
        if nest.name == "out.init" or block == (1, 1):  # zeros where rows have no block
            s = s.split("k", 4 if d % 4 == 0 else 1, into=("k_q", "k_v")).vectorize("k_v")
            s = s.split("k_q", 128, into=("k_o", "k_x")).bind("k_x", "thread.x")
            s = s.bind(s.rows, "cta.x")
        else:
            s = row_of_blocks(s, d, block, (features, warps, group, stages))
    return s.everywhere()


def row_of_blocks(s, d, block, sizes):
    features, warps, group, stages = sizes
    rows, columns = s.rows, s.stored("j")
    if block[1] == 1:
        s, columns = s.split(columns, group, into=("j_o", "j_i")), "j_o"
    s = s.split("j_i", 16, into=("j_u", "j_v"))
    s = s.split("k", features * warps, into=("k_o", "k_r"))
    s = s.split("k_r", features, into=("k_y", "k_w"))
    high, wide = min(block[0], 16), 16 if block[0] == 8 else 8  # of a tile of Y
    s = s.split("i_i", high, into=("i_u", "i_v")).split("k_w", wide, into=("k_u", "k_v"))
    s = s.reorder(rows, "k_o", columns, "k_y", "j_u", "i_u", "k_u", "i_v", "k_v", "j_v")
    s = s.unroll("i_u").unroll("k_u")
    if high == 8:  # few rows: they are the columns of the tile
        s = s.reorder("k_v", "i_v").mma("k_v", "i_v", "j_v")
    else:
        s = s.mma("i_v", "k_v", "j_v")
    s = s.bind(rows, "cta.x").bind("k_o", "cta.y").bind("k_y", "thread.y")
    s = s.cache("A", columns, "shared").cache("X", columns, "shared")
    return s.pipeline(columns, stages) if d % 8 == 0 else s


def in_pieces(fmt, most):
    """The format with rows of blocks cut into pieces of `most` blocks or columns, the last one
    padded: equal work for each CTA. SDDMM adds nothing up over pieces, so they may share rows."""
    high, wide = fmt.blocks
    pieces = Compressed(0, block=high, chunk=most)
    slots = Fixed(1, block=wide if wide > 1 else 0, width=most)
    return tw.Format(f"{fmt} in pieces of {most}", (pieces, slots, *fmt.levels[2:]))


def sddmm_on_tiles(s, d, group=32, warps=4, depth=64, stages=0):
    """A CTA has a row of blocks, or a piece of one, a warp a block, or `group` columns of a stripe,
    at a time. The warps share the rows of X, and copy `depth` features at once."""
    s = s.specialize("d", d)
    rows, columns, block = s.rows, s.stored("j"), s.format_of(0).blocks
    stages = stages or (3 if block[1] == 1 else 2)  # 4 CTAs on an SM
    if block[1] == 1:
        s, columns = s.split(columns, group, into=("j_o", "j_i")), "j_o"
    s = s.split(columns, warps, into=("j_s", "j_y"))
    high, wide = min(block[0], 16), 16 if block[0] == 8 else 8  # of a tile of the result
    s = s.split("i_i", high, into=("i_u", "i_v")).split("j_i", wide, into=("j_u", "j_v"))
    s = s.split("k", depth, into=("k_o", "k_r")).split("k_r", 16, into=("k_u", "k_v"))
    s = s.reorder(rows, "j_s", "k_o", "j_y", "k_u", "i_u", "j_u", "i_v", "j_v", "k_v")
    s = s.unroll("i_u").unroll("j_u")
    if high == 8:
        s = s.reorder("j_v", "i_v").mma("j_v", "i_v", "k_v")
    else:
        s = s.mma("i_v", "j_v", "k_v")
    s = s.bind(rows, "cta.x").bind("j_y", "thread.y")
    s = s.cache("X", "k_o", "shared").cache("Y", "k_o", "shared")
    return s.pipeline("k_o", stages) if d % 8 == 0 else s


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    m, n, d = 90, 130, 64
    stored = np.kron(rng.random((3, 5)) < 0.5, np.ones((32, 32)))[:m, :n]  # blocks of 32
    stored[32:64] = 0  # a row of blocks that is empty
    dense = np.where(stored, rng.standard_normal((m, n)), 0).astype(np.float16)
    X, Y, Z = (rng.standard_normal((x, d)).astype(np.float16) for x in (n, m, n))
    product, sampled = dense.astype(float) @ X, dense.astype(float) * (Y.astype(float) @ Z.T)
    for fmt in tw.bsr(32), tw.dbsr(32), covering_dbsr(32), tw.sr_bcrs(16), tw.sr_bcrs(8):
        A = fmt.pack(dense)
        halves = {"A": "float16", "X": "float16"}
        kernel = spmm.typed(**halves).decompose(A=fmt).schedule(lambda s: spmm_on_tiles(s, d))
        error = np.abs(kernel.build()(A, X) - product).max()
        typed = sddmm.typed(**halves, Y="float16").decompose(A=fmt)
        kernel = typed.schedule(lambda s: sddmm_on_tiles(s, d))
        other = np.abs(kernel.build()(A, Y, Z).dense() - sampled).max()
        padding = f"{100 * A.padding:.0f} % padding"
        print(f"{fmt!s:24} {padding}, farthest from NumPy: {max(error, other):.1e}")
