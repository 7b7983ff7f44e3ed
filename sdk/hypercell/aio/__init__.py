"""The SDK's core, all of it asynchronous. `hypercell.blocking` is made from it."""
