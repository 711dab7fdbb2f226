"""An ONNX file as a network: its bytes, its operators, its graph."""
