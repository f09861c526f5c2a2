"""How much memory a training step takes, known before it runs; and the plan that fits a budget."""
