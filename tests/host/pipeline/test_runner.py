"""The chain of stages: what runs again, what is kept, and what a fault leaves behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import msgspec
import numpy as np
import pytest

from eyas_host.pipeline.code import Dependencies
from eyas_host.pipeline.runner import RunContext, Stage, StageRecord, StageResult, run_chain, up_to_date
from eyas_host.recipe import Recipe
from eyas_host.recipe.data import DataSection
from eyas_host.recipe.run import RunSection
from eyas_host.support.errors import StageError
from eyas_host.support.files import atomic_write, write_bytes
from eyas_host.train.checkpoint import save_tensors
from tests.support import inside
from tests.support.small_disk import mounted

RECIPE = Recipe(run=RunSection(name="toy"), data=DataSection(path="images"))


class Toy:
    """Three stages that add up: a writes the seed, b adds the student's epochs, c adds a's and b's numbers."""

    def __init__(self, root: Path) -> None:
        self.ran: list[str] = []
        self.root = root
        self.outside = "1"
        self.fault: Exception | None = None
        self.recipe = RECIPE
        self.stages = (
            Stage("a", ("run",), (), self._a, sources=lambda context: {"the weather": self.outside}),
            Stage("b", ("student",), ("a",), self._b),
            Stage("c", ("quantize",), ("a", "b"), self._c, places=("sum.txt", "extra")),
        )

    @property
    def context(self) -> RunContext:
        return RunContext(self.recipe, self.root)

    def change(self, section: str, **values: object) -> None:
        part = msgspec.structs.replace(getattr(self.recipe, section), **values)
        self.recipe = msgspec.structs.replace(self.recipe, **{section: part})

    def run(self, **options: str) -> list[str]:
        self.ran.clear()
        run_chain(self.stages, self.context, **options)
        return list(self.ran)

    def _a(self, context: RunContext) -> StageResult:
        self.ran.append("a")
        write_bytes(context.folder("a") / "out.txt", str(context.recipe.run.seed).encode())
        return StageResult("a is done", {"number": context.recipe.run.seed})

    def _b(self, context: RunContext) -> StageResult:
        self.ran.append("b")
        kept = context.folder("b") / "checkpoint"
        self.found_checkpoint = kept.exists()
        write_bytes(kept, b"half")
        if self.fault is not None:
            raise self.fault
        number = int((context.folder("a") / "out.txt").read_text()) + context.recipe.student.epochs
        write_bytes(context.folder("b") / "deep" / "out.txt", str(number).encode())
        kept.unlink()
        return StageResult("b is done")

    def _c(self, context: RunContext) -> StageResult:
        self.ran.append("c")
        numbers = [int((context.folder(f) / "out.txt").read_text()) for f in ("a", "b/deep")]
        write_bytes(context.root / "sum.txt", str(sum(numbers)).encode())
        write_bytes(context.root / "extra" / "one.txt", b"1")
        return StageResult("c is done")


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path / "run")


def test_a_second_run_does_nothing(toy: Toy) -> None:
    assert toy.run() == ["a", "b", "c"]
    assert (toy.root / "sum.txt").read_text() == "30"
    assert toy.run() == []


def test_only_what_changed_runs_again(toy: Toy) -> None:
    toy.run()
    toy.change("student", epochs=31)
    assert toy.run() == ["b", "c"]
    assert (toy.root / "sum.txt").read_text() == "31"
    toy.change("quantize", epochs=9)
    assert toy.run() == ["c"]
    toy.change("gate", max_drop=0.5)
    assert toy.run() == []
    toy.change("run", seed=4)
    assert toy.run() == ["a", "b", "c"]
    assert (toy.root / "sum.txt").read_text() == "39"


def test_a_single_setting_of_a_section_can_count(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    toy.stages = (msgspec.structs.replace(toy.stages[0], sections=("run", "gate.max_drop")), *toy.stages[1:])
    toy.run()
    toy.change("gate", min_agreement=0.5)
    assert toy.run() == []
    toy.change("gate", max_drop=0.5)
    assert toy.run() == ["a"]


def test_what_lies_outside_counts_and_equal_outputs_stop_the_wave(toy: Toy) -> None:
    toy.run()
    toy.outside = "2"
    assert toy.run() == ["a"]  # it wrote the same bytes, so b and c still fit


def test_a_run_may_move(toy: Toy, tmp_path: Path) -> None:
    toy.run()
    toy.root = toy.root.rename(tmp_path / "moved")
    assert toy.run() == []


def test_a_copied_run_is_hashed_once(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy has other times; its content is compared, and then the new times are known."""
    toy.run()
    for path in toy.root.rglob("*.txt"):
        os.utime(path, ns=(1, 1))
    hashed: list[Path] = []

    def counted(path: Path) -> str:
        hashed.append(path)
        return sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr("eyas_host.pipeline.runner.sha256", counted)
    assert toy.run() == []
    assert {path.name for path in hashed} == {"out.txt", "sum.txt", "one.txt"}
    hashed.clear()
    assert toy.run() == [] and not hashed


@pytest.mark.parametrize(("path", "expected"), [("a/out.txt", ["a"]), ("b/deep/out.txt", ["b"]), ("sum.txt", ["c"])])
def test_another_file_of_the_same_size_is_noticed(toy: Toy, path: str, expected: list[str]) -> None:
    toy.run()
    old = (toy.root / path).read_bytes()
    (toy.root / path).write_bytes(bytes(len(old)))
    assert toy.run() == expected
    assert (toy.root / path).read_bytes() == old


def test_a_single_stage_records_the_input_that_it_read(toy: Toy) -> None:
    """The file that someone put there, not what the stage before once wrote; the chain then sets it right."""
    toy.run()
    (toy.root / "a" / "out.txt").write_text("7")
    assert toy.run(only="b") == ["b"]
    record = toy.context.record("b")
    assert record is not None and record.inputs == {"a/out.txt": sha256(b"7").hexdigest()}
    assert (toy.root / "b/deep/out.txt").read_text() == "37"
    assert toy.run() == ["a", "b"] and (toy.root / "b/deep/out.txt").read_text() == "30"


def test_another_library_or_other_code_runs_a_stage_again(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the stages that import it, with the reason in one line."""
    found = {"one": Dependencies("1", {"numpy": "2.0"}), "two": Dependencies("1", {"numpy": "2.0", "timm": "1.0.20"})}
    monkeypatch.setattr("eyas_host.pipeline.runner.dependencies", lambda module: found[module])
    a, b, c = toy.stages
    toy.stages = (msgspec.structs.replace(a, module="one"), msgspec.structs.replace(b, module="two"), c)
    assert toy.run() == ["a", "b", "c"] and toy.run() == []
    found["two"].libraries["timm"] = "1.0.31"
    capsys.readouterr()
    assert toy.run() == ["b"]
    assert "b        runs again   timm 1.0.20 -> 1.0.31 changed" in capsys.readouterr().err
    record = toy.context.record("b")
    assert record is not None and record.libraries == {"numpy": "2.0", "timm": "1.0.31"}
    found["one"] = Dependencies("2", {"numpy": "2.0"})
    assert toy.run() == ["a"]
    assert "runs again   Eyas's code changed" in capsys.readouterr().err


def test_the_reasons_name_what_changed(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    toy.run()
    toy.change("student", epochs=31)
    toy.outside = "2"
    (toy.root / "sum.txt").unlink()
    capsys.readouterr()
    assert toy.run() == ["a", "b", "c"]
    lines = [line for line in capsys.readouterr().err.splitlines() if "runs again" in line]
    assert [line.split("runs again   ")[1] for line in lines] == [
        "the weather changed",
        "student.epochs 30 -> 31 changed",
        "b/deep/out.txt, sum.txt changed",
    ]


def test_a_file_that_a_setting_names_counts_by_content_alone(toy: Toy) -> None:
    toy.stages = (msgspec.structs.replace(toy.stages[0], sections=("teacher", "student.checkpoint")),)
    assert toy.run() == ["a"]
    toy.change("teacher", weights_file="/old/place/weights.pt")
    toy.change("student", checkpoint="/old/student.pt")
    assert toy.run() == ["a"]
    toy.change("teacher", weights_file="/new/place/weights.pt")
    toy.change("student", checkpoint="/new/student.pt")
    assert toy.run() == []
    toy.outside = "another content"
    assert toy.run() == ["a"]


def test_from_runs_that_stage_and_all_behind_it(toy: Toy) -> None:
    toy.run()
    assert toy.run(start="b") == ["b", "c"]
    toy.change("run", seed=1)
    assert toy.run(start="c") == ["a", "b", "c"]  # what is out of date before it runs too


def test_only_runs_that_stage_again_and_nothing_else(toy: Toy) -> None:
    with pytest.raises(StageError, match=r"'b' needs a first"):
        toy.run(only="b")
    toy.run()
    assert toy.run(only="b") == ["b"]
    toy.change("run", seed=1)
    assert toy.run(only="c") == ["c"]


def test_until_ends_the_chain(toy: Toy) -> None:
    assert toy.run(until="b") == ["a", "b"]
    assert toy.run() == ["c"]


@pytest.mark.parametrize(("path", "expected"), [("a/out.txt", ["a"]), ("b/deep/out.txt", ["b"]), ("sum.txt", ["c"])])
def test_a_missing_output_is_made_again(toy: Toy, path: str, expected: list[str]) -> None:
    toy.run()
    (toy.root / path).unlink()
    assert toy.run() == expected
    assert (toy.root / path).exists()


def test_a_damaged_record_is_no_record(toy: Toy) -> None:
    toy.run()
    (toy.root / "b" / "stage.json").write_text('{"stage": "b"}')
    assert not up_to_date(toy.stages[1], toy.context)
    assert toy.run() == ["b"]


def test_the_record_says_what_was_read_and_written(toy: Toy) -> None:
    toy.run()
    record = msgspec.json.decode((toy.root / "c" / "stage.json").read_bytes(), type=StageRecord)
    assert set(record.inputs) == {"a/out.txt", "b/deep/out.txt"}
    assert record.outputs == {
        "sum.txt": sha256(b"30").hexdigest(),
        "extra/one.txt": sha256(b"1").hexdigest(),
    }
    assert record.sizes == {"sum.txt": 2, "extra/one.txt": 1}
    assert record.recipe == {"quantize": msgspec.json.decode(msgspec.json.encode(RECIPE.quantize))}
    assert (record.summary, record.seed) == ("c is done", 0)
    assert record.peak_rss_mb > 10 and record.seconds >= 0
    first = toy.context.record("a")
    assert first is not None and first.facts == {"number": 0}
    assert toy.context.record("d") is None
    assert msgspec.json.decode((toy.root / "recipe.json").read_bytes())["run"]["name"] == "toy"


def test_a_failed_stage_leaves_no_record_and_goes_on_where_it_was(toy: Toy) -> None:
    toy.fault = ValueError("out of luck")
    with pytest.raises(ValueError, match="out of luck"):
        toy.run()
    assert toy.ran == ["a", "b"]
    assert not (toy.root / "b" / "stage.json").exists()
    toy.fault = None
    assert toy.run() == ["b", "c"]
    assert toy.found_checkpoint
    assert sorted(p.name for p in (toy.root / "b").iterdir()) == ["deep", "stage.json"]


def test_an_interrupted_stage_starts_afresh_for_other_work(toy: Toy) -> None:
    toy.fault = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        toy.run()
    toy.fault = None
    toy.change("student", epochs=2)
    assert toy.run() == ["b", "c"]
    assert not toy.found_checkpoint


def test_from_clears_what_an_interrupted_try_left(toy: Toy) -> None:
    toy.fault = ValueError("stop")
    with pytest.raises(ValueError, match="stop"):
        toy.run()
    toy.fault = None
    assert toy.run(start="b") == ["b", "c"]
    assert not toy.found_checkpoint


def test_a_failure_of_a_repeated_stage_leaves_no_old_record(toy: Toy) -> None:
    toy.run()
    toy.change("student", epochs=2)
    toy.fault = ValueError("stop")
    with pytest.raises(ValueError, match="stop"):
        toy.run()
    toy.change("student", epochs=RECIPE.student.epochs)
    toy.fault = None
    assert toy.run() == ["b"]


def test_a_process_killed_while_it_wrote_leaves_the_old_file_and_no_output(toy: Toy) -> None:
    """SIGKILL between content and name, in a checkpoint of the stage and in a file of the run."""
    toy.fault = ValueError("stop")
    with pytest.raises(ValueError, match="stop"):
        toy.run()
    code = (
        "import os, sys; from pathlib import Path; from eyas_host.support.files import atomic_write\n"
        "for name in sys.argv[1:]:\n"
        "    if os.fork() == 0:\n"
        "        with atomic_write(Path(name)) as part: part.write_bytes(b'half'); os.kill(os.getpid(), 9)\n"
        "    os.wait()\n"
    )
    files = (toy.root / "b" / "checkpoint", toy.root / "recipe.json")
    before = [path.read_bytes() for path in files]
    subprocess.run([sys.executable, "-c", code, *files], check=True)
    assert [path.read_bytes() for path in files] == before and len(list(toy.root.rglob(".*.part"))) == 2
    toy.fault = None
    assert toy.run() == ["b", "c"] and toy.found_checkpoint
    record = toy.context.record("b")
    assert record is not None and list(record.outputs) == ["b/deep/out.txt"]
    assert not list(toy.root.rglob(".*.part"))


def test_a_full_disk_ends_with_one_line(small_disk: Path, tmp_path: Path, shape_images: Path) -> None:
    """Exit code 2, no traceback, and the same command finishes once there is room."""
    (tmp_path / "recipe.toml").write_text(f'[run]\nname = "toy"\n[data]\nsource = "folder"\npath = "{shape_images}"\n')
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(236 << 10))
    words = ("split", "recipe.toml", "--runs", str(small_disk / "runs"))
    done = inside.eyas(tmp_path, *words)
    assert done.code == 2 and "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith("eyas: ") and "No space left" in done.err.splitlines()[-1]
    ballast.unlink()
    assert inside.eyas(tmp_path, *words).code == 0


def test_seconds_of_interrupted_tries_are_added(toy: Toy) -> None:
    toy.fault = ValueError("stop")
    with pytest.raises(ValueError, match="stop"):
        toy.run()
    running = toy.root / "b" / "running.json"
    spent = msgspec.json.decode(running.read_bytes())
    running.write_bytes(msgspec.json.encode({**spent, "seconds": 1000.0}))
    toy.fault = None
    toy.run()
    record = toy.context.record("b")
    assert record is not None and 1000 < record.seconds < 1100
    assert not running.exists()


def test_a_stage_that_went_on_elsewhere_names_both_machines(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the process was killed and could not write anything more."""
    running = toy.root / "b" / "running.json"
    for name, fault in (("one", ValueError("stop")), ("two", KeyboardInterrupt()), ("two", None)):
        monkeypatch.setattr("eyas_host.pipeline.runner.machine", lambda name=name: {"processor": name})
        toy.fault = fault
        with contextlib.suppress(ValueError, KeyboardInterrupt):
            toy.run()
        if name == "one":
            assert msgspec.json.decode(running.read_bytes())["machines"] == [{"processor": "one"}]
    records = {stage: toy.context.record(stage) for stage in "abc"}
    machines = {stage: [m["processor"] for m in record.machines] for stage, record in records.items() if record}
    assert machines == {"a": ["one"], "b": ["one", "two"], "c": ["two"]}


def test_another_process_holds_the_folder(toy: Toy) -> None:
    toy.run()
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(toy.root / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdin is not None and other.stdout is not None
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(StageError, match="another eyas command uses this folder"):
            toy.run(start="a")
        assert toy.ran == []
    finally:
        other.kill()
        other.communicate()
    assert toy.run(start="a") == ["a", "b", "c"]  # the system let go of the lock with the process


# Files


def test_whole_puts_the_file_there_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("one")
        assert not path.exists() and temporary.parent == path.parent
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_whole_leaves_the_old_file_when_anything_fails(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_bytes(path, b"old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as temporary:
        temporary.write_text("half a new o")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for 256 KiB."""
    with mounted(tmp_path / "disk", "size=256k,nr_inodes=40") as disk:
        yield disk


def _write_array(path: Path) -> None:
    with atomic_write(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, pixels=np.zeros(1 << 20, dtype=np.uint8))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_bytes(path, b"x" * (1 << 20)),
        lambda path: save_tensors(path, {"bytes": b"x" * (1 << 20)}),
        _write_array,
    ],
)
def test_a_full_disk(small_disk: Path, write: Callable[[Path], None]) -> None:
    path = small_disk / "file"
    write_bytes(path, b"old")
    with pytest.raises(StageError, match="No space left"):
        write(path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in small_disk.iterdir()] == ["file"]


def test_a_disk_without_room_for_a_folder(small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        for number in range(100):
            (small_disk / str(number)).touch()
    with pytest.raises(StageError, match="No space left"):
        write_bytes(small_disk / "new" / "file", b"")


def test_a_stage_on_a_full_disk_can_be_run_again(small_disk: Path) -> None:
    toy = Toy(small_disk / "run")
    toy.run(until="a")
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space left"), ballast.open("wb") as stream:
        while True:
            stream.write(b"x" * 512)
            stream.flush()
    with pytest.raises(StageError, match="No space left"):
        toy.run()
    assert not (toy.root / "b" / "stage.json").exists()
    ballast.unlink()
    assert toy.run() == ["b", "c"]
