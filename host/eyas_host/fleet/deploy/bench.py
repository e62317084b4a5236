"""Benchmark a bundle on a device and fetch the result."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from eyas_device.bundle import Bundle
from eyas_host.fleet.connect.preflight import Layout, inspect_device
from eyas_host.fleet.connect.ssh import FleetError, Remote, SshAccess, Target
from eyas_host.support.files import write_bytes

_OVERHEAD_S = 600
"""Allowance for loading, golden check and a slow board, beside the measurement itself."""


class BenchSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How to run a benchmark on a device."""

    seconds: int = 20
    root: str = "/"
    """Folder of the device below which eyas is installed."""
    python: str | None = None
    """Interpreter on the device that has eyas; the installed environment by default."""


def bench(
    target: str,
    bundle: Path | None = None,
    out: Path = Path("benchmarks/results"),
    settings: BenchSettings | None = None,
    *,
    access: SshAccess | None = None,
) -> Path:
    """Run `eyas-device bench` on `target` and write its JSON below `out`, to a file named after the board.

    Args:
        target: The device, `user@host[:port]`.
        bundle: Bundle to send and measure; the device's current slot by default.
        out: Folder for the JSON file.
        settings: How to run it.
        access: How to log in.

    Raises:
        FleetError: the device cannot be reached, has no agent, or returns no figures.

    """
    settings = settings or BenchSettings()
    layout = Layout(settings.root)
    if bundle is not None:
        Bundle.open(bundle)
    with Remote(Target.parse(target), access or SshAccess()) as remote:
        facts = inspect_device(remote, layout, settings.python)
        agent = [settings.python, "-m", "eyas_device"] if settings.python else [f"{layout.opt}/venv/bin/eyas-device"]
        if bundle is None and not facts.slot:
            raise FleetError("no bundle in its slots; flash it first, or give --bundle", remote.target)
        folder = ""
        path = f"{layout.state}/slots/{facts.slot}"
        try:
            if bundle is not None:
                folder = remote.sh("mktemp -d -t eyas-bench-XXXXXX").strip()
                path = f"{folder}/bundle"
                remote.send(bundle, path)
            arguments = ["bench", "--bundle", path, "--seconds", str(settings.seconds), "--json", "-"]
            result = remote.run(*agent, *arguments, timeout_s=20 * settings.seconds + _OVERHEAD_S)
        finally:
            if folder:
                remote.run("rm", "-rf", folder)
        if result.code:
            raise FleetError(f"the benchmark failed ({result.last_line})", remote.target)
        file = out / f"{board_name(result.out, str(remote.target))}.json"
    write_bytes(file, msgspec.json.format(result.out.encode(), indent=1) + b"\n")
    return file


def board_name(text: str, target: str) -> str:
    """Read the board's name from a benchmark's JSON, as a file name. Raises `FleetError` if there is none."""
    try:
        board = msgspec.json.decode(text, type=dict[str, object]).get("board")
    except (msgspec.DecodeError, RecursionError) as error:
        raise FleetError(f"the benchmark's output is not JSON ({error})", target) from None
    name = board.get("model") or board.get("name") if isinstance(board, dict) else board
    slug = re.sub(r"[^a-z0-9]+", "-", str(name or "").lower()).strip("-")[:64]
    if not slug:
        raise FleetError("the benchmark's output names no board", target)
    return slug
