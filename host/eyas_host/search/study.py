"""The Optuna study: storage, samplers and pruners, and recovery of trials whose process died."""

from __future__ import annotations

import copy
import hashlib
import os
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import msgspec
import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, GridSampler, TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from eyas_host.data.manifest import SplitManifest
from eyas_host.recipe import Recipe
from eyas_host.recipe.tune import TuneSection
from eyas_host.search.space import Value, What, space
from eyas_host.support.errors import TuneError

Method = Literal["grid", "tpe"]
WORKER = "worker"
"""Attribute of a trial: the process that runs it, see `worker_id`."""
SURPLUS = "surplus"
"""Attribute of a trial that two workers began for the last place: it did not run."""
_IDENTITY = "recipe"
_HEARTBEAT_S, _GRACE_S = 20, 120
_LOCK_TIMEOUT_S = 60.0
"""How long a writer waits for the lock of an SQLite file."""
_RETRY_WAITS_S = (0.5, 1.0, 2.0)
_WORKER_ID_GRACE_S, _POLL_S = 10.0, 0.2
"""Time within which a new trial records its worker id, and between two looks for it."""
_MAX_DIFFERENCES = 4
_ENDED = "ZX"
"""States of a process that has ended: a zombie, dead. Source: proc(5)."""


def open_study(url: str, name: str, identity: Mapping[str, Any], sampler: BaseSampler, pruner: BasePruner) -> Study:
    """Open the study with this name, or create it.

    Raises `TuneError` if the database cannot be opened, or if the study belongs to another recipe.
    """
    where, url = without_password(url), _with_driver(url)
    try:
        with database_errors(url):
            study = _create_study(url, name, sampler, pruner)
            stored = study.user_attrs.get(_IDENTITY)
            if stored is None:
                study.set_user_attr(_IDENTITY, dict(identity))
    except ImportError as error:
        raise TuneError(f"{where}: its driver is not installed: pip install {error.name}") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise _unusable(url, error) from None
    if stored is not None and stored != identity:
        raise TuneError(
            f"{where}: study {name!r} belongs to another recipe ({_describe_differences(stored, identity)}); use "
            "another --name, or remove the study"
        )
    return study


@contextmanager
def database_errors(url: str) -> Iterator[None]:
    """Turn what the study's database raises into a `TuneError` that says what to do."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        raise _unusable(url, error) from None


def _unusable(url: str, error: Exception) -> TuneError:
    cause = error if isinstance(error, SQLAlchemyError) else error.__cause__ or error
    why = " ".join(str(getattr(cause, "orig", None) or cause).split())[:200]
    fix = ""
    if any(word in why for word in ("malformed", "not a database", "disk image", "no such table", "no such column")):
        fix = "; it is damaged: remove it to begin the search again, or put a copy of it back"
    return TuneError(f"{without_password(url)}: the study's database cannot be opened or read ({why}){fix}")


def _create_study(url: str, name: str, sampler: BaseSampler, pruner: BasePruner) -> Study:
    """The study; retries while another worker creates the same tables."""
    for wait_s in _RETRY_WAITS_S:
        try:
            return _connect(url, name, sampler, pruner)
        except DBAPIError as error:
            if not isinstance(error, IntegrityError) and "already exists" not in str(error):
                raise
            time.sleep(wait_s)
    return _connect(url, name, sampler, pruner)


def _connect(url: str, name: str, sampler: BaseSampler, pruner: BasePruner) -> Study:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        storage = RDBStorage(
            url,
            engine_kwargs={"connect_args": {"timeout": _LOCK_TIMEOUT_S}} if url.startswith("sqlite") else {},
            heartbeat_interval=_HEARTBEAT_S,
            grace_period=_GRACE_S,
            heartbeat_stale_trial_callback=_Retry(),
        )
    return optuna.create_study(
        storage=storage, study_name=name, direction="maximize", sampler=sampler, pruner=pruner, load_if_exists=True
    )


class _Retry(RetryHeartbeatStaleTrialCallback):
    """Queues a failed trial again without what its worker noted: its next worker must not be taken for the dead one."""

    def __call__(self, study: Study, trial: FrozenTrial) -> None:
        trial.user_attrs = {}
        super().__call__(study, trial)


def identity(recipe: Recipe, manifest: SplitManifest, what: What, method: Method, epochs: int) -> dict[str, Any]:
    """Everything a trial's result depends on besides its own settings, as plain values."""
    searched = space(recipe.tune, what)
    sections = ("image", "augment", "teacher") if what == "teacher" else ("image", "augment", "teacher", "student")
    plain: dict[str, Any] = {
        f"{name}.{key}": value
        for name in sections
        for key, value in msgspec.to_builtins(getattr(recipe, name)).items()
        if f"{name}.{key}" not in searched and f"{name}.{key}" != f"{what}.epochs"
    }
    plain |= {f"run.{key}": getattr(recipe.run, key) for key in ("seed", "selection_metric", "amp", "compile")}
    plain |= {"images": images_hash(manifest), "search": what, "method": method, "epochs of a trial": epochs}
    plain |= {f"values of {key}": values for key, values in searched.items()}
    return dict(msgspec.json.decode(msgspec.json.encode(plain)))


def images_hash(manifest: SplitManifest) -> str:
    """Hash of the training and validation images and their labels."""
    splits = (manifest.train, manifest.validation)
    return digest([[(image.sha256, image.label) for image in images] for images in splits])


def digest(*values: object) -> str:
    """A short hash of plain values and structs."""
    return hashlib.sha256(msgspec.json.encode(values, order="deterministic")).hexdigest()[:12]


def make_sampler(
    method: Method, values: Mapping[str, list[Value]], seed: int, first: Mapping[str, Value] | None = None
) -> BaseSampler:
    """The sampler; its proposals depend only on the earlier trials and the seed. TPE begins with `first`."""
    return GridSampler(values, seed=seed) if method == "grid" else SeededTPE(seed, first or {})


def make_pruner(method: Method, tune: TuneSection, epochs: int) -> BasePruner:
    """The pruner; grid trials are never pruned, so that the grid's table is complete."""
    if method == "grid" or tune.pruner == "none":
        return NopPruner()
    if tune.pruner == "hyperband":
        return HyperbandPruner(min_resource=1, max_resource=epochs, reduction_factor=3)
    return MedianPruner(n_startup_trials=4, n_warmup_steps=0)


class SeededTPE(BaseSampler):
    """TPE (Bergstra et al., 2011) seeded by the seed and the trial's number.

    A resumed search, or another worker, thus does not repeat the first proposals. Trial 0 has the settings `first`.
    """

    def __init__(self, seed: int, first: Mapping[str, Value]) -> None:
        self._seed = seed
        self._first = first
        self._tpe = TPESampler()

    def reseed_rng(self) -> None:
        """No effect: every trial is seeded by its number."""

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Seed TPE for the trial."""
        self._tpe = TPESampler(
            seed=(self._seed * 100_003 + trial.number) % 2**32, n_startup_trials=8, constant_liar=True
        )
        self._tpe.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """As TPE."""
        return self._tpe.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As TPE."""
        return self._tpe.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """As TPE."""
        if trial.number == 0 and param_name in self._first:
            return self._first[param_name]
        return self._tpe.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """As TPE."""
        self._tpe.after_trial(study, trial, state, values)


def worker_id() -> str:
    """Id of this process, by which a later one on the same machine can check whether it still runs."""
    return f"{socket.gethostname()} {os.getpid()} {_start_time(os.getpid())}"


def requeue_dead_trials(study: Study) -> int:
    """Mark trials of dead processes of this machine as failed and queue their settings again; returns how many.

    So are trials of other machines two minutes after their last heartbeat. Of several workers one requeues a trial.
    """
    requeued = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        for trial in _running_trials(study):
            if _is_dead(trial) and _fail(study, trial):
                _Retry()(study, copy.deepcopy(trial))
                requeued += 1
        optuna.storages.fail_stale_trials(study)
    return requeued


def _fail(study: Study, trial: FrozenTrial) -> bool:
    """Mark a trial as failed; False if another worker did so first."""
    try:
        return study._storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False


def _running_trials(study: Study) -> list[FrozenTrial]:
    """The running trials, after trials without a worker id had time to record it.

    The wait is timed by this process: a trial's start is in the time zone of whichever machine began it.
    """
    deadline = time.monotonic() + _WORKER_ID_GRACE_S
    while True:
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if all(WORKER in trial.user_attrs for trial in running) or time.monotonic() >= deadline:
            return running
        time.sleep(_POLL_S)


def _is_dead(trial: FrozenTrial) -> bool:
    """Whether the process of a running trial on this machine has ended, or ended before it recorded its id."""
    if WORKER not in trial.user_attrs:
        return True
    host, pid, started = trial.user_attrs[WORKER].split(" ")
    return bool(host == socket.gethostname() and _start_time(int(pid)) != started)


def _start_time(pid: int) -> str:
    """Start time of a process in clock ticks; empty if there is no such process, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in _ENDED else fields[19]


def _describe_differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    changed = [key for key in sorted({*stored, *current}) if stored.get(key) != current.get(key)]
    listed = [f"{key}: {stored.get(key)} in the study, {current.get(key)} now" for key in changed[:_MAX_DIFFERENCES]]
    return "; ".join(listed) + (
        f"; and {len(changed) - _MAX_DIFFERENCES} more" if len(changed) > _MAX_DIFFERENCES else ""
    )


def _with_driver(url: str) -> str:
    """The storage URL with psycopg 3 for PostgreSQL, which SQLAlchemy takes only where it is named."""
    if url.startswith(("postgresql://", "postgres://")) and find_spec("psycopg") is not None:
        return f"postgresql+psycopg://{url.partition('://')[2]}"
    return url


def without_password(url: str) -> str:
    """The storage URL with the password hidden."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return "--storage"
