"""Which code and which libraries a stage depends on: found in sources, whatever was imported before."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from eyas_host.pipeline import code
from eyas_host.pipeline.code import dependencies
from eyas_host.stages.chain import STAGES

FILES = {
    "__init__.py": "",
    "stage.py": '"""A."""\nfrom toykit.data import split\n\ndef run():\n    import toykit.late\n    return split()\n',
    "data/__init__.py": "",
    "data/split.py": "import numpy\n\ndef split():\n    return 1\n",
    "late.py": 'TABLE = {"one": "toykit.runtime:One"}\n',
    "runtime.py": "import onnx\n",
    "typing_only.py": "import torch\n",
    "other.py": "import pandas\n",
}


@pytest.fixture
def toykit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose module `stage` imports at the top, in a function, by name, and for type checkers."""
    for name, text in FILES.items():
        (tmp_path / "toykit" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "toykit" / name).write_text(text)
    with (tmp_path / "toykit" / "late.py").open("a") as stream:
        stream.write("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from toykit import typing_only\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "toykit"


def look() -> code.Dependencies:
    code._closure.cache_clear()
    code._read.cache_clear()
    return dependencies("toykit.stage", ("toykit",))


def test_what_is_imported_anywhere_counts(toykit: Path) -> None:
    assert set(look().libraries) == {"numpy", "onnx"}
    assert look().libraries["numpy"] == metadata.version("numpy")
    (toykit / "runtime.py").write_text("import no_such_library\n")
    assert look().libraries["no_such_library"] == "not installed"


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("data/split.py", lambda text: text.replace("return 1", "return 2")),
        ("runtime.py", lambda text: text + "X = 1\n"),
        ("stage.py", lambda text: text.replace("split()", "split() + 0")),
    ],
)
def test_a_change_of_code_changes_the_hash(toykit: Path, file: str, change: Callable[[str], str]) -> None:
    before = look()
    (toykit / file).write_text(change((toykit / file).read_text()))
    assert look().code != before.code


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (
            "data/split.py",
            '"""Now documented."""\nimport numpy\n\n\ndef split():\n    """One."""\n    return 1  # one\n',
        ),
        ("late.py", 'TABLE = {\n    "one": "toykit.runtime:One",\n}\n"""Name -> class."""\n'),
        ("other.py", "import pandas\nX = 1\n"),
        ("typing_only.py", "import torch\nX = 1\n"),
    ],
)
def test_documentation_layout_and_other_modules_do_not(toykit: Path, file: str, text: str) -> None:
    (toykit / "late.py").write_text(FILES["late.py"])
    before = look()
    (toykit / file).write_text(text)
    assert look() == before


def test_a_template_belongs_to_its_module(toykit: Path) -> None:
    before = look()
    (toykit / "data" / "page.html.j2").write_text("<html>")
    assert look().code != before.code


def test_it_does_not_depend_on_what_was_imported_before() -> None:
    """Nor does it import anything heavy: the answer is needed where nothing has changed."""
    script = (
        "import sys; from eyas_host.pipeline.code import dependencies; d = dependencies('eyas_host.stages.qat'); "
        "assert 'torch' not in sys.modules and 'cv2' not in sys.modules; print(d.code, *sorted(d.libraries.items()))"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    here = dependencies("eyas_host.stages.qat")
    assert printed.split()[0] == here.code
    assert printed.split(maxsplit=1)[1].strip() == " ".join(str(item) for item in sorted(here.libraries.items()))


@pytest.mark.parametrize(
    ("stage", "some", "none"),
    [
        ("split", {"opencv-python-headless", "pillow", "numpy"}, {"torch", "timm"}),
        ("teach", {"torch", "timm", "opencv-python-headless", "accelerate", "openvino"}, {"nncf", "litert-torch"}),
        ("distill", {"torch", "timm", "openvino"}, {"nncf", "litert-torch"}),
        ("qat", {"nncf", "torch"}, {"litert-torch", "ai-edge-quantizer"}),
        ("compile", {"nncf", "litert-torch", "ai-edge-quantizer", "openvino", "onnx"}, set()),
        ("verify", {"ai-edge-litert", "openvino", "onnxruntime", "opencv-python-headless"}, set()),
        ("report", {"scikit-learn"}, {"matplotlib", "jinja2", "rich"}),
    ],
)
def test_the_stages_name_the_libraries_that_they_use(stage: str, some: set[str], none: set[str]) -> None:
    """Of the extra `train`, by what each stage is known to do."""
    (module,) = (entry.module for entry in STAGES if entry.name == stage)
    libraries = dependencies(module).libraries
    assert some <= set(libraries) and not none & set(libraries)
    assert "not installed" not in libraries.values()
