"""The four services."""

import os

# grpc reads it when imported. Without its event engine a message takes fewer threads: figures in docs/performance.md.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
