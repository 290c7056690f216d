"""For tests of attention, funcmha or not: problems to try, bounds to hold, gradients to check."""
