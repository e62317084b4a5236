"""The judge of a probation: what it promises of models at a bound, of bad ones and of few frames, by simulation."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from eyas_device.bundle import MANIFEST
from eyas_device.cli import main as cli
from eyas_device.updates.probation import (
    FALSE_ALARM,
    MISS,
    assess,
    begin,
    ended,
    read_release,
    tail,
    write_verdict,
)
from eyas_device.updates.records import Tally
from eyas_device.updates.release import Bounds, Release
from eyas_device.updates.slots import SlotError, Slots

BOUNDS = Bounds()
RUNS = 400
NOISE = 3 * math.sqrt(0.05 * 0.95 / RUNS)
"""Three standard errors of a rate of 5 % among `RUNS`."""
STEP = 10


def simulate(
    seed: int,
    *,
    errors: float = 0.0,
    different: float = 0.0,
    slower: float = 0.0,
    frames: int = 9000,
    bounds: Bounds = BOUNDS,
) -> tuple[str, str, int]:
    """How one probation ends with these rates, and why, and after how many frames, if time allows `frames`."""
    rng = np.random.default_rng(seed)
    tally = Tally()
    for count in range(STEP, frames + 1, STEP):
        shadowed = count // bounds.shadow_every - tally.shadowed
        tally.frames = count
        tally.errors += int(rng.binomial(STEP, errors))
        tally.shadowed += shadowed
        tally.different += int(rng.binomial(shadowed, different))
        tally.slower += int(rng.binomial(shadowed, slower))
        tally.seconds = bounds.seconds * count / frames
        found = assess(tally, bounds)
        if found.state != "running":
            return found.state, found.reason, count
    raise AssertionError("a probation did not end in its time")


def failed(*, runs: int = RUNS, **rates: float) -> tuple[float, float]:
    """The share of probations that fail, and the mean number of frames that they take."""
    outcomes = [simulate(seed, **rates) for seed in range(runs)]  # type: ignore[arg-type]
    return sum(state == "failed" for state, _, _ in outcomes) / runs, float(np.mean([n for _, _, n in outcomes]))


AT_BOUND = [{"errors": 0.01}, {"different": 0.3}, {"slower": 0.5}]
TWICE = [{"errors": 0.02}, {"different": 0.6}, {"slower": 1.0}]


@pytest.mark.parametrize("rates", AT_BOUND, ids=str)
def test_a_model_exactly_at_a_bound_is_seldom_rolled_back(rates: dict[str, float]) -> None:
    share, _ = failed(**rates)
    assert share <= FALSE_ALARM + NOISE


@pytest.mark.parametrize("rates", TWICE, ids=str)
def test_a_model_twice_as_bad_as_a_bound_is_rolled_back(rates: dict[str, float]) -> None:
    share, frames = failed(**rates)
    assert share >= 1 - MISS - NOISE
    assert frames <= 1000


@pytest.mark.parametrize("rates", [{"errors": 0.5}, {"different": 1.0}, {"slower": 1.0}], ids=str)
def test_a_very_bad_model_is_rolled_back_by_the_default_frames_at_the_latest(rates: dict[str, float]) -> None:
    share, frames = failed(runs=50, **rates)
    assert share == 1.0
    assert frames <= BOUNDS.frames


def test_a_good_model_passes_at_the_default_frames() -> None:
    outcomes = [simulate(seed, errors=0.0005, different=0.05, slower=0.1) for seed in range(RUNS)]
    assert sum(state == "passed" for state, _, _ in outcomes) / RUNS >= 1 - 0.01
    assert float(np.median([n for _, _, n in outcomes])) == BOUNDS.frames


def test_models_at_a_bound_are_seldom_rolled_back_by_the_few_frames_of_a_slow_camera_either() -> None:
    for rates in AT_BOUND:
        outcomes = [simulate(seed, frames=90, **rates) for seed in range(RUNS)]  # type: ignore[arg-type]
        assert sum(state == "failed" for state, _, _ in outcomes) / RUNS <= FALSE_ALARM + NOISE
    state, reason, _ = simulate(1, errors=0.2, frames=90)
    assert state == "failed" and "1.0% are allowed" in reason


def test_a_dark_hall_is_no_fault_of_the_model() -> None:
    dark = Tally(seconds=BOUNDS.seconds)
    assert assess(dark, BOUNDS).state == "passed"
    assert assess(Tally(seconds=BOUNDS.seconds - 1), BOUNDS).state == "running"
    dusk = Tally(seconds=BOUNDS.seconds, frames=BOUNDS.min_frames - 1, shadowed=4, different=4)
    found = assess(dusk, BOUNDS)
    assert found.state == "passed" and found.reason.endswith("too few to compare the answers")
    assert assess(msgspec.structs.replace(dusk, frames=BOUNDS.min_frames), BOUNDS).state == "failed"


def test_errors_and_latency_end_a_probation_early_and_answers_do_not() -> None:
    """Ten frames of one object, on which the models differ, are one disagreement, not ten."""
    assert assess(Tally(frames=6, errors=6), BOUNDS).state == "failed"
    assert assess(Tally(frames=100, shadowed=10, slower=10), BOUNDS).state == "failed"
    early = Tally(frames=BOUNDS.frames - 1, shadowed=49, different=49)
    assert assess(early, BOUNDS).state == "running"
    found = assess(msgspec.structs.replace(early, frames=BOUNDS.frames), BOUNDS)
    assert found == ("failed", "the previous model's label on 0 of 49 frames; 70.0% are required")


def test_without_a_previous_model_only_errors_are_judged() -> None:
    found = assess(Tally(frames=BOUNDS.frames), BOUNDS, compared=False)
    assert found.state == "passed" and found.reason.endswith("not compared with a previous model")
    assert assess(Tally(frames=BOUNDS.frames, errors=40), BOUNDS, compared=False).state == "failed"
    waiting = assess(Tally(frames=BOUNDS.frames), BOUNDS)
    assert waiting.state == "running", "the previous model is being loaded"


def test_bounds_at_their_limits() -> None:
    strict = Bounds(max_error_rate=0.0, min_agreement=1.0, max_ood_share=0.0)
    assert assess(Tally(frames=1, errors=1), strict).state == "failed"
    assert assess(Tally(frames=500, shadowed=50, different=1), strict).state == "failed"
    assert assess(Tally(frames=500, shadowed=50, ood=1), strict).state == "failed"
    assert assess(Tally(frames=500, shadowed=50), strict).state == "passed"
    lax = Bounds(max_error_rate=1.0, min_agreement=0.0, max_ood_share=1.0)
    assert assess(Tally(frames=500, errors=500, shadowed=50, different=50, ood=50), lax).state == "passed"


@pytest.mark.parametrize(("hits", "of", "rate"), [(1, 500, 0.01), (10, 500, 0.01), (30, 50, 0.3), (50, 50, 0.5)])
def test_the_binomial_tail_is_exact(hits: int, of: int, rate: float) -> None:
    terms = (math.comb(of, k) * rate**k * (1 - rate) ** (of - k) for k in range(hits, of + 1))
    assert tail(hits, of, rate) == pytest.approx(math.fsum(terms), rel=1e-9)


@given(st.integers(0, 200_000), st.floats(0, 1), st.floats(0.0, 1.0))
def test_the_binomial_tail_is_right_after_any_number_of_frames(of: int, share: float, rate: float) -> None:
    """A long probation has hundreds of thousands of frames: probabilities of single counts are smaller than numbers."""
    hits = round(share * of)
    expected = float(stats.binom.sf(hits - 1, of, rate))
    assert tail(hits, of, rate) == pytest.approx(expected, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("shadowed", [500, 5_000, 50_000])
def test_a_good_model_passes_a_probation_that_ends_by_its_time(shadowed: int) -> None:
    """Its predictions differ on one of a hundred frames, and thirty of them are allowed."""
    long = Bounds(frames=10_000_000, seconds=86_400.0)
    tally = Tally(frames=10 * shadowed, seconds=long.seconds, shadowed=shadowed, different=shadowed // 100)
    assert assess(tally, long).state == "passed"
    tally.different = round(0.32 * shadowed)
    assert assess(tally, long).state == ("failed" if shadowed > 500 else "passed"), (
        "above the bound, and enough to say so"
    )


def test_a_verdict_is_about_the_bundle_that_is_in_the_slot(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    (slots.folder / "a").mkdir(parents=True)
    (manifest := slots.folder / "a" / MANIFEST).write_bytes(b"{}")
    assert begin(slots, "a", now=1.0) is None, "an unsigned bundle owes no proof"
    release = Release(model="shapes", version="2.0.0", identity="1" * 64)
    (slots.folder / "a.release").write_bytes(msgspec.json.encode(release))
    begun = begin(slots, "a", now=1.0)
    assert begun is not None and begun[0] == release and begun[1].model == "shapes 2.0.0"
    failed = ended(begun[1], assess(Tally(frames=9, errors=9), BOUNDS), Tally(frames=9, errors=9), now=2.0)
    assert write_verdict(slots, "a", failed)
    assert slots.verdict("a") == failed and begin(slots, "a", now=3.0) is None
    manifest.write_bytes(b'{"version": "3.0.0"}')
    assert slots.verdict("a") is None and begin(slots, "a", now=3.0) is not None


@pytest.mark.parametrize("data", [b"", b"[", b"[" * 100_000, b'{"probation": {"frames": 0}}', b"{" + b" " * (2 << 20)])
def test_a_damaged_record_counts_as_missing(data: bytes, tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    (slots.folder / "a").mkdir(parents=True)
    (slots.folder / "a" / MANIFEST).write_bytes(b"{}")
    (slots.folder / "a.release").write_bytes(data)
    (slots.folder / "a.probation").write_bytes(data)
    assert read_release(slots, "a") is None and slots.verdict("a") is None


# --- what it means for the slots -------------------------------------------------------------------------------------


def test_a_slot_that_failed_comes_last_and_one_without_proof_is_the_one_to_replace(
    tmp_path: Path, pristine_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slots, bundles = Slots(tmp_path / "state"), {}
    for version in "123":
        shutil.copytree(pristine_bundle, bundles.setdefault(version, tmp_path / version))
        manifest = msgspec.json.decode((pristine_bundle / MANIFEST).read_bytes()) | {"version": version}
        (bundles[version] / MANIFEST).write_bytes(msgspec.json.encode(manifest))

    def nothing(root: Path) -> None:
        pass

    slots.install(bundles["1"], check=nothing)
    slots.install(bundles["2"], check=nothing)
    (slots.folder / "b.release").write_bytes(msgspec.json.encode(Release(model="shapes", version="2")))
    assert slots.candidates() == ["b", "a"] and slots.inactive().name == "b", "never overwrite the proven one"
    with slots.hold("b") or pytest.fail("free"):
        assert slots.inactive().name == "a"
        with slots.hold("a") or pytest.fail("free"), pytest.raises(SlotError, match="on probation"):
            slots.install(bundles["3"], check=nothing)
    _, verdict = begin(slots, "b", now=1.0) or pytest.fail("nothing to prove")
    write_verdict(slots, "b", verdict)
    assert [state.probation for state in slots.states()] == ["", "running"]
    assert cli(["slots", "--state", str(slots.state)]) == 0
    assert "* b  tiny-shapes 2            good, on probation" in capsys.readouterr().out
    write_verdict(slots, "b", msgspec.structs.replace(verdict, state="passed"))
    assert slots.inactive().name == "a"
    write_verdict(slots, "b", msgspec.structs.replace(verdict, state="failed"))
    assert slots.candidates() == ["a", "b"] and slots.inactive().name == "b"
    slots.install(bundles["3"], check=nothing)
    assert slots.verdict("b") is None and not (slots.folder / "b.probation").exists()
