"""What every other package uses: the network, its tokenizer, the model directory and the ONNX graph."""
