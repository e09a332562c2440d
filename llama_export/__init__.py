"""Llama checkpoints to ONNX and TensorRT engines that are proven to compute what the checkpoint computes."""

__version__ = "0.1.0"
__all__ = ["__version__"]
