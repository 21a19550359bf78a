"""Benchmarks of srengine against plain C loops and against what a user would otherwise pick (see README.md)."""
