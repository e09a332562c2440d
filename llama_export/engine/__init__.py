"""Bundle -> TensorRT engine, and everything that can be said of an engine without a GPU."""
