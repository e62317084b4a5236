"""The registry keeps versions whole, whatever happens to the runs, the commands and the disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eyas_device.bundle import MANIFEST, Bundle, sha256
from eyas_host.versions.collect import read_run
from eyas_host.versions.compare import compare
from eyas_host.versions.record import RegistryError, VersionRecord
from eyas_host.versions.registry import CHAMPION, Registry
from tests.support.device_fixtures import pristine_bundle, weights  # noqa: F401 - fixtures
from tests.support.finished_run import finish_run, split_of

Make = Callable[..., Path]


@pytest.fixture
def make(pristine_bundle: Path, tmp_path: Path) -> Make:  # noqa: F811 - fixture
    """Write a finished run with a bundle of some version."""
    return lambda version, **more: finish_run(tmp_path / f"run-{version}", pristine_bundle, version, **more)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    times = iter(range(1000, 2000))
    return Registry(tmp_path / "registry", now=lambda: float(next(times)), by="me")


@pytest.fixture
def add(registry: Registry, make: Make) -> Callable[..., VersionRecord]:
    """Register a run of some version."""
    moments = iter(range(1, 1000))

    def added(version: str, parent: str = "", **more: object) -> VersionRecord:
        run = make(version, **more)
        record = read_run(run, now=float(next(moments)), by="me", parent=parent)
        assert registry.add(record, run)
        return record

    return added


def test_a_version_outlives_its_run_and_comes_back_byte_for_byte(
    registry: Registry, make: Make, tmp_path: Path
) -> None:
    run = make("1.0.0")
    record = read_run(run, now=1.0, by="me", note="first")
    assert registry.add(record, run) and not registry.add(record, run)
    before = {name: sha256(run / name) for name in record.files}
    assert "teach/teacher.pt" in before and "teach/views.npy" not in before
    shutil.rmtree(run)
    registry.check_out(registry.find("1.0.0"), tmp_path / "again")
    assert {name: sha256(tmp_path / "again" / name) for name in before} == before
    Bundle.open(registry.bundle(record, tmp_path / "bundle")).golden()
    assert sha256(tmp_path / "bundle" / MANIFEST) == record.digest
    with pytest.raises(RegistryError, match="is there already"):
        registry.bundle(record, tmp_path / "bundle")


def test_a_record_names_what_it_was_made_from(registry: Registry, add: Callable[..., VersionRecord]) -> None:
    record = add("1.0.0")
    assert record.tools.libraries == {"numpy": "2.4.0", "torch": "2.13.0"} and record.tools.seed == 3
    assert record.tools.code["teach"] == "code of teach" and len(record.tools.machines) == 1
    assert record.data.images == 100 and record.data.counts["test"] == {record.labels[0]: 15}
    assert record.figures[record.shipped].balanced_accuracy == 0.9
    assert registry.versions() == [record], "written and read again"


def test_the_same_version_with_another_bundle_is_refused(registry: Registry, make: Make, tmp_path: Path) -> None:
    first = make("1.0.0")
    registry.add(read_run(first, now=1.0), first)
    first.rename(tmp_path / "kept")
    other = make("1.0.0", weights=b"other weights", split=split_of(("circle",), range(9), range(9, 10), range(10, 12)))
    with pytest.raises(RegistryError, match=r"registered, with another bundle; raise \[pack\] version"):
        registry.add(read_run(other, now=2.0), other)
    assert len(registry.versions()) == 1


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("bundle/litert-int8.tflite", lambda path: path.write_bytes(path.read_bytes() + b"x"), "litert-int8.tflite"),
        ("pack/split.json", lambda path: path.write_bytes(b"{}"), "changed since the bundle was packed"),
        ("verify/stage.json", lambda path: path.unlink(), "verify not finished"),
        ("bundle/manifest.json", lambda path: path.unlink(), "manifest"),
    ],
)
def test_a_run_that_is_not_as_it_was_packed_is_refused(
    make: Make, name: str, change: Callable[[Path], object], said: str
) -> None:
    run = make("1.0.0")
    change(run / name)
    with pytest.raises(RegistryError, match=said):
        read_run(run, now=1.0)


def test_a_report_of_an_earlier_bundle_is_no_figure(make: Make) -> None:
    run = make("1.0.0")
    record = msgspec.json.decode((run / "report/stage.json").read_bytes())
    (run / "report/stage.json").write_bytes(
        msgspec.json.encode(record | {"inputs": {"bundle/manifest.json": "0" * 64}})
    )
    assert read_run(run, now=1.0).figures == {}
    assert read_run(make("1.1.0", accuracy=None), now=1.0).verdict == ""


def test_a_file_that_changes_while_it_is_registered(registry: Registry, make: Make) -> None:
    run = make("1.0.0")
    record = read_run(run, now=1.0)
    (run / "teach/teacher.pt").write_bytes(b"retrained")
    with pytest.raises(RegistryError, match="changed meanwhile"):
        registry.add(record, run)
    assert registry.versions() == [] and registry.history() == []


def test_aliases_change_hands_and_the_log_keeps_who_had_them(
    registry: Registry, add: Callable[..., VersionRecord]
) -> None:
    first, second = add("1.0.0"), add("1.1.0", parent="1.0.0")
    assert registry.find(first.model) == second, "the newest, while there is no champion"
    assert registry.set_alias(CHAMPION, first) == ""
    assert registry.find(first.model) == registry.find(f"{first.model}@champion") == registry.find("champion") == first
    assert registry.set_alias(CHAMPION, second) == "1.0.0"
    assert registry.find("champion") == second
    assert registry.set_alias(CHAMPION, second) == "1.1.0", "nothing happens"
    assert registry.drop_alias(CHAMPION, first.model) == "1.1.0"
    logged = [(one.what, one.version, one.alias, one.before) for one in registry.history()]
    assert logged == [
        ("added", "1.0.0", "", ""),
        ("added", "1.1.0", "", ""),
        ("alias", "1.0.0", CHAMPION, ""),
        ("alias", "1.1.0", CHAMPION, "1.0.0"),
        ("alias dropped", "", CHAMPION, "1.1.0"),
    ]
    with pytest.raises(RegistryError, match="no such alias"):
        registry.drop_alias(CHAMPION, first.model)


def test_lineage_is_linked_both_ways(registry: Registry, add: Callable[..., VersionRecord], make: Make) -> None:
    first = add("1.0.0")
    assert [one.version for one in registry.children(first)] == []
    add("1.1.0", parent="1.0.0")
    add("1.2.0", parent="1.0.0")
    assert [one.version for one in registry.children(first)] == ["1.1.0", "1.2.0"]
    run = make("2.0.0")
    with pytest.raises(RegistryError, match=r"@7\.0\.0: the parent is not registered"):
        registry.add(read_run(run, now=9.0, parent="7.0.0"), run)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("2.0.0", "no such version or alias; there are: 1.0.0, champion"),
        ("other@1.0.0", "other: no such model"),
        ("champ", "no such version or alias"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(
    registry: Registry, add: Callable[..., VersionRecord], name: str, said: str
) -> None:
    with pytest.raises(RegistryError, match="no model is registered"):
        registry.find(name)
    registry.set_alias(CHAMPION, add("1.0.0"))
    with pytest.raises(RegistryError, match=said):
        registry.find(name)


def test_a_device_s_digest_finds_its_version(registry: Registry, add: Callable[..., VersionRecord]) -> None:
    records = [add("1.0.0"), add("1.1.0")]
    assert [registry.find(record.digest[:12]) for record in records] == records


def test_pruning_keeps_what_serves_and_what_it_was_trained_from(
    registry: Registry, add: Callable[..., VersionRecord], make: Make, tmp_path: Path
) -> None:
    records = {v: add(v, parent, weights=v.encode()) for v, parent in (("1", ""), ("2", "1"), ("3", "2"), ("4", "3"))}
    records |= {v: add(v, "4", weights=v.encode()) for v in ("5", "6")}
    registry.set_alias(CHAMPION, records["3"])
    planned = registry.prune(1, dry_run=True)
    assert {name.rpartition("@")[2] for name in planned.versions} == {"1", "4", "5"} and planned.size_bytes > 0
    assert not any(map(registry.is_pruned, records.values()))
    assert registry.prune(1) == planned
    assert [v for v, record in records.items() if registry.is_pruned(record)] == ["1", "4", "5"]
    assert registry.verify() == [], "what other versions share is there"
    assert [record.version for record in registry.versions()] == list(records), "records stay"
    for v in ("2", "3", "6"):
        registry.check_out(records[v], tmp_path / f"out-{v}")
    with pytest.raises(RegistryError, match="removed to free space"):
        registry.check_out(records["1"], tmp_path / "out-1")
    with pytest.raises(RegistryError, match="cannot serve"):
        registry.set_alias(CHAMPION, records["4"])
    assert registry.prune(1).versions == ()
    assert registry.add(records["4"], tmp_path / "run-4"), "from its run, the files come back"
    registry.set_alias("challenger", records["4"])
    assert registry.history()[-2].what == "restored"


def test_damage_is_found_and_not_given_out(
    registry: Registry, add: Callable[..., VersionRecord], tmp_path: Path
) -> None:
    record = add("1.0.0")
    assert registry.verify() == []
    digest = record.files["teach/teacher.pt"].sha256
    path = registry.folder / "objects" / digest[:2] / digest
    path.chmod(0o644)
    path.write_bytes(b"weightz")
    assert [line for line in registry.verify() if "teach/teacher.pt is damaged" in line]
    with pytest.raises(RegistryError, match=r"teach/teacher\.pt is damaged"):
        registry.check_out(record, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    path.unlink()
    with pytest.raises(RegistryError, match="is missing"):
        registry.check_out(record, tmp_path / "out")
    (registry.folder / record.model / "1.0.0.json").write_bytes(b"{")
    with pytest.raises(RegistryError, match="damaged"):
        registry.versions()


def test_a_command_that_is_killed_before_the_record_changes_nothing(
    registry: Registry, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make("1.0.0")
    record = read_run(run, now=1.0)
    with monkeypatch.context() as patch:
        patch.setattr("eyas_host.versions.registry.write_bytes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            registry.add(record, run)
    assert registry.versions() == [] and registry.verify() == []
    left = registry.prune(1)
    assert left.versions == () and left.size_bytes > 0 and registry.prune(1).size_bytes == 0
    assert registry.add(record, run) and registry.verify() == []


@pytest.fixture(scope="module")
def named(pristine_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811 - fixture
    """A registry of one version that has got three aliases."""
    folder = tmp_path_factory.mktemp("named")
    registry = Registry(folder / "registry", now=lambda: 1.0, by="me")
    run = finish_run(folder / "run", pristine_bundle, "1.0.0")
    registry.add(record := read_run(run, now=1.0), run)
    for alias in ("champion", "challenger", "third"):
        registry.set_alias(alias, record)
    shutil.rmtree(registry.folder / "objects")  # not needed here
    return registry.folder


@given(cut=st.integers(0, 600))
@settings(max_examples=40, deadline=None)
def test_a_log_that_a_power_cut_left_unfinished_goes_on(named: Path, cut: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        registry = Registry(Path(shutil.copytree(named, Path(name, "registry"))), now=lambda: 2.0, by="me")
        before, log = registry.history(), registry.folder / "log.jsonl"
        log.write_bytes(left := log.read_bytes()[:cut])
        registry.set_alias("fourth", registry.find("champion"))
        logged = registry.history()
    assert logged[-1].alias == "fourth"
    assert logged[:-1] == before[: len(logged) - 1], "what is logged was so"
    assert len(logged) - 1 >= left.count(b"\n"), "no whole line is lost"


def test_two_versions_are_compared_and_a_test_image_that_was_trained_on_is_named(
    registry: Registry, add: Callable[..., VersionRecord]
) -> None:
    first = add("1.0.0")
    labels = first.labels
    grown = add("1.1.0", split=split_of(labels, range(100, 180), range(70, 85), range(85, 100)), accuracy=0.95)
    leaked = add(
        "1.2.0",
        split=split_of(labels, range(90), range(90, 95), range(95, 100)),
        recipe={"run": {"name": "x"}, "student": {"epochs": 40}},
    )
    found = compare(registry, first, grown)
    assert (found.images.same, found.images.new, found.images.gone) == (30, {"train": 80}, {"train": 70})
    assert found.same_test and found.images.leaked == 0 and not found.recipe
    assert found.figures[first.shipped]["balanced_accuracy"] == (0.9, 0.95)
    found = compare(registry, first, leaked)
    assert found.images.moved == {"validation to train": 15, "test to train": 5, "test to validation": 5}
    assert found.images.leaked == 10 and not found.same_test
    assert found.recipe == {"student.epochs": ("30", "40")}
