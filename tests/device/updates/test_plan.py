"""What a device does next: each refusal in its own words, and what no document can make it do."""

from __future__ import annotations

import itertools
import re
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eyas_device.support.hours import DAY, Hours, parse_hours
from eyas_device.support.versions import version_numbers
from eyas_device.updates.plan import (
    MAX_INTERRUPTED,
    Device,
    Held,
    Install,
    Keep,
    Plan,
    Refuse,
    Switch,
    decide,
    escape_revoked,
    wanted_target,
)
from eyas_device.updates.progress import Barred, UpdateRecord
from eyas_device.updates.release import Channel, Policy, Release, Variant, takes_target

DEVICE = Device(
    name="cam-1",
    site="hall-2",
    group="default",
    model="solar",
    board="pi5",
    agent="0.3.0",
    runtimes=("litert", "onnx"),
    minute=12 * 60,
)
NEW = Release(model="solar", version="1.2.0", identity="b" * 64, variants=(Variant(runtimes=("litert",)),))
RUNNING = Held(slot="a", name="solar", version="1.1.0", identity="a" * 64, current=True)
CHANNEL = Channel(model="solar", target="new")
S = TypeVar("S", bound=msgspec.Struct)


def plan(
    *,
    release: Release = NEW,
    channel: Channel = CHANNEL,
    policy: Policy = Policy(),  # noqa: B008 - frozen
    held: tuple[Held, ...] = (RUNNING,),
    device: Device = DEVICE,
    record: UpdateRecord = UpdateRecord(),  # noqa: B008 - frozen
    now: bool = False,
) -> Plan:
    return decide(release, channel, policy, held, device, record, key="k", now=now)


def test_a_newer_release_is_installed() -> None:
    assert plan() == Install(NEW, NEW.variants[0])
    assert plan(held=()) == Install(NEW, NEW.variants[0])


def with_(struct: S, **changes: Any) -> S:
    return msgspec.structs.replace(struct, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"release": with_(NEW, version="1.0.9")}, "solar 1.0.9 is older than 1.1.0, which runs here; .*roll-back"),
        ({"release": with_(NEW, boards=("jetson", "pi4"))}, "is for jetson, pi4; this board is pi5"),
        ({"release": with_(NEW, min_agent="0.3.1")}, "needs eyas-device 0.3.1 or newer; this is 0.3.0"),
        ({"policy": Policy(revoked={"b" * 64: "wrong labels"})}, "solar 1.2.0 was revoked: wrong labels"),
        ({"release": with_(NEW, site="hall-3")}, "for site hall-3 alone; this device belongs to hall-2"),
        ({"policy": Policy(min_versions={"solar": "1.10.0"})}, "older than 1.10.0, the oldest version"),
        ({"release": with_(NEW, model="birds")}, "birds 1.2.0 is another model than solar"),
        (
            {"release": with_(NEW, variants=(Variant(runtimes=("openvino",)),))},
            "is for openvino; here it is litert, onnx",
        ),
        ({"record": UpdateRecord(barred={"b" * 64: Barred(key="k", reason="wrong answers")})}, "^wrong answers$"),
        (
            {"record": UpdateRecord(identity="b" * 64, key="k", interrupted=MAX_INTERRUPTED)},
            "3 installations of solar 1.2.0 ended without a word",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_a_refusal_has_its_own_words(changes: dict[str, Any], words: str) -> None:
    found = plan(**changes)
    assert isinstance(found, Refuse)
    assert re.search(words, found.reason), found.reason


def test_several_reasons_never_cancel_each_other() -> None:
    """Two faults at once are still a refusal: no check sits behind another one's exception."""
    releases = [
        with_(NEW, version="1.0.0"),
        with_(NEW, boards=("jetson",)),
        with_(NEW, min_agent="9"),
        with_(NEW, site="other"),
    ]
    policies = [Policy(revoked={NEW.identity: "x"}), Policy(min_versions={"solar": "2"})]
    rolled_back = with_(CHANNEL, target="", previous="new", rolled_back=True)
    for release, policy, channel in itertools.product(releases, policies, (CHANNEL, rolled_back)):
        assert isinstance(plan(release=release, policy=policy, channel=channel), Refuse)


def test_a_refused_release_is_tried_again_when_something_changed_or_somebody_asks() -> None:
    bar = Barred(key="k", state="rolled back", reason="wrong answers")
    record = UpdateRecord(barred={NEW.identity: bar})
    assert plan(record=record) == Refuse("wrong answers", rolled_back=True)
    assert isinstance(plan(record=UpdateRecord(barred={NEW.identity: Barred(key="other")})), Install)
    assert isinstance(plan(record=record, now=True), Install)


def test_going_back_takes_a_signed_roll_back() -> None:
    old = with_(NEW, version="1.0.0", identity="c" * 64)
    outside = Channel(model="solar", target="new", previous="old", rollout="r", shares={})
    found = plan(release=old, channel=outside)
    assert isinstance(found, Keep) and "newer than 1.0.0" in found.reason
    back = with_(outside, rolled_back=True)
    assert plan(release=old, channel=back) == Install(old, old.variants[0])
    other = Held(slot="b", name="solar", version="1.0.0", identity="c" * 64)
    assert plan(release=old, channel=back, held=(RUNNING, other)) == Switch(
        other, "solar 1.0.0 is in the other slot already"
    )
    refused = with_(other, good=False)
    assert isinstance(plan(release=old, channel=back, held=(RUNNING, refused)), Install)


def test_what_a_person_rolled_back_stays_until_another_release_is_wanted() -> None:
    other = Held(slot="b", name="solar", version="1.2.0", identity=NEW.identity)
    record = UpdateRecord(installed=NEW.identity, state="committed")
    found = plan(held=(RUNNING, other), record=record)
    assert isinstance(found, Keep) and "by hand" in found.reason
    assert isinstance(plan(held=(RUNNING, other), record=record, now=True), Switch)
    newer = with_(NEW, version="1.3.0", identity="d" * 64)
    assert isinstance(plan(release=newer, held=(RUNNING, other), record=record), Install)


def test_the_control_group_installs_the_previous_release_once_more_for_each_rollout() -> None:
    channel = Channel(model="solar", target="new", previous="old", rollout="r", refresh=("cam-1",), shares={"*": 1.0})
    assert wanted_target(channel, DEVICE) == "old"
    old = with_(NEW, version="1.1.0", identity=RUNNING.identity)
    assert plan(release=old, channel=channel) == Install(old, old.variants[0], refresh=True)
    found = plan(release=old, channel=channel, record=UpdateRecord(refreshed="r"))
    assert found == Keep("solar 1.1.0 is up to date", current=True)


def test_hours_of_the_device_and_of_the_channel_are_both_kept() -> None:
    def at(hour: int, hours: str, channel: str = "", clock: str = "") -> Plan:
        device = with_(DEVICE, minute=60 * hour, hours=hours, clock=clock)
        return plan(device=device, channel=with_(CHANNEL, hours=channel))

    assert isinstance(at(23, "22:00-05:00"), Install) and isinstance(at(4, "22:00-05:00"), Install)
    waiting = at(12, "22:00-05:00")
    assert isinstance(waiting, Keep) and waiting.wait_min == 600 and "22:00-05:00" in waiting.reason
    assert isinstance(at(23, "22:00-05:00", "00:00-04:00"), Keep)
    assert isinstance(at(3, "22:00-05:00", "00:00-04:00"), Install)
    assert isinstance(at(3, "", "nonsense"), Keep), "hours that cannot be read are no leave to install at noon"
    wrong = at(23, "22:00-05:00", clock="the clock reads 1970-01-01")
    assert isinstance(wrong, Keep) and "1970" in wrong.reason
    assert isinstance(at(23, "", clock="the clock reads 1970-01-01"), Install), "1970 is no reason to stand still"


def test_a_revoked_bundle_is_left_for_a_good_one() -> None:
    policy = Policy(revoked={RUNNING.identity: "wrong labels"})
    other = Held(slot="b", name="solar", version="1.0.0", identity="c" * 64)
    found = escape_revoked(policy, (RUNNING, other))
    assert isinstance(found, Switch) and found.held == other and "wrong labels" in found.reason
    for bad in (with_(other, good=False), with_(other, identity=RUNNING.identity)):
        kept = escape_revoked(policy, (RUNNING, bad))
        assert isinstance(kept, Keep) and "it stays" in kept.reason
    assert isinstance(escape_revoked(policy, (RUNNING,)), Keep)
    assert escape_revoked(Policy(), (RUNNING,)) is None and escape_revoked(policy, ()) is None


# --- properties ------------------------------------------------------------------------------------------------------

IDENTITIES = [letter * 64 for letter in "abc"]
VERSIONS = ["1.0.0", "1.1.0", "1.2.0", "1.10.0", "2.0.0rc1"]
RELEASES = st.builds(
    Release,
    model=st.sampled_from(["solar", "solar", "birds"]),
    version=st.sampled_from(VERSIONS),
    site=st.sampled_from(["", "hall-2", "hall-3"]),
    identity=st.sampled_from(IDENTITIES),
    boards=st.sampled_from([(), ("pi5",), ("jetson",)]),
    min_agent=st.sampled_from(["", "0.3.0", "0.10.0"]),
    variants=st.lists(st.builds(Variant, runtimes=st.sampled_from([("litert",), ("openvino",), ("litert", "onnx")])))
    .map(tuple),
)  # fmt: skip
POLICIES = st.builds(
    Policy,
    revoked=st.dictionaries(st.sampled_from(IDENTITIES), st.just("why")),
    min_versions=st.dictionaries(st.just("solar"), st.sampled_from(VERSIONS)),
)
CHANNELS = st.builds(
    Channel,
    model=st.just("solar"),
    target=st.sampled_from(["", "new"]),
    previous=st.sampled_from(["", "old"]),
    rollout=st.sampled_from(["", "r1", "r2"]),
    shares=st.dictionaries(st.sampled_from(["*", "default"]), st.floats(0, 1)),
    rolled_back=st.booleans(),
    refresh=st.sampled_from([(), ("cam-1",)]),
    hours=st.sampled_from(["", "22:00-05:00", "11:00-13:00", "x"]),
)
HELD = st.lists(
    st.builds(
        Held,
        slot=st.just(""),
        name=st.just("solar"),
        version=st.sampled_from(VERSIONS),
        identity=st.sampled_from(IDENTITIES),
        good=st.booleans(),
    ),
    max_size=2,
).map(lambda found: tuple(with_(one, slot="ab"[n], current=n == 0) for n, one in enumerate(found)))
RECORDS = st.builds(
    UpdateRecord,
    identity=st.sampled_from(["", *IDENTITIES]),
    installed=st.sampled_from(["", *IDENTITIES]),
    key=st.sampled_from(["k", "other"]),
    interrupted=st.integers(0, 5),
    refreshed=st.sampled_from(["", "r1"]),
    barred=st.dictionaries(st.sampled_from(IDENTITIES), st.builds(Barred, key=st.sampled_from(["k", "other"]))),
)


@given(RELEASES, CHANNELS, POLICIES, HELD, RECORDS, st.integers(0, DAY - 1), st.booleans())
def test_no_document_makes_a_device_install_what_is_not_for_it(
    release: Release,
    channel: Channel,
    policy: Policy,
    held: tuple[Held, ...],
    record: UpdateRecord,
    minute: int,
    now: bool,
) -> None:
    device = with_(DEVICE, minute=minute)
    found = plan(release=release, channel=channel, policy=policy, held=held, device=device, record=record, now=now)
    if isinstance(found, (Keep, Refuse)):
        assert found.reason
        return
    assert release.model == "solar" and release.site in ("", "hall-2") and release.boards in ((), ("pi5",))
    assert release.identity not in policy.revoked and release.min_agent != "0.10.0"
    assert version_numbers(release.version) >= version_numbers(policy.min_versions.get("solar", "0"))
    if held and version_numbers(release.version) < version_numbers(held[0].version):
        assert channel.rolled_back
    if not now:
        assert channel.hours != "x" and not parse_hours(channel.hours).wait(minute)
        assert record.barred.get(release.identity, Barred(key="other")).key != "k"
    if isinstance(found, Switch):
        assert found.held.good and not found.held.current and found.held.identity == release.identity
    else:
        assert set(found.variant.runtimes) & set(device.runtimes)
        assert not found.refresh or (held[0].identity == release.identity and "cam-1" in channel.refresh)


@given(CHANNELS)
def test_a_device_takes_the_target_the_previous_one_or_nothing(channel: Channel) -> None:
    found = wanted_target(channel, DEVICE)
    if isinstance(found, Keep):
        assert not channel.previous
    else:
        assert found == (channel.target if takes_target(channel, "default", "cam-1") else channel.previous) != ""


@given(st.integers(0, DAY - 1), st.integers(0, DAY - 1), st.integers(0, DAY - 1))
def test_hours_end_when_they_should_and_the_wait_leads_into_them(start: int, end: int, minute: int) -> None:
    hours = Hours(start, end)
    wait = hours.wait(minute)
    assert 0 <= wait < DAY and hours.wait((minute + wait) % DAY) == 0
    walked = {(start + step) % DAY for step in range((end - start) % DAY or DAY)}
    assert (minute in walked) == (wait == 0)


@pytest.mark.parametrize("text", ["22:00", "22-05", "24:00-05:00", "22:60-05:00", "22:00-05:00 ", "٢٢:00-05:00"])
def test_hours_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="22:00-05:00 are needed"):
        parse_hours(text)
