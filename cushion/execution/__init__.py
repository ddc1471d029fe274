"""How a quantized linear is computed."""
