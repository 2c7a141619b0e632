"""What POSIX promises of a directory tree, as plain functions: case_xxx(root) on any directory.

test_local.py runs them on a local file system, the oracle that the cases themselves are right; the
same functions run on a mount. A case that needs root has the attribute `needs_root`.
"""

from collections.abc import Iterable
from types import ModuleType

from semantics import (
    posix_acls,
    posix_attributes,
    posix_contents,
    posix_flags,
    posix_links,
    posix_listings,
    posix_names,
    posix_opening,
    posix_permissions,
    posix_rename,
    posix_times,
    posix_xattrs,
)
from semantics.posix_tools import Case

_THEMES = (posix_contents, posix_names, posix_listings, posix_attributes)
# What only the rules of meta answer right; the mount over dicts has simpler ones.
_RULES = (
    posix_permissions,
    posix_times,
    posix_rename,
    posix_links,
    posix_xattrs,
    posix_opening,
    posix_acls,
    posix_flags,
)


def cases() -> list[Case]:
    """All cases, by theme, in the order of their files."""
    return simple_cases() + _cases_of(_RULES)


def simple_cases() -> list[Case]:
    """The cases that need no more than the kernel's own checks."""
    return _cases_of(_THEMES)


def _cases_of(themes: Iterable[ModuleType]) -> list[Case]:
    return [
        value for theme in themes for name, value in vars(theme).items() if name.startswith("case_")
    ]
