"""Charts as inline SVG. Colors are variables of the page's style, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from lightning_async_localsgd.commands import text
from lightning_async_localsgd.commands.history import STATES, Point, Span

_WIDTH, _HEIGHT = 460, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 34
_MAX_POINTS = 400
"""Points of a line, at most. More cannot be told apart."""

_MAX_SPANS, _ALL_SPANS = 300, 2400
"""Spans of a worker, and of all, that the timeline draws one by one. Of more, it draws how the states divide short
periods."""

_MAX_PERIODS, _ALL_PERIODS = 240, 1600
"""Such periods of a worker, and of all."""

_MAX_ROWS = 100
"""Workers that the timeline shows."""

_LARGEST = 1e300
"""Size from which values of a diverged run are left out, because an axis for them would overflow."""

_ROW = 26
_TIMELINE_WIDTH = 900

COLORS = 8
"""Number of colors of workers, which repeat."""


def thin(points: Sequence[Point], count: int = _MAX_POINTS) -> list[Point]:
    """Return at most about ``count`` points: the means of as many parts."""
    if len(points) <= count:
        return list(points)
    size = math.ceil(len(points) / count)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers from ``low`` to ``high``.

    Example::

        >>> ticks(0.0, 9.3)
        [0.0, 2.0, 4.0, 6.0, 8.0]

    """
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(
    title: str,
    lines: Mapping[str, Sequence[Point]],
    x_name: str,
    steps: bool = False,
    dots: Sequence[str] = (),
    bytes_: bool = False,
) -> str:
    """Return a chart of some lines; "" if there are no points.

    Args:
        title: what the chart shows.
        lines: points by name.
        x_name: name of the horizontal axis.
        steps: whether a value holds until the next one.
        dots: names whose points are drawn as dots.
        bytes_: whether values are bytes.

    """
    shown = {name: thin([p for p in points if abs(p[1]) < _LARGEST]) for name, points in lines.items()}
    shown = {name: points for name, points in shown.items() if points}
    if not shown:
        return ""
    x_high = max(x for points in shown.values() for x, _ in points) or 1.0
    x_low = min(0.0, *(x for points in shown.values() for x, _ in points))
    values = [y for points in shown.values() for _, y in points]
    y_low, y_high = min(values), max(values)
    y_low = 0.0 if 0.0 <= y_low < 0.5 * y_high else y_low
    if y_high - y_low <= 1e-9 * max(abs(y_low), abs(y_high)):
        margin = 0.5 * max(abs(y_low), abs(y_high)) or 0.5
        y_low, y_high = y_low - margin, y_high + margin

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = [_axes(at, (x_low, x_high), (y_low, y_high), x_name, bytes_)]
    for number, (name, points) in enumerate(shown.items()):
        color = f"c{number % COLORS}"
        places = [at(*point) for point in points]
        if name in dots or len(places) == 1:
            parts += [f'<circle class="{color} dot" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
            continue
        path = f"M{places[0][0]:.1f} {places[0][1]:.1f}"
        for x, y in places[1:]:
            path += f"H{x:.1f}V{y:.1f}" if steps else f"L{x:.1f} {y:.1f}"
        parts.append(f'<path class="{color} line" d="{path}"><title>{escape(name)}</title></path>')
    legend = "".join(
        f'<span><i class="c{number % COLORS}"></i>{escape(name)}</span>' for number, name in enumerate(shown)
    )
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
        + (f'<div class="legend">{legend}</div>' if len(shown) > 1 else "")
        + "</figure>"
    )


def timeline(spans: Mapping[int, Sequence[Span]], end: float, faults: Iterable[Mapping[str, object]]) -> str:
    """Return the timeline of all workers; "" if there are none."""
    if not spans or end <= 0.0:
        return ""
    left, width = 70, _TIMELINE_WIDTH - 80
    shown = sorted(spans.items())[:_MAX_ROWS]
    height = _ROW * len(shown) + 30
    scale = width / end
    parts = []
    for row, (worker, own) in enumerate(shown):
        top = 4 + row * _ROW
        parts.append(f'<text x="0" y="{top + 15}">worker {worker}</text>')
        parts.append(_row(own, end, left, top, scale, len(shown)))
    for fault in faults:
        x = left + scale * float(str(fault["seconds"]))
        label = f"{text.duration(float(str(fault['seconds'])))}: {fault['text']}"[:120]
        parts.append(
            f'<path class="fault" d="M{x:.1f} 0V{_ROW * len(shown) + 4}"><title>{escape(label)}</title></path>'
        )
    for tick in ticks(0.0, end, 8):
        x = left + scale * tick
        parts.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{_short(tick)} s</text>')
    legend = "".join(f'<span><i class="{state}"></i>{state}</span>' for state in STATES)
    legend += '<span><i class="fault"></i>fault</span>'
    return (
        '<figure class="wide"><figcaption>What every worker did</figcaption><div class="scroll">'
        f'<svg viewBox="0 0 {_TIMELINE_WIDTH} {height}" role="img" aria-label="timeline">{"".join(parts)}</svg></div>'
        f'<div class="legend">{legend}</div>'
        + (f"<p>and {len(spans) - len(shown)} more workers</p>" if len(spans) > len(shown) else "")
        + "</figure>"
    )


def _row(spans: Sequence[Span], end: float, left: float, top: float, scale: float, rows: int) -> str:
    """Return the rectangles of a worker: its spans, or the shares of its states in short periods."""
    height = _ROW - 6
    if len(spans) <= min(_MAX_SPANS, _ALL_SPANS // rows):
        return "".join(
            f'<rect class="{span.state}" x="{left + scale * span.begin:.2f}" y="{top}" '
            f'width="{max(0.3, scale * (span.end - span.begin)):.2f}" height="{height}"><title>{_span_text(span)}'
            "</title></rect>"
            for span in spans
        )
    periods = min(_MAX_PERIODS, _ALL_PERIODS // rows)
    period = end / periods
    shares = [dict.fromkeys(STATES, 0.0) for _ in range(periods)]
    for span in spans:
        first, last = int(span.begin / period), min(periods - 1, int(span.end / period))
        for number in range(first, last + 1):
            overlap = min(span.end, (number + 1) * period) - max(span.begin, number * period)
            shares[number][span.state] += max(0.0, overlap) / period
    parts = []
    for number, found in enumerate(shares):
        y = top + height
        for state in STATES:
            part = height * found[state]
            if part >= 0.2:
                y -= part
                parts.append(
                    f'<rect class="{state}" x="{left + scale * number * period:.2f}" y="{y:.2f}" '
                    f'width="{scale * period + 0.1:.2f}" height="{part:.2f}"/>'
                )
    return "".join(parts)


def _span_text(span: Span) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in span.facts.items())
    return escape(f"{span.state} {text.duration(span.end - span.begin)}{', ' if facts else ''}{facts}")


def _axes(at: object, xs: tuple[float, float], ys: tuple[float, float], x_name: str, bytes_: bool) -> str:
    assert callable(at)
    parts = []
    for tick in ticks(*ys):
        _, y = at(xs[0], tick)
        label = text.size(tick) if bytes_ else _short(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in ticks(*xs):
        x, _ = at(tick, ys[0])
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{_short(tick)}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">{escape(x_name)}</text>')
    return "".join(parts)


def _short(value: float) -> str:
    """Return a number as an axis shows it.

    Example::

        >>> _short(0.25), _short(20000.0), _short(1500000.0)
        ('0.25', '20k', '1.5M')

    """
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= 10 * size or (unit == "M" and abs(value) >= size):
            return f"{value / size:g}{unit}"
    return f"{value:g}"
