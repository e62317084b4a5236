"""The bundle's model card and README."""

from __future__ import annotations

import re
from collections.abc import Mapping

from eyas_device.bundle import Manifest
from eyas_device.decision import Decision
from eyas_device.support.packages import BUILD, NEW

_NOT_MEASURED = "not measured"


def model_card(manifest: Manifest, *, training: dict[str, str], strategy: str) -> str:
    """The bundle's model card in Markdown.

    `training` maps the title of each training stage to its summary; `strategy` is a sentence on how the images were
    split.
    """
    spec, confidence, lineage = manifest.preprocessing, manifest.confidence, manifest.lineage
    labels = "\n".join(f"- {_plain(label)}" for label in manifest.labels)
    notices = "\n".join(f"- **{_plain(notice)}**" for notice in manifest.notices) or "- No notices were recorded."
    stages = "\n".join(f"- {_plain(name)}: {_plain(summary)}" for name, summary in training.items())
    return f"""# {_plain(manifest.name)} {_plain(manifest.version)}

Made with Eyas{f" on {_plain(manifest.created)}" if manifest.created else ""}.

## Purpose

Classifies a camera image into one of {len(manifest.labels)} classes, on the device that took it: one image, one
prediction, with a confidence. It is meant for images like those it was trained on, and for nothing else.

## Labels

{labels}

## Data

{notices}
- sha256 of the data: `{_hash(lineage.data)}`
- sha256 of the split: `{_hash(lineage.split)}`. Training, validation and test: {_plain(strategy)}; exact copies left
  out; the test set is held out until the report.

## Training

{stages or "- Not recorded."}
- sha256 of the recipe: `{_hash(lineage.recipe)}`
- sha256 of the parent: `{_hash(lineage.parent)}`

## Input and output

- An image is resized ({spec.fit}, {spec.interpolation}, centre {spec.crop_fraction:.0%}) to {spec.size} x {spec.size}
  pixels, uint8, BGR; normalisation is part of the model.
- Probabilities are softmax(logits / {confidence.temperature:.3g}{" + bias" if confidence.bias else ""}), fitted on
  validation{_biases(manifest)}.
- {_plain(_decision_rule(manifest.decision))}
- Predictions with a confidence below {confidence.threshold:.2f} are reported as uncertain.

## Evidence

Measured on the workstation that made the bundle, one image at a time. Agreement and mean |dp| (difference of
probabilities) refer to the network the artefact was made from.

{_evidence(manifest)}

{_runtime_choices(manifest)}

## Limits

- All splits come from one data set: with other cameras, light, seasons, sites or kinds of object, the model may do
  worse than the figures above. Test it on your own images before you rely on it.
- The model was chosen on validation, so its figures there are optimistic; the run's report has those on the test set.
- Latency is that of the workstation; measure your own device with `eyas-device check .`.
- An image of something else still gets one of the {len(manifest.labels)} labels; low confidence does not reliably
  reveal it.
- Not for decisions about people, and not as the only safeguard where a wrong prediction can cause harm.
"""


def bundle_readme(manifest: Manifest) -> str:
    """The bundle's README in Markdown: its contents and how to run it."""
    labels = ", ".join(_plain(label) for label in manifest.labels)
    return f"""# {_plain(manifest.name)} {_plain(manifest.version)}

An Eyas bundle: an image classifier ({labels}) with golden images that verify it on a device. `CARD.md` is its model
card.

```sh
{NEW}                   # the wheel: `{BUILD}` makes it in a checkout
eyas-device check .                               # does this device reproduce the workstation's predictions?
eyas-device run --bundle . --camera folder:PATH   # classify the images in PATH
```

```python
import cv2
from eyas_device import Classifier

with Classifier.open(".") as classifier:
    print(classifier.predict(cv2.imread("image.jpg")))  # uint8 [h, w, 3], BGR
```
"""


def _evidence(manifest: Manifest) -> str:
    """The table of evidence: one row per artefact."""
    rows = [
        "| artefact | runtime | precision | size | split | balanced accuracy | class-wise ECE | agreement "
        "| mean \\|dp\\| | p50 | p90 |",
        "|---|---|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for artefact in manifest.artefacts:
        evidence = manifest.evidence.get(artefact.name, {})
        size = sum(file.size_bytes for file in artefact.files)
        cells = [
            _plain(artefact.name),
            artefact.runtime,
            artefact.precision,
            f"{size / 1e6:.2f} MB",
            _plain(str(evidence.get("split") or _NOT_MEASURED)),
            _figure(evidence, "balanced_accuracy", ".3f"),
            _figure(evidence, "classwise_ece", ".3f"),
            _figure(evidence, "agreement", ".3f"),
            _figure(evidence, "mean_dp", ".4f"),
            _figure(evidence, "latency_ms_p50", ".2f", " ms"),
            _figure(evidence, "latency_ms_p90", ".2f", " ms"),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _decision_rule(decision: Decision | None) -> str:
    """How probabilities become a predicted label."""
    if decision is None:
        return (
            "The prediction is the label with the largest logit, as the network was trained: with class weights that "
            "is the best one for balanced accuracy, and not always the most probable one."
        )
    return f"The prediction takes the cost of mistakes into account: {decision}."


def _biases(manifest: Manifest) -> str:
    """The bias of each label, to go behind the formula; empty without one."""
    pairs = zip(manifest.labels, manifest.confidence.bias, strict=False)
    listed = ", ".join(f"{_plain(label)} {bias:+.2f}" for label, bias in pairs)
    return f"; bias: {listed}" if listed else ""


def _figure(evidence: Mapping[str, float | str | None], key: str, spec: str, unit: str = "") -> str:
    value = evidence.get(key)
    return f"{value:{spec}}{unit}" if isinstance(value, int | float) else _NOT_MEASURED


def _runtime_choices(manifest: Manifest) -> str:
    """The artefact that each runtime runs, with the reason."""
    lines = []
    for runtime, name in manifest.use.items():
        why = manifest.reasons.get(runtime)
        lines.append(f"- {_plain(runtime)} runs {_plain(name)}" + (f": {_plain(why)}" if why else ""))
    return "\n".join(lines)


def _hash(digest: str | None) -> str:
    return _plain(digest) if digest else "none"


def _plain(text: str) -> str:
    """Text on one line with Markdown and HTML escaped."""
    line = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
