"""`eyas keys`, `publish`, `revoke`, `repo` and the enrolment, in the order in which a user types them."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import tomllib

from eyas_device.config import read_config
from eyas_device.doctor import Context
from eyas_device.doctor.signed_updates import updates
from tests.support.device_fixtures import pristine_bundle, weights  # noqa: F401 - fixtures
from tests.support.inside import eyas
from tests.support.repositories import PASSPHRASE, Camera, versioned


@pytest.fixture
def folder(tmp_path: Path, pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811 - fixture
    shutil.copytree(pristine_bundle, tmp_path / "bundle")
    (tmp_path / "secret").write_text(f"{PASSPHRASE}\n")
    monkeypatch.setenv("EYAS_KEY_PASSPHRASE", PASSPHRASE)
    return tmp_path


def test_from_no_keys_to_a_device_that_trusts_them(folder: Path) -> None:
    assert eyas(folder, "publish", "bundle").err.strip().endswith("`eyas keys init` creates one")
    assert eyas(folder, "keys", "init").code == 0
    done = eyas(folder, "publish", "bundle", "--channel", "stable", "--probation", "frames=9", "--to", "stick")
    assert done.code == 0, done.err
    assert "tiny-shapes 1.2.3: published, channel stable" in done.out
    assert eyas(folder, "repo", "verify", "stick").out.endswith("1 release, 1 channel, no problems\n")
    camera = Camera(
        folder / "camera", (folder / "fleet/repository/metadata/1.root.json").read_bytes(), f"{folder}/stick"
    )
    assert camera.wanted() == "1.2.3"
    versioned(folder / "bundle", folder / "next", "1.3.0")
    assert eyas(folder, "publish", "next", "--channel", "stable").code == 0
    done = eyas(folder, "revoke", "1.3.0", "--older", "--to", "stick")
    assert done.out == "tiny-shapes: nothing older than 1.3.0 is installed any more\n", done.err
    with camera.open() as trusted:
        trusted.refresh()
        assert trusted.policy().min_versions == {"tiny-shapes": "1.3.0"}
    assert eyas(folder, "revoke", "1.2.3", "--older", "--to", "stick").code == 0
    done = eyas(folder, "revoke", "1.3.0", "--reason", "wrong at night", "--to", "stick")
    assert "stable/tiny-shapes.json: wants nothing now" in done.out, "what was too old is named by no channel any more"
    with camera.open() as trusted:
        trusted.refresh()
        assert [*trusted.policy().revoked.values()] == ["wrong at night"]
    rows = json.loads(eyas(folder, "keys", "show", "--json").out)
    assert [row["name"] for row in rows] == [
        *("root-1", "root-2", "root-3", "targets", "channels", "snapshot", "timestamp")
    ]
    assert "root version 2 is published" in eyas(folder, "keys", "rotate", "online", "root-1").out
    assert eyas(folder, "repo", "renew", "--to", "stick").code == 0
    assert camera.look().frozen == ""


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["publish", "nothing"], 2, "nothing/manifest.json"),
        (["publish", "bundle", "--probation", "speed=1"], 2, "keys are frames, seconds"),
        (["publish", "bundle", "--probation", "frames=0"], 2, "--probation: Expected `int` >= 1"),
        (["publish", "bundle", "--site", "a/b"], 2, "letters, digits"),
        (["publish", "bundle", "--channel", "../x"], 2, "letters, digits"),
        (["publish", "bundle", "--target", "toaster"], 2, "not a kind of device"),
        (["publish", "bundle", "--passphrase-file", "absent"], 2, "absent: No such file"),
        (["publish", "bundle", "--oms", "absent.pem"], 2, ""),
        (["revoke", "7"], 2, "no such release"),
        (["revoke", "7", "--older"], 2, "no such release"),
        (["revoke", "7", "--older", "--reason", "x"], 2, "without --site, --reason"),
        (["keys", "rotate", "tap"], 2, "no key of this repository"),
        (["keys", "init"], 2, "already"),
        (["keys", "sign"], 2, "no root waits"),
        (["keys", "sign", "x.json"], 2, "belong together"),
        (["repo", "verify", "bundle"], 1, "there is no such file"),
    ],
)
def test_a_mistake_is_one_line_without_a_traceback(folder: Path, words: list[str], code: int, said: str) -> None:
    assert eyas(folder, "keys", "init").code == 0
    done = eyas(folder, *words)
    assert done.code == code
    assert said in done.out + done.err
    assert "Traceback" not in done.err


def test_without_a_passphrase_and_a_terminal_it_says_how_to_give_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EYAS_KEY_PASSPHRASE")
    assert "EYAS_KEY_PASSPHRASE" in eyas(folder, "keys", "init").err
    assert eyas(folder, "keys", "init", "--passphrase-file", "secret").code == 0
    done = eyas(folder, "publish", "bundle")
    assert done.code == 2
    assert "targets: its passphrase is needed: give --passphrase-file" in done.err


def test_an_enrolled_device_pins_the_root(folder: Path) -> None:
    from eyas_host.fleet.broker.kit import prepare

    prepare(folder / "fleet")
    words = ("enroll", "cam-1", "--camera", "v4l2:0", "--broker", "localhost")
    done = eyas(folder, *words, "--update-url", "http://10.0.0.2/eyas")
    assert (done.code, "`eyas keys init` comes first" in done.err) == (2, True)
    assert eyas(folder, *words).code == 0
    own = folder / "fleet/devices/cam-1"
    assert "update" not in tomllib.loads((own / "device.toml").read_text())
    assert eyas(folder, "keys", "init").code == 0
    assert eyas(folder, *words, "--yes", "--update-url", "ftp://10.0.0.2/").code == 2
    done = eyas(folder, *words, "--yes", "--update-url", "http://10.0.0.2/eyas")
    assert done.code == 0, done.err
    assert "signed updates from http://10.0.0.2/eyas" in done.out
    update = tomllib.loads((own / "device.toml").read_text())["update"]
    assert update == {"root": "/etc/eyas/credentials/root.json", "url": "http://10.0.0.2/eyas"}
    assert (own / "root.json").read_bytes() == (folder / "fleet/repository/metadata/1.root.json").read_bytes()
    with tarfile.open(own.with_name("cam-1.tar")) as tar:
        modes = {member.name: member.mode for member in tar}
    assert modes["credentials/root.json"] == 0o644
    config = read_config(own / "device.toml")
    finding = updates(Context(config=config))
    assert (finding.status, "no root of trust is pinned here" in finding.text) == ("red", True)
