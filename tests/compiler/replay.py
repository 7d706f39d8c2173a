"""The history of a schedule, applied to another one."""

from dataclasses import replace

from tilewright.schedule import Schedule, Step


def replay(schedule: Schedule, steps: tuple[Step, ...]) -> Schedule:
    """Apply recorded steps to another schedule with the same loops."""
    for step in steps:
        schedule = replace(schedule, selected=step.nests)
        schedule = getattr(schedule, step.verb)(*step.args, **dict(step.options))
    return schedule
