"""Language models: optimisers and cuts of attention, the trainer, the page."""
