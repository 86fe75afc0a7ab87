"""Low-rank networks (OIALR): settings, trainer, runs, page."""
