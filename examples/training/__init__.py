"""What the trainers share: runs, optimisers, checkpoints, results files."""
