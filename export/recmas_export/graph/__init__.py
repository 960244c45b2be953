"""From a Hugging Face model to portable ONNX graphs."""
