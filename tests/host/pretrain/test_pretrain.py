"""`eyas pretrain`: images of packages, crops that repeat themselves, a training that pauses and goes on."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eyas_host.models.factory import build
from eyas_host.pretrain import make, train
from eyas_host.pretrain.card import Record, weights_card
from eyas_host.pretrain.crops import Crops
from eyas_host.pretrain.images import SOURCES, ImageFile, find_images, read_images, split_held_out
from eyas_host.pretrain.teachers import TeacherEnsemble, compiled_teachers, imagenet_teacher
from eyas_host.pretrain.train import PretrainResult, PretrainSettings, pretrain
from eyas_host.support.errors import StageError, WeightsError
from tests.support.inside import eyas
from tests.support.shapes import SHAPES, Pixels, draw_shape
from tests.support.small_disk import mounted

BIN = Path(sys.executable).parent
SHORT = PretrainSettings(crops=96, size=32, last_size=40, last=0.5, batch=16, ema=0.9)


def every(crops: Crops) -> list[Pixels]:
    return [crops[number] for number in range(len(crops))]


@pytest.fixture(scope="module")
def drawn() -> list[Pixels]:
    return [draw_shape(label, seed, 80, 96) for label in SHAPES for seed in range(4)]


@pytest.fixture
def root(tmp_path: Path, drawn: list[Pixels]) -> Path:
    """A file system with one unpacked package of Debian's, and a stamp that is transparent around its shape."""
    folder = tmp_path / "root/usr/share/tuxpaint/stamps/animals"
    (folder.parent / "symbols").mkdir(parents=True)
    folder.mkdir()
    for number, image in enumerate(drawn):
        cv2.imwrite(str(folder / f"{number}.png"), image)
    cv2.imwrite(str(folder.parent / "symbols/a.png"), drawn[0][::-1])
    stamp = np.zeros((200, 300, 4), dtype=np.uint8)
    stamp[20:120, 30:110] = (10, 20, 30, 255)
    cv2.imwrite(str(folder / "stamp.png"), stamp)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image either")
    return tmp_path / "root"


def test_images_are_those_of_the_packages(root: Path) -> None:
    found = [one for one in find_images(root) if one.package == "tuxpaint-stamps-default"]
    assert {Path(one.path).stem for one in found} == {*map(str, range(20)), "stamp", "broken"}
    learned, out = split_held_out(found)
    assert {one.path for one in learned}.isdisjoint(one.path for one in out)
    images = read_images(found, "images")
    assert len(images) == 21
    assert any(image.shape == (100, 80, 3) and (image == (10, 20, 30)).all() for image in images)


def test_one_image_at_least_is_held_out() -> None:
    found = [ImageFile(f"{number}.png", "one", f"{number:064x}") for number in range(1, 16)]
    learned, out = split_held_out(found)
    assert len(out) == 1 and len(learned) == 14


def test_without_images_the_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eyas_host.pretrain.images.SOURCES", tuple(s for s in SOURCES if not s.module))
    with pytest.raises(WeightsError, match=r"0 images .* apt-get install tuxpaint-stamps-default mate-backgrounds"):
        find_images(tmp_path)


@settings(max_examples=60, deadline=None)
@given(number=st.integers(0, 10**9), height=st.integers(2, 700), width=st.integers(2, 700), size=st.integers(8, 64))
def test_every_crop_is_a_view_and_repeats_itself(number: int, height: int, width: int, size: int) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    one, other = (Crops([image], size=size, count=number + 1)[number] for _ in range(2))
    assert one.shape == (size, size, 3) and one.dtype == np.uint8
    np.testing.assert_array_equal(one, other)


def test_crops_do_not_depend_on_those_drawn_before(drawn: list[Pixels]) -> None:
    whole, others = every(Crops(drawn, size=32, count=12)), Crops(drawn, size=32, count=20)
    np.testing.assert_array_equal(whole[8:], [others[number] for number in range(8, 12)])
    assert len({crop.tobytes() for crop in whole}) == 12


def test_a_crop_of_a_plain_image_stays_plain() -> None:
    image = np.full((300, 200, 3), (90, 90, 90), dtype=np.uint8)
    for crop in every(Crops([image], size=32, count=20)):
        assert np.ptp(crop) == 0


def test_a_paused_training_ends_as_one_that_was_not(
    drawn: list[Pixels], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "_VALIDATION_CROPS", 16)
    whole = pretrain(SHORT, drawn, drawn[:5], tmp_path / "whole", device="cpu")
    paused = pretrain(SHORT, drawn, drawn[:5], tmp_path / "paused", minutes=0.0, device="cpu")
    assert paused.crops == 16 and not paused.finished and whole.finished and whole.crops == 96
    resumed = pretrain(SHORT, drawn, drawn[:5], tmp_path / "paused", device="cpu")
    weights = tmp_path / "whole/mobilenetv3_small_100.safetensors"
    one, other = (safetensors.torch.load_file(path) for path in (weights, tmp_path / "paused" / weights.name))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert (resumed.agreement, resumed.divergence) == (whole.agreement, whole.divergence)
    with pytest.raises(WeightsError, match=r"rate = 0.003; use the same settings or another folder"):
        pretrain(msgspec.structs.replace(SHORT, rate=1e-3), drawn, drawn, tmp_path / "whole")
    model, origin = build("mobilenetv3_small_100", 5, "file", weights_file=str(weights))
    stem = model.backbone.state_dict()["conv_stem.weight"]
    assert origin == "file" and torch.equal(stem.half(), one["backbone.conv_stem.weight"])
    assert model.mean.flatten().tolist() == pytest.approx([128.0] * 3)
    with pytest.raises(WeightsError, match="mobilenetv3_large_100"):
        build("mobilenetv3_large_100", 5, "file", weights_file=str(weights))


def test_a_full_disk_is_reported_and_nothing_half_written_stays(
    drawn: list[Pixels], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "_VALIDATION_CROPS", 16)
    with mounted(tmp_path / "small", "size=20m") as disk:
        with pytest.raises(StageError, match="No space left on device"):
            pretrain(SHORT, drawn, drawn[:5], disk / "start", device="cpu")
        assert [path.name for path in (disk / "start").iterdir()] == ["settings.json"]


def test_a_student_learns_what_the_teacher_says(
    drawn: list[Pixels], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "_VALIDATION_CROPS", 32)
    plan = PretrainSettings(crops=768, size=64, last_size=64, batch=16, ema=0.0)
    result = pretrain(plan, drawn, drawn[:5], tmp_path, device="cpu")
    looks = torch.load(tmp_path / "pretrain.ckpt", weights_only=True)["history"]
    first = -json.loads(looks[0])["metrics"]["combined"]
    assert result.divergence < 0.9 * first


def test_teachers_answer_together_and_the_same_in_openvino(
    drawn: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = imagenet_teacher("tf_efficientnet_lite0")
    with torch.no_grad():
        other.backbone.get_parameter("classifier.bias").add_(torch.linspace(0, 3, 1000))
    one = imagenet_teacher("tf_efficientnet_lite0")
    made = iter([one, other] * 2)
    monkeypatch.setattr("eyas_host.pretrain.teachers.imagenet_teacher", lambda name: next(made))
    pixels = torch.from_numpy(np.stack(drawn[:3])).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        wanted = (one(pixels).softmax(1) + other(pixels).softmax(1)).log() - np.log(2)
        torch.testing.assert_close(TeacherEnsemble(["one", "other"])(pixels), wanted, atol=1e-4, rtol=0)
    assert wanted.shape == (3, 1000)
    torch.testing.assert_close(
        compiled_teachers(["one", "other"], torch.device("cpu"))(pixels), wanted, atol=2e-3, rtol=0
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--student", "mobilenet"), "student 'mobilenet': timm has no such network"),
        (("--teacher", "resnet50"), "there are: tf_efficientnet_lite0, tf_efficientnet_lite1"),
        (("--crops", "0"), "crops"),
        (("--size", "16"), "size"),
    ],
)
def test_mistakes_are_reported_in_one_line(root: Path, tmp_path: Path, words: tuple[str, str], message: str) -> None:
    done = eyas(tmp_path, "pretrain", "--images", root, *words)
    assert done.code == 2 and message in done.err and "Traceback" not in done.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "settings",
    [
        PretrainSettings(crops=1000),
        PretrainSettings(size=64, last_size=128, batch=32, seed=3),
        PretrainSettings(
            student="mobilenetv3_large_100",
            teachers=("tf_efficientnet_lite1", "tf_efficientnet_lite2"),
            size=48,
            last_size=64,
        ),
    ],
)
def test_the_cards_command_makes_it_again(
    settings: PretrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[PretrainSettings] = []
    monkeypatch.setattr(make, "make_pretrained", lambda settings, *_, **__: asked.append(settings) or "made")
    result = PretrainResult(crops=1000, seconds=1.0, agreement=0.5, divergence=1.0, held_out=512, finished=True)
    card = weights_card(Record(settings, result, "a machine", {}))
    [line] = [line.strip() for line in card.splitlines() if line.startswith("    eyas pretrain")]
    done = eyas(tmp_path, *line.split()[1:])
    assert done.code == 0 and asked == [settings]


def test_the_verb_survives_a_kill_and_writes_its_card(root: Path, tmp_path: Path) -> None:
    command = [BIN / "eyas", "pretrain", "--images", root, "--runs", tmp_path, "--crops", "1280", "--size", "32"]
    folder = tmp_path / "pretrain/mobilenetv3_small_100"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not (folder / "settings.json").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (folder / "mobilenetv3_small_100.md").exists()
    done = subprocess.run([*command, "--minutes", "0"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "10% done" in done.stdout
    message = " ".join(done.stderr.split())
    assert "none of mate-backgrounds, plasma-workspace-wallpapers" in message and "apt-get install tuxpaint" in message
    card = (folder / "mobilenetv3_small_100.md").read_text()
    assert "| tuxpaint-stamps-default |" in card and "128 crops (paused" in card
    record = json.loads((folder / "mobilenetv3_small_100.json").read_bytes())
    assert "tuxpaint-stamps-default" in record["images"].values() and record["result"]["crops"] == 128
    shutil.rmtree(root)
    refused = eyas(tmp_path, *command[1:], "--seed", "1")
    assert refused.code == 2 and "Traceback" not in refused.err
