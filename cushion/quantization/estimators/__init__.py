"""Range estimators of static activations: what each needs, and how a range follows from it."""
