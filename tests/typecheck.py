"""The type checker that tests put into the package."""

from typing import Any

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int will do for a float, as PEP 484 has it


def checked(item: Any) -> Any:
    """`item`, checked when it is called; functions within functions are left alone, what counts is signatures that others call."""
    return item if "<locals>" in item.__qualname__ else _check(item)
