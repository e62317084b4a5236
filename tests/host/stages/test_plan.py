"""The plan of a run: what it says, what scales with what, and what earlier runs teach it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest

from eyas_host.pipeline.runner import (
    ASKED,
    NEW,
    Due,
    RunContext,
    Stage,
    StageRecord,
    StageResult,
    _basis,
    due_stages,
    run_chain,
)
from eyas_host.recipe import Recipe
from eyas_host.recipe.data import DataSection
from eyas_host.recipe.image import ImageSection
from eyas_host.recipe.run import RunSection
from eyas_host.stages import plan
from eyas_host.stages.chain import STAGES
from eyas_host.stages.estimate import Counts, Speed, estimate_stages
from eyas_host.stages.speed import measure_speed
from eyas_host.support.errors import RecipeError
from eyas_host.support.machine import machine
from eyas_host.support.progress import about
from tests.support.garments import GARMENTS, draw_garments

RECIPE = Recipe(run=RunSection(name="toy"), data=DataSection(path="images"))
SPEED = Speed(read=0.001, view=0.002, teacher=0.01, teacher_step=0.03, student=0.002, student_step=0.006)
COUNTS = Counts(700, 150, 150)


def seconds(recipe: Recipe, stage: str, counts: Counts = COUNTS, cores: int = 2, processes: int = 1) -> float:
    steps = estimate_stages(recipe, counts, SPEED, cores=cores, processes=processes)
    return sum(step.seconds for step in steps[stage])


def changed(section: str, **values: object) -> Recipe:
    return msgspec.structs.replace(RECIPE, **{section: msgspec.structs.replace(getattr(RECIPE, section), **values)})


def test_every_stage_is_estimated() -> None:
    assert list(estimate_stages(RECIPE, COUNTS, SPEED, cores=2)) == [stage.name for stage in STAGES]
    assert all(seconds(RECIPE, stage.name) > 0 for stage in STAGES)


@pytest.mark.parametrize(
    ("section", "values", "stage", "more"),
    [
        ("teacher", {"epochs": 18}, "teach", 10 * (700 * 0.032 + 150 * 0.01)),
        ("teacher", {"progressive": 0.5}, "teach", -4 * 700 * 0.03 * (1 - 0.75)),
        ("student", {"progressive": 0.5}, "distill", -15 * 700 * 0.006 * (1 - 0.75)),
        ("student", {"epochs": 40}, "distill", 10 * (700 * 0.006 + 150 * 0.002)),
        ("student", {"views": 8}, "distill", 2 * 700 * (0.002 + 0.4 * 0.01)),
        ("quantize", {"method": "ptq"}, "qat", None),
        ("prune", {"method": "none"}, "prune", None),
    ],
)
def test_work_follows_the_settings(section: str, values: dict[str, object], stage: str, more: float | None) -> None:
    difference = seconds(changed(section, **values), stage) - seconds(RECIPE, stage)
    assert difference == pytest.approx(more) if more is not None else difference < 0


def test_twice_the_images_are_nearly_twice_the_training_and_one_core_trains_the_students_in_turn() -> None:
    twice = Counts(1400, 300, 300)
    assert 1.5 < seconds(RECIPE, "distill", twice) / seconds(RECIPE, "distill") < 2.0
    compared = changed("student", labels_only=True)
    assert seconds(compared, "distill", cores=1) > 1.5 * seconds(compared, "distill")
    assert seconds(RECIPE, "distill") < seconds(compared, "distill") < 1.2 * seconds(RECIPE, "distill")
    assert seconds(RECIPE, "distill", cores=1) == seconds(RECIPE, "distill")


@pytest.mark.parametrize(
    ("runtimes", "saved"), [(("litert", "openvino", "onnx"), 20.0), (("openvino", "onnx"), 0.0), (("litert",), 0.0)]
)
def test_litert_is_compiled_beside_the_others_where_there_are_some(runtimes: tuple[str, ...], saved: float) -> None:
    recipe = changed("compile", runtimes=runtimes)
    assert len(recipe.compile.precisions) == 2
    assert seconds(recipe, "compile", cores=1) - seconds(recipe, "compile") == pytest.approx(saved)


@pytest.mark.parametrize("stage", ["teach", "distill", "prune", "qat"])
def test_two_processes_are_nearly_twice_as_fast_but_for_their_start(stage: str) -> None:
    long = msgspec.structs.replace(
        RECIPE,
        teacher=msgspec.structs.replace(RECIPE.teacher, epochs=100),
        student=msgspec.structs.replace(RECIPE.student, epochs=400),
        prune=msgspec.structs.replace(RECIPE.prune, epochs=200),
        quantize=msgspec.structs.replace(RECIPE.quantize, epochs=100),
    )
    assert 1.5 < seconds(long, stage) / seconds(long, stage, processes=2) < 2.0


@pytest.mark.parametrize(
    ("duration", "text"), [(0.2, "1 s"), (7, "7 s"), (43, "40 s"), (58, "1 min"), (700, "12 min"), (9000, "2.5 h")]
)
def test_durations_are_said_as_estimates(duration: float, text: str) -> None:
    assert about(duration) == text


@pytest.fixture
def run(tmp_path: Path) -> RunContext:
    images = draw_garments(tmp_path / "images", count=4)
    return RunContext(msgspec.structs.replace(RECIPE, data=DataSection(path=str(images))), tmp_path / "runs" / "toy")


def record(context: RunContext, stage: str, **values: Any) -> StageRecord:
    fields = {
        "inputs": {}, "sources": {}, "recipe": {}, "seed": 0, "device": "auto", "code": "", "libraries": {},
        "stage": stage, "outputs": {}, "sizes": {}, "times_ns": {}, "code_version": "", "finished": 1.0,
        "seconds": 90.0, "peak_rss_mb": 0.0, "machines": (machine(),), "summary": "", "facts": {}, "estimated_s": 30.0,
    }  # fmt: skip
    return StageRecord(**(fields | values))


def shown(context: RunContext, stages: list[Due], capsys: pytest.CaptureFixture[str], **options: bool) -> str:
    plan.show_plan(context, stages, **options)
    return capsys.readouterr().err


def test_what_the_plan_says(run: RunContext, capsys: pytest.CaptureFixture[str]) -> None:
    old = record(run, "teach", seconds=2500.0, estimated_s=0.0)
    stages = [
        Due("split", (), record(run, "split")),
        Due("teach", ("teacher.epochs 8 -> 9", "a", "b", "c"), old),
        Due("distill", ("after teach",), record(run, "distill")),
        Due("qat", (NEW,), None),
        Due("report", (ASKED,), record(run, "report")),
    ]
    lines = shown(run, stages, capsys).splitlines()
    assert re.match(r"plan: about \d+ (s|min) on this machine; an estimate", lines[0])
    rows = {line.split()[0]: line for line in lines[1:]}
    assert rows["split"].split() == ["split", "done"]
    assert "runs again: teacher.epochs 8 -> 9, a, b and 1 more changed (took 42 min)" in rows["teach"]
    assert "runs again after teach" in rows["distill"]
    assert re.fullmatch(r"  qat +\d+ (s|min)", rows["qat"])
    assert "runs again, as asked" in rows["report"]


def test_a_split_alone_is_not_worth_a_plan(run: RunContext, capsys: pytest.CaptureFixture[str]) -> None:
    alone = [Due("split", (NEW,), None)]
    assert shown(run, alone, capsys) == ""
    assert "split" in shown(run, alone, capsys, always=True)
    assert "up to date" in shown(run, [Due("split", (), record(run, "split"))], capsys, always=True)


def test_an_estimate_that_was_wrong_before_is_corrected(run: RunContext) -> None:
    """A stage that took three times its estimate: this run's own record, or that of a run beside it."""
    plain = plan.show_plan(run, [Due("compile", (NEW,), None)])
    corrected = plan.show_plan(run, [Due("compile", ("x",), record(run, "compile"))])
    elsewhere = plan.show_plan(run, [Due("compile", ("x",), record(run, "compile", machines=({"cores": "512"},)))])
    beside = run.root.parent / "other" / "compile" / "stage.json"
    beside.parent.mkdir(parents=True)
    beside.write_bytes(msgspec.json.encode(record(run, "compile", seconds=60.0)))
    learned = plan.show_plan(run, [Due("compile", (NEW,), None)])
    assert plain is not None and corrected is not None and elsewhere is not None and learned is not None
    assert corrected.left() == pytest.approx(3 * plain.left())
    assert elsewhere.left() == pytest.approx(plain.left())
    assert learned.left() == pytest.approx(2 * plain.left())


def test_an_interrupted_stage_is_planned_without_what_is_done(
    run: RunContext, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = plan.show_plan(run, [Due("teach", (NEW,), None)])
    rest = plan.show_plan(run, [Due("teach", (NEW,), None, spent=10.0)])
    assert whole is not None and rest is not None
    assert whole.left() - 10 < rest.left() < whole.left() - 9
    assert "teach" in capsys.readouterr().err.rpartition("goes on where it was interrupted")[0]
    done = plan.show_plan(run, [Due("teach", (NEW,), None, spent=1e6)])
    assert done is not None and done.left() == pytest.approx(0.05 * whole.left())


def test_the_images_are_counted_before_there_is_a_split(run: RunContext) -> None:
    files, counts = plan._images(run)
    assert len(files) == 4 * len(GARMENTS)
    assert (counts.train, counts.validation, counts.test) == (28, 6, 6)


def test_images_that_are_divided_already_are_counted_so(tmp_path: Path) -> None:
    for split, count in (("train", 10), ("val", 3), ("test", 2)):
        draw_garments(tmp_path / split, count=count)
    data = DataSection(path=str(tmp_path), by="folders")
    _, counts = plan._images(RunContext(msgspec.structs.replace(RECIPE, data=data), tmp_path / "run"))
    assert (counts.train, counts.validation, counts.test) == (100, 30, 20)


def test_this_machine_is_measured() -> None:
    recipe = changed("image", size=64)
    with mock.patch("eyas_host.stages.speed._SECONDS", 0.05), mock.patch("eyas_host.stages.speed._MAX_STEPS", 3):
        speed = measure_speed(recipe, [])
        assert all(value > 0 for name, value in msgspec.structs.asdict(speed).items() if name != "read")
        assert speed.teacher_step > speed.teacher and speed.student_step > speed.student
        odd = msgspec.structs.replace(changed("teacher", model="vit_small_patch16_224"), image=ImageSection(size=40))
        with pytest.raises(RecipeError, match=r"vit_small_patch16_224.*does not accept"):
            measure_speed(odd, [])


def test_why_each_stage_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eyas_host.pipeline.runner.give_back_memory", lambda: None)

    def work(context: RunContext) -> StageResult:
        (context.root / "a" / "out.txt").write_text(str(context.recipe.teacher.epochs))
        return StageResult("done")

    stages = (Stage("a", ("teacher",), (), work), Stage("b", ("student",), ("a",), lambda _: StageResult("done")))
    context = RunContext(RECIPE, tmp_path / "run")
    assert [due.reasons for due in due_stages(stages, context)] == [(NEW,), (NEW,)]
    run_chain(stages, context)
    assert [due.reasons for due in due_stages(stages, context)] == [(), ()]
    assert [due.reasons for due in due_stages(stages, context, start="a")] == [(ASKED,), (ASKED,)]
    assert [due.name for due in due_stages(stages, context, only="b")] == ["b"]
    (context.folder("b") / "running.json").write_bytes(
        msgspec.json.encode({"fingerprint": _basis(stages[1], context).fingerprint, "seconds": 7.0})
    )
    (context.folder("b") / "stage.json").unlink()
    assert [due.spent for due in due_stages(stages, context)] == [0.0, 7.0]
    run_chain(stages, context)
    other = RunContext(changed("teacher", epochs=9), context.root)
    assert [due.reasons for due in due_stages(stages, other)] == [("teacher.epochs 8 -> 9",), ("after a",)]
