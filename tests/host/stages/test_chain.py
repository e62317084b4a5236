"""The table of stages."""

from __future__ import annotations

from eyas_host.stages import chain


def test_a_stage_depends_only_on_earlier_ones() -> None:
    names = [stage.name for stage in chain.STAGES]
    for index, stage in enumerate(chain.STAGES):
        assert set(stage.needs) <= set(names[:index]), stage.name
