"""``report``: one page about a run, which needs no network and no script.

The charts are inline SVG, written here. A plotting library would add megabytes of script to each page, for charts that
read as well without.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lightning_async_localsgd.commands import charts, text
from lightning_async_localsgd.commands.errors import OK, CommandError
from lightning_async_localsgd.commands.history import STATES, History, Point
from lightning_async_localsgd.commands.trace import trace_events
from lightning_async_localsgd.server.event_file import EventReader, NoEventFileError, find_event_file

REPORT_FILE = "async_localsgd_report.html"
TRACE_FILE = "async_localsgd_trace.json"

_MOST_FAULTS = 200
"""Faults that the page lists."""

_MOST_WORKERS = 16
"""Workers that get a line of their own in charts, and losses. Of more workers, the charts show the mean."""

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1f24; --quiet: #59636e; --grid: #d8dee4; --card: #f6f8fa;
  --c0: #0969da; --c1: #bc4c00; --c2: #1a7f37; --c3: #8250df; --c4: #bf3989; --c5: #6e7781; --c6: #9a6700;
  --c7: #0a7b83;
  --computing: #2f81d6; --exchanging: #12a594; --waiting: #e2a336; --validating: #8e6fd8; --away: #d1434b; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --text: #e6edf3; --quiet: #9198a1; --grid: #30363d;
  --card: #161b22; --c0: #58a6ff; --c1: #f0883e; --c2: #3fb950; --c3: #bc8cff; --c4: #f778ba; --c5: #8b949e;
  --c6: #d29922; --c7: #39c5cf; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 16px; max-width: 1100px; background: var(--page); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 28px 0 8px; }
p { margin: 4px 0; color: var(--quiet); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 8px; margin: 16px 0; }
.tiles div { background: var(--card); border-radius: 6px; padding: 8px 10px; }
.tiles b { display: block; font-size: 1.15rem; } .tiles span { color: var(--quiet); font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px; }
figure { margin: 0; min-width: 0; } figure.wide { margin: 8px 0; } figcaption { font-weight: 600; margin-bottom: 4px; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--quiet); font: 12px system-ui, sans-serif; }
.scroll { overflow-x: auto; } .scroll svg { min-width: 640px; }
.grid { stroke: var(--grid); fill: none; } .line { fill: none; stroke-width: 1.8; }
.fault { stroke: var(--away); stroke-width: 1.5; stroke-dasharray: 3 2; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 14px; font-size: .85rem; color: var(--quiet); margin-top: 4px; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 5px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: right; padding: 4px 8px; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { color: var(--quiet); font-weight: 600; } td.text, th.text { text-align: left; white-space: normal; }
.bar { display: block; height: 8px; border-radius: 2px; background: var(--c0); min-width: 1px; }
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "report",
        help="write a page about a run",
        description="Write one HTML page about a run, which needs no network: losses, a timeline of every worker, "
        "staleness, waiting, local steps, shares, traffic and faults.",
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="DIR", help="folder of the run, or its event file")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help=f"the page (default: {REPORT_FILE} beside the event file)"
    )
    parser.add_argument(
        "--trace", nargs="?", const="", metavar="FILE",
        help=f"also write the timeline as Trace Event file for ui.perfetto.dev (default: {TRACE_FILE} beside it)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the paths and the state of the run as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the subcommand and return its exit code."""
    try:
        path = find_event_file(options.target)
        history = History()
        with contextlib.closing(EventReader(path)) as reader:
            reader.feed(history.add)
        history.finish()
    except NoEventFileError as error:
        raise CommandError(str(error)) from error
    if not history.run:
        raise CommandError(f"{path} holds no run")
    page = Path(options.output) if options.output else path.with_name(REPORT_FILE)
    _write(page, make_page(history))
    written = {"events": str(path), "report": str(page)}
    if options.trace is not None:
        trace = Path(options.trace) if options.trace else path.with_name(TRACE_FILE)
        _write(trace, json.dumps(trace_events(history)))
        written["trace"] = str(trace)
    if options.json:
        print(json.dumps({**written, "state": history.state.as_dict()}, indent=2))
    else:
        print("\n".join(f"{name}: {file}" for name, file in written.items() if name != "events"))
    return OK


def make_page(history: History) -> str:
    """Return the page."""
    state = history.state.as_dict()
    name = escape(str(state["run_name"] or "run"))
    missing = (
        "<p>The event file was rotated: its beginning, and what happened then, is not part of this page.</p>"
        if history.lacks_beginning
        else ""
    )
    sections = [
        ("Loss", f'<div class="charts">{_losses(history)}</div>'),
        ("Timeline", charts.timeline(history.spans, history.end, history.faults[:_MOST_FAULTS])),
        ("Workers", f'<div class="scroll">{_workers(state)}</div>'),
        ("Over time", f'<div class="charts">{_over_time(history)}</div>'),
        ("Faults", _faults(history)),
    ]
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{_style()}</style></head><body>"
        f"<h1>{name}</h1>{''.join(f'<p>{escape(line)}</p>' for line in text.headlines(state)[:1])}{missing}"
        f"{_tiles(history, state)}{body}</body></html>\n"
    )


def _style() -> str:
    workers = "".join(
        f".c{number}.line {{ stroke: var(--c{number}); }} .c{number}.dot {{ fill: var(--c{number}); }} "
        f"i.c{number} {{ background: var(--c{number}); }}\n"
        for number in range(charts.COLORS)
    )
    states = "".join(
        f"rect.{state} {{ fill: var(--{state}); }} i.{state} {{ background: var(--{state}); }}\n" for state in STATES
    )
    return _STYLE + workers + states + "i.fault { background: var(--away); height: 2px !important; }"


def _tiles(history: History, state: Mapping[str, Any]) -> str:
    run, total = history.run, state["total"]
    waits = sum(worker["wait_seconds"] for worker in state["workers"])
    present = sum(span.end - span.begin for spans in history.spans.values() for span in spans if span.state != "away")
    tiles = {
        f"{state['unit']} of all workers": f"{state['progress']}" + (f" of {total}" if total else ""),
        "virtual duration" if state["virtual"] else "duration": text.duration(history.end),
        f"{state['unit'].removeprefix('local ')} a second": text.number(
            state["progress"] / history.end if history.end else None
        ),
        "workers": str(len(state["workers"])),
        "pushes merged": str(state["version"]),
        "pushes refused": str(sum(state["refusals"].values())),
        "of the time waiting": f"{waits / present:.1%}" if present else "-",
        "mean staleness": text.number(
            statistics.fmean(worker["mean_staleness"] for worker in state["workers"]) if state["workers"] else None
        ),
        "traffic": text.size(state["bytes_sent"] + state["bytes_received"]),
        "parameters": text.number(run.get("parameters"), 4),
    }
    for name, points in history.validations.items():
        tiles[f"last {name}"] = text.number(points[-1][2], 4)
    return (
        '<div class="tiles">'
        + "".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for label, value in tiles.items())
        + "</div>"
    )


def _losses(history: History) -> str:
    """Return the charts of all values whose names say loss, over steps and over time; if there are none, of all."""
    values = {**history.values, **history.validations}
    own = values.get("loss")
    if any(points == own for name, points in values.items() if name != "loss"):
        del values["loss"]  # The module has logged it under another name.
    chosen = {name: points for name, points in values.items() if "loss" in name} or values
    chosen = dict(list(chosen.items())[:_MOST_WORKERS])
    by_steps = {name: [(steps, value) for _, steps, value in points] for name, points in chosen.items()}
    by_time = {name: [(seconds, value) for seconds, _, value in points] for name, points in chosen.items()}
    unit = "samples" if history.state.counts_samples else "local steps"
    found = charts.line_chart(f"Loss over {unit} of all workers", by_steps, unit)
    found += charts.line_chart("Loss over time", by_time, "seconds")
    return found or "<p>Nothing was logged.</p>"


def _over_time(history: History) -> str:
    return "".join(
        [
            charts.line_chart("Staleness of pushes (versions)", _by_worker(history.staleness), "seconds"),
            charts.line_chart("Waiting before a dispatch (seconds)", _by_worker(history.waits), "seconds"),
            charts.line_chart("Local steps of a round", _by_worker(history.local_steps), "seconds", steps=True),
            charts.line_chart("Cosine of push and outer momentum", {"cosine": history.cosine}, "seconds"),
            charts.line_chart("Norm of pushes", {"norm": history.norms}, "seconds"),
            charts.line_chart(
                "Traffic of the server so far", {"sent": history.sent, "received": history.received}, "seconds",
                bytes_=True,
            ),
        ]
    )  # fmt: skip


def _by_worker(values: Mapping[int, Sequence[Point]]) -> dict[str, Sequence[Point]]:
    if len(values) > _MOST_WORKERS:
        return {"all workers": sorted(point for points in values.values() for point in points)}
    return {f"worker {worker}": points for worker, points in sorted(values.items())}


def _workers(state: Mapping[str, Any]) -> str:
    heads = "".join(f"<th>{name}</th>" for name in ("worker", "share", "", *text.WORKER_COLUMNS[1:5], "steps"))
    heads += "".join(f"<th>{name}</th>" for name in ("rounds", "waiting", "exchanges", "traffic", "refused", "lost"))
    rows = []
    for worker in state["workers"]:
        name = "former" if worker["worker"] == text.FORMER else str(worker["worker"])
        cells = [
            name, f"{worker['share']:.1%}", f'<span class="bar" style="width:{60 * worker["share"]:.0f}px"></span>',
            worker["state"], text.number(worker["steps_per_second"]), str(worker["local_steps"]),
            f"{worker['mean_staleness']:.2f}", str(worker["steps"]), str(worker["rounds"]),
            text.duration(worker["wait_seconds"]), text.duration(worker["total_exchange_seconds"]),
            text.size(worker["bytes"]), str(worker["refused"]), str(worker["losses"]),
        ]  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _faults(history: History) -> str:
    if not history.faults:
        return "<p>None.</p>"
    rows = "".join(
        f"<tr><td>{text.duration(fault['seconds'])}</td><td>{'-' if fault['worker'] is None else fault['worker']}</td>"
        f'<td class="text">{escape(str(fault["text"]))}</td></tr>'
        for fault in history.faults[:_MOST_FAULTS]
    )
    more = len(history.faults) - _MOST_FAULTS
    return (
        '<table><thead><tr><th>after</th><th>worker</th><th class="text">what happened</th></tr></thead><tbody>'
        f"{rows}</tbody></table>" + (f"<p>and {more} more</p>" if more > 0 else "")
    )


def _write(path: Path, content: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Lone surrogates, of names in a foreign file, are no UTF-8.
        path.write_bytes(content.encode(errors="replace"))
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error}") from error
