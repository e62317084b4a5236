"""The study: where trials are kept, whose they are, and what becomes of those whose process died."""

from __future__ import annotations

import hashlib
import os
import socket
import time
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import msgspec
import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, GridSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from eyas_host.data.split import SplitManifest
from eyas_host.recipe import Recipe
from eyas_host.recipe.tune import TuneSection
from eyas_host.search.space import Value, What, space
from eyas_host.support.errors import TuneError

Method = Literal["grid", "tpe"]
WORKER = "worker"
"""A trial's attribute: who works on it, see `worker`."""
_IDENTITY = "recipe"
_HEARTBEAT_S, _GRACE_S = 20, 120
_BUSY_S = 60.0
"""How long a writer waits for another's lock of an SQLite file."""
_AGAIN_S = (0.5, 1.0, 2.0)
_UNNAMED = timedelta(seconds=5)
"""A trial's first act is to say who works on it."""
_SHOWN = 4


def open_study(url: str, name: str, identity: Mapping[str, Any], sampler: BaseSampler, pruner: BasePruner) -> Study:
    """The study of that name, made if there is none.

    Raises `TuneError` if the database cannot be opened, or if the study belongs to another recipe.
    """
    where = shown(url)
    try:
        study = _opened(url, name, sampler, pruner)
        there = study.user_attrs.get(_IDENTITY)
        if there is None:
            study.set_user_attr(_IDENTITY, dict(identity))
    except ImportError as error:
        raise TuneError(f"{where}: its driver is not installed: pip install {error.name}") from None
    except (SQLAlchemyError, OSError, ValueError, RuntimeError) as error:
        why = " ".join(str(getattr(error, "orig", None) or error).split())[:200]
        raise TuneError(f"{where}: the study's database cannot be opened ({why})") from None
    if there is not None and there != identity:
        raise TuneError(
            f"{where}: study {name!r} is of another recipe ({_differences(there, identity)}); take --name for a new "
            "one beside it, or remove it"
        )
    return study


def _opened(url: str, name: str, sampler: BaseSampler, pruner: BasePruner) -> Study:
    """The study; where another worker makes the same tables at the same time, the slower one tries again."""
    for wait_s in _AGAIN_S:
        try:
            return _connected(url, name, sampler, pruner)
        except DBAPIError as error:
            if not isinstance(error, IntegrityError) and "already exists" not in str(error):
                raise
            time.sleep(wait_s)
    return _connected(url, name, sampler, pruner)


def _connected(url: str, name: str, sampler: BaseSampler, pruner: BasePruner) -> Study:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        storage = RDBStorage(
            url,
            engine_kwargs={"connect_args": {"timeout": _BUSY_S}} if url.startswith("sqlite") else {},
            heartbeat_interval=_HEARTBEAT_S,
            grace_period=_GRACE_S,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
        )
    return optuna.create_study(
        storage=storage, study_name=name, direction="maximize", sampler=sampler, pruner=pruner, load_if_exists=True
    )


def identity(recipe: Recipe, manifest: SplitManifest, what: What, method: Method, epochs: int) -> dict[str, Any]:
    """All that a trial's figure depends on beside the trial's own settings, as plain values."""
    tried = space(recipe.tune, what)
    sections = ("image", "augment", "teacher") if what == "teacher" else ("image", "augment", "teacher", "student")
    plain: dict[str, Any] = {
        f"{name}.{key}": value
        for name in sections
        for key, value in msgspec.to_builtins(getattr(recipe, name)).items()
        if f"{name}.{key}" not in tried and f"{name}.{key}" != f"{what}.epochs"
    }
    plain |= {f"run.{key}": getattr(recipe.run, key) for key in ("seed", "selection_metric", "amp")}
    plain |= {"images": images_hash(manifest), "search": what, "method": method, "epochs of a trial": epochs}
    plain |= {f"values of {key}": values for key, values in tried.items()}
    return dict(msgspec.json.decode(msgspec.json.encode(plain)))


def images_hash(manifest: SplitManifest) -> str:
    """Which images train and validate, with which labels."""
    parts = (manifest.train, manifest.validation)
    return digest([[(image.sha256, image.label) for image in part] for part in parts])


def digest(*values: object) -> str:
    """A short hash of plain values and structs."""
    return hashlib.sha256(msgspec.json.encode(values, order="deterministic")).hexdigest()[:12]


def make_sampler(method: Method, values: Mapping[str, list[Value]], seed: int) -> BaseSampler:
    """What proposes settings; the same trials before it and the same seed propose the same."""
    return GridSampler(values, seed=seed) if method == "grid" else SeededTPE(seed)


def make_pruner(method: Method, tune: TuneSection, epochs: int) -> BasePruner:
    """What ends trials early; the grid's all run to their end, so that its table has no gaps."""
    if method == "grid" or tune.pruner == "none":
        return NopPruner()
    if tune.pruner == "hyperband":
        return HyperbandPruner(min_resource=1, max_resource=epochs, reduction_factor=3)
    return MedianPruner(n_startup_trials=4, n_warmup_steps=0)


class SeededTPE(BaseSampler):
    """TPE (Bergstra et al., 2011) whose chance follows from the seed and the trial's number.

    A search that goes on, or another worker, thus does not propose again what the first trials were.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._tpe = TPESampler()

    def reseed_rng(self) -> None:
        """Nothing: the seed of a trial is its number's."""

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Begin with the trial's own seed."""
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
        return self._tpe.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """As TPE."""
        self._tpe.after_trial(study, trial, state, values)


def worker() -> str:
    """Names this process, so that a later one on the same machine can tell whether it still lives."""
    return f"{socket.gethostname()} {os.getpid()} {_started(os.getpid())}"


def put_back_dead(study: Study) -> int:
    """Mark trials of dead processes of this machine as failed and queue their settings again; returns how many.

    Trials of other machines are put back by Optuna once their heartbeat has stopped for two minutes.
    """
    dead = [trial for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) if _is_dead(trial)]
    sampler, study.sampler = study.sampler, RandomSampler()  # the grid's would end a search that has not begun
    for trial in dead:
        study.tell(trial.number, state=TrialState.FAIL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            RetryHeartbeatStaleTrialCallback()(study, trial)
    study.sampler = sampler
    return len(dead)


def _is_dead(trial: FrozenTrial) -> bool:
    """Whether a running trial's process is gone from this machine, or was before it said who it is."""
    if WORKER not in trial.user_attrs:
        begun = trial.datetime_start or datetime.now()
        return datetime.now() - begun > _UNNAMED
    host, pid, started = trial.user_attrs[WORKER].split(" ")
    return bool(host == socket.gethostname() and _started(int(pid)) != started)


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    changed = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
    told = [f"{key}: {there.get(key)} there, {here.get(key)} here" for key in changed[:_SHOWN]]
    return "; ".join(told) + (f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else "")


def shown(url: str) -> str:
    """The address without its password."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return "--storage"
