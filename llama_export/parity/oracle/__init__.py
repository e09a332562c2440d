"""What is right: the reference traced in float64, and an evaluator of ONNX graphs."""
