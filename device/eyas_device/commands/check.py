"""`eyas-device check`: whether a bundle answers here as it did on the workstation."""

from __future__ import annotations

import argparse
from pathlib import Path

from eyas_device.commands import values
from eyas_device.errors import EXIT_CHECK_FAILED

HELP = "verify a bundle's hashes and answer its golden images"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's command line."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--runtime", help="only this one, e.g. litert (default: all that are installed)")
    parser.add_argument("--threads", type=values.count, default=1, help="inference threads (default 1)")
    parser.add_argument("--json", action="store_true", help="one JSON object an artefact")


def main(given: argparse.Namespace) -> int:
    """Print one line an artefact; code 1 if one of them failed."""
    import msgspec

    from eyas_device.bundle import Bundle
    from eyas_device.updates.golden import check

    bundle = Bundle.open(given.bundle)
    results = check(bundle, runtime=given.runtime, threads=given.threads)
    for result in results:
        if given.json:
            print(msgspec.json.encode(result).decode())
            continue
        word = result.status.upper() if result.status == "failed" else result.status
        line = f"{result.artefact:14} {word}"
        if result.max_dp is not None:
            line += (
                f": agreement {result.agreement:.2f}, max |dp| {result.max_dp:.4f} "
                f"(allowed {bundle.manifest.golden_tolerance:g}), {result.latency_ms:.2f} ms"
            )
        print(f"{line}: {result.note}" if result.note else line)
    return EXIT_CHECK_FAILED if any(result.status == "failed" for result in results) else 0
