"""Chats beside long prompts, phases apart and together."""
