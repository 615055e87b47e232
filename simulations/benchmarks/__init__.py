"""What transport and private steps cost: measured, not guessed."""
