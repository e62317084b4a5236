"""A plain OpenCV + interpreter script, as users write it after the tutorials: the opponent of `frame_loop.py`."""

import json
import sys
import time
from typing import TYPE_CHECKING

import cv2
import numpy as np
import paho.mqtt.client as mqtt
from ai_edge_litert.interpreter import Interpreter

if TYPE_CHECKING:
    from sides.turns import serve
else:
    from turns import serve  # a program of its own: this folder is on its path


def main() -> None:
    """Answer turns of frames."""
    model, frames = sys.argv[1], np.load(sys.argv[2])
    cv2.setNumThreads(1)
    interpreter = Interpreter(model_path=model, num_threads=1)
    interpreter.allocate_tensors()
    entry, exit_ = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    size = entry["shape"][1]
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)  # not connected: its queue takes the messages
    client.max_queued_messages_set(1)
    encoded = [frames[name] for name in sorted(frames.files)]

    def answer(data: np.ndarray) -> int:
        image = cv2.imdecode(data, cv2.IMREAD_COLOR)
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        image = cv2.resize(image, (size, size))
        batch = np.expand_dims(image.astype(np.float32) / 255.0, axis=0)
        if entry["dtype"] != np.float32:
            scale, zero = entry["quantization"]
            batch = np.clip(np.round(batch * 255.0 / scale) + zero, -128, 127).astype(entry["dtype"])
        else:
            batch = batch * 255.0
        interpreter.set_tensor(entry["index"], batch)
        interpreter.invoke()
        logits = interpreter.get_tensor(exit_["index"])[0].astype(np.float32)
        scale, zero = exit_["quantization"]
        if scale:
            logits = (logits - zero) * scale
        p = np.exp(logits) / np.exp(logits).sum()
        label = int(np.argmax(p))
        client.publish(
            "camera/answer", json.dumps({"label": label, "confidence": float(p[label]), "time": time.time()})
        )
        return label

    serve(answer, encoded)


main()
