"""What a folder has: every file is taken once or counted, whatever links, litter and names there are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eyas_device.support.image_files import (
    BROKEN,
    HIDDEN,
    LISTED,
    NO_SUFFIX,
    NO_TEXT,
    SPECIAL,
    TOOLS,
    describe_left_out,
    list_image_files,
)


def write(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def taken(root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in list_image_files(root).images]


def test_litter_of_systems_and_tools_is_left_out_and_counted(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "B.JPEG", "c.jfif", "._a.png", ".git/x.jpg", ".Trash-1000/files/old.png")
    write(
        tmp_path, "__MACOSX/a.png", "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", "#recycle/b.bmp", "Thumbs.db", "Desktop.ini"
    )
    write(
        tmp_path, "$RECYCLE.BIN/c.png", "lost+found/d.png", "System Volume Information/e.png", "phone.heic", "READ ME"
    )
    listing = list_image_files(tmp_path)
    assert sorted(path.name for path in listing.images) == ["B.JPEG", "a.png", "c.jfif"]
    assert listing.left_out == {HIDDEN: 3, TOOLS: 8, ".heic": 1, NO_SUFFIX: 1}
    assert describe_left_out(listing.left_out).startswith(
        "13 files left out: 8 left behind by a system or a tool, 3 hid"
    )


def test_links_are_followed_once(tmp_path: Path) -> None:
    store = tmp_path / "store"
    write(store, "3f2a", "more/1.png", "more/2.png")
    root = tmp_path / "root"
    write(root, "own.png")
    (root / "linked.jpg").symlink_to(store / "3f2a")  # a store without suffixes: the link has the name
    (root / "z").symlink_to(store / "more")
    (root / "zz").symlink_to(store / "more")
    (root / "loop").symlink_to(root)
    (root / "gone.png").symlink_to(tmp_path / "nothing")
    (root / "self.png").symlink_to(root / "self.png")
    listing = list_image_files(root)
    assert [path.name for path in listing.images] == ["linked.jpg", "own.png", "1.png", "2.png"]
    assert listing.left_out == {BROKEN: 2, LISTED: 2}


def test_what_is_no_file_is_no_image(tmp_path: Path) -> None:
    write(tmp_path, "folder.png/inner.png", "a.png")
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait for ever
    listing = list_image_files(tmp_path)
    assert sorted(path.name for path in listing.images) == ["a.png", "inner.png"]
    assert listing.left_out == {SPECIAL: 1}


def test_a_name_that_is_no_text_is_left_out(tmp_path: Path) -> None:
    os.close(os.open(os.fsencode(tmp_path) + b"/\xfc.png", os.O_CREAT | os.O_WRONLY))
    write(tmp_path, "\u00fc.png")
    assert taken(tmp_path) == ["\u00fc.png"]
    assert list_image_files(tmp_path).left_out == {NO_TEXT: 1}


def test_a_folder_that_cannot_be_listed_is_an_error_or_reported(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list_image_files(tmp_path / "nothing")
    errors: list[OSError] = []
    assert list_image_files(tmp_path / "nothing", on_error=errors.append).images == ()
    assert len(errors) == 1


NAMES = st.sampled_from(
    [
        "a.png",
        "b.JPG",
        "c.heic",
        ".hidden.png",
        "Thumbs.db",
        "d",
        "é.webp",
        "e.txt",
        "@eaDir",
        ".git",
        "train",
        "x y",
        "f.tif",
    ]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    trees=st.lists(st.lists(NAMES, min_size=1, max_size=4), max_size=12),
    links=st.lists(st.tuples(NAMES, NAMES), max_size=3),
)
def test_every_file_is_taken_or_counted(
    tmp_path_factory: pytest.TempPathFactory, trees: list[list[str]], links: list[tuple[str, str]]
) -> None:
    root = tmp_path_factory.mktemp("tree")
    for parts in trees:
        path = root.joinpath(*parts)
        if any(parent.is_file() for parent in path.parents) or path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    files = sum(len(names) for _, _, names in os.walk(root))  # the second formulation: before there are links
    listing = list_image_files(root)
    assert len(listing.images) + sum(listing.left_out.values()) == files
    assert len(set(listing.images)) == len(listing.images)
    for link, target in links:
        if not os.path.lexists(root / link):
            (root / link).symlink_to(root / target)
    again = list_image_files(root)
    real = [path.resolve() for path in again.images if not path.is_symlink()]
    assert len(set(real)) == len(real), "a file that is reached by a link to its folder is taken once"
    assert set(listing.images) <= {*again.images, *(path.parent.resolve() / path.name for path in again.images)}
