"""What a bundle says of itself to people: the model card and a short README."""

from __future__ import annotations

import re
from collections.abc import Mapping

from eyas_device.bundle import Manifest
from eyas_device.decision import Decision

_NOT_MEASURED = "not measured"


def model_card(manifest: Manifest, *, training: dict[str, str], strategy: str) -> str:
    """The bundle's model card in Markdown.

    `training` says how it was made: heading -> sentence; `strategy` how the images were divided, in words.
    """
    spec, confidence, lineage = manifest.preprocessing, manifest.confidence, manifest.lineage
    labels = "\n".join(f"- {_plain(label)}" for label in manifest.labels)
    notices = "\n".join(f"- **{_plain(notice)}**" for notice in manifest.notices) or "- No notices were recorded."
    made = "\n".join(f"- {_plain(name)}: {_plain(sentence)}" for name, sentence in training.items())
    return f"""# {_plain(manifest.name)} {_plain(manifest.version)}

Made with Eyas{f" on {_plain(manifest.created)}" if manifest.created else ""}.

## Purpose

Says which of {len(manifest.labels)} classes a camera image belongs to, on the device that took it. One image, one
answer, with a confidence. It is meant for images like those it was trained on, and for nothing else.

## Labels

{labels}

## Data

{notices}
- sha256 of the data: `{_hash(lineage.data)}`
- sha256 of the split: `{_hash(lineage.split)}`. Training, validation and test: {_plain(strategy)}; exact copies left
  out; the test part stays sealed until the report.

## How it was made

{made or "- Not recorded."}
- sha256 of the recipe: `{_hash(lineage.recipe)}`
- sha256 of the parent: `{_hash(lineage.parent)}`

## Input and answer

- An image is fitted ({spec.fit}, {spec.interpolation}, centre {spec.crop_fraction:.0%}) into {spec.size} x {spec.size}
  pixels, uint8, blue-green-red; normalisation is inside the model.
- Logits are divided by a temperature of {confidence.temperature:.3g}, fitted on validation.
- {_plain(_answer(manifest.decision))}
- Answers below a confidence of {confidence.threshold:.2f} are reported as uncertain.

## Evidence

Measured on the workstation that made the bundle, one image at a time. Agreement and mean |dp| (difference of a
probability) are with the network the artefact was made from.

{_evidence(manifest)}

{_used(manifest)}

## Limits

- The parts are of one set of images: other cameras, light, seasons, sites or kinds of object than in it may give
  worse answers than the figures above. Try it on images of your own before you rely on it.
- Validation chose the model, so its figures there are a little too kind; the run's report has those of the sealed test.
- Latency is that of the workstation; `eyas-device check .` measures the device at hand.
- An image of something else still gets one of the {len(manifest.labels)} labels; a low confidence does not reliably
  reveal it.
- Not for decisions about people, and not as the only safeguard where a wrong answer can cause harm.
"""


def bundle_readme(manifest: Manifest) -> str:
    """The bundle's README in Markdown: what it is and how to run it."""
    labels = ", ".join(_plain(label) for label in manifest.labels)
    return f"""# {_plain(manifest.name)} {_plain(manifest.version)}

An Eyas bundle: an image classifier ({labels}) with what proves it. `CARD.md` is its model card.

```sh
pip install eyas-device
eyas-device check .                               # does this device answer as the workstation did?
eyas-device run --bundle . --camera folder:PATH   # answer the images in PATH
```

```python
import cv2
from eyas_device import Classifier

with Classifier.open(".") as classifier:
    print(classifier.predict(cv2.imread("image.jpg")))  # the pixels: uint8, blue-green-red
```
"""


def _evidence(manifest: Manifest) -> str:
    """A row for each artefact."""
    rows = [
        "| artefact | runtime | precision | size | part | balanced accuracy | agreement | mean \\|dp\\| | p50 | p90 |",
        "|---|---|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    for artefact in manifest.artefacts:
        found = manifest.evidence.get(artefact.name, {})
        size = sum(file.size_bytes for file in artefact.files)
        cells = [
            _plain(artefact.name),
            artefact.runtime,
            artefact.precision,
            f"{size / 1e6:.2f} MB",
            _plain(str(found.get("part") or _NOT_MEASURED)),
            _figure(found, "balanced_accuracy", ".3f"),
            _figure(found, "agreement", ".3f"),
            _figure(found, "mean_dp", ".4f"),
            _figure(found, "latency_ms_p50", ".2f", " ms"),
            _figure(found, "latency_ms_p90", ".2f", " ms"),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _answer(decision: Decision | None) -> str:
    """How probabilities become an answer."""
    if decision is None:
        return "The answer is the likeliest label."
    return f"The answer weighs what mistakes cost: {decision}."


def _figure(found: Mapping[str, float | str | None], key: str, form: str, unit: str = "") -> str:
    value = found.get(key)
    return f"{value:{form}}{unit}" if isinstance(value, int | float) else _NOT_MEASURED


def _used(manifest: Manifest) -> str:
    """What each runtime runs, and why."""
    lines = []
    for runtime, name in manifest.use.items():
        why = manifest.reasons.get(runtime)
        lines.append(f"- {_plain(runtime)} runs {_plain(name)}" + (f": {_plain(why)}" if why else ""))
    return "\n".join(lines)


def _hash(digest: str | None) -> str:
    return _plain(digest) if digest else "none"


def _plain(text: str) -> str:
    """Text on one line in which Markdown and HTML have no meaning."""
    line = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
