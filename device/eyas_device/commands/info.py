"""`eyas-device info`: say what is in a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "say what is in a bundle"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's command line."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")


def main(given: argparse.Namespace) -> int:
    """Print name, labels, artefacts with their evidence, choices and notices."""
    from eyas_device.bundle import Bundle

    manifest = Bundle.open(given.bundle).manifest
    size = manifest.preprocessing.size
    print(f"{manifest.name} {manifest.version}: {', '.join(manifest.labels)}; {size} x {size} px")
    confidence = manifest.confidence
    print(f"  confidence: temperature {confidence.temperature:.3f}, uncertain below {confidence.threshold}")
    if manifest.decision is not None:
        print(f"  answer: {manifest.decision}")
    for artefact in manifest.artefacts:
        used = " (used)" if artefact.name in manifest.use.values() else ""
        print(f"  {artefact.name:14} {sum(f.size_bytes for f in artefact.files) / 1e6:6.2f} MB{used}")
        facts = manifest.evidence.get(artefact.name, {})
        if facts:
            print(" " * 17 + ", ".join(f"{name} {_figure(value)}" for name, value in facts.items()))
    for runtime, reason in manifest.reasons.items():
        print(f"  {runtime}: {reason}")
    for notice in manifest.notices:
        print(notice)
    return 0


def _figure(value: float | str | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
