"""A Flower app that does nothing but exchange messages."""
