"""What every room stands on: the network, its tokenizer, the model directory and the ONNX graph."""
