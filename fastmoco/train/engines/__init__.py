"""How the objective is run: by one process, or by many that share the gradients, or the optimiser's state too."""
