"""The experiments of the other three papers, one folder each."""
