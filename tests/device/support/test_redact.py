"""Redaction: for any secret in any form that cameras and brokers use, and no change to a text without one."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from urllib.parse import quote

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from eyas_device.support.redact import redact, redact_tree

_USER = st.text("abcXYZ0189._-", min_size=1, max_size=8)
_CODED = st.text(min_size=4, max_size=20).map(lambda text: quote(text, safe=""))
"""A secret as an address should carry it."""
_RAW = st.text(st.characters(codec="ascii", exclude_categories=["Cc", "Zs"]), min_size=4, max_size=20)
"""A secret as people type it: with slashes, at signs, quotes and backslashes."""
_WITH_SPACES = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="'\"\\"), min_size=4, max_size=20
)

_ADDRESSES = [
    "rtsp://{user}:{secret}@10.0.0.7:554/live",
    "rtsps://{user}:{secret}@cam.example/live?profile=1",
    "camera mjpeg:http://{user}:{secret}@cam/stream#12: nothing listens there",
    "https://{user}:{secret}@[fe80::1]:8443/stream",
    "mqtt://{user}:{secret}@broker.example:1883",
    "mqtts://{user}:{secret}@[2001:db8::7]:8883 refused it",
    "ws://{user}:{secret}@broker/mqtt and wss://{user}:{secret}@broker/mqtt",
    "http://{secret}@camera/path",
    "broker '{user}:{secret}@broker.example:1883': HOST or HOST:PORT is needed",
    '["rtsp://{user}:{secret}@a/1", "rtsp://b/2"]',
]
_VALUES = [
    "gst:rtspsrc location=rtsp://10.0.0.7/live user-id={secret} user-pw={secret} ! decodebin ! appsink",
    "gst:souphttpsrc location=http://cam/ proxy-id={secret} proxy-pw={secret} ! jpegparse ! appsink",
    "http://cam/video.cgi?usr=admin&pwd={secret}",
    "http://cam:88/cgi-bin/CGIStream.cgi?cmd=GetMJStream&loginuse=admin&loginpas={secret}&fps=5",
    "http://cam/mjpg?user=admin&password={secret}",
    "http://cam/snap?token={secret}",
    "rtsp://cam:554/user=admin_password={secret}_channel=1_stream=0.sdp?real_stream",
    "rtsp://cam:554/user={secret}_password={secret}_channel=1_stream=0.sdp",
    "http://cam/live?auth={secret}",
    "http://cam/live?key={secret}&size=640x480",
    "http://cam/live?access_token={secret}",
    "https://cam/hls?api_key={secret}",
    "srtsrc uri=srt://host:7001 passphrase={secret} ! appsink",
    "PASSWD={secret}",
    "MQTT_PASSWORD={secret} eyas-device run",
]
_HEADERS = [
    "Authorization: Digest {secret}",
    'Authorization: Digest username="admin", realm="cam", nonce="1", uri="/", response="{secret}"',
    "Authorization: Bearer {secret}",
    "Proxy-Authorization: Basic {secret}",
    "Cookie: session={secret}",
    "X-Api-Key: {secret}",
    'Digest username="{secret}", realm="cam"',
]


def _check(form: str, secret: str, user: str = "admin") -> str:
    assume(secret not in form.replace("{secret}", "").replace("{user}", ""))
    text = form.format(secret=secret, user=user)
    redacted = redact(text)
    assert secret not in redacted
    assert redact(redacted) == redacted
    return redacted


def test_a_secret_that_ends_with_a_backslash_and_looks_like_a_key() -> None:
    assert "0=" not in redact("gst:rtspsrc user-id=;0=\\ user-pw=;0=\\ ! decodebin ! appsink")


@pytest.mark.parametrize("form", [*_ADDRESSES, *_VALUES, *_HEADERS])
@settings(max_examples=40)
@given(user=_USER, secret=_CODED)
def test_an_encoded_secret_never_stays(form: str, user: str, secret: str) -> None:
    _check(form, secret, user)


@pytest.mark.parametrize("form", [form for form in _ADDRESSES if "{user}" in form and form.count("//") == 1])
@given(user=_USER, secret=_RAW)
@example(user="admin", secret="a@b/c:d")
@example(user="admin", secret="a://b")
@example(user="admin", secret="#1?x&y=z")
def test_a_raw_password_in_an_address_never_stays(form: str, user: str, secret: str) -> None:
    redacted = _check(form, secret, user)
    assert "@" not in redacted.partition("***@")[0]


@pytest.mark.parametrize("form", [*_VALUES, *_HEADERS])
@settings(max_examples=60)
@given(secret=_RAW)
@example(secret="&x=1")
@example(secret='"a"bc')
@example(secret='\\"ab')
def test_a_raw_value_never_stays(form: str, secret: str) -> None:
    _check(form, secret)


@pytest.mark.parametrize(
    "form",
    [
        "rtspsrc location=rtsp://10.0.0.7/live user-pw='{secret}' ! decodebin ! appsink",
        'rtspsrc location=rtsp://10.0.0.7/live user-pw = "{secret}" ! decodebin ! appsink',
        'rtspsrc user-pw=(string)"{secret}" location=rtsp://10.0.0.7/live ! appsink',
        "{{'user': 'admin', 'password': '{secret}'}}",
        '{{"pwd" : "{secret}", "fps": 5}}',
        'password = "{secret}"',
    ],
)
@given(secret=_WITH_SPACES)
def test_a_quoted_secret_with_spaces_never_stays(form: str, secret: str) -> None:
    redacted = _check(form, secret)
    assert "***" in redacted and redacted.count("'") + redacted.count('"') >= 2


@given(user=_USER, secret=_CODED)
def test_credentials_in_base64_and_in_an_encoded_address_never_stay(user: str, secret: str) -> None:
    code = base64.b64encode(f"{user}:{secret}".encode()).decode()
    assert code not in redact(f"sent Basic {code} to the camera")
    assert secret not in redact(f"http://proxy/?url=rtsp%3A%2F%2F{user}%3A{secret}%40cam%2Flive")


@given(secret=st.text(min_size=4, max_size=20), other=st.integers())
def test_every_string_of_a_tree_is_redacted(secret: str, other: int) -> None:
    tree = {"password": secret, "finding": [f"http://u:{quote(secret, safe='')}@h/"], "n": other, "none": None}
    redacted = redact_tree(tree)
    assert redacted == {"password": "***", "finding": ["http://***@h/"], "n": other, "none": None}
    assert json.dumps(redacted)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rtsp://admin:S3cret@10.0.0.7:554/live", "rtsp://***@10.0.0.7:554/live"),
        ("rtsp://admin:S3 cret@10.0.0.7/live", "rtsp://***@10.0.0.7/live"),
        ("from http://u:abcd@a/1 to https://v:efgh@[::1]:8/2", "from http://***@a/1 to https://***@[::1]:8/2"),
        ("camera 'http://c/?usr=admin&pwd=S3cret&fps=5': lost", "camera 'http://c/?usr=***&pwd=***&fps=5': lost"),
        ("camera 'http://c/?pwd=S3cret': lost", "camera 'http://c/?pwd=***': lost"),
        (
            "rtsp://c/user=admin_password=tlJwpbo6_channel=1_stream=0.sdp?real_stream",
            "rtsp://c/user=***_password=***_channel=1_stream=0.sdp?real_stream",
        ),
        ("password=a_b_channel=1", "password=***_channel=1"),
        ('{"source":"rtsp://a:b@h/1","mail":"x@y"}', '{"source":"rtsp://***@h/1","mail":"x@y"}'),
        ("user-pw=my\\ long\\ pass name=x", "user-pw=*** name=x"),
        ("Authorization: Basic YWRtaW46c2VjcmV0\nHost: cam", "Authorization: ***\nHost: cam"),
    ],
)
def test_what_is_no_secret_stays_around_it(text: str, expected: str) -> None:
    assert redact(text) == expected


_HARMLESS = [
    "camera rtsp://10.0.0.7:554/live: the host does not respond; is the camera on, and on this network?",
    "check http://USER, user and password, and that the codec is H.264",
    "[telemetry] certificate, key: both are needed, or none",
    'password_file = "/etc/eyas/broker.password"',
    "telemetry: /etc/eyas/broker.password: a password file that others can read; chmod 600",
    "http://[fe80::1]:8080/stream?size=640x480&fps=5",
    "https://medium.com/@someone/a-post",
    "the key of eyas/site/camera-1 ends; Basic authentication is required; a bearer token, or a digest",
    "monkey=5 compass=north author=me keyframe=1 passes=3 user=x",
    "v4l2:/dev/v4l/by-path/platform-3f980000.usb-usb-0:1.2:1.0-video-index0?size=1280x720",
    "picamera2:0 (/base/soc/i2c0mux/i2c@1/imx219@10)",
    "gst:v4l2src device=/dev/video0 ! video/x-raw,format=BGR,framerate=30/1 ! appsink drop=true",
    "frames 12  30.1 fps @ 5 ms; write to admin@example.org at 12:30",
    "LiteRT error: token 5 at 0x12; model shapes 1.2.3 (a:b), key 7",
]


@pytest.mark.parametrize("text", _HARMLESS)
def test_a_text_without_a_secret_is_unchanged(text: str) -> None:
    assert redact(text) == text


@given(st.text(st.characters(exclude_characters="@=:")))
def test_a_text_without_any_form_is_unchanged(text: str) -> None:
    assume("igest" not in text.lower() and "b" not in text.lower())
    assert redact(text) == text


@given(st.text("ab:/@=&?%'\"\\ \n[]user-pwkey*", max_size=60), st.sampled_from([redact, redact_tree]))
def test_any_text_is_redacted_to_a_fixed_point(text: str, function: Callable[[str], str]) -> None:
    once = function(text)
    assert function(once) == once


def test_a_long_text_is_redacted_in_linear_time() -> None:
    for piece in ("a://", "pwd=", "x:y", "'", "user:", "%3A%2F%2F", "Authorization: '", "Basic "):
        text = piece * 4_000
        assert len(redact(text)) <= 4 * len(text)
