"""Families of attention kernels: which can run a call, and the reasons of the others.

A family is one hand-written template with what varies rendered in front of it. `choose` takes the
first of a device's families that has no reason against a call.
"""

from tilewright.attention.families import cpu, decode, hopper, portable
from tilewright.attention.families.family import Call, Family, Prepared, Scratch
from tilewright.attention.pool import Pool
from tilewright.attention.spec import Spec
from tilewright.errors import ArgumentError

FAMILIES = (decode.FAMILY, hopper.FAMILY, portable.TILES, portable.FAMILY, cpu.FAMILY)
"""In the order of preference."""

__all__ = ["FAMILIES", "Call", "Family", "Prepared", "Scratch", "by_name", "choose", "reasons"]


def by_name(name: str) -> Family:
    """The family of a plan. Raises ArgumentError[A109]."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise ArgumentError("A109", f"the plan is damaged: no family {name!r}", where="plan")


def reasons(
    spec: Spec, rows: int, device: str, pool: Pool | None, arch: str = "", invariant: bool = False
) -> tuple[tuple[str, str], ...]:
    """The families of a device by name, each with the reason why it cannot run a call, "" where it
    can.

    `rows`: the most packed rows (queries × group) of a request; without a pool its strides are
    taken to be aligned. `arch`: of a GPU ("": that of the pool). `invariant`: as of `plan`."""
    own = (family for family in FAMILIES if family.device == device.partition(":")[0])
    return tuple((f.name, f.reason(spec, rows, pool, arch, invariant)) for f in own)


def choose(
    spec: Spec, rows: int, device: str, pool: Pool | None, invariant: bool = False
) -> tuple[Family, tuple[tuple[str, str], ...]]:
    """The family that runs a call, and `reasons`. Raises ArgumentError[A103] where none does."""
    against = reasons(spec, rows, device, pool, invariant=invariant)
    if chosen := next((name for name, reason in against if not reason), ""):
        return by_name(chosen), against
    text = f"no kernels run this ({'; '.join(map(': '.join, against))})"
    hint = "without shared keys each family runs more: a table of whole requests"
    raise ArgumentError("A103", text, where="kv", hint=hint)
