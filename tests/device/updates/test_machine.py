"""The updater: whatever is killed, refused, aborted or full at whatever step, a verified bundle stays current."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from eyas_device.bundle import MANIFEST, Bundle, sha256
from eyas_device.config import Config, ModelSection
from eyas_device.errors import CheckFailed
from eyas_device.telemetry.messages import UPDATE_STATES, Update
from eyas_device.updates import machine, progress
from eyas_device.updates.machine import Updater
from eyas_device.updates.plan import MAX_INTERRUPTED, Install, Keep
from eyas_device.updates.progress import (
    STATES,
    WAITS,
    UpdateRecord,
    read_progress,
    record_path,
    write_progress,
)
from eyas_device.updates.records import Lock, Verdict, write_record
from eyas_device.updates.refusals import ExpiredError, TamperedError, TrustError, UnreachableError
from eyas_device.updates.release import Channel, Policy, UpdateError, release_target
from eyas_device.updates.slots import Slots
from tests.support.cut_process import cut_at
from tests.support.update_parts import Published, StandIn, config_for, write_small_bundle

OLD, NEW, NEWER = "1.0.0", "2.0.0", "3.0.0"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bundles")
    return {version: write_small_bundle(root / version, version) for version in (OLD, NEW, NEWER)}


@pytest.fixture(scope="module")
def published(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Published:
    repository = Published(tmp_path_factory.mktemp("repository"))
    for bundle in bundles.values():
        repository.publish(bundle)
    return repository


@pytest.fixture
def repository(published: Published, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Published:
    monkeypatch.setattr(machine, "TrustedRepository", StandIn)
    published.set_policy(Policy())
    published.want(published.publish(bundles[NEW]))
    return published


@pytest.fixture
def config(repository: Published, tmp_path: Path) -> Config:
    return config_for(tmp_path / "state", repository.root)


@pytest.fixture
def slots(config: Config, bundles: dict[str, Path]) -> Slots:
    slots = Slots(Path(config.device.state))
    slots.install(bundles[OLD], check=accept)
    return slots


def accept(root: Path) -> None:
    Bundle.open(root)


def refuse(root: Path) -> None:
    raise CheckFailed("predictions differ")


def update(config: Config, *, check: Callable[[Path], object] = accept, now: bool = False) -> UpdateRecord:
    record = Updater(config, check=check, now=now).run_once()
    assert read_progress(Path(config.device.state)) == record
    return record


def version_of(slots: Slots) -> str | None:
    current = slots.current()
    return None if current is None else Bundle.open(current).manifest.version


def judge(slots: Slots, name: str, state: str, reason: str = "") -> None:
    """Write what an agent would find out about the model in a slot."""
    digest = sha256(slots.folder / name / MANIFEST)
    verdict = msgspec.convert({"state": state, "manifest_sha256": digest, "reason": reason}, Verdict)
    write_record(slots.folder / f"{name}.probation", verdict)


def at(repository: Published, version: str, **fields: object) -> None:
    repository.set_channel(
        msgspec.structs.replace(Channel(model="small", target=release_target("small", version)), **fields)
    )


# --- the way of an update --------------------------------------------------------------------------------------------


def test_a_release_is_installed_proves_itself_and_is_committed(
    config: Config, slots: Slots, repository: Published
) -> None:
    states: list[str] = []
    record = Updater(config, check=accept, on_state=lambda record: states.append(record.state)).run_once()
    assert states[:3] == ["downloading", "installing", "probation"]
    assert (record.state, record.model, version_of(slots), record.slot) == ("probation", "small 2.0.0", NEW, "b")
    assert slots.release("b") == (repository.root / release_target("small", NEW)).read_bytes()
    assert list((slots.state / "updates/blobs").iterdir()) == []
    at(repository, NEWER)
    assert update(config).state == "probation" and version_of(slots) == NEW, "one at a time"
    judge(slots, "b", "running")
    assert update(config).state == "probation"
    judge(slots, "b", "passed", "as good as the earlier one")
    at(repository, NEW)
    record = update(config)
    assert (record.state, record.installed, record.attempts) == ("committed", record.identity, 1)
    at(repository, NEWER)
    assert (update(config).model, version_of(slots)) == ("small 3.0.0", NEWER)


def test_the_record_is_what_the_status_message_says(config: Config, slots: Slots) -> None:
    assert set(STATES) == set(UPDATE_STATES)
    names = [field.name for field in msgspec.structs.fields(Update)]
    assert [field.name for field in msgspec.structs.fields(UpdateRecord)][: len(names)] == names
    record = update(config)
    sent = msgspec.json.decode(record_path(slots.state).read_bytes(), type=Update)
    assert (sent.state, sent.model, sent.digest) == ("probation", "small 2.0.0", record.identity[:12])
    assert (sent.channel, sent.group) == ("stable", "default") and sent.checked > 0 < sent.since


def test_a_failed_probation_is_not_tried_again_until_something_changed(
    config: Config, slots: Slots, repository: Published
) -> None:
    update(config)
    judge(slots, "b", "failed", "the same label on 12 of 60 frames")
    slots.refuse("b", "probation: the same label on 12 of 60 frames")
    slots.roll_back()
    for _ in range(3):
        record = update(config)
        assert (record.state, record.reason) == ("rolled back", "the same label on 12 of 60 frames")
        assert (version_of(slots), record.attempts) == (OLD, 1)
    at(repository, NEW, rollout="second try", shares={"*": 1.0})
    assert (update(config).state, version_of(slots)) == ("probation", NEW)


def test_a_slot_that_the_agent_refused_is_left_for_good(config: Config, slots: Slots) -> None:
    """A crash loop, or wrong predictions at the agent's own check: no verdict was ever written."""
    update(config)
    slots.refuse("b", "4 attempts to run it ended before it was healthy")
    record = update(config)
    assert (record.state, slots.linked()) == ("rolled back", "a")
    assert "attempts" in record.reason
    assert (update(config).state, version_of(slots)) == ("rolled back", OLD)
    assert update(config, now=True).state == "probation", "somebody asks for it"


def test_a_model_that_fails_its_check_is_refused_once_and_the_old_one_stays(config: Config, slots: Slots) -> None:
    checks: list[Path] = []

    def check(root: Path) -> None:
        checks.append(root)
        refuse(root)

    for _ in range(3):
        record = update(config, check=check)
        assert (record.state, record.reason, version_of(slots)) == ("refused", "predictions differ", OLD)
    assert len(checks) == 1
    changed = msgspec.structs.replace(config, model=ModelSection(threads=2))
    assert update(changed).state == "probation", "other settings: it is tried again"


def test_a_signed_roll_back_switches_at_once_and_a_hand_made_one_stays(
    config: Config, slots: Slots, repository: Published, bundles: dict[str, Path]
) -> None:
    update(config)
    judge(slots, "b", "passed")
    assert update(config).state == "committed"
    slots.roll_back()
    for _ in range(2):
        record = update(config)
        assert (record.state, version_of(slots)) == ("idle", OLD) and "by hand" in record.reason
    assert (update(config, now=True).state, version_of(slots)) == ("committed", NEW)
    at(repository, NEW, previous=release_target("small", OLD), rollout="r", rolled_back=True)
    record = update(config)
    assert (record.state, record.model, version_of(slots)) == ("committed", "small 1.0.0", OLD)
    assert update(config).state == "committed"


def test_a_revoked_release_is_left_even_in_the_middle_of_its_probation(
    config: Config, slots: Slots, repository: Published, bundles: dict[str, Path]
) -> None:
    record = update(config)
    repository.set_policy(Policy(revoked={record.identity: "wrong labels"}))
    record = update(config)
    assert (record.state, record.model, version_of(slots)) == ("rolled back", "small 2.0.0", OLD)
    assert record.reason == "small 2.0.0 was revoked: wrong labels"
    record = update(config)
    assert (record.state, record.reason) == ("refused", "small 2.0.0 was revoked: wrong labels")
    repository.set_policy(Policy(revoked={record.identity: "x", slots.states()[0].identity: "y"}))
    record = update(config)
    assert version_of(slots) == OLD and "was revoked" in record.reason, "nothing better is there: it stays"


def test_a_revoked_release_that_waits_for_the_agent_says_so_and_nothing_else(
    config: Config, repository: Published, tmp_path: Path
) -> None:
    """A first installation: there is nothing to go back to."""
    new = msgspec.structs.replace(config.device, state=str(tmp_path / "new"))
    section = msgspec.structs.replace(config.update, model="small")
    first = msgspec.structs.replace(config, device=new, update=section)
    record = update(first)
    assert (record.state, record.reason) == ("probation", WAITS)
    repository.set_policy(Policy(revoked={record.identity: "wrong labels"}))
    stays = "it stays, because the other slot has no good bundle that is not revoked"
    reported: list[str] = []
    for _ in range(2):
        Updater(first, check=accept, on_state=lambda record: reported.append(record.reason)).run_once()
    assert set(reported) == {f"{WAITS}; small 2.0.0 was revoked: wrong labels; {stays}"}
    repository.set_policy(Policy())
    assert update(first).reason == WAITS


def test_the_control_group_checks_and_loads_the_same_once_more(
    config: Config, slots: Slots, repository: Published
) -> None:
    checks: list[Path] = []
    at(repository, NEW, previous=release_target("small", OLD), rollout="r", shares={"*": 1.0}, refresh=("cam-1",))
    for _ in range(2):
        record = update(config, check=checks.append)
        assert (record.model, version_of(slots), record.refreshed) == ("small 1.0.0", OLD, "r")
    assert checks == [slots.folder / "a"] and slots.release("a") is not None


def test_hours_hold_back_an_update_and_a_person_does_not_wait(
    config: Config, slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = msgspec.structs.replace(config, update=msgspec.structs.replace(config.update, hours="22:00-23:00"))
    monkeypatch.setattr(time, "localtime", lambda *args: time.struct_time((2026, 1, 1, 21, 30, 0, 3, 1, 0)))
    record = update(config)
    assert (record.state, record.wait_s, version_of(slots)) == ("idle", 1800, OLD)
    assert "22:00-23:00" in record.reason and record.model == "small 2.0.0"
    assert update(config, now=True).state == "probation"


def test_a_preview_changes_nothing(config: Config, slots: Slots) -> None:
    plan = Updater(config, check=accept).preview()
    assert isinstance(plan, Install) and plan.release.version == NEW
    assert version_of(slots) == OLD and not record_path(slots.state).exists()


def test_a_device_without_a_model_takes_the_one_that_it_is_told_to_follow(config: Config) -> None:
    slots = Slots(Path(config.device.state))
    without = msgspec.structs.replace(config, update=msgspec.structs.replace(config.update, model=""))
    record = update(without)
    assert record.state == "idle" and "[update] model" in record.reason
    assert (update(config).state, version_of(slots)) == ("probation", NEW)
    assert update(without).model == "small 2.0.0", "from then on it follows what it runs"


def test_a_device_whose_bundle_is_configured_has_nothing_to_update(config: Config) -> None:
    with pytest.raises(UpdateError, match=r"\[model\] bundle"):
        Updater(msgspec.structs.replace(config, model=ModelSection(bundle="/opt/bundle")))
    with pytest.raises(UpdateError, match=r"\[update\] url"):
        Updater(msgspec.structs.replace(config, update=msgspec.structs.replace(config.update, url="")))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"version": "2.0.1"}, "holds small 2.0.0: publish it again"),
        ({"identity": "f" * 64}, "holds another bundle than it names"),
    ],
)
def test_a_release_that_holds_something_else_is_refused(
    fields: dict[str, object], words: str, config: Config, slots: Slots, repository: Published, bundles: dict[str, Path]
) -> None:
    repository.want(repository.publish(bundles[NEW], **fields))
    record = update(config)
    assert (record.state, version_of(slots)) == ("refused", OLD) and words in record.reason
    repository.publish(bundles[NEW])


# --- kills, power cuts, aborts ---------------------------------------------------------------------------------------


def crashing(work: Callable[[], object], root: Path, at: int) -> str:
    """The record's state after a power cut at step number `at` of `work`; empty if it ended before."""
    return read_progress(root / "state").state if cut_at(root, work, at) else ""


def test_a_power_cut_at_any_step_ends_in_the_new_version(
    repository: Published, tmp_path: Path, bundles: dict[str, Path]
) -> None:
    """Each persisted state, each file of each state: the current slot is whole, and the next run finishes."""
    seen: dict[str, int] = {}
    step = 0
    while True:
        root = tmp_path / str(step)
        config = config_for(root / "state", repository.root)
        slots = Slots(root / "state")
        slots.install(bundles[OLD], check=accept)
        state = crashing(lambda c=config: Updater(c, check=accept).run_once(), root, step)
        assert version_of(slots) in (OLD, NEW)
        record = update(config)
        assert (record.state, version_of(slots), record.model) == ("probation", NEW, "small 2.0.0"), (step, state)
        assert slots.release("b") is not None and record.interrupted == 0
        judge(slots, "b", "passed")
        assert update(config).state == "committed"
        if not state:
            break
        seen[state] = seen.get(state, 0) + 1
        step += 1
    assert set(seen) == {"idle", "downloading", "installing", "probation"}, seen
    assert step > 30


def test_cuts_of_a_signed_roll_back_and_of_a_revocation(
    repository: Published, tmp_path: Path, bundles: dict[str, Path]
) -> None:
    for how in ("roll back", "revoke"):
        for step in range(100):
            root = tmp_path / f"{how}{step}"
            config, slots = config_for(root / "state", repository.root), Slots(root / "state")
            slots.install(bundles[OLD], check=accept)
            repository.set_policy(Policy())
            at(repository, NEW)
            identity = update(config).identity
            judge(slots, "b", "passed")
            update(config)
            if how == "revoke":
                repository.set_policy(Policy(revoked={identity: "why"}))
            else:
                at(repository, NEW, previous=release_target("small", OLD), rollout="r", rolled_back=True)
            state = crashing(lambda c=config: Updater(c, check=accept).run_once(), root, step)
            assert version_of(slots) in (OLD, NEW)
            assert update(config).state in ("committed", "rolled back", "refused") and version_of(slots) == OLD
            if not state:
                break
        assert 5 < step < 99


def test_a_check_that_kills_the_process_is_refused_after_some_attempts(config: Config, slots: Slots) -> None:
    """For lack of memory, or by a runtime that crashes: nothing says so but that nobody is left to say anything."""
    for _ in range(MAX_INTERRUPTED):
        child = os.fork()
        if child == 0:
            Updater(config, check=lambda root: os.kill(os.getpid(), signal.SIGKILL)).run_once()
            os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert version_of(slots) == OLD
    record = update(config, check=lambda root: pytest.fail("tried again"))
    assert (record.state, version_of(slots)) == ("refused", OLD) and "ended without a word" in record.reason
    assert update(config).state == "refused"
    assert update(config, now=True).state == "probation"


@pytest.mark.parametrize("state", ["downloading", "installing", "probation"])
def test_an_ordered_stop_in_each_state_counts_for_nothing(state: str, config: Config, slots: Slots) -> None:
    for _ in range(MAX_INTERRUPTED + 2):

        def stop(record: UpdateRecord) -> None:
            if record.state == state:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Updater(config, check=accept, on_state=stop).run_once()
        assert version_of(slots) in (OLD, NEW)
        if state == "probation":
            break
    record = update(config)
    assert (record.state, version_of(slots)) == ("probation", NEW)


def test_two_at_once(config: Config, slots: Slots) -> None:
    (slots.state / "updates").mkdir()
    with Lock.acquire(slots.state / "updates/.lock") as lock:  # type: ignore[union-attr]
        assert lock is not None
        with pytest.raises(UpdateError, match="another update runs"):
            Updater(config).run_once()
    with (slots.folder / ".lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        record = update(config)
        assert record.state == "failed" and "another installation is running" in record.reason
    assert update(config).state == "probation"


# --- disks and repositories that fail --------------------------------------------------------------------------------


def test_a_disk_that_takes_no_record_keeps_an_update_from_beginning(
    config: Config, slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(state: Path, record: UpdateRecord) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(machine, "write_progress", full)
    record = Updater(config, check=accept).run_once()
    assert record.state == "failed" and "No space left" in record.reason and version_of(slots) == OLD


def test_a_record_that_cannot_be_written_after_the_switch_stops_nothing(
    config: Config, slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_later(state: Path, record: UpdateRecord) -> None:
        if record.state not in ("downloading", "installing"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        write_progress(state, record)

    monkeypatch.setattr(machine, "write_progress", full_later)
    assert Updater(config, check=accept).run_once().state == "probation"
    monkeypatch.undo()
    monkeypatch.setattr(machine, "TrustedRepository", StandIn)
    assert (update(config).state, version_of(slots)) == ("probation", NEW)


def test_a_full_disk_is_found_before_anything_is_downloaded(
    config: Config, slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    statvfs = os.statvfs(slots.folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: os.statvfs_result([*statvfs[:4], 0, *statvfs[5:]]))
        record = update(config)
    assert record.state == "failed" and "free some space" in record.reason
    assert list((slots.state / "updates/blobs").iterdir()) == [] and version_of(slots) == OLD
    record = update(config)
    assert (record.state, record.attempts) == ("probation", 2)


@pytest.mark.parametrize("error", [UnreachableError, ExpiredError, TamperedError])
def test_trouble_with_the_repository_is_said_and_forgotten_when_it_is_over(
    error: type[TrustError], config: Config, slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    update(config)
    judge(slots, "b", "passed")
    committed = update(config)

    def fail(self: StandIn) -> None:
        raise error("as it is")

    with monkeypatch.context() as patch:
        patch.setattr(StandIn, "refresh", fail)
        record = update(config)
        assert (record.trouble, record.cause) == ("as it is", error.reason) and record.checked == committed.checked
        if error is UnreachableError:
            assert (record.state, record.model) == ("committed", "small 2.0.0"), "a dead link changes nothing"
        else:
            assert (record.state, record.reason, record.model) == ("refused", "as it is", "")
    record = update(config)
    assert (record.state, record.model, record.trouble, record.cause) == ("committed", "small 2.0.0", "", "")
    assert version_of(slots) == NEW


def test_an_interrupted_download_fails_and_is_finished_later(
    config: Config, slots: Slots, repository: Published
) -> None:
    release, _ = StandIn(config.update, "", slots.state).release(release_target("small", NEW))
    blob = next(file.sha256 for file in release.variants[0].files if file.path == "model.tflite")
    path = repository.root / f"blobs/{blob[:2]}/{blob}"
    content = path.read_bytes()
    path.write_bytes(content[:100])
    record = update(config)
    assert (record.state, version_of(slots)) == ("failed", OLD) and "100 of 5000 bytes" in record.reason
    path.write_bytes(b"x" * len(content))
    record = update(config)
    assert (record.state, record.attempts, version_of(slots)) == ("refused", 2, OLD)
    assert "not what was signed" in record.reason
    path.write_bytes(content)
    assert update(config).state == "probation", "a mirror may be mended: what arrived was at fault, not the release"


# --- the record ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["downloading", "installing", "probation", "committed", "rolled back", "failed"])
def test_a_record_of_another_version_of_the_agent(state: str, config: Config, slots: Slots) -> None:
    """An older one knew only what a status message says; a newer one has other fields, types and states."""
    older = {"state": state, "model": "small 2.0.0", "digest": "0" * 12, "attempts": 2}
    newer = {**older, "schema": 9, "state": f"{state}, cooled", "barred": [1], "slot": None, "since": "now", "new": {}}
    for fields in (older, newer):
        record_path(slots.state).parent.mkdir(exist_ok=True)
        record_path(slots.state).write_bytes(msgspec.json.encode(fields))
        record = read_progress(slots.state)
        assert (record.schema, record.model, record.attempts) == (progress.SCHEMA, "small 2.0.0", 2)
        assert record.state == (state if fields is older else "idle") and record.barred == {}
    record = update(config)
    assert (record.state, version_of(slots)) == ("probation", NEW)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 50_000, b"1" * 200_000])
def test_a_damaged_record_begins_again(content: bytes, config: Config, slots: Slots) -> None:
    record_path(slots.state).parent.mkdir()
    record_path(slots.state).write_bytes(content)
    assert read_progress(slots.state) == UpdateRecord()
    assert (update(config).state, version_of(slots)) == ("probation", NEW)


def test_a_record_that_is_a_pipe_never_blocks(config: Config, slots: Slots) -> None:
    record_path(slots.state).parent.mkdir()
    os.mkfifo(record_path(slots.state))
    assert (update(config).state, version_of(slots)) == ("probation", NEW)


def test_reasons_are_fit_for_a_terminal_and_refusals_are_forgotten_in_the_end() -> None:
    record = UpdateRecord(identity="0", key="k")
    assert record.entered("failed", "a\x1b[2J\nb").reason == "a\\x1b[2J b"
    for number in range(40):
        record = msgspec.structs.replace(record, identity=str(number)).bar("refused", "x")
    assert list(record.barred) == [str(number) for number in range(24, 40)]


def test_a_withdrawn_channel_keeps_what_runs(config: Config, slots: Slots, repository: Published) -> None:
    repository.set_channel(None)
    record = update(config)
    assert (record.state, version_of(slots)) == ("idle", OLD) and "no release of small" in record.reason
    assert isinstance(Updater(config).preview(), Keep)
