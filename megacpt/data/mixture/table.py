"""Aligned text for a terminal."""

from collections.abc import Sequence


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], total: Sequence[str]) -> list[str]:
    """Lines of a table: names on the left, numbers flush right, rules around the rows."""
    widths = [max(len(row[column]) for row in (header, *rows, total)) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])

    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    return [text.rstrip() for text in (line(header), rule, *map(line, rows), rule, line(total))]
