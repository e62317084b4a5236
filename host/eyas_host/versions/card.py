"""The model card of a version: what it was made from, how good it is on images that it never saw, and where it fails.

Its head is YAML as the Hugging Face Hub reads it (license, task, base model, results), its body Markdown for people.
All of it comes from the version's own files: the run's report, the bundle's manifest and the record.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from eyas_device.bundle import MANIFEST, Manifest
from eyas_host.pipeline.runner import BUNDLE, REPORT
from eyas_host.versions.record import RegistryError, VersionRecord
from eyas_host.versions.registry import Registry

NOT_MEASURED = "not measured"
_NON_COMMERCIAL = "non-commercial"
_BACKENDS = ("litert", "openvino", "onnx", "torch")


def version_card(registry: Registry, record: VersionRecord, *, license_id: str = "", drift: Sequence[str] = ()) -> str:
    """The card in Markdown with a YAML head.

    Args:
        registry: Where the version's files are.
        record: The version.
        license_id: Identifier of its licence, as the Hub and SPDX know it; `other` where nobody said.
        drift: What the fleet reports since the release, a line each; without any, that nothing was looked at.

    Raises:
        RegistryError: its files were removed, or cannot be read.

    """
    manifest = _manifest(registry, record)
    report = _report(registry, record)
    aliases = registry.aliases().get(record.model, {})
    serving = sorted(alias for alias, version in aliases.items() if version == record.version)
    parts = [
        _head(record, report, license_id or "other"),
        " ".join([f"# {_plain(record.model)} {_plain(record.version)}", *(f"({alias})" for alias in serving)]),
        f"An image classifier for cameras with {len(record.labels)} classes: "
        f"{', '.join(_plain(label) for label in record.labels)}. Made with Eyas {_plain(record.tools.eyas)}"
        f"{f' on {_plain(record.created)}' if record.created else ''}."
        + (f" {_plain(record.note)}" if record.note else ""),
        *_verdict(record, report),
        "## Data",
        *_data(record),
        "## Figures on held-out images",
        *_figures(record, report),
        "## By class",
        *_classes(report, record.shipped),
        "## By backend",
        *_backends(report),
        "## Calibration",
        *_calibration(report, manifest),
        "## When light, focus or dirt change",
        *_robustness(report),
        "## Since the release",
        *(drift or [f"What the fleet reports was not looked at ({NOT_MEASURED})."]),
        "## Lineage",
        *_lineage(registry, record),
        "## Limits",
        *_limits(record, report),
        "## Licence",
        *_licence(record, license_id),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _manifest(registry: Registry, record: VersionRecord) -> Manifest:
    data = registry.open_file(record, f"{BUNDLE}/{MANIFEST}") or b""
    try:
        return msgspec.json.decode(data, type=Manifest)
    except msgspec.MsgspecError as error:
        raise RegistryError(f"{record.name}: its manifest cannot be read ({error})") from None


def _report(registry: Registry, record: VersionRecord) -> dict[str, Any]:
    """The run's report as plain values; empty where it had none of this bundle."""
    data = registry.open_file(record, REPORT) if record.figures else None
    return {} if data is None else msgspec.json.decode(data, type=dict[str, Any])


def _head(record: VersionRecord, report: Mapping[str, Any], license_id: str) -> str:
    """The YAML head; every text is a JSON string, which YAML reads as it is."""
    figures = record.figures.get(record.shipped)
    lines = [
        "---",
        f"license: {_yaml(license_id)}",
        "library_name: eyas",
        "pipeline_tag: image-classification",
        "tags:",
        *(f"- {_yaml(tag)}" for tag in ("image-classification", "edge", *_runtimes(report))),
        "datasets:",
        f"- {_yaml(f'sha256:{record.data.data}')}",
        "metrics:",
        *(f"- {name}" for name in ("accuracy", "f1", "roc_auc")),
    ]
    if base := _base_models(report):
        lines += ["base_model:", *(f"- {_yaml(name)}" for name in base), "base_model_relation: finetune"]
    if figures is not None:
        lines += [
            "model-index:",
            f"- name: {_yaml(record.name)}",
            "  results:",
            "  - task: {type: image-classification}",
            f"    dataset: {{name: {_yaml('held-out test images')}, type: {_yaml(f'sha256:{record.data.data}')}}}",
            "    metrics:",
        ]
        for kind, name, value in (
            ("accuracy", "balanced accuracy", figures.balanced_accuracy),
            ("f1", "macro F1", figures.f1),
            ("roc_auc", "AUC", figures.auc),
        ):
            if value is not None:
                lines.append(f"    - {{type: {kind}, name: {_yaml(name)}, value: {value:.4f}}}")
    return "\n".join([*lines, "---"])


def _base_models(report: Mapping[str, Any]) -> list[str]:
    """Networks of timm that it was trained from, where the recipe names them."""
    recipe = report.get("recipe", {})
    return [f"timm/{name}" for name in [recipe.get("student", {}).get("model", "")] if name]


def _runtimes(report: Mapping[str, Any]) -> list[str]:
    found = {variant.get("runtime") for variant in report.get("variants", ())}
    return [name for name in _BACKENDS if name in found]


def _verdict(record: VersionRecord, report: Mapping[str, Any]) -> Iterator[str]:
    if not record.verdict:
        yield "**Nobody measured it on held-out images:** the run had no report when this version was registered."
        return
    reasons = "; ".join(_plain(str(reason)) for reason in report.get("ship", {}).get("reasons", ()))
    yield f"**Verdict of the recipe's bounds: {record.verdict}.** {reasons}"


def _data(record: VersionRecord) -> Iterator[str]:
    labels = list(record.labels)
    rows = [f"| split | images | {' | '.join(map(_plain, labels))} |", f"|---|--:|{'--:|' * len(labels)}"]
    for split, counts in record.data.counts.items():
        cells = " | ".join(str(counts.get(label, 0)) for label in labels)
        rows.append(f"| {split} | {sum(counts.values())} | {cells} |")
    yield "\n".join(rows)
    yield f"Assigned {_plain(record.data.strategy)}. Revision of the data: `{record.data.data[:16]}`; of the split: "
    yield f"`{record.data.split[:16]}`. The version's `split.json` has the hash of each image."
    if record.data.notices:
        yield "\n".join(f"- **{_plain(notice)}**" for notice in record.data.notices)


def _figures(record: VersionRecord, report: Mapping[str, Any]) -> Iterator[str]:
    if not record.figures:
        yield f"{NOT_MEASURED.capitalize()}."
        return
    rows = ["| network | balanced accuracy | 95 % interval | F1 | AUC | class-wise ECE |", "|---|--:|---|--:|--:|--:|"]
    for name, one in record.figures.items():
        low, high = one.balanced_accuracy_ci
        mark = "**" if name == record.shipped else ""
        rows.append(
            f"| {mark}{_plain(name)}{mark} | {one.balanced_accuracy:.3f} | {low:.3f} to {high:.3f} | "
            f"{_number(one.f1)} | {_number(one.auc)} | {_number(one.classwise_ece)} |"
        )
    yield "\n".join(rows)
    times = report.get("test_accesses")
    yield (
        f"**{_plain(record.shipped)}** is what devices run by default. These images were held out from training and "
        f"from every choice{f'; they were read {times} times in all' if times else ''}."
    )


def _classes(report: Mapping[str, Any], shipped: str) -> Iterator[str]:
    scores = report.get("scores", {}).get(shipped, {})
    labels, classes = report.get("labels", ()), scores.get("classes", ())
    if not classes:
        yield f"{NOT_MEASURED.capitalize()}."
        return
    rows = ["| class | images | recall | 95 % interval | precision | F1 |", "|---|--:|--:|---|--:|--:|"]
    for label, one in zip(labels, classes, strict=False):
        interval = one.get("recall_ci")
        between = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else NOT_MEASURED
        rows.append(
            f"| {_plain(label)} | {one['support']} | {_number(one['recall'])} | {between} | "
            f"{_number(one['precision'])} | {_number(one['f1'])} |"
        )
    yield "\n".join(rows)
    worst = min(
        (pair for pair in zip(labels, classes, strict=False) if pair[1]["support"]),
        key=lambda pair: pair[1]["recall"],
        default=None,
    )
    if worst is not None:
        yield f"Weakest: {_plain(worst[0])}, of which {1 - worst[1]['recall']:.1%} are missed."


def _backends(report: Mapping[str, Any]) -> Iterator[str]:
    artefacts = [one for one in report.get("variants", ()) if one.get("runtime") in _BACKENDS[:-1]]
    if not artefacts:
        yield f"{NOT_MEASURED.capitalize()}."
        return
    rows = [
        "| artefact | runtime | precision | size | agreement | p50 | threads |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for one in artefacts:
        latency, size = one.get("latency_ms") or {}, one.get("size_bytes")
        p50 = latency.get("p50")
        rows.append(
            f"| {_plain(one['name'])} | {one['runtime']} | {one['precision']} | "
            f"{f'{size / 1e6:.2f} MB' if size else NOT_MEASURED} | {_number(one.get('agreement'))} | "
            f"{f'{p50:.2f} ms' if p50 else NOT_MEASURED} | {one.get('threads') or ''} |"
        )
    yield "\n".join(rows)
    machine = ", ".join(_plain(str(value)) for value in report.get("machine", {}).values())
    yield f"Latencies are those of the workstation ({machine}); `eyas bench` measures a device."
    refused = report.get("refused", {})
    if refused:
        yield "\n".join(f"- Not packed: {_plain(name)}, {_plain(why)}" for name, why in refused.items())


def _calibration(report: Mapping[str, Any], manifest: Manifest) -> Iterator[str]:
    confidence = manifest.confidence
    yield (
        f"Probabilities are softmax(logits / {confidence.temperature:.3g}{' + bias' if confidence.bias else ''}), "
        f"fitted on validation. Below {confidence.threshold:.2f} a prediction counts as uncertain."
    )
    bins = report.get("reliability", {})
    for when in ("before", "after"):
        if when in bins:
            error = sum(one["fraction"] * abs(one["confidence"] - one["accuracy"]) for one in bins[when])
            yield f"- Expected calibration error on held-out images {when} calibration: {error:.3f}"


def _robustness(report: Mapping[str, Any]) -> Iterator[str]:
    found = report.get("robustness") or {}
    if not found.get("rows"):
        yield f"{NOT_MEASURED.capitalize()}."
        return
    rows = ["| change | balanced accuracy | lost | noticed |", "|---|--:|--:|--:|"]
    for row in sorted(found["rows"], key=lambda one: -float(one["drop"]))[:8]:
        flagged = row.get("flagged")
        rows.append(
            f"| {_plain(row['change'])} | {row['balanced_accuracy']:.3f} | {row['drop']:+.3f} | "
            f"{f'{flagged:.0%}' if flagged is not None else NOT_MEASURED} |"
        )
    yield "\n".join(rows)
    yield "The eight worst changes of validation images; *noticed*: windows that a device calls out of distribution."


def _lineage(registry: Registry, record: VersionRecord) -> Iterator[str]:
    children = ", ".join(child.name for child in registry.children(record)) or "none"
    libraries = ", ".join(f"{name} {version}" for name, version in record.tools.libraries.items())
    yield "\n".join(
        [
            f"- Bundle: `{record.digest}`",
            f"- Follows: {f'{record.model}@{record.parent}' if record.parent else 'nothing'}; followed by: {children}",
            f"- Recipe: `{record.recipe[:16]}`; seed {record.tools.seed}",
            f"- Libraries: {_plain(libraries)}",
            f"- Machines: {'; '.join(_machine(machine) for machine in record.tools.machines) or 'not recorded'}",
            f"- Built again by `eyas models rebuild {record.name}`",
        ]
    )


def _limits(record: VersionRecord, report: Mapping[str, Any]) -> Iterator[str]:
    lines = [
        "All splits come from one data set: with other cameras, light, seasons, sites or kinds of object, it may do "
        "worse than the figures above.",
        f"An image of something else still gets one of the {len(record.labels)} labels.",
        "Not for decisions about people, and not as the only safeguard where a wrong prediction can cause harm.",
        *(str(one["text"]) for one in report.get("signals", ()) if one.get("level") == "yellow"),
        *map(str, report.get("warnings", ())),
    ]
    yield "\n".join(f"- {_plain(line)}" for line in lines)


def _licence(record: VersionRecord, license_id: str) -> Iterator[str]:
    yield f"`{license_id}`" if license_id else "Nobody named a licence for this version (`--license`)."
    if any(_NON_COMMERCIAL in notice for notice in record.data.notices):
        yield "**Its images are licensed for non-commercial use: the model is not for a product.**"


def _machine(machine: Mapping[str, str]) -> str:
    return _plain(", ".join(str(value) for value in machine.values()))


def _number(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.3f}"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _yaml(text: str) -> str:
    return msgspec.json.encode(text).decode()
