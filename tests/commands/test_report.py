"""``report``: one page that needs no network, and the trace."""

from __future__ import annotations

import asyncio
import html.parser
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_async_localsgd.commands.charts import line_chart, thin, timeline
from lightning_async_localsgd.commands.history import History, Span
from lightning_async_localsgd.commands.report import make_page
from lightning_async_localsgd.server.event_file import find_event_file, read_lines
from tests.commands.conftest import Command, LiveRun

VOID = {"meta", "br", "link", "img", "input", "hr"}


def history_of(lines: Iterable[dict[str, Any]]) -> History:
    history = History()
    for line in lines:
        history.add(line)
    history.finish()
    return history


class Structure(html.parser.HTMLParser):
    """Checks that every element is closed, and collects elements and texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str, **attributes: str) -> int:
        return sum(
            found == tag and all(attributes[name] in str(given.get(name.rstrip("_"))) for name in attributes)
            for found, given in self.elements
        )


@pytest.fixture(scope="module")
def history(finished: Path) -> History:
    return history_of(read_lines(find_event_file(finished)))


@pytest.fixture(scope="module")
def page(history: History) -> str:
    return make_page(history)


def test_page_needs_nothing_from_anywhere(page: str) -> None:
    structure = Structure(page)
    assert "http:" not in page
    assert "https:" not in page
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {tag for tag, _ in structure.elements}
    assert "url(" not in page
    assert "default-src 'none'" in page
    assert len(page) < 500_000


def test_page_is_for_light_and_dark_and_for_phones(page: str) -> None:
    structure = Structure(page)
    assert structure.count("meta", name="viewport") == 1
    assert "width=device-width" in page
    light, dark = page.split("@media (prefers-color-scheme: dark)")
    used = set(re.findall(r"var\((--\w+)\)", page))
    assert used <= set(re.findall(r"(--\w+):", light)), "each color has a value"
    assert {"--page", "--text", "--quiet", "--grid", "--card"} <= set(re.findall(r"(--\w+):", dark.split("} }")[0]))
    # Nothing has a fixed width except what scrolls in its own box.
    fixed = re.findall(r"([\w. ]+) \{[^}]*min-width: (\d+)px", page)
    assert [(name.strip(), int(width)) for name, width in fixed if int(width) > 200] == [(".scroll svg", 640)]


def test_page_shows_what_happened(page: str, history: History) -> None:
    structure = Structure(page)
    for figure in re.findall(r"<svg .*?</svg>", page):
        ET.fromstring(figure)
    for title in (
        "Loss over local steps of all workers", "Loss over time", "What every worker did", "Staleness of pushes",
        "Waiting before a dispatch", "Local steps of a round", "Norm of pushes", "Traffic of the server",
    ):  # fmt: skip
        assert title in structure.text
    for worker in history.state.as_dict()["workers"]:
        assert f"worker {worker['worker']}" in structure.text
        assert f"{worker['share']:.1%}" in structure.text
    for state in ("computing", "exchanging", "waiting", "away"):
        assert structure.count("rect", class_=state) > 0
    assert len(history.faults) == 2
    assert structure.count("path", class_="fault") == 2
    assert structure.text.count("it died, as scheduled") == 4, "in the table and in the timeline"


def test_names_from_the_run_are_escaped(finished: Path) -> None:
    lines = read_lines(find_event_file(finished))
    lines[0] = {**lines[0], "run_name": "<script>alert(1)</script>"}
    evil = {"kind": "lost", "worker": 0, "session": "s", "seconds": lines[9]["seconds"], "reason": "<img src=x>"}
    lines.insert(10, evil)
    page = make_page(history_of(lines))
    Structure(page)
    assert "<script" not in page
    assert "<img" not in page


def test_spans_cover_the_life_of_every_worker_without_overlap(history: History) -> None:
    summary = history.state.summary
    assert summary is not None
    for worker in summary["workers"]:
        spans = history.spans[worker["worker"]]
        for first, second in itertools.pairwise(spans):
            assert first.begin < first.end == pytest.approx(second.begin)
        sums = {state: sum(span.end - span.begin for span in spans if span.state == state) for state in ("waiting",)}
        assert sums["waiting"] == pytest.approx(worker["wait_seconds"], abs=0.02)
    assert history.end == pytest.approx(summary["seconds"])
    lost = next(span for span in history.spans[1] if span.state == "away")
    assert (lost.begin, lost.end) == pytest.approx((1.1, 1.6))
    assert history.spans[2][-1].state == "away"
    assert history.spans[3][0].begin == pytest.approx(0.9)


def test_trace_is_a_trace_event_file(finished: Path, history: History, command: Command, tmp_path: Path) -> None:
    files = ["-o", tmp_path / "a" / "page.html", "--trace", tmp_path / "t.json"]
    code, output, _ = command("report", finished, *files, "--json")
    assert code == 0
    assert json.loads(output)["trace"] == str(tmp_path / "t.json")
    assert json.loads(output)["state"]["ended"]
    assert (tmp_path / "a" / "page.html").read_text() == make_page(history)
    trace = json.loads((tmp_path / "t.json").read_text())
    by_phase: dict[str, list[dict[str, Any]]] = {}
    for event in trace["traceEvents"]:
        by_phase.setdefault(event["ph"], []).append(event)
        assert event["pid"] == 1
    assert set(by_phase) == {"M", "X", "i", "C"}
    assert [event["args"]["name"] for event in by_phase["M"][1:]] == [f"worker {n}" for n in range(4)]
    assert len(by_phase["X"]) == sum(map(len, history.spans.values()))
    assert all(event["dur"] > 0 and event["ts"] >= 0 for event in by_phase["X"])
    assert len(by_phase["i"]) == 2
    assert {event["name"] for event in by_phase["C"]} == {"loss", "train_loss", "val_loss"}


def test_long_runs_are_drawn_in_a_bounded_size() -> None:
    spans = {0: [Span("computing" if n % 2 else "waiting", float(n), n + 1.0) for n in range(10_000)]}
    drawn = timeline(spans, 10_000.0, [])
    assert drawn.count("<rect") <= 600
    heights = sum(float(height) for height in re.findall(r'class="waiting".*?height="([\d.]+)"', drawn))
    assert heights / 240 == pytest.approx(10.0, rel=0.05), "half of the row's height"
    points = [(float(n), float(n % 7)) for n in range(10_000)]
    assert len(thin(points)) <= 400
    assert len(line_chart("x", {"y": points}, "s")) < 20_000
    assert line_chart("x", {"y": []}, "s") == ""


def test_worker_whose_push_is_held_waits() -> None:
    push = {"worker": 0, "session": "s", "sequence": 1, "steps": 5, "exchange_seconds": 0.0}
    history = history_of(
        [
            {"kind": "run", "format": 1, "time": 0.0, "seconds": 0.0, "run_name": "a", "incarnation": "i"},
            {"kind": "join", "worker": 0, "session": "s", "seconds": 0.0},
            {"kind": "dispatch", "seconds": 1.0, "steps": {"0": 5}},
            {"kind": "held", "seconds": 3.0, **push},
            {"kind": "push", "seconds": 7.0, "version": 2, "staleness": 1, "refused": None, **push},
            {"kind": "dispatch", "seconds": 8.0, "steps": {"0": 5}},
        ]
    )
    spans = [(span.state, span.begin, span.end) for span in history.spans[0]]
    assert spans == [("waiting", 0.0, 1.0), ("computing", 1.0, 3.0), ("waiting", 3.0, 8.0)]
    assert history.spans[0][1].facts == {"steps": 5, "staleness": 1, "version": 2}
    assert history.waits == {0: [(8.0, 5.0)]}


def test_page_stays_below_a_megabyte(finished: Path) -> None:
    begin = read_lines(find_event_file(finished))[0]
    lines, workers = [begin], 300
    for round_ in range(100):
        now = begin["seconds"] + round_
        lines.append({"kind": "dispatch", "seconds": now, "steps": {str(worker): 5 for worker in range(workers)}})
        lines += [
            {"kind": "push", "worker": worker, "session": "s", "sequence": round_, "version": round_, "steps": 5,
             "samples": 5, "staleness": 0, "refused": "<" * 400 if worker % 2 else None, "refusal": "not_finite",
             "exchange_seconds": 0.1, "update_norm": 1.0, "seconds": now + 0.5 + worker / 1000}
            for worker in range(workers)
        ]  # fmt: skip
    page = make_page(history_of(lines))
    assert len(page) < 1_000_000
    assert "and 200 more workers" in Structure(page).text


@pytest.mark.parametrize(
    "values", [[1e30] * 3, [1e17, 1e17 + 32], [-1e308, 1e308], [math.inf, 2.0], [1e-13, 3e-13], [0.0]]
)
def test_charts_of_diverged_and_tiny_values(values: list[float]) -> None:
    chart = line_chart("x", {"y": [(float(n), value) for n, value in enumerate(values)]}, "s")
    labels = re.findall(r'text-anchor="end">([^<]*)<', chart)[:-1]
    assert len(labels) == len(set(labels)), "labels can be told apart"
    assert "nan" not in chart
    assert "inf" not in chart


def test_restart_of_rank_0_is_part_of_the_timeline() -> None:
    def lines(time: float, seconds: float, incarnation: str, session: str) -> list[dict[str, Any]]:
        push = {"sequence": 1, "version": 1, "steps": 5, "staleness": 0, "refused": None, "exchange_seconds": 0.0}
        return [
            {"kind": "run", "format": 1, "time": time, "seconds": seconds, "run_name": "a", "incarnation": incarnation},
            {"kind": "join", "worker": 0, "session": session, "seconds": seconds},
            {"kind": "dispatch", "seconds": seconds, "steps": {"0": 5}},
            {"kind": "push", "worker": 0, "session": session, "seconds": seconds + 4.0, **push},
        ]

    history = history_of([*lines(1000.0, 50.0, "i", "s"), *lines(1010.0, 3.0, "j", "t")])
    assert history.end == pytest.approx(14.0)
    away = [span for span in history.spans[0] if span.state == "away"]
    assert [(span.begin, span.end) for span in away] == [(4.0, 10.0)]
    assert [fault["text"] for fault in history.faults] == ["rank 0 was restarted"]
    assert history.faults[0]["seconds"] == pytest.approx(10.0)


def test_report_of_a_live_run_that_is_still_running(live_run: Callable[..., LiveRun], command: Command) -> None:
    run = live_run(seconds_per_step=[0.01, 0.02], trainer={"max_steps": 100_000}, strategy={"local_steps": 5})
    run.wait_for(lambda state: all(worker["rounds"] > 10 for worker in state["workers"]) and bool(state["losses"]))
    run_file = find_event_file(run.out)
    while not any(line["kind"] == "metrics" for line in read_lines(run_file)):
        assert run.process.poll() is None
    code, output, _ = command("report", run.out)
    assert code == 0
    Structure(Path(re.findall(r"report: (.*)", output)[0]).read_text())
    run.stop()


@pytest.mark.parametrize(
    "line",
    [
        {"kind": "push"},
        {"kind": "push", "worker": "x"},
        {"kind": "metrics", "seconds": "soon"},
        {"kind": "dispatch", "steps": [1]},
        {"kind": "run", "format": 1},
    ],
)
@pytest.mark.parametrize("words", [["watch", "--once"], ["watch", "--json"], ["report"]])
def test_damaged_and_foreign_files_are_named(
    command: Command, finished: Path, tmp_path: Path, words: list[str], line: dict[str, Any]
) -> None:
    path = tmp_path / "damaged.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (read_lines(find_event_file(finished))[0], line)))
    code, _, errors = command(*words, path)
    assert code == 1
    assert f"{path} is damaged" in errors


def test_lines_before_a_run_and_lines_that_are_no_json_are_skipped(
    command: Command, finished: Path, tmp_path: Path
) -> None:
    path, first = tmp_path / "foreign.jsonl", json.dumps(read_lines(find_event_file(finished))[0])
    path.write_text("\n".join(['{"kind": "push"}', "[" * 100_000, '{"kind": ["x"]}', "\xff", first, '{"ki']))
    assert command("watch", path, "--once")[0] == 0
    assert command("report", path)[0] == 0


def test_run_without_an_event_file_is_named(command: Command, tmp_path: Path) -> None:
    assert "contains no async_localsgd_events.jsonl" in command("report", tmp_path)[2]
    (tmp_path / "async_localsgd_events.jsonl").write_text("")
    code, _, errors = command("report", tmp_path)
    assert code == 1
    assert "holds no run" in errors


CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell"))), None
)

MEASURE = """JSON.stringify({
  page: document.documentElement.scrollWidth, window: window.innerWidth,
  background: getComputedStyle(document.body).backgroundColor, color: getComputedStyle(document.body).color,
  charts: [...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().height),
  letters: [...document.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().height),
})"""


async def measure(browser: str, page: Path, width: int, scheme: str) -> dict[str, Any]:
    """Load a page in a window of a width, through the DevTools protocol, and return what the browser measures."""
    aiohttp = pytest.importorskip("aiohttp")
    async with aiohttp.ClientSession() as session, session.ws_connect(browser) as socket:
        number = 0

        async def call(method: str, target: str | None = None, **parameters: Any) -> dict[str, Any]:
            nonlocal number
            number += 1
            message = {"id": number, "method": method, "params": parameters}
            await socket.send_json(message if target is None else {**message, "sessionId": target})
            while (answer := await socket.receive_json(timeout=60)).get("id") != number:
                pass
            assert "error" not in answer, answer
            result: dict[str, Any] = answer["result"]
            return result

        created = await call("Target.createTarget", url="about:blank")
        target = (await call("Target.attachToTarget", targetId=created["targetId"], flatten=True))["sessionId"]
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        await call("Emulation.setDeviceMetricsOverride", target, **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await call("Emulation.setEmulatedMedia", target, features=features)
        await call("Page.navigate", target, url=page.as_uri())
        while True:
            ready = await call("Runtime.evaluate", target, expression="document.URL + document.readyState")
            if ready["result"]["value"].startswith("file:") and ready["result"]["value"].endswith("complete"):
                break
        found = await call("Runtime.evaluate", target, expression=MEASURE)
        measured: dict[str, Any] = json.loads(found["result"]["value"])
        return measured


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of a headless Chromium."""
    if CHROMIUM is None:
        pytest.skip("needs a headless Chromium on the path, or its path in CHROMIUM")
    profile = tmp_path_factory.mktemp("profile")
    words = [
        "--headless",
        "--no-sandbox",
        "--no-zygote",
        "--single-process",
        "--disable-gpu",
        "--remote-debugging-port=0",
    ]
    process = subprocess.Popen([CHROMIUM, *words, f"--user-data-dir={profile}"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        yield next(line.split()[-1] for line in process.stderr if "DevTools listening on" in line)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_into_a_window_and_follows_its_colors(
    browser: str, width: int, scheme: str, page: str, tmp_path: Path
) -> None:
    path = tmp_path / "page.html"
    path.write_text(page)
    found = asyncio.run(measure(browser, path, width, scheme))
    assert found["window"] == width
    assert found["page"] <= width, "nothing has to be scrolled sideways"
    assert all(height > 80 for height in found["charts"])
    assert min(found["letters"]) >= 9, "pixels"
    dark = "rgb(13, 17, 23)"
    assert (found["background"] == dark) == (scheme == "dark")
    assert found["background"] != found["color"]
