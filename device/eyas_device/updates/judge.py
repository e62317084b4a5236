"""The one judgement of a bundle on this device: one of its models gives the recorded predictions here, in time.

`install`, the agent, the doctor, `eyas flash` and `check --config` all ask it, with the device's own `[model]`
settings. `check` proves the same contents, and every artefact whose runtime is here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from eyas_device.bundle import Bundle, Golden
from eyas_device.config import ModelSection
from eyas_device.errors import BundleError, CheckFailed, EyasError, RuntimeUnavailable
from eyas_device.predict import Classifier
from eyas_device.runtimes import RUNTIMES, artefact_runtime, load
from eyas_device.runtimes.selection import read_selection
from eyas_device.updates.golden import NOTICE, check_contents, check_loaded
from eyas_device.updates.records import short_reason

CONFIGURED = "as configured"
SAVED = "the saved selection"
PREFERRED = "the bundle's preference"
FALLBACK = "another runtime"
_BY_NAME_ONLY = ("onnx-cuda", "onnx-tensorrt")


class _Candidate(NamedTuple):
    runtime: str | None
    artefact: str | None
    why: str

    def __str__(self) -> str:
        return " on ".join(name for name in (self.artefact, self.runtime) if name) or "the bundle"


class Judged(NamedTuple):
    """A model that is good here."""

    classifier: Classifier
    selection: str
    """Why this runtime and artefact: `as configured`, `the saved selection`, `the bundle's preference` or `another
    runtime`, and which were refused before it."""
    notice: str = ""
    """What could not be proven."""


def judge(
    root: Path,
    model: ModelSection,
    state: Path,
    *,
    on_load: Callable[[str], None] = lambda _: None,
    last: Collection[str] = (),
) -> Judged:
    """Load the first model of the bundle at `root` that passes its golden check within `model.max_latency_ms`.

    Before any model, the bundle's other contents are checked: see `eyas_device.updates.golden.check_contents`.

    A configured runtime or artefact is the only candidate. Otherwise: the selection that was saved in the folder
    `state` for this bundle and these library versions, then the bundle's preference, then its other runtimes. `on_load`
    is called with each candidate's runtime before it is loaded, which may take minutes. Runtimes in `last` are tried
    last.

    Raises:
        CheckFailed: No candidate gives the recorded predictions here, in time, or the manifest's settings changed.
        BundleError: The bundle is damaged, or no candidate can be loaded.
        RuntimeUnavailable: No runtime for the bundle works here.

    """
    bundle = Bundle.open(root)
    golden = check_contents(bundle)
    refused: list[tuple[_Candidate, Exception]] = []
    for candidate in sorted(_candidates(bundle, model, state), key=lambda candidate: candidate.runtime in last):
        if any((c.runtime, c.artefact) == candidate[:2] for c, _ in refused):
            continue
        try:
            on_load(candidate.runtime or "")
            classifier = _load_checked(bundle, candidate, golden, model)
        except Exception as error:  # runtimes raise whatever they like; the next candidate may be right
            refused.append((candidate, error))
            continue
        reasons = "".join(f"; {c} was refused: {short_reason(e)}" for c, e in refused)
        reasons += f"; {', '.join(sorted(last))} ended the agent again and again" if last else ""
        return Judged(classifier, candidate.why + reasons, "" if golden.settings is not None else NOTICE)
    raise _refusal(root, refused)


class Proof(NamedTuple):
    """That a bundle is good here."""

    good: str
    """Which of its models, on which runtime, and why that one."""
    notice: str
    """What could not be proven; empty if everything was."""


def prove(root: Path, model: ModelSection, state: Path) -> Proof:
    """As `judge`, but close the model."""
    judged = judge(root, model, state)
    with judged.classifier as classifier:
        return Proof(f"{classifier} ({judged.selection})", judged.notice)


def _candidates(bundle: Bundle, model: ModelSection, state: Path) -> list[_Candidate]:
    if model.runtime or model.artefact:
        return [_Candidate(model.runtime or None, model.artefact or None, CONFIGURED)]
    found = []
    saved = read_selection(state, bundle)
    if saved is not None:
        found.append(_Candidate(saved.runtime, saved.artefact, SAVED))
    why = PREFERRED
    for name in RUNTIMES:
        runtime = artefact_runtime(name)
        if name in _BY_NAME_ONLY or runtime not in bundle.runtimes():
            continue
        try:
            load(name)
        except RuntimeUnavailable:
            continue
        found.append(_Candidate(name, bundle.artefact(runtime, None).name, why))
        why = FALLBACK
    return found or [_Candidate(None, None, PREFERRED)]  # loading it says what is missing


def _load_checked(bundle: Bundle, candidate: _Candidate, golden: Golden, model: ModelSection) -> Classifier:
    classifier = Classifier.load(bundle, candidate.runtime, candidate.artefact, threads=model.threads)
    try:
        check_loaded(classifier, golden, max_latency_ms=model.max_latency_ms or None)
    except BaseException:
        classifier.close()
        raise
    return classifier


def _refusal(root: Path, refused: list[tuple[_Candidate, Exception]]) -> EyasError:
    """The error of a bundle whose candidates were all refused."""
    errors = [error for _, error in refused]
    if len(refused) == 1 and isinstance(errors[0], EyasError):
        return errors[0]
    text = "; ".join(f"{candidate}: {short_reason(error)}" for candidate, error in refused)
    failed = any(isinstance(error, CheckFailed) for error in errors)
    return (CheckFailed if failed else BundleError)(f"{root}: no model of the bundle is good here: {text}")
