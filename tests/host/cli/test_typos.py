"""A typo on the command line makes no file, no folder and no database."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.inside import eyas


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("expire --store sqlite:///typo.db", "store sqlite:///typo.db: there is no store"),
        ("flash root@127.0.0.1:1 --bundle . --identity /nokey", "--identity /nokey: no such file"),
        ("bench root@127.0.0.1:1 --identity /nokey", "--identity /nokey: no such file"),
        ("collect --kit typo --store sqlite:///new.db", "typo/host: no credentials"),
        ("collect --broker host:99999999 --store sqlite:///new.db", "--broker 'host:99999999'"),
        ("watch --broker host:99999999", "--broker 'host:99999999'"),
        ("watch --kit typo", "typo/host: no credentials"),
        ("forget cam-7 --kit typo", "typo/host: no credentials"),
        ("expel cam-7 --kit typo", "typo"),
        ("enroll cam-7 --kit typo --camera fake:", "typo"),
        ("evaluate typo x.csv", "typo"),
        ("collect --ca typo.crt --store sqlite:///new.db", "typo.crt"),
        ("collect --broker 127.0.0.1:1 --certificate x --store sqlite:///new.db", "--certificate, --key"),
        ("preview typo.toml", "typo.toml"),
        ("doctor typo.toml", "typo.toml"),
    ],
)
def test_a_typo_is_an_error_and_makes_nothing(words: str, error: str, tmp_path: Path) -> None:
    done = eyas(tmp_path, *words.split())
    assert done.code in (1, 2) and error in done.err + done.out and "Traceback" not in done.err, done
    assert list(tmp_path.iterdir()) == []
