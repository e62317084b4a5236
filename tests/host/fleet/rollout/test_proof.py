"""The bet on labelled disagreements: how often it is wrong, whenever one looks, and what it takes to be right."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from scipy import stats
from scipy.integrate import quad

from eyas_device.telemetry.messages import Event, encode
from eyas_host.fleet.rollout import by_hand
from eyas_host.fleet.rollout.disagreements import EVERY_S, EvidenceReader, weigh
from eyas_host.fleet.rollout.engine import decide
from eyas_host.fleet.rollout.plan import Plan, ProofSection, RolloutSection, Wave, read_plan
from eyas_host.fleet.rollout.proof import Evidence, labels_needed, log_wealth
from eyas_host.fleet.rollout.records import Records
from eyas_host.fleet.rollout.runner import Runner
from eyas_host.fleet.rollout.show import details
from eyas_host.fleet.rollout.state import Rollout, RolloutState, Step
from eyas_host.fleet.samples.records import Said, say, undo
from eyas_host.fleet.store.database import Batch, Store
from eyas_host.fleet.store.validate import ValidMessage, validate
from tests.support.fleet_parts import event
from tests.support.rollout_parts import NEW, QUICK, MemoryChannels, SimulatedFleet, StoredFleet, advance, rollout

SPOOL = "0b7f9a1e-4a1c-4a41-9d11-2f6f7f3a1101"
NOW = 1_800_000_000.0
PROVEN = replace(QUICK, wave=(Wave(share=0.1, wait_s=0, then="proven"), Wave(wait_s=0)))
BETTER, WORSE = Evidence(labelled=16, new_right=16), Evidence(labelled=16, previous_right=16)


def ever_promoted(chances: np.ndarray, runs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether each run promotes at any of its looks, one after each label: by the bet, and by p < .05 at each look."""
    generator = np.random.default_rng(seed)
    right = generator.random((runs, len(chances))) < chances
    wins = np.cumsum(right, axis=1)
    looks = np.arange(1, len(chances) + 1)
    table = {(n, w): log_wealth(w, n - w) for n in looks for w in range(n // 2, n + 1)}
    bound = [next(w for w in range(n // 2, n + 2) if w > n or table[n, w] >= math.log(20)) for n in looks]
    naive = stats.binom.isf(0.05, looks, 0.5) + 1
    return (wins >= bound).any(axis=1), (wins >= naive).any(axis=1)


def test_a_version_that_is_no_better_is_promoted_in_at_most_five_of_a_hundred_runs() -> None:
    """4,000 runs with a look after each of 400 labels; "p < .05 at each look" promotes many times as often."""
    bet, naive = ever_promoted(np.full(400, 0.5), 4000, seed=1)
    assert bet.mean() <= 0.05, f"{bet.mean():.3f}"
    assert naive.mean() > 0.2, f"{naive.mean():.3f}: the comparison is none if this is right"
    changing = np.where(np.arange(400) % 80 < 40, 0.5, 0.35)  # no better at any time, worse half of the time
    assert ever_promoted(changing, 2000, seed=2)[0].mean() <= 0.05


@pytest.mark.parametrize(("chance", "labels"), [(0.55, 598), (0.60, 149), (0.65, 66), (0.70, 36), (0.80, 16)])
def test_labels_until_promotion_are_near_what_the_formula_says(chance: float, labels: int) -> None:
    assert round(labels_needed(chance)) == labels
    generator, needed = np.random.default_rng(3), []
    for _ in range(60):
        wins = losses = 0
        while log_wealth(wins, losses) < math.log(20):
            right = generator.random() < chance
            wins, losses = wins + right, losses + (not right)
        needed.append(wins + losses)
    assert np.median(needed) <= 2 * labels + 5, "the bettor does not know the chance, and pays for that"


@given(st.integers(0, 300), st.integers(0, 300))
def test_the_money_is_a_martingale_under_the_null_and_what_the_integral_says(wins: int, losses: int) -> None:
    fair = 0.5 * math.exp(log_wealth(wins + 1, losses)) + 0.5 * math.exp(log_wealth(wins, losses + 1))
    assert fair == pytest.approx(math.exp(log_wealth(wins, losses)), rel=1e-9)
    peak = log_wealth(wins, losses)
    money = lambda q: 2 * math.exp(wins * math.log(2 * q) + losses * math.log(2 * (1 - q)) - peak)  # noqa: E731
    integral, _ = quad(money, 0.5, 1, limit=200)
    assert integral == pytest.approx(1, rel=0.2)


def test_promote_hold_and_roll_back_are_mirrors_and_neither_says_nothing() -> None:
    assert (BETTER.verdict, WORSE.verdict, Evidence().verdict) == ("promote", "roll back", "hold")
    assert Evidence(labelled=500).verdict == "hold" and Evidence(labelled=500).neither == 500
    assert BETTER.better == WORSE.worse and "neither on 0" in str(BETTER)
    many = Evidence(labelled=9000, new_right=9000)
    assert many.verdict == "promote" and many.better > 1e300 and many.worse < 1e-6, "more than a number can be"
    for chance in (0.5, 1.0):
        with pytest.raises(ValueError, match="between 1/2 and 1"):
            labels_needed(chance)


def sent(number: int, time: float, label: str = "disc", previous: str = "cross", **fields: object) -> Event:
    more = {"time": time, "label": label, "why": "disagreement", "previous_label": previous, "digest": NEW, **fields}
    return event(str(more.pop("device", "cam-1")), SPOOL, number, **more)


def stored(store: Store, events: list[Event]) -> None:
    valid = [validate(f"eyas/hall/{one.device}/event", encode(one)) for one in events]
    assert all(isinstance(one, ValidMessage) for one in valid), valid
    store.add(Batch(NOW + 100_000, [one for one in valid if isinstance(one, ValidMessage)]))


def word(number: int, label: str, device: str = "cam-1", person: str = "anna") -> tuple[tuple[str, str, int], Said]:
    return (device, SPOOL, number), Said(label=label, person=person, at=NOW)


def test_of_one_scene_counts_one_disagreement_and_of_others_none(url: str) -> None:
    """Neighbouring frames show the same scene: a camera that sends ten of it has seen one."""
    one = rollout(PROVEN, created=NOW)
    burst = [sent(n, NOW + 10 + n) for n in range(10)]
    others = [
        sent(20, NOW + 200),
        sent(21, NOW + 500, previous="disc"),  # the same label: none
        sent(22, NOW + 600, why="uncertain"),
        sent(23, NOW + 700, digest="2" * 12),  # of another version
        sent(24, NOW - 5000),  # from before the rollout
        sent(25, NOW + 800, label="bar", previous="cross"),
        sent(26, NOW + 805, device="cam-2"),
    ]
    with Store(url) as store:
        stored(store, burst + others)
        reader = EvidenceReader(store, clock=lambda: NOW)
        assert reader.read(one) == Evidence(disagreements=4)
        said = [word(n, "disc") for n in range(4, 10)] + [word(20, "cross"), word(25, "ring"), word(26, "?", "cam-2")]
        say(store, said)
        found = reader.read(one)
        assert (found.disagreements, found.labelled) == (4, 3), "nobody could tell of cam-2's"
        assert (found.new_right, found.previous_right, found.neither) == (1, 1, 1)
        undo(store, "anna", now=NOW)
        undo(store, "anna", now=NOW)
        assert reader.read(one).labelled == 2, "what is taken back does not count"
        two = replace(one, plan=replace(PROVEN, proof=ProofSection(people=2)))
        assert EvidenceReader(store).read(two).labelled == 0
        say(store, [word(20, "cross", person="bert")])
        assert EvidenceReader(store).read(two).previous_right == 1


def test_samples_are_read_again_when_something_was_said_or_after_a_while(tmp_path: Path) -> None:
    one, now = rollout(PROVEN, created=NOW), [NOW]
    with Store(f"sqlite:///{tmp_path}/fleet.db") as store:
        stored(store, [sent(1, NOW + 1)])
        reader = EvidenceReader(store, clock=lambda: now[0])
        assert reader.read(one).disagreements == 1
        stored(store, [sent(2, NOW + 100)])
        assert reader.read(one).disagreements == 1
        now[0] += EVERY_S
        assert reader.read(one).disagreements == 2


def test_spacing_may_be_none() -> None:
    with_all = weigh([], {}, ProofSection(spacing_s=0))
    assert with_all == Evidence()


def to_wait(plan: Plan = PROVEN) -> tuple[Rollout, SimulatedFleet]:
    """A rollout whose first wave is good, and not proven."""
    one, fleet = rollout(plan), SimulatedFleet([f"cam-{n}" for n in range(20)])
    for now in range(4):
        one, _ = advance(one, fleet, now)
    return one, fleet


def after(one: Rollout, fleet: SimulatedFleet, evidence: Evidence, now: float = 100) -> RolloutState:
    return decide(one, fleet.seen, now, evidence=evidence).state


def test_a_wave_waits_for_the_proof_and_goes_on_by_itself_when_it_is_there() -> None:
    one, fleet = to_wait()
    assert (one.state.status, one.state.wants, one.state.wave) == ("waiting", "approve", 0)
    assert "not proven to be better" in one.state.reason
    undecided = Evidence(disagreements=40, labelled=20, new_right=12, previous_right=8)
    assert after(one, fleet, undecided).status == "waiting"
    gone_on = after(one, fleet, BETTER)
    assert (gone_on.status, gone_on.wave) == ("running", 1)
    approved = by_hand.approve(one, fleet.seen, "seen by hand", 100).state
    assert (approved.status, approved.wave) == ("running", 1)


def test_proof_before_the_wave_is_good_does_not_hurry_it() -> None:
    one, fleet = rollout(PROVEN), SimulatedFleet([f"cam-{n}" for n in range(20)])
    one, _ = advance(one, fleet, 0, share=0)
    assert after(one, fleet, BETTER).wave == 0, "nobody has committed"


@pytest.mark.parametrize("waiting", [True, False])
def test_a_worse_version_goes_back_also_while_its_wave_is_under_way(waiting: bool) -> None:
    one, fleet = to_wait() if waiting else (rollout(PROVEN), SimulatedFleet([f"cam-{n}" for n in range(20)]))
    if not waiting:
        one, _ = advance(one, fleet, 0, share=0)
    stopped = after(one, fleet, WORSE)
    assert (stopped.status, stopped.rolled_back) == ("aborting", True)
    assert "worse than the previous version: 16 of 0 disagreements labelled" in stopped.reason


def test_who_resumes_after_evidence_of_worse_is_not_stopped_by_it_again() -> None:
    one, fleet = to_wait(replace(PROVEN, rollout=RolloutSection(on_worse="pause")))
    paused = replace(one, state=after(one, fleet, WORSE))
    assert paused.state.status == "paused"
    resumed = replace(one, state=by_hand.resume(paused, fleet.seen, "the labels were wrong", 101).state)
    again = after(resumed, fleet, WORSE, now=102)
    assert again.status == "waiting" and again.wave == 0, "and it is not promoted by that"


def test_from_labels_in_the_store_to_the_next_wave(url: str, tmp_path: Path) -> None:
    clock = iter(np.arange(NOW, NOW + 1000, 1.0))
    with Store(url) as store:
        fleet = StoredFleet(store, SimulatedFleet([f"cam-{n}" for n in range(20)]), MemoryChannels())
        fleet.report()
        records = Records(store)
        one = records.add(rollout(PROVEN, created=NOW), Step(what="started", at=NOW, by="me"))
        runner = Runner(store, fleet.channels, clock=lambda: float(next(clock)))

        def turn(count: int) -> None:
            for _ in range(count):
                assert runner.turn().problems == ()
                fleet.follow()

        turn(4)
        assert records.get(one.id).state.status == "waiting" and len(fleet.fleet.running(NEW)) == 2
        stored(store, [sent(n, NOW + 100 * n) for n in range(1, 17)])
        say(store, [word(n, "disc") for n in range(1, 17)])
        turn(6)
        done = records.get(one.id)
        assert done.state.status == "finished" and fleet.fleet.running(NEW) == set(fleet.fleet.devices)
        text = "\n".join(details(done, [], records.steps(one.id), NOW))
        assert "the new version is right on 16, the previous one on 0" in text and "promote" in text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('then = "proved"', "proved"),
        ("[proof]\nalpha = 0.9", "alpha"),
        ("[proof]\npeople = 0", "people"),
        ("[proof]\nspaces = 1", "spaces"),
    ],
)
def test_a_plan_with_a_wrong_proof_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(f"[[wave]]\n{text}\n")
    with pytest.raises(ValueError, match=reason):
        read_plan(path)
