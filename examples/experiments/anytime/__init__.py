"""Anytime networks: the trainer, the rules for several tasks, the page."""
