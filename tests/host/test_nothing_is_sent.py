"""No verb looks a server up that was not named, but for the hub, and none leaves a file outside its folders.

The verbs run one after the other in two processes under an audit hook, with a home of their own: a chain on drawn
images and what works on its run, and the verbs of the workstation, of devices and of the fleet.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from eyas_host.cli.app import NAMES
from eyas_host.models.pretrained import weights_file
from tests.support.audited import Audit, remote, written
from tests.support.brokers import Broker, free_port
from tests.support.device_fixtures import pristine_bundle, weights  # noqa: F401 - fixtures
from tests.support.fleet_parts import open_folder  # noqa: F401 - fixture
from tests.support.shapes import SHAPES, draw_folder

HUB = "hub.test.invalid"
MAY_ASK_THE_HUB = {"teach", "prune", "baseline", "tune", "doctor"}
"""Verbs that train networks with initial weights, or look whether there are some."""
FILES = {
    "secret": "correct horse battery\n",
    "toy.toml": """
[run]
name = "toy"
trackers = ["auto"]
[data]
path = "images"
[image]
size = 64
[teacher]
model = "mobilenetv3_small_100"
weights_file = "{weights}"
head_epochs = 1
epochs = 0
batch = 16
[student]
model = "tf_mobilenetv3_small_minimal_100"
views = 1
epochs = 1
batch = 16
[prune]
epochs = 1
[quantize]
epochs = 1
calibration = 8
[gate]
min_agreement = 0.0
max_dp = 1.0
max_drop = 1.0
[pack]
golden = 4
images = "never"
""",
    "bin/ssh": """#!/bin/sh
case " $* " in *" -O "* | *" -N "*) exit 0 ;; esac
while [ "$1" != me@localhost ] && [ "$1" != localhost ]; do shift; done
shift
exec sh -c "$*"
""",
}
ON_RECIPE = ("toy.toml", "--runs", "runs")
SIGNED = ("--kit", "signed", "--passphrase-file", "secret")
SSH = ("--python", "{python}", "--root", "{folder}/device root")
ON_A_RUN: dict[str, tuple[object, ...]] = {
    "new": ("images", "--name", "fresh"),
    "labels": ("check", *ON_RECIPE),
    "preview": (*ON_RECIPE, "--images", 1, "--views", 1),
    "split": ON_RECIPE,
    "teach": ON_RECIPE,
    "prune": ON_RECIPE,
    "qat": ON_RECIPE,
    "compile": ON_RECIPE,
    "verify": ON_RECIPE,
    "pack": ON_RECIPE,
    "report": ON_RECIPE,
    "distill": ON_RECIPE,
    "baseline": (*ON_RECIPE, "--epochs", 1),
    "tune": (*ON_RECIPE, "--trials", 1, "--epochs", 1, "--finals", 0),
    "sensitivity": (*ON_RECIPE, "--images", 4),
    "pretrain": (
        *("--student", "tf_mobilenetv3_small_minimal_100", "--crops", 16, "--size", 32, "--last-size", 32),
        *("--batch", 8, "--images", "debian", "--runs", "runs"),
    ),
    "evaluate": ("runs/toy/bundle", "images", "--artefact", "litert-int8"),
    "models add": ("runs/toy", "--alias", "champion", "--registry", "registry"),
    "models list": ("--registry", "registry"),
    "models show": ("champion", "--registry", "registry"),
    "models alias": ("challenger", "champion", "--registry", "registry"),
    "models diff": ("champion", "challenger", "--registry", "registry"),
    "models card": ("champion", "--out", "CARD.md", "--registry", "registry"),
    "models export": ("champion", "exported", "--registry", "registry"),
    "retrain": ("images", "--cooldown", 365, "--registry", "registry"),
    "retrain due": ("--due", "--registry", "registry", "--store", "sqlite:///none.db"),
    "models rebuild": ("9.9.9", "--registry", "registry"),
    "models verify": ("--registry", "registry"),
    "models prune": ("--keep", 1, "--registry", "registry"),
    "teach off-line": ("HF_HUB_OFFLINE=1", *ON_RECIPE, "--set", "run.name=offline"),
}
"""Verbs in an order in which each has something to do; the first words may be environment variables."""
OTHERS: dict[str, tuple[object, ...]] = {
    "doctor": (),
    "flash": ("me@localhost", "--bundle", "{bundle}", "--dry-run", "--wheel-dir", "wheels", *SSH),
    "bench": ("me@localhost", "--bundle", "{bundle}", "--seconds", 1, *SSH),
    "broker": ("--kit", "fleet", "--port", "{tls_port}"),
    "enroll": ("cam-1", "--camera", "v4l2:0", "--kit", "fleet", "--broker", "localhost:{tls_port}"),
    "expel": ("cam-1", "--kit", "fleet"),
    "forget": ("cam-1", "--broker", "localhost:{port}"),
    "collect": ("--broker", "localhost:{port}", "--store", "sqlite:///fleet.db"),
    "watch": ("--broker", "localhost:{port}", "--json", "--seconds", 1),
    "send": ("cam-1", "pause", "--broker", "localhost:{port}"),
    "expire": ("--store", "sqlite:///fleet.db"),
    "drift": ("--store", "sqlite:///fleet.db"),
    "fleet": ("--store", "sqlite:///fleet.db"),
    "samples queue": ("--store", "sqlite:///fleet.db"),
    "samples label": ("cam-1", "spool", 1, "disc", "--store", "sqlite:///fleet.db"),
    "samples undo": ("--store", "sqlite:///fleet.db"),
    "samples check": ("--by", "model", "--store", "sqlite:///fleet.db"),
    "samples export": ("labels.csv", "--as", "table", "--store", "sqlite:///fleet.db"),
    "samples import": ("labels.csv", "--store", "sqlite:///fleet.db"),
    "rollout start": ("{bundle}", "--waves", "10%,100%", "--kit", "fleet", "--store", "sqlite:///fleet.db"),
    "rollout run": ("--once", "--broker", "localhost:{port}", "--store", "sqlite:///fleet.db"),
    "rollout status": ("--all", "--store", "sqlite:///fleet.db"),
    "rollout pause": ("--store", "sqlite:///fleet.db"),
    "rollout resume": ("--store", "sqlite:///fleet.db"),
    "rollout approve": ("--store", "sqlite:///fleet.db"),
    "rollout abort": ("--store", "sqlite:///fleet.db"),
    "keys init": SIGNED,
    "publish": ("{bundle}", "--channel", "stable", "--to", "stick", *SIGNED),
    "publish-agent": ("cp311-x86_64=wheels", *SIGNED),
    "keys show": SIGNED[:2],
    "keys rotate": ("online", *SIGNED),
    "keys sign": SIGNED,
    "repo verify": SIGNED[:2],
    "repo renew": SIGNED[:2],
    "revoke": ("1.2.3", *SIGNED),
}
WORDS = ON_A_RUN | OTHERS
ENDED_AFTER = {"broker": 2.0, "collect": 3.0}
"""Seconds after which a verb that runs for ever gets a SIGTERM."""
CODES = {"doctor": {0, 1}, "labels": {0, 1}, "evaluate": {0, 1}, "broker": {0, 143, -15}, "collect": {0, 143}}
NOTHING_THERE = ("send", "keys sign", "models rebuild", "retrain", "samples label")
"""Verbs that find nothing of that name, or nothing to do yet: a mistake."""
CODES |= {name: {2} for name in NOTHING_THERE}
CODES |= {name: {2} for name in OTHERS if name.startswith("rollout ")}  # no repository is there, and no rollout
CODES |= {"rollout status": {0}}


class Outcome(NamedTuple):
    """What all verbs did."""

    folder: Path
    home: Path
    codes: dict[str, int]
    output: str
    lines: Mapping[str, list[str]]
    """Verb -> its lines of the audit log."""


def verb_of(name: str) -> str:
    """The verb of a test's name, which may have a remark behind it."""
    return name if name in NAMES else name.split()[0]


def run_verbs(folder: Path, words: Mapping[str, tuple[object, ...]], **facts: object) -> Outcome:
    """Run verbs in turn in `folder`, under an audit; `facts` are filled into their arguments."""
    home = folder / "home"
    for name in ("home", "tmp", "wheels", "bin", "device root"):
        (folder / name).mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text.replace("{weights}", str(weights_file("mobilenetv3_small_100"))))
    (folder / "bin/ssh").chmod(0o755)
    (folder / "wheels/eyas_device-0.1.0-py3-none-any.whl").touch()
    facts |= {"folder": folder, "python": sys.executable}
    verbs = [
        [name, ENDED_AFTER.get(name, 0), *verb_of(name).split(), *(str(word).format(**facts) for word in words[name])]
        for name in words
    ]
    (folder / "verbs.json").write_text(json.dumps(verbs))
    environment = {
        "HF_ENDPOINT": f"http://{HUB}",
        "TMPDIR": str(folder / "tmp"),
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}:/usr/sbin",
    }
    done = Audit(folder, home, environment).run("tests.support.verbs_in_turn", "verbs.json", timeout=900)
    lines: dict[str, list[str]] = {"": []}
    for line in done.lines:
        if line.startswith("verb "):
            lines[line.removeprefix("verb ")] = []
        else:
            lines[next(reversed(lines))].append(line)
    assert (folder / "codes.json").exists(), done.output
    assert remote(lines[""]) == []
    return Outcome(folder, home, json.loads((folder / "codes.json").read_bytes()), done.output, lines)


@pytest.fixture(scope="module")
def on_a_run(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("chain")
    draw_folder(folder / "images", labels=SHAPES[:2], width=48, height=48)
    draw_folder(folder / "debian/usr/share/tuxpaint/stamps/animals", labels=SHAPES[:2], width=80, height=80)
    return run_verbs(folder, ON_A_RUN)


@pytest.fixture(scope="module")
def others(open_folder: Path, pristine_bundle: Path) -> Iterator[Outcome]:  # noqa: F811 - fixtures
    folder = open_folder
    broker = Broker(folder)
    try:
        broker.start()
        yield run_verbs(folder, OTHERS, bundle=pristine_bundle, port=broker.port, tls_port=free_port())
    finally:
        broker.stop()


@pytest.fixture
def outcome(name: str, request: pytest.FixtureRequest) -> Outcome:
    """The outcome that the verb is part of."""
    found: Outcome = request.getfixturevalue("on_a_run" if name in ON_A_RUN else "others")
    return found


def test_every_verb_is_here() -> None:
    assert {verb_of(name) for name in WORDS} == set(NAMES)


@pytest.mark.parametrize("name", WORDS)
def test_a_verb_asks_nobody_but_the_hub(name: str, outcome: Outcome) -> None:
    allowed = CODES.get(verb_of(name), {0})
    assert outcome.codes[name] in allowed, outcome.output.partition(f"verb {name}\n")[2].partition("\nverb ")[0]
    asked = {line for line in remote(outcome.lines[name]) if HUB not in line}
    assert not asked
    asked = set(remote(outcome.lines[name]))
    assert name in MAY_ASK_THE_HUB or not asked


@pytest.mark.parametrize("name", ["teach", "prune", "doctor"])
def test_the_hub_is_asked_where_it_may_be(name: str, outcome: Outcome) -> None:
    """Else the test would see nothing at all."""
    assert remote(outcome.lines[name])


@pytest.mark.parametrize("name", WORDS)
def test_a_verb_writes_in_its_folders_only(name: str, outcome: Outcome) -> None:
    allowed = (outcome.folder, Path("/dev"), Path("/proc"))
    others = [path for path in written(outcome.lines[name]) if not any(map(path.is_relative_to, allowed))]
    assert not others


@pytest.mark.parametrize("name", ["distill", "doctor"])
def test_the_home_holds_the_list_of_fonts_and_nothing_else(name: str, outcome: Outcome) -> None:
    left = {str(path.relative_to(outcome.home)) for path in outcome.home.rglob("*") if path.is_file()}
    assert {name for name in left if not name.startswith(".cache/eyas/matplotlib/")} == set()
