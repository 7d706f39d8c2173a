"""Formats of structured matrices: bands, diagonals, bitmaps, N:M sparsity, pages of a pool.

    band(-1, 1)      dense(d0) band(d1 - d0 in -1..1)
    dia(-8, 0, 8)    dense(d0) diagonals(d1 - d0 in -8, 0, 8)
    bitmap()         dense(d0) bitmap(d1)
    n_m(2, 4)        dense(d0) dense(d1/4) nofm(d1%4, 2)
    paged(16)        dense(d0) paged(d1, page=16)

Bands, diagonals, N:M and pages store explicit zeros beside the entries: see `formats.ragged`.
"""

from tilewright.ir.levels import Band, Bitmap, Dense, Diagonals, NofM, Paged, integer
from tilewright.sparse.formats import Format


def band(low: int, high: int) -> Format:
    """The diagonals low … high of a matrix: row i holds the columns i + low … i + high, all of
    them, whether they have entries or not. Raises FormatError[F101]."""
    return Format(f"band({low}, {high})", (Dense(0), Band(1, low=low, high=high)))


def dia(*offsets: int) -> Format:
    """Some diagonals of a matrix: row i holds the columns i + offset, as `scipy.sparse.dia_array`
    with these `offsets` does. Raises FormatError[F101]."""
    level = Diagonals(1, offsets=offsets)
    return Format(f"dia({', '.join(map(str, level.offsets))})", (Dense(0), level))


def bitmap(*, counted: bool = False) -> Format:
    """A bit for each element says whether it is stored. Every element has a value; with `counted`
    only stored ones do, without gaps. Raises FormatError[F101]."""
    levels = Dense(0), Bitmap(1, counted=counted)
    return Format("bitmap(counted)" if counted else "bitmap", levels)


def n_m(n: int, m: int) -> Format:
    """At most n entries in each m columns of a row that begin at a multiple of m, with packed
    indices: 2 bits each for n_m(2, 4). Raises FormatError[F101]."""
    m = integer(f"n_m({n!r}, {m!r})", "m", m, 1)
    levels = (Dense(0), Dense(1, block=m), NofM(1, block=m, inner=True, width=n))
    return Format(f"n_m({n}, {m})", levels)


def paged(page: int, ndim: int = 2, *, shared: bool = False) -> Format:
    """Rows in pages of `page` elements, which a page table names; of further dimensions each
    element of a page is a dense array. `shared`: rows may have pages in common, which no output
    can be stored in; `attention.Table.format` makes such tensors of a page table and a pool.
    Raises FormatError[F101]."""
    ndim = integer(f"paged({page!r}, {ndim!r})", "ndim", ndim, 2)
    level = Paged(1, page=page, shared=shared)
    inner = (Dense(dim) for dim in range(2, ndim))
    text = f"{page}{f', {ndim}' if ndim > 2 else ''}{', shared' if shared else ''}"
    return Format(f"paged({text})", (Dense(0), level, *inner))
