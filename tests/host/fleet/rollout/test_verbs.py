"""The verbs of rollouts over a real repository and store: what they refuse, and what they leave behind."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from eyas_device.bundle import Bundle
from eyas_device.telemetry.messages import Status, Update, encode
from eyas_host.fleet.store.database import Batch, Store
from eyas_host.fleet.store.validate import ValidMessage, validate
from tests.support.inside import Done, eyas
from tests.support.repositories import PASSPHRASE, make_repository, versioned

Verb = Callable[..., Done]


@pytest.fixture(scope="module")
def pristine_fleet(tmp_path_factory: pytest.TempPathFactory, pristine_bundle: Path) -> Path:
    """A folder with a kit whose repository has 1.2.3 and 1.3.0, both bundles, and a store with three devices."""
    folder = tmp_path_factory.mktemp("fleet")
    old = Path(shutil.copytree(pristine_bundle, folder / "old"))
    new = versioned(pristine_bundle, folder / "new", "1.3.0")
    repository = make_repository(folder / "fleet")
    for bundle in (old, new):
        repository.publish(bundle)
    with Store(f"sqlite:///{folder / 'fleet.db'}") as store:
        for number in range(3):
            status = Status(
                device=f"cam-{number}",
                spool=str(uuid.UUID(int=number + 1)),
                sequence=1,
                time=time.time(),
                state="online",
                model="tiny-shapes 1.2.3",
                digest=Bundle.open(old).identity[:12],
                update=Update(channel="stable", group="default"),
            )
            valid = validate(f"eyas/hall/cam-{number}/status", encode(status))
            assert isinstance(valid, ValidMessage)
            store.add(Batch(time.time(), [valid]))
    return folder


@pytest.fixture
def rollout(pristine_fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Verb:
    folder = Path(shutil.copytree(pristine_fleet, tmp_path / "work"))
    monkeypatch.setenv("EYAS_KEY_PASSPHRASE", PASSPHRASE)

    def call(*words: object) -> Done:
        return eyas(folder, "rollout", *words)

    return call


def test_what_cannot_be_started_is_refused_with_the_reason(rollout: Verb, tmp_path: Path) -> None:
    for words, message in (
        (["1.3.0"], "no waves"),
        (["9.9.9", "--waves", "100%"], "neither a bundle nor a published version; published are: tiny-shapes 1.2.3, "),
        (["1.3.0", "--waves", "100%", "--channel", "night"], "no device follows channel night of tiny-shapes"),
        (["1.2.3", "--waves", "100%"], "not newer than 1.3.0|what the devices run"),
        (["1.3.0", "--waves", "5%,100%", "--kit", "nowhere"], "nowhere"),
        (["1.3.0", "--plan", "none.toml"], "no such file"),
        (["1.3.0", "--waves", "100%", "--wait", "-1"], "wait"),
    ):
        done = rollout("start", *words)
        assert done.code == 2 and "Traceback" not in done.err, (words, done)
        assert any(part in done.err for part in message.split("|")), (words, done.err)
    assert "no rollouts yet" in rollout("status").err
    (tmp_path / "work/bad.toml").write_text("[rollout]\nabort = 'perhaps'\n[[wave]]\nshare = 2\n[quality]\nalfa = 1\n")
    done = rollout("start", "1.3.0", "--plan", "bad.toml")
    assert done.code == 2 and "3 errors" in done.err and "did you mean 'alpha'" in done.err


def test_a_rollout_by_hand(rollout: Verb) -> None:
    done = rollout("start", "new", "--waves", "1%,100%", "--wait", "0", "--note", "dust")
    assert done.code == 0, done.err
    assert "tiny-shapes-1.3.0: tiny-shapes 1.2.3 -> 1.3.0 for 3 devices" in done.out
    assert "start `eyas rollout run`" in done.err
    assert "is running for tiny-shapes on channel stable" in rollout("start", "1.3.0", "--waves", "100%").err
    done = rollout("run", "--once", "--no-hints")
    assert done.code == 0 and "wave 1 of 2: 1 % of the devices, 1 begin, 1 control: the rollout starts" in done.out
    done = rollout("status")
    assert done.code == 0 and max(map(len, done.out.splitlines()[:8])) <= 100
    assert (
        "nobody carries it out" in done.out
        and "note: dust" in done.out
        and "control group, which have 1.2.3: 1 device" in done.out
    )
    assert rollout("approve").code == 2
    assert rollout("pause", "--reason", "storm").out == "tiny-shapes-1.3.0: paused\n"
    assert rollout("pause").code == 2
    assert rollout("resume").code == 0
    found = json.loads(rollout("status", "--json").out)
    assert found["state"]["status"] == "running" and found["waves"] == [{"devices": 1, "installed": 0, "waiting": 1}]
    assert [step["what"] for step in found["steps"]][-2:] == ["paused", "resumed"]
    assert "all devices go back to 1.2.3" in rollout("abort", "--reason", "wrong labels").out
    assert "all connected devices are back" in rollout("run", "--once", "--no-hints").out
    assert rollout("abort").code == 2
    assert "aborted" in rollout("status", "--all").out
    assert rollout("start", "1.3.0", "--waves", "100%").out.startswith("tiny-shapes-1.3.0-2: ")
