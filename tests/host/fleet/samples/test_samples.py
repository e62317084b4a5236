"""Samples and what people say: nothing is lost, nothing counts twice, and no guess leads whoever labels."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eyas_device.telemetry.messages import Event, encode
from eyas_host.fleet.drift.causes import DIRTY, NEW_CLASS, SEASON, SHIFT
from eyas_host.fleet.samples.choose import choose, share_at_random, uncertainty
from eyas_host.fleet.samples.exchange import (
    label_studio,
    name_of,
    read_folders,
    read_label_studio,
    read_table,
    table,
    write_folders,
)
from eyas_host.fleet.samples.records import UNKNOWN, Said, Sample, SampleError, samples, say, undo
from eyas_host.fleet.samples.rules import labels_of, verdict, verdicts
from eyas_host.fleet.store.database import Batch, Store
from eyas_host.fleet.store.retention import Retention, expire
from eyas_host.fleet.store.validate import ValidMessage, validate
from tests.support.fleet_parts import event
from tests.support.inside import eyas

SPOOL = "0b7f9a1e-4a1c-4a41-9d11-2f6f7f3a1101"
NOW = 1_800_000_000.0
DAY = 86400.0
CLASSES = ("crack", "dirt", "good")


def jpeg(colour: int) -> str:
    """A JPEG of one colour, in base64."""
    _, data = cv2.imencode(".jpg", np.full((32, 32, 3), colour, np.uint8))
    return base64.b64encode(data.tobytes()).decode()


def sent(number: int, device: str = "cam-1", **fields: object) -> Event:
    """A sample that a device sent."""
    more = {"time": NOW + number, "image": jpeg(number * 7 % 256), **fields}
    return event(device, SPOOL, number, **more)


def stored(url: str, events: Sequence[Event]) -> Store:
    """A store with these samples."""
    store, valid = Store(url), []
    for one in events:
        checked = validate(f"eyas/hall/{one.device}/event", encode(one))
        assert isinstance(checked, ValidMessage), checked
        valid.append(checked)
    store.add(Batch(NOW + 1000, valid))
    return store


def said(label: str, person: str = "anna", **more: object) -> Said:
    return msgspec.convert({"label": label, "person": person, "at": NOW, **more}, Said)


def key(number: int, device: str = "cam-1") -> tuple[str, str, int]:
    return (device, SPOOL, number)


def test_what_is_said_is_stored_once_and_the_last_word_of_a_person_counts(url: str) -> None:
    with stored(url, [sent(1), sent(2)]) as store:
        assert say(store, [(key(1), said("crack")), (key(2), said("dirt"))], allowed=CLASSES) == 2
        assert say(store, [(key(1), said("crack"))]) == 0, "as before"
        assert say(store, [(key(1), said("good"))]) == 1
        assert labels_of(samples(store)) == {key(1): "good", key(2): "dirt"}
        assert [(one.label, one.person) for one in samples(store)[0].said] == [("good", "anna")]
        assert undo(store, "anna", now=NOW) == [(key(1), "good")]
        assert labels_of(samples(store))[key(1)] == "crack", "what was said before"
        assert undo(store, "bert", now=NOW) == []
        assert len(undo(store, "anna", now=NOW, count=9)) == 2
        assert labels_of(samples(store)) == {}
    with Store(url) as again:
        assert [one.said for one in samples(again)] == [(), ()]


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ((key(1), said("scratch")), "'scratch' is none of the classes crack, dirt, good"),
        ((key(9), said("crack")), "cam-1 0b7f9a1e 9: no such sample"),
        ((key(1, "cam-2"), said("crack")), "cam-2 0b7f9a1e 1: no such sample"),
        ((key(1), said("a\nb")), "is no label"),
        ((key(1), said("crack", person="")), "nobody is named"),
    ],
)
def test_of_words_with_a_mistake_nothing_is_stored(
    url: str, word: tuple[tuple[str, str, int], Said], reason: str
) -> None:
    with stored(url, [sent(1), sent(2)]) as store:
        with pytest.raises(SampleError, match=reason):
            say(store, [(key(2), said("crack")), word], allowed=CLASSES)
        assert labels_of(samples(store)) == {}


def test_labels_outlive_the_message_and_come_back_with_it(url: str) -> None:
    with stored(url, [sent(1)]) as store:
        say(store, [(key(1), said("crack"))])
        expire(store, Retention(events_days=1), now=NOW + 90 * DAY)
        assert samples(store) == []
    with stored(url, [sent(2)]) as store:
        assert [one.key for one in samples(store)] == [key(2)], "an expired one is not stored again"


_WORDS = st.lists(st.sampled_from(["a", "b", "c", UNKNOWN]), max_size=6)


@given(words=_WORDS, people=st.integers(1, 3))
def test_a_verdict_needs_enough_people_and_more_than_for_anything_else(words: list[str], people: int) -> None:
    sample = Sample(event=sent(1), site="hall", said=tuple(said(w, f"p{n}") for n, w in enumerate(words)))
    state, label = verdict(sample.said, people=people)
    counts = sorted((words.count(name) for name in "abc"), reverse=True)
    if state == "labelled":
        assert words.count(label) == counts[0] >= people and counts[0] > counts[1]
    else:
        assert label == "" and (counts[0] < people or counts[0] == counts[1])
    assert (state == "disputed") == (counts[0] == counts[1] > 0)
    if state in ("open", "unclear"):
        assert counts[0] == 0


def in_store(events: Sequence[Event]) -> list[Sample]:
    return [Sample(event=one, site="hall") for one in events]


def test_the_queue_begins_with_doubt_takes_no_two_alike_and_leaves_no_device_out() -> None:
    uncertain = [sent(n, margin=0.01, label="crack", image=jpeg(10), time=NOW) for n in range(20)]
    others = [sent(100 + n, device=f"cam-{2 + n}", margin=0.1, label="dirt", image=jpeg(60 * n)) for n in range(4)]
    sure = [sent(200 + n, device="cam-9", margin=0.99, label="good") for n in range(40)]
    queue = choose(in_store([*uncertain, *others, *sure]), 6, random_share=0.0)
    assert len({one.key for one in queue}) == 6
    assert {one.event.device for one in queue} >= {"cam-2", "cam-3", "cam-4", "cam-5"}, "alike ones wait"
    assert sum(one.event.device == "cam-1" for one in queue) <= 2
    assert uncertainty(queue[0]) == max(uncertainty(one) for one in queue)
    alone = choose(in_store(uncertain), 6, random_share=0.0)
    assert len(alone) == 6, "a quota keeps nobody waiting where there is nothing else"


def test_a_share_of_the_queue_is_drawn_at_random_from_what_devices_drew_at_random() -> None:
    events = [sent(n, why="sampled" if n % 2 else "uncertain", margin=0.9 if n % 2 else 0.1) for n in range(80)]
    queue = choose(in_store(events), 20, random_share=0.25, seed=3)
    drawn = [one.key for one in queue if one.is_random]
    assert len(queue) == 20 and len(drawn) == 5
    assert [one.key for one in choose(in_store(events), 20, random_share=0.25, seed=3)] == [one.key for one in queue]
    counts = np.zeros(80)
    for seed in range(300):
        for one in choose(in_store(events), 8, random_share=1.0, seed=seed):
            counts[one.event.sequence] += 1
    assert counts[::2].sum() == 0 and counts[1::2].min() > 30, "each of them, whatever its confidence"


def test_where_hard_ones_are_missing_the_random_ones_stay_random() -> None:
    """Whichever of them are labelled tell the accuracy: the least sure of them first would make it look worse."""
    margins = np.random.default_rng(0).uniform(0.1, 0.9, 40)
    for own in (margins, margins[::-1]):
        events = [sent(n, why="sampled", margin=float(margin)) for n, margin in enumerate(own)]
        few = [sent(100 + n, margin=0.01) for n in range(3)]
        queue = choose(in_store([*events, *few]), 20, random_share=0.25, seed=1)
        assert len(queue) == 20 and sum(not one.is_random for one in queue) == 3
        found = {one.event.sequence for one in queue if one.is_random}
        assert found == {one.event.sequence for one in choose(in_store(events), 17, random_share=1.0, seed=1)}


def test_folders_come_back_as_people_left_them(url: str, tmp_path: Path) -> None:
    with stored(url, [sent(n) for n in range(1, 5)]) as store:
        say(store, [(key(1), said("crack")), (key(2), said(UNKNOWN))])
        done = write_folders(samples(store), tmp_path / "out", now=NOW + DAY, every=True)
        assert done.images == 4 and {path.name for path in (tmp_path / "out").iterdir()} == {"crack", "unlabelled"}
        assert (tmp_path / "out/crack").joinpath(name_of(samples(store)[0])).stat().st_mode & 0o777 == 0o600
        (tmp_path / "out/dirt").mkdir()
        for number in (3, 1):
            name = f"cam-1--{SPOOL}--{number}.jpg"
            next((tmp_path / "out").glob(f"*/{name}")).rename(tmp_path / "out/dirt" / name)
        assert say(store, read_folders(tmp_path / "out", "bert", NOW)) == 2
        assert labels_of(samples(store)) == {key(3): "dirt"}, "anna and bert disagree on the first one"
        with pytest.raises(SampleError, match="is there already"):
            write_folders(samples(store), tmp_path / "out", now=NOW)
    (tmp_path / "out/good").mkdir()
    (tmp_path / "out/good" / f"cam-1--{SPOOL}--3.jpg").write_bytes(b"")
    with pytest.raises(SampleError, match="it lies in dirt, too"):
        read_folders(tmp_path / "out", "bert", NOW)
    (tmp_path / "out/good" / f"cam-1--{SPOOL}--3.jpg").rename(tmp_path / "out/good/holiday.jpg")
    with pytest.raises(SampleError, match="not exported by eyas samples"):
        read_folders(tmp_path / "out", "bert", NOW)


def test_an_image_is_given_out_no_longer_than_its_device_allowed(tmp_path: Path) -> None:
    found = in_store([sent(1, image_policy={"retention_days": 30}), sent(2), sent(3, image="")])
    found = [msgspec.structs.replace(one, said=(said("crack"),)) for one in found]
    assert write_folders(found, tmp_path / "soon", now=NOW + 29 * DAY).images == 2
    late = write_folders(found, tmp_path / "late", now=NOW + 31 * DAY)
    assert (late.images, late.left_out) == (1, {"may not be kept any longer": 1, "no image": 1})
    assert len(label_studio(found, now=NOW + 31 * DAY)) == 1


def test_a_table_is_what_the_accuracy_is_measured_on(url: str, tmp_path: Path) -> None:
    with stored(url, [sent(1, why="sampled", label="dirt"), sent(2)]) as store:
        say(store, [(key(1), said("crack")), (key(1), said("crack", "bert")), (key(2), said(UNKNOWN))])
        text = table(samples(store))
        [row] = list(csv.DictReader(StringIO(text)))
        assert (row["label"], row["predicted"], row["people"]) == ("crack", "dirt", "anna bert")
        (tmp_path / "labels.csv").write_text(text)
        assert [(k, one.label) for k, one in read_table(tmp_path / "labels.csv", "me", NOW)] == [(key(1), "crack")]
    (tmp_path / "bad.csv").write_text("device,spool,sequence,label\ncam-1,x,one,crack\n")
    with pytest.raises(SampleError, match=r"bad\.csv, line 2: sequence 'one'"):
        read_table(tmp_path / "bad.csv", "me", NOW)


def test_label_studio_sees_no_guess_where_the_accuracy_is_measured_and_its_people_come_back(
    url: str, tmp_path: Path
) -> None:
    with stored(url, [sent(1, why="sampled"), sent(2, label="dirt")]) as store:
        tasks = label_studio(samples(store), now=NOW)
        assert ["predictions" in task for task in tasks] == [False, True]
        assert tasks[1]["predictions"][0]["result"][0]["value"] == {"choices": ["dirt"]}
        image = base64.b64decode(tasks[0]["data"]["image"].partition("base64,")[2])
        assert cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR).shape == (32, 32, 3)
        for task, word in zip(tasks, ("crack", "good"), strict=True):
            result = [{"type": "choices", "value": {"choices": [word]}}]
            task["annotations"] = [{"completed_by": {"email": "cy@x"}, "lead_time": 2.5, "result": result}]
        (tmp_path / "export.json").write_text(json.dumps(tasks))
        assert say(store, read_label_studio(tmp_path / "export.json", "me", NOW), allowed=CLASSES) == 2
        first, second = samples(store)
        assert (first.said[0].label, first.said[0].person, first.said[0].seconds) == ("crack", "cy@x", 2.5)
        assert [one.said[0].guess_shown for one in (first, second)] == [False, True]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "no export of Label Studio"),
        ("[1]", "no export of Label Studio"),
        ('[{"data": {"device": "cam-1"}}]', "task 1: no device, spool and sequence"),
        ('[{"data": null}]', "task 1: no device"),
        (
            '[{"data": {"device": "c", "spool": "s", "sequence": 1}, "annotations": '
            '[{"result": [{"value": {"choices": ["a", "b"]}}]}]}]',
            "task 1: 2 choices, a, b",
        ),
    ],
)
def test_what_label_studio_did_not_write_is_named(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "export.json").write_text(text)
    with pytest.raises(SampleError, match=reason):
        read_label_studio(tmp_path / "export.json", "me", NOW)


def test_the_verbs_from_a_queue_to_labels_and_their_accuracy(tmp_path: Path) -> None:
    """One person labels, another one disagrees, and a mistake is a sentence."""
    store = ("--store", "sqlite:///fleet.db")
    with stored(f"sqlite:///{tmp_path}/fleet.db", [sent(1, why="sampled", label="dirt"), sent(2, margin=0.1)]):
        pass
    queued = eyas(tmp_path, "samples", "queue", *store)
    assert queued.code == 0 and "2 samples: 2 open" in queued.out
    assert f"cam-1 {SPOOL} 1\n" in queued.out, "the guess of a random one is hidden"
    assert "uncertainty 0.90" in queued.out
    rows = [json.loads(line) for line in eyas(tmp_path, "samples", "queue", *store, "--json").out.splitlines()]
    assert {row["sequence"]: row["predicted"] is None for row in rows} == {1: True, 2: False}
    for person, word in (("anna", "crack"), ("bert", "dirt")):
        done = eyas(tmp_path, "samples", "label", "cam-1", SPOOL, 1, word, "--person", person, *store)
        assert (done.code, done.out) == (0, f"cam-1 1: {word}\n")
    assert "anna: crack  bert: dirt" in eyas(tmp_path, "samples", "queue", *store).out, "disputed ones come first"
    undone = eyas(tmp_path, "samples", "undo", "--person", "bert", *store)
    assert undone.out == "cam-1 1: dirt is taken back\n"
    assert "1 labels" in eyas(tmp_path, "samples", "export", "labels.csv", "--as", "table", *store).out
    assert "2 images" in eyas(tmp_path, "samples", "export", "images", "--all", *store).out
    assert "1 labels, 1 of them new" in eyas(tmp_path, "samples", "import", "images", "--person", "cy", *store).out
    measured = eyas(tmp_path, "drift", "--labelled", *store)
    assert measured.code == 0 and "on 1 labelled samples" in measured.out, measured.err
    for words, said_ in (
        (("label", "cam-9", SPOOL, 1, "crack"), "no such sample in the store"),
        (("import", "notes.txt"), "class folders, a table (.csv) or an export of Label Studio (.json)"),
        (("export", "images"), "is there already"),
        (("export", "x", "--as", "zip"), "folders, table, label-studio"),
    ):
        wrong = eyas(tmp_path, "samples", *words, *store)
        assert wrong.code == 2 and said_ in wrong.err and "Traceback" not in wrong.err, wrong.err


def test_what_was_said_of_an_image_holds_for_all_samples_with_the_same_bytes(tmp_path: Path) -> None:
    """A camera that hangs sends one image again and again; under two labels it would stop the next training."""
    same = jpeg(10)
    events = [sent(n, image=same) for n in (1, 2, 3)] + [sent(4), sent(5, image=""), sent(6, image="")]
    with stored(f"sqlite:///{tmp_path}/fleet.db", events) as store:
        say(store, [(key(1), said("crack")), (key(2), said("dirt", "bert")), (key(5), said("good"))])
        states = {k[2]: one.state for k, one in verdicts(samples(store)).items()}
        assert states == {1: "disputed", 2: "disputed", 3: "disputed", 4: "open", 5: "labelled", 6: "open"}
        out = write_folders(samples(store), tmp_path / "out", now=NOW)
        assert out.images == 0 and out.left_out == {"disputed": 3, "open": 2, "no image": 1}
        say(store, [(key(3), said("crack", "carl"))])
        assert {k[2]: label for k, label in labels_of(samples(store)).items()} == {
            1: "crack", 2: "crack", 3: "crack", 5: "good"
        }  # fmt: skip
        assert labels_of(samples(store), people=3) == {}, "two say so"
        say(store, [(key(1), said("crack", "dora")), (key(2), said("crack", "dora"))])
        assert set(labels_of(samples(store), people=3)) == {key(1), key(2), key(3)}, "dora counts once, with two others"


def test_an_export_counts_images_without_consent_and_can_leave_them_out(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'fleet.db'}"
    policies: list[dict[str, object]] = [{"training": True}, {"training": False}, {}]
    with stored(url, [sent(number, image_policy=policy) for number, policy in enumerate(policies, 1)]) as store:
        say(store, [(key(number), said("crack")) for number in (1, 2, 3)])
    done = eyas(tmp_path, "samples", "export", "all", "--store", url)
    assert "all: 3 images" in done.out and "2 of them without consent to training" in done.out
    for form in ("label-studio", "table"):
        done = eyas(tmp_path, "samples", "export", "other", "--as", form, "--consented", "--store", url)
        assert done.code == 2 and f"leave nothing out of --as {form}" in done.err and not (tmp_path / "other").exists()
    done = eyas(tmp_path, "samples", "export", "some", "--consented", "--store", url)
    assert "some: 1 images; 2 without consent to training" in done.out and "of them" not in done.out
    assert [path.name for path in (tmp_path / "some/crack").iterdir()] == [f"cam-1--{SPOOL}--1.jpg"]


def test_more_is_drawn_at_random_while_an_alarm_says_that_all_has_changed() -> None:
    assert share_at_random([]) == share_at_random([DIRTY, NEW_CLASS]) == 0.25
    assert share_at_random([DIRTY, SEASON]) == share_at_random([SHIFT]) == 0.75
