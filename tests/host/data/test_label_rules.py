"""Labels: names of folders that people can tell apart."""

from __future__ import annotations

import pytest

from eyas_host.data.label_rules import appearance, check_labels, label_error
from eyas_host.support.errors import DataError


@pytest.mark.parametrize(
    ("label", "why"),
    [
        ("N/A", "separator"),
        ("..", "dot"),
        (".", "dot"),
        ("/abs", "separator"),
        ("..\\x", "separator"),
        ("a\tb", "invisible"),
        ("a\nb", "invisible"),
        ("\x1b[31mred", "invisible"),
        ("\u202eabc", "invisible"),  # right-to-left override: shown backwards
        ("a\u200bb", "invisible"),  # zero-width space
        ("\ufeffok", "invisible"),  # a byte order mark
        ("cross ", "blank"),
        ("\u3000ok", "invisible"),  # blanks of other widths
        ("a\u00a0b", "invisible"),
        ("\u2800", "blank"),  # a Braille blank, which counts as a character
        ("", "blank"),
        ("x" * 201, "long"),
        ("猫" * 67, "long"),
    ],
)
def test_what_no_folder_and_no_terminal_takes_is_refused(label: str, why: str) -> None:
    assert why in label_error(label)


@pytest.mark.parametrize(
    "label",
    [
        "ok",
        "-rf",
        "con:aux*?",
        "a b",
        "猫",
        "Gerät",
        "\u0645\u06a9\u062a\u0628\u200c\u0647\u0627",
        "x" * 200,
        "☀️",
        "👨‍👩‍👧",
        "no_1",
        "1.0",
    ],
)
def test_what_people_write_is_taken(label: str) -> None:
    assert label_error(label) == ""


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("Circle", "circle"),
        ("cat", "c\u0430t"),  # Cyrillic
        ("OK", "\u041eK"),
        ("A", "\u0391"),  # Greek
        ("a b", "a  b"),
        ("OK1", "OK\uff11"),
        ("ﬁne", "fine"),
        ("sun", "sun\ufe0f"),
        ("ab", "a\u200cb"),
        ("a-b", "a\u2013b"),
        ("Straße", "STRASSE"),
    ],
)
def test_labels_that_look_the_same_are_refused_with_both_spelled_out(one: str, two: str) -> None:
    with pytest.raises(DataError, match="look the same") as caught:
        check_labels([one, two, "other"], "set")
    assert ascii(one) in str(caught.value)
    assert ascii(two) in str(caught.value)


@pytest.mark.parametrize(
    ("one", "two"), [("a", "A"), ("10 1", "101"), ("cat", "cut"), ("да", "нет"), ("crack", "crack_2"), ("\u03b1", "a")]
)
def test_labels_that_people_tell_apart_are_two(one: str, two: str) -> None:
    assert appearance(one) != appearance(two)
    check_labels([one, two], "set")


def test_all_wrong_labels_come_in_one_message() -> None:
    with pytest.raises(DataError, match=r"7 labels cannot be used: .*, \.\.\.; a label is"):
        check_labels([f"{number}/x" for number in range(7)], "set")


def test_labels_of_a_table_come_with_their_lines() -> None:
    with pytest.raises(DataError, match=r"'a/b' \(has a path separator, line 7\)"):
        check_labels(["a/b", "ok"], "t.csv", {"a/b": "line 7"})
    with pytest.raises(DataError, match=r"'OK', line 3 and 'ok', line 2 look the same"):
        check_labels(["OK", "ok"], "t.csv", {"OK": "line 3", "ok": "line 2"})
