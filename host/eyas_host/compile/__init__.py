"""From a torch model to the files that a device runs: LiteRT, OpenVINO, ONNX."""
