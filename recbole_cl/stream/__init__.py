"""What comes when: one time-sorted table, stages as sets of targets in it, schedulers, growing vocabularies."""
