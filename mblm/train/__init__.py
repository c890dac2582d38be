"""Training: the trainer, the experiments, and the commands that run them."""
