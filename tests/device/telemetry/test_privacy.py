"""Images that may leave a device: which, how many, and how they are processed."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import cv2
import numpy as np
import pytest

from eyas_device.bundle import Governance, Manifest
from eyas_device.config import PrivacySection
from eyas_device.predict import Prediction
from eyas_device.preprocess import Pixels
from eyas_device.telemetry.privacy import MAX_JPEG, Policy, PrivacyError, encode_jpeg, process
from eyas_device.telemetry.spool.spool import Spool


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def spool() -> Iterator[Spool]:
    with Spool(None, device="d") as spool:
        yield spool


def predicted(confidence: float) -> Prediction:
    return Prediction("a", 0, confidence, False, np.array([confidence, 1 - confidence], np.float32), 1.0)


def image(width: int = 320, height: int = 240) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def manifest(images: str) -> Manifest:
    return cast(Manifest, SimpleNamespace(governance=Governance(images=images)))


def read(text: str) -> Pixels:
    return cv2.imdecode(np.frombuffer(base64.b64decode(text), np.uint8), cv2.IMREAD_COLOR)


def test_by_default_nothing_is_chosen_and_no_image_leaves(spool: Spool) -> None:
    policy = Policy(PrivacySection(), chance=lambda: 0.0)
    assert [policy.choose(predicted(c / 10)) for c in range(11)] == [None] * 11
    assert policy.image(image(), spool) == ("", {"image": "none: privacy.images is off"})
    with pytest.raises(PrivacyError, match="no single prediction may leave"):
        policy.request_event("id", 60.0)
    assert policy.choose(predicted(0.5)) is None


def test_disagreements_are_asked_for_and_share_the_time_between_events() -> None:
    clock = Clock()
    asked = Policy(PrivacySection(events=True, disagreements=True, band=(0.0, 0.6), min_interval_s=10.0), clock=clock)
    assert asked.choose_disagreement() and not asked.choose_disagreement()
    assert asked.choose(predicted(0.5)) is None, "an event was sent just now"
    clock.now += 10
    assert asked.choose(predicted(0.5)) == "uncertain" and not asked.choose_disagreement()
    for rules in (PrivacySection(disagreements=True), PrivacySection(events=True)):
        assert not Policy(rules).choose_disagreement(), "no event leaves, or none of this kind is asked for"


@pytest.mark.parametrize(
    ("rules", "governance", "image"),
    [
        (PrivacySection(events=True), "allowed", "none: privacy.images is off"),
        (PrivacySection(images=True), "allowed", "included"),
        (PrivacySection(images=True, min_interval_s=1e9, sample_rate=1.0), "allowed", "included"),
        (PrivacySection(images=True), "never", "none: the model's governance says never"),
        (PrivacySection(images=True), "a word of tomorrow", "none: the model's governance says never"),
    ],
)
def test_each_requested_event_comes_once(rules: PrivacySection, governance: str, image: str) -> None:
    policy = Policy(rules)
    policy.use_model(manifest(governance))
    sampled = policy.choose(predicted(0.5))
    assert sampled == ("sampled" if rules.sample_rate else None), "and the interval begins"
    assert [policy.request_event(command, 60.0) for command in "abc"] == [image] * 3
    assert [policy.take_request() for _ in range(4)] == ["a", "b", "c", ""]
    assert policy.choose(predicted(0.5)) is None


def test_requests_that_wait_are_bounded_and_expire() -> None:
    """A camera that delivers again hours later sends nothing that was asked for before."""
    clock = Clock()
    policy = Policy(PrivacySection(events=True), clock=clock)
    for _ in range(8):
        policy.request_event("id", 60.0)
    with pytest.raises(PrivacyError, match="8 earlier requests wait"):
        policy.request_event("id", 60.0)
    clock.now += 60
    policy.request_event("another", 1.0)
    assert [policy.take_request() for _ in range(2)] == ["another", ""]
    policy.request_event("late", 1.0)
    clock.now += 1
    assert policy.take_request() == ""


def test_events_by_confidence_band_chance_and_ood() -> None:
    clock, chances = Clock(), iter([0.5, 0.05, 0.05, 0.5, 0.5, 0.05])
    rules = PrivacySection(events=True, band=(0.4, 0.6), sample_rate=0.1, min_interval_s=0.0, ood=True)
    policy = Policy(rules, clock=clock, chance=lambda: next(chances))
    assert policy.choose(predicted(0.4)) == "uncertain"
    assert policy.choose(predicted(0.6)) == "sampled"
    assert policy.choose(predicted(0.4)) == "sampled", "the dice do not look at the prediction"
    assert policy.choose(predicted(0.6)) is None
    policy.ood = True
    assert policy.choose(predicted(0.9)) == "ood"
    assert policy.choose(predicted(0.9)) == "sampled"


@pytest.mark.parametrize("interval", [0.0, 30.0])
def test_the_accuracy_of_those_drawn_at_random_is_that_of_all(interval: float) -> None:
    """Uncertain predictions come in bursts and are wrong more often; neither may leave them out, nor their events."""
    clock, dice = Clock(), np.random.default_rng(3)
    rules = PrivacySection(
        events=True, sample_rate=0.02, band=(0.0, 0.6), disagreements=True, ood=True, min_interval_s=interval
    )
    policy = Policy(rules, clock=clock, chance=dice.random)
    right, drawn = [], []
    for frame in range(200_000):
        clock.now += 1.0
        hard = frame % 1000 < 300
        policy.ood = frame % 5000 < 1000
        policy.choose_disagreement() if hard and dice.random() < 0.2 else None
        right.append(bool(dice.random() < (0.5 if hard else 0.98)))
        if policy.choose(predicted(0.5 if hard else 0.95)) == "sampled":
            drawn.append(right[-1])
    accuracy = float(np.mean(right))
    deviation = np.sqrt(accuracy * (1 - accuracy) / len(drawn))
    assert len(drawn) > 2000 and abs(np.mean(drawn) - accuracy) < 3 * deviation, (np.mean(drawn), accuracy)


def test_a_quarter_of_the_images_is_kept_for_those_drawn_at_random(spool: Spool) -> None:
    """A bad hour would use up the day's images, and the rest of the day would not count."""
    policy = Policy(PrivacySection(images=True, sample_rate=0.1, max_images_per_day=10))
    assert [bool(policy.image(image(8, 8), spool, "uncertain")[0]) for _ in range(8)] == [True] * 7 + [False]
    assert "only 10 a day are allowed, 7 of them for others" in policy.image(image(), spool, "ood")[1]["image"]
    assert [bool(policy.image(image(8, 8), spool, "sampled")[0]) for _ in range(4)] == [True] * 3 + [False]


def test_at_most_one_event_per_interval() -> None:
    clock = Clock()
    policy = Policy(PrivacySection(events=True, sample_rate=1.0, min_interval_s=60.0), clock=clock)
    assert policy.choose(predicted(0.9)) == "sampled"
    clock.now += 59
    assert policy.choose(predicted(0.9)) is None
    clock.now += 2
    assert policy.choose(predicted(0.9)) == "sampled"


def test_an_image_is_processed_as_its_policy_states(spool: Spool) -> None:
    policy = Policy(
        PrivacySection(images=True, max_side=100, crop=(0.5, 0.0, 0.5, 1.0), retention_days=7, training=True)
    )
    text, image_policy = policy.image(image(), spool)
    assert read(text).shape == (100, 67, 3)
    assert image_policy == {
        "width": 67,
        "height": 100,
        "crop": [0.5, 0.0, 0.5, 1.0],
        "blur": "none",
        "quality": 85,
        "retention_days": 7,
        "training": True,
    }


def test_a_model_may_forbid_images_and_the_next_may_not(spool: Spool) -> None:
    policy = Policy(PrivacySection(images=True))
    policy.use_model(manifest("never"))
    assert policy.image(image(), spool)[0] == ""
    assert "governance" in policy.image(image(), spool)[1]["image"]
    policy.use_model(manifest("allowed"))
    assert policy.image(image(), spool)[0]


def test_the_quota_of_a_day(spool: Spool) -> None:
    policy = Policy(PrivacySection(images=True, max_images_per_day=3))
    assert [bool(policy.image(image(8, 8), spool)[0]) for _ in range(5)] == [True] * 3 + [False] * 2
    assert not Policy(PrivacySection(images=True, max_images_per_day=0)).image(image(), spool)[0]


def test_a_frame_that_cannot_be_decoded_uses_up_nothing(spool: Spool) -> None:
    policy = Policy(PrivacySection(images=True, max_images_per_day=1))
    assert policy.image(None, spool)[0] == ""
    assert policy.image(image(), spool)[0]


def test_a_crop_removes_the_rest() -> None:
    pixels = np.zeros((200, 300, 3), np.uint8)
    pixels[:, :150] = 255
    left = process(pixels, crop=(0.5, 0.0, 0.5, 1.0), max_side=1000, blur="none")
    assert left.shape == (200, 150, 3)
    assert left.max() == 0


def test_a_blurred_image_has_sixteen_blocks_at_most() -> None:
    blurred = process(image(640, 480), crop=(), max_side=320, blur="whole")
    assert blurred.shape == (240, 320, 3)
    assert len({tuple(row) for row in blurred.reshape(-1, 3).tolist()}) <= 16 * 12


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (7, 3)])
@pytest.mark.parametrize("crop", [(), (0.999, 0.999, 0.001, 0.001), (0.0, 0.0, 1.0, 1.0)])
def test_tiny_and_thin_images(size: tuple[int, int], crop: Any) -> None:
    left = process(image(*size), crop=crop, max_side=16, blur="whole")
    assert left.size and max(left.shape) <= 16
    assert encode_jpeg(left)[0]


def test_noise_is_encoded_more_coarsely_or_not_at_all() -> None:
    data, quality = encode_jpeg(image(640, 480))
    assert len(data) <= MAX_JPEG and quality < 85
    assert encode_jpeg(image(4000, 3000)) == (b"", 0)
