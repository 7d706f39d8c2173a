"""The planner's library is cached: it is built before a test changes what it is made of."""

import pytest

from tilewright.attention import planner


@pytest.fixture(autouse=True, scope="session")
def library_of_the_planner() -> None:
    planner.native()
