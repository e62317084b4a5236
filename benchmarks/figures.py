"""Write docs/figures.md from benchmarks/results/*.json: every figure with its machine, its bound and whether it is met.

The page follows from the results alone, so generating it again changes nothing; `tests/test_figures.py` compares.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "figures.md"

_EARLIER_RUNS = (
    "The earlier run is one seed on a slower machine, with int8 ranges from mean extremes and twice the epochs of int8 "
    "training."
)
PAGES: dict[str, tuple[str, str, str]] = {
    "main-job": ("Main job", "make bench-main-job", _EARLIER_RUNS),
    "compression": (
        "Compression, five folds",
        "make bench-compression",
        "Int8 is faster than fp32 where the processor has dot-product instructions (VNNI); this one has none.",
    ),
    "pretrained": (
        "Pretrained student weights",
        "make bench-pretrained",
        "`random` and `pretrained` name the student's initial weights.",
    ),
    "distillation": (
        "Distillation beside labels alone",
        "make bench-distillation",
        "Balanced accuracy on images that no network of a fold or seed saw; a difference is that of the same images. "
        "Each training ran in one process with one thread, two beside each other.",
    ),
    "distillation-fashion": (
        "Distillation beside labels alone, ten classes",
        "make bench-distillation",
        "A thousand training images of Fashion-MNIST at 64 px, the default recipe; 2,400 images that no network saw.",
    ),
    "truth": (
        "Right answers where they are known",
        "make bench-truth",
        "Simulated data with a known truth. What needs a machine of its own is *not measured* beside other processes.",
    ),
    "strange-data": (
        "Strange folders, tables and image files",
        "make bench-strange-data",
        "The same random examples each time; what is refused with a reason is neither a traceback nor a loss.",
    ),
    "ood": (
        "Out-of-distribution images",
        "make bench-ood",
        "Streams flagged within thirty frames; a bound of 90 % where a change costs ten points of balanced accuracy or "
        "more, 1 % for unchanged images. `before` is the former detector on the same streams. 200 streams of 140 test "
        "images of solar cells, and of 216 of textures: six kinds that have little in common, where no single "
        "statistic is unusual among all images. Grey walls are missed there: one kind has patches without detail.",
    ),
    "training": ("Training", "make bench-training", ""),
    "scale": ("A very large data set", "make bench-scale", ""),
    "frame-loop": ("Frame loop on the device", "make bench-frame-loop", ""),
    "camera-faults": ("Faults of a camera", "make bench-camera-faults", ""),
    "soak": ("Soak: a camera that dies every twenty seconds", "make soak", ""),
    "board": (
        "Power cuts of an emulated board",
        "make soak-board",
        "An aarch64 Cortex-A76 in full emulation (5 cuts: A72); a cut is a SIGKILL of the emulator at a "
        "random moment, or a copy of its disk while it was stopped. The bounds of the numbers of cuts are what was "
        "asked for: the run is resumable, and the shares say what the cuts so far have shown.",
    ),
    "updates": (
        "Updates",
        "make bench-updates",
        "A fault happens inside of a real `eyas-device` process, at a call that changes the disk. A power cut is a "
        "real ext4 file system, mounted again from what its recorded disk may hold; blocks of 4 kB are whole or "
        "absent. In the fleet, updaters, slots, golden checks, predictions, the judge of the probation, broker, "
        "collector, store and rollouts are real; cameras and agents are simulated.",
    ),
    "fleet-demo": (
        "A fleet through a change of season",
        "make fleet-demo",
        "Simulated cameras see pieces of real photographs; light, season and dirt are image operations, a day takes "
        "seconds, and people label as a table says, wrong in 3 of 100. Everything else is real.",
    ),
    "loop": (
        "The loop: drift, labels, retraining, promotion",
        "make bench-loop",
        "Detection: simulated devices with day and night; each detector has the threshold with which it is as quiet as "
        "asked on the same stable days. A delay is the geometric mean over all streams, seven days where nothing was "
        "found. Estimates, bounds, choice and retraining: Fashion-MNIST, its images as cameras see them (light, haze, "
        "focus and dirt are image operations), and a network of three convolutions; choice fits its last layer again. "
        "Processor seconds, not wall time: they were measured beside other processes.",
    ),
    "log-lines": ("Log lines in a day on the device", "python benchmarks/log_lines.py", ""),
    "telemetry": ("Telemetry", "make bench-telemetry", ""),
    "kill-matrix": ("Kill matrix", "python benchmarks/kill_matrix.py", ""),
    "kill-matrix-plain": (
        "Kill matrix of a plain paho QoS 1 to SQLite script",
        "python benchmarks/kill_matrix.py --plain",
        "",
    ),
}
"""Results file without `.json` -> title, command, note; in the page's order. A file that is not listed comes last."""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PAGE, metavar="FILE")
    args = parser.parse_args()
    args.out.write_text(render(read(RESULTS)), encoding="utf-8")
    print(args.out)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Results by name, in the page's order."""
    found = {path.stem: msgspec.json.decode(path.read_bytes()) for path in sorted(folder.glob("*.json"))}
    order = list(PAGES)
    return dict(sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def render(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole page as Markdown."""
    blocks = [
        "<!-- Generated by `make figures` from benchmarks/results/*.json. Do not edit. -->\n"
        "# Figures\n\n"
        "Every figure that Eyas claims, with the machine it was measured on. A bound is what was asked for before "
        "measuring; it stays in the table where it is missed. *not measured* says that nothing is known: no Raspberry "
        "Pi, no Jetson, no GPU workstation and no TensorRT is in these results unless a machine below says so. "
        "Earlier runs stand beside the newest: one of the same class of machines (VNNI or not), two of each other one.",
        _overview(results),
        *(_section(name, result) for name, result in results.items()),
    ]
    return "\n\n".join(blocks) + "\n"


def _overview(results: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, result in results.items():
        bounded = [figure for figure in result.get("figures", {}).values() if figure["ok"] is not None]
        met = f"{sum(figure['ok'] for figure in bounded)} of {len(bounded)}" if bounded else ""
        rows.append((f"[{_title(name)}](#{_anchor(name)})", _machine(result), met))
    return _table(("results", "machine", "bounds met"), rows)


def _section(name: str, result: Mapping[str, Any]) -> str:
    _, command, note = PAGES.get(name, (name, "", ""))
    pressure = result.get("pressure", {})
    facts = [
        f"Machine: {_machine(result)}; {result['machine']['system']}, Python {result['machine']['python']}.",
        f"Measured by `{command}`." if command else "",
        f"Settings: `{result['settings']}`." if "settings" in result else "",
        f"CPU pressure before and after (`/proc/pressure/cpu`): {_average(pressure['before'])} and "
        f"{_average(pressure['after'])} of a minute waiting for a core."
        if pressure
        else "",
        _earlier(result.get("earlier", ())),
        note,
    ]
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    earlier = result.get("earlier", ())
    table = _outcomes(result["outcomes"]) if "outcomes" in result else _figures(result["figures"], earlier)
    return "\n\n".join(
        (
            f"({_anchor(name)})=\n## {_title(name)}",
            " ".join(fact for fact in facts if fact),
            table,
            f"Versions: {versions}. File: `benchmarks/results/{name}.json`.",
        )
    )


def _earlier(runs: Sequence[Mapping[str, Any]]) -> str:
    """Which machines the columns of earlier runs are of, by their numbers."""
    words = [
        ", ".join(filter(None, (f"({number}) {_machine(run)}", run.get("finished"), run.get("settings"))))
        for number, run in enumerate(runs, start=1)
    ]
    return f"Earlier runs: {'; '.join(words)}." if words else ""


def _figures(figures: Mapping[str, Mapping[str, Any]], earlier: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for key, figure in figures.items():
        sign = "≥" if figure["better"] == "higher" else "≤"
        bound = "" if figure["bound"] is None else f"{sign} {_number(figure['bound'])}"
        value = "*not measured*" if figure["value"] is None else f"{_number(figure['value'])} {figure['unit']}".strip()
        met = {True: "yes", False: "**no**", None: ""}[figure["ok"]]
        before = [_before(run["figures"].get(key)) for run in earlier]
        rows.append((f"`{key}`", value, *before, bound, met, figure["spread"], figure["note"]))
    columns = [f"earlier ({number})" for number in range(1, len(earlier) + 1)]
    return _table(("figure", "value", *columns, "bound", "met", "spread", "note"), rows)


def _before(value: float | None) -> str:
    return "" if value is None else _number(value)


def _outcomes(outcomes: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (o["case"], str(o["messages"]), str(o["lost"]), str(o["twice"]), _number(o["seconds"]), _yes(o["finished"]))
        for o in outcomes
    ]
    return _table(("killed", "messages", "lost", "stored twice", "seconds", "finished"), rows)


def _yes(value: bool) -> str:
    return "yes" if value else "**no**"


def _machine(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    isa = machine.get("isa") or f"{_architecture(machine['system'])}, extensions not recorded"
    return f"{machine['processor'].replace('(R)', '')}, {machine['cores']} cores ({isa})"


def _architecture(system: str) -> str:
    return next((name for name in ("x86_64", "aarch64") if name in system), "architecture not recorded")


def _average(pressure: str) -> str:
    """The `avg60` of a pressure line as a percentage."""
    return next((f"{word[6:]} %" for word in pressure.split() if word.startswith("avg60=")), "*not measured*")


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _title(name: str) -> str:
    return PAGES[name][0] if name in PAGES else name


def _anchor(name: str) -> str:
    return f"figures-{name}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    main()
