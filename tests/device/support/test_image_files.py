"""What a folder has: every file is taken once or counted, whatever links, litter and names there are."""

from __future__ import annotations

import os
import socket
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eyas_device.support.image_files import (
    AROUND,
    BROKEN,
    HIDDEN,
    LISTED,
    NO_SUFFIX,
    NO_TEXT,
    SPECIAL,
    TOOLS,
    describe_left_out,
    is_litter,
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


def test_a_folder_keeps_its_own_place_and_links_around_end(tmp_path: Path) -> None:
    root = tmp_path / "outer" / "root"
    write(root, "b/1.png", "c/deep/2.png", ".store/3.png")
    write(tmp_path / "outer" / "beside", "4.png")
    (root / "a").mkdir()
    for number, target in enumerate((root / "b", root / "c" / "deep", root, root.parent, Path("/"), root / ".store")):
        (root / "a" / f"link{number}").symlink_to(target)
    (root / "z").symlink_to("../beside")
    (root / "zz").symlink_to("z")
    listing = list_image_files(root)
    assert [str(path.relative_to(root)) for path in listing.images] == [
        *("a/link5/3.png", "b/1.png", "c/deep/2.png", "z/4.png")  # what a link shows is not hidden
    ]
    assert listing.left_out == {HIDDEN: 1, LISTED: 4, AROUND: 2}  # root itself counts as listed
    (tmp_path / "alias").symlink_to(root)
    assert list_image_files(tmp_path / "alias").left_out == listing.left_out


def test_hard_links_are_files_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    (tmp_path / "b.png").hardlink_to(tmp_path / "a.png")
    (tmp_path / "c.png").symlink_to("a.png")
    assert taken(tmp_path) == ["a.png", "b.png", "c.png"]


def test_folders_without_numbers_are_told_apart_by_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems number no files."""
    write(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "c").symlink_to(tmp_path / "b")
    real = Path.stat

    def unnumbered(self: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        values = list(real(self, follow_symlinks=follow_symlinks))
        values[1] = 0
        return os.stat_result(values)

    monkeypatch.setattr(Path, "stat", unnumbered)
    listing = list_image_files(tmp_path)
    assert [path.name for path in listing.images] == ["1.png", "2.png"]
    assert listing.left_out == {LISTED: 1}


@pytest.mark.parametrize(
    "name",
    [
        *(
            "@eaDir",
            "@Recycle",
            "#recycle",
            "#snapshot",
            "@tmp",
            ".@__thumb",
            ".AppleDouble",
            ".Trash-1000",
            ".thumbnails",
        ),
        *("lost+found", "System Volume Information", "$RECYCLE.BIN", "$Recycle.Bin", "FOUND.000", "RECYCLER"),
        *(".git", ".dvc", ".ipynb_checkpoints", "__MACOSX", "__pycache__", ".stversions", "~snapshot"),
        *("Catalog Previews.lrdata", "Temporary Items", "node_modules", ".Spotlight-V100", "CaptureOne"),
    ],
)
def test_folders_of_systems_and_tools_are_no_classes_and_have_no_images(name: str, tmp_path: Path) -> None:
    write(tmp_path, f"{name}/deep/1.png", f"{name}/2.jpg", "ok/3.png")
    assert is_litter(name)
    listing = list_image_files(tmp_path)
    assert [path.name for path in listing.images] == ["3.png"]
    assert sum(listing.left_out.values()) == 2


def test_the_folder_of_eyas_itself_is_not_counted(tmp_path: Path) -> None:
    write(tmp_path, ".eyas/test-sets/log.jsonl", "ok/1.png")
    assert list_image_files(tmp_path).left_out == {}


@pytest.mark.parametrize("name", ["thumbs", "tmp", "recycle", "found", "Lost and found", "@home", "macosx", "a~"])
def test_folders_of_people_are_taken(name: str, tmp_path: Path) -> None:
    write(tmp_path, f"{name}/1.png")
    assert len(taken(tmp_path)) == 1


def test_suffixes_are_counted_and_no_name_reaches_the_message(tmp_path: Path) -> None:
    write(tmp_path, *(f"x{suffix}" for suffix in (".heic", ".HEIC", ".raw", ".npy", ".avif", ".jxl", ".txt", ".png~")))
    write(
        tmp_path, "y.tmp", "y.part", "frame.000001", "frame.000002", "v1.2 final", "z.\x1b[31m", "w.\n", "u.фото", "t."
    )
    listing = list_image_files(tmp_path)
    assert not listing.images
    usual = {".raw", ".npy", ".avif", ".jxl", ".txt", ".png~", ".tmp", ".part"}
    assert listing.left_out == {".heic": 2, NO_SUFFIX: 7} | dict.fromkeys(usual, 1)
    said = describe_left_out(listing.left_out)
    assert said.isprintable()
    assert said.startswith("17 files left out: 7 without a usual suffix, 2 .heic, 1 ")
    assert said.endswith("4 of other kinds")


def test_strange_names_are_taken(tmp_path: Path) -> None:
    names = ["a\nb.png", "\x07.png", "\u202egnp.png", "😀.png", "x" * 251 + ".png", " .png", "-rf.png", "*.png"]
    names += [unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD")]
    write(tmp_path, *names)
    assert sorted(taken(tmp_path)) == sorted(names)


def test_litter_that_cannot_be_listed_is_left_out_and_a_class_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`lost+found` is its owner's alone; a folder may also go away while it is listed."""
    write(tmp_path, "a/1.png", "lost+found/2.png")
    real = os.scandir

    def scandir(path: Path) -> Iterator[os.DirEntry[str]]:
        if path.name in closed:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    closed = {"lost+found"}
    assert list_image_files(tmp_path).left_out == {TOOLS: 1}
    closed = {"a"}
    with pytest.raises(PermissionError):
        list_image_files(tmp_path)


def test_what_is_no_file_is_no_image(tmp_path: Path) -> None:
    write(tmp_path, "folder.png/inner.png", "a.png")
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait for ever
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(os.fspath(tmp_path / "s.png"))
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    listing = list_image_files(tmp_path)
    assert sorted(path.name for path in listing.images) == ["a.png", "inner.png"]
    assert listing.left_out == {SPECIAL: 3}


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
