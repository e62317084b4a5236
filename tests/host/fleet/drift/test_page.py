"""The page of drift and its plots: what they draw is what the windows in the store say, whoever sent them."""

from __future__ import annotations

import re
import uuid
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from sqlalchemy import text

from benchmarks.drift_streams import Scripts, days
from eyas_host.fleet.drift import page as pages
from eyas_host.fleet.drift.alarms import Alarm, Change
from eyas_host.fleet.drift.fleet_state import WIDTH, WIDTH_WITHOUT_HOURS, Model, Tuning
from eyas_host.fleet.drift.history import MAX_OTHERS, of_alarm, of_device
from eyas_host.fleet.drift.measures import SCALARS, measure, names
from eyas_host.fleet.drift.monitor import Monitor
from eyas_host.fleet.drift.page import rarity, render, write_plot
from eyas_host.fleet.drift.plot import draw, ticks
from eyas_host.fleet.drift.records import DriftRecords
from eyas_host.fleet.store.database import Batch, Store
from eyas_host.fleet.store.retention import expire
from eyas_host.fleet.store.tables import VERSION
from tests.support.drift_parts import BEGIN, DAY, DAYS, LABELS, NAMES, TUNING, batches, copy_of, message, window_of
from tests.support.inside import eyas

NOW = BEGIN + DAYS * DAY + 600
LEARNING = ("--profile-days", "1", "--calibration-days", "1")
HOSTILE = "<script>alert(1)</script>\"'&]]>"
SITE = "</svg></style><img src=x onerror=alert(2)>"


@pytest.fixture
def followed(fleet: str) -> Iterator[tuple[Store, Monitor]]:
    with Store(fleet) as store:
        monitor = Monitor(store, TUNING, clock=lambda: NOW)
        monitor.load()
        yield store, monitor


class Tags(HTMLParser):
    """All tags and attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def hourly(store: Store, device: str, figure: Any) -> dict[int, float]:
    """Hour -> mean over its steps of a figure of the windows, of which the simulation sends one for each step."""
    found = defaultdict(list)
    for window in store.windows(device):
        found[int(window.time // 3600)].append(figure(window))
    return {hour: float(np.mean(values)) for hour, values in found.items()}


def points(path: ET.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.]+),(-?[\d.]+)", path.attrib["d"])]


def of_class(svg: ET.Element, name: str) -> list[ET.Element]:
    return [one for one in svg.iter() if one.attrib.get("class") == name]


def axis(svg: ET.Element) -> Any:
    """Value of a height in the upper panel, from the marks of its axis as a reader would."""
    marks = []
    for one in svg.iter():
        if one.tag == "text" and one.attrib.get("text-anchor") == "end" and re.fullmatch(r"-?[\d.]+", one.text or ""):
            marks.append((float(one.attrib["y"]) - 4, float(one.text or "")))
    (y0, v0), (y1, v1) = marks[0], marks[-1]
    assert y0 != y1
    return lambda y: v0 + (y - y0) * (v1 - v0) / (y1 - y0)


def test_a_plot_shows_what_the_windows_say(followed: tuple[Store, Monitor]) -> None:
    store, monitor = followed
    alarm = monitor.alarms["cam-7"]
    series = of_alarm(monitor, DriftRecords(store), alarm, NOW)
    assert series is not None and series.since == alarm.since and len(series.others) == MAX_OTHERS
    name = series.measure
    label = name.rpartition(" of ")[2]

    def figure(window: Any) -> float:
        if name.startswith("confidence of"):
            return float(window.confidence_sum[label] / window.counts[label])
        if name.startswith("share of"):
            return float(window.counts[label] / window.frames)
        if name.startswith("image direction"):
            return float(window.sketch.mean[int(name[-1]) - 1])
        return {
            "confidence": sum(window.confidence_sum.values()) / window.frames,
            "distance": window.ood_quantile,
        }[name]

    expected = hourly(store, "cam-7", figure)
    svg = ET.fromstring(draw(series))
    value = axis(svg)
    (line,) = of_class(svg, "value")[-1:]
    drawn = [value(y) for _, y in points(line)]
    hours = [int(moment // 3600) for moment in series.times]
    assert hours == sorted(expected)
    span = max(expected.values()) - min(expected.values())
    assert drawn == pytest.approx([expected[hour] for hour in hours], abs=0.004 * span)
    x = [place for place, _ in points(line)]
    assert np.diff(x) == pytest.approx([x[1] - x[0]] * (len(x) - 1), abs=0.11)
    (since,) = of_class(svg, "since")
    at = float(re.findall(r"M([\d.]+),", since.attrib["d"])[0])
    assert np.interp(at, x, series.times) == pytest.approx(alarm.since, abs=600)


def test_the_band_is_the_profile_and_others_keep_their_distance_to_their_own(followed: tuple[Store, Monitor]) -> None:
    store, monitor = followed
    series = of_device(monitor, DriftRecords(store), "cam-3", NOW)
    assert series is not None and series.since == 0.0
    model = monitor.models["0123456789ab"]
    column = names(model.labels).index(series.measure)
    profile, row = model.profiles, model.row_of["cam-3"]
    slots = [int(moment % DAY // 3600) for moment in series.times]
    means = profile.mean[row, slots, column]
    assert series.usual == pytest.approx(means, abs=0.06 * float(np.abs(np.diff(means)).max()))
    hours = [int(moment // 3600) for moment in series.times]
    other = sorted(name for name, site in monitor.sites.items() if site == "north" and name != "cam-3")[0]
    own = {hour.hour: hour.values[column] for hour in DriftRecords(store).hours([other], hours[0], hours[-1])}
    at = 5
    rows, steps = np.array([model.row_of[other]]), np.array([hours[at] * 12 + 6])
    values = np.full((1, model.profiles.mean.shape[2]), own[hours[at]])
    z = float(profile.deviations(rows, steps, values)[0, column])
    assert (series.others[0][at] - series.usual[at]) / series.spread[at] == pytest.approx(z, abs=1e-6)


def test_hours_are_means_and_maxima_of_their_steps() -> None:
    """Against what each single step left behind."""
    model = Model("d", tuple(sorted(LABELS)))
    model.add(["a", "b"])
    scripts = Scripts.stable(2)
    scripts.kind[1], scripts.strength[1], scripts.start[1] = "dirt", 5.0, 430.0
    tuning = Tuning(profile_days=0.7, calibration_days=0.4)
    values, ratios = defaultdict(list), defaultdict(list)
    for day, one in enumerate(days(scripts, 2)):
        for step in range(288):
            number = day * 288 + step + 4  # so that hours and days of the simulation do not fall together
            sums = one.sums[step]
            model.advance(np.array([0, 1]), np.array([number, number]), sums, tuning)
            for row in (0, 1):
                values[number // 12, row].append(measure(sums)[row])
                ratios[number // 12, row].append(model.ratios()[row])
    kept = {(hour.hour, model.row_of[hour.device]): hour for hour in model.hours}
    kept |= {(hour.hour, model.row_of[hour.device]): hour for hour in model.present_hours(np.array([0, 1]))}
    assert set(kept) == set(values)
    assert max(hour.charts.max() for hour in kept.values()) > 1.0
    for key, hour in kept.items():
        assert hour.values == pytest.approx(
            np.ma.masked_invalid(values[key]).mean(axis=0).filled(np.nan), rel=1e-3, abs=1e-4, nan_ok=True
        )
        highest = np.max(ratios[key], axis=0)
        by_measure = [max(highest[6 * n : 6 * n + 6]) for n in range(SCALARS)]
        assert hour.charts == pytest.approx([*by_measure, highest[-1]], rel=1e-5, abs=1e-6)


def test_hours_survive_restarts_and_expire_on_every_store(url: str) -> None:
    at = [BEGIN]
    with Store(url) as store:
        monitor = Monitor(store, TUNING, clock=lambda: at[0])
        for number, (arrival, batch) in enumerate(batches(NAMES[:2], Scripts.stable(2), 1)):
            at[0] = BEGIN + arrival
            for half in (batch[:9], batch[9:]):  # restarts in the midst of an hour
                store.add(Batch(at[0], half))
                at[0] += 1.0
                monitor.turn(settle_s=0)
                if number % 3 == 0:
                    monitor = Monitor(store, TUNING, clock=lambda: at[0])
        at[0] += 600
        monitor.catch_up()
        first = int(BEGIN // 3600)
        records = DriftRecords(store)
        kept = {one.hour: one for one in records.hours(["cam-2"], first, first + 23)}
        (now,) = monitor.models["0123456789ab"].present_hours(np.array([1]))
        kept[now.hour] = now
        expected = hourly(store, "cam-2", lambda window: sum(window.confidence_sum.values()) / window.frames)
        assert {hour: one.values[0] for hour, one in kept.items()} == pytest.approx(expected, rel=1e-5)
        assert records.hours(["cam-2", "nobody"], first + 3, first + 4)[0].hour == first + 3
        expire(store, now=BEGIN + 30 * DAY + 5 * 3600)
        assert min(one.hour for one in records.hours(NAMES, 0, first + 23)) == first + 5


def test_a_store_and_states_from_before_hours_were_kept_go_on(url: str) -> None:
    with Store(url) as store:
        _, batch = next(batches(NAMES[:2], Scripts.stable(2), 1))
        store.add(Batch(BEGIN + 3600, batch))
        Monitor(store, TUNING, clock=lambda: BEGIN + 3700).catch_up()
        with store.begin() as connection:
            connection.execute(text("DROP TABLE drift_hours"))
            connection.execute(text("UPDATE eyas_store SET version = 6"))
            rows = connection.execute(text("SELECT device, state FROM drift_devices")).all()
            assert len(rows) == 2
            for device, state in rows:
                shorter = bytes(state)[: 4 * WIDTH_WITHOUT_HOURS]
                values = {"state": shorter, "device": device}
                connection.execute(text("UPDATE drift_devices SET state = :state WHERE device = :device"), values)
    with Store(url) as store:
        with store.reading() as connection:
            assert connection.execute(text("SELECT version FROM eyas_store")).scalar_one() == VERSION
        monitor = Monitor(store, TUNING, clock=lambda: BEGIN + 3700)
        monitor.load()
        model = monitor.models["0123456789ab"]
        assert model.rows.shape == (2, WIDTH)
        assert model.view("seen").tolist() == [12.0, 12.0] and model.view("hour").tolist() == [-1.0, -1.0]
        assert of_device(monitor, DriftRecords(store), "cam-1", BEGIN + 3700) is None


def test_the_page_shows_the_fleet_and_its_alarm(followed: tuple[Store, Monitor]) -> None:
    page = render(*followed, NOW)
    alarm = followed[1].alarms["cam-7"]
    assert "1 of 20 devices drifts" in page and "10 devices, 1 confirmed" in page
    assert f'<section id="alarm-{alarm.id}" class="alarm">' in page
    for part in ("Dirty, moved or defocused lens", "<code>eyas send cam-7 snapshot</code>", "this device alone"):
        assert part in page
    assert "blind to new objects" in page  # the caveat of the estimated accuracy
    assert Tags(page).tags.count("svg") == 1
    assert "http" not in page.replace("http-equiv", "")
    assert Tags(render(*followed, NOW, site="south")).tags.count("svg") == 0


def test_an_alarm_that_closed_stays_a_week(tmp_path: Path, fleet: str) -> None:
    with Store(copy_of(fleet, tmp_path)) as store:
        monitor = Monitor(store, TUNING, clock=lambda: NOW)
        monitor.forget("cam-7")
        page = render(store, monitor, NOW)
        assert "No drift" in page and "what it reports was accepted as usual" in page
        svg = ET.fromstring(re.findall(r"<svg.*?</svg>", page, re.DOTALL)[0])
        assert len(points(of_class(svg, "value")[-1])) >= 70
        assert of_class(svg, "band")[-1].attrib["d"] == ""  # the profile of then is gone
        assert "accepted as usual" not in render(store, monitor, NOW + 8 * DAY)


def test_an_empty_fleet_and_one_that_begins(tmp_path: Path) -> None:
    with Store(f"sqlite:///{tmp_path / 'fleet.db'}") as store:
        monitor = Monitor(store, TUNING, clock=lambda: BEGIN + 4000)
        assert "No devices yet" in render(store, monitor, BEGIN)
        _, batch = next(batches(NAMES[:1], Scripts.stable(1), 1))
        store.add(Batch(BEGIN + 3600, batch))
        monitor.catch_up()
        page = render(store, monitor, BEGIN + 4000)
        assert "No device is watched yet" in page and "1 learning" in page
        write_plot(store, monitor, "cam-1", tmp_path / "cam-1.svg", BEGIN + 4000)
        svg = ET.parse(tmp_path / "cam-1.svg").getroot()
        space = "{http://www.w3.org/2000/svg}"
        assert [one.text for one in svg.iter(space + "title")] == ["confidence of cam-1"]
        (dot,) = [one.attrib["d"] for one in of_class(svg, "value")[1:]]
        assert dot.endswith("h0")  # one hour is a dot
        single = measure(next(days(Scripts.stable(1), 1)).sums[:12, 0])[:, 0].mean()
        (says,) = [one.text or "" for one in svg.iter(space + "desc")]
        assert f"At the end {single:.3g}." in says


def test_what_the_network_names_is_text_and_nothing_else(tmp_path: Path) -> None:
    label = '"><svg onload=alert(3)>'
    with Store(f"sqlite:///{tmp_path / 'fleet.db'}") as store:
        sums = next(days(Scripts.stable(1), 1)).sums
        for step in range(24):
            window = window_of("cam", step, sums[step, 0])
            counts = {label: window.frames}
            hostile = msgspec.structs.replace(
                window, device=HOSTILE, counts=counts, confidence_sum={label: 0.9 * window.frames}, confidence_bins={},
                model=f"{HOSTILE} 1", ood_reason=HOSTILE,
            )  # fmt: skip
            store.add(Batch(BEGIN + step * 300 + 290, [message(hostile, SITE)]))
        monitor = Monitor(store, TUNING, clock=lambda: BEGIN + 8000)
        monitor.catch_up()
        common = {"site": SITE, "model": f"{HOSTILE} 1", "digest": "0123456789ab", "since": BEGIN + 3600.0}
        alarm = Alarm(
            id=str(uuid.uuid4()), device=HOSTILE, leading=f"confidence of {label}, up", ood_reason=HOSTILE,
            changes=(Change(measure=f"confidence of {label}", deviations=1e9),), opened=BEGIN + 4000, cause="unknown",
            advice=f"look (`eyas send {HOSTILE} snapshot`)", by_chance=1.0, **common,
        )  # fmt: skip
        monitor.alarms[HOSTILE] = alarm
        found = Tags(render(store, monitor, BEGIN + 8000))
    assert not {"script", "img"} & set(found.tags)
    assert found.tags.count("svg") == 1 and found.tags.count("style") == 1
    assert not [name for name, _ in found.attributes if name.startswith("on") or name in ("src", "href")]
    assert HOSTILE in found.text and SITE in found.text and label in found.text


def test_further_alarms_and_sites_are_counted(followed: tuple[Store, Monitor], monkeypatch: pytest.MonkeyPatch) -> None:
    store, monitor = followed
    for name in ("cam-2", "cam-12"):
        alarm = msgspec.structs.replace(
            monitor.alarms["cam-7"], device=name, id=name, site=monitor.sites[name], e_value=1.0
        )
        monitor.alarms[name] = alarm
    for name, value in {"MAX_SECTIONS": 1, "MAX_ROWS": 1, "MAX_SITES": 1}.items():
        monkeypatch.setattr(pages, name, value)
    page = render(store, monitor, NOW)
    assert page.count('class="alarm"') == 1 and 'id="alarm-cam-2"' not in page
    assert "<bdi>cam-12</bdi>" in page and "<bdi>cam-2</bdi>" not in page
    assert "and 1 more: <code>eyas drift</code>" in page and "and 1 more sites." in page and "2 sites" in page


def test_the_verb_writes_page_and_plot(tmp_path: Path, fleet: str) -> None:
    url = copy_of(fleet, tmp_path)
    files = ("--page", tmp_path / "new" / "drift.html", "--plot", tmp_path / "cam-7.svg")
    done = eyas(tmp_path, "drift", "cam-7", "--store", url, *LEARNING, *files)
    assert done.code == 0
    assert "<!doctype html>" in (tmp_path / "new" / "drift.html").read_text()
    assert ET.parse(tmp_path / "cam-7.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    done = eyas(tmp_path, "drift", "cam-7", "cam-8", "--store", url, *LEARNING, "--plot", "x.svg")
    assert (done.code, "--plot: one device is needed" in done.err) == (2, True)
    with Store(f"sqlite:///{tmp_path / 'empty.db'}"):
        pass
    done = eyas(tmp_path, "drift", "cam-7", "--store", "sqlite:///empty.db", "--plot", "x.svg")
    assert done.code == 2 and "cam-7: the store has nothing to draw of it yet" in done.err
    done = eyas(tmp_path, "drift", "--store", url, *LEARNING, "--page", "/")
    assert done.code == 2 and "/: cannot be written (Is a directory)" in done.err
    (tmp_path / "file").write_text("")
    done = eyas(tmp_path, "drift", "--store", url, *LEARNING, "--page", tmp_path / "file" / "page.html")
    assert done.code == 2 and "Traceback" not in done.err


@pytest.mark.parametrize(
    ("per_month", "words"),
    [
        (2.0, "2 times in 30 days"),
        (0.1, "once in 10 months"),
        (0.001, "once in 82 years"),
        (0.0, "less than once in a million years"),
    ],
)
def test_rarity_in_words(per_month: float, words: str) -> None:
    assert rarity(per_month) == words


@pytest.mark.parametrize("low,high", [(0.0, 1.0), (0.71, 0.98), (-3e5, 2e6), (0.5, 0.5001), (-1e-9, 1e-9)])
def test_ticks_are_some_round_numbers_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 3 <= len(found) <= 6
    assert all(low - 1e-12 <= one <= high + 1e-12 for one in found)
    assert all(len(f"{one:.6g}".strip("-0.").replace(".", "").rstrip("0")) <= 6 for one in found)
