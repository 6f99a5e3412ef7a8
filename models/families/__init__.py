"""Families, one file each, named by Hugging Face's model_type; `models/family.py` defines what one holds."""
