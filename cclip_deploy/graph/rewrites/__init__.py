"""Exact rewrites: each replaces a module by one that computes the same values in fewer or cheaper operations."""
