"""What a run says about itself: progress for people, metrics for machines."""
