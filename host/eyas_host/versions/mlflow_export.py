"""A version as a run of MLflow, for teams that compare their models there: settings, figures, lineage and files.

Everything comes from the version's record and files, and goes to the tracking URI that is named, and nowhere else: the
low-level client reads neither the git repository nor the user's environment, and usage reports are switched off.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from eyas_device.support.redact import redact
from eyas_host.pipeline.runner import BUNDLE, RECIPE
from eyas_host.support.errors import MissingExtra
from eyas_host.support.extras import install_line
from eyas_host.support.quiet import quiet_libraries
from eyas_host.versions.bom import bill_of_materials
from eyas_host.versions.card import version_card
from eyas_host.versions.compare import recipe_of
from eyas_host.versions.record import Figures, RegistryError, VersionRecord
from eyas_host.versions.registry import Registry

if TYPE_CHECKING:
    from mlflow import MlflowClient

CARD, BOM, RECORD = "CARD.md", "bom.json", "record.json"
"""Artefacts beside the bundle."""
_MAX_VALUE = 6000
"""Characters of a parameter that MLflow stores."""
_BATCH = 100
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""MLflow's own, unless they are set: it waits for a server for minutes, and prints addresses of its pages."""


class Logged(NamedTuple):
    """Where a version is in MLflow."""

    run_id: str
    new: bool
    """False if an earlier export had written it."""
    registered: str
    """Version number of the registered model; empty where it was not registered."""
    aliases: tuple[str, ...]
    """Aliases that point to it in MLflow now, of those that it has here."""


def log_version(
    registry: Registry,
    record: VersionRecord,
    uri: str,
    *,
    experiment: str = "",
    register: bool = False,
    license_id: str = "",
) -> Logged:
    """Write a version as a run; one that is there already is not written twice.

    Args:
        registry: Where its files are.
        record: The version.
        uri: Tracking URI: a server (`https://...`), or a database (`sqlite:///mlflow.db`).
        experiment: Its name; the model's by default.
        register: Also register it as a version of the model, with the aliases that it has in `registry`.
        license_id: For the card and the bill of materials.

    Raises:
        MissingExtra: The extra `mlflow` is not installed.
        RegistryError: Its files were removed, or MLflow does not answer, or refuses.

    """
    quiet_libraries()
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError:
        raise MissingExtra(f"--as mlflow needs mlflow-skinny; {install_line('mlflow')}") from None
    for library in ("mlflow", "alembic"):
        logging.getLogger(library).setLevel(logging.ERROR)  # each step of a new database
    with tempfile.TemporaryDirectory(prefix="eyas-mlflow-") as scratch:
        folder = Path(scratch)
        registry.bundle(record, folder / BUNDLE)
        (folder / CARD).write_text(version_card(registry, record, license_id=license_id), encoding="utf-8")
        (folder / BOM).write_bytes(msgspec.json.encode(bill_of_materials(record, license_id=license_id)))
        (folder / RECORD).write_bytes(msgspec.json.encode(record))
        recipe = recipe_of(registry, record)
        (folder / RECIPE).write_bytes(msgspec.json.format(msgspec.json.encode(recipe), indent=1))
        try:
            client = MlflowClient(uri, uri)
            where = _experiment(client, experiment or record.model, uri)
            found = client.search_runs([where], f"tags.`eyas.digest` = '{record.digest}' and status = 'FINISHED'")
            run_id = found[0].info.run_id if found else _log(client, where, record, recipe, folder)
            number, aliases = _register(client, registry, record, run_id) if register else ("", ())
        except (MlflowException, SQLAlchemyError, ImportError, OSError, ValueError) as error:
            # of the server, of a database and its driver, of artefacts, of an address that is none
            first = " ".join(str(error).split())[:300]
            raise RegistryError(f"{record.name}: MLflow cannot store it at {redact(uri)} ({redact(first)})") from None
    return Logged(run_id, not found, number, aliases)


def _experiment(client: MlflowClient, name: str, uri: str) -> str:
    """The experiment's id; a new one in a local database keeps its files beside it, not in the present folder."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    location = None
    if uri.startswith("sqlite:"):
        location = (
            Path(urlsplit(uri).path.removeprefix("/")).resolve().parent / "mlartifacts" / name.replace("/", "_")
        ).as_uri()
    return str(client.create_experiment(name, artifact_location=location))


def _log(client: MlflowClient, experiment: str, record: VersionRecord, recipe: dict[str, Any], folder: Path) -> str:
    """Write a run; it is FINISHED once all of it is there, and FAILED if it could not be."""
    start = int(1000 * record.added)
    tags = tags_of(record)
    run_id = str(client.create_run(experiment, start_time=start, tags=tags, run_name=record.name).info.run_id)
    with _ended(client, run_id):
        from mlflow.entities import Metric, Param

        params = [Param(name, text[:_MAX_VALUE]) for name, text in params_of(record, recipe).items()]
        for first in range(0, len(params), _BATCH):
            client.log_batch(run_id, params=params[first : first + _BATCH])
        client.log_batch(run_id, metrics=[Metric(name, value, start, 0) for name, value in metrics_of(record).items()])
        client.log_artifacts(run_id, str(folder))
    return run_id


@contextmanager
def _ended(client: MlflowClient, run_id: str) -> Iterator[None]:
    try:
        yield
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")


def tags_of(record: VersionRecord) -> dict[str, str]:
    """What it was made from."""
    tags = {
        "mlflow.user": record.added_by,
        "mlflow.note.content": record.note,
        "eyas.model": record.model,
        "eyas.version": record.version,
        "eyas.parent": record.parent,
        "eyas.digest": record.digest,
        "eyas.data": record.data.data,
        "eyas.split": record.data.split,
        "eyas.recipe": record.recipe,
        "eyas.verdict": record.verdict,
        "eyas.shipped": record.shipped,
        "eyas.eyas": record.tools.eyas,
        **{f"eyas.code.{stage}": digest for stage, digest in record.tools.code.items()},
        **{f"eyas.library.{name}": version for name, version in record.tools.libraries.items()},
    }
    return {name: text for name, text in tags.items() if text}


def params_of(record: VersionRecord, recipe: dict[str, Any]) -> dict[str, str]:
    """The recipe's settings by their dotted names, the seed, and the images of each split."""
    counts = {f"images.{split}": str(sum(labels.values())) for split, labels in record.data.counts.items()}
    settings = {
        f"{section}.{key}": value if isinstance(value, str) else msgspec.json.encode(value).decode()
        for section, values in recipe.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }
    return {**settings, **counts, "seed": str(record.tools.seed), "labels": ", ".join(record.labels)}


def metrics_of(record: VersionRecord) -> dict[str, float]:
    """Figures on held-out images: `VARIANT/NAME`, and those of what devices run also as `NAME`."""
    found = {
        f"{variant}/{name}": value for variant, one in record.figures.items() for name, value in _values(one).items()
    }
    shipped = record.figures.get(record.shipped)
    return found | (_values(shipped) if shipped is not None else {})


def _values(figures: Figures) -> dict[str, float]:
    low, high = figures.balanced_accuracy_ci
    values = msgspec.structs.asdict(figures) | {"balanced_accuracy_low": low, "balanced_accuracy_high": high}
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


def _register(
    client: MlflowClient, registry: Registry, record: VersionRecord, run_id: str
) -> tuple[str, tuple[str, ...]]:
    """Register the run's bundle once, and give it the aliases that the version has here."""
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(record.model)
    except MlflowException:
        client.create_registered_model(record.model, tags={"eyas.model": record.model})
    versions: Sequence[Any] = client.search_model_versions(f"name = '{record.model}' and run_id = '{run_id}'")
    if versions:
        number = str(versions[0].version)
    else:
        source = f"{client.get_run(run_id).info.artifact_uri}/{BUNDLE}"
        tags = {"eyas.version": record.version, "eyas.digest": record.digest}
        number = str(client.create_model_version(record.model, source, run_id, tags, description=record.note).version)
    aliases = registry.aliases().get(record.model, {})
    held = tuple(sorted(alias for alias, version in aliases.items() if version == record.version))
    for alias in held:
        client.set_registered_model_alias(record.model, alias, number)
    return number, held
