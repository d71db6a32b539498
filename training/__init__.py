"""What both training scripts need to lose nothing: whole checkpoints, the run's own output directory, an orderly stop."""
