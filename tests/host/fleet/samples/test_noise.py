"""Labels that may be wrong: planted mistakes are found far above chance, and no model chooses who judges it again."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import cv2
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eyas_host.fleet.samples.noise import NoiseCheck, find_noise, objections, render
from eyas_host.fleet.samples.records import OBJECTION, Sample, SampleError, samples, say, undo
from eyas_host.fleet.samples.rules import labels_of, verdicts
from eyas_host.fleet.store.database import Store
from tests.host.fleet.samples.test_samples import NOW, SPOOL, key, said, sent, stored
from tests.support.inside import eyas
from tests.support.shapes import draw_shape

SHAPES = ("circle", "cross", "triangle")


@cache
def drawn(label: str, number: int) -> str:
    """A shape on a piece of a photograph as JPEG in base64."""
    return encoded(draw_shape(label, number))


def encoded(pixels: npt.NDArray[np.uint8], quality: int = 90) -> str:
    _, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return base64.b64encode(data.tobytes()).decode()


def labelled(number: int, label: str, person: str = "anna", **fields: object) -> Sample:
    return Sample(event=sent(number, **fields), site="hall", said=(said(label, person),))


def planted(true: Sequence[str], rate: float, seed: int) -> list[str]:
    """The labels, of which a share is another class, drawn at random."""
    rng, names, labels = np.random.default_rng(seed), sorted({*true}), list(true)
    for index in rng.choice(len(true), round(rate * len(true)), replace=False):
        labels[index] = str(rng.choice([name for name in names if name != true[index]]))
    return labels


def rates(check: NoiseCheck, true: Sequence[str], labels: Sequence[str]) -> tuple[float, float]:
    """Precision and recall of what is listed."""
    wrong = {number for number, (one, other) in enumerate(zip(true, labels, strict=True)) if one != other}
    listed = {suspect.sample.event.sequence for suspect in check.suspects}
    return len(listed & wrong) / max(len(listed), 1), len(listed & wrong) / len(wrong)


@pytest.mark.parametrize(("rate", "precision", "recall"), [(0.05, 0.15, 0.6), (0.2, 0.35, 0.6)])
def test_wrong_labels_of_images_are_found_far_above_chance(rate: float, precision: float, recall: float) -> None:
    """By chance, as much of what is listed is wrong as of all labels."""
    true = [label for label in SHAPES for _ in range(80)]
    labels = planted(true, rate, seed=1)
    found = find_noise(
        [labelled(n, label, image=drawn(true[n], n % 80)) for n, label in enumerate(labels)], now=NOW + 500
    )
    assert (found.basis, found.checked) == ("images", 240)
    assert rates(found, true, labels)[0] >= precision and rates(found, true, labels)[1] >= recall
    first = msgspec.structs.replace(found, suspects=found.suspects[: round(rate * 120)])
    assert rates(first, true, labels)[0] >= 2.5 * rate, "the most suspicious ones come first"


def predicted(true: Sequence[str], names: Sequence[str], seed: int, strength: float = 3.0) -> npt.NDArray[np.float64]:
    """Probabilities of a model that is right most of the time, [samples, classes]."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(len(true), len(names)))
    logits[np.arange(len(true)), [names.index(label) for label in true]] += strength
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def by_model(true: Sequence[str], labels: Sequence[str], seed: int = 0) -> NoiseCheck:
    names = sorted({*true, *labels})
    rows = [
        labelled(number, label, image="", top=dict(zip(names, map(float, row), strict=True)), digest="a" * 12)
        for number, (label, row) in enumerate(zip(labels, predicted(true, names, seed), strict=True))
    ]
    return find_noise(rows, now=NOW, basis="model")


@pytest.mark.parametrize(("rate", "precision", "recall"), [(0.05, 0.5, 0.6), (0.2, 0.7, 0.8)])
def test_wrong_labels_are_found_by_what_devices_predicted(rate: float, precision: float, recall: float) -> None:
    true = [label for label in SHAPES for _ in range(200)]
    labels = planted(true, rate, seed=2)
    found = rates(by_model(true, labels), true, labels)
    assert found[0] >= precision and found[1] >= recall


def test_a_class_of_one_in_a_hundred_is_not_taken_for_a_mistake() -> None:
    """10 of 1,000 are positive; as many negatives are labelled so, and two positives are missed."""
    true = ["no"] * 990 + ["yes"] * 10
    labels = list(true)
    labels[:10], labels[-2:] = ["yes"] * 10, ["no"] * 2
    found = by_model(true, labels, seed=4)
    listed = {one.sample.event.sequence for one in found.suspects}
    assert len(listed & {*range(10)}) >= 8, "half of what is labelled positive is not"
    assert len(listed & {*range(990, 998)}) <= 2, "and half of it is"
    assert {998, 999} <= listed and len(listed) < 60


def test_a_class_with_two_labels_is_left_out_by_images_and_looked_at_by_the_model() -> None:
    rows = [labelled(n, SHAPES[n % 2], image=drawn(SHAPES[n % 2], n), top={"circle": 0.9}) for n in range(60)]
    rows += [labelled(100 + n, "triangle", image=drawn("triangle", n), top={"circle": 0.98}) for n in range(2)]
    found = find_noise(rows, now=NOW + 500)
    assert found.checked == 60 and found.left_out == {"a class with fewer than 5 labels": 2}
    assert all(one.given != "triangle" and one.suggested != "triangle" for one in found.suspects)
    few = find_noise(rows[-2:] + rows[:8], now=NOW + 500, classes={"": (*SHAPES, "ring")})
    assert (few.basis, few.checked) == ("model", 10) and "50 of two are needed" in few.why
    for rows_ in (rows[:1], rows[-2:], []):
        with pytest.raises(SampleError, match="labels of two classes, 5 images of each, are needed"):
            find_noise(rows_, now=NOW, basis="images")
        assert find_noise(rows_, now=NOW, basis="model").suspects == ()


def test_copies_of_an_image_do_not_vouch_for_its_label() -> None:
    """One camera sends nearly the same image six times, and somebody labels all six wrong."""
    rows = [labelled(n, SHAPES[n % 3], image=drawn(SHAPES[n % 3], n)) for n in range(240)]
    copies = [labelled(500 + n, "cross", image=encoded(draw_shape("circle", 900), 60 + 6 * n)) for n in range(6)]
    found = find_noise([*rows, *copies], now=NOW + 900)
    listed = [one for one in found.suspects if one.sample.event.sequence >= 500]
    assert len(listed) == 6 and {one.suggested for one in listed} == {"circle"}


def test_a_rare_class_in_one_burst_of_a_camera_is_not_judged_by_classifiers_that_never_saw_it() -> None:
    """Eight nearly equal images are one group: whoever predicts one of them was trained on none, and gives it 0."""
    rows = [labelled(n, SHAPES[n % 2], image=drawn(SHAPES[n % 2], n)) for n in range(100)]
    burst = [labelled(500 + n, "triangle", image=encoded(draw_shape("triangle", 900), 60 + 5 * n)) for n in range(8)]
    found = find_noise([*rows, *burst], now=NOW + 900)
    assert (found.checked, found.left_out) == (100, {"all others of its class look like it": 8})
    assert all(one.given != "triangle" for one in found.suspects)


def test_a_camera_that_sees_one_thing_only_is_looked_at_by_the_model() -> None:
    rows = [
        labelled(n, SHAPES[n % 2], image=encoded(draw_shape("circle", 7), 40 + n), top={"circle": 0.9, "cross": 0.1})
        for n in range(55)
    ]
    with pytest.raises(SampleError, match="all 55 look alike, and none can judge another"):
        find_noise(rows, now=NOW + 900)
    assert find_noise(rows, now=NOW + 900, basis="model").checked == 55


def test_of_an_image_that_is_sent_again_the_first_prediction_counts() -> None:
    """A later model may have been trained on it."""
    true = ["circle"] * 20 + ["cross"] * 20
    rows = [labelled(n, label, image=drawn(label, n), top={label: 0.9}) for n, label in enumerate(true)]
    wrong = labelled(50, "cross", image=drawn("circle", 99), top={"circle": 0.95})
    again = msgspec.structs.replace(wrong, event=sent(60, image=drawn("circle", 99), top={"cross": 1.0}), said=())
    found = find_noise([*rows, again, wrong], now=NOW + 500, basis="model", classes={"": ("circle", "cross")})
    assert [one.sample.event.sequence for one in found.suspects] == [50] and found.left_out["the same image again"] == 1


def test_a_model_does_not_choose_which_of_its_judges_are_looked_at_again() -> None:
    wrong = {"image": "", "top": {"circle": 0.99, "cross": 0.01}}
    rows = [labelled(n, "circle", **wrong) for n in range(9)]
    judges = [labelled(20, "cross", why="sampled", **wrong), labelled(21, "cross", why="disagreement", **wrong)]
    others = [
        labelled(30, "cross", **wrong),
        labelled(31, "new", **wrong),
        labelled(32, "cross", image="", top={}),
    ]
    found = find_noise([*rows, *judges, *others], now=NOW, basis="model")
    assert [one.sample.event.sequence for one in found.suspects] == [30]
    assert found.left_out == {
        "judges the model itself: only --by images may look at it": 2,
        "a class that its model does not have": 1,
        "no probabilities from the device": 1,
    }


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(4, 60), st.floats(0, 0.5))
def test_as_many_as_the_confident_joint_has_off_its_diagonal(seed: int, classes: int, count: int, rate: float) -> None:
    """The paper's counts in plain Python: at least its class's mean confidence, the largest of those."""
    rng = np.random.default_rng(seed)
    names = [f"c{number}" for number in range(classes)]
    true = names + [str(name) for name in rng.choice(names, count)]
    labels = names + planted(true, rate, seed)[classes:]
    probabilities = predicted(true, names, seed)
    thresholds = [
        np.mean([row[k] for row, label in zip(probabilities, labels, strict=True) if label == name])
        for k, name in enumerate(names)
    ]
    off = 0
    for row, label in zip(probabilities, labels, strict=True):
        confident = [k for k in range(classes) if row[k] >= thresholds[k] - 1e-6]
        if confident and names[max(confident, key=lambda k: float(row[k]))] != label:
            off += names[int(row.argmax())] != label
    own = [
        (float(row[names.index(one)]), int(row.argmax()), one) for row, one in zip(probabilities, labels, strict=True)
    ]
    least = [p for p, best, label in sorted(own)[:off] if names[best] != label]
    assert [one.probability for one in by_model(true, labels, seed).suspects] == pytest.approx(least)


def test_an_objection_waits_for_a_second_person_and_can_be_taken_back(url: str) -> None:
    tops = {"top": {"good": 0.97, "crack": 0.03}}
    with stored(url, [sent(n, label="good", **tops) for n in range(12)]) as store:
        say(store, [(key(n), said("crack" if n in (3, 4, 5) else "good")) for n in range(12)])

        def check() -> NoiseCheck:
            return find_noise(samples(store), now=NOW + 50, basis="model")

        assert {one.sample.event.sequence for one in check().suspects} == {3, 4, 5}
        assert {(one.given, one.suggested, one.people) for one in check().suspects} == {("crack", "good", ("anna",))}
        assert say(store, objections(check(), now=NOW - 9)) == 3
        states = {k[2]: one.state for k, one in verdicts(samples(store)).items()}
        assert {n for n, state in states.items() if state == "disputed"} == {3, 4, 5}
        assert check().suspects == () and say(store, objections(check(), now=NOW - 9)) == 0, "it asks once"

        say(store, [(key(3), said("crack"))])
        assert key(3) not in labels_of(samples(store)), "who gave it cannot just repeat it"
        say(store, [(key(3), said("crack", "bert")), (key(4), said("good"))])
        assert labels_of(samples(store))[key(3)] == "crack" and labels_of(samples(store), people=2) == {
            key(3): "crack"
        }, "the objection is nobody's word"
        assert labels_of(samples(store))[key(4)] == "good", "the first person saw the mistake"
        assert check().suspects == () and check().left_out["looked at again since an earlier check"] == 2
        say(store, [(key(5), said("good", "bert"))])
        assert verdicts(samples(store))[key(5)].state == "disputed", "now two people disagree"

        assert {one for one, _ in undo(store, OBJECTION, now=NOW + 90, count=9)} == {key(3), key(4), key(5)}
        assert labels_of(samples(store))[key(3)] == "crack"


def test_the_verb_lists_asks_and_shows(tmp_path: Path) -> None:
    store = ("--store", "sqlite:///fleet.db")
    tops = {"top": {"good": 0.97, "crack": 0.03}}
    with stored(f"sqlite:///{tmp_path}/fleet.db", [sent(n, label="good", **tops) for n in range(12)]) as opened:
        say(opened, [(key(n), said("crack" if n == 3 else "good")) for n in range(12)])
    done = eyas(tmp_path, "samples", "check", "--queue", *store)
    assert done.code == 1, done.err
    assert f"cam-1 {SPOOL} 3  anna: crack 0.03, suggested: good 0.97\n" in done.out
    assert "by model: 11 images of classes with 5 labels or more; 50 of two are needed" in done.out
    assert "12 labels, 1 of which may be wrong: samples-check.html; 1 now wait for a second person" in done.out
    page = tmp_path / "samples-check.html"
    assert page.stat().st_mode & 0o777 == 0o600 and f"cam-1--{SPOOL}--3.jpg" in page.read_text()
    assert "data:image/jpeg;base64," in page.read_text() and "<script" not in page.read_text()
    row = json.loads(eyas(tmp_path, "samples", "queue", "--json", *store).out)
    assert row["sequence"] == 3 and "good" not in json.dumps(row["said"]), "the second person sees no suggestion"
    assert eyas(tmp_path, "samples", "check", *store).code == 0
    undone = eyas(tmp_path, "samples", "undo", "--person", OBJECTION, *store)
    assert undone.out == "cam-1 3: ? is taken back\n"
    assert json.loads(eyas(tmp_path, "samples", "check", "--json", *store).out)["suggested"] == "good"
    for words, reason in (
        (("--by", "magic"), "images or model is possible"),
        (("--by", "images"), "two classes"),
        (("--queue", "--page", "none/page.html"), "--page none/page.html: cannot be written (No such file"),
        (("--queue", "--page", "."), "--page .: cannot be written (Is a directory)"),
    ):
        wrong = eyas(tmp_path, "samples", "check", *words, *store)
        assert wrong.code == 2 and reason in wrong.err and "Traceback" not in wrong.err
    with Store(f"sqlite:///{tmp_path}/fleet.db") as opened:
        assert "disputed" not in {one.state for one in verdicts(samples(opened)).values()}, "nobody has seen the page"


def test_an_image_that_may_not_be_kept_is_neither_looked_at_nor_shown() -> None:
    late = {"image_policy": {"retention_days": 1}, "top": {"good": 1.0}}
    rows = [labelled(n, "crack" if n == 3 else "good", image=drawn("circle", n), **late) for n in range(9)]
    found = find_noise(rows, now=NOW + 3 * 86400, basis="model", classes={"": ("crack", "good")})
    assert len(found.suspects) == 1 and "data:image" not in render(found, now=NOW + 3 * 86400)
    assert "data:image" in render(found, now=NOW + 3600)
    with pytest.raises(SampleError, match="there are 0 of 0"):
        find_noise(rows, now=NOW + 3 * 86400, basis="images")
