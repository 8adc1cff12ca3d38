"""The rows of a summary as a table for the terminal."""

from collections.abc import Sequence

from rich.table import Table

from tadistill.judge.summary import Row


def rows_table(rows: Sequence[Row], title: str) -> Table:
    """Scores or wins, one row an arm and set."""
    table = Table(title=title, title_justify="left", box=None)
    scores = bool(rows) and "score" in rows[0]
    for column in (
        ("arm", "set", "score", "95 %", "n") if scores else ("arm", "against", "set", "win rate", "95 %", "wins/ties/losses", "n")
    ):
        table.add_column(column, justify="left" if column in ("arm", "against", "set") else "right")
    for row in rows:
        interval = f"[{row['low']:.2f}, {row['high']:.2f}]".replace("[", "\\[")
        if scores:
            table.add_row(row["arm"], row["set"], f"{row['score']:.2f}", interval, str(row["n"]))
        else:
            counts = "/".join(str(row[field]) for field in ("wins", "ties", "losses"))
            table.add_row(row["arm"], row["other"], row["set"], f"{row['win_rate']:.2f}", interval, counts, str(row["n"]))
    return table
