"""The blocking API: thin classes over `hypercell.aio`. All but `portal.py` is made by `sdk/make_blocking.py`."""
