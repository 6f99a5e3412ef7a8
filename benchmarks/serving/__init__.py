"""Our engine and server beside llama.cpp, onnxruntime-genai and CTranslate2: `python -m benchmarks.serving`."""
