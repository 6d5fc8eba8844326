"""Matrix-free algorithms on a symmetric matvec; they know nothing of networks."""
