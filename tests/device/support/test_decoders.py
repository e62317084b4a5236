"""What decoders print is logged and never reaches standard error; what others print is not lost."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading

import pytest

from eyas_device.errors import ImageError
from eyas_device.preprocess import decode
from eyas_device.support.decoders import DECODERS, DecoderMessages, message_kind
from tests.support.stored_images import HEIGHT, RGB, png, saved


def damaged() -> dict[str, tuple[bytes, str]]:
    jpeg = bytearray(saved(RGB, "JPEG", quality=95))
    jpeg[-120:-100] = b"\xff" * 20
    spare = png(RGB.reshape(HEIGHT, -1), 8, 2, spare=b"z" * 400)
    return {
        "jpeg": (bytes(jpeg), "Corrupt JPEG data: "),
        "png": (spare, "libpng warning: IDAT: Too much image data"),
    }


def print_in_c(text: bytes) -> None:
    library = ctypes.CDLL(None)
    library.fputs(text, ctypes.c_void_p.in_dll(library, "stderr"))


@pytest.mark.parametrize("kind", damaged())
def test_a_decoders_complaint_is_logged_with_the_images_name(
    kind: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    data, message = damaged()[kind]
    with caplog.at_level(logging.WARNING):
        assert decode(data, where="cam#7").shape == RGB.shape
    assert capfd.readouterr().err == ""
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"cam#7: damaged, but decoded: {message}")


def test_the_complaint_is_the_reason_if_nothing_can_be_decoded(capfd: pytest.CaptureFixture[str]) -> None:
    data = bytearray(saved(RGB, "PNG"))
    data[-20] ^= 255  # the check sum of the pixels
    with pytest.raises(ImageError, match=r"^x: not an image that can be decoded: libpng "):
        decode(bytes(data), where="x")
    assert capfd.readouterr().err == ""


def test_what_others_print_meanwhile_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    data, before = damaged()["jpeg"][0], DECODERS.count
    threads = [threading.Thread(target=lambda: [decode(data) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(100):
        os.write(2, b"%d by descriptor\n" % number)
        print(number, "by Python", file=sys.__stderr__, flush=True)
    for thread in threads:
        thread.join()
    print_in_c(b"by C, afterwards\n")
    lines = capfd.readouterr().err.splitlines()
    assert sorted(lines) == sorted(
        [f"{n} by {whom}" for n in range(100) for whom in ("descriptor", "Python")] + ["by C, afterwards"]
    )
    assert DECODERS.count - before == 200


def test_a_forked_child_prints_again(capfd: pytest.CaptureFixture[str]) -> None:
    with DECODERS.kept() as messages:
        child = os.fork()
        if not child:
            print_in_c(b"by the child\n")
            os._exit(0)
        os.waitpid(child, 0)
    assert capfd.readouterr().err == "by the child\n"
    assert messages == []


def test_without_a_file_in_memory_nothing_is_kept_back(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> int:
        raise OSError("no memory")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with DecoderMessages().kept() as messages:
        print_in_c(b"seen\n")
    assert capfd.readouterr().err == "seen\n" and messages == []


def test_kinds_have_no_numbers() -> None:
    lines = {f"Corrupt JPEG data: {n} extraneous bytes before marker 0x{n:02x}" for n in range(30)}
    assert {message_kind(line) for line in lines} == {"Corrupt JPEG data: N extraneous bytes before marker N"}


def test_a_forked_child_has_messages_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    data, before = damaged()["jpeg"][0], DECODERS.count
    child = os.fork()
    if not child:
        decode(data)
        os._exit(DECODERS.count - before)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert DECODERS.count == before
    decode(data)
    assert DECODERS.count == before + 1
    assert capfd.readouterr().err == ""
