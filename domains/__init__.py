"""What a model is for: one package a domain."""
