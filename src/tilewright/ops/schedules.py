"""Schedules that several operators share: rows in parallel, elements in vectors or threads."""

from tilewright.build import named_recipe
from tilewright.schedule import Schedule
from tilewright.toolchain import compilers

THREADS_X, THREADS_Y = 32, 8  # of a CTA that works on one row
CTA, WARP = 256, 32  # threads
LINE = 128  # bytes of a row that adjacent threads load at once


@named_recipe
def rows(s: Schedule, row: str, elements: tuple[str, ...], threads_y: int = THREADS_Y) -> Schedule:
    """Rows in parallel; loops over elements (also sums) in vectors, or threads on a GPU."""
    if s.target.is_cuda:
        s = s.bind(row, "cta.x")
        for e in elements:
            s = s.split(e, THREADS_X * threads_y, into=(f"{e}_o", f"{e}_r"))
            s = s.split(f"{e}_r", THREADS_X, into=(f"{e}_y", f"{e}_x"))
            s = s.bind(f"{e}_y", "thread.y").bind(f"{e}_x", "thread.x")
        return s
    s = s.parallel(row)
    for e in elements:
        s = vectors(s, e)
    return s


def vectors(s: Schedule, loop: str, name: str = "") -> Schedule:
    """Vectorizes a loop, its remainder in scalars. `name` begins the new names (default: loop)."""
    name = name or loop
    s = s.split(loop, compilers.cpu_lanes(), tail="cut", into=(f"{name}_o", f"{name}_v"))
    return s.vectorize(f"{name}_v")


def dot_products(s: Schedule, each: str, k: str, d: int, size: int, loads: int = 4) -> Schedule:
    """On a GPU: CTAs and threads in y take products of rows, those of the loop `each`; threads in x
    vectors of the loop `k`, of `d` elements of `size` bytes; sums by shuffles. `loads` of a row are
    under way in a thread."""
    lanes = next(v for v in (16 // size, 4, 2, 1) if d % v == 0)
    across = min(WARP, LINE // (lanes * size), 1 << (d // lanes - 1).bit_length())
    rows, steps = CTA // across, -(-d // (lanes * across))
    s = s.split(each, rows * max(1, loads // steps), into=("e_cta", "e_r"))
    s = s.split("e_r", rows, into=("e_u", "e_y")).bind("e_cta", "cta.x").bind("e_y", "thread.y")
    s = s.split(k, lanes, into=("k_c", "k_v")).split("k_c", across, into=("k_o", "k_x"))
    s = s.bind("k_x", "thread.x").vectorize("k_v")
    return s.unroll("e_u").unroll("k_o", 0 if steps <= loads else loads)


def register_tiles(
    s: Schedule, loop: str, inside: str, width: int, tiles: tuple[int, ...]
) -> Schedule:
    """A loop in tiles that fit in registers, each around the loop `inside`, from the widest to the
    narrowest. `width`: its extent, 0 where that is known at run time only."""
    rest, lanes = loop, compilers.cpu_lanes()
    for size in tiles:
        if size < lanes or (width and width < size):
            continue
        tile, u, v = f"{loop}{size}", f"{loop}{size}_u", f"{loop}{size}_v"
        is_exact = bool(width) and width % size == 0
        s = s.split(rest, size, tail="exact" if is_exact else "cut", into=(tile, f"{tile}_i"))
        s = s.split(f"{tile}_i", lanes, into=(u, v))
        s = s.reorder(inside, u, v).unroll(u).vectorize(v)
        if is_exact:
            break
        rest = f"{rest}_t"
    return s


def fixed_width(width: int, device: str) -> int:
    """The width that is a constant of the kernel; 0 if it takes any width."""
    if device != "cpu":
        return width
    return width if width % 16 == 0 and 0 < width <= 1024 else 0
