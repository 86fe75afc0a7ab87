"""Trainers whose data stream from disk, on any mesh, for days: ImageNet."""
