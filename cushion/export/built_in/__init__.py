"""The export targets that Cushion has. Every module here is imported for what it registers, and none imports torch."""
