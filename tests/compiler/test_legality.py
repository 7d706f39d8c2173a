"""The table of legal programs and formats is the committed one, and most of it is legal."""

from __future__ import annotations

from tests.compiler.cases import FORMATS, STRUCTURED
from tests.compiler.legality import FILE, PROGRAMS, accepted, table


def test_programs_and_formats_have_their_outcomes(golden):
    golden(FILE, table())


def test_most_programs_take_most_formats():
    """What the tests of passes and kernels run is these cells."""
    assert len(PROGRAMS) * len(FORMATS) - len(accepted(PROGRAMS)) < 25  # docs/design/compiler.md
    assert len(accepted(PROGRAMS, formats=STRUCTURED)) == len(PROGRAMS) * len(STRUCTURED)
    for program in PROGRAMS:
        assert "csr" in {f for _, f in accepted([program])}, program.name
