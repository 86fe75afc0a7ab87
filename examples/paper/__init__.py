"""The studies of arXiv 2202.07052, and ours beside the paper's."""
