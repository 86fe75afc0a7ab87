"""The documentation: pages, and what is written when they are built."""
