"""`eyas rollout`: start, run, status, pause, resume, approve and abort."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eyas_device.support.logs import show
from eyas_device.support.streams import to_json
from eyas_host.cli.options import (
    KIT,
    STORE,
    BrokerOption,
    CaOption,
    CertificateOption,
    InsecureOption,
    KeyOption,
    KeysOption,
    KitOption,
    PassphraseFile,
    PasswordFile,
    StoreOption,
    TlsOption,
    UserOption,
    broker_access,
)

if TYPE_CHECKING:
    from eyas_host.fleet.rollout.engine import Decision
    from eyas_host.fleet.rollout.plan import Plan
    from eyas_host.fleet.rollout.records import Records
    from eyas_host.fleet.rollout.runner import Report
    from eyas_host.fleet.rollout.state import Rollout, Seen
    from eyas_host.fleet.store.database import Store

IdArgument = Annotated[
    str, typer.Argument(metavar="[ID]", help="The rollout.  [default: the one that goes on]", show_default=False)
]
WhyOption = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why, for the log.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_REFRESH_S = 2.0


def start(
    source: Annotated[
        str, typer.Argument(metavar="BUNDLE|VERSION", help="Folder of a bundle, or the version of a published release.")
    ],
    plan: Annotated[Path | None, typer.Option(metavar="FILE", help="The plan, a TOML file.")] = None,
    waves: Annotated[
        str | None,
        typer.Option(metavar="SHARES", help="Waves instead of the plan's, e.g. 1%,10%,100% or canary=100%,10%,100%."),
    ] = None,
    wait: Annotated[
        float | None,
        typer.Option(min=0, metavar="SECONDS", help="Of --waves: how long a good wave is watched.  [default: 3600]"),
    ] = None,
    model: Annotated[str, typer.Option(metavar="NAME", help="Model of the version, where several have it.")] = "",
    channel: Annotated[str, typer.Option(metavar="CHANNEL", help="Channel whose devices it is for.")] = "stable",
    site: Annotated[str, typer.Option(metavar="SITE", help="The only site that it is for.")] = "",
    note: Annotated[str, typer.Option(metavar="TEXT", help="Why, for the log.")] = "",
    kit: KitOption = None,
    keys: KeysOption = None,
    passphrase_file: PassphraseFile = None,
    store: StoreOption = STORE,
) -> None:
    """Start a rollout; `eyas rollout run` carries it out."""
    from eyas_host.cli.passphrases import open_repository
    from eyas_host.fleet.rollout.start import start as run_start
    from eyas_host.fleet.store.database import Store

    chosen = _plan(plan, waves, wait)
    repository = open_repository(kit, passphrase_file, keys)
    with Store(store, create=False) as opened:
        rollout = run_start(opened, repository, source, chosen, model=model, channel=channel, site=site, note=note)
        show(f"{rollout.id}: {_log(opened, rollout)}")
        _say_who_runs(opened)


def run(
    every: Annotated[float, typer.Option(min=0.5, metavar="SECONDS", help="Time between two looks.")] = 10.0,
    no_hints: Annotated[
        bool, typer.Option("--no-hints", help="Publish no MQTT hints: devices look at their next poll.")
    ] = False,
    once: Annotated[bool, typer.Option("--once", help="Look once, e.g. from a timer.")] = False,
    store: StoreOption = STORE,
    broker: BrokerOption = None,
    tls: TlsOption = False,
    ca: CaOption = None,
    certificate: CertificateOption = None,
    key: KeyOption = None,
    kit: KitOption = None,
    user: UserOption = "",
    password_file: PasswordFile = None,
    insecure: InsecureOption = False,
    json: JsonOption = False,
) -> None:
    """Carry rollouts out until SIGTERM or Ctrl-C."""
    from eyas_host.fleet.rollout.runner import Runner, run_until_stopped
    from eyas_host.fleet.store.database import Store
    from eyas_host.fleet.updates.repository import Repository

    access = None
    if not no_hints:
        access = broker_access(
            broker,
            kit,
            tls=tls,
            ca=ca,
            certificate=certificate,
            key=key,
            user=user,
            password_file=password_file,
            insecure=insecure,
        )
    with Store(store, create=False) as opened:
        runner = Runner(opened, Repository(KIT if kit is None else kit), access)
        try:
            run_until_stopped(runner, 0.0 if once else every, _Printer(json=json).report)
        finally:
            runner.close()


def status(
    rollout: IdArgument = "",
    everything: Annotated[bool, typer.Option("--all", help="List all rollouts.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it live, until Ctrl-C.")] = False,
    store: StoreOption = STORE,
    json: JsonOption = False,
) -> None:
    """Show where a rollout is, what its figures say, and what happened."""
    from eyas_host.fleet.rollout.show import as_json, details, overview

    with _opened(store) as (opened, records):
        if everything:
            rollouts = records.all()
            if json:
                for one in rollouts:
                    print(to_json(as_json(one, (), records.steps(one.id), time.time()), sys.stdout))
            else:
                _print_lines(overview(rollouts))
            return

        def lines() -> list[str]:
            one = _choose(records, rollout)
            engine = records.engine(time.time())
            return details(one, _devices(opened, one), records.steps(one.id), time.time(), engine=engine)

        if json:
            one = _choose(records, rollout)
            print(to_json(as_json(one, _devices(opened, one), records.steps(one.id), time.time()), sys.stdout))
        elif watch and sys.stdout.isatty():
            _show_live(lines)
        else:
            _print_lines(lines())


def pause(rollout: IdArgument = "", reason: WhyOption = "", store: StoreOption = STORE) -> None:
    """Pause a rollout: no further device begins, and nothing is judged."""
    from eyas_host.fleet.rollout import by_hand

    _change(store, rollout, lambda one, devices: by_hand.pause(one, reason, time.time()))


def resume(rollout: IdArgument = "", reason: WhyOption = "", store: StoreOption = STORE) -> None:
    """Go on with a paused rollout; what stopped it so far does not stop it again."""
    from eyas_host.fleet.rollout import by_hand

    _change(store, rollout, lambda one, devices: by_hand.resume(one, devices, reason, time.time()))


def approve(rollout: IdArgument = "", reason: WhyOption = "", store: StoreOption = STORE) -> None:
    """Approve the next wave of a rollout that asks for it."""
    from eyas_host.fleet.rollout import by_hand

    _change(store, rollout, lambda one, devices: by_hand.approve(one, devices, reason, time.time()))


def abort(
    rollout: IdArgument = "",
    reason: WhyOption = "",
    back: Annotated[
        bool | None,
        typer.Option(
            "--roll-back/--finish",
            help="Devices with the new version go back, or keep it; no device begins.  [default: the plan's]",
            show_default=False,
        ),
    ] = None,
    store: StoreOption = STORE,
) -> None:
    """Abort a rollout."""
    from eyas_host.fleet.rollout import by_hand

    _change(store, rollout, lambda one, devices: by_hand.abort(one, reason, time.time(), roll_back=back))


def _plan(path: Path | None, waves: str | None, wait: float | None) -> Plan:
    from eyas_host.fleet.rollout.plan import RolloutError, plan_of_waves, read_plan

    if path is None and waves is None:
        raise RolloutError("no waves: give --waves 1%,10%,100%, or --plan FILE; `eyas rollout start --help` shows both")
    if wait is not None and waves is None:
        raise RolloutError("--wait belongs to --waves; a plan has wait_s for each wave")
    base = None if path is None else read_plan(path)
    if waves is None:
        assert base is not None
        return base
    return plan_of_waves(waves, base, **({} if wait is None else {"wait_s": wait}))


@contextmanager
def _opened(url: str) -> Iterator[tuple[Store, Records]]:
    from eyas_host.fleet.rollout.records import Records
    from eyas_host.fleet.store.database import Store

    with Store(url, create=False) as store:
        yield store, Records(store)


def _choose(records: Records, name: str) -> Rollout:
    """The named rollout; without a name the one that goes on, else the newest."""
    from eyas_host.fleet.rollout.plan import RolloutError
    from eyas_host.fleet.rollout.state import ACTIVE

    if name:
        return records.get(name)
    rollouts = records.all()
    if not rollouts:
        raise RolloutError("no rollouts yet; `eyas rollout start BUNDLE --waves 1%,10%,100%` starts one")
    active = [one for one in rollouts if one.state.status in ACTIVE]
    if len(active) > 1:
        raise RolloutError(f"several rollouts go on: name one of {', '.join(one.id for one in active)}")
    return active[0] if active else rollouts[0]


def _devices(store: Store, rollout: Rollout) -> list[Seen]:
    from eyas_host.fleet.rollout.observe import devices_of

    return devices_of(rollout, store.devices())


def _change(url: str, name: str, act: Callable[[Rollout, list[Seen]], Decision]) -> None:
    """Change a rollout by hand; `eyas rollout run` carries the change out."""
    import msgspec

    from eyas_host.fleet.commands.send import issuer

    with _opened(url) as (store, records):
        rollout = _choose(records, name)
        decision = act(rollout, _devices(store, rollout))
        steps = [msgspec.structs.replace(step, by=issuer()) for step in decision.steps]
        records.save(msgspec.structs.replace(rollout, state=decision.state), steps)
        for step in steps:
            show(f"{rollout.id}: {step.what}")
        _say_who_runs(store)


def _say_who_runs(store: Store) -> None:
    from eyas_host.fleet.rollout.records import Records

    if not Records(store).engine(time.time()):
        show("nobody carries rollouts out at present: start `eyas rollout run`", sys.stderr)


def _log(store: Store, rollout: Rollout) -> str:
    from eyas_host.fleet.rollout.records import Records

    return Records(store).steps(rollout.id)[-1].what


class _Printer:
    """Prints what a runner did; who waits for another runner says so once."""

    def __init__(self, *, json: bool) -> None:
        self._json, self._acting = json, True
        self._problems: tuple[str, ...] = ()

    def report(self, report: Report) -> None:
        """Print what is new in a report."""
        if self._json:
            print(to_json(report, sys.stdout), flush=True)
            return
        if report.acting != self._acting:
            from_now = "carries rollouts out" if report.acting else "another process carries rollouts out: waiting"
            show(from_now, sys.stderr)
        from eyas_host.fleet.status import utc

        for name, step in report.steps:
            show(f"{utc(step.at)}  {name}  {step.what}{f': {step.why}' if step.why else ''}")
        for problem in report.problems:
            if problem not in self._problems:
                show(f"eyas rollout: {problem}", sys.stderr)
        self._acting, self._problems = report.acting, report.problems


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _show_live(lines: Callable[[], list[str]]) -> None:
    """Show lines that are computed again and again, until Ctrl-C."""
    from rich.live import Live
    from rich.text import Text

    with suppress(KeyboardInterrupt), Live(auto_refresh=False, screen=True) as live:
        while True:
            live.update(Text("\n".join(lines())), refresh=True)
            time.sleep(_REFRESH_S)
