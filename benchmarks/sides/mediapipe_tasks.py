"""MediaPipe Tasks' image classifier on the same model and frames. Runs in an environment of its own.

Its classifier refuses a float model without metadata: a copy says that pixels go in as they are, 0..255.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import flatbuffers
import mediapipe
import numpy as np
from mediapipe.tasks.metadata import metadata_schema_py_generated as metadata
from mediapipe.tasks.metadata import schema_py_generated as schema
from mediapipe.tasks.python import BaseOptions
from mediapipe.tasks.python.vision import ImageClassifier, ImageClassifierOptions

if TYPE_CHECKING:
    from sides.turns import serve
else:
    from turns import serve  # a program of its own: this folder is on its path


def with_metadata(path: Path) -> bytes:
    """The model's bytes with the metadata that says that pixels go in as they are."""
    normalise = metadata.NormalizationOptionsT()
    normalise.mean, normalise.std = [0.0], [1.0]
    unit = metadata.ProcessUnitT()
    unit.optionsType, unit.options = metadata.ProcessUnitOptions.NormalizationOptions, normalise
    image = metadata.TensorMetadataT()
    image.name, image.processUnits = "image", [unit]
    image.content = metadata.ContentT()
    image.content.contentPropertiesType = metadata.ContentProperties.ImageProperties
    image.content.contentProperties = metadata.ImagePropertiesT()
    image.content.contentProperties.colorSpace = metadata.ColorSpaceType.RGB
    answer = metadata.TensorMetadataT()
    answer.name = "logits"
    graph = metadata.SubGraphMetadataT()
    graph.inputTensorMetadata, graph.outputTensorMetadata = [image], [answer]
    whole = metadata.ModelMetadataT()
    whole.name, whole.subgraphMetadata = "classifier", [graph]
    builder = flatbuffers.Builder(1024)
    builder.Finish(whole.Pack(builder), b"M001")
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(path.read_bytes(), 0))
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(bytes(builder.Output()), dtype=np.uint8)
    model.buffers.append(buffer)
    entry = schema.MetadataT()
    entry.name, entry.buffer = b"TFLITE_METADATA", len(model.buffers) - 1
    model.metadata = [*(model.metadata or []), entry]
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def main() -> None:
    """Answer turns of frames."""
    frames = np.load(sys.argv[2])
    cv2.setNumThreads(1)
    encoded = [frames[name] for name in sorted(frames.files)]
    options = ImageClassifierOptions(
        base_options=BaseOptions(model_asset_buffer=with_metadata(Path(sys.argv[1]))), max_results=1
    )
    with ImageClassifier.create_from_options(options) as classifier:

        def answer(data: np.ndarray) -> int:
            image = cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
            image = mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=image)
            return int(classifier.classify(image).classifications[0].categories[0].index)

        serve(answer, encoded)


main()
