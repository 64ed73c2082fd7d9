"""Record of how a data set was read: the formats of its tables."""

from __future__ import annotations

from dataclasses import dataclass, field

from cclip_deploy.datasets.tables import TableFormat


@dataclass
class ReadLog:
    """Filled while a data set is read.

    Attributes:
        tables: how each table was read.
    """

    tables: list[TableFormat] = field(default_factory=list)
