"""`eyas-device check`: verify a bundle and run its golden check on this device.

It proves what `install`, the agent, `doctor` and `eyas flash` prove, and that for every artefact whose runtime is here:
each file has its recorded hash, labels and settings are those that the golden images were packed with, the OOD
reference can be used, and each model gives the recorded predictions. That is integrity, not authenticity: nothing is
signed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from eyas_device.commands import values
from eyas_device.errors import EXIT_CHECK_FAILED

HELP = "verify a bundle: hashes, settings, reference, and every artefact's golden check"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to its parser."""
    parser.add_argument("bundle", type=values.path, metavar="BUNDLE")
    parser.add_argument("--runtime", help="check only this one, e.g. litert (default: all that are installed)")
    parser.add_argument("--threads", type=values.positive_int, default=1, help="inference threads (default 1)")
    parser.add_argument(
        "--config",
        type=values.path,
        metavar="FILE",
        help="judge it with this configuration, as `install` and the agent do",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per artefact")


def main(args: argparse.Namespace) -> int:
    """Print one line per artefact; exit code 1 if one of them failed.

    With `--config`, print instead which artefact would run on this device, and why; exit code 1 if none would.
    """
    from eyas_device.support.logs import show
    from eyas_device.support.streams import to_json

    if args.config is not None:
        return _judge(args.bundle, args.config)

    from eyas_device.bundle import Bundle
    from eyas_device.updates.golden import check_bundle, unproven

    bundle = Bundle.open(args.bundle)
    results = check_bundle(bundle, runtime=args.runtime, threads=args.threads)
    for result in results:
        if args.json:
            print(to_json(result, sys.stdout))
            continue
        status = result.status.upper() if result.status == "failed" else result.status
        line = f"{result.artefact:14} {status}"
        if result.max_dp is not None:
            line += (
                f": agreement {result.agreement:.2f}, max |dp| {result.max_dp:.4f} "
                f"(allowed {bundle.manifest.golden_tolerance:g}), {result.latency_ms:.2f} ms"
            )
        show(f"{line}: {result.note}" if result.note else line)
    if not args.json and (notice := unproven(bundle)):
        show(f"notice: {notice}")
    return EXIT_CHECK_FAILED if any(result.status == "failed" for result in results) else 0


def _judge(bundle: Path, path: Path) -> int:
    from eyas_device.config import read_config
    from eyas_device.runtimes import use_engine_cache
    from eyas_device.support.logs import show
    from eyas_device.updates.judge import prove

    config = read_config(path)
    state = Path(config.device.state)
    use_engine_cache(state)
    proof = prove(bundle, config.model, state)
    show(f"good here: {proof.good}")
    if proof.notice:
        show(f"notice: {proof.notice}")
    return 0
