"""The parts of a quantizer: configuration, checks and declarations, without torch."""
