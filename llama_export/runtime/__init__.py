"""Production: a bundle in, tokens out. Needs numpy, tokenizers and onnxruntime or TensorRT; neither torch nor onnx."""
