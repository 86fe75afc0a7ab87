"""The networks that the trainers train, one file each."""
