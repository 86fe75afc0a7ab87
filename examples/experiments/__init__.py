"""The experiments of the other three papers, and language models: a folder each."""
