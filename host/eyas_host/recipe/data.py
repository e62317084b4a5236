"""`[data]`: the labelled images and how they are split."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from eyas_device.support.toml import Section
from eyas_host.recipe.types import Count, Fraction


class Source(Section, frozen=True):
    """A further source of labelled images, beside `[data] path`."""

    path: Annotated[str, Meta(min_length=1)]
    """The folder of class folders, the table or the tar shards, relative to the recipe file."""
    source: Literal["folder", "csv", "tar"] = "folder"
    """`folder`, `csv` or `tar`, as in `[data] source`."""


class DataSection(Section, frozen=True):
    """`[data]`: the labelled images and how they are split."""

    source: Literal["folder", "csv", "tar", "elpv"] = "folder"
    """`folder`: one folder a class; `csv`: a table path,label[,group,time,split]; `tar`: tar shards as WebDataset
    writes them (KEY.jpg with KEY.cls or KEY.json), or tar files of class folders; `elpv`: the solar-cell demonstration
    set (extra `demo`, non-commercial)."""
    path: str = ""
    """The folder of class folders, the table, or the shards (a tar file, a folder of them, or a pattern such as
    train-{000..146}.tar), relative to the recipe file. Shards may be at https:// or s3:// addresses, class folders at
    s3://; no password or signature may be in one."""
    more: tuple[Source, ...] = ()
    """Further sources to join: [{source = "csv", path = "line2.csv"}, ...]."""
    corrections: bool = False
    """An image that a later source labels otherwise than an earlier one has the later label; off: that is an error."""
    by: Literal["auto", "stratified", "group", "time", "folders", "column"] = "auto"
    """How images are assigned to the splits: `stratified` one by one, `group` with each group in one split, `time` with
    training before validation before test, `folders` as the folders train/, val/ and test/ divide them already,
    `column` as the column split of the tables does; `auto`: `group` where the images have groups, else `stratified`."""
    gap_days: Annotated[float, Meta(ge=0.0, le=36_500.0)] = 0.0
    """time: days between two splits whose images are set aside."""
    near_duplicates: Annotated[int, Meta(ge=0, le=64)] = 16
    """Images whose 256-bit perceptual hashes differ in at most this many bits go to one split (0: no search)."""
    keep: str = ""
    """`split/manifest.json` of a former run, relative to the recipe file: images that it knows stay in their split, so
    that the next version is tested on what its parent was tested on; only new images are assigned."""
    keep_missing: bool = False
    """keep: go on although images of its held-out test set are gone."""
    split: tuple[Fraction, Fraction, Fraction] = (0.7, 0.15, 0.15)
    """Fractions for training, validation and the held-out test set."""
    fold: tuple[Count, Count] = (0, 0)
    """Cross-validation: (k, n) holds out the k-th of n folds as the test set, counted from 0; (0, 0): `split` only."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read (they are listed) instead of stopping."""
    limit: Count = 0
    """Use at most this many images (0: all), drawn evenly from the classes; for a quick trial."""

    @property
    def divided(self) -> bool:
        """Whether the sources divide the images already."""
        return self.by in ("folders", "column")

    @property
    def sources(self) -> tuple[Source, ...]:
        """All sources on disk, `path` first."""
        first = () if self.source == "elpv" else (Source(source=self.source, path=self.path or "."),)
        return (*first, *self.more)
