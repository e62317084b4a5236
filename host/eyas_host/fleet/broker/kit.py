"""The broker kit: mosquitto with mutual TLS, where each device may publish only below its own name."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from pathlib import Path

import msgspec

from eyas_device.errors import LinkError
from eyas_device.support.names import TLS_PORT, BrokerAddress
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

ACL = f"""\
# Written by `eyas broker`. The user is the common name of its certificate.
user {HOST_IDENTITY}
topic read eyas/#
topic write eyas/+/+/ack
topic write eyas/+/+/cmd
# to remove the retained status and answer of a device that was expelled
topic write eyas/+/+/status
topic write eyas/+/+/answer

# A device publishes only below its own name, and reads only its acknowledgements, its commands and its status: the
# last one shows it whether another device has its name.
pattern readwrite eyas/+/%u/status
pattern write eyas/+/%u/window
pattern write eyas/+/%u/event
pattern write eyas/+/%u/profile
pattern write eyas/+/%u/cmd/result
pattern write eyas/+/%u/answer
pattern read eyas/+/%u/ack
pattern read eyas/+/%u/cmd
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


def prepare(folder: Path, *, bind: str = "127.0.0.1", port: int = TLS_PORT, names: Sequence[str] = ()) -> Kit:
    """Create what is missing in `folder`: authority, certificates, access control list, configuration.

    Existing files are reused. Certificates are renewed before they expire, the broker's also when its names change;
    where the authority's key is not here, valid ones are used as they are. Run by root, it hands the broker's files to
    the user that mosquitto will run as.

    Args:
        folder: Folder of the kit.
        bind: Address to listen on.
        port: Port to listen on.
        names: Further names or addresses that devices connect to.

    Raises:
        LinkError: `bind` is not an address.
        CredentialError: a file cannot be read or written, or has to be signed without the authority's key.

    """
    try:
        ipaddress.ip_address(bind)
    except ValueError:
        raise LinkError(f"--bind {bind!r}: an address is needed, e.g. 127.0.0.1 or 0.0.0.0") from None
    folder = folder.resolve()
    authority = open_authority(folder)
    broker, host, account = folder / BROKER, folder / HOST, broker_account()
    hosts = _hosts(bind, names)
    warnings = [
        *_renew_server_certificate(authority, broker, hosts, required=names),
        *_renew_host_certificate(authority, host),
    ]
    if authority.can_sign:
        revoke(authority, {})
    crl = hand_to_broker(authority, broker)
    config = broker / "mosquitto.conf"
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
    hosts = folder / BROKER / "hosts"
    names = read_file(hosts).decode().split() if port and exists(hosts) else []
    return BrokerAddress(names[0], port, tls=True) if names else None


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
    stored = read_file(hosts_file).decode().split() if usable and exists(hosts_file) else []
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
    """Names and addresses of the broker, the preferred one first."""
    own = [socket.gethostname(), *_addresses()] if ipaddress.ip_address(bind).is_unspecified else [bind]
    return tuple(dict.fromkeys([*names, *own, "localhost", "127.0.0.1"]))


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
    """Address of the default route's interface; looking up a route sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return [str(probe.getsockname()[0])]
        except OSError:
            return []


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
