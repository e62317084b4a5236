"""The recipe: the TOML file that configures a run, one module per section; `load` reads and checks it.

Every section is a frozen struct with one sentence a field. Unknown keys, wrong types and impossible combinations are
all reported together, each with its section and what is allowed.
"""

from __future__ import annotations

import msgspec

from eyas_host.recipe.accept import AcceptSection
from eyas_host.recipe.augment import AugmentSection
from eyas_host.recipe.compress import PruneSection, QuantizeSection
from eyas_host.recipe.cost import CostSection
from eyas_host.recipe.data import DataSection
from eyas_host.recipe.export import CompileSection, GateSection
from eyas_host.recipe.image import ImageSection
from eyas_host.recipe.pack import PackSection
from eyas_host.recipe.run import RunSection
from eyas_host.recipe.training import StudentSection, TeacherSection
from eyas_host.recipe.tune import TuneSection


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """All settings of a run, a field per section."""

    run: RunSection
    data: DataSection = DataSection()
    image: ImageSection = ImageSection()
    augment: AugmentSection = AugmentSection()
    teacher: TeacherSection = TeacherSection()
    student: StudentSection = StudentSection()
    prune: PruneSection = PruneSection()
    quantize: QuantizeSection = QuantizeSection()
    compile: CompileSection = CompileSection()
    gate: GateSection = GateSection()
    cost: CostSection = CostSection()
    accept: AcceptSection = AcceptSection()
    pack: PackSection = PackSection()
    tune: TuneSection = TuneSection()
