"""Decorrelated networks: settings, rules, trainer, measurements, page."""
