"""The nine stages of the main job: what each one reads, and which module runs it.

`split, teach, distill, prune, qat, compile, verify, pack, report`. All choices and gates use validation; the held-out
test set is read once, by `report`, after the bundle is packed. A stage's module, and the frameworks it imports, is
loaded only when the stage runs, so that a mistake in the recipe or the images shows at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from eyas_host.pipeline.runner import BUNDLE, BUNDLE_STAGES, REPORT, RunContext, Stage, StageResult
from eyas_host.recipe import Recipe
from eyas_host.stages.inputs import images, latency_source, report_inputs, student_weights, summaries, teacher_weights


def _stage(name: str, sections: tuple[str, ...], needs: tuple[str, ...], **options: Any) -> Stage:
    """The stage of the module `eyas_host.stages.<name>`, whose `run` is imported when it is called."""
    module = f"eyas_host.stages.{name}"

    def run(context: RunContext) -> StageResult:
        result: StageResult = import_module(module).run(context)
        return result

    return Stage(name, sections, needs, run, module, **options)


_SELECTION = ("run.amp", "run.compile", "run.selection_metric")
_DISTILLATION = ("teacher", "student", "augment", "image", *_SELECTION)

STAGES = (
    _stage("split", ("data", "image.bits"), (), sources=images),
    _stage(
        "teach",
        ("teacher", "augment", "image", *_SELECTION, "student.checkpoint"),
        ("split",),
        sources=teacher_weights,
        together=True,
    ),
    _stage("distill", _DISTILLATION, ("split", "teach"), sources=student_weights, together=True),
    _stage("prune", (*_DISTILLATION, "prune"), ("split", "distill"), sources=latency_source, together=True),
    _stage("qat", (*_DISTILLATION, "prune", "quantize", "gate.max_drop"), ("split", "distill", "prune"), together=True),
    _stage("compile", ("compile", "student", "image"), ("split", "prune", "qat")),
    _stage("verify", ("gate", "image", "pack", "cost"), ("split", "teach", "distill", "prune", "qat", "compile")),
    _stage("pack", ("run.name", "pack", "image"), ("split", "compile", "verify"), sources=summaries, places=(BUNDLE,)),
    _stage("report", Recipe.__struct_fields__, BUNDLE_STAGES, sources=report_inputs, places=(REPORT, "report.html")),
)
"""All stages, in order."""
