"""Trainers that use orthax on real data, to be read from top to bottom."""
