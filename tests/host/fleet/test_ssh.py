"""A connection to a device, against a real OpenSSH server on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eyas_host.fleet.connect.ssh import FleetError, Remote, Target
from tests.support.ssh_board import Board


@pytest.mark.parametrize("text", ["pi@camera", "camera", "pi@10.0.0.7:2222", "pi@[fe80::1]:22", "a.b-c_d"])
def test_targets(text: str) -> None:
    assert str(Target.parse(text)) == text


@given(
    st.one_of(st.sampled_from(["", "-oProxyCommand=x", "a@-b", "a b", "a;b", "a@b:0", "a@b:99999", "a\n"]), st.text())
)
def test_a_target_is_plain_or_refused(text: str) -> None:
    try:
        target = Target.parse(text)
    except FleetError:
        return
    assert not target.host.startswith("-")
    assert not target.user.startswith("-")
    assert str(target).isascii()
    assert not set(str(target)) & set(" \t\n'\"$`;|&<>()*?!#~\\")


@given(
    arguments=st.lists(
        st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"])), min_size=1, max_size=9
    )
)
@settings(max_examples=10, deadline=None)
def test_arguments_arrive_unchanged(remote: Remote, arguments: list[str]) -> None:
    assert remote.run("printf", "%s\\0", *arguments).out.split("\0") == [*arguments, ""]


@pytest.fixture(scope="module")
def remote(server: Board) -> Iterator[Remote]:
    with Remote(Target.parse(server.name), server.access) as connection:
        yield connection


@pytest.mark.parametrize("name", ["a folder with spaces", "long" * 25])
def test_any_temporary_folder_will_do(
    server: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / name))
    with Remote(Target.parse(server.name), server.access) as connection:
        assert connection.run("echo", "there").out == "there\n"


def test_a_command_that_times_out(remote: Remote) -> None:
    with pytest.raises(FleetError, match=r"no result within 0\.5 s"):
        remote.run("sleep", "20", timeout_s=0.5)


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("kill -KILL $$", 137, "killed by SIGKILL (out of memory?)"),
        ("echo halfway >&2; kill -SEGV $$", 139, "killed by SIGSEGV"),
        ("echo no such bundle >&2; exit 2", 2, "no such bundle"),
        ("exit 254", 254, "no output"),
    ],
)
def test_a_command_that_a_signal_ends_is_no_lost_connection(remote: Remote, command: str, code: int, said: str) -> None:
    ended = remote.run("sh", "-c", command)
    assert (ended.code, ended.last_line) == (code, said)
    assert remote.run("echo", "there").out == "there\n"
