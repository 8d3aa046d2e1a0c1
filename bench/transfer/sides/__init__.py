"""The child processes of the movers. They import the standard library and the peer, so that any python can run them."""
