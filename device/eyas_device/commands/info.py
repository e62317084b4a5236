"""`eyas-device info`: show the contents of a bundle."""

from __future__ import annotations

import argparse
import sys

from eyas_device.commands import values

HELP = "show the contents of a bundle"
_DIGEST = 12
"""Hex digits of a digest that are shown."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to its parser."""
    parser.add_argument("bundle", type=values.path, metavar="BUNDLE")
    parser.add_argument("--json", action="store_true", help="the manifest as one JSON object")


def main(args: argparse.Namespace) -> int:
    """Print name, labels, decision rule, artefacts with their evidence, preferences and notices."""
    from eyas_device.bundle import Bundle
    from eyas_device.support.logs import show
    from eyas_device.support.streams import to_json

    manifest = Bundle.open(args.bundle).manifest
    if args.json:
        print(to_json(manifest, sys.stdout))
        return 0
    size = manifest.preprocessing.size
    show(f"{manifest.name} {manifest.version}: {', '.join(manifest.labels)}; {size} x {size} px")
    confidence = manifest.confidence
    biases = "".join(f", {label} {bias:+.2f}" for label, bias in zip(manifest.labels, confidence.bias, strict=False))
    show(f"  confidence: temperature {confidence.temperature:.3f}{biases}, uncertain below {confidence.threshold}")
    show(f"  prediction: {manifest.decision or 'the label with the largest logit'}")
    for artefact in manifest.artefacts:
        used = " (used)" if artefact.name in manifest.use.values() else ""
        used = used if artefact.known else f" (not known to this agent: {artefact.precision} for {artefact.runtime})"
        show(f"  {artefact.name:14} {sum(f.size_bytes for f in artefact.files) / 1e6:6.2f} MB{used}")
        evidence = manifest.evidence.get(artefact.name, {})
        if evidence:
            show(" " * 17 + ", ".join(f"{name} {_format_value(value)}" for name, value in evidence.items()))
    for runtime, reason in manifest.reasons.items():
        show(f"  {runtime}: {reason}")
    if manifest.origin:
        show(f"  reduced: some artefacts of the whole bundle ({manifest.origin[:_DIGEST]}) were left out")
    for notice in manifest.notices:
        show(notice)
    return 0


def _format_value(value: object) -> str:
    if value is None:
        return "not measured"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
