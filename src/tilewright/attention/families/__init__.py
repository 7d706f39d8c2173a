"""Families of attention kernels: which can run a call, and the reasons of the others.

A family is one hand-written template with what varies rendered in front of it. `choose` takes the
first of a device's families that has no reason against a call.
"""

from __future__ import annotations

from collections.abc import Iterator

from tilewright.attention.families import cpu, decode, hopper, portable
from tilewright.attention.families.family import Call, Family, Prepared
from tilewright.attention.pool import Pool
from tilewright.attention.spec import Spec
from tilewright.errors import ArgumentError

FAMILIES: tuple[Family, ...] = (decode.FAMILY, hopper.FAMILY, portable.FAMILY, cpu.FAMILY)
"""In the order of preference."""

__all__ = ["FAMILIES", "Call", "Family", "Prepared", "by_name", "choose", "reasons"]


def by_name(name: str) -> Family:
    """The family of a plan. Raises ArgumentError[A109]."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise ArgumentError("A109", f"the plan is damaged: no family {name!r}", where="plan")


def reasons(spec: Spec, rows: int, device: str, pool: Pool | None) -> Iterator[tuple[Family, str]]:
    """Each family of a device with the reason why it cannot run a call, "" where it can.

    `rows`: the most packed rows (queries × group) of a request; without a pool its strides are
    taken to be aligned."""
    kind = device.partition(":")[0]
    for family in FAMILIES:
        if family.device == kind:
            yield family, family.reason(spec, rows, pool)


def choose(spec: Spec, rows: int, device: str, pool: Pool | None) -> Family:
    """The family that runs a call. Raises ArgumentError[A103] where none does."""
    against = []
    for family, reason in reasons(spec, rows, device, pool):
        if not reason:
            return family
        against.append(f"{family.name}: {reason}")
    text = f"no kernels run this ({'; '.join(against)})"
    hint = "without shared keys each family runs more: a table of whole requests"
    raise ArgumentError("A103", text, where="kv", hint=hint)
