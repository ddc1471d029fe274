"""The formats that Cushion has; one registers itself when its module is imported. Nothing here needs torch."""
