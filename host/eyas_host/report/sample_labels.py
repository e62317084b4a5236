"""`eyas samples check`: labels of field samples that may be wrong, as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from eyas_device.errors import ImageError
from eyas_device.preprocess import decode
from eyas_host.report.page import environment, jpeg

_MAX_SHOWN = 200


class SampleLabel(NamedTuple):
    """A label that may be wrong, with its image as JPEG if there is one."""

    path: str
    """Name of the exported image."""
    image: bytes | None
    label: str
    suggested: str
    probability: float
    of_suggested: float
    people: str


def render_sample_labels(
    name: str, summary: str, lead: str, suspects: Sequence[SampleLabel], left_out: Mapping[str, int]
) -> str:
    """The page: no scripts, no links, thumbnails inside; `lead` says where the probabilities come from."""
    return (
        environment()
        .get_template("sample_labels.html.j2")
        .render(
            name=name,
            summary=summary,
            lead=lead,
            count=len(suspects),
            suspects=[one._asdict() | {"thumbnail": _thumbnail(one.image)} for one in suspects[:_MAX_SHOWN]],
            left_out=left_out,
        )
    )


def _thumbnail(image: bytes | None) -> str | None:
    try:
        return None if image is None else jpeg(decode(image))
    except ImageError:
        return None
