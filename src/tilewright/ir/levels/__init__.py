"""Levels: how one coordinate of a tensor is stored below the positions of the level above.

A format is a list of levels; positions fold through them, from a single root position 0 to one
position for each stored value. A level declares its properties and its arrays, answers four
questions with IR expressions (`loop`, `coord`, `pos`, `locate`) and builds its arrays from sorted
entries. Everything else is derived from these: pack, unpack, loops, addresses, searches.

|            | loop over v          | coord            | pos                       | locate c      |
|------------|----------------------|------------------|---------------------------|---------------|
| Dense      | 0 : n                | v                | q*n + v                   | q*n + c       |
| Ragged     | 0 : len(q)           | v                | ptr[q] + v                | ptr[q] + c    |
| Compressed | ptr[q] : ptr[q+1]    | idx[v]           | v                         | binary search |
| Fixed(w)   | 0 : w                | idx[q*w+v], -1=∅ | q*w + v                   | scan          |
| Singleton  | one                  | idx[q]           | q                         | compare       |
| Diagonals  | 0 : w                | c' + offsets[v]  | q*w + v                   | scan          |
| Band       | c'+low : c'+high+1   | v                | q*w + v - c' - low        | compare       |
| Bitmap     | 0 : n, where bits[v] | v                | q*n + v, or bits before v | test          |
| NofM(n, m) | 0 : n                | metadata[q*n+v]  | q*n + v                   | scan          |
| Paged(p)   | 0 : len(q)           | v                | pages[ptr[q]+v//p]*p+v%p  | that of c     |

c' is a coordinate of a level above. A new level is a class in a new file, here or in a user's
package, and a change nowhere else. Reference: the level functions of taco (Chou et al., OOPSLA
2018, §3) and SparseTIR (ASPLOS 2023, §3.1).
"""

from tilewright.ir.levels.level import Level, Parents, Storage, integer
from tilewright.ir.levels.lists import *
from tilewright.ir.levels.stored import coordinates, may_miss, or_fill, row_major
from tilewright.ir.levels.structured import Band, Bitmap, Diagonals, NofM, Paged

__all__ = [
    "Band", "Bitmap", "Compressed", "Dense", "Diagonals", "Fixed", "Level", "NofM", "Paged",
    "Parents", "Ragged", "Singleton", "Storage", "coordinates", "integer", "is_list_of_pairs",
    "lists_rows", "locate_pair", "may_miss", "or_fill", "row_major",
]  # fmt: skip
