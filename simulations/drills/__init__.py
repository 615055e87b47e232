"""Drills: a federation on this machine, its real programs, and what breaks them (docs/faults.md)."""
