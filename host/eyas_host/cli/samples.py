"""`eyas samples`: labels of the samples that devices sent."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from eyas_device.errors import EXIT_CHECK_FAILED
from eyas_device.support.logs import show as print_line
from eyas_device.support.streams import to_json
from eyas_host.cli.options import STORE, StoreOption

if TYPE_CHECKING:
    from eyas_host.fleet.samples.records import Sample
    from eyas_host.fleet.store.database import Store

PersonOption = Annotated[
    str, typer.Option("--person", metavar="NAME", help="Who says it.  [default: this user]", show_default=False)
]
PeopleOption = Annotated[
    int, typer.Option("--people", min=1, metavar="N", help="So many have to agree before a sample is labelled.")
]
DeviceOption = Annotated[str, typer.Option("--device", metavar="DEVICE", help="Only samples of this device.")]
NewClass = Annotated[
    bool, typer.Option("--new-class", help="Allow labels that are none of the classes of the models that devices run.")
]
_FORMATS = ("folders", "table", "label-studio")


def queue(
    count: Annotated[int, typer.Option("--count", min=1, metavar="N", help="How many.")] = 20,
    random_share: Annotated[
        float | None,
        typer.Option(
            "--random-share",
            min=0,
            max=1,
            metavar="P",
            help="Share that is drawn at random.  [default: 0.25; 0.75 while an alarm says that all has changed]",
        ),
    ] = None,
    device: DeviceOption = "",
    people: PeopleOption = 1,
    store: StoreOption = STORE,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON for each sample.")] = False,
) -> None:
    """List what to label next: what the model is least sure of, no two alike, and a share at random."""
    from eyas_host.fleet.drift.records import DriftRecords
    from eyas_host.fleet.samples.choose import choose, share_at_random, uncertainty
    from eyas_host.fleet.samples.rules import verdicts

    with _opened(store) as opened:
        found = _samples(opened, device)
        causes = {alarm.cause for alarm in DriftRecords(opened).alarms() if alarm.open}
    share = share_at_random(causes) if random_share is None else random_share
    states = {key: one.state for key, one in verdicts(found, people=people).items()}
    disputed = [sample for sample in found if states[sample.key] == "disputed"]
    waiting = [sample for sample in found if states[sample.key] == "needs another person"]
    open_ones = [sample for sample in found if states[sample.key] == "open"]
    first = (disputed + waiting)[:count]
    chosen = [*first, *choose(open_ones, count - len(first), random_share=share)]
    if json:
        for sample in chosen:
            print(to_json(_described(sample), sys.stdout))
        return
    for sample in chosen:
        event = sample.event
        guess = (
            ""
            if sample.hides_guess
            else f"  {event.label} {event.confidence:.2f}, uncertainty {uncertainty(sample):.2f}"
        )
        said = "".join(f"  {one.person}: {one.label}" for one in sample.said)
        image = "" if sample.image() else "  no image"
        print_line(f"{event.device} {event.spool} {event.sequence}{guess}{said}{image}")
    counts = Counter(states.values())
    print_line(
        f"{len(found)} samples: " + (", ".join(f"{number} {state}" for state, number in counts.items()) or "none")
    )
    if random_share is None and share != share_at_random(()):
        print_line(f"{share:.0%} of the queue at random: {', '.join(sorted(causes))}")


def label(
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="As `eyas samples queue` lists it.")],
    spool: Annotated[str, typer.Argument(metavar="SPOOL")],
    sequence: Annotated[int, typer.Argument(metavar="SEQUENCE", min=0)],
    word: Annotated[str, typer.Argument(metavar="LABEL", help="A class, or ? for what nobody can tell.")],
    person: PersonOption = "",
    new_class: NewClass = False,
    store: StoreOption = STORE,
) -> None:
    """Say what a sample shows."""
    from eyas_host.fleet.samples.records import Said, say

    with _opened(store) as opened:
        said = Said(label=word, person=person or _user(), at=time.time(), source="eyas samples label")
        new = say(opened, [((device, spool, sequence), said)], allowed=_allowed(opened, new_class))
    print_line(f"{device} {sequence}: {word}{'' if new else ', as before'}")


def undo(
    count: Annotated[int, typer.Option("--count", min=1, metavar="N", help="How many words.")] = 1,
    person: PersonOption = "",
    store: StoreOption = STORE,
) -> None:
    """Take back what a person said last."""
    from eyas_host.fleet.samples.records import undo as run

    with _opened(store) as opened:
        undone = run(opened, person or _user(), now=time.time(), count=count)
    for key, word in undone:
        print_line(f"{key[0]} {key[2]}: {word} is taken back")
    if not undone:
        print_line(f"{person or _user()} has said nothing that could be taken back")


def check(
    by: Annotated[
        str,
        typer.Option(
            "--by",
            metavar="BASIS",
            help="images: a classifier cross-validated on the labelled images. model: what devices predicted."
            "  [default: images, if there are enough]",
            show_default=False,
        ),
    ] = "",
    ask: Annotated[
        bool, typer.Option("--queue", help="Make these labels disputed, until a second person has said more.")
    ] = False,
    page: Annotated[Path, typer.Option("--page", metavar="FILE", help="Where the images are shown.")] = Path(
        "samples-check.html"
    ),
    device: DeviceOption = "",
    people: PeopleOption = 1,
    store: StoreOption = STORE,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON for each label.")] = False,
) -> None:
    """List labels that may be wrong, the most suspicious first."""
    from eyas_device.support.files import atomic_write
    from eyas_host.fleet.samples.exchange import name_of
    from eyas_host.fleet.samples.noise import BASES, find_noise, objections, render
    from eyas_host.fleet.samples.records import SampleError, classes, say

    basis = next((one for one in BASES if one == by), None)
    if by and basis is None:
        raise SampleError(f"--by {by}: {' or '.join(BASES)} is possible")
    now = time.time()
    with _opened(store) as opened:
        found = find_noise(_samples(opened, device), now=now, basis=basis, people=people, classes=classes(opened))
        try:
            atomic_write(page, render(found, now=now).encode(), mode=0o600)
        except OSError as error:
            raise SampleError(f"--page {page}: cannot be written ({error.strerror})") from None
        objected = say(opened, objections(found, now=now)) if ask else 0
    for one in found.suspects:
        event = one.sample.event
        if json:
            row = {
                "device": event.device,
                "spool": event.spool,
                "sequence": event.sequence,
                "label": one.given,
                "suggested": one.suggested,
                "probability": one.probability,
                "probability_of_suggested": one.of_suggested,
                "people": one.people,
                "image": name_of(one.sample),
            }
            print(to_json(row, sys.stdout))
        else:
            print_line(
                f"{event.device} {event.spool} {event.sequence}  {', '.join(one.people)}: {one.given} "
                f"{one.probability:.2f}, suggested: {one.suggested} {one.of_suggested:.2f}"
            )
    if not json:
        for reason, count in found.left_out.items():
            print_line(f"not looked at: {count}, {reason}")
        print_line(f"by {found.basis}: {found.why}")
        print_line(f"{found.summary}: {page}" + (f"; {objected} now wait for a second person" if ask else ""))
    if found.suspects:
        raise typer.Exit(EXIT_CHECK_FAILED)


def export(
    to: Annotated[Path, typer.Argument(metavar="PATH", help="A new folder; for a table or Label Studio a file.")],
    form: Annotated[
        str,
        typer.Option("--as", metavar="FORM", help="folders: images by class. table: CSV. label-studio: tasks as JSON."),
    ] = "folders",
    everything: Annotated[
        bool, typer.Option("--all", help="Also samples without a label, to be labelled there.")
    ] = False,
    consented: Annotated[
        bool, typer.Option("--consented", help="Only images whose device allows to train on them; for folders.")
    ] = False,
    device: DeviceOption = "",
    people: PeopleOption = 1,
    store: StoreOption = STORE,
) -> None:
    """Write labelled samples for a training or for another tool."""
    from eyas_host.fleet.samples.exchange import WITHOUT_CONSENT, label_studio, table, write_folders
    from eyas_host.fleet.samples.records import SampleError
    from eyas_host.fleet.samples.rules import labels_of
    from eyas_host.support.files import write_bytes

    if form not in _FORMATS:
        raise SampleError(f"--as {form}: {', '.join(_FORMATS)} is possible")
    if consented and form != "folders":
        raise SampleError(f"--consented is for folders, and would leave nothing out of --as {form}")
    with _opened(store) as opened:
        found = _samples(opened, device)
    labels = labels_of(found, people=people)
    labelled = [sample for sample in found if sample.key in labels]
    if form == "folders":
        done = write_folders(found, to, now=time.time(), people=people, every=everything, consented=consented)
        left = "".join(f"; {number} {why}" for why, number in done.left_out.items())
        print_line(f"{to}: {done.images} images{left}")
        if done.without_consent:
            print_line(f"  {done.without_consent} of them {WITHOUT_CONSENT}; --consented leaves them out")
    elif form == "table":
        write_bytes(to, table(found, people=people).encode())
        print_line(f"{to}: {len(labelled)} labels; eyas drift --labels {to} tells the accuracy")
    else:
        tasks = label_studio(found if everything else labelled, now=time.time())
        write_bytes(to, msgspec.json.encode(tasks))
        print_line(f"{to}: {len(tasks)} tasks; random samples and disagreements come without the model's prediction")


def read(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Class folders, a table (.csv) or an export (.json).")],
    person: PersonOption = "",
    new_class: NewClass = False,
    store: StoreOption = STORE,
) -> None:
    """Read labels back: class folders, a table, or what Label Studio exported."""
    from eyas_host.fleet.samples.exchange import read_folders, read_label_studio, read_table
    from eyas_host.fleet.samples.records import SampleError, say

    reads = read_folders if path.is_dir() else {".csv": read_table, ".json": read_label_studio}.get(path.suffix.lower())
    if reads is None:
        raise SampleError(f"{path}: class folders, a table (.csv) or an export of Label Studio (.json) is needed")
    words = reads(path, person or _user(), time.time())
    with _opened(store) as opened:
        new = say(opened, words, allowed=_allowed(opened, new_class))
    print_line(f"{path}: {len(words)} labels, {new} of them new")


read.__name__ = "import"
"""As it is typed; a word of the language."""


def _user() -> str:
    from eyas_host.fleet.commands.send import issuer

    return issuer().partition("@")[0]


def _opened(url: str) -> Store:
    from eyas_host.fleet.store.database import Store

    return Store(url, create=False)


def _samples(store: Store, device: str) -> list[Sample]:
    from eyas_host.fleet.samples.records import samples

    return samples(store, device=device)


def _allowed(store: Store, new_class: bool) -> tuple[str, ...]:
    """Classes of the models that devices run; empty where none is known, or any is allowed."""
    from eyas_host.fleet.samples.records import classes

    return () if new_class else tuple(sorted({name for names in classes(store).values() for name in names}))


def _described(sample: Sample) -> dict[str, Any]:
    event = sample.event
    hidden = sample.hides_guess
    return {
        "device": event.device,
        "spool": event.spool,
        "sequence": event.sequence,
        "time": event.time,
        "random": sample.is_random,
        "why": event.why,
        "predicted": None if hidden else event.label,
        "confidence": None if hidden else event.confidence,
        "said": msgspec.to_builtins(sample.said),
        "image": sample.image() is not None,
    }
