"""The recipe: one TOML file that says what to make, checked once and whole.

Every section is a frozen struct with one sentence a field; unknown keys, wrong types and impossible combinations are
all reported together, each with its section and what is allowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from eyas_device.bundle import Precision, RuntimeName
from eyas_device.preprocess import Preprocessing
from eyas_device.support.toml import Section, convert, parse, told
from eyas_host.data.domain import allowed, forbidden
from eyas_host.recipe_cost import CostSection as CostSection
from eyas_host.recipe_training import AtLeastOne, Count, Fraction, Positive, Rate, training_faults, with_weights_beside
from eyas_host.recipe_training import StudentSection as StudentSection
from eyas_host.recipe_training import TeacherSection as TeacherSection
from eyas_host.support.errors import RecipeError
from eyas_host.tune.settings import TuneSection as TuneSection


class RunSection(Section, frozen=True):
    """`[run]`: the name of the run and how it uses the machine."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Results go to runs/<name>."""
    seed: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    """Split, first weights, order and augmentation follow from it."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to train; `auto` takes a GPU when there is one."""
    threads: Count = 0
    """Torch threads a training process; 0 chooses (1 a process up to 160 px, else all cores)."""
    amp: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision of all trainings but int8's; fp16 needs a GPU, bf16 runs on processors too."""
    metric: Literal["objective", "balanced_accuracy", "accuracy", "f1", "auc", "loss"] = "objective"
    """The validation figure that chooses the best epoch, ends a training early and opens blocks; `objective` is
    balanced accuracy + AUC / 2."""
    checkpoint_minutes: Annotated[float, Meta(ge=0.0, le=1440.0)] = 5.0
    """How often training is saved inside an epoch, beside its end (0: after every step)."""
    trackers: tuple[Literal["auto", "tensorboard", "wandb", "mlflow"], ...] = ("auto",)
    """Who draws live curves; `auto`: TensorBoard where it is installed, in runs/<name>/curves. `wandb` sends figures to
    a server."""
    workers: Annotated[int, Meta(ge=0, le=64)] | Literal["auto"] = "auto"
    """Processes that draw views ahead of a training process; 0: it draws them itself. `auto` goes by the cores."""


class Source(Section, frozen=True):
    """One more place of labelled pictures, beside `[data] path`."""

    path: Annotated[str, Meta(min_length=1)]
    """The folder of class folders or the table, relative to the recipe file."""
    source: Literal["folder", "csv"] = "folder"


class DataSection(Section, frozen=True):
    """`[data]`: the labelled pictures and how they are divided."""

    source: Literal["folder", "csv", "elpv"] = "folder"
    """`folder`: one folder a class; `csv`: a table path,label[,group,time]; `elpv`: the solar-cell demonstration set
    (extra `demo`, non-commercial)."""
    path: str = ""
    """The folder of class folders or the table, relative to the recipe file."""
    more: tuple[Source, ...] = ()
    """Further sources that are joined to it: [{source = "csv", path = "line2.csv"}, ...]."""
    by: Literal["auto", "stratified", "group", "time"] = "auto"
    """What the parts are divided by: `stratified` picture by picture, `group` with no group on two sides, `time` with
    training before validation before test; `auto`: by group where the pictures have groups, else stratified."""
    gap_days: Annotated[float, Meta(ge=0.0, le=36_500.0)] = 0.0
    """time: days between the parts whose pictures are set aside."""
    near_duplicates: Annotated[int, Meta(ge=0, le=64)] = 16
    """Pictures whose perceptual hashes differ in at most so many of 256 bits stay on one side (0: not looked for)."""
    split: tuple[Fraction, Fraction, Fraction] = (0.7, 0.15, 0.15)
    """Parts for training, validation and the sealed test."""
    fold: tuple[Count, Count] = (0, 0)
    """Cross-validation: (k, n) makes the k-th of n folds the sealed test, counted from 0; (0, 0): `split` alone."""
    skip_unreadable: bool = False
    """Leave out pictures that cannot be read (they are listed) instead of stopping."""
    limit: Count = 0
    """Use at most this many pictures (0: all), drawn evenly from the classes; for a quick try."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """All places on disk, the first one included."""
        first = () if self.source == "elpv" else (Source(source=self.source, path=self.path or "."),)
        return (*first, *self.more)


class PictureSection(Section, frozen=True):
    """`[picture]`: what the model sees; becomes the bundle's preprocessing."""

    size: Annotated[int, Meta(ge=32, le=1024)] = 128
    """Side of the square input, pixels."""
    fit: Literal["crop", "stretch", "pad"] = "crop"
    interpolation: Literal["area", "linear"] = "area"
    crop_fraction: Rate = 1.0
    decode: Literal["full", "reduced"] = "full"
    """`reduced` decodes JPEGs at 1/2, 1/4 or 1/8 of their scale where that covers the size, here and on the device."""

    def preprocessing(self) -> Preprocessing:
        """The same settings as the device's contract."""
        return Preprocessing(
            size=self.size,
            fit=self.fit,
            interpolation=self.interpolation,
            crop_fraction=self.crop_fraction,
            decode=self.decode,
        )


Augmentation = Literal[
    "horizontal_flip",
    "vertical_flip",
    "quarter_turns",
    "rotate_degrees",
    "crop_scale",
    "brightness",
    "contrast",
    "randaugment",
    "saturation",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
    "cutmix",
    "mixup",
]


class AugmentSection(Section, frozen=True):
    """`[augment]`: how training pictures may be varied; only what the real camera could see."""

    forbid: tuple[Augmentation, ...] = ()
    """What the domain rules out, e.g. ["horizontal_flip"] for text and chest X-rays: never drawn, whatever else is
    set; also the steps of RandAugment by name."""
    horizontal_flip: bool = True
    vertical_flip: bool = False
    quarter_turns: bool = False
    """Rotations by 90, 180 and 270 degrees."""
    rotate_degrees: Annotated[float, Meta(ge=0.0, le=180.0)] = 5.0
    crop_scale: Rate = 0.7
    """Smallest part of the picture's area that a random crop keeps."""
    brightness: Fraction = 0.2
    contrast: Fraction = 0.2
    randaugment: Annotated[int, Meta(ge=0, le=8)] = 0
    """Steps of RandAugment a view, of light, colour and sharpness alone: geometry is what is set above."""
    magnitude: Annotated[int, Meta(ge=0, le=30)] = 9
    """Strength of those steps, 0 to 30."""
    cutmix: Fraction = 0.0
    """Part of the distillation views in which a patch of another picture is pasted; the teacher answers for the mix."""
    mixup: Fraction = 0.0
    """Part of the distillation views that are blended with another picture; the teacher answers for the mix."""
    warm_up: Count = 0
    """Teacher epochs over which rotation, crop, light and RandAugment rise to full strength (0: full at once)."""


class PruneSection(Section, frozen=True):
    """`[prune]`: a smaller graph."""

    method: Literal["channel", "nncf", "none"] = "channel"
    """`channel`: fewer channels, really faster; `nncf`: zeros among the weights, no speed; `none`."""
    target: Literal["macs", "latency", "ratio"] = "macs"
    """channel: what is brought down to `keep`: multiply-accumulates, measured latency, or channels of every layer."""
    keep: Rate = 0.6
    """channel: the part of the target that stays."""
    ms: Annotated[float, Meta(ge=0.0, le=60_000.0)] = 0.0
    """latency: milliseconds to reach instead of a part (0: `keep` holds)."""
    table: str = ""
    """latency: what `eyas-device bench --blocks FILE` wrote on the target, relative to the recipe; measured here if
    there is none."""
    rounds: AtLeastOne = 4
    """latency: steps in which it is reached, with `round_epochs` of recovery between them."""
    round_epochs: Count = 2
    sparsity: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.5
    """nncf: part of the weights that becomes zero."""
    epochs: Count = 20
    """Recovery with the teacher's answers."""
    rate: Rate = 1e-3


class QuantizeSection(Section, frozen=True):
    """`[quantize]`: how the float student becomes int8."""

    method: Literal["qat", "ptq"] = "qat"
    """`qat`: fine-tuning with the int8 grid in the graph until it answers as the float student; `ptq`: ranges from the
    calibration pictures alone."""
    preset: Literal["mixed", "symmetric"] = "mixed"
    """`symmetric`: all zero points 0, as TensorRT wants them; `mixed` uses the whole grid."""
    weight_bits: Literal[7, 8] = 7
    """7 uses half of the weights' grid: the same answers on x86 processors without VNNI, whose int8 sums saturate."""
    epochs: Count = 4
    rate: Rate = 1e-4
    calibration: Annotated[int, Meta(ge=2)] = 128
    """Training pictures that set the first ranges."""
    choose: Literal["coverage", "random"] = "coverage"
    """`coverage`: as many of each class, far apart in the student's features; `random`."""
    keep_float: tuple[str, ...] = ()
    """Layers that stay float; `eyas sensitivity` names them."""
    fallback: Count = 0
    """Where int8 loses more than `gate.max_drop` on validation: at most so many layers are kept float to mend it."""


class CompileSection(Section, frozen=True):
    """`[compile]`: which runtimes to build for."""

    runtimes: tuple[RuntimeName, ...] = ("litert", "openvino", "onnx")
    precisions: tuple[Precision, ...] = ("fp32", "int8")
    """fp32 and int8; int16 besides builds a LiteRT artefact with int16 activations: more exact, slow."""


class GateSection(Section, frozen=True):
    """`[gate]`: bounds on validation below which an artefact is not packed."""

    min_agreement: Fraction = 0.95
    """Part of the pictures on which an artefact's answer equals its reference model's."""
    max_dp: Positive = 0.02
    """Largest allowed mean difference of a probability."""
    max_drop: Fraction = 0.03
    """Largest allowed loss of balanced accuracy of int8 against the float model it was made from."""


class PackSection(Section, frozen=True):
    """`[pack]`: the bundle."""

    version: Annotated[str, Meta(pattern=r"^\d+\.\d+\.\d+([-+.][0-9A-Za-z.-]+)?$")] = "1.0.0"
    golden: Annotated[int, Meta(ge=1, le=64)] = 12
    """Validation pictures that every device must answer as the workstation did."""
    threshold: Fraction = 0.6
    """Answers below this calibrated confidence are reported as unsure."""
    pictures: Literal["allowed", "never"] = "allowed"
    """`never`: no device sends a picture, whatever its configuration says; part of the bundle."""


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """A whole recipe."""

    run: RunSection
    data: DataSection = DataSection()
    picture: PictureSection = PictureSection()
    augment: AugmentSection = AugmentSection()
    teacher: TeacherSection = TeacherSection()
    student: StudentSection = StudentSection()
    prune: PruneSection = PruneSection()
    quantize: QuantizeSection = QuantizeSection()
    compile: CompileSection = CompileSection()
    gate: GateSection = GateSection()
    cost: CostSection = CostSection()
    pack: PackSection = PackSection()
    tune: TuneSection = TuneSection()


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and `section.key=value` overrides (values as in TOML, bare words are strings).

    Raises `RecipeError` that lists every fault: file, section, key and what would be allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(f"{path}: {reason}; a recipe is a TOML file, `eyas new FOLDER` writes one") from None
    try:
        tree = parse(text)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from None
    faults = [fault for override in overrides for fault in _override(tree, override)]
    sections, more = convert(tree, Recipe)
    faults += more
    recipe = Recipe(**({"run": RunSection(name="unnamed")} | sections))
    base = path.resolve().parent
    recipe = msgspec.structs.replace(recipe, data=_beside(recipe.data, base))
    faults += forbidden(recipe.augment, tree.get("augment"))
    recipe = msgspec.structs.replace(recipe, augment=allowed(recipe.augment))
    if recipe.prune.table:
        table = msgspec.structs.replace(recipe.prune, table=str(base / recipe.prune.table))
        recipe = msgspec.structs.replace(recipe, prune=table)
    if recipe.student.ready:
        student = msgspec.structs.replace(recipe.student, ready=str(base / recipe.student.ready))
        recipe = msgspec.structs.replace(recipe, student=student)
    recipe = msgspec.structs.replace(
        recipe,
        teacher=with_weights_beside(recipe.teacher, base),
        student=with_weights_beside(recipe.student, base),
    )
    faults += _impossible(recipe)
    if faults:
        raise RecipeError(told(path, faults))
    return recipe


def _override(tree: dict[str, Any], override: str) -> Iterable[str]:
    """Put one `section.key=value` into the tree; yields a fault if it has another form."""
    target, equals, value = override.partition("=")
    section, dot, key = target.strip().partition(".")
    if not (equals and dot and section and key):
        yield f"--set {override}: the form is section.key=value"
        return
    try:
        parsed = parse(f"value = {value}")["value"]
    except ValueError:
        parsed = value
    branch = tree.setdefault(section, {})
    if isinstance(branch, dict):
        branch[key] = parsed


def _beside(data: DataSection, base: Path) -> DataSection:
    """The same with every path beside the recipe."""
    more = tuple(msgspec.structs.replace(one, path=str(base / one.path)) for one in data.more)
    path = str(base / data.path) if data.path and data.source != "elpv" else data.path
    return msgspec.structs.replace(data, path=path, more=more)


def _impossible(recipe: Recipe) -> Iterable[str]:
    """Combinations that no type forbids."""
    data = recipe.data
    if abs(sum(data.split) - 1.0) > 1e-6 or min(data.split) <= 0:
        yield f"[data] split = {list(data.split)}: three parts above 0 that add up to 1 are needed"
    if data.source == "folder" and not data.path:
        yield "[data] path: missing; source = 'folder' needs the folder of class folders"
    if data.source == "csv" and not data.path:
        yield "[data] path: missing; source = 'csv' needs the table path,label[,group,time]"
    if data.source == "elpv" and data.path:
        yield "[data] path: source = 'elpv' takes its pictures from the extra `demo`, not from a path"
    if data.by in ("group", "time") and (data.source == "elpv" or any(one.source != "csv" for one in data.sources)):
        yield f"[data] by = '{data.by}': source = 'csv' is needed, a table with the columns path,label,{data.by}"
    if data.by != "time" and data.gap_days:
        yield f"[data] gap_days belongs to by = 'time', not to {data.by!r}"
    if data.by == "time" and data.fold[1]:
        yield "[data] fold: by = 'time' has no folds, they would train on what comes after the test; leave one out"
    if not recipe.compile.runtimes or len(set(recipe.compile.runtimes)) != len(recipe.compile.runtimes):
        yield "[compile] runtimes: name at least one of litert, openvino, onnx, each once"
    fold, folds = data.fold
    if data.fold != (0, 0) and not (folds >= 2 and fold < folds):
        yield f"[data] fold = {list(data.fold)}: [k, n] with n of at least 2 folds and k from 0 to n - 1 is needed"
    prune = recipe.prune
    if prune.method == "channel" and prune.keep >= 1.0 and not (prune.target == "latency" and prune.ms):
        yield "[prune] keep = 1.0 prunes nothing: take method = 'none' or a part below 1"
    if prune.target != "latency" and (prune.ms or prune.table):
        yield f"[prune] ms and table belong to target = 'latency', not to {prune.target!r}"
    if recipe.prune.method == "nncf" and recipe.prune.sparsity == 0.0:
        yield "[prune] sparsity = 0 prunes nothing: take method = 'none' or a sparsity above 0"
    precisions = recipe.compile.precisions
    if not {"fp32", "int8"} <= set(precisions) or len(set(precisions)) != len(precisions):
        yield "[compile] precisions: fp32 and int8 are needed, int16 may stand beside them, each once"
    if "int16" in precisions and "litert" not in recipe.compile.runtimes:
        yield "[compile] precisions: int16 is built for litert, which [compile] runtimes leaves out"
    if recipe.student.ready and (recipe.prune.method != "none" or recipe.quantize.method != "ptq"):
        yield "[student] ready: then nothing is trained: [prune] method = 'none' and [quantize] method = 'ptq', please"
    if recipe.quantize.method == "qat" and not recipe.quantize.epochs:
        yield "[quantize] epochs = 0: training for no epochs is method = 'ptq'"
    if len(set(recipe.run.trackers)) != len(recipe.run.trackers):
        yield f"[run] trackers = {list(recipe.run.trackers)}: each once"
    if recipe.run.amp == "fp16" and recipe.run.device == "cpu":
        yield "[run] amp = 'fp16' needs a GPU, and device = 'cpu' takes none; 'bf16' runs there"
    if recipe.picture.size % 32:
        yield f"[picture] size = {recipe.picture.size}: must be a multiple of 32 (the networks halve it five times)"
    yield from training_faults(recipe.teacher, recipe.student)
