"""How large the set of low loss around a minimum is: volumes from rays, learning coefficients from chains."""
