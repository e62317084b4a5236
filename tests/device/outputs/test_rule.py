"""The debouncing rule, against a plain second formulation over the whole history."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from eyas_device.config import OutputSection
from eyas_device.outputs.rule import Debouncer

LABELS = ("ok", "scratch", "dent")


class Seen(NamedTuple):
    label: str
    confidence: float
    uncertain: bool


seen = st.builds(Seen, st.sampled_from(LABELS), st.sampled_from([0.4, 0.69, 0.7, 0.85, 0.9, 0.97]), st.booleans())


@st.composite
def rules(draw: st.DrawFn) -> OutputSection:
    of = draw(st.integers(1, 7))
    return OutputSection(
        kind="mqtt",
        labels=tuple(draw(st.lists(st.sampled_from(LABELS), unique=True, max_size=2))),
        confidence=draw(st.sampled_from([0.0, 0.7, 0.9])),
        hysteresis=draw(st.sampled_from([0.0, 0.2, 1.0])),
        uncertain=draw(st.booleans()),
        hits=draw(st.integers(of // 2 + 1, of)),
        of=of,
        min_on_s=draw(st.sampled_from([0.0, 0.5, 3.0])),
    )


def expected(rule: OutputSection, frames: list[Seen], step_s: float) -> list[bool | None]:
    """The state after each frame, from the definition: slices of the whole history, times by multiplication."""

    def fits(frame: Seen, level: float) -> bool:
        if rule.labels and frame.label not in rule.labels:
            return False
        return (rule.uncertain or not frame.uncertain) and frame.confidence >= level

    low = rule.confidence - rule.hysteresis
    states: list[bool | None] = []
    state, switched = None, 0
    for n in range(len(frames)):
        last = frames[max(0, n + 1 - rule.of) : n + 1]
        if state is not True and len([f for f in last if fits(f, rule.confidence)]) >= rule.hits:
            state, switched = True, n
        elif state is True:
            long_enough = (n - switched) * step_s >= rule.min_on_s
            if long_enough and len([f for f in last if not fits(f, low)]) >= rule.hits:
                state = False
        elif len([f for f in last if not fits(f, rule.confidence)]) >= rule.hits:
            state = False
        states.append(state)
    return states


def run(rule: OutputSection, frames: list[Seen], step_s: float = 0.25) -> list[bool | None]:
    debouncer, states = Debouncer(rule), []
    for number, frame in enumerate(frames):
        debouncer.add(frame.label, frame.confidence, uncertain=frame.uncertain, now=number * step_s)
        states.append(debouncer.on)
    return states


@settings(max_examples=150, deadline=None)
@given(rules(), st.lists(seen, max_size=60))
def test_states_follow_the_definition(rule: OutputSection, frames: list[Seen]) -> None:
    assert run(rule, frames) == expected(rule, frames, 0.25)


@settings(max_examples=100, deadline=None)
@given(rules(), st.lists(seen, max_size=30), st.sampled_from(LABELS))
def test_a_lasting_change_arrives_within_n_frames(rule: OutputSection, before: list[Seen], label: str) -> None:
    """Whatever came before; the minimum on-time excepted."""
    rule = rule.__class__(**{f: getattr(rule, f) for f in rule.__struct_fields__} | {"min_on_s": 0.0})
    for frame in (Seen(label, 0.97, False), Seen(label, 0.0, True)):
        wanted = (not rule.labels or label in rule.labels) and frame.confidence >= rule.confidence
        wanted = wanted and (rule.uncertain or not frame.uncertain)
        held = (not rule.labels or label in rule.labels) and (rule.uncertain or not frame.uncertain)
        if held and not wanted:
            continue  # hysteresis may hold either state
        assert run(rule, [*before, *[frame] * rule.of])[-1] is wanted


@settings(max_examples=100, deadline=None)
@given(rules(), st.lists(seen, min_size=1, max_size=60))
def test_it_stays_on_for_its_minimum_and_needs_its_hits(rule: OutputSection, frames: list[Seen]) -> None:
    states = run(rule, frames)
    assert all(state is None for state in states[: rule.hits - 1])
    switched = None
    for n, state in enumerate(states):
        if state and switched is None:
            switched = n
        elif not state and switched is not None:
            assert (n - switched) * 0.25 >= rule.min_on_s
            switched = None


def test_the_label_is_debounced_too() -> None:
    rule = OutputSection(kind="mqtt", labels=("scratch", "dent"), hits=3, of=5)
    debouncer = Debouncer(rule)
    names = []
    for label in ("ok", "scratch", "dent", "scratch", "dent", "dent", "ok", "dent", "ok", "ok"):
        debouncer.add(label, 0.9, uncertain=False, now=0.0)
        names.append((debouncer.on, debouncer.label))
    assert names[3] == (True, "scratch"), "the label that most of the frames had"
    assert names[4] == (True, "scratch"), "a single other frame renames nothing"
    assert names[5] == (True, "dent")
    assert [on for on, _ in names] == [None, None, None, True, True, True, True, True, True, False]


def test_after_a_reset_nothing_that_was_seen_counts() -> None:
    debouncer = Debouncer(OutputSection(kind="mqtt", hits=2, of=2))
    debouncer.add("ok", 0.9, uncertain=False, now=0.0)
    debouncer.reset()
    debouncer.add("ok", 0.9, uncertain=False, now=1.0)
    assert debouncer.on is None
    debouncer.add("ok", 0.9, uncertain=False, now=2.0)
    assert debouncer.on is True and debouncer.label == "ok"
