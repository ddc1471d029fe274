"""What is measured on a finished model."""
