"""What each stage of training learns: its records turned into an objective and the stream of its batches.

A module a stage, so that a change to one makes no other stage's artifact anew. They know neither Prefect nor MLflow:
the tasks and `benchmarks/` train on the same lessons.
"""
