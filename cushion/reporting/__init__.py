"""Tables and figures, drawn from result.json alone."""
