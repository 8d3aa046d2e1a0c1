"""Real services with simulated engines under a trace: see __main__."""
