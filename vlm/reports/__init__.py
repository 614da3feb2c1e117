"""What people read of an evaluation: results, tables with published rows, plots, examples."""
