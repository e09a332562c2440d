"""The custom ops: ``table`` says what they are, without torch; the other files are their maths in PyTorch."""
