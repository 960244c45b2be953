"""Engines: one interface, ONNX Runtime and TensorRT behind it."""
