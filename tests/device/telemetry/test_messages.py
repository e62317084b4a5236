"""The messages: read leniently, merged rightly, of a stated size, and as the schema and the page describe them."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eyas_device.telemetry.messages
from eyas_device.config import COMMANDS
from eyas_device.predict import Prediction
from eyas_device.support.histogram import LogHistogram
from eyas_device.telemetry.aggregate import WindowAggregator, uncertainty
from eyas_device.telemetry.messages import (
    CONFIDENCE_EDGES,
    GROWTH,
    KINDS,
    Ack,
    Command,
    Event,
    Health,
    Sketch,
    Window,
    decode,
    encode,
    json_schema,
    merge,
)
from tests.support.paths import ROOT

SCHEMA = Path(eyas_device.telemetry.messages.__file__).with_name("schema.json")
PAGE = ROOT / "docs" / "telemetry.md"
MESSAGES: tuple[type[msgspec.Struct], ...] = (*KINDS.values(), Ack, Command)
FUZZED = int(os.environ.get("EYAS_FUZZ", "3000"))

_count = st.integers(0, 1000)
_tenths = st.lists(_count, min_size=10, max_size=10).map(tuple)
_labels = st.sampled_from(["ok", "crack", "dirt"])
_bins = st.dictionaries(st.integers(0, 300), st.integers(1, 50), max_size=5)


@st.composite
def windows(draw: st.DrawFn) -> Window:
    n = draw(st.integers(0, 5))
    points = draw(st.lists(st.lists(st.floats(-5, 5), min_size=3, max_size=3), min_size=n, max_size=n))
    values = np.array(points).reshape(n, 3)
    sketch = Sketch()
    if n:
        mean = values.mean(axis=0)
        sketch = Sketch(n=n, mean=tuple(mean.tolist()), m2=tuple(((values - mean) ** 2).sum(axis=0).tolist()))
    bins, longest = draw(_bins), draw(st.floats(0.01, 1e4))
    return Window(
        device="d",
        spool="s",
        sequence=draw(st.integers(0, 10**6)),
        time=draw(st.floats(0, 2e9)),
        model="m",
        frames=draw(_count),
        seconds=float(draw(_count)),
        counts=draw(st.dictionaries(_labels, _count)),
        confidence_bins=draw(st.dictionaries(_labels, _tenths)),
        confidence_sum=draw(st.dictionaries(_labels, st.integers(0, 10**7).map(lambda n: n / 100))),
        confidence=draw(st.dictionaries(_labels, _tenths)),
        nonfinite=draw(_count),
        margin=draw(_tenths),
        entropy=draw(_tenths),
        sketch=sketch,
        latency_bins=bins,
        latency_ms=LogHistogram(GROWTH, bins=bins, max_ms=longest).summary(),
        temperature_c=draw(st.none() | st.floats(-20, 90)),
        throttled=draw(st.sampled_from([(), ("hot",), ("hot", "under-voltage")])),
        lost=draw(st.dictionaries(st.sampled_from(["merged", "event"]), _count)),
        merged=draw(st.integers(1, 9)),
    )


def near(a: object, b: object) -> bool:
    """Equal, but for the rounding of floats."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(near(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(near, a, b))
    return a == b


@settings(deadline=None)
@given(windows(), windows(), windows())
def test_windows_merge_in_any_order(a: Window, b: Window, c: Window) -> None:
    assert merge(a, b) == merge(b, a)
    left, right = msgspec.to_builtins(merge(merge(a, b), c)), msgspec.to_builtins(merge(a, merge(b, c)))
    assert near(left, right)
    both = merge(a, b)
    assert both.sequence == max(a.sequence, b.sequence)
    assert (both.frames, both.merged) == (a.frames + b.frames, a.merged + b.merged)
    assert sum(both.latency_bins.values()) == sum(a.latency_bins.values()) + sum(b.latency_bins.values())


@settings(deadline=None)
@given(st.lists(st.floats(0.02, 1e5), min_size=1, max_size=60), st.lists(st.floats(0.02, 1e5), min_size=1, max_size=60))
def test_quantiles_of_merged_windows_are_those_of_all_durations(a: list[float], b: list[float]) -> None:
    def window(values: list[float]) -> Window:
        histogram = LogHistogram(GROWTH)
        for value in values:
            histogram.add(value)
        return Window(latency_bins=dict(histogram.bins), latency_ms=histogram.summary())

    found, everything = merge(window(a), window(b)).latency_ms, sorted(a + b)
    for name, part in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        true = everything[math.ceil(part * len(everything)) - 1]
        assert found[name] == pytest.approx(true, rel=0.026, abs=0.001)
    assert found["max"] == pytest.approx(everything[-1], abs=0.001)


def test_merged_sketches_are_those_of_all_images() -> None:
    points = np.random.default_rng(1).normal(3, 2, (50, 4)).astype(np.float32)
    parts = []
    for part in (points[:7], points[7:30], points[30:]):
        aggregator = WindowAggregator()
        for point in part:
            aggregator.add_projection(point)
        parts.append(aggregator.window("m", "a", arm="", dropped=0, health=Health()))
    sketch = merge(merge(parts[0], parts[1]), parts[2]).sketch
    assert sketch.n == 50
    np.testing.assert_allclose(sketch.mean, points.mean(axis=0), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(np.array(sketch.m2) / 50, points.var(axis=0), rtol=1e-3)


@pytest.mark.parametrize(
    "other", [{"model": "n"}, {"digest": "0" * 12}, {"artefact": "b"}, {"arm": "B"}, {"device": "e"}]
)
def test_windows_of_different_origin_are_not_merged(other: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="cannot be merged"):
        merge(
            Window(device="d", model="m", artefact="a"),
            Window(**{"device": "d", "model": "m", "artefact": "a", **other}),
        )


def test_uncertainty_is_margin_and_normalised_entropy() -> None:
    assert uncertainty(np.array([0.25, 0.25, 0.25, 0.25], np.float32)) == pytest.approx((0.0, 1.0), abs=1e-6)
    assert uncertainty(np.array([0.0, 1.0], np.float32)) == (1.0, 0.0)
    assert uncertainty(np.array([0.7, 0.3], np.float32)) == pytest.approx((0.4, 0.8813), abs=1e-3)


def busy(classes: int, frames: int, seed: int = 0, spread: float = 1.5) -> Window:
    """A window of a varied stream, as the reporter makes it."""
    rng = np.random.default_rng(seed)
    aggregator = WindowAggregator()
    for _ in range(frames):
        p = rng.dirichlet(np.full(classes, 0.5)).astype(np.float32)
        best = int(p.argmax())
        aggregator.add(
            Prediction(f"label-number-{best:02d}", best, float(p[best]), True, p, 1.0),
            float(rng.lognormal(3, spread)),
            float(rng.lognormal(4, spread)),
        )
    for _ in range(10):
        aggregator.add_projection(rng.normal(0, 1, 8).astype(np.float32))
    health = Health(
        camera="delivering",
        losses=3,
        ood_quantile=0.123,
        ood_images=600,
        ood_reason="darker than 99 % of the training images",
        temperature_c=61.25,
        throttled=("under-voltage",),
    )
    window = aggregator.window(
        "solar-cells 12.34.56", "litert-int8", digest="0" * 12, arm="B", dropped=1234, health=health
    )
    return msgspec.structs.replace(
        window,
        device="camera-" + "x" * 20,
        spool="0" * 36,
        sequence=10**6,
        time=1.7e9,
        uptime_s=1234567.891,
        boot="0" * 8,
        synchronised=True,
        lost={"merged": 12},
    )


@pytest.mark.parametrize("frames", [30, 3000, 30_000])
@pytest.mark.parametrize(("spread", "size"), [(0.1, 2560), (1.5, 4608)])
def test_a_window_of_ten_classes_has_its_size_at_any_frame_rate(frames: int, spread: float, size: int) -> None:
    """With the latencies of a steady board, and with the widest whose quantiles are kept."""
    assert len(encode(busy(10, frames, spread=spread))) <= size


def test_confidences_are_counted_on_the_logit_and_summed() -> None:
    """A good network's answers lie above 0.9, where tenths say nothing."""
    confidences = [0.31, 0.5, 0.95, 0.9701, 0.981, 0.9899, 0.9951, 0.9991, 1.0]
    aggregator = WindowAggregator()
    for confidence in confidences:
        aggregator.add(Prediction("ok", 0, confidence, False, np.array([0.9, 0.1], np.float32), 1.0), 1.0, 1.0)
    window = aggregator.window("m", "a", arm="", dropped=0, health=Health())
    inner = np.histogram(confidences, bins=[0, *CONFIDENCE_EDGES, 1])[0]
    assert window.confidence_bins == {"ok": tuple(inner.tolist())} == {"ok": (1, 1, 0, 0, 0, 2, 2, 0, 1, 2)}
    assert window.confidence_sum == {"ok": pytest.approx(sum(confidences), abs=0.006)}
    assert window.confidence == {}, "tenths are those of agents 0.1.0"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_prediction_that_is_no_number_is_counted_apart(value: float) -> None:
    aggregator = WindowAggregator()
    probabilities = np.array([0.9, 0.1], np.float32)
    aggregator.add(Prediction("ok", 0, value, True, probabilities, 1.0), 1.0, 1.0)
    aggregator.add(Prediction("ok", 0, 0.75, False, probabilities, 1.0), 1.0, 1.0)
    window = aggregator.window("m", "a", arm="", dropped=0, health=Health())
    assert (window.frames, window.nonfinite) == (2, 1)
    assert window.confidence_sum == {"ok": 0.75}
    assert window.confidence_bins == {"ok": (1, 0, 1, 0, 0, 0, 0, 0, 0, 0)}


def test_windows_of_old_and_new_agents_merge_without_mixing_their_bins() -> None:
    tenths, bins = (0,) * 9 + (30,), (0,) * 4 + (10, 10, 10, 0, 0, 0)
    old = Window(frames=30, confidence={"ok": tenths})
    new = Window(frames=30, confidence_bins={"ok": bins}, confidence_sum={"ok": 29.1})
    both = merge(old, new)
    assert (both.frames, both.confidence, both.confidence_bins) == (60, {"ok": tenths}, {"ok": bins})
    assert both.confidence_sum == {"ok": 29.1}


def test_an_event_without_its_image_takes_a_kilobyte() -> None:
    event = Event(
        device="d" * 64,
        spool="0" * 36,
        sequence=10**7,
        time=1.7e9,
        model="solar-cells 12.34.56",
        artefact="openvino-int8",
        arm="B",
        label="label-number-01",
        confidence=0.1234,
        margin=0.1234,
        entropy=0.1234,
        top={f"label-number-{n:02d}": 0.1234 for n in range(5)},
        why="ood",
        source="s" * 200,
        image_policy={"image": "none: privacy.images is off"},
    )
    assert len(encode(event)) <= 1024


@pytest.mark.parametrize("kind", MESSAGES)
def test_every_field_has_a_default_and_unknown_fields_are_ignored(kind: type[msgspec.Struct]) -> None:
    assert decode(b"{}", kind) == kind()
    assert decode(b'{"of_tomorrow": [1, {"a": 2}], "schema": 99}', kind) == kind(schema=99)
    assert decode(encode(kind()), kind) == kind()


def test_the_schema_file_is_what_the_code_says() -> None:
    assert SCHEMA.read_bytes() == json_schema(), "write json_schema() to device/eyas_device/telemetry/schema.json"
    tree = msgspec.json.decode(json_schema())
    assert {kind.__name__ for kind in MESSAGES} < set(tree["$defs"])


def test_the_page_names_every_message_and_command() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [kind.__name__ for kind in MESSAGES if f"| `{kind.__name__}` |" not in text] == []
    assert [name for name in COMMANDS if f"`{name}`" not in text] == []


def hostile(rng: random.Random) -> bytes:
    """Bytes of the network: noise, broken JSON, or a message with some values exchanged."""
    way = rng.randrange(4)
    if way == 0:
        return rng.randbytes(rng.randrange(60))
    if way == 1:
        return rng.choice([b"[" * 5000, b'{"a":' * 3000, b"null", b'"\xff"', b"1e999", b"{}x", b"", b'{"schema":1'])
    odd: list[Any] = [None, -1, 2**63, 1e308, "x", "\u0000", [], [[]], [[0, 2**62]], {}, {"a": [1]}, True, "é" * 9]
    kind = rng.choice(MESSAGES)
    fields = [field.name for field in msgspec.structs.fields(kind)]
    tree: dict[str, Any] = msgspec.to_builtins(kind(), str_keys=True)
    for _ in range(rng.randrange(1, 4)):
        tree[rng.choice(fields)] = rng.choice(odd)
    data = msgspec.json.encode(tree)
    return data[: rng.randrange(len(data))] if way == 3 else data


def test_hostile_bytes_are_a_message_or_a_decode_error() -> None:
    rng = random.Random(7)
    read = 0
    for _ in range(FUZZED):
        data = hostile(rng)
        for kind in MESSAGES:
            try:
                decode(data, kind)
                read += 1
            except msgspec.DecodeError:
                pass
    assert read > FUZZED // 4, "the hostile messages should not all be nonsense"
