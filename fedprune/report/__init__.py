"""Reports: every number and every line of a figure is computed from run records."""
