"""Results of a search: trials, finals, the best settings, and a page of plots."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import msgspec
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from rich.table import Table

from eyas_host.search.finals import Final
from eyas_host.search.space import Value, format_overrides, format_toml
from eyas_host.search.study import SURPLUS
from eyas_host.search.trials import DONE, SECONDS, WHY, ranked
from eyas_host.support.files import write_bytes

RESULT, SNIPPET, PAGE = "result.json", "best.toml", "tune.html"
_MAX_SHOWN = 15
_MIN_FOR_IMPORTANCE = 4


class TrialSummary(msgspec.Struct, frozen=True):
    """One finished trial."""

    trial: int
    settings: dict[str, Value]
    pruned: bool
    value: float | None
    """Selection metric on validation at the best epoch, higher is better; None before the first epoch."""
    balanced_accuracy: float | None
    auc: float | None
    epochs: int
    seconds: float | None
    why: str = ""
    """Why it ended early."""


class TuneResult(msgspec.Struct, frozen=True):
    """`tune/<study>/result.json`; all metrics are of the validation split."""

    what: str
    method: str
    metric: str
    study: str
    storage: str
    trials: tuple[TrialSummary, ...]
    put_back: int
    """Trials whose process died; their settings were queued again."""
    finals: tuple[Final, ...]
    """Best first."""
    best: dict[str, Value]
    overrides: str
    """The best settings as command-line options."""
    toml: str
    """The best settings as TOML sections of a recipe."""


def make_result(study: Study, *, what: str, method: str, metric: str, storage: str, finals: list[Final]) -> TuneResult:
    """The result of a study with at least one complete trial; the best final wins, else the best trial."""
    order = sorted(finals, key=lambda final: (-final.value, final.trial))
    best = order[0].settings if order else dict(ranked(study)[0].params)
    return TuneResult(
        what=what,
        method=method,
        metric=metric,
        study=study.study_name,
        storage=storage,
        trials=tuple(_summary(trial) for trial in study.get_trials(deepcopy=False, states=DONE)),
        put_back=sum(
            SURPLUS not in trial.user_attrs for trial in study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        ),
        finals=tuple(order),
        best=best,
        overrides=format_overrides(best),
        toml=format_toml(best),
    )


def write_result(result: TuneResult, study: Study, folder: Path) -> None:
    """Write `result.json`, `best.toml` and `tune.html`."""
    write_bytes(folder / RESULT, msgspec.json.format(msgspec.json.encode(result), indent=1))
    write_bytes(folder / SNIPPET, result.toml.encode())
    page = jinja2.Environment(autoescape=True).from_string(_PAGE)
    text = page.render(
        result=result, plots=_plots(study), finals=_as_text(finals_table(result)), trials=_as_text(trials_table(result))
    )
    write_bytes(folder / PAGE, text.encode())


def trials_table(result: TuneResult, max_rows: int | None = None) -> Table:
    """One row per trial, best first."""
    order = sorted(
        result.trials, key=lambda t: (t.pruned, -(t.value if t.value is not None else float("-inf")), t.trial)
    )
    keys = list(order[0].settings) if order else []
    table = _new_table(
        "trials, on validation", ["trial", *keys, result.metric, "balanced accuracy", "AUC", "epochs", "seconds", ""]
    )
    for line in order[:max_rows]:
        figures = [_format_score(value) for value in (line.value, line.balanced_accuracy, line.auc)]
        spent = "" if line.seconds is None else f"{line.seconds:.0f}"
        table.add_row(
            str(line.trial), *_format_settings(line.settings, keys), *figures, str(line.epochs), spent, line.why
        )
    if max_rows is not None and len(order) > max_rows:
        table.caption = f"and {len(order) - max_rows} more in {RESULT}"
    return table


def finals_table(result: TuneResult) -> Table:
    """One row per final, best first."""
    keys = list(result.best)
    columns = ["trial", *keys, result.metric, "balanced accuracy", "95 % interval", "F1", "AUC", "epochs", "seconds"]
    table = _new_table("the best trials, trained in full, on validation", columns)
    for final in result.finals:
        low, high = final.balanced_accuracy_ci
        figures = (f"{final.value:.3f}", f"{final.balanced_accuracy:.3f}", f"{low:.3f} to {high:.3f}")
        more = (f"{final.f1:.3f}", f"{final.auc:.3f}", str(final.epochs), f"{final.seconds:.0f}")
        table.add_row(str(final.trial), *_format_settings(final.settings, keys), *figures, *more)
    return table


def shown_trials(result: TuneResult) -> Table:
    """The best trials that fit on a screen."""
    return trials_table(result, _MAX_SHOWN)


def _summary(trial: FrozenTrial) -> TrialSummary:
    steps = trial.intermediate_values
    return TrialSummary(
        trial=trial.number,
        settings=dict(trial.params),
        pruned=trial.state == TrialState.PRUNED,
        value=trial.value if trial.state == TrialState.COMPLETE else max(steps.values(), default=None),
        balanced_accuracy=trial.user_attrs.get("balanced_accuracy") if steps else None,
        auc=trial.user_attrs.get("auc") if steps else None,
        epochs=len(steps),
        seconds=trial.user_attrs.get(SECONDS),
        why=trial.user_attrs.get(WHY, "") if trial.state == TrialState.PRUNED else "",
    )


def _new_table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(column.partition(".")[2] or column, justify="right")
    return table


def _format_settings(settings: dict[str, Value], keys: list[str]) -> list[str]:
    values = [settings.get(key, "") for key in keys]
    return [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]


def _format_score(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _as_text(table: Table) -> list[list[str]]:
    """Header and rows of a table as text."""
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]


def _plots(study: Study) -> list[tuple[str, str]]:
    """Title and PNG (base64) of each plot that has enough data."""
    matplotlib.use("Agg")
    from optuna.visualization import matplotlib as draw

    complete = ranked(study)
    plots: list[tuple[str, Callable[[Study], Any]]] = [
        ("History: each trial, and the best so far", draw.plot_optimization_history),
        ("Epoch by epoch", draw.plot_intermediate_values),
        ("Slices: each setting by itself", draw.plot_slice),
    ]
    if len(complete) >= _MIN_FOR_IMPORTANCE and complete[0].value != complete[-1].value:
        plots.append(
            ("Importance: how much of the differences each setting explains (fANOVA)", draw.plot_param_importances)
        )
    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.simplefilter("ignore")
        return [(title, _png(plot(study))) for title, plot in plots]


def _png(axes: Any) -> str:
    from matplotlib import pyplot

    first = axes.flat[0] if hasattr(axes, "flat") else axes
    stream = io.BytesIO()
    first.figure.set_size_inches(max(7.0, 3.4 * getattr(axes, "size", 1)), 4.2)
    first.figure.savefig(stream, format="png", dpi=90, bbox_inches="tight")
    pyplot.close(first.figure)
    return base64.b64encode(stream.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>eyas tune: {{ result.study }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
td:last-child, th:last-child { text-align: left; } pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; }
img { max-width: 100%; }
</style></head><body>
<h1>{{ result.study }}</h1>
<p>{{ result.method }} search for the {{ result.what }}, {{ result.trials | length }} trials by {{ result.metric }}. All
metrics are of the validation split, which also selected the settings, so the best trial is optimistic. The report
evaluates the result on the held-out test set.</p>
<h2>Best settings</h2><pre>{{ result.toml }}</pre><pre>{{ result.overrides }}</pre>
{% macro rows(table) %}<div class="wide"><table>
<tr>{% for cell in table[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table[1:] %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endmacro %}
{% if result.finals %}<h2>Trained in full</h2>{{ rows(finals) }}{% endif %}
<h2>Trials</h2>{{ rows(trials) }}
{% for title, png in plots %}<h2>{{ title }}</h2><img alt="{{ title }}" src="data:image/png;base64,{{ png }}">
{% endfor %}</body></html>
"""
