"""A bill of materials of a version (CycloneDX 1.6, ML-BOM): its files, data, libraries and card, for tools of others.

The Python library of CycloneDX has no `modelCard` yet, so that the document is written here; a test validates it.
"""

from __future__ import annotations

import re
import uuid
from datetime import UTC, datetime
from typing import Any

from eyas_host.versions.record import VersionRecord

_TASK = "image classification"
_NAMESPACE = uuid.UUID("6f1f0a52-6c0e-5c0b-9a39-3f2f6f7f3a11")
"""Of serial numbers, which follow from the version's digest."""


def bill_of_materials(record: VersionRecord, *, license_id: str = "") -> dict[str, Any]:
    """The document, ready for JSON."""
    model = f"model:{record.digest}"
    data = f"data:{record.data.data}"
    libraries = [_library(name, version) for name, version in record.tools.libraries.items() if _is_version(version)]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, record.digest)}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.fromtimestamp(record.added, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "tools": {"components": [{"type": "application", "name": "eyas", "version": record.tools.eyas}]},
            "component": {
                "type": "machine-learning-model",
                "bom-ref": model,
                "name": record.model,
                "version": record.version,
                "hashes": [{"alg": "SHA-256", "content": record.digest}],
                **({"licenses": [{"license": {"name": license_id}}]} if license_id else {}),
                "modelCard": _card(record, data),
                "components": [
                    {
                        "type": "file",
                        "name": name,
                        "hashes": [{"alg": "SHA-256", "content": file.sha256}],
                    }
                    for name, file in record.files.items()
                ],
            },
        },
        "components": [
            {
                "type": "data",
                "bom-ref": data,
                "name": f"images of {record.model}",
                "version": record.data.data[:16],
                "hashes": [{"alg": "SHA-256", "content": record.data.data}],
                "data": [
                    {
                        "type": "dataset",
                        "name": f"{record.data.images} labelled images",
                        "description": f"{record.data.strategy}; split {record.data.split}",
                    }
                ],
            },
            *libraries,
        ],
        "dependencies": [
            {"ref": model, "dependsOn": [data, *(one["bom-ref"] for one in libraries)]},
        ],
    }


def _card(record: VersionRecord, data: str) -> dict[str, Any]:
    metrics = [
        {
            "type": figure,
            "value": f"{getattr(one, figure):.4f}",
            "slice": f"{name}, held-out test images",
            **(
                {
                    "confidenceInterval": {
                        "lowerBound": f"{one.balanced_accuracy_ci[0]:.4f}",
                        "upperBound": f"{one.balanced_accuracy_ci[1]:.4f}",
                    }
                }
                if figure == "balanced_accuracy"
                else {}
            ),
        }
        for name, one in record.figures.items()
        for figure in ("balanced_accuracy", "f1", "auc")
        if getattr(one, figure) is not None
    ]
    return {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": _TASK,
            "datasets": [{"ref": data}],
            "inputs": [{"format": "image"}],
            "outputs": [{"format": "one of " + ", ".join(record.labels)}],
        },
        "quantitativeAnalysis": {"performanceMetrics": metrics},
        "considerations": {
            "useCases": [f"Sort camera images into {len(record.labels)} classes on the device that took them."],
            "technicalLimitations": ["An image of something else still gets one of the labels."],
        },
    }


def _library(name: str, version: str) -> dict[str, Any]:
    normal = re.sub(r"[-_.]+", "-", name).lower()
    purl = f"pkg:pypi/{normal}@{version.replace('+', '%2B')}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def _is_version(text: str) -> bool:
    return re.fullmatch(r"[0-9][A-Za-z0-9.+!-]*", text) is not None
