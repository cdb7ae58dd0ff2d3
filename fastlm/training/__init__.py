"""Train, evaluate and sample language models, with checkpoints that survive a crash."""
