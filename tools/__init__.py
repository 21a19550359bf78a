"""Programs of the house: used by setup.py, the Makefile and the gate; never installed."""
