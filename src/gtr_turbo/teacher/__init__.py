"""The teacher: which checkpoints it is made of, and how it guides."""
