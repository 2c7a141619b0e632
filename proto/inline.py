"""Versions of the content of inline files: which life of a metadata server has given them."""

_LIFE_SHIFT = 40  # 2^40 versions in a life: six years of 5000 each second


def first_version_of(life: int) -> int:
    """Return the lowest version of a life of the server."""
    return life << _LIFE_SHIFT


def of_one_life(one: int, other: int) -> bool:
    """Tell whether no power cut lies between two versions: the lower one is part of the higher."""
    return one >> _LIFE_SHIFT == other >> _LIFE_SHIFT
