"""What a repository says of releases: who takes part in a rollout, and what an agent cannot read."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eyas_device.updates.release import (
    MAX_BYTES,
    Channel,
    Policy,
    Release,
    UpdateError,
    bucket,
    channel_target,
    decode_document,
    release_target,
    takes_target,
)

DEVICES = [f"cam-{number}" for number in range(20_000)]


def test_a_share_takes_that_many_devices_and_a_larger_one_takes_them_too() -> None:
    taken: set[str] = set()
    for share in (0.01, 0.1, 0.5, 1.0):
        channel = Channel(target="t", rollout="r1", shares={"*": share})
        now = {device for device in DEVICES if takes_target(channel, "default", device)}
        assert taken <= now
        assert abs(len(now) / len(DEVICES) - share) < 4 * (share * (1 - share) / len(DEVICES)) ** 0.5 + 1e-9
        taken = now
    assert len(taken) == len(DEVICES)


def test_rollouts_begin_with_different_devices() -> None:
    first, second = ({device for device in DEVICES if bucket(rollout, device) < 0.1} for rollout in ("r1", "r2"))
    assert len(first & second) / len(first) == pytest.approx(0.1, abs=0.03)


@given(st.floats(0, 1), st.text(max_size=80), st.text(max_size=80))
def test_a_bucket_lies_from_0_to_below_1(share: float, rollout: str, device: str) -> None:
    assert 0 <= bucket(rollout, device) < 1
    assert takes_target(Channel(target="t", rollout=rollout or "r", shares={"*": 1.0}), "g", device)
    assert not takes_target(Channel(target="t", rollout=rollout or "r", shares={"*": 0.0}), "g", device)


def test_groups_have_their_own_shares() -> None:
    channel = Channel(target="t", rollout="r1", shares={"lab": 1.0, "hall": 0.0})
    assert takes_target(channel, "lab", "cam-1")
    assert not takes_target(channel, "hall", "cam-1")
    assert not takes_target(channel, "unnamed", "cam-1")
    assert takes_target(msgspec.structs.replace(channel, shares={"*": 1.0, "hall": 0.0}), "unnamed", "cam-1")


def test_the_control_group_and_a_rolled_back_channel_take_nothing_new() -> None:
    assert not takes_target(Channel(target="t", rollout="r", shares={"*": 1.0}, refresh=("cam-1",)), "g", "cam-1")
    assert not takes_target(Channel(target="t", rolled_back=True), "g", "cam-1")
    assert takes_target(Channel(target="t"), "g", "cam-1")


def test_a_site_has_paths_of_its_own() -> None:
    assert release_target("solar", "1.2.0") == "releases/solar/1.2.0/release.json"
    assert channel_target("stable", "solar", "hall-2") == "sites/hall-2/channels/stable/solar.json"
    for name in ("..", "a/b", "", "x" * 65):
        with pytest.raises(ValueError):
            release_target(name, "1.0.0")


@pytest.mark.parametrize(
    ("data", "kind", "reason"),
    [
        (b'{"schema": 2}', Release, "update the agent"),
        (b"[" * 100_000, Policy, "publish it again"),
        (b'{"variants": [{"files": [{"path": "x", "sha256": "../../etc", "size_bytes": 1}]}]}', Release, "publish"),
        (b'{"shares": {"*": 2}}', Channel, "publish"),
        (b"\xff", Channel, "publish"),
        (b" " * (MAX_BYTES + 1), Channel, "are allowed"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(data: bytes, kind: type[Release], reason: str) -> None:
    with pytest.raises(UpdateError, match=reason) as refused:
        decode_document(data, kind, "channels/stable/solar.json")
    assert "channels/stable/solar.json" in str(refused.value)


def test_a_newer_repository_is_read_by_an_older_agent() -> None:
    release = decode_document(b'{"model": "solar", "colour": "red", "probation": {"frames": 9, "x": 1}}', Release, "r")
    assert (release.model, release.probation.frames, release.probation.min_agreement) == ("solar", 9, 0.7)
