"""`[data]`: the labelled images and how they are split."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from eyas_device.support.toml import Section
from eyas_host.recipe.cost import CostSection as CostSection
from eyas_host.recipe.training import StudentSection as StudentSection
from eyas_host.recipe.training import TeacherSection as TeacherSection
from eyas_host.recipe.tune import TuneSection as TuneSection
from eyas_host.recipe.types import Count, Fraction


class Source(Section, frozen=True):
    """One more place of labelled images, beside `[data] path`."""

    path: Annotated[str, Meta(min_length=1)]
    """The folder of class folders or the table, relative to the recipe file."""
    source: Literal["folder", "csv"] = "folder"


class DataSection(Section, frozen=True):
    """`[data]`: the labelled images and how they are divided."""

    source: Literal["folder", "csv", "elpv"] = "folder"
    """`folder`: one folder a class; `csv`: a table path,label[,group,time]; `elpv`: the solar-cell demonstration set
    (extra `demo`, non-commercial)."""
    path: str = ""
    """The folder of class folders or the table, relative to the recipe file."""
    more: tuple[Source, ...] = ()
    """Further sources that are joined to it: [{source = "csv", path = "line2.csv"}, ...]."""
    by: Literal["auto", "stratified", "group", "time"] = "auto"
    """What the parts are divided by: `stratified` image by image, `group` with no group on two sides, `time` with
    training before validation before test; `auto`: by group where the images have groups, else stratified."""
    gap_days: Annotated[float, Meta(ge=0.0, le=36_500.0)] = 0.0
    """time: days between the parts whose images are set aside."""
    near_duplicates: Annotated[int, Meta(ge=0, le=64)] = 16
    """Images whose perceptual hashes differ in at most so many of 256 bits stay on one side (0: not looked for)."""
    split: tuple[Fraction, Fraction, Fraction] = (0.7, 0.15, 0.15)
    """Parts for training, validation and the sealed test."""
    fold: tuple[Count, Count] = (0, 0)
    """Cross-validation: (k, n) makes the k-th of n folds the sealed test, counted from 0; (0, 0): `split` alone."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read (they are listed) instead of stopping."""
    limit: Count = 0
    """Use at most this many images (0: all), drawn evenly from the classes; for a quick try."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """All places on disk, the first one included."""
        first = () if self.source == "elpv" else (Source(source=self.source, path=self.path or "."),)
        return (*first, *self.more)
