"""The device's configuration: strict, all errors reported at once, and an example that cannot go stale."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eyas_device import config as config_module
from eyas_device.board.identity import default_name
from eyas_device.config import (
    COMMANDS,
    EXAMPLE,
    RENAMED,
    Config,
    DeviceSection,
    OutputSection,
    instance_of,
    read_config,
)
from eyas_device.errors import ConfigError

_KEY = re.compile(r"^#([a-z_]+)( = .*)$", re.MULTILINE)
_EXAMPLE_NAME = "camera-1"

relaxed = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def keys() -> dict[str, dict[str, Any]]:
    """Section -> key -> default."""
    config = Config(output=(OutputSection(kind="mqtt"),))
    return {
        section.name: {key.name: getattr(values, key.name) for key in msgspec.structs.fields(type(values))}
        for section in msgspec.structs.fields(Config)
        for values in [config.output[0] if section.name == "output" else getattr(config, section.name)]
    }


def toml(value: object) -> str:
    """A value as TOML: JSON is that for text, numbers and lists of numbers, but for unescaped DEL characters."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def written(path: Path, tree: dict[str, dict[str, object]]) -> Path:
    lines = []
    for section, values in tree.items():
        lines.append("[[output]]" if section == "output" else f"[{section}]")
        lines += [f"{key} = {toml(value)}" for key, value in values.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def errors(path: Path) -> list[str]:
    """The lines of the refusal, without the first, which names the file and counts them."""
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    first, *rest = str(caught.value).splitlines()
    assert first.startswith(f"{path}: ")
    if rest:
        assert first == f"{path}: {len(rest)} error{'s' * (len(rest) > 1)}"
    return [line.strip() for line in rest] or [first.removeprefix(f"{path}: ")]


def test_example_is_valid_unchanged() -> None:
    assert read_config(EXAMPLE) == Config()


def test_example_has_every_key_no_other_and_the_defaults(tmp_path: Path) -> None:
    text, count = _KEY.subn(r"\1\2", EXAMPLE.read_text(encoding="utf-8").replace("#[[output]]", "[[output]]"))
    (path := tmp_path / "all.toml").write_text(text, encoding="utf-8")
    tree = msgspec.toml.decode(text)
    [tree["output"]] = tree["output"]
    assert {section: list(values) for section, values in tree.items()} == {s: list(v) for s, v in keys().items()}
    assert count == sum(len(values) for values in keys().values()) > 15
    config = read_config(path)
    assert config.output == (OutputSection(kind="mqtt"),)
    config = msgspec.structs.replace(config, output=())
    assert config.device.name == _EXAMPLE_NAME, "the one key whose default depends on the host"
    assert (
        msgspec.structs.replace(config, device=msgspec.structs.replace(config.device, name=default_name())) == Config()
    )


def test_example_explains_every_key_and_names_units() -> None:
    units = {"_s": "Seconds", "_ms": "Milliseconds"}
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if match := _KEY.match(line):
            assert lines[number - 1].startswith("# "), f"{match[1]} has no explanation"
            unit = next((u for suffix, u in units.items() if match[1].endswith(suffix)), "")
            assert unit in lines[number - 1], f"{match[1]} does not say its unit"


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert read_config(written(tmp_path / "empty.toml", {})) == Config()


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(
        'top = 1\n[device]\nsite = "a/b"\nstate = "relative"\nstat = "typo"\n[camera]\ntimeout_s = 0\n'
        'frozen_s = nan\nblack_level = "dark"\n[model]\nthreads = 0\naffinity = [-1]\n[loop]\nduty = 1.5\nfps = inf\n'
        '[telemetry]\nbroker = "host:99999"\nwindow_s = 0.01\n[telemetri]\nbroker = "x"\n'
        '[update]\nhours = "22-5"\n'
    )
    reported = errors(path)
    expected = [
        r"\[top\]: unknown section; allowed: device, camera",
        r"\[telemetri\]: unknown section; did you mean 'telemetry'\? allowed: ",
        r"\[device\] stat: unknown key; did you mean 'state'\? allowed: site, name, state",
        r"\[device\] site = 'a/b': 1 to 64 letters",
        r"\[device\] state = 'relative': an absolute path",
        r"\[camera\] timeout_s = 0: must be float > 0",
        r"\[camera\] frozen_s = nan: ",
        r"\[camera\] black_level = 'dark': must be float",
        r"\[model\] threads = 0: must be int >= 1",
        r"\[model\] affinity = \[-1\]: must be int >= 0",
        r"\[loop\] duty = 1.5: must be float <= 1",
        r"\[loop\] fps = inf: a finite number",
        r"\[telemetry\] broker = 'host:99999': HOST or HOST:PORT",
        r"\[telemetry\] window_s = 0.01: must be float >= 0.1",
        r"\[update\] hours = '22-5': hours such as 22:00-05:00 are needed",
    ]
    for pattern in expected:
        assert sum(bool(re.search(pattern, line)) for line in reported) == 1, (pattern, reported)
    assert len(reported) == len(expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("fps = 3", "fps: a key needs its section; it belongs below [loop]"),
        ("[camera]\nfps = 3", "[camera] fps: unknown key; it belongs to [loop]"),
        ("[telemetry]\npin = 3", "[telemetry] pin: unknown key; it belongs to [[output]]"),
        ("[device]\nca = 'x'", "[device] ca: unknown key; it belongs to [telemetry] or [[output]]"),
        ("[Camera]", "[Camera]: unknown section; did you mean 'camera'? allowed: device, "),
        ("[[outputs]]\nkind = 'mqtt'", "[outputs]: unknown section; did you mean 'output'? allowed: device, "),
        ("[telemetry]\nWindow-S = 3", "[telemetry] Window-S: unknown key; did you mean 'window_s'? allowed: "),
        ("[camera]\nxyz = 3", "[camera] xyz: unknown key; allowed: source, "),
        ("[device]\nlog_level = 'warn'", "must be one of debug, info, warning, error; did you mean 'warning'?"),
        ("[camera]\nrotate = 45", "[camera] rotate = 45: must be one of 0, 90, 180, 270"),
        ("[camera.controls]\ngain = 'aut'", "must be one of a number, auto; did you mean 'auto'?"),
        ("[telemetry]\ncommands = ['pause', 'bnch']", "snapshot, bench, doctor; did you mean 'bench'?"),
    ],
)
def test_what_is_unknown_gets_the_name_that_was_meant(content: str, message: str, tmp_path: Path) -> None:
    (path := tmp_path / "c.toml").write_text(content)
    [only] = errors(path)
    assert message in only


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_key_is_answered_with_the_new_one(old: str, new: str, tmp_path: Path) -> None:
    section, key = re.fullmatch(r"(\[\w+\]) (\w+)", old).groups()  # type: ignore[union-attr]
    (path := tmp_path / "old.toml").write_text(f"{section}\n{key} = 1\n[loop]\nfps = -1\n")
    assert sorted(errors(path)) == ["[loop] fps = -1: must be float >= 0.0", f"{old} is now {new}"]


def test_a_section_that_is_not_a_table(tmp_path: Path) -> None:
    (path := tmp_path / "c.toml").write_text("camera = 1\n")
    assert errors(path) == ["[camera]: must be a section, not int"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b"[device\n", "not TOML"),
        (b"site = 1\nsite = 2\n", "not TOML"),
        (b"a = " + b"[" * 100_000, "not TOML"),
        (b"[model]\nthreads = " + b"9" * 10_000, "not TOML"),
    ],
)
def test_files_that_are_not_a_configuration(tmp_path: Path, content: bytes, message: str) -> None:
    (path := tmp_path / "c.toml").write_bytes(content)
    assert message in errors(path)[0]


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "No such file" in errors(tmp_path / "none.toml")[0]
    assert "not a file" in errors(tmp_path)[0]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('[telemetry]\ncertificate = "a.pem"', "certificate, key: both are needed"),
        ('[telemetry]\ncommands = ["reboot"]', "commands"),
        ('[telemetry]\nbroker = "10.0.0.7"\ncommands = ["pause"]', "commands: not without TLS: set ca"),
        (
            '[telemetry]\nbroker = "[::1]:8883"\nuser = "u"\npassword_file = "/p"',
            "user, password_file: not without TLS",
        ),
        ('[telemetry]\nbroker = "mqtt://h"\nuser = "u"', "insecure = true"),
        ('[telemetry]\nbroker = "mqtt://h"\nca = "ca.pem"', "mqtts://"),
        ('[telemetry]\nbroker = "ws://h"', "[telemetry] broker = 'ws://h': MQTT over WebSocket"),
        ('[telemetry]\nbroker = "u:pw@h"', "user and password do not belong into the address"),
        ("[privacy]\nband = [0.9, 0.2]", "the first must not be above the second"),
        ("[privacy]\nband = [nan, 0.2]", "must be float >= 0"),
        ("[privacy]\ncrop = [0.5, 0.0, 0.6, 1.0]", "within 0..1"),
        ("[privacy]\ncrop = [0.5]", "left, top, width and height"),
    ],
)
def test_impossible_combinations(tmp_path: Path, text: str, error: str) -> None:
    (path := tmp_path / "c.toml").write_text(text)
    assert error in errors(path)[0]


@pytest.mark.parametrize("tls", ['ca = "ca.pem"', "tls = true", "insecure = true", 'broker = "mqtts://h"'])
def test_a_password_and_commands_with_tls_or_accepted_without(tmp_path: Path, tls: str) -> None:
    broker = "" if "broker" in tls else 'broker = "h"\n'
    (path := tmp_path / "c.toml").write_text(f'[telemetry]\n{broker}{tls}\nuser = "u"\ncommands = ["pause"]\n')
    telemetry = read_config(path).telemetry
    assert telemetry.exposed == (("commands", "user") if telemetry.insecure else ())
    assert telemetry.address == ("h", 1883, False) if telemetry.insecure else ("h", 8883, True)


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (path := tmp_path / "c.toml").write_bytes(b'\xef\xbb\xbf[device]\r\nname = "cam-2"\r\n')
    assert read_config(path).device.name == "cam-2"


_hosts = st.from_regex(r"\A[a-z0-9-]{1,10}(\.[a-z0-9-]{1,10}){0,2}\Z")
_names = st.from_regex(r"\A[A-Za-z0-9._-]{1,64}\Z").filter(lambda name: name not in (".", ".."))
_text = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), max_size=40)
_path = _text.filter(lambda text: not text.startswith("~"))
"""That of the home folder is read as that folder's."""


def _numbers(minimum: float, maximum: float = 1e9, **options: Any) -> st.SearchStrategy[float]:
    return st.floats(minimum, maximum, allow_nan=False, **options)


_VALID: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "device": {
        "site": _names,
        "name": _names,
        "state": st.from_regex(r"\A/[A-Za-z0-9 /._-]{0,40}\Z"),
        "log_level": st.sampled_from(["debug", "info", "warning", "error"]),
    },
    "camera": {
        "source": _text,
        "timeout_s": _numbers(0, exclude_min=True),
        "frozen_s": _numbers(0),
        "black_level": _numbers(0, 255),
        "give_up_s": _numbers(0),
        "controls": st.just({}),
        "rotate": st.sampled_from([0, 90, 180, 270]),
        "flip": st.sampled_from(["none", "horizontal", "vertical", "both"]),
        "region": st.sampled_from([[], [0, 0, 1, 1], [0.25, 0.5, 0.75, 0.5]]),
    },
    "model": {
        "bundle": _path,
        "runtime": _text,
        "artefact": _text,
        "threads": st.integers(1, 1024),
        "max_latency_ms": _numbers(0),
        "affinity": st.lists(st.integers(0, 1023), max_size=5),
    },
    "loop": {
        "fps": st.just(0.0) | _numbers(1e-5),
        "duty": _numbers(0, 1, exclude_min=True),
        "max_age_ms": _numbers(0),
    },
    "update": {
        "url": st.sampled_from(["", "https://updates.example/eyas", "/media/stick"]),
        "root": _path,
        "channel": _names,
        "group": _names,
        "model": st.just("") | _names,
        "poll_s": _numbers(10),
        "rate_kb": _numbers(0),
        "hours": st.sampled_from(["", "22:00-05:00", "01:30-02:00"]),
        "agent": st.booleans(),
    },
    "telemetry": {
        "broker": st.just("") | st.builds("{}:{}".format, _hosts, st.integers(1, 65535)),
        "window_s": _numbers(0.1),
        "delivery": st.sampled_from(["collector", "broker"]),
        "tls": st.booleans(),
        "ca": _path,
        "insecure": st.just(True),  # else a user or commands may need TLS
        "certificate": st.just(""),  # with `key` or not at all
        "key": st.just(""),
        "user": _text,
        "password_file": _path,
        "spool_mb": _numbers(1, 65536),
        "spool_days": _numbers(0, 3650, exclude_min=True),
        "sync_s": _numbers(0),
        "commands": st.lists(st.sampled_from(COMMANDS), max_size=3),
    },
    "privacy": {
        "events": st.booleans(),
        "images": st.booleans(),
        "sample_rate": _numbers(0, 1),
        "band": st.tuples(_numbers(0, 0.5), _numbers(0.5, 1)).map(list),
        "ood": st.booleans(),
        "disagreements": st.booleans(),
        "min_interval_s": _numbers(0),
        "max_images_per_day": st.integers(0, 100_000),
        "max_side": st.integers(16, 4096),
        "crop": st.sampled_from([[], [0.0, 0.0, 1.0, 1.0], [0.25, 0.5, 0.25, 0.5]]),
        "blur": st.sampled_from(["none", "whole"]),
        "retention_days": st.integers(1, 3650),
        "training": st.booleans(),
    },
    "output": {
        "kind": st.just("mqtt"),
        "labels": st.lists(_text, max_size=3),
        "confidence": _numbers(0, 1),
        "hysteresis": _numbers(0, 1),
        "uncertain": st.booleans(),
        "hits": st.integers(3, 5),
        "of": st.just(5),
        "min_on_s": _numbers(0, 86400),
        "safe": st.sampled_from(["off", "on"]),
        "ood": st.sampled_from(["safe", "ignore"]),
        "stale_s": st.just(1e300),  # longer than any frame rate needs
        "url": _text,
        "header_file": _path,
        "ca": _path,
        "timeout_s": _numbers(0, 60, exclude_min=True),
        "pin": st.integers(-1, 1023),
        "active_high": st.booleans(),
    },
}


def test_the_round_trip_below_draws_every_key() -> None:
    assert {s: set(v) for s, v in _VALID.items()} == {s: set(v) for s, v in keys().items()}


@relaxed
@given(tree=st.fixed_dictionaries({}, optional={s: st.fixed_dictionaries({}, optional=v) for s, v in _VALID.items()}))
def test_any_valid_configuration_is_read_as_written(tmp_path: Path, tree: dict[str, dict[str, Any]]) -> None:
    if "telemetry" in tree:
        tree["telemetry"].setdefault("insecure", True)
    if "output" in tree:
        tree["output"] |= {"kind": "mqtt", "stale_s": 1e300}
    config = read_config(written(tmp_path / "valid.toml", tree))
    assert len(config.output) == ("output" in tree)
    for section, values in keys().items():
        for key, default in values.items():
            expected = tree.get(section, {}).get(key, default)
            if section == "output" and not config.output:
                continue
            found = getattr(config.output[0] if section == "output" else getattr(config, section), key)
            assert found == (tuple(expected) if isinstance(expected, list) else expected), (section, key)


_scalars = st.one_of(
    st.integers(), st.floats(), st.booleans(), _text, st.none(), st.lists(st.integers() | _text, max_size=3)
)
_lines = st.one_of(
    st.builds("[{}]".format, st.sampled_from([*keys(), "[output]", "device.site", "x"])),
    st.builds(
        lambda key, value: f"{key} = {'nan' if isinstance(value, float) and math.isnan(value) else toml(value)}",
        st.sampled_from([key for values in keys().values() for key in values]),
        _scalars,
    ),
    _text,
    st.sampled_from(["x = 1979-05-27T07:32:00Z", "a.b.c = 1", "[[device]]", "site = '''", "state = '/\\u0000'"]),
)


@relaxed
@given(content=st.binary(max_size=80) | st.lists(_lines, max_size=8).map(lambda lines: "\n".join(lines).encode()))
def test_hostile_text_gives_a_configuration_or_a_config_error(tmp_path: Path, content: bytes) -> None:
    (path := tmp_path / "hostile.toml").write_bytes(content)
    try:
        config = read_config(path)
    except ConfigError as error:
        assert str(error).startswith(str(path))
        return
    sections = [getattr(config, section) for section in keys() if section != "output"]
    for section in (*sections, *config.output):
        for value in msgspec.structs.astuple(section):
            assert not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[output]\nkind = "mqtt"', "[[output]]: must be tables, each below a line [[output]]"),
        ('[[output]]\nlabels = ["a"]', "[output 1] kind: missing"),
        (
            '[[output]]\nkind = "mqtt"\n[[output]]\nkind = "mail"',
            "[output 2] kind = 'mail': must be one of mqtt, webhook, gpio",
        ),
        ('[[output]]\nkind = "mqtt"\nhits = 2', "[output 1] hits = 2: more than half of `of` (5)"),
        ('[[output]]\nkind = "mqtt"\nhits = 6', "[output 1] hits = 6: more than half of `of` (5), and at most all"),
        ('[[output]]\nkind = "mqtt"\n[[output]]\nkind = "mqtt"', "[[output]]: at most one of kind"),
        ("[loop]\nfps = 1e-9", "[loop] fps = 1e-09: 0 (no limit), or 1e-05 (about one frame a day) and more"),
        ('[[output]]\nkind = "gpio"\npin = 17', "[output 1] labels: kind = "),
        ('[[output]]\nkind = "gpio"\nlabels = ["a"]', "[output 1] pin: missing"),
        ('[[output]]\nkind = "webhook"', "[output 1] url = ''"),
        ('[[output]]\nkind = "webhook"\nurl = "ftp://host/"', "https://HOST[:PORT]/PATH is needed"),
        ('[[output]]\nkind = "webhook"\nurl = "https://[::1/"', "https://HOST[:PORT]/PATH is needed"),
        ('[[output]]\nkind = "webhook"\nurl = "https://host:99999/"', "https://HOST[:PORT]/PATH is needed"),
        ('[[output]]\nkind = "webhook"\nurl = "https://u:s3cret@host/"', "without user and password"),
        (
            '[[output]]\nkind = "webhook"\nurl = "http://host/"\nheader_file = "/h"',
            "[output 1] header_file: a secret needs https://",
        ),
        (
            '[loop]\nfps = 0.1\n[[output]]\nkind = "mqtt"',
            "[output 1] stale_s = 10: 20 or more with [loop] fps = 0.1",
        ),
    ],
)
def test_outputs_that_cannot_be(text: str, message: str, tmp_path: Path) -> None:
    (path := tmp_path / "device.toml").write_text(text + "\n")
    [line] = errors(path)
    assert message in line and "s3cret" not in line


def test_several_outputs(tmp_path: Path) -> None:
    (path := tmp_path / "device.toml").write_text(
        '[[output]]\nkind = "gpio"\nlabels = ["a"]\npin = 17\nhits = 1\nof = 1\n'
        '[[output]]\nkind = "webhook"\nurl = "http://localhost:8080/x"\nheader_file = "/h"\n'
    )
    first, second = read_config(path).output
    assert (first.kind, first.pin, first.labels) == ("gpio", 17, ("a",))
    assert (second.kind, second.url) == ("webhook", "http://localhost:8080/x")


def test_one_camera_among_several_has_its_own_state_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the folder of its file; what the file says wins; anywhere else it is a file like any other."""
    monkeypatch.setattr(config_module, "INSTANCES", tmp_path / "devices")
    (tmp_path / "devices").mkdir()
    (path := tmp_path / "devices" / "line-7.toml").write_text("[loop]\nfps = 5\n")
    config = read_config(path)
    assert (config.device.state, config.device.name) == ("/var/lib/eyas/devices/line-7", f"{default_name()}-line-7")
    assert config.loop.fps == 5
    monkeypatch.chdir(tmp_path)
    assert read_config(Path("devices/line-7.toml")).device == config.device
    path.write_text('[device]\nname = "press"\nstate = "/data/press"\n')
    assert read_config(path).device == DeviceSection(name="press", state="/data/press")
    path.write_text('[device]\nsite = "hall"\n')
    assert read_config(path).device.state == "/var/lib/eyas/devices/line-7"
    (other := tmp_path / "line-7.toml").write_text("")
    assert read_config(other).device == DeviceSection()
    assert [instance_of(p) for p in (path, other, None, tmp_path / "devices" / "readme.txt")] == ["line-7", "", "", ""]


def test_a_name_of_a_file_that_no_device_can_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "INSTANCES", tmp_path)
    (path := tmp_path / "line 7.toml").write_text("")
    assert any(line.startswith("[device] name = ") for line in errors(path))


def test_a_long_host_name_leaves_room_for_the_instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "h" * 64)
    monkeypatch.setattr(config_module, "INSTANCES", tmp_path)
    (path := tmp_path / "press-2.toml").write_text("")
    name = read_config(path).device.name
    assert name.startswith("hhh") and name.endswith("h-press-2") and len(name) == 64
    (path := tmp_path / f"{'x' * 64}.toml").write_text("")
    [error] = errors(path)
    assert error.startswith("[device] name = ") and "1 to 64 letters" in error


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_a_file_in_another_encoding_says_so(encoding: str, tmp_path: Path) -> None:
    (path := tmp_path / "c.toml").write_bytes("[loop]\r\nfps = 3\r\n".encode(encoding))
    [error] = errors(path)
    assert "TOML" in error


def test_any_editor_may_have_written_the_file(tmp_path: Path) -> None:
    (path := tmp_path / "c.toml").write_bytes("\ufeff[loop]\r\nfps = 3\r\n".encode())
    assert read_config(path).loop.fps == 3
