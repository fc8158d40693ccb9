"""Tables of the gallery, from the record that examples/gallery/run_all.py writes."""

from __future__ import annotations

from benchmarks.contest import Row
from benchmarks.figures import Rows, number, table

STEP = "a step: ours / torch.nn"


def steps(row: Row) -> str:
    """Milliseconds of a step of ours and of torch.nn's; empty where nothing was timed."""
    found = [row["results"].get(name, {}).get("ms") for name in ("rnnkernels", "torch.nn")]
    return f"{' / '.join(number(ms, 1) for ms in found)} ms" if found[0] else ""


def named(row: Row) -> str:
    """What was run; a small run is marked, since its figures say little."""
    name = f"`{row['shape']}`"
    return f"{name} (quick)" if row["quick"] else name


def overview(rows: Rows) -> str:
    """A line for each run, which links from docs/ to the program's page."""
    head = ["shape", "program", "data", "metric", "model", "baseline", "time", STEP]
    lines = []
    for row in rows:
        baseline = f"{row['baseline_value']} ({row['baseline']})"
        link = f"[{named(row)}](gallery/{row['variant']}.md)"
        line = [row["of"], link, row["data"], row["metric"], row["value"], baseline]
        lines.append([*line, f"{row['seconds']:.0f} s", steps(row)])
    return table(head, lines)


def single(rows: Rows) -> str:
    """A column for each run of one program."""
    columns = [
        {
            "data": row["data"],
            "cell": row["cell"],
            "parameters": f"{row['parameters']:,}" if row["parameters"] else "",
            row["metric"]: f"**{row['value']}**",
            "baseline": f"{row['baseline_value']}, {row['baseline']}",
            "time in all": f"{row['seconds']:.0f} s",
            STEP: steps(row),
            "command": f"`{row['command']}`",
        }
        for row in rows
    ]
    names = dict.fromkeys(name for column in columns for name in column)
    lines = [[name, *(column.get(name, "") for column in columns)] for name in names]
    return table(["", *map(named, rows)], [line for line in lines if any(line[1:])])
