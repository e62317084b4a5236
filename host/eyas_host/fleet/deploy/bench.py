"""Measure a bundle on a device and bring the figures here."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from eyas_device.bundle import Bundle
from eyas_host.fleet.connect.preflight import Layout, look
from eyas_host.fleet.connect.ssh import Access, FleetError, Remote, Target
from eyas_host.support.files import write_bytes

_SPARE_S = 600
"""For loading, golden check and a slow board, beside the seconds that were asked for."""


def bench(
    target: str,
    bundle: Path | None = None,
    out: Path = Path("benchmarks/results"),
    *,
    seconds: int = 20,
    root: str = "/",
    python: str | None = None,
    access: Access | None = None,
) -> Path:
    """Run `eyas-device bench` on `target`, with `bundle` or what is in its current slot; the JSON file below `out`.

    The file is named after the board. Raises `FleetError` if the device cannot be reached, has no agent, or does not
    answer with figures.
    """
    layout = Layout(root)
    if bundle is not None:
        Bundle.open(bundle)
    with Remote(Target.parse(target), access or Access()) as remote:
        facts = look(remote, layout, python)
        agent = [python, "-m", "eyas_device"] if python else [f"{layout.opt}/venv/bin/eyas-device"]
        if bundle is None and not facts.slot:
            raise FleetError(f"{remote.target}: no bundle in its slots; flash it first, or give --bundle")
        folder = ""
        place = f"{layout.state}/slots/{facts.slot}"
        try:
            if bundle is not None:
                folder = remote.sh("mktemp -d -t eyas-bench-XXXXXX").strip()
                place = f"{folder}/bundle"
                remote.send(bundle, place)
            words = ["bench", "--bundle", place, "--seconds", str(seconds), "--json", "-"]
            answer = remote.run(*agent, *words, timeout_s=20 * seconds + _SPARE_S)
        finally:
            if folder:
                remote.run("rm", "-rf", folder)
        if answer.code:
            raise FleetError(f"{remote.target}: the benchmark failed ({answer.last})")
        path = out / f"{board_name(answer.out, str(remote.target))}.json"
    write_bytes(path, msgspec.json.format(answer.out.encode(), indent=1) + b"\n")
    return path


def board_name(text: str, where: str) -> str:
    """The board's name in a benchmark's JSON, as a file's name. Raises `FleetError` if there is none."""
    try:
        board = msgspec.json.decode(text, type=dict[str, object]).get("board")
    except (msgspec.DecodeError, RecursionError) as error:
        raise FleetError(f"{where}: the benchmark's answer is not JSON ({error})") from None
    name = board.get("model") or board.get("name") if isinstance(board, dict) else board
    plain = re.sub(r"[^a-z0-9]+", "-", str(name or "").lower()).strip("-")[:64]
    if not plain:
        raise FleetError(f"{where}: the benchmark's answer names no board")
    return plain
