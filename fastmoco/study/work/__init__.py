"""What computes a cell: one module a kind."""
