"""From drift to a retraining: what calls for one, what it may be trained on, and who allowed it."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from eyas_device.telemetry.messages import Event, encode
from eyas_host.data.manifest import SplitManifest
from eyas_host.data.sources import LabelledImage
from eyas_host.fleet.drift.alarms import Alarm
from eyas_host.fleet.drift.causes import DIRTY, NEW_CLASS, SEASON
from eyas_host.fleet.drift.records import DriftRecords, Update
from eyas_host.fleet.retrain.usable import usable
from eyas_host.fleet.samples.exchange import allowed_image
from eyas_host.fleet.samples.records import Said, samples, say
from eyas_host.fleet.store.database import Batch, Store
from eyas_host.fleet.store.validate import ValidMessage, validate
from eyas_host.pipeline.runner import LINEAGE_SPLIT
from eyas_host.retrain.outcome import BETTER, WORSE, Compared, Judged
from eyas_host.retrain.state import only_one, read_state
from eyas_host.versions.record import DataRevision, StoredFile, Tools, VersionRecord
from eyas_host.versions.registry import Registry
from tests.support.fleet_parts import event
from tests.support.inside import Done, eyas

SPOOL = "0b7f9a1e-4a1c-4a41-9d11-2f6f7f3a1101"
LABELS = ("crack", "good")
DIGEST = "0123456789ab" + 52 * "0"
DAY = 86_400.0
FIGURES = Compared(images=40, changed=9, gain=0.1, interval=(0.02, 0.2), p_better=0.02, p_worse=0.99)
GOOD = Judged(outcome=BETTER, level=0.05, old=None, new=FIGURES, problems=())
BAD = Judged(outcome=WORSE, level=0.05, old=None, new=FIGURES, problems=("it loses 9.0 points on the old test images",))


def jpeg(number: int) -> bytes:
    """A JPEG that no other number has."""
    _, data = cv2.imencode(".jpg", np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8))
    return data.tobytes()


def sent(number: int, device: str, **fields: Any) -> Event:
    """A sample, which may be trained on unless `policy` says something else."""
    policy = fields.pop("policy", {"retention_days": 30, "training": True})
    more = {"time": time.time() - 3600, "image": base64.b64encode(jpeg(number)).decode(), "image_policy": policy}
    return event(device, SPOOL, number, **(more | fields))


def record(
    version: str, digest: str, files: dict[str, StoredFile], parent: str = "", added: float = 0.0
) -> VersionRecord:
    return VersionRecord(
        model="parts",
        version=version,
        digest=digest,
        created="",
        added=added or time.time(),
        parent=parent,
        labels=LABELS,
        recipe="",
        data=DataRevision(data="", split="", strategy="", counts={}),
        tools=Tools(eyas="", code={}, libraries={}),
        shipped="",
        figures={},
        files=files,
    )


class Fleet:
    """A champion of last week, and a store in which a collector looks for drift."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, f"sqlite:///{folder / 'fleet.db'}"
        self.registry = Registry(folder / "registry", now=time.time, by="host")
        known = tuple(
            LabelledImage(label=LABELS[number % 2], sha256=hashlib.sha256(jpeg(number)).hexdigest())
            for number in (9000, 9001)
        )
        split = SplitManifest(
            strategy="",
            seed=0,
            fractions=(0.7, 0.15, 0.15),
            labels=LABELS,
            train=known,
            validation=(),
            test=(),
            counts={},
        )
        run = folder / "run"
        for name, data in ((str(LINEAGE_SPLIT), msgspec.json.encode(split)), ("bundle/manifest.json", b"{}")):
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).write_bytes(data)
        self.files = {
            name: StoredFile(hashlib.sha256((run / name).read_bytes()).hexdigest(), (run / name).stat().st_size)
            for name in (str(LINEAGE_SPLIT), "bundle/manifest.json")
        }
        first = record("1.0.0", DIGEST, self.files, added=time.time() - 7 * DAY)
        self.registry.add(first, run)
        self.registry.set_alias("champion", first)
        self._number = 0
        with Store(self.url):
            pass

    def alarm(self, cause: str, *devices: str, state: str = "confirmed", digest: str = DIGEST[:12]) -> None:
        """Let devices have an open alarm; the store was looked at just now."""
        alarms = [
            Alarm(id=f"{cause}-{name}", device=name, digest=digest, state=state, opened=time.time(), cause=cause)
            for name in devices
        ]
        self.look(time.time(), alarms)

    def look(self, now: float, alarms: Iterable[Alarm] = ()) -> None:
        with Store(self.url) as store:
            records = DriftRecords(store)
            before = records.position()
            records.save(Update(before=before, position=now, now=now, alarms=list(alarms)))

    def open_alarms(self) -> int:
        with Store(self.url) as store:
            return len(DriftRecords(store).alarms())

    def add(
        self, count: int, device: str = "cam-1", label: str = "", people: tuple[str, ...] = ("anna",), **more: Any
    ) -> None:
        """Store samples and what people say about them: the labels in turn, or one of them."""
        with Store(self.url) as store:
            valid, words = [], []
            for _ in range(count):
                self._number += 1
                one = sent(self._number, device, **more)
                checked = validate(f"eyas/hall/{device}/event", encode(one))
                assert isinstance(checked, ValidMessage), checked
                valid.append(checked)
                for person in people:
                    word = label or LABELS[self._number % 2]
                    words.append(((device, SPOOL, self._number), Said(label=word, person=person, at=time.time())))
            store.add(Batch(time.time(), valid))
            say(store, words)

    def due(self, *words: object) -> Done:
        more = () if "--min-labels" in words else ("--min-labels", 10)
        return eyas(self.folder, "retrain", "--due", *more, "--more-labels", 8, *words)

    def move(self, days: float, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let time pass, and the collector look again."""
        now = time.time() + days * DAY
        monkeypatch.setattr(time, "time", lambda: now)
        self.look(now)


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    """Versions are not trained, and judged as `judged` says."""
    found = Fleet(tmp_path)

    def train(*words: Any) -> None:
        (words[4] / "bundle").mkdir(parents=True, exist_ok=True)
        for name in found.files:
            (words[4] / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tmp_path / "run" / name, words[4] / name)

    def read(root: Path, *, now: float, by: str, note: str, parent: str) -> VersionRecord:
        version = root.name.removeprefix("parts-")
        made = record(version, f"{version:f>64}", found.files, parent, now)
        return msgspec.structs.replace(made, note=note, added_by=by)

    monkeypatch.setattr("eyas_host.retrain.run._train", train)
    monkeypatch.setattr("eyas_host.retrain.run.read_run", read)
    judged(monkeypatch, GOOD)
    return found


def judged(monkeypatch: pytest.MonkeyPatch, verdict: Judged) -> None:
    monkeypatch.setattr("eyas_host.retrain.run.judge", lambda *_, **__: verdict)


def test_a_store_that_nobody_looks_at_says_nothing(fleet: Fleet) -> None:
    done = fleet.due()
    assert done.code == 2 and "nobody has looked for drift yet" in done.err
    for days in (-2, 2):
        fleet.look(time.time() + days * DAY)
        done = fleet.due()
        assert done.code == 2 and "a store from a backup, a collector that stands still, or a wrong clock" in done.err


def test_without_a_store_it_says_so(fleet: Fleet) -> None:
    done = fleet.due("--store", "sqlite:///none.db")
    assert done.code == 2 and "there is no store; `eyas collect` creates one" in done.err


def test_a_dirty_lens_needs_a_cloth(fleet: Fleet) -> None:
    fleet.add(40)
    fleet.alarm(DIRTY, "cam-1")
    done = fleet.due("--automatic")
    assert done.code == 0, done.err
    assert "no retraining helps: look at its image (`eyas send cam-1 snapshot`), clean the lens" in done.out
    assert "parts@1.0.0: no open alarm calls for a retraining" in done.out


def test_it_says_which_labels_are_missing(fleet: Fleet) -> None:
    fleet.add(9)
    fleet.alarm(SEASON, "cam-1", "cam-2", state="suspected")
    done = fleet.due("--automatic")
    assert done.code == 0 and "season or weather: cam-1, cam-2 (0 confirmed, 2 suspected)" in done.out
    assert "new labelled images with consent: 9 (crack 4, good 5)" in done.out
    assert "not yet: crack 6, good 5 missing; eyas samples queue lists what to label" in done.out
    assert not (fleet.folder / "runs").exists()


@pytest.mark.parametrize("policy", [{"retention_days": 30}, {"training": False}, {"training": "yes"}])
def test_without_consent_nothing_is_used_and_it_is_said(fleet: Fleet, policy: dict[str, Any]) -> None:
    fleet.add(3)
    fleet.add(30, policy=policy)
    fleet.alarm(SEASON, "cam-1")
    done = fleet.due("--automatic")
    assert done.code == 0 and "with consent: 3 " in done.out
    assert "left out: 30 without consent to training" in done.out and "missing" in done.out


def test_it_waits_for_an_approval_which_is_recorded(fleet: Fleet) -> None:
    fleet.add(24)
    fleet.alarm(SEASON, "cam-1", "cam-2")
    before = len(fleet.registry.history())
    done = fleet.due()
    assert done.code == 77, done.err
    assert "due: parts@1.0.0 to parts@1.1.0 with 24 new images" in done.out
    assert "eyas retrain --due --approve WHO begins it" in done.out
    assert not (fleet.folder / "runs").exists() and len(fleet.registry.history()) == before
    done = fleet.due("--approve", "anna")
    assert done.code == 0, done.err
    state = read_state(fleet.folder / "runs/parts-1.1.0")
    assert state is not None and state.stage == "registered"
    assert (state.reason.approved_by, state.reason.why) == ("anna", "season or weather (2)")
    assert len(state.reason.images) == 24 and set(state.reason.alarms) == {f"{SEASON}-cam-1", f"{SEASON}-cam-2"}
    assert fleet.registry.aliases()["parts"] == {"champion": "1.0.0", "challenger": "1.1.0"}
    log = [(one.what, one.note) for one in fleet.registry.history()[before:]]
    assert log[0] == ("retraining began", "season or weather (2); approved by anna")
    assert log[1][0] == "added" and log[1][1].endswith("season or weather (2); approved by anna")
    files = list((fleet.folder / "runs/parts-1.1.0-images").glob("*/*.jpg"))
    assert {hashlib.sha256(path.read_bytes()).hexdigest() for path in files} == set(state.reason.images)
    done = fleet.due("--automatic")
    assert done.code == 0 and "parts@1.1.0 waits as challenger" in done.out


def test_a_worse_one_is_kept_out_and_the_next_one_waits(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, BAD)
    fleet.add(24)
    fleet.alarm(SEASON, "cam-1")
    done = fleet.due("--automatic")
    assert done.code == 1 and "kept out: it loses 9.0 points" in done.out
    assert fleet.open_alarms() == 1, "the alarm stays"
    assert fleet.registry.aliases()["parts"] == {"champion": "1.0.0"}
    done = fleet.due("--automatic")
    assert done.code == 0 and "not yet: parts@1.1.0 was kept out" in done.out and "(there are 0)" in done.out
    fleet.add(7)
    assert "(there are 7)" in fleet.due("--automatic").out
    fleet.add(1)
    done = fleet.due()
    assert done.code == 77 and "to parts@1.2.0 with 32 new images" in done.out, "eight further ones end the wait"


@pytest.mark.parametrize(("further", "code"), [(0, 0), (1, 77)])
def test_after_the_cooldown_any_further_label_is_enough_and_none_is_not(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, further: int, code: int
) -> None:
    """The same images, from the same weights, by the same seed, end in the same version."""
    judged(monkeypatch, BAD)
    fleet.add(24)
    fleet.alarm(SEASON, "cam-1")
    assert fleet.due("--automatic").code == 1
    fleet.add(further)
    assert fleet.due().code == 0
    fleet.move(1.1, monkeypatch)
    assert fleet.due().code == code
    shutil.rmtree(fleet.folder / "runs/parts-1.1.0")
    assert fleet.due().code == 77, "with its folder its images are forgotten; the cooldown is over"


def test_a_clock_that_was_wrong_holds_nothing_up_for_long(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, BAD)
    fleet.add(24)
    fleet.alarm(SEASON, "cam-1")
    real = time.time()
    monkeypatch.setattr(time, "time", lambda: real + 400 * DAY)
    fleet.look(real + 400 * DAY)
    fleet.add(24)  # those of before may not be kept by then
    assert fleet.due("--automatic").code == 1
    monkeypatch.setattr(time, "time", lambda: real)
    fleet.look(real)
    assert fleet.due().code == 77, "kept out in a year"


def test_a_champion_of_a_clock_that_was_ahead_hides_neither_failures_nor_a_challenger(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time is later than that of all that follows; the log's order is what counts."""
    ahead = record("1.0.1", 64 * "a", fleet.files, "1.0.0", added=time.time() + 400 * DAY)
    fleet.registry.add(ahead, fleet.folder / "run")
    fleet.registry.set_alias("champion", ahead)
    fleet.add(24)
    fleet.alarm(SEASON, "cam-1", digest=12 * "a")
    judged(monkeypatch, BAD)
    assert fleet.due("--automatic").code == 1
    done = fleet.due("--automatic")
    assert done.code == 0 and "not yet: parts@1.1.0 was kept out" in done.out, "not again each hour"
    judged(monkeypatch, GOOD)
    fleet.add(8)
    assert fleet.due("--automatic").code == 0
    fleet.add(8)
    done = fleet.due("--automatic")
    assert done.code == 0 and "parts@1.2.0 waits as challenger" in done.out


@pytest.mark.parametrize("at", [0, 3])
def test_other_images_do_not_go_on_under_the_approval_of_these(fleet: Fleet, at: int) -> None:
    """`eyas retrain IMAGES` names the next version by itself, which is that of the interrupted one."""
    fleet.add(24)
    fleet.alarm(SEASON, "cam-1")
    assert killed(lambda: fleet.due("--approve", "anna"), 3 + at)
    begun = read_state(fleet.folder / "runs/parts-1.1.0")
    assert begun is not None and begun.reason.approved_by == "anna"
    (fleet.folder / "others/good").mkdir(parents=True)
    done = eyas(fleet.folder, "retrain", "others")
    assert done.code == 2 and "approved by anna), and it goes on with its own images" in done.err
    assert read_state(fleet.folder / "runs/parts-1.1.0") == begun
    assert eyas(fleet.folder, "retrain", "others", "--version", "1.5.0").code == 0
    assert fleet.due().code == 0
    assert (fleet.registry.find("parts@1.1.0").note or "").endswith("approved by anna")


def test_by_hand_a_time_in_the_future_does_not_hold_up(fleet: Fleet) -> None:
    fleet.registry.add(
        record("1.0.1", 64 * "a", fleet.files, "1.0.0", added=time.time() + 400 * DAY), fleet.folder / "run"
    )
    (fleet.folder / "others").mkdir()
    for words in (("--cooldown", "0", "--version", "1.3.0"), ("--version", "1.4.0")):
        done = eyas(fleet.folder, "retrain", "others", *words)
        assert done.code == 0, done.err


def test_a_cause_of_a_newer_version_is_shown_as_it_says_itself(fleet: Fleet) -> None:
    """Advice that was written before names devices: braces in it are text."""
    alarm = Alarm(
        id="x", device="cam-{0}", digest=DIGEST[:12], state="confirmed", opened=time.time(), cause="moon",
        advice="wait for cam-{0}\x1b[2J",
    )  # fmt: skip
    fleet.look(time.time(), [alarm])
    done = fleet.due()
    assert done.code == 0, done.err
    assert "no retraining helps: wait for cam-{0}\\x1b[2J" in done.out


def test_the_cooldown_after_a_version_is_waited_for(fleet: Fleet) -> None:
    fleet.add(24)
    fleet.alarm(SEASON, "cam-1")
    done = fleet.due("--cooldown", 30)
    assert done.code == 0 and "not yet: parts@1.0.0 was added" in done.out


def test_of_two_at_once_one_says_so_and_ends(fleet: Fleet) -> None:
    with only_one(fleet.registry, "parts"):
        done = fleet.due("--automatic")
    assert done.code == 0 and "parts: a retraining is running already" in done.out


@pytest.mark.parametrize("at", range(7))
def test_one_that_is_killed_goes_on_with_the_same_images_and_asks_nobody_again(fleet: Fleet, at: int) -> None:
    fleet.add(24)
    fleet.alarm(SEASON, "cam-1")
    assert killed(lambda: fleet.due("--approve", "anna", "--epochs", 3), at)
    assert fleet.registry.aliases()["parts"] == {"champion": "1.0.0"}
    begun = read_state(fleet.folder / "runs/parts-1.1.0")
    fleet.add(5)
    done = fleet.due()
    if begun is None:
        assert done.code == 77, "nobody had recorded the approval"
        assert fleet.due("--approve", "bert").code == 0
    else:
        assert done.code == 0, done.err
    state = read_state(fleet.folder / "runs/parts-1.1.0")
    assert state is not None and state.stage == "registered"
    assert state.reason.approved_by == ("bert" if begun is None else "anna")
    assert state.terms.epochs == (8 if begun is None else 3), "as it was approved"
    files = {path.name for path in (fleet.folder / "runs/parts-1.1.0-images").glob("*/*.jpg")}
    assert len(files) == len(state.reason.images) == (29 if begun is None else 24)


def killed(work: Callable[[], Done], at: int) -> bool:
    """Do `work` in a process that is killed at its step number `at`; whether it came so far."""
    child = os.fork()
    if child == 0:
        try:
            left = at

            def counted(place: Any, name: str) -> None:
                before = getattr(place, name)

                def run(*words: Any, **more: Any) -> Any:
                    nonlocal left
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return before(*words, **more)

                setattr(place, name, run)

            from eyas_host.fleet.retrain import begin
            from eyas_host.retrain import run

            counted(begin, "_write")
            counted(Path, "rename")
            for name in ("write_state", "judge", "_train"):
                counted(run, name)
            counted(Registry, "set_alias")
            code = work().code
        except BaseException:
            os._exit(1)
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


def test_while_all_has_changed_more_of_the_queue_is_drawn_at_random(fleet: Fleet) -> None:
    fleet.add(24)
    queue = ("samples", "queue", "--store", fleet.url)
    assert "at random" not in eyas(fleet.folder, *queue).out
    fleet.alarm(SEASON, "cam-1", "cam-2")
    assert "75% of the queue at random: season or weather" in eyas(fleet.folder, *queue).out
    assert "at random" not in eyas(fleet.folder, *queue, "--random-share", "0.25").out


def test_a_store_from_yesterday_offers_nothing_twice(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, BAD)
    fleet.add(24)
    fleet.alarm(SEASON, "cam-1")
    shutil.copyfile(fleet.folder / "fleet.db", fleet.folder / "backup.db")
    fleet.add(3)
    assert fleet.due("--automatic").code == 1
    shutil.copyfile(fleet.folder / "backup.db", fleet.folder / "fleet.db")
    for name in ("fleet.db-wal", "fleet.db-shm"):
        (fleet.folder / name).unlink(missing_ok=True)
    done = fleet.due("--automatic")
    assert done.code == 0 and "(there are 0)" in done.out, "it was tried with these"
    judged(monkeypatch, GOOD)
    fleet.registry.set_alias("champion", _served(fleet))
    done = fleet.due("--automatic")
    assert done.code == 0 and "alarms of other versions than parts@2.0.0: 1" in done.out


def test_of_several_models_one_is_named(fleet: Fleet) -> None:
    other = msgspec.structs.replace(record("1.0.0", 64 * "d", fleet.files), model="caps")
    fleet.registry.add(other, fleet.folder / "run")
    fleet.registry.set_alias("champion", other)
    fleet.add(24)
    fleet.alarm(SEASON, "cam-1")
    done = fleet.due()
    assert done.code == 2 and "of which model?" in done.err
    assert fleet.due("--from", "parts").code == 77
    done = fleet.due("--from", "caps")
    assert done.code == 0 and "caps@1.0.0: no open alarm calls for a retraining" in done.out


def _served(fleet: Fleet) -> VersionRecord:
    """A version that came to the fleet after the backup."""
    newer = record("2.0.0", 64 * "e", fleet.files, "1.0.0")
    fleet.registry.add(newer, fleet.folder / "run")
    return newer


def test_a_device_that_floods_gets_its_quota_and_the_others_keep_theirs(fleet: Fleet) -> None:
    fleet.add(60, "cam-9", label="good")
    fleet.add(4, "cam-9", label="crack")
    fleet.add(20, "cam-1")
    fleet.alarm(SEASON, "cam-1")
    done = fleet.due("--per-device", 12)
    assert "left out: 60 beyond 12 of a device" in done.out
    with Store(fleet.url) as store:
        found = usable(samples(store), {}, labels=LABELS, now=time.time(), per_device=12)
    of = [(one.device, one.label) for one in found.images]
    assert [of.count(("cam-9", label)) for label in LABELS] == [4, 8], "its rare label keeps its place"
    assert sum(device == "cam-1" for device, _ in of) == 12


def test_a_camera_that_hangs_counts_once(fleet: Fleet) -> None:
    image = base64.b64encode(jpeg(1)).decode()
    fleet.add(20, label="good", image=image)
    with Store(fleet.url) as store:
        found = usable(samples(store), {}, labels=LABELS, now=time.time())
    assert (len(found.images), found.left_out) == (1, {"the same image": 19})


def test_what_it_knows_is_not_new_but_a_correction_is(fleet: Fleet) -> None:
    fleet.add(1, label="good", image=base64.b64encode(jpeg(9000)).decode())
    fleet.add(1, label="good", image=base64.b64encode(jpeg(9001)).decode())
    fleet.alarm(SEASON, "cam-1")
    done = fleet.due()
    assert "with consent: 1 (crack 0, good 1)" in done.out and "left out: 1 known to it" in done.out


def test_contradicting_and_unknown_labels_are_left_out_and_counted(fleet: Fleet) -> None:
    fleet.add(24)
    fleet.add(2, label="scratch")
    fleet.add(1, label="good", people=("anna",))
    with Store(fleet.url) as store:
        say(store, [(("cam-1", SPOOL, 27), Said(label="crack", person="bert", at=time.time()))])
    fleet.alarm(NEW_CLASS, "cam-1")
    done = fleet.due()
    assert done.code == 77 and "with 24 new images" in done.out
    assert "left out: 1 disputed, 2 of another class" in done.out
    done = fleet.due("--new-class")
    assert done.code == 0 and "not yet: scratch 8 missing" in done.out


def test_an_image_is_not_kept_longer_by_a_clock_that_is_ahead(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.add(1, time=time.time() + 300 * DAY)
    fleet.add(1, time=time.time() - 3600)
    now = time.time()
    with Store(fleet.url) as store:
        found = samples(store)
    for days, kept in ((29, 2), (31, 0)):
        assert sum(allowed_image(one, now + days * DAY) is not None for one in found) == kept


def test_its_options_do_not_contradict(fleet: Fleet) -> None:
    _served(fleet)
    for words, reason in (
        (("retrain",), "name new images, or --due"),
        (("retrain", "later", "--due"), "name new images, or --due"),
        (("retrain", "later", "--automatic"), "are for --due"),
        (("retrain", "--due", "--promote"), "no --version or --promote"),
        (("retrain", "--due", "--approve", " "), "who approves it, by name?"),
        (("retrain", "--due", "--from", "2.0.0"), "parts@2.0.0 is none; --from MODEL names it"),
        (("retrain", "--due", "--automatic", "--approve", "anna"), "--approve WHO, or --automatic"),
    ):
        done = eyas(fleet.folder, *words)
        assert done.code == 2 and reason in done.err, done.err
