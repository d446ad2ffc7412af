"""Pages in Flower: a tab of batches in its own layout, behind its own authentication."""
