"""Checkpoint -> traced program -> ONNX graph -> bundle; and weights in another dtype or rounded."""
