"""Number formats of quantized values, by name."""
