"""Simulated quantization: the grid, quantized linears, calibration and SmoothQuant."""
