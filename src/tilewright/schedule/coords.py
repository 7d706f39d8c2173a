"""Verbs on coordinates: pure functions Program → Program, before positions exist. Each is the
rewrite behind the method of `Schedule` of its name, which says what it does.
"""

from dataclasses import replace

from tilewright.errors import illegal
from tilewright.ir.levels import Compressed, Dense
from tilewright.ir.nodes import Assign, Program
from tilewright.ir.rewrite import indices_of
from tilewright.schedule.tree import unknown


def order_axes(program: Program, output: str, *axes: str) -> Program:
    has = {x.name for x in indices_of(_statement(program, output))}
    wrong = [a for a in axes if a not in has]
    if len(set(axes)) < len(axes):
        raise illegal(f"order_axes{axes!r}", "each axis once")
    if wrong:
        raise unknown(f"{output} has no axis {', '.join(wrong)}", f"axes: {', '.join(sorted(has))}")
    return replace(program, orders=(*program.orders, (output, *axes)))


def compute_at(program: Program, temporary: str, loop: str, scope: str, most: int) -> Program:
    """The lowering checks what it takes."""
    known = [t.name for t in program.tensors if t.role == "temp"]
    if temporary not in known:
        raise unknown(f"no temporary {temporary!r}", f"temporaries: {', '.join(known) or 'none'}")
    if most and scope != "row":
        raise illegal(f"most is {most}, and scope {scope!r}", 'scope="row" has a most')
    rest = (p for p in program.placed if p[0] != temporary)
    return replace(program, placed=(*rest, (temporary, loop, scope, most)))


def merge_sums(program: Program, output: str) -> Program:
    _statement(program, output)
    return replace(program, merged=(*program.merged, output))


def _statement(program: Program, output: str) -> Assign:
    statement = next((s for s in program.body if s.out.tensor.name == output), None)
    if statement is None:
        known = ", ".join(s.out.tensor.name for s in program.body)
        raise unknown(f"no statement computes {output!r}", f"outputs: {known}")
    return statement


def fuse_axes(program: Program, structure: str) -> Program:
    tensor = next((t for t in program.tensors if t.name == structure and t.is_sparse), None)
    if tensor is None:
        known = ", ".join(t.name for t in program.tensors if t.is_sparse)
        raise unknown(f"no sparse tensor {structure!r}", f"there are: {known}")
    for fmt in tensor.format.formats:
        rows, *cols = fmt.levels
        is_list = len(cols) == 1 and isinstance(cols[0], Compressed)
        if not (is_list and isinstance(rows, (Dense, Compressed))) or rows.block:
            raise illegal(f"{fmt} is no list of rows of entries", "csr and dcsr have axes to fuse")
    return replace(program, fused=(*program.fused, structure))


def specialize(program: Program, dim: str, size: int) -> Program:
    known = sorted({str(d) for t in program.tensors for d in t.dims})
    if dim not in known:
        raise unknown(f"no dimension {dim!r}", f"dimensions: {', '.join(known)}")
    most = (1 << (8 * program.index.itemsize - 1)) - 1
    if size > most:
        why = f"specialize({dim!r}, {size}): coordinates are {program.index}"
        raise illegal(why, f"at most {most}, or typed(index='int64')", where="size")
    known_size = dict(program.sizes).get(dim, size)
    if known_size != size:
        raise illegal(f"{dim} is {known_size} already", "one size a dimension")
    return replace(program, sizes=(*program.sizes, (dim, size)))
