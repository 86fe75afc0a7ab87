"""Speed and accuracy in the same row, beside the peers: see README.md."""
