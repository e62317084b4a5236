"""The evaluation of a bundle on a labelled set as one self-contained HTML page, and as a table in the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from eyas_host.evaluation.labelled_figures import Evaluation
from eyas_host.report import plots
from eyas_host.report.glossary import Glossary
from eyas_host.report.page import confused_pairs, confusion_cells, environment, fixed, percent, thumbnail
from eyas_host.report.portable import without_roots

_MAX_SEEN = 100


def render_evaluation(evaluation: Evaluation) -> str:
    """The page: no scripts, no links, thumbnails and plots inside. Images that cannot be read again are left out."""
    files = [one.path for one in evaluation.mistakes]
    evaluation, glossary = without_roots(evaluation, (Path(evaluation.source).resolve(),)), Glossary()
    main = next(one for one in evaluation.artefacts if one.name == evaluation.main)
    return (
        environment()
        .get_template("labelled_set.html.j2")
        .render(
            evaluation=evaluation,
            main=main,
            source=Path(evaluation.source).name or evaluation.source,
            glossary=glossary,
            term=glossary.term,
            matrix=confusion_cells(main.confusion),
            confused=confused_pairs(main.confusion),
            reliability=plots.reliability(main.reliability, f"of {main.name}"),
            mistakes=[
                (one, thumbnail(file, evaluation.bits)) for one, file in zip(evaluation.mistakes, files, strict=True)
            ],
            seen=evaluation.overlap.images[:_MAX_SEEN],
        )
    )


def evaluation_table(evaluation: Evaluation) -> Table:
    """The figures of every artefact, the main one in bold."""
    table = Table(
        title=f"{evaluation.bundle} {evaluation.bundle_version} on {evaluation.images} images of {evaluation.source}",
        title_justify="left",
    )
    table.add_column("artefact", no_wrap=True)
    for title in ("balanced acc.", "95 % interval", "at packing", "F1", "AUC", "ECE", "agreement"):
        table.add_column(title, justify="right", no_wrap=True)
    agreement = {one.artefact: one.agreement for one in evaluation.parity}
    for one in evaluation.artefacts:
        low, high = one.balanced_accuracy_ci
        table.add_row(
            one.name,
            percent(one.balanced_accuracy),
            f"{percent(low)} .. {percent(high)}",
            "" if one.packed_balanced_accuracy is None else percent(one.packed_balanced_accuracy),
            fixed(one.f1),
            "" if one.auc is None else fixed(one.auc),
            fixed(one.ece),
            percent(agreement[one.name]) if one.name in agreement else "",
            style="bold" if one.name == evaluation.main else None,
        )
    table.caption = "at packing: on the run's validation split; agreement: with the artefact in bold"
    return table
