"""Moving KV blocks between two processes: the limits of this machine and the peers, beside Headway's own planes."""
