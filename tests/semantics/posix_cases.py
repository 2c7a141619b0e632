"""What POSIX promises of a directory tree, as plain functions: case_xxx(root) on any directory.

test_local.py runs them on a local file system, the oracle that the cases themselves are right; the
same functions run on a mount. A case that needs root has the attribute `needs_root`.
"""

from semantics import posix_attributes, posix_contents, posix_listings, posix_names
from semantics.posix_tools import Case

_THEMES = (posix_contents, posix_names, posix_listings, posix_attributes)


def cases() -> list[Case]:
    """All cases, by theme, in the order of their files."""
    return [
        value
        for theme in _THEMES
        for name, value in vars(theme).items()
        if name.startswith("case_")
    ]
