"""Versions that meet: today's code reads what other versions wrote.

`0.1.0/` was recorded from a running device, collector and store of the first version. `0.9/` is invented: new words in
every enumeration, further fields, a further runtime and precision, and, in the files with `schema2`, changed types.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from eyas_device.bundle import MANIFEST, Bundle, read_manifest
from eyas_device.config import PrivacySection
from eyas_device.errors import BundleError, RuntimeUnavailable
from eyas_device.predict import Classifier
from eyas_device.runtimes import choose
from eyas_device.telemetry.messages import KINDS, UNKNOWN, WHY, Ack, Command, Result, Status, Window, decode, known
from eyas_device.telemetry.outbox import Outbox
from eyas_device.telemetry.privacy import Policy
from eyas_device.telemetry.remote import CommandExecutor
from eyas_device.telemetry.spool.spool import Spool
from eyas_device.updates.golden import check_bundle
from eyas_host.fleet.store.database import Batch, QuarantinedMessage, Store
from eyas_host.fleet.store.retention import expire
from eyas_host.fleet.store.tables import VERSION
from eyas_host.fleet.store.validate import InvalidMessage, ValidMessage, validate
from eyas_host.fleet.watch.fleet_state import FleetState
from tests.support.bundles import record_settings
from tests.support.fleet_parts import wait_until
from tests.support.tiny import LABELS, draw_shape

HERE = Path(__file__).parent
NOW = 1_795_920_000.0
NAMES = {"status": "status", "window": "window", "event": "event", "profile": "profile", "cmd/result": "result"}
assert NAMES.keys() == KINDS.keys(), "every kind has its recorded message"


def stored(version: str, name: str) -> bytes:
    return (HERE / version / f"{name}.json").read_bytes()


def received(version: str, kind: str, suffix: str = "") -> ValidMessage:
    payload = stored(version, NAMES[kind] + suffix)
    message = validate(f"eyas/hall-2/{json.loads(payload)['device']}/{kind}", payload)
    assert isinstance(message, ValidMessage), message
    return message


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(f"sqlite:///{tmp_path / 'fleet.db'}") as opened:
        yield opened


# The host reads what devices send.


@pytest.mark.parametrize("version", ["0.1.0", "0.9"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_message_of_any_version_is_stored_as_it_came(store: Store, version: str, kind: str) -> None:
    message = received(version, kind)
    assert message.problem == ""
    assert store.add(Batch(NOW, [message])) == 1
    assert store.counts() == {kind: 1, "quarantine": 0}
    with store.begin() as connection:
        (payload,) = connection.exec_driver_sql("SELECT payload FROM messages").one()
    assert json.loads(payload) == json.loads(stored(version, NAMES[kind]))


def test_the_windows_of_both_versions_have_their_counts(store: Store) -> None:
    store.add(Batch(NOW, [received("0.1.0", "window"), received("0.9", "window")]))
    old, new = store.windows("cam-7"), store.windows("cam-9")
    (first,), (second,) = list(old), list(new)
    assert (first.frames, first.counts) == (16, {"cross": 7, "disc": 7, "stripes": 2})
    assert first.confidence["disc"] == (0, 0, 0, 0, 1, 5, 1, 0, 0, 0), "tenths stay tenths"
    assert (first.confidence_bins, first.confidence_sum, first.digest) == ({}, {}, "")
    assert (second.frames, second.counts) == (100, {"cross": 30, "disc": 70})
    assert second.confidence_bins["cross"] == (0, 0, 0, 1, 2, 3, 4, 5, 6, 9)
    assert (second.confidence_sum, second.digest) == ({"cross": 28.5, "disc": 69.9}, "0123456789ab")
    assert second.lost == {"rerouted": 2} and second.throttled == ("lunar-phase",)


def test_the_windows_of_both_versions_expire_into_their_hours(store: Store) -> None:
    store.add(Batch(NOW, [received("0.1.0", "window"), received("0.9", "window")]))
    assert expire(store, now=NOW + 40 * 86400).merged == 2
    assert sorted((w.device, w.frames) for w in store.windows()) == [("cam-7", 16), ("cam-9", 100)]


def test_words_of_tomorrow_are_kept_and_read_as_unknown(store: Store) -> None:
    store.add(Batch(NOW, [received("0.9", "status"), received("0.9", "event")]))
    (event,) = store.events()
    assert event.why == "rare" and known(event.why, WHY) == UNKNOWN
    assert event.image == json.loads(stored("0.1.0", "event"))["image"] and len(event.image) > 50_000
    (device,) = store.devices()
    assert (device.status.state, device.status.agent) == ("updating", "0.9.0")
    assert device.status.restarts == {"gpio": 3}


@pytest.mark.parametrize("kind", KINDS)
def test_a_newer_schema_is_kept_whole_and_marked(store: Store, kind: str) -> None:
    message = received("0.9", kind, "-schema2")
    assert "schema 2; this version reads 1" in message.problem
    assert store.add(Batch(NOW, [message])) == 1
    assert store.add(Batch(NOW, [message])) == 0, "once"
    assert store.counts() == {kind: 1, "quarantine": 0}
    assert store.unread() == [message.problem]
    with store.begin() as connection:
        (payload,) = connection.exec_driver_sql("SELECT payload FROM messages").one()
    assert json.loads(payload) == json.loads(stored("0.9", f"{NAMES[kind]}-schema2"))
    assert [*store.windows(), *store.events()] == [], "what may mean something else enters no figure"


def test_windows_of_a_newer_schema_are_not_merged_and_read_after_an_update(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = json.loads(stored("0.9", "window")) | {"schema": 2}
    message = validate("eyas/hall-2/cam-9/window", msgspec.json.encode(newer))
    assert isinstance(message, ValidMessage)
    store.add(Batch(NOW, [message, received("0.9", "window", "-schema2")]))
    expired = expire(store, now=NOW + 40 * 86400)
    assert (expired.merged, expired.deleted, store.counts()["window"]) == (0, 0, 2)
    monkeypatch.setattr("eyas_host.fleet.store.validate.SCHEMA", 2)
    assert [window.counts for window in store.windows()] == [{"cross": 30, "disc": 70}], "the version that reads 2"


def test_a_status_of_a_newer_schema_shows_what_can_be_read(store: Store) -> None:
    message = received("0.9", "status", "-schema2")
    assert message.problem.endswith("not its restarts, camera")
    store.add(Batch(NOW, [message]))
    (device,) = store.devices()
    assert (device.status.state, device.status.agent, device.status.digest) == ("online", "0.9.0", "0123456789ab")
    fleet = FleetState()
    fleet.add(message, 0.0)
    assert fleet.devices(0.0)[0].condition(0.0) == "ood"


@pytest.mark.parametrize("version", ["0.1.0", "0.9"])
def test_the_live_view_shows_every_version(version: str) -> None:
    fleet = FleetState()
    for kind in KINDS:
        fleet.add(received(version, kind), 0.0)
    (device,) = fleet.devices(0.0)
    assert device.window is not None and device.window.frames == (16 if version == "0.1.0" else 100)
    assert device.condition(0.0) == "camera", "closed, as recorded; foggy, a word of tomorrow"
    assert device.confidence == pytest.approx(8.5 / 16 if version == "0.1.0" else 0.984)


@pytest.mark.parametrize(("name", "state"), [("status-lost", "lost"), ("status-offline", "offline")])
def test_the_end_of_a_device_of_the_first_version(name: str, state: str) -> None:
    message = validate("eyas/hall-2/cam-7/status", stored("0.1.0", name))
    assert isinstance(message, ValidMessage) and message.is_will == (state == "lost")
    assert isinstance(message.message, Status) and message.message.state == state


@pytest.mark.parametrize(
    "fields", [{"sequence": "3"}, {"spool": 5}, {"device": None}, {"time": "noon"}, {"schema": "2"}, {"schema": 2.5}]
)
def test_without_a_readable_header_nothing_is_read(fields: dict[str, object]) -> None:
    newer = json.loads(stored("0.9", "event-schema2")) | fields
    assert isinstance(validate("eyas/hall-2/cam-9/event", msgspec.json.encode(newer)), InvalidMessage)


def test_an_acknowledged_message_is_quarantined_whole(store: Store) -> None:
    """Its sender forgets it. A field that changed its type without another schema is one of these."""
    wrong = json.loads(stored("0.1.0", "event")) | {"label": ["cross"]}
    payload = msgspec.json.encode(wrong)
    message = validate("eyas/hall-2/cam-7/event", payload)
    assert isinstance(message, InvalidMessage) and message.id is not None
    store.add(Batch(NOW, (), [QuarantinedMessage("t", message.reason, payload, acknowledged=True)]))
    (kept,) = store.quarantined()
    assert kept.payload == payload and len(payload) > 50_000


def test_a_store_of_the_first_version_opens_and_keeps_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "fleet.db"
    connection = sqlite3.connect(path)
    connection.executescript((HERE / "0.1.0" / "store.sql").read_text())
    before = connection.execute("SELECT device, spool, sequence, payload FROM messages ORDER BY sequence").fetchall()
    connection.close()
    assert len(before) == 15
    for _ in range(2):  # migrated, and opened again
        with Store(f"sqlite:///{path}", create=False) as store:
            assert store.counts() == {"cmd/result": 5, "event": 1, "status": 4, "window": 5, "quarantine": 0}
            windows = list(store.windows())
            assert [window.merged for window in windows] == [4, 1, 1, 1, 1, 1]
            assert sum(window.frames for window in windows) == 55
            assert [device.status.state for device in store.devices()] == ["offline"]
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT version FROM eyas_store").fetchall() == [(VERSION,)]
    after = connection.execute("SELECT device, spool, sequence, payload FROM messages ORDER BY sequence").fetchall()
    connection.close()
    assert after == before
    with Store(f"sqlite:///{path}") as store:
        assert store.add(Batch(NOW, [received("0.1.0", "window")])) == 0, "it is there already"
        assert store.add(Batch(NOW, [received("0.9", "window")])) == 1
        expire(store, now=NOW + 40 * 86400)
        merged = [window for window in store.windows() if window.device == "cam-7"]
    assert [(window.merged, window.frames) for window in merged] == [(3, 0), (6, 55)], "without a model, with one"


# The device reads what the host sends.


@pytest.fixture
def executor() -> Iterator[tuple[CommandExecutor, Spool, list[Command]]]:
    executed: list[Command] = []

    def handler(command: Command) -> dict[str, Any]:
        executed.append(command)
        return {}

    with Spool(None, device="cam-7") as spool:
        executor = CommandExecutor(allowed=("bench", "pause"), spool=spool, clock=lambda: NOW)
        executor.register({"bench": handler, "pause": handler})
        yield executor, spool, executed
        executor.close()


@pytest.mark.parametrize(
    ("version", "name", "ok", "detail"),
    [
        ("0.1.0", "command", True, "done"),
        ("0.9", "command", True, "done"),
        ("0.9", "command-list", False, "cannot read it"),
        ("0.9", "command-name", False, "'set-region' is no command"),
        ("0.9", "command-schema2", False, "schema 2; this agent reads schema 1"),
    ],
)
def test_a_command_of_any_version_is_answered(
    executor: tuple[CommandExecutor, Spool, list[Command]], version: str, name: str, ok: bool, detail: str
) -> None:
    commands, spool, executed = executor
    command = json.loads(stored(version, name)) | {"expires": NOW + 60}
    commands.take(msgspec.json.encode(command))
    wait_until(lambda: spool.pending("cmd/result", limit=5), 30, "a result")
    commands.close()
    (held,) = spool.pending("cmd/result", limit=5)
    result = decode(held.payload, Result)
    assert (result.id, result.name, result.ok) == (str(uuid.UUID(command["id"])), command["name"], ok)
    assert detail in result.detail
    assert [command.arguments["seconds"] for command in executed] == ([1.0] if ok else [])


@pytest.mark.parametrize(
    ("version", "name", "forgotten"), [("0.1.0", "ack", True), ("0.9", "ack", True), ("0.9", "ack-schema2", False)]
)
def test_an_acknowledgement_of_a_newer_schema_forgets_nothing(version: str, name: str, forgotten: bool) -> None:
    with Spool(None, device="cam-7") as spool:
        outbox = Outbox(spool, delivery="collector")
        for _ in range(15):
            spool.append(Window())
        sent: list[int] = []
        outbox.connected(receive_maximum=20, now=0.0)
        outbox.send(0.0, lambda held: sent.append(held.sequence) or len(sent))
        assert sent == list(range(15))
        ack = json.loads(stored(version, name)) | {"spool": spool.id}
        assert ack["ranges"] == [[2, 2], [6, 7], [12, 12]]
        assert outbox.on_ack(decode(msgspec.json.encode(ack), Ack), 1.0) == forgotten
        outbox.send(1.0, lambda held: None)
        left = [held.sequence for held in spool.pending("window", limit=99)]
    assert left == [n for n in range(15) if not forgotten or n not in (2, 6, 7, 12)]


# The device reads the host's bundles.


def bundle_of(root: Path, version: str, **fields: Any) -> Path:
    """The tiny bundle with the manifest of a version; the hashes are those of the files that are there."""
    manifest = json.loads(stored(version, "manifest"))
    own = json.loads((root / MANIFEST).read_bytes())
    files = {file["path"]: file for artefact in own["artefacts"] for file in artefact["files"]}
    for artefact in manifest["artefacts"]:
        if isinstance(artefact["files"], list):
            artefact["files"] = [files[file["path"]] for file in artefact["files"]]
    manifest |= {"golden": own["golden"], "reference": own["reference"], **fields}
    (root / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    record_settings(root)
    return root


@pytest.mark.parametrize("version", ["0.1.0", "0.9"])
def test_a_bundle_of_any_version_predicts(bundle_root: Path, version: str) -> None:
    root = bundle_of(bundle_root, version)
    with Classifier.open(root) as classifier:
        assert classifier.artefact.name == ("litert-int8" if version == "0.1.0" else "litert-fp32")
        assert [classifier.predict(draw_shape(label, 77)).label for label in LABELS] == list(LABELS)
    with Classifier.open(root, "openvino") as classifier:
        assert classifier.artefact.name == "openvino-fp32"


def test_artefacts_of_tomorrow_are_installed_and_never_run(bundle_root: Path) -> None:
    bundle = Bundle.open(bundle_of(bundle_root, "0.9"))
    assert bundle.runtimes() == ["litert", "openvino", "onnx"]
    results = {result.artefact: result for result in check_bundle(bundle)}
    assert results["litert-int4"].status == "not checked" and "update the agent" in results["litert-int4"].note
    assert {r.status for name, r in results.items() if name != "litert-int4"} == {"ok"}
    with pytest.raises(
        RuntimeUnavailable, match=r"'litert-int4' is int4 for litert, which this agent .* does not know"
    ):
        choose(bundle, None, "litert-int4")
    with pytest.raises(BundleError, match="does not know: update the agent"):
        choose(bundle, "litert", "litert-int4")


def test_files_of_an_artefact_of_tomorrow_belong_to_the_bundle(bundle_root: Path) -> None:
    """They are verified and installed: the agent that is updated next runs them from the same slot."""
    root = bundle_of(bundle_root, "0.9")
    manifest = json.loads((root / MANIFEST).read_bytes())
    extra = root / "litert-int4.tflite"
    shutil.copy(root / "litert-int8.tflite", extra)
    entry = next(a for a in manifest["artefacts"] if a["name"] == "litert-int8")["files"][0]
    next(a for a in manifest["artefacts"] if a["name"] == "litert-int4")["files"] = [entry | {"path": extra.name}]
    (root / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    assert extra.name in {file.path for file in Bundle.open(root).manifest.files()}
    extra.write_bytes(extra.read_bytes()[:-1])
    with pytest.raises(BundleError, match=extra.name):
        Bundle.open(root)


def test_a_bundle_without_any_known_artefact_is_refused(bundle_root: Path) -> None:
    root = bundle_of(bundle_root, "0.9")
    manifest = json.loads((root / MANIFEST).read_bytes())
    manifest["artefacts"] = [a for a in manifest["artefacts"] if a["name"] == "litert-int4"]
    (root / MANIFEST).write_bytes(msgspec.json.encode(manifest | {"use": {"litert": "litert-int4"}}))
    with pytest.raises(BundleError, match=r"knows none of its artefacts: litert-int4 \(int4 for litert\)"):
        read_manifest(root)


def test_a_governance_of_tomorrow_keeps_images_on_the_device(bundle_root: Path) -> None:
    policy = Policy(PrivacySection(events=True, images=True, sample_rate=1.0))
    policy.use_model(Bundle.open(bundle_of(bundle_root, "0.9")).manifest)
    with Spool(None, device="d") as spool:
        image, why = policy.image(draw_shape(LABELS[0], 1), spool)
    assert image == "" and "governance" in why["image"]


@pytest.mark.parametrize(
    "fields",
    [
        {"preprocessing": {"size": 32, "fit": "letterbox"}},
        {"labels": {"cross": 0, "disc": 1}},
        {"artefacts": {"litert": "litert-fp32.tflite"}},
    ],
)
def test_a_bundle_that_needs_a_newer_agent_says_so_first(bundle_root: Path, fields: dict[str, object]) -> None:
    root = bundle_of(bundle_root, "0.9", min_agent_version="0.9.0", **fields)
    with pytest.raises(BundleError, match=r"needs eyas 0\.9\.0 or newer; this is .*: update the agent"):
        read_manifest(root)


def test_every_recorded_message_is_looked_at() -> None:
    """A file that no test reads proves nothing."""
    text = Path(__file__).read_text()
    names = {path.stem for version in ("0.1.0", "0.9") for path in (HERE / version).iterdir()}
    by_kind = {*NAMES.values(), *(f"{name}-schema2" for name in NAMES.values())}
    assert [name for name in names - by_kind if f'"{name}' not in text] == []
    assert len(names) > 15
