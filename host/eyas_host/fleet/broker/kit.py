"""The broker kit: mosquitto with mutual TLS, where each device may publish only below its own name."""

from __future__ import annotations

import ipaddress
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from eyas_device.errors import LinkError
from eyas_device.telemetry.messages import MAX_BYTES
from eyas_host.fleet.broker.client import TLS_PORT
from eyas_host.fleet.broker.pki import Authority, Credentials, days_left

HOST_IDENTITY = "eyas-host"
"""Common name of collectors, watchers and senders of commands; reserved, no device may have it."""
_RENEW_DAYS = 30.0
_STOP_S = 10.0

ACL = f"""\
# Written by `eyas broker`. The user is the common name of its certificate.
user {HOST_IDENTITY}
topic read eyas/#
topic write eyas/+/+/ack
topic write eyas/+/+/cmd

# A device publishes only below its own name, and reads only its acknowledgements and commands.
pattern write eyas/+/%u/status
pattern write eyas/+/%u/window
pattern write eyas/+/%u/event
pattern write eyas/+/%u/profile
pattern write eyas/+/%u/cmd/result
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


def prepare(folder: Path, *, bind: str = "127.0.0.1", port: int = TLS_PORT, names: Sequence[str] = ()) -> Kit:
    """Create what is missing in `folder`: authority, certificates, access control list, configuration.

    Existing files are reused; the broker's certificate is renewed before it expires and when its names change.

    Args:
        folder: Folder of the kit.
        bind: Address to listen on.
        port: Port to listen on.
        names: Further names or addresses that devices connect to.

    Raises:
        LinkError: `bind` is not an address.
        CredentialError: a file cannot be written.

    """
    try:
        ipaddress.ip_address(bind)
    except ValueError:
        raise LinkError(f"--bind {bind!r}: an address is needed, e.g. 127.0.0.1 or 0.0.0.0") from None
    folder = folder.resolve()
    authority = Authority(folder / "ca")
    hosts = _hosts(bind, names)
    broker = folder / "broker"
    _renew_server_certificate(authority, broker, hosts)
    host = folder / "host"
    if not (host / "client.crt").exists() or days_left(host / "client.crt") < _RENEW_DAYS:
        authority.issue(host, HOST_IDENTITY)
    (broker / "data").mkdir(exist_ok=True)
    (broker / "acl").write_text(ACL, encoding="utf-8")
    config = broker / "mosquitto.conf"
    config.write_text(_config(broker, bind, port), encoding="utf-8")
    return Kit(folder, port, hosts, config, Credentials(host / "ca.crt", host / "client.crt", host / "client.key"))


def serve(kit: Kit, say: Callable[[str], None] = print) -> int:
    """Run mosquitto in the foreground until it ends or SIGTERM/SIGINT arrives, and return its exit code.

    Raises `LinkError` if mosquitto is not installed.
    """
    program = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if program is None:
        raise LinkError("mosquitto is not installed: apt-get install mosquitto, or use `eyas broker --embedded`")
    say(f"broker: mqtts on port {kit.port}, certificate for {', '.join(kit.hosts)}")
    process = subprocess.Popen([program, "-c", str(kit.config)])

    def terminate(*_: object) -> None:
        process.terminate()

    before = {kind: signal.signal(kind, terminate) for kind in (signal.SIGTERM, signal.SIGINT)}
    try:
        return process.wait()
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
        if process.poll() is None:
            process.terminate()
            process.wait(_STOP_S)


def _renew_server_certificate(authority: Authority, folder: Path, hosts: Sequence[str]) -> None:
    """Issue the broker's certificate unless it is valid for these hosts for another month."""
    hosts_file, cert = folder / "hosts", folder / "server.crt"
    same = hosts_file.exists() and hosts_file.read_text(encoding="utf-8").split() == list(hosts)
    if not same or not cert.exists() or days_left(cert) < _RENEW_DAYS:
        authority.issue(folder, hosts[0], hosts=hosts, stem="server")
        hosts_file.write_text("\n".join(hosts) + "\n", encoding="utf-8")


def _hosts(bind: str, names: Sequence[str]) -> tuple[str, ...]:
    """Names and addresses of the broker, the preferred one first."""
    own = [socket.gethostname(), *_addresses()] if ipaddress.ip_address(bind).is_unspecified else [bind]
    return tuple(dict.fromkeys([*names, *own, "localhost", "127.0.0.1"]))


def _addresses() -> list[str]:
    """Address of the default route's interface; looking up a route sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return [str(probe.getsockname()[0])]
        except OSError:
            return []


def _config(folder: Path, bind: str, port: int) -> str:
    user = "user root\n" if os.geteuid() == 0 else ""  # else mosquitto drops to a user that cannot read the key
    return f"""\
# Written by `eyas broker`, which overwrites changes at its next start.
{user}listener {port} {bind}
cafile {folder / "ca.crt"}
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
