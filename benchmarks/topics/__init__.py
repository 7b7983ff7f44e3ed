"""The measurements, one module each: `async def measure(setup) -> list[Row]`."""
