"""Tiers below the slab: where sealed blocks go when they leave it, and come back from."""
