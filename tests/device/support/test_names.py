"""Addresses of brokers in all their usual forms."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eyas_device.support.names import check_address, check_name, check_site, format_address, parse_broker


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("broker.example", "broker.example", None),
        ("broker.example.", "broker.example.", None),
        ("a_b.local:21883", "a_b.local", 21883),
        ("192.0.2.7:1", "192.0.2.7", 1),
        ("::1", "::1", None),
        ("[::1]", "::1", None),
        ("[::1]:65535", "::1", 65535),
        ("fe80::1%eth0", "fe80::1%eth0", None),
        ("[fe80::1%eth0]:8883", "fe80::1%eth0", 8883),
        ("2001:db8::17", "2001:db8::17", None),
        ("2001:db8:0:0:0:0:0:1", "2001:db8:0:0:0:0:0:1", None),
        ("[::1:1883]", "::1:1883", None),
        ("bröker.example:1883", "bröker.example", 1883),
    ],
)
def test_the_forms_of_an_address(text: str, host: str, port: int | None) -> None:
    for tls, default in ((False, 1883), (True, 8883)):
        assert parse_broker(text, tls=tls) == (host, port or default, tls)
    for scheme, default in (("mqtts", 8883), ("ssl", 8883), ("tls", 8883), ("MQTTS", 8883)):
        for configured in (False, True):
            assert parse_broker(f"{scheme}://{text}", tls=configured) == (host, port or default, True)
    for scheme in ("mqtt", "tcp"):
        assert parse_broker(f"{scheme}://{text}/") == (host, port or 1883, False)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ws://host:80", "WebSocket"),
        ("wss://host", "WebSocket"),
        ("http://host", "not for MQTT"),
        ("host/path", "no path"),
        ("mqtt://host:1883/path", "no path"),
        ("BROKER:8883", "placeholder"),
        ("HOST", "placeholder"),
        ("<broker>", "HOST or HOST:PORT"),
        ("$BROKER", "HOST or HOST:PORT"),
        ("host:0", "from 1 to 65535"),
        ("host:99999999", "from 1 to 65535"),
        ("host:", "from 1 to 65535"),
        ("host:\uff11\uff12", "from 1 to 65535"),
        (":1883", "HOST or HOST:PORT"),
        (" host ", "HOST or HOST:PORT"),
        ("a b", "HOST or HOST:PORT"),
        ("host\n", "HOST or HOST:PORT"),
        ("host\x00", "HOST or HOST:PORT"),
        ("[::1", r"written [2001:db8::17]:8883"),
        ("::1:21883", r"written [2001:db8::17]:8883"),
        ("host:1:2", r"written [2001:db8::17]:8883"),
        ("::1:1883", "Write [::1:1883] or [::1]:1883"),
        ("2001:db8::17:8883", "Write [2001:db8::17:8883] or [2001:db8::17]:8883"),
        ("[host]:1", "brackets"),
        ("", "HOST or HOST:PORT"),
    ],
)
def test_what_is_no_address_names_the_right_form(text: str, says: str) -> None:
    for tls in (False, True):
        with pytest.raises(ValueError, match=r".") as caught:
            parse_broker(text, tls=tls)
        assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["u:hunter2@host", "mqtt://u:hunter2@host:1883", "ws://u:hunter2@h", "u:hunter2@h/://x"]
)
def test_a_password_in_an_address_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match="password_file") as caught:
        parse_broker(text)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("text", ["mqtt://host", "tcp://[::1]:1883"])
def test_a_scheme_without_tls_contradicts_certificates(text: str) -> None:
    with pytest.raises(ValueError, match="mqtts://"):
        parse_broker(text, tls=True)


@given(st.ip_addresses(v=6), st.integers(1, 65535))
def test_any_ipv6_address_is_what_the_resolver_reads(address: object, port: int) -> None:
    host, parsed, _ = parse_broker(format_address(str(address), port))
    found = socket.getaddrinfo(host, parsed, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    assert {(family, where[0], where[1]) for family, _, _, _, where in found} == {
        (socket.AF_INET6, socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, str(address))), port)
    }
    assert parse_broker(str(address))[:2] == (str(address), 1883)


@settings(max_examples=300)
@given(st.text())
def test_whatever_is_typed_is_an_address_or_one_line(text: str) -> None:
    try:
        host, port, _ = parse_broker(text)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        check_address(host, port)
        assert not any(c.isspace() for c in host) and host.isprintable()
        assert parse_broker(format_address(host, port)) == (host, port, False)


_HOSTS = st.one_of(
    st.ip_addresses(v=6).map(str),
    st.ip_addresses(v=4).map(str),
    st.builds("fe80::{:x}%{}".format, st.integers(1, 0xFFFF), st.sampled_from(["eth0", "wlan0", "2", "br-lan.7"])),
    st.from_regex(r"[a-z]([a-z0-9-]{0,20}[a-z0-9])?(\.[a-z0-9]{1,10}){0,3}\.?", fullmatch=True),
    st.sampled_from(["bröker.example", "猫.example", "a_b.local"]),
)


@given(_HOSTS, st.integers(1, 65535), st.booleans(), st.sampled_from(["", "mqtt://", "tcp://", "mqtts://", "ssl://"]))
def test_what_is_printed_is_read_as_it_was(host: str, port: int, tls: bool, scheme: str) -> None:
    address = parse_broker(scheme + format_address(host, port), tls=tls and scheme not in ("mqtt://", "tcp://"))
    assert (address.host, address.port) == (host, port)
    assert parse_broker(str(address), tls=address.tls) == address


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "+", "#", "$SYS", "hall/2", "a b", "a\n", "a\0", "Ä", "e\u0301", "x" * 65, "x" * 70_000, "\ud800"],
)
def test_a_name_is_one_level_of_a_topic_and_one_folder(name: str) -> None:
    for check in (check_name, check_site):
        with pytest.raises(ValueError, match=r"letters, digits|not a name") as caught:
            check(name)
        assert len(str(caught.value)) < 200 and str(caught.value).isprintable()


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=70))
def test_an_allowed_name_can_be_a_topic_and_a_folder(name: str) -> None:
    try:
        check_site(name)
    except ValueError as error:
        assert str(error).isprintable()
        return
    assert name.isascii() and not set(name) & set("+#/\\\0$ ") and name not in (".", "..") and len(name) <= 64


def test_the_level_of_collectors_is_no_site() -> None:
    assert check_name("collectors") == "collectors"
    with pytest.raises(ValueError, match="reserved"):
        check_site("collectors")
