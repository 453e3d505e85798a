"""The one table of tolerances: how far results may be from what they are compared with, and why."""

# The defaults of torch.testing.assert_close: whoever compares cbn with PyTorch by PyTorch's own
# test function gets these. Every test compares at them and none widens them.
CLOSE = {
    "float32": {"rtol": 1.3e-6, "atol": 1e-5},
    "float64": {"rtol": 1e-7, "atol": 1e-7},
    # PyTorch's for these two. cbn is one rounding, half a unit in the last place, from the float32
    # result: 4.9e-4 and 3.9e-3.
    "float16": {"rtol": 1e-3, "atol": 1e-5},
    "bfloat16": {"rtol": 1.6e-2, "atol": 1e-5},
}

# What docs/numerics.md promises on data that is hard: relative errors, as hard.errors measures
# them. One rounding to float32 is 6e-8 at most, to float64 1.1e-16, and the formulas make several.
LARGEST_ERROR = {"float32": 1e-6, "float64": 1e-14}

# What a law makes equal may differ by a few units in the last place, for a few operations each,
# beside the largest value or the sum of magnitudes that it is made of.
SLACK = {"float32": 2e-6, "float64": 1e-14}

# Gradients of parameters are sums whose terms may cancel: beside CLOSE, what docs/numerics.md
# promises of them, in units of the sum of the magnitudes of the terms.
LARGEST_SUM_ERROR = {"float32": 1e-7, "float64": 1e-15}
