"""The broker kit: mosquitto with mutual TLS, where each device may publish only below its own name."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import re
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from eyas_device.errors import LinkError
from eyas_device.support.names import TLS_PORT, BrokerAddress, check_address, format_address
from eyas_device.telemetry.messages import MAX_BYTES
from eyas_host.fleet.broker.account import broker_account, hand_over
from eyas_host.fleet.broker.pki import (
    Authority,
    CredentialError,
    Credentials,
    belong_together,
    days_left,
    exists,
    read_file,
    write_file,
)
from eyas_host.fleet.broker.revocation import hand_to_broker, revoke

HOST_IDENTITY = "eyas-host"
"""Common name of collectors, watchers and senders of commands; reserved, no device may have it."""
AUTHORITY, BROKER, HOST, DEVICES = "ca", "broker", "host", "devices"
"""Folders of a kit."""
_RENEW_DAYS = 30.0
_SIOCGIFADDR = 0x8915
"""Address of an interface; source: linux/sockios.h."""

ACL = f"""\
# Written by `eyas broker`. The user is the common name of its certificate.
user {HOST_IDENTITY}
topic read eyas/#
topic write eyas/+/+/ack
topic write eyas/+/+/cmd
# to remove the retained status and answer of a device that was expelled
topic write eyas/+/+/status
topic write eyas/+/+/answer
# to tell of drift
topic write eyas/+/+/drift
# to point the devices of a group to the version that a rollout wants
topic write eyas/+/group/+/desired

# A device publishes only below its own name, and reads only its acknowledgements, its commands, its status, which shows
# it whether another device has its name, and what rollouts want of groups: that is no secret, and no order either.
pattern readwrite eyas/+/%u/status
pattern write eyas/+/%u/window
pattern write eyas/+/%u/event
pattern write eyas/+/%u/profile
pattern write eyas/+/%u/cmd/result
pattern write eyas/+/%u/answer
pattern read eyas/+/%u/ack
pattern read eyas/+/%u/cmd
pattern read eyas/+/group/+/desired
"""


class Kit(msgspec.Struct, frozen=True):
    """Files and address of a broker."""

    folder: Path
    port: int
    hosts: tuple[str, ...]
    """Names and addresses in its certificate."""
    config: Path
    host: Credentials
    """Credentials of collectors and watchers."""
    address: str
    """Address at which this machine reaches the broker."""
    warnings: tuple[str, ...] = ()
    """What has to be renewed, but cannot be without the authority's key."""


def prepare(folder: Path, *, bind: str | None = None, port: int | None = None, names: Sequence[str] = ()) -> Kit:
    """Create what is missing in `folder`: authority, certificates, access control list, configuration.

    Existing files are reused. Certificates are renewed before they expire, the broker's also when its names change;
    where the authority's key is not here, valid ones are used as they are. Run by root, it hands the broker's files to
    the user that mosquitto will run as.

    Args:
        folder: Folder of the kit.
        bind: Address to listen on; as before by default, at first 127.0.0.1.
        port: Port to listen on; as before by default, at first 8883.
        names: Further names or addresses that devices connect to; as before by default, at first none.

    Raises:
        LinkError: `bind` is not an address.
        CredentialError: a file cannot be read or written, or has to be signed without the authority's key.

    """
    folder = folder.resolve()
    before_port, before_bind = _listener(folder) or (TLS_PORT, "127.0.0.1")
    bind, port = bind or before_bind, port or before_port
    try:
        ipaddress.ip_address(bind)
    except ValueError:
        raise LinkError(f"--bind {bind!r}: an address is needed, e.g. 127.0.0.1 or 0.0.0.0") from None
    for name in names:
        try:
            check_address(name, port, name)
            check_real(name)
        except ValueError as error:
            raise LinkError(f"--name {error}") from None
    authority = open_authority(folder)
    broker, host, account = folder / BROKER, folder / HOST, broker_account()
    hosts = _hosts(bind, names or _lines(broker / "names"))
    warnings = [
        *_renew_server_certificate(authority, broker, hosts, required=names),
        *_renew_host_certificate(authority, host),
    ]
    if authority.can_sign:
        revoke(authority, {})
    crl = hand_to_broker(authority, broker)
    config = broker / "mosquitto.conf"
    if names:
        write_file(broker / "names", "".join(f"{name}\n" for name in names).encode())
    write_file(broker / "acl", ACL.encode())
    write_file(config, _config(broker, bind, port, crl, account.pw_name if account else None).encode())
    try:
        (broker / "data").mkdir(exist_ok=True)
    except OSError as error:
        raise CredentialError(f"{broker / 'data'}: cannot be created ({error.strerror})") from None
    if account:
        hand_over(broker, account)
    credentials = Credentials(host / "ca.crt", host / "client.crt", host / "client.key")
    return Kit(folder, port, hosts, config, credentials, _reachable(bind), tuple(warnings))


def device_address(folder: Path) -> BrokerAddress | None:
    """Address at which devices reach the broker that was prepared in `folder`; None if there is none."""
    port, _ = _listener(folder) or (0, "")
    names = certified_hosts(folder) if port else []
    return BrokerAddress(names[0], port, tls=True) if names else None


def broker_for_devices(folder: Path, option: str = "") -> tuple[BrokerAddress, tuple[str, ...]]:
    """Address at which devices reach the broker of a kit, and the others that they could use.

    Raises `LinkError` if there is no such broker yet; `option` is the one that names the kit in the message.
    """
    port, bind = _listener(folder) or (0, "")
    address = device_address(folder)
    if address is None:
        raise LinkError(
            f"{folder}: no broker was started there yet; `eyas broker{option} --bind 0.0.0.0` comes first, or name one "
            "on another machine with --broker HOST:PORT"
        )
    if address.is_loopback:
        raise LinkError(
            f"the broker of {folder} listens on {bind} only, where no other machine reaches it: start `eyas broker"
            f"{option} --bind 0.0.0.0`, or, for a camera on this machine, use --broker {format_address(bind, port)}"
        )
    others = (BrokerAddress(host, port, tls=True) for host in certified_hosts(folder) if host != address.host)
    return address, tuple(str(other) for other in others if not other.is_loopback)


def certified_hosts(folder: Path) -> list[str]:
    """Names and addresses in the certificate of a kit's broker, the preferred one first; none without a broker."""
    return _lines(folder / BROKER / "hosts")


def check_real(host: str) -> None:
    """Raise `ValueError` for a name that documentation uses in place of the broker's own (RFC 2606)."""
    labels = host.lower().rstrip(".").split(".")
    if labels[-1] in ("example", "invalid") or (labels[-2:-1] == ["example"] and labels[-1] in ("com", "net", "org")):
        raise ValueError(f"{host!r}: an example; put the broker's own name or address there")


def local_address(folder: Path) -> BrokerAddress | None:
    """Address at which this machine reaches the broker that was prepared in `folder`; None if there is none."""
    port, bind = _listener(folder) or (0, "")
    return BrokerAddress(_reachable(bind), port, tls=True) if port else None


def open_authority(folder: Path) -> Authority:
    """The authority of a kit, created in a new one.

    Raises `CredentialError` if it is damaged, or missing although it has signed certificates in this folder.
    """
    ca = folder / AUTHORITY
    there = exists(ca / "ca.crt") or exists(ca / "ca.key")
    if not there and (trusted := [*folder.glob("*/ca.crt"), *folder.glob(f"{DEVICES}/*/ca.crt")]):
        raise CredentialError(
            f"{ca / 'ca.crt'} is missing, but {trusted[0]} is there: copy that to it, and put ca.key beside it where "
            "something has to be signed; a new authority would lock every device out"
        )
    return Authority(ca)


def _renew_server_certificate(
    authority: Authority, folder: Path, hosts: Sequence[str], *, required: Sequence[str]
) -> list[str]:
    """Issue the broker's certificate unless it is valid for these hosts for another month.

    Without the authority's key, returns what should be renewed; a missing `required` name is an error.
    """
    hosts_file, cert = folder / "hosts", folder / "server.crt"
    usable = belong_together(cert, folder / "server.key", authority.certificate) and days_left(cert) > 0
    stored = _lines(hosts_file) if usable else []
    missing = [host for host in hosts if host not in stored]
    if usable and days_left(cert) >= _RENEW_DAYS and (stored == list(hosts) or not (missing or authority.can_sign)):
        return []
    if authority.can_sign or not usable or set(required) & set(missing):
        authority.issue(folder, hosts[0], hosts=hosts, stem="server")
        write_file(hosts_file, ("\n".join(hosts) + "\n").encode())
        return []
    return [f"{cert}: not for {', '.join(missing)}; {_WITH_KEY}" if missing else _expiring(cert)]


def _renew_host_certificate(authority: Authority, folder: Path) -> list[str]:
    cert = folder / "client.crt"
    usable = belong_together(cert, folder / "client.key", authority.certificate) and days_left(cert) > 0
    if usable and days_left(cert) >= _RENEW_DAYS:
        return []
    if authority.can_sign or not usable:
        authority.issue(folder, HOST_IDENTITY)
        return []
    return [_expiring(cert)]


_WITH_KEY = f"start once with {AUTHORITY}/ca.key in its place to renew it"


def _expiring(cert: Path) -> str:
    return f"{cert}: expires in {days_left(cert):.0f} days; {_WITH_KEY}"


def _hosts(bind: str, names: Sequence[str]) -> tuple[str, ...]:
    """Names and addresses of the broker, the preferred one first: an address needs no name service on the devices."""
    own = [*_addresses(), socket.gethostname()] if ipaddress.ip_address(bind).is_unspecified else [bind]
    return tuple(dict.fromkeys([*names, *own, "localhost", "127.0.0.1"]))


def _lines(path: Path) -> list[str]:
    return read_file(path).decode().split() if exists(path) else []


def _listener(folder: Path) -> tuple[int, str] | None:
    """Port and address that the broker of a kit listens on, as configured; None without a configuration."""
    config = folder / BROKER / "mosquitto.conf"
    if not exists(config):
        return None
    match = re.search(r"^listener (\d+) (\S+)$", read_file(config).decode(), re.MULTILINE)
    return (int(match[1]), match[2]) if match else None


def _reachable(bind: str) -> str:
    """Address at which this machine reaches what listens on `bind`."""
    return "localhost" if ipaddress.ip_address(bind).is_unspecified else bind


def _addresses() -> list[str]:
    """IPv4 addresses of this machine, that of the default route first; looking up a route sends nothing."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, interface in socket.if_nameindex():
            with suppress(OSError):  # one without an IPv4 address
                reply = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", os.fsencode(interface)[:15]))
                found.append(socket.inet_ntoa(reply[20:24]))
        with suppress(OSError):
            probe.connect(("192.0.2.1", 9))
            found.insert(0, str(probe.getsockname()[0]))
    return [address for address in dict.fromkeys(found) if not ipaddress.ip_address(address).is_loopback]


def _config(folder: Path, bind: str, port: int, crl: Path | None, user: str | None) -> str:
    return f"""\
# Written by `eyas broker`, which overwrites changes at its next start.
{f"user {user}" if user else "# user: the one that starts it"}
listener {port} {bind}
cafile {folder / "ca.crt"}
{f"crlfile {crl}" if crl else "# crlfile: none yet"}
certfile {folder / "server.crt"}
keyfile {folder / "server.key"}
tls_version tlsv1.2
require_certificate true
use_identity_as_username true
allow_anonymous false
acl_file {folder / "acl"}
persistence true
persistence_location {folder / "data"}/
autosave_interval 60
max_inflight_messages 500
max_queued_messages 100000
max_packet_size {4 * MAX_BYTES}
persistent_client_expiration 7d
log_type error
log_type warning
log_type notice
"""
