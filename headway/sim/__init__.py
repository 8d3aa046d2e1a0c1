"""The simulator: the routing policy, the workers' order and the fleet under virtual time."""
