"""A table as CSV for programs, and as LaTeX and Markdown for readers."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "''", "[": "{[}", "*": "{*}",
    "ε": r"$\varepsilon$", "λ": r"$\lambda$", "α": r"$\alpha$", "↓": r"$\downarrow$", "→": r"$\to$",
    "−": "$-$", "≥": r"$\geq$", "≤": r"$\leq$", "×": r"$\times$", "–": "--", "—": "---", "…": r"\dots{}",
    "’": "'", "“": "``", "”": "''", "\N{NO-BREAK SPACE}": "~",
}  # fmt: skip
"""Characters that mean something to LaTeX, also at the start of a row, and those of the report that pdflatex lacks."""


@dataclass(frozen=True)
class Table:
    """The rows of a table twice: as values, and as a reader sees them."""

    name: str
    """Fit for the name of a file."""
    caption: str
    headings: Sequence[str]
    shown: Sequence[Sequence[str]]
    """The cells of each row, below the headings."""
    records: Sequence[Mapping[str, Any]]
    """The values of each row by column; all rows have the same columns."""

    def csv(self) -> str:
        """The values in full precision (RFC 4180, but with line feeds only); None is an empty cell."""
        buffer = io.StringIO()
        columns = list(dict.fromkeys(column for record in self.records for column in record))
        writer = csv.DictWriter(buffer, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _csv_cell(value) for key, value in record.items()} for record in self.records)
        return buffer.getvalue()

    def latex(self) -> str:
        """A `tabular` that needs no package."""
        lines = [_latex_row(self.headings), r"\hline", *map(_latex_row, self.shown)]
        columns = "l" + "r" * (len(self.headings) - 1)
        rows = "\n".join([r"\hline", *lines, r"\hline"])
        return f"% {latex_escaped(self.caption)}\n\\begin{{tabular}}{{{columns}}}\n{rows}\n\\end{{tabular}}\n"

    def markdown(self) -> str:
        """A table in GitHub's Markdown."""
        rule = "| --- |" + " ---: |" * (len(self.headings) - 1)
        return "\n".join([_markdown_row(self.headings), rule, *map(_markdown_row, self.shown)]) + "\n"


def latex_escaped(text: str) -> str:
    """The text as LaTeX shows it; a line break is a space."""
    return re.sub(r".", lambda match: LATEX.get(match[0], match[0]), " ".join(text.split()))


def markdown_escaped(text: str) -> str:
    """The text as a cell or a line of Markdown shows it; a line break is a space."""
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", " ".join(text.split()))


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(latex_escaped, cells)) + r" \\"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(markdown_escaped, cells))} |"


def _csv_cell(value: Any) -> Any:
    """Truth values as in JSON; lists and None never appear in a cell as Python writes them."""
    assert not isinstance(value, list | tuple | dict), value
    return str(value).lower() if isinstance(value, bool) else value
