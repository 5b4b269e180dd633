"""In which dtypes a step computes: 16-bit parameters with float32 masters, loss scaling, emulation, float8."""
