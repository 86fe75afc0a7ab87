"""What the documentation takes from the rest of the repository when it is built."""
