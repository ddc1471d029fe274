"""What is kept of the inputs of linears over a calibration, beside the ranges of their channels."""
