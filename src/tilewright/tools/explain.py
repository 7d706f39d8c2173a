"""`tilewright explain CODE`: the meaning of an error code, its usual cause and its remedy."""

from __future__ import annotations

import argparse
import difflib
import sys

from tilewright.errors import CATALOG

FAMILIES = {
    "F": "FormatError: formats and packing",
    "P": "ProgramError: programs",
    "S": "ScheduleError: schedules",
    "A": "ArgumentError: arguments of a call",
    "B": "BuildError: building and running",
    "K": "KnobError: environment variables",
    "E": "MissingExtra: optional packages",
    "M": "ModelError: models and serving",
    "I": "InternalError: a bug of Tilewright",
}

_TEXT = """\
F101 Levels of a format must store each dimension once, whole or as quotient and remainder, and
     start with a dense or compressed level. The ready ones: tw.csr(), tw.coo(), tw.hyb(),
     tw.bsr(16).
F102 pack takes a SciPy sparse matrix, a dense array, (indptr, indices, values, shape), or
     (coords, values, shape): tw.csr().pack((indptr, indices, values, (rows, cols)))
F103 indptr has one element more than there are rows, starts at 0, never falls, and ends at
     len(indices). It often comes from another matrix, or was cut by slicing.
F104 A row or column lies outside the shape. Look for swapped rows and columns, 1-based input,
     or a shape that was guessed from the largest index.
F105 Each entry may be stored once. SciPy: matrix.sum_duplicates(); torch: .coalesce().
F106 The parts of a composed format must share out the entries: none twice, none left over.
     Print the format; each part says which rows and columns it takes.
F107 with_values takes nnz numbers in the order of the entries that were packed.
F108 ell(w) and bucket(w) hold rows of at most w entries. Take hyb, or a larger width.
P101 The decorated function must return one assignment (or tw.update) made of its parameters.
P102 One index runs over one dimension: a name that is used for two of different extent needs
     two indices: i, j = tw.indices("m n")
P103 A[i, j] needs as many coordinates as the tensor was declared with.
P104 Every index is either one of the output's or one that a reduction runs `over`.
P106 Cast one side, or declare the parameters with .typed(A=..., X=...).
P107 decompose takes names of sparse parameters and formats of as many dimensions. A program
     that is not a sum needs parts without shared rows.
S101 The hint lists the loops that are there; print the schedule to see them in place.
S102 The verb would change the result here, for example a reorder across a reduction.
S103 A CTA has at most 1024 threads, and 99 (sm_86) to 227 KB (sm_90a) of shared memory: split
     by less, or cache less.
A101 Arguments are given by position or by the names in the signature, each once.
A102 A kernel is built for fixed dtypes. Convert, or build another: spmm.typed(X="float16")
A103 Dimensions of one name have one size in all arguments. The message says which differ.
A104 The last dimension must be contiguous: np.ascontiguousarray(x), x.contiguous()
A105 All arguments live on one device. Packed tensors move with .to("cuda").
A106 Build the kernel with .decompose(A=format) and pack with the same format.
A107 Arrays are NumPy, torch, CuPy, or anything with DLPack; numbers are Python numbers.
A108 The output must not share memory with an input.
A109 A value inside the array, or an option, is outside the range that it has to be in.
B101 The compiler's message and the place of the source are above. Please report it.
B102 `tilewright env` says what was looked for. C++: install g++ or clang++. CUDA: a driver, and
     pip install 'tilewright[cuda]'.
B103 Targets: cpp, cpp:avx2, cuda, cuda:sm_90a, interp.
B104 The driver refused a launch, or an earlier kernel failed; TILEWRIGHT_DEBUG=1 says more.
B105 The cache folder must belong to you alone and allow loading libraries. Set
     TILEWRIGHT_CACHE_DIR to another folder.
K101 Unset the variable or give it a value of the form in the message.
E101 pip install 'tilewright[NAME]' with the extra that the message names.
M101 The file was cut short while downloading, or is not GGUF. Compare its size and hash.
M102 This architecture is not one that Tilewright has layers for.
M103 The file does not hold what its architecture needs; it may be a part of a split model.
M104 Requantize the model to a type in the message.
M105 Shorten the prompt, or give the model a longer context.
M106 The message names the field of the request and what it may be.
M107 The file lacks a tokenizer or a template that can be used; give one.
I101 Nothing you did: please report it with the program and the schedule.
"""

EXPLAIN: dict[str, str] = {}
for _line in _TEXT.splitlines():  # a code begins an entry, indented lines continue it
    _code = _line[:4].strip() or next(reversed(EXPLAIN))
    EXPLAIN[_code] = f"{EXPLAIN[_code]}\n{_line[5:]}" if _code in EXPLAIN else _line[5:]


def explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("code", nargs="?", help="such as F104; without one, all codes are listed")


def explain(args: argparse.Namespace) -> int:
    """Print one code, or all of them; 2 for a code that does not exist."""
    if args.code is None:
        for code, meaning in CATALOG.items():
            print(f"{code}  {meaning}")
        return 0
    code = args.code.upper().strip("[]")
    if code not in CATALOG:
        near = difflib.get_close_matches(code, CATALOG, n=3)
        suggestion = f"; near: {', '.join(near)}" if near else ""
        print(f"no error code {args.code}{suggestion}", file=sys.stderr)
        return 2
    print(f"{code}: {CATALOG[code]}")
    print(f"  {FAMILIES[code[0]]}")
    if code in EXPLAIN:
        print("\n" + EXPLAIN[code])
    return 0
