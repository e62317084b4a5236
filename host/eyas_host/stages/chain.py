"""The nine stages of the main job: what each one reads, and which module runs it.

`split, teach, distill, prune, qat, compile, verify, pack, report`. All choices and gates use validation; the held-out
test set is read once, by `report`, after the bundle is packed. A stage's module, and the frameworks it imports, is
loaded only when the stage runs, so that a mistake in the recipe or the images shows at once.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from eyas_host.pipeline.runner import REPORT, RunContext, Stage, StageResult
from eyas_host.stages.inputs import images_fingerprint, latency_source, student_weights, teacher_weights


def _stage(name: str) -> Callable[[RunContext], StageResult]:
    """The `run` of `eyas_host.stages.<name>`, imported when it is called."""

    def run(context: RunContext) -> StageResult:
        result: StageResult = import_module(f"eyas_host.stages.{name}").run(context)
        return result

    return run


_SELECTION = ("run.amp", "run.selection_metric")
_DISTILLATION = ("teacher", "student", "augment", "image", *_SELECTION)

STAGES = (
    Stage("split", ("data",), (), _stage("split"), images_fingerprint),
    Stage(
        "teach",
        ("teacher", "augment", "image", *_SELECTION, "student.checkpoint"),
        ("split",),
        _stage("teach"),
        teacher_weights,
        together=True,
    ),
    Stage("distill", _DISTILLATION, ("split", "teach"), _stage("distill"), student_weights, together=True),
    Stage("prune", (*_DISTILLATION, "prune"), ("split", "distill"), _stage("prune"), latency_source),
    Stage("qat", (*_DISTILLATION, "prune", "quantize", "gate.max_drop"), ("split", "distill", "prune"), _stage("qat")),
    Stage("compile", ("compile", "student", "image"), ("split", "prune", "qat"), _stage("compile")),
    Stage(
        "verify",
        ("gate", "image", "pack", "cost"),
        ("split", "teach", "distill", "prune", "qat", "compile"),
        _stage("verify"),
    ),
    Stage("pack", ("run.name", "pack", "image"), ("split", "compile", "verify"), _stage("pack"), places=("bundle",)),
    Stage(
        "report",
        ("run",),
        ("split", "teach", "distill", "prune", "qat", "compile", "verify", "pack"),
        _stage("report"),
        places=(REPORT, "report.html"),
    ),
)
"""All stages, in order."""
