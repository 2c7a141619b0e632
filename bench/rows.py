"""Rows of the table of budgets: figure, limit, ratio, goal, whose CPU; as text and as data."""

import os
import platform
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

GROUPS = ("app", "daemon", "storage", "meta")  # mgmtd only has heartbeats: it is in the data

MEASURED, PEER = "measured", "peer"  # where a limit is from: this run; published elsewhere, fixed


class Row(NamedTuple):
    """One line of the table. Without a limit the figure itself is held against the goal."""

    name: str
    figure: float
    unit: str
    goal: float
    limit: float | None = None
    source: str = MEASURED
    said: str = ""  # what the limit is
    cpu: Mapping[str, float] = MappingProxyType({})  # by group of processes
    cpu_per: str = ""  # "GB" or "1000"
    at_most: bool = False  # the goal is an upper bound

    @property
    def ratio(self) -> float | None:
        """Figure to limit."""
        return None if self.limit is None else self.figure / self.limit

    @property
    def verdict(self) -> str:
        """Met or missed; unknown if what it is divided by could not be measured."""
        if self.at_most:
            return "met" if self.figure <= self.goal else "missed"
        if self.ratio is None:
            return "unknown"
        return "met" if self.ratio >= self.goal else "missed"

    def data(self) -> dict[str, Any]:
        """For JSON."""
        more = {"ratio": self.ratio, "verdict": self.verdict}
        return self._asdict() | {"cpu": dict(self.cpu)} | more


def cpu_of(spent: dict[str, float], units: float) -> dict[str, float]:
    """CPU seconds per unit of work, by group."""
    return {group: used / max(units, 1e-12) for group, used in spent.items()}


HEADINGS = ("what", "figure", "limit", "ratio", "goal", "", *GROUPS, "limit is")


def table(rows: list[Row]) -> str:
    """All rows aligned, under their headings. CPU is in seconds per GB or per 1000 operations."""
    lines = [HEADINGS, *map(_cells, rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(HEADINGS))]
    left = {0, HEADINGS.index(""), len(HEADINGS) - 1}
    said = []
    for line in lines:
        cells = [
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        said.append("  ".join(cells).rstrip())
    met = sum(row.verdict == "met" for row in rows)
    said.append(f"{met} of {len(rows)} goals met. CPU: seconds per GB (10^9 bytes) where the ")
    said[-1] += "figure is MB/s, else seconds per 1000 operations."
    said.append("Peers' figures are fixed numbers from another run on a comparable machine.")
    return "\n".join(said)


def _cells(row: Row) -> tuple[str, ...]:
    bound = "<= " if row.at_most else ">= "
    peer = "peer: " if row.source == PEER and row.limit is not None else ""
    return (
        row.name,
        f"{number(row.figure)} {row.unit}",
        "-" if row.limit is None else number(row.limit),
        "-" if row.ratio is None else f"{row.ratio:.2f}",
        f"{bound}{row.goal:g}",
        row.verdict,
        *(f"{row.cpu[group]:.3f}" if group in row.cpu else "-" for group in GROUPS),
        peer + row.said,
    )


def number(value: float) -> str:
    """Three digits that mean something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def machine() -> dict[str, Any]:
    """Where it was measured."""
    return {
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def plain(rows: list[list[str]]) -> str:
    """Cells in columns, the first to the left."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    pads: list[Callable[[str, int], str]] = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    return "\n".join(
        "  ".join(pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True))
        for row in rows
    )
