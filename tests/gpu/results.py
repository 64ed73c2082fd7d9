"""Results of a run on a GPU, written as JSON and as a Markdown page of tables."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class GpuResults:
    """Rows by table; `machine` is the fingerprint of the machine."""

    machine: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)

    def add(self, table: str, **row: Any) -> None:
        self.tables.setdefault(table, []).append(row)

    def write(self, folder: Path) -> list[Path]:
        """Write both files, named after the GPU."""
        folder.mkdir(parents=True, exist_ok=True)
        gpus = self.machine.get("gpu") or [{"name": "unknown-gpu"}]
        stem = re.sub(r"[^a-z0-9]+", "-", str(gpus[0]["name"]).lower()).strip("-")
        content = {"machine": self.machine, "outcomes": self.outcomes, "tables": self.tables}
        files = [folder / f"{stem}.json", folder / f"{stem}.md"]
        files[0].write_text(json.dumps(content, indent=1, default=str) + "\n")
        files[1].write_text(self.page())
        return files

    def page(self) -> str:
        """Return a Markdown page of all tables, and of the tests that did not pass."""
        gpus = self.machine.get("gpu") or [{"name": "unknown GPU"}]
        lines = [
            f"# {gpus[0]['name']}",
            "",
            "Written by `make test-gpu`; the JSON file beside it has every number.",
            "",
        ]
        for name, rows in self.tables.items():
            lines += [f"## {name}", "", *_table(rows), ""]
        counts = {kind: sum(o.split(":")[0] == kind for o in self.outcomes.values()) for kind in ("passed", "failed")}
        lines += ["## Tests", "", f"{counts['passed']} passed, {counts['failed']} failed.", ""]
        lines += [f"- `{test}`: {what}" for test, what in self.outcomes.items() if what != "passed"]
        return "\n".join(lines).rstrip() + "\n"


def _table(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]


def _cell(value: Any) -> str:
    if value is None:
        return "not measured"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
