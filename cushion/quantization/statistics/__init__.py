"""What is gathered of the inputs of linears beside the ranges of their channels."""
