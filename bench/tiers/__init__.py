"""Where a prompt's prefix may lie, and how long the first token takes then."""
